//! Policy gradients on fresh groups: rewards from verdicts, advantages from rewards, a loss for every rollout.
//!
//! The fold trains on the result of [`minibatches`]. Everything here is a function of the groups.

use policy::{ClippedSurrogate, LossBatch, Scores, Sequence, SurrogateStats};
use proto::{Rollout, ScoredGroup, Verdict};
use serde::{Deserialize, Serialize};

use crate::config::{PolicyGradientConfig, PolicyGradientKind};

/// Statistics of the policy gradient in one step, for the rollouts of one role: solver or proposer. Means are over their
/// trained tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyGradientReport {
    /// Mean loss of its updates, with the entropy bonus but without the weight of the loss.
    pub loss: f64,
    /// Share of tokens whose surrogate was clipped.
    pub clip_fraction: f64,
    /// Share of tokens whose proximal-to-behaviour ratio was truncated; 0 unless the run is free-running.
    pub truncated_fraction: f64,
    /// Mean ratio of a token's current probability to its probability when it was sampled.
    pub importance_ratio: f64,
    /// Mean entropy over the legal tokens, in nats.
    pub entropy: f64,
    /// Rollouts that had a nonzero advantage and were trained on.
    pub num_rollouts: u64,
}

/// The rollouts of one update, each with its loss.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Minibatch {
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) losses: Vec<ClippedSurrogate>,
}

/// An update without rollouts.
pub(crate) static NO_ROLLOUTS: Minibatch = Minibatch { sequences: Vec::new(), losses: Vec::new() };

impl Minibatch {
    pub(crate) fn add_to<'a>(&'a self, batch: &mut LossBatch<'a>) {
        self.sequences.iter().zip(&self.losses).for_each(|(sequence, loss)| batch.push([sequence], loss));
    }

    /// Sums the statistics of the losses. Takes the scores of the minibatch's sequences from the iterator.
    pub(crate) fn stats<'a>(&self, scores: &mut impl Iterator<Item = Scores<'a>>) -> SurrogateStats {
        let mut sum = SurrogateStats::default();
        self.losses.iter().zip(scores).for_each(|(loss, scores)| sum.add(&loss.stats(scores)));
        sum
    }
}

impl PolicyGradientReport {
    /// Reports on the solver's minibatches. Returns `None` if no rollout had an advantage.
    pub(crate) fn of_solver(
        config: &PolicyGradientConfig,
        minibatches: &[Minibatch],
        loss: &SurrogateStats,
    ) -> Option<Self> {
        let num_rollouts = minibatches.iter().map(|minibatch| minibatch.sequences.len()).sum();
        PolicyGradientReport::new(loss, config.weight * minibatches.len() as f64, num_rollouts)
    }

    /// Reports on `num_rollouts` rollouts, whose summed loss is divided by `weight`. Returns `None` if either is 0.
    pub(crate) fn new(loss: &SurrogateStats, weight: f64, num_rollouts: usize) -> Option<Self> {
        let mean = |sum: f64| sum / loss.num_tokens as f64;
        (num_rollouts > 0 && weight > 0.0).then(|| PolicyGradientReport {
            loss: loss.loss / weight,
            clip_fraction: mean(loss.num_clipped as f64),
            truncated_fraction: mean(loss.num_truncated as f64),
            importance_ratio: mean(loss.sum_importance_ratio),
            entropy: mean(loss.sum_entropy),
            num_rollouts: num_rollouts as u64,
        })
    }
}

/// Divides the groups of a step among `updates_per_step` updates, in order, and computes the loss of each rollout.
///
/// Rollouts with zero advantage have no gradient and are left out; with `dr-grpo`, so are whole groups of equal rewards.
/// They still count in the divisor of the loss, so that leaving them out gives no other rollout more weight.
pub(crate) fn minibatches(
    config: &PolicyGradientConfig,
    max_answer_tokens: u32,
    (step, num_updates): (u64, u32),
    groups: &[ScoredGroup],
) -> Vec<Minibatch> {
    // Groups of proposals have no reward until their problems are tried.
    let is_answered = |scored: &&ScoredGroup| scored.group.task.request.problem().is_some();
    let groups: Vec<&ScoredGroup> = groups.iter().filter(is_answered).collect();
    let advantages: Vec<Vec<f64>> = match config.kind {
        PolicyGradientKind::DrGrpo => groups.iter().map(|scored| centred(&rewards(scored))).collect(),
        PolicyGradientKind::ReinforcePlusPlus => whitened_over_tokens(&groups),
    };
    let per_update = groups.len().div_ceil(config.updates_per_step as usize).max(1);
    let parts = groups.chunks(per_update).zip(advantages.chunks(per_update)).zip(0u32..);
    let minibatches = parts.map(|((groups, advantages), update)| {
        let done = f64::from(update) / f64::from(num_updates);
        minibatch(config, max_answer_tokens, (step, done), groups, advantages)
    });
    minibatches.collect()
}

