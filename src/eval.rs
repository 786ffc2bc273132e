//! `eval`: scores on an exam or on a file of problems, with standard errors and baselines.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use actor::engine::Engine;
use anyhow::{Context as _, Result, bail};
use domains::{Split, exam, exam_specs};
use learner::{list_checkpoints, load_checkpoint};
use policy::{ModelConfig, PackedWeights, Params};
use proto::{
    Behavior, Digest, Problem, ProblemOrigin, Request, Sampling, ScoredGroup, Task, TaskId, TaskKind, Token, Verdict,
};

use crate::report::{percent, print, table};
use crate::{baselines, run_config};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A run directory (its newest checkpoint) or a checkpoint.
    run: PathBuf,
    /// An exam of `autodidact domains`, or `all` for those of the domains that the run trains on.
    #[arg(long, conflicts_with = "problems", default_value = "all")]
    exam: String,
    /// A file of problems, one JSON object a line.
    #[arg(long, value_name = "FILE.jsonl")]
    problems: Option<PathBuf>,
    /// Sampled answers a problem, for pass@k.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    samples: u32,
    /// Which part of the exam.
    #[arg(long, default_value = "test", value_parser = ["dev", "test"])]
    split: String,
    /// Print one JSON object an exam instead of tables.
    #[arg(long)]
    json: bool,
    /// Threads; 0 for all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// Right answers by problem, out of a number of samples each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scores {
    pub(crate) num_samples: u32,
    pub(crate) correct: Vec<u32>,
}

impl Scores {
    /// Estimates the share of problems that k samples solve, without bias, and its standard error.
    ///
    /// Source: Chen et al. 2021, "Evaluating large language models trained on code", section 2.1.
    pub(crate) fn pass_at(&self, k: u32) -> (f64, f64) {
        let solved: Vec<f64> = self.correct.iter().map(|correct| pass_at(self.num_samples, *correct, k)).collect();
        let mean = solved.iter().sum::<f64>() / solved.len() as f64;
        let variance = solved.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / solved.len() as f64;
        (mean, (variance / solved.len() as f64).sqrt())
    }
}

fn pass_at(num_samples: u32, num_correct: u32, k: u32) -> f64 {
    let num_wrong = num_samples - num_correct;
    let misses = (0..k).map(|drawn| f64::from(num_wrong.saturating_sub(drawn)) / f64::from(num_samples - drawn));
    1.0 - misses.product::<f64>()
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let checkpoint = find_checkpoint(&args.run)?;
    let (model, checkpoint) = load_checkpoint(&checkpoint)?;
    let trained = Player::new(&model, &checkpoint.state.ema, args.threads)?;
    let untrained = Player::new(&model, &Params::init(&model, 0), args.threads)?;
    let split = if args.split == "dev" { Split::Dev } else { Split::Test };
    let mut sets: Vec<(String, Vec<Problem>)> = Vec::new();
    match &args.problems {
        Some(path) => sets.push((path.display().to_string(), read_problems(path)?)),
        None if args.exam == "all" => {
            let trained = trained_domains(&args.run);
            for spec in exam_specs() {
                if trained.as_ref().is_some_and(|trained| !trained.iter().any(|name| name == spec.domain)) {
                    continue;
                }
                sets.push((format!("{} ({})", spec.name, args.split), exam(spec.name)?.split(split).to_vec()));
            }
        }
        None => sets.push((format!("{} ({})", args.exam, args.split), exam(&args.exam)?.split(split).to_vec())),
    }
    for (name, problems) in sets {
        let fits = positions_needed(&problems)? <= model.max_positions;
        if !fits && args.problems.is_none() && args.exam == "all" {
            print(&format!(
                "{name}: left out, its problems need more than model.max_positions = {}\n",
                model.max_positions
            ))?;
            continue;
        }
        let trained = trained.score(&problems, args.samples)?;
        let untrained = untrained.score(&problems, args.samples)?;
        let random = baselines::uniform_legal(&problems, args.samples)?;
        let enumerated: Vec<usize> = [1, args.samples as usize]
            .into_iter()
            .map(|calls| baselines::enumeration(&problems, calls))
            .collect::<Result<_>>()?;
        if args.json {
            print(&json(&name, checkpoint.state.step, &trained, &untrained, &random, &enumerated).to_string())?;
        } else {
            print(&format!("{name}, {} problems, step {}\n", problems.len(), checkpoint.state.step))?;
            print(&text(args.samples, &trained, &untrained, &random, &enumerated, problems.len()))?;
        }
    }
    Ok(())
}

