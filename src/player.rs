//! Plays problems with one version of the weights, and scores the answers.

use std::collections::BTreeMap;
use std::sync::Arc;

use actor::engine::{Engine, LoadedVersion};
use anyhow::{Context as _, Result};
use language::Language;
use policy::{Backend, ModelConfig, Weights};
use proto::{
    Behavior, Digest, KeyedProblem, ProblemOrigin, Request, Sampling, ScoredGroup, Task, TaskId, TaskKind, TokenId,
    Verdict,
};

use crate::room::expect_room;
use crate::subject::Subject;

/// Plays problems with one version of the weights.
pub(crate) struct Player {
    weights: Weights,
    language: Arc<dyn Language>,
    num_threads: usize,
}

/// Memory for keys and values, as far as it allows more than one slot.
const CACHE_BYTES: usize = 1 << 30;

/// Most sequences that are decoded together.
const MAX_SLOTS: usize = 512;

impl Player {
    /// Loads a network for sequences of up to `max_positions` tokens. 0 threads are as many as the machine has cores. Consumes the
    /// subject, whose weights take as much memory again.
    pub(crate) fn new(subject: Subject, max_positions: usize, num_threads: usize) -> Result<Player> {
        let num_threads = match num_threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            given => given,
        };
        let model = ModelConfig { max_positions, ..subject.model };
        let weights = Backend::Cpu.load(&model, &subject.params)?;
        Ok(Player { weights, language: subject.language, num_threads })
    }

    /// Scores one greedy answer and `num_samples` sampled answers per problem.
    pub(crate) fn score(&self, problems: &[KeyedProblem], num_samples: u32) -> Result<Scored> {
        let greedy = Scores::of(&self.groups(problems, 1, 0.0)?);
        let groups = self.groups(problems, num_samples, 1.0)?;
        let majority = groups.iter().map(|scored| self.majority(scored)).collect::<Result<_>>()?;
        Ok(Scored { greedy, sampled: Scores::of(&groups), majority })
    }

    /// Returns whether the most frequent well-formed answer of a group is right, 0 or 1; the share of right ones if several are
    /// equally frequent.
    fn majority(&self, scored: &ScoredGroup) -> Result<f64> {
        let mut votes = BTreeMap::<String, (u32, bool)>::new();
        for (rollout, verdict) in scored.group.rollouts.iter().zip(&scored.verdicts) {
            let answer = self.language.text(&scored.group.task.request, &rollout.tokens)?;
            let Some(answer) = answer.filter(|_| *verdict != Verdict::Malformed) else { continue };
            votes.entry(answer).or_insert((0, *verdict == Verdict::Correct)).0 += 1;
        }
        Ok(share_of_winners(votes.values().copied()))
    }

    /// Returns answers to one problem, with their verdicts.
    pub(crate) fn answers(
        &self,
        problem: &KeyedProblem,
        num_samples: u32,
        temperature: f32,
    ) -> Result<Vec<(Vec<TokenId>, Verdict)>> {
        let scored = self.groups(std::slice::from_ref(problem), num_samples, temperature)?.remove(0);
        Ok(scored.group.rollouts.into_iter().map(|rollout| rollout.tokens).zip(scored.verdicts).collect())
    }

    /// Plays and judges the problems. Returns the groups in order of the problems.
    fn groups(&self, problems: &[KeyedProblem], num_samples: u32, temperature: f32) -> Result<Vec<ScoredGroup>> {
        let (language, model) = (&self.language, self.weights.config());
        problems.iter().try_for_each(|keyed| expect_room(language.as_ref(), &keyed.problem, model.max_positions))?;
        let num_rollouts = problems.len().saturating_mul(num_samples as usize).max(1);
        let num_slots = (CACHE_BYTES / model.cache_bytes()).clamp(1, MAX_SLOTS.min(num_rollouts));
        let num_threads = self.num_threads.min(num_slots);
        let config = actor::Config { backend: Backend::Cpu, num_threads, num_slots };
        let (engine, mut groups) = Engine::start(config, language.clone());
        for (index, KeyedProblem { problem, key }) in problems.iter().enumerate() {
            let task = Task {
                id: TaskId { kind: TaskKind::Evaluate, batch: 0, index: index as u32 },
                seed: 0,
                weights: Digest::of_bytes(b""),
                policy_version: 0,
                free_running: false,
                request: Request::Solve {
                    problem: problem.clone(),
                    origin: ProblemOrigin::Exam,
                    has_key: key.is_some(),
                },
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
            let index = group.task.id.index;
            let key = problems[index as usize].key.as_ref();
            scored.insert(index, verifier::score(language.as_ref(), group, key)?);
        }
        Ok(scored.into_values().collect())
    }
}

