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
    /// Picks the problems at these places.
    fn at(&self, places: &[usize]) -> Scores {
        Scores { num_samples: self.num_samples, correct: places.iter().map(|place| self.correct[*place]).collect() }
    }

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
        let report = Report {
            step: checkpoint.state.step,
            levels: by_level(&problems, &trained)?,
            trained,
            untrained: untrained.score(&problems, args.samples)?,
            random: baselines::uniform_legal(&problems, args.samples)?,
            enumerated: (
                baselines::enumeration(&problems, 1)?,
                baselines::enumeration(&problems, args.samples as usize)?,
            ),
            name,
        };
        print(&if args.json { report.json().to_string() } else { report.text() })?;
    }
    Ok(())
}

/// An exam, sat.
struct Report {
    name: String,
    step: u64,
    /// Greedy, and sampled.
    trained: (Scores, Scores),
    levels: Vec<LevelScores>,
    untrained: (Scores, Scores),
    random: Scores,
    /// Problems that enumeration solves with one checker call, and with as many as there are samples.
    enumerated: (usize, usize),
}

/// A level of a ladder, with the scores of the problems that are of it.
struct LevelScores {
    domain: String,
    level: u32,
    description: &'static str,
    scores: (Scores, Scores),
}

/// Splits scores by level, where problems are of several.
fn by_level(problems: &[Problem], scores: &(Scores, Scores)) -> Result<Vec<LevelScores>> {
    let mut places = BTreeMap::<(&str, u32), Vec<usize>>::new();
    for (place, problem) in problems.iter().enumerate() {
        let domain = domains::domain(&problem.domain)?;
        let level = domain.level_of(domain.niche(problem, None)?);
        places.entry((&problem.domain, level)).or_default().push(place);
    }
    if places.len() == 1 {
        return Ok(Vec::new());
    }
    let of_level = |((name, level), places): ((&str, u32), Vec<usize>)| {
        let levels = domains::domain(name)?.ladder_levels();
        let description = levels.iter().find(|known| known.level == level).map_or("of no level", |it| it.description);
        let scores = (scores.0.at(&places), scores.1.at(&places));
        Ok(LevelScores { domain: name.to_owned(), level, description, scores })
    };
    places.into_iter().map(of_level).collect()
}

impl Report {
    fn text(&self) -> String {
        let Report { name, step, trained, levels, untrained, random, enumerated } = self;
        let (k, num_problems) = (random.num_samples, random.correct.len());
        let cell = |(mean, error): (f64, f64)| format!("{} ± {:.1}", percent(mean), 100.0 * error);
        let share = |count: usize| percent(count as f64 / num_problems as f64);
        let network = |name: &str, scores: &(Scores, Scores)| {
            vec![name.to_owned(), cell(scores.0.pass_at(1)), cell(scores.1.pass_at(1)), cell(scores.1.pass_at(k))]
        };
        let none = || "-".to_owned();
        let head = ["", "pass@1 greedy", "pass@1 sampled", &format!("pass@{k}")].map(str::to_owned);
        let mut rows = vec![head.to_vec(), network("trained", trained)];
        rows.extend(levels.iter().map(|LevelScores { description, scores, .. }| {
            network(&format!("  {description} ({})", scores.0.correct.len()), scores)
        }));
        let random =
            ["uniform random legal tokens".to_owned(), none(), cell(random.pass_at(1)), cell(random.pass_at(k))];
        let blind = "blind enumeration, k checker calls".to_owned();
        rows.extend([
            network("untrained network, same mask", untrained),
            random.to_vec(),
            vec![blind, share(enumerated.0), none(), share(enumerated.1)],
        ]);
        rows.iter_mut().for_each(|row| row.truncate(if k > 1 { 4 } else { 3 }));
        format!("{name}, {num_problems} problems, step {step}\n{}", table(&rows))
    }

    fn json(&self) -> serde_json::Value {
        let estimate = |(mean, error): (f64, f64)| serde_json::json!({"mean": mean, "standard_error": error});
        let k = self.random.num_samples;
        let network = |scores: &(Scores, Scores)| {
            serde_json::json!({
                "greedy_pass_at_1": estimate(scores.0.pass_at(1)),
                "sampled_pass_at_1": estimate(scores.1.pass_at(1)),
                "pass_at_k": estimate(scores.1.pass_at(k)),
            })
        };
        let of_level = |of_level: &LevelScores| {
            serde_json::json!({
                "domain": of_level.domain,
                "level": of_level.level,
                "description": of_level.description,
                "num_problems": of_level.scores.0.correct.len(),
                "trained": network(&of_level.scores),
            })
        };
        serde_json::json!({
            "exam": self.name,
            "step": self.step,
            "k": k,
            "num_problems": self.random.correct.len(),
            "trained": network(&self.trained),
            "trained_by_level": self.levels.iter().map(of_level).collect::<Vec<_>>(),
            "untrained": network(&self.untrained),
            "uniform_legal": {
                "pass_at_1": estimate(self.random.pass_at(1)),
                "pass_at_k": estimate(self.random.pass_at(k)),
            },
            "enumeration": {"solved_with_1_call": self.enumerated.0, "solved_with_k_calls": self.enumerated.1},
        })
    }
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
        let scores = Scores { num_samples: 1, correct: vec![1, 0, 0, 1] };
        assert_eq!(scores.at(&[3, 1]), Scores { num_samples: 1, correct: vec![1, 0] });
        let (mean, error) = scores.pass_at(1);
        assert_eq!((mean, error), (0.5, 0.25));
    }
}
