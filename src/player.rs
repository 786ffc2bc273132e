//! Plays problems with one version of the weights, and scores the answers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use actor::engine::{Engine, LoadedVersion};
use anyhow::{Context as _, Result, ensure};
use learner::{Checkpoint, expect_known, load_checkpoint, load_newest};
use policy::{Backend, Device, ModelConfig, Params, Weights};
use proto::{
    Behavior, Digest, Problem, ProblemOrigin, Request, Sampling, ScoredGroup, Task, TaskId, TaskKind, TokenId, Verdict,
};

use crate::language;
use crate::report::note;

/// Plays problems with one version of the weights.
pub(crate) struct Player {
    weights: Weights,
    max_positions: usize,
    num_threads: usize,
}

impl Player {
    pub(crate) fn new(model: &ModelConfig, params: &Params, num_threads: usize) -> Result<Player> {
        let num_threads = match num_threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            given => given,
        };
        let weights = Backend::Cpu.load(model, params)?;
        Ok(Player { weights, max_positions: model.max_positions, num_threads })
    }

    /// Scores one greedy answer and `num_samples` sampled answers per problem.
    pub(crate) fn score(&self, problems: &[Problem], num_samples: u32) -> Result<(Scores, Scores)> {
        Ok((self.play(problems, 1, 0.0)?, self.play(problems, num_samples, 1.0)?))
    }

    /// Counts right answers per problem. Temperature 0 is greedy.
    fn play(&self, problems: &[Problem], num_samples: u32, temperature: f32) -> Result<Scores> {
        let groups = self.groups(problems, num_samples, temperature)?;
        let num_correct =
            |scored: &ScoredGroup| scored.verdicts.iter().filter(|verdict| **verdict == Verdict::Correct).count();
        Ok(Scores { num_samples, correct: groups.iter().map(|scored| num_correct(scored) as u32).collect() })
    }

    /// Returns answers to one problem, with their verdicts.
    pub(crate) fn answers(
        &self,
        problem: &Problem,
        num_samples: u32,
        temperature: f32,
    ) -> Result<Vec<(Vec<TokenId>, Verdict)>> {
        let scored = self.groups(std::slice::from_ref(problem), num_samples, temperature)?.remove(0);
        Ok(scored.group.rollouts.into_iter().map(|rollout| rollout.tokens).zip(scored.verdicts).collect())
    }

    /// Plays and judges the problems. Returns the groups in order of the problems.
    fn groups(&self, problems: &[Problem], num_samples: u32, temperature: f32) -> Result<Vec<ScoredGroup>> {
        problems.iter().try_for_each(|problem| expect_room(problem, self.max_positions))?;
        let language = language();
        let (engine, mut groups) = Engine::start(
            actor::Config { device: Device::Cpu, num_threads: self.num_threads, num_slots: 512 },
            language.clone(),
        );
        for (index, problem) in problems.iter().enumerate() {
            let task = Task {
                id: TaskId { kind: TaskKind::Evaluate, batch: 0, index: index as u32 },
                seed: 0,
                weights: Digest::of_bytes(b""),
                policy_version: 0,
                free_running: false,
                request: Request::Solve { problem: problem.clone(), origin: ProblemOrigin::Exam, has_key: false },
                family: String::new(),
                num_rollouts: num_samples,
                sampling: Sampling { behavior: Behavior::Policy, temperature },
                max_tokens: language.room(problem)?.answer as u32,
            };
            engine.submit(task, LoadedVersion { policy_version: 0, weights: self.weights.clone() })?;
        }
        let mut scored = BTreeMap::new();
        for _ in problems {
            let group = groups.blocking_recv().context("the engine stopped early")??;
            scored.insert(group.task.id.index, verifier::score(language.as_ref(), group, None)?);
        }
        Ok(scored.into_values().collect())
    }
}

/// Returns the lengths of a problem's prompt and of its longest answer, in tokens.
pub(crate) fn positions(problem: &Problem) -> Result<(usize, usize)> {
    let (language, problem) = (language(), problem.clone());
    let answer = language.room(&problem)?.answer;
    let request = Request::Solve { problem, origin: ProblemOrigin::Exam, has_key: false };
    Ok((language.open(&request)?.prompt().len(), answer))
}

/// Checks that a network has room for a problem with its longest answer.
pub(crate) fn expect_room(problem: &Problem, max_positions: usize) -> Result<()> {
    let (needed, text) = (positions_needed(std::slice::from_ref(problem))?, &problem.text);
    ensure!(
        needed <= max_positions,
        "{text}: expected prompt and answer within model.max_positions = {max_positions}, got {needed}"
    );
    Ok(())
}

/// Returns the most positions that a prompt with its longest answer takes.
pub(crate) fn positions_needed(problems: &[Problem]) -> Result<usize> {
    let lengths = problems.iter().map(positions);
    lengths
        .map(|length| length.map(|(prompt, answer)| prompt + answer))
        .try_fold(0, |most, needed| Ok(most.max(needed?)))
}

/// Reads a checkpoint, or the newest complete one of a run. A checkpoint in a run's folder must match the run's journal.
pub(crate) fn load(path: &Path) -> Result<(ModelConfig, Checkpoint)> {
    if path.join("COMPLETE").exists() {
        let (model, checkpoint) = load_checkpoint(path)?;
        if let Some(run) = run_of(path) {
            expect_known(&run, &model, &checkpoint).with_context(|| path.display().to_string())?;
        }
        return Ok((model, checkpoint));
    }
    let refused = |reason: String| note(format_args!("checkpoint rejected, using an earlier one: {reason}"));
    load_newest(path, refused)?.with_context(|| {
        format!("{}: expected a run with a complete checkpoint, or a checkpoint; found neither", path.display())
    })
}

/// Returns the run in whose folder a checkpoint lies.
pub(crate) fn run_of(checkpoint: &Path) -> Option<PathBuf> {
    // Resolve `.` and links first.
    let checkpoint = checkpoint.canonicalize().ok()?;
    let run = checkpoint.parent().filter(|folder| folder.ends_with("checkpoints"))?.parent()?;
    run.join("config.toml").exists().then(|| run.to_owned())
}

/// Number of right answers per problem, out of `num_samples` each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scores {
    pub(crate) num_samples: u32,
    pub(crate) correct: Vec<u32>,
}

impl Scores {
    /// Returns the scores of the problems at these indices.
    pub(crate) fn at(&self, places: &[usize]) -> Scores {
        Scores { num_samples: self.num_samples, correct: places.iter().map(|place| self.correct[*place]).collect() }
    }

    /// Returns an unbiased estimate of the share of problems that k samples solve, and its standard error.
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