fn text(
    k: u32,
    trained: &(Scores, Scores),
    untrained: &(Scores, Scores),
    random: &Scores,
    enumerated: &[usize],
    num_problems: usize,
) -> String {
    let cell = |(mean, error): (f64, f64)| format!("{} ± {:.1}", percent(mean), 100.0 * error);
    let share = |count: usize| percent(count as f64 / num_problems as f64);
    let mut head = vec![String::new(), "pass@1 greedy".to_owned(), "pass@1 sampled".to_owned()];
    let last = format!("pass@{k}");
    if k > 1 {
        head.push(last);
    }
    let network = |name: &str, scores: &(Scores, Scores)| {
        vec![name.to_owned(), cell(scores.0.pass_at(1)), cell(scores.1.pass_at(1)), cell(scores.1.pass_at(k))]
    };
    let mut rows = vec![
        head,
        network("trained", trained),
        network("untrained network, same mask", untrained),
        vec![
            "uniform random legal tokens".to_owned(),
            "-".to_owned(),
            cell(random.pass_at(1)),
            cell(random.pass_at(k)),
        ],
        vec![
            "blind enumeration, k checker calls".to_owned(),
            share(enumerated[0]),
            "-".to_owned(),
            share(enumerated[1]),
        ],
    ];
    rows.iter_mut().for_each(|row| row.truncate(if k > 1 { 4 } else { 3 }));
    table(&rows)
}

fn json(
    name: &str,
    step: u64,
    trained: &(Scores, Scores),
    untrained: &(Scores, Scores),
    random: &Scores,
    enumerated: &[usize],
) -> serde_json::Value {
    let k = random.num_samples;
    let estimate = |(mean, error): (f64, f64)| serde_json::json!({"mean": mean, "standard_error": error});
    let network = |scores: &(Scores, Scores)| {
        serde_json::json!({
            "greedy_pass_at_1": estimate(scores.0.pass_at(1)),
            "sampled_pass_at_1": estimate(scores.1.pass_at(1)),
            "pass_at_k": estimate(scores.1.pass_at(k)),
        })
    };
    serde_json::json!({
        "exam": name,
        "step": step,
        "k": k,
        "num_problems": trained.0.correct.len(),
        "trained": network(trained),
        "untrained": network(untrained),
        "uniform_legal": {"pass_at_1": estimate(random.pass_at(1)), "pass_at_k": estimate(random.pass_at(k))},
        "enumeration": {"solved_with_1_call": enumerated[0], "solved_with_k_calls": enumerated[1]},
    })
}

/// Plays problems with one version of the weights.
pub(crate) struct Player {
    weights: Arc<PackedWeights>,
    num_threads: usize,
}