/// Returns the sequence of a rollout as it was played.
pub(crate) fn played_sequence(scored: &ScoredGroup, rollout: &Rollout) -> Sequence {
    let choices = rollout.choices.iter().map(|(position, legal)| (position, legal.tokens(&scored.group.sets)));
    Sequence::new(&scored.prompt, &rollout.tokens, choices)
}

fn minibatch(
    config: &PolicyGradientConfig,
    max_answer_tokens: u32,
    (step, done): (u64, f64),
    groups: &[&ScoredGroup],
    advantages: &[Vec<f64>],
) -> Minibatch {
    let rollouts = || groups.iter().flat_map(|scored| &scored.group.rollouts);
    let divisor = match config.kind {
        PolicyGradientKind::DrGrpo => rollouts().count() as f64 * f64::from(max_answer_tokens),
        PolicyGradientKind::ReinforcePlusPlus => rollouts().map(|rollout| rollout.choices.len() as f64).sum(),
    };
    let mut minibatch = Minibatch::default();
    for (scored, advantages) in groups.iter().zip(advantages) {
        for (rollout, advantage) in scored.group.rollouts.iter().zip(advantages) {
            if *advantage == 0.0 || rollout.choices.is_empty() {
                continue;
            }
            minibatch.sequences.push(played_sequence(scored, rollout));
            let positions = rollout.choices.iter().map(|(position, _)| position);
            minibatch.losses.push(ClippedSurrogate {
                advantage: *advantage as f32,
                behavior_logprobs: rollout.logprobs.clone(),
                proximal: positions.map(|position| proximal(scored, rollout, position, step, done)).collect(),
                clip_low: config.clip_low as f32,
                clip_high: config.clip_high as f32,
                entropy_bonus: config.entropy_bonus as f32,
                weight: (config.weight / divisor) as f32,
            });
        }
    }
    minibatch
}

/// Returns the place of the proximal policy between the behaviour policy (0) and the current one (1), by their versions. The
/// proximal policy is the step's policy before its updates, and `done` is the share of these updates that were made. In a
/// pipelined run it is the behaviour policy, which is equally old for every token.
fn proximal(scored: &ScoredGroup, rollout: &Rollout, position: usize, step: u64, done: f64) -> f32 {
    if !scored.group.task.free_running {
        return 0.0;
    }
    let age = step.saturating_sub(rollout.version_at(position)) as f64;
    if age == 0.0 { 0.0 } else { (age / (age + done)) as f32 }
}

/// Returns 1 for each correct answer, else 0. Rewards depend on verdicts alone.
fn rewards(scored: &ScoredGroup) -> Vec<f64> {
    scored.verdicts.iter().map(|verdict| if *verdict == Verdict::Correct { 1.0 } else { 0.0 }).collect()
}

/// Computes advantages within a group: reward minus mean, without division by the standard deviation.
///
/// Source: Liu et al. 2025 (Dr.GRPO), section 3.2.
fn centred(rewards: &[f64]) -> Vec<f64> {
    let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
    rewards.iter().map(|reward| reward - mean).collect()
}

/// Computes advantages within a batch, by group and rollout. A rollout is rewarded at its end, without discount, so all of
/// its tokens have the reward as their return, and the same advantage.
fn whitened_over_tokens(groups: &[&ScoredGroup]) -> Vec<Vec<f64>> {
    let returns: Vec<f64> = groups.iter().flat_map(|scored| rewards(scored)).collect();
    let rollouts = groups.iter().flat_map(|scored| &scored.group.rollouts);
    let counts: Vec<f64> = rollouts.map(|rollout| rollout.choices.len() as f64).collect();
    let mut advantages = whitened(&returns, &counts).into_iter();
    groups.iter().map(|scored| advantages.by_ref().take(scored.verdicts.len()).collect()).collect()
}

/// Shifts values to mean 0 and scales them to variance 1, each weighted by its count. The variance is the unbiased one.
///
/// Source: `masked_whiten` of verl, as its REINFORCE++ (Hu 2025) uses it.
fn whitened(values: &[f64], counts: &[f64]) -> Vec<f64> {
    let total: f64 = counts.iter().sum();
    let sum = |term: fn(f64) -> f64, shift: f64| -> f64 {
        values.iter().zip(counts).map(|(value, count)| count * term(value - shift)).sum()
    };
    let mean = sum(|value| value, 0.0) / total.max(1.0);
    let variance = sum(|value| value * value, mean) / (total - 1.0).max(1.0);
    values.iter().map(|value| (value - mean) / (variance + 1e-8).sqrt()).collect()
}