/// Scores of a network on some problems.
#[derive(Clone, Debug)]
pub(crate) struct Scored {
    pub(crate) greedy: Scores,
    pub(crate) sampled: Scores,
    /// By problem, the score of the most frequent of the sampled answers, 0 to 1.
    majority: Vec<f64>,
}

impl Scored {
    /// Returns the scores of the problems at these indices.
    pub(crate) fn at(&self, places: &[usize]) -> Scored {
        Scored {
            greedy: self.greedy.at(places),
            sampled: self.sampled.at(places),
            majority: places.iter().map(|place| self.majority[*place]).collect(),
        }
    }

    /// Returns the share of problems that the most frequent sampled answer solves, and its standard error.
    pub(crate) fn majority(&self) -> (f64, f64) {
        mean(&self.majority)
    }
}

/// Returns the share of right answers among the most frequent ones; 0 if there are none.
///
/// - `votes`: by answer, how often it was given, and whether it is right.
fn share_of_winners(votes: impl Iterator<Item = (u32, bool)> + Clone) -> f64 {
    let most = votes.clone().map(|(count, _)| count).max().unwrap_or(0);
    let winners = votes.filter(|(count, _)| *count == most).map(|(_, is_right)| f64::from(is_right));
    let (sum, count) = winners.fold((0.0, 0), |(sum, count), right| (sum + right, count + 1));
    sum / f64::from(count.max(1))
}

/// Returns the mean, and its standard error.
fn mean(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64;
    (mean, (variance / values.len() as f64).sqrt())
}

/// Number of right answers per problem, out of `num_samples` each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scores {
    pub(crate) num_samples: u32,
    pub(crate) correct: Vec<u32>,
}

impl Scores {
    /// Counts the right answers of groups of one size.
    fn of(groups: &[ScoredGroup]) -> Scores {
        let num_correct =
            |scored: &ScoredGroup| scored.verdicts.iter().filter(|verdict| **verdict == Verdict::Correct).count();
        let num_samples = groups.first().map_or(0, |scored| scored.verdicts.len() as u32);
        Scores { num_samples, correct: groups.iter().map(|scored| num_correct(scored) as u32).collect() }
    }

    /// Returns the scores of the problems at these indices.
    pub(crate) fn at(&self, places: &[usize]) -> Scores {
        Scores { num_samples: self.num_samples, correct: places.iter().map(|place| self.correct[*place]).collect() }
    }

    /// Returns an unbiased estimate of the share of problems that k samples solve, and its standard error.
    ///
    /// Source: Chen et al. 2021, "Evaluating large language models trained on code", section 2.1.
    pub(crate) fn pass_at(&self, k: u32) -> (f64, f64) {
        mean(&self.correct.iter().map(|correct| pass_at(self.num_samples, *correct, k)).collect::<Vec<_>>())
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

    #[test]
    fn ties_are_shared() {
        let share = |votes: &[(u32, bool)]| share_of_winners(votes.iter().copied());
        assert_eq!(share(&[(3, true), (2, false)]), 1.0);
        assert_eq!(share(&[(2, true), (3, false), (1, true)]), 0.0);
        assert_eq!(share(&[(2, true), (2, false), (1, true)]), 0.5);
        assert_eq!(share(&[]), 0.0);
    }

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