impl Player {
    pub(crate) fn new(model: &ModelConfig, params: &Params, num_threads: usize) -> Result<Player> {
        let num_threads = match num_threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            given => given,
        };
        Ok(Player { weights: Arc::new(PackedWeights::new(model, params)?), num_threads })
    }

    /// Scores one greedy answer a problem, and a number of sampled ones.
    pub(crate) fn score(&self, problems: &[Problem], num_samples: u32) -> Result<(Scores, Scores)> {
        Ok((self.play(problems, 1, 0.0)?, self.play(problems, num_samples, 1.0)?))
    }

    /// Counts right answers; temperature 0 is greedy.
    fn play(&self, problems: &[Problem], num_samples: u32, temperature: f32) -> Result<Scores> {
        let groups = self.groups(problems, num_samples, temperature)?;
        let num_correct =
            |scored: &ScoredGroup| scored.verdicts.iter().filter(|verdict| **verdict == Verdict::Correct).count();
        Ok(Scores { num_samples, correct: groups.iter().map(|scored| num_correct(scored) as u32).collect() })
    }

    /// Answers one problem.
    pub(crate) fn answers(
        &self,
        problem: &Problem,
        num_samples: u32,
        temperature: f32,
    ) -> Result<Vec<(Vec<Token>, Verdict)>> {
        let scored = self.groups(std::slice::from_ref(problem), num_samples, temperature)?.remove(0);
        Ok(scored.group.rollouts.into_iter().map(|rollout| rollout.tokens).zip(scored.verdicts).collect())
    }

    /// Plays and judges, in order of the problems.
    fn groups(&self, problems: &[Problem], num_samples: u32, temperature: f32) -> Result<Vec<ScoredGroup>> {
        let (engine, mut groups) = Engine::start(actor::Config { num_threads: self.num_threads, num_slots: 512 });
        for (index, problem) in problems.iter().enumerate() {
            let task = Task {
                id: TaskId { kind: TaskKind::Evaluate, batch: 0, index: index as u32 },
                seed: 0,
                weights: Digest::of_bytes(b""),
                policy_version: 0,
                request: Request::Solve { problem: problem.clone(), origin: ProblemOrigin::Exam, has_key: false },
                family: String::new(),
                num_rollouts: num_samples,
                sampling: Sampling { behavior: Behavior::Policy, temperature },
                max_tokens: domains::domain(&problem.domain)?.max_answer_tokens(problem)?,
            };
            engine.submit(task, self.weights.clone())?;
        }
        let mut scored = BTreeMap::new();
        for _ in problems {
            let group = groups.blocking_recv().context("the engine ended early")??;
            scored.insert(group.task.id.index, verifier::score(group, None)?);
        }
        Ok(scored.into_values().collect())
    }
}

/// Counts the positions that prompts with their longest answers take.
pub(crate) fn positions_needed(problems: &[Problem]) -> Result<usize> {
    let needed = |problem: &Problem| -> Result<usize> {
        let domain = domains::domain(&problem.domain)?;
        Ok(domain.prompt(problem)?.len() + domain.max_answer_tokens(problem)? as usize)
    };
    problems.iter().try_fold(0, |most, problem| Ok(most.max(needed(problem)?)))
}

/// Finds a checkpoint: the path itself, or the newest one of a run.
pub(crate) fn find_checkpoint(path: &Path) -> Result<PathBuf> {
    if path.join("COMPLETE").exists() {
        return Ok(path.to_owned());
    }
    let newest = list_checkpoints(&path.join("checkpoints"))?.pop();
    newest.with_context(|| {
        format!("{}: expected a run with a checkpoint, or a checkpoint; found neither", path.display())
    })
}

/// Lists the domains that a run trains on; `None` for a checkpoint that is not in a run directory.
fn trained_domains(run: &Path) -> Option<Vec<String>> {
    let config = run_config::of_run(run).ok()?;
    Some(config.domains().map(str::to_owned).collect())
}

fn read_problems(path: &Path) -> Result<Vec<Problem>> {
    let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let mut problems = Vec::new();
    for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let at = || format!("{}, line {}", path.display(), index + 1);
        let line = std::str::from_utf8(line).with_context(at)?;
        if !line.trim().is_empty() {
            let json = serde_json::from_str(line).with_context(at)?;
            problems.push(domains::problem_from_json(&json).with_context(at)?);
        }
    }
    if problems.is_empty() {
        bail!("{}: expected problems, one JSON object a line, found none", path.display());
    }
    Ok(problems)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// numpy: 1 - comb(n - c, k) / comb(n, k)
    #[test]
    fn pass_at_k_by_hand() {
        assert_eq!(pass_at(8, 0, 8), 0.0);
        assert_eq!(pass_at(8, 1, 8), 1.0);
        assert!((pass_at(8, 2, 1) - 0.25).abs() < 1e-12);
        assert!((pass_at(10, 3, 4) - (1.0 - 35.0 / 210.0)).abs() < 1e-12);
        let (mean, error) = Scores { num_samples: 1, correct: vec![1, 0, 0, 1] }.pass_at(1);
        assert_eq!((mean, error), (0.5, 0.25));
    }
}