#[cfg(test)]
mod tests {
    use proto::{
        BalanceKey, Behavior, Choices, Digest, Group, Legal, Niche, Problem, ProblemOrigin, Request, Sampling,
        StopReason, Task, TaskId, TaskKind, VersionSpan,
    };

    use super::*;

    const RIGHT: Verdict = Verdict::Correct;
    const WRONG: Verdict = Verdict::Incorrect;

    fn config(kind: PolicyGradientKind) -> PolicyGradientConfig {
        PolicyGradientConfig {
            kind,
            weight: 0.5,
            clip_low: 0.2,
            clip_high: 0.28,
            entropy_bonus: 0.01,
            updates_per_step: 2,
            cross_entropy: true,
        }
    }

    /// Returns a group of answers with these verdicts and numbers of choices.
    fn group(answers: &[(Verdict, u32)]) -> ScoredGroup {
        let rollout = |(_, num_choices): &(Verdict, u32)| Rollout {
            tokens: (0..*num_choices).collect(),
            choices: Choices { positions: None, legal: vec![Legal::Set(0); *num_choices as usize] },
            logprobs: vec![-0.5; *num_choices as usize],
            values: None,
            search: None,
            stop: StopReason::Complete,
            versions: Vec::new(),
        };
        let task = Task {
            id: TaskId { kind: TaskKind::Train, batch: 0, index: 0 },
            seed: 0,
            weights: Digest::of_bytes(b""),
            policy_version: 0,
            free_running: false,
            request: Request::Solve {
                problem: Problem { domain: "countdown".to_owned(), text: String::new() },
                origin: ProblemOrigin::Ladder,
                has_key: false,
            },
            family: String::new(),
            num_rollouts: answers.len() as u32,
            sampling: Sampling { behavior: Behavior::Policy, temperature: 1.0 },
            max_tokens: 20,
        };
        let sets = vec![(0..20).collect()];
        ScoredGroup {
            group: Group { task, sets, rollouts: answers.iter().map(rollout).collect() },
            prompt: vec![9],
            niche: Niche(0),
            balance_key: BalanceKey { level: 1, goal: 0 },
            verdicts: answers.iter().map(|(verdict, _)| *verdict).collect(),
            example_sets: Vec::new(),
            examples: Vec::new(),
            proposals: Vec::new(),
        }
    }

    /// Returns the advantage and the weight of every rollout.
    fn figures(minibatch: &Minibatch) -> Vec<(f32, f32)> {
        minibatch.losses.iter().map(|loss| (loss.advantage, loss.weight)).collect()
    }

    #[test]
    fn dr_grpo_centres_in_the_group_and_divides_by_a_constant() {
        let groups = [
            group(&[(RIGHT, 3), (WRONG, 2), (Verdict::Malformed, 5), (Verdict::Timeout, 4)]),
            group(&[(WRONG, 2), (WRONG, 3), (WRONG, 2), (WRONG, 4)]),
            group(&[(RIGHT, 2), (RIGHT, 3), (WRONG, 1), (RIGHT, 1)]),
            group(&[(RIGHT, 2), (RIGHT, 3), (RIGHT, 1), (RIGHT, 1)]),
        ];
        let minibatches = minibatches(&config(PolicyGradientKind::DrGrpo), 20, (0, 2), &groups);
        // 0.5 / (2 groups x 4 rollouts x 20 tokens), groups of equal rewards included.
        let weight = 0.5 / 160.0;
        let expected = [
            vec![(0.75, weight), (-0.25, weight), (-0.25, weight), (-0.25, weight)],
            vec![(0.25, weight), (0.25, weight), (-0.75, weight), (0.25, weight)],
        ];
        assert_eq!(minibatches.iter().map(figures).collect::<Vec<_>>(), expected);
        let lengths = |minibatch: &Minibatch| minibatch.sequences.iter().map(|it| it.chosen.len()).collect::<Vec<_>>();
        assert_eq!(minibatches.iter().map(lengths).collect::<Vec<_>>(), [[3, 2, 5, 4], [2, 3, 1, 1]]);
    }

    /// Nine tokens of return 1 and one of 0: mean 0.9, unbiased variance 0.1.
    #[test]
    fn reinforce_plus_plus_whitens_over_tokens_and_takes_their_mean() {
        let groups = [group(&[(RIGHT, 4), (WRONG, 1)]), group(&[(RIGHT, 3), (RIGHT, 2)])];
        let minibatches = minibatches(&config(PolicyGradientKind::ReinforcePlusPlus), 20, (0, 2), &groups);
        let (good, bad) = (0.1 / 0.1f64.sqrt(), -0.9 / 0.1f64.sqrt());
        // 0.5 / 5 tokens in either update. A group of equal rewards has an advantage here: the baseline is the batch's.
        let expected = [[(good, 0.1), (bad, 0.1)], [(good, 0.1), (good, 0.1)]];
        for (minibatch, expected) in minibatches.iter().zip(expected) {
            let figures = figures(minibatch);
            assert_eq!(figures.len(), 2);
            for (got, expected) in figures.into_iter().zip(expected) {
                assert!((f64::from(got.0) - expected.0).abs() < 1e-6, "expected {expected:?}, got {got:?}");
                assert!((f64::from(got.1) - expected.1).abs() < 1e-6, "expected {expected:?}, got {got:?}");
            }
        }
    }

    #[test]
    fn a_batch_that_agrees_trains_nothing() {
        for kind in [PolicyGradientKind::DrGrpo, PolicyGradientKind::ReinforcePlusPlus] {
            for verdict in [RIGHT, WRONG] {
                let groups = [group(&[(verdict, 4), (verdict, 1)]), group(&[(verdict, 3), (verdict, 7)])];
                let minibatches = minibatches(&config(kind), 20, (0, 2), &groups);
                assert_eq!(minibatches, [Minibatch::default(), Minibatch::default()]);
                let report = PolicyGradientReport::of_solver(&config(kind), &minibatches, &SurrogateStats::default());
                assert_eq!(report, None);
            }
        }
    }

    /// Five groups for two updates: three and two, with every rollout as it was played.
    #[test]
    fn groups_are_dealt_out_in_order() {
        let groups: Vec<ScoredGroup> = (1..6).map(|length| group(&[(RIGHT, length), (WRONG, length + 1)])).collect();
        let minibatches = minibatches(&config(PolicyGradientKind::DrGrpo), 20, (0, 2), &groups);
        let lengths = |minibatch: &Minibatch| minibatch.sequences.iter().map(|it| it.chosen.len()).collect::<Vec<_>>();
        assert_eq!(minibatches.iter().map(lengths).collect::<Vec<_>>(), [vec![1, 2, 2, 3, 3, 4], vec![4, 5, 5, 6]]);
        let sequence = &minibatches[0].sequences[1];
        assert_eq!((&sequence.tokens[..], sequence.chosen[1].target), (&[9, 0][..], 1));
        let loss = &minibatches[0].losses[1];
        assert_eq!(loss.behavior_logprobs, [-0.5, -0.5]);
        assert_eq!((loss.clip_low, loss.clip_high, loss.entropy_bonus), (0.2, 0.28, 0.01));
    }

    /// Step 7, two updates: the current policy is the proximal one at first, and half a step ahead of it in the second.
    #[test]
    fn the_proximal_policy_is_placed_by_version() {
        let mut groups = [(); 4].map(|()| group(&[(RIGHT, 3), (WRONG, 2)]));
        for scored in &mut groups {
            scored.group.task.free_running = true;
            for rollout in &mut scored.group.rollouts {
                rollout.versions = [(0, 5), (1, 6), (2, 7)]
                    .map(|(first_token, policy_version)| VersionSpan { first_token, policy_version })
                    .to_vec();
            }
        }
        let minibatches = minibatches(&config(PolicyGradientKind::DrGrpo), 20, (7, 2), &groups);
        for (minibatch, expected) in minibatches.iter().zip([[1.0, 1.0, 0.0], [0.8, 2.0 / 3.0, 0.0]]) {
            assert_eq!(minibatch.losses[0].proximal, expected);
        }
    }

    #[test]
    fn the_report_is_before_the_weight_and_a_mean_over_tokens() {
        let config = config(PolicyGradientKind::DrGrpo);
        let groups = [group(&[(RIGHT, 2), (WRONG, 2)]), group(&[(RIGHT, 2), (RIGHT, 2)])];
        let loss = SurrogateStats {
            loss: -0.25,
            num_tokens: 4,
            num_clipped: 1,
            num_truncated: 0,
            sum_importance_ratio: 6.0,
            sum_entropy: 2.0,
        };
        let report = PolicyGradientReport::of_solver(&config, &minibatches(&config, 20, (0, 2), &groups), &loss);
        // -0.25 / (0.5 x 2 updates)
        let expected = PolicyGradientReport {
            loss: -0.25,
            clip_fraction: 0.25,
            truncated_fraction: 0.0,
            importance_ratio: 1.5,
            entropy: 0.5,
            num_rollouts: 2,
        };
        assert_eq!(report, Some(expected));
    }
}
