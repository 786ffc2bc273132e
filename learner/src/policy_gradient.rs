//! Policy gradients on fresh groups: a loss for every rollout with an advantage.
//!
//! The fold trains on the result of [`minibatches`]. Everything here is a function of the groups.

use policy::{ClippedSurrogate, SequenceSurrogate, SurrogateStats};
use proto::{Rollout, ScoredGroup};
use serde::{Deserialize, Serialize};

use crate::advantages::{advantages, disagrees};
use crate::config::{PolicyGradientConfig, PolicyGradientKind};
use crate::minibatch::{Minibatch, RolloutLoss, played_sequence};

/// Statistics of the policy gradient in one step, for the rollouts of one role: solver or proposer. Means are over their
/// trained tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyGradientReport {
    /// Mean loss of its updates, with the entropy bonus but without a penalty in the loss and without the weight of the loss.
    pub loss: f64,
    /// Share of tokens whose surrogate was clipped.
    pub clip_fraction: f64,
    /// Share of tokens whose proximal-to-behaviour ratio was truncated; 0 unless the run is free-running.
    pub truncated_fraction: f64,
    /// Mean ratio of a token's current probability to its probability when it was sampled.
    pub importance_ratio: f64,
    /// Mean entropy over the legal tokens, in nats.
    pub entropy: f64,
    /// Rollouts that had a nonzero advantage or a penalty and were trained on.
    pub num_rollouts: u64,
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
/// Rollouts with zero advantage have no gradient and are left out; where the baseline is the group's, so are whole groups of equal
/// rewards. They still count in the divisor of the loss, so that leaving them out gives no other rollout more weight. Only with
/// `dapo` they do not: its groups are those that disagree, up to `groups_per_step` of them. If the caller adds a penalty,
/// `is_penalised`, rollouts with zero advantage are not left out.
pub(crate) fn minibatches(
    config: &PolicyGradientConfig,
    max_answer_tokens: u32,
    is_penalised: bool,
    (step, num_updates): (u64, u32),
    groups: &[ScoredGroup],
) -> Vec<Minibatch> {
    // Groups of proposals have no reward until their problems are tried.
    let is_answered = |scored: &&ScoredGroup| scored.group.task.request.problem().is_some();
    let answered = groups.iter().filter(is_answered);
    let groups: Vec<&ScoredGroup> = match config.kind {
        PolicyGradientKind::Dapo => {
            let num_groups = config.groups_per_step.map_or(usize::MAX, |num_groups| num_groups as usize);
            answered.filter(|scored| disagrees(scored)).take(num_groups).collect()
        }
        _ => answered.collect(),
    };
    let advantages = advantages(config.kind, &groups);
    let per_update = groups.len().div_ceil(config.updates_per_step as usize).max(1);
    let parts = groups.chunks(per_update).zip(advantages.chunks(per_update)).zip(0u32..);
    let minibatches = parts.map(|((groups, advantages), update)| {
        let done = f64::from(update) / f64::from(num_updates);
        minibatch(config, max_answer_tokens, is_penalised, (step, done), groups, advantages)
    });
    minibatches.collect()
}

fn minibatch(
    config: &PolicyGradientConfig,
    max_answer_tokens: u32,
    is_penalised: bool,
    (step, done): (u64, f64),
    groups: &[&ScoredGroup],
    advantages: &[Vec<f64>],
) -> Minibatch {
    let rollouts = || groups.iter().flat_map(|scored| &scored.group.rollouts);
    let num_rollouts = rollouts().count() as f64;
    let num_tokens: f64 = rollouts().map(|rollout| rollout.choices.len() as f64).sum();
    let divisor = |rollout: &Rollout| match config.kind {
        PolicyGradientKind::DrGrpo => num_rollouts * f64::from(max_answer_tokens),
        PolicyGradientKind::Grpo => num_rollouts * rollout.choices.len() as f64,
        PolicyGradientKind::Gspo | PolicyGradientKind::Rloo => num_rollouts,
        PolicyGradientKind::Dapo
        | PolicyGradientKind::Distill
        | PolicyGradientKind::ReinforcePlusPlus
        | PolicyGradientKind::ReinforcePlusPlusBaseline => num_tokens,
    };
    let mut minibatch = Minibatch::default();
    for (scored, advantages) in groups.iter().zip(advantages) {
        for (rollout, advantage) in scored.group.rollouts.iter().zip(advantages) {
            if (*advantage == 0.0 && !is_penalised) || rollout.choices.is_empty() {
                continue;
            }
            let positions = rollout.choices.iter().map(|(position, _)| position);
            let proximal = positions.map(|position| proximal(scored, rollout, position, step, done)).collect();
            minibatch.sequences.push(played_sequence(scored, rollout));
            minibatch.losses.push(loss(config, rollout, *advantage as f32, proximal, config.weight / divisor(rollout)));
        }
    }
    minibatch
}

/// Returns the loss of a rollout.
fn loss(
    config: &PolicyGradientConfig,
    rollout: &Rollout,
    advantage: f32,
    proximal: Vec<f32>,
    weight: f64,
) -> RolloutLoss {
    let (clip_low, clip_high) = (config.clip_low as f32, config.clip_high as f32);
    let (entropy_bonus, weight) = (config.entropy_bonus as f32, weight as f32);
    let behavior_logprobs = rollout.logprobs.clone();
    match config.kind {
        PolicyGradientKind::Gspo => {
            SequenceSurrogate { advantage, behavior_logprobs, proximal, clip_low, clip_high, entropy_bonus, weight }
                .into()
        }
        _ => ClippedSurrogate {
            advantages: vec![advantage; behavior_logprobs.len()],
            behavior_logprobs,
            proximal,
            clip_low,
            clip_high,
            entropy_bonus,
            weight,
        }
        .into(),
    }
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

#[cfg(test)]
mod tests {
    use proto::{Verdict, VersionSpan};

    use super::*;
    use crate::minibatch::Surrogate;
    use crate::test_groups::{RIGHT, WRONG, group};

    fn config(kind: PolicyGradientKind) -> PolicyGradientConfig {
        PolicyGradientConfig {
            kind,
            weight: 0.5,
            clip_low: 0.2,
            clip_high: 0.28,
            entropy_bonus: 0.01,
            updates_per_step: 2,
            groups_per_step: None,
            cross_entropy: true,
        }
    }

    fn of_tokens(loss: &RolloutLoss) -> &ClippedSurrogate {
        let Surrogate::OfTokens(loss) = &loss.surrogate else { panic!("{loss:?}") };
        loss
    }

    /// Returns the advantage and the weight of every rollout.
    fn figures(minibatch: &Minibatch) -> Vec<(f32, f32)> {
        let figures = |loss: &RolloutLoss| match &loss.surrogate {
            Surrogate::OfTokens(loss) => {
                assert!(loss.advantages.iter().all(|advantage| *advantage == loss.advantages[0]));
                (loss.advantages[0], loss.weight)
            }
            Surrogate::OfSequence(loss) => (loss.advantage, loss.weight),
        };
        minibatch.losses.iter().map(figures).collect()
    }

    fn assert_figures(got: &[Minibatch], expected: &[Vec<(f64, f64)>]) {
        let got: Vec<_> = got.iter().map(figures).collect();
        assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(expected) {
            assert_eq!(got.len(), expected.len(), "{got:?}");
            for (got, expected) in got.iter().zip(expected) {
                assert!((f64::from(got.0) - expected.0).abs() < 1e-6, "expected {expected:?}, got {got:?}");
                assert!((f64::from(got.1) - expected.1).abs() < 1e-8, "expected {expected:?}, got {got:?}");
            }
        }
    }

    /// One right answer of four, four wrong ones, three right ones of four, four right ones; each with numbers of tokens.
    fn mixed_groups() -> [ScoredGroup; 4] {
        [
            group(&[(RIGHT, 3), (WRONG, 2), (Verdict::Malformed, 5), (Verdict::Timeout, 4)]),
            group(&[(WRONG, 2), (WRONG, 3), (WRONG, 2), (WRONG, 4)]),
            group(&[(RIGHT, 2), (RIGHT, 3), (WRONG, 1), (RIGHT, 1)]),
            group(&[(RIGHT, 2), (RIGHT, 3), (RIGHT, 1), (RIGHT, 1)]),
        ]
    }

    #[test]
    fn dr_grpo_centres_in_the_group_and_divides_by_a_constant() {
        let minibatches = minibatches(&config(PolicyGradientKind::DrGrpo), 20, false, (0, 2), &mixed_groups());
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
        let minibatches = minibatches(&config(PolicyGradientKind::ReinforcePlusPlus), 20, false, (0, 2), &groups);
        let (good, bad) = (0.1 / 0.1f64.sqrt(), -0.9 / 0.1f64.sqrt());
        // 0.5 / 5 tokens in either update. A group of equal rewards has an advantage here: the baseline is the batch's.
        let expected = [[(good, 0.1), (bad, 0.1)], [(good, 0.1), (good, 0.1)]];
        assert_figures(&minibatches, &expected.map(Vec::from));
    }

    /// By hand: 5 tokens of 1/2, 4 of -1/2 and 3 of 0 have mean 1/24 and squared deviations of 107/48 in all.
    #[test]
    fn reinforce_plus_plus_baseline_centres_in_the_group_before_it_whitens() {
        let groups = [group(&[(RIGHT, 5), (WRONG, 4)]), group(&[(RIGHT, 1), (RIGHT, 2)])];
        let minibatches =
            minibatches(&config(PolicyGradientKind::ReinforcePlusPlusBaseline), 20, false, (0, 2), &groups);
        let deviation = (107.0 / 48.0 / 11.0 + 1e-8f64).sqrt();
        let [good, bad, none] = [0.5, -0.5, 0.0].map(|centred| (centred - 1.0 / 24.0) / deviation);
        let weights = [0.5 / 9.0, 0.5 / 3.0];
        assert_figures(
            &minibatches,
            &[vec![(good, weights[0]), (bad, weights[0])], vec![(none, weights[1]), (none, weights[1])]],
        );
    }

    /// Deviations of the two mixed groups are 1/2. Groups that agree count in the divisor: 8 rollouts in either update.
    #[test]
    fn grpo_takes_the_mean_over_rollouts_of_the_mean_over_tokens() {
        let minibatches = minibatches(&config(PolicyGradientKind::Grpo), 20, false, (0, 2), &mixed_groups());
        let [quarter, three_quarters] = [0.25 / 0.5001, 0.75 / 0.5001];
        let weight = |num_tokens: f64| 0.5 / (8.0 * num_tokens);
        let expected = [
            vec![
                (three_quarters, weight(3.0)),
                (-quarter, weight(2.0)),
                (-quarter, weight(5.0)),
                (-quarter, weight(4.0)),
            ],
            vec![
                (quarter, weight(2.0)),
                (quarter, weight(3.0)),
                (-three_quarters, weight(1.0)),
                (quarter, weight(1.0)),
            ],
        ];
        assert_figures(&minibatches, &expected);
    }

    /// The second and the fourth group agree: neither in the loss nor in the divisor, which counts 14 and 7 tokens.
    #[test]
    fn dapo_divides_by_the_tokens_of_groups_that_disagree() {
        let of = |groups_per_step, updates_per_step| {
            let config = PolicyGradientConfig { groups_per_step, updates_per_step, ..config(PolicyGradientKind::Dapo) };
            minibatches(&config, 20, false, (0, 2), &mixed_groups())
        };
        let [quarter, three_quarters] = [0.25 / 0.5001, 0.75 / 0.5001];
        let first = |weight| vec![(three_quarters, weight), (-quarter, weight), (-quarter, weight), (-quarter, weight)];
        let second = |weight| vec![(quarter, weight), (quarter, weight), (-three_quarters, weight), (quarter, weight)];
        assert_figures(&of(None, 2), &[first(0.5 / 14.0), second(0.5 / 7.0)]);
        assert_figures(&of(None, 1), &[[first(0.5 / 21.0), second(0.5 / 21.0)].concat()]);
        assert_figures(&of(Some(1), 1), &[first(0.5 / 14.0)]);
        assert_figures(&of(Some(2), 1), &of(None, 1).iter().map(widened).collect::<Vec<_>>());
    }

    fn widened(minibatch: &Minibatch) -> Vec<(f64, f64)> {
        figures(minibatch).into_iter().map(|(advantage, weight)| (advantage.into(), weight.into())).collect()
    }

    #[test]
    fn gspo_and_rloo_take_the_mean_over_rollouts() {
        let [quarter, three_quarters] = [0.25 / 0.5001, 0.75 / 0.5001];
        let weight = 0.5 / 8.0;
        let expected = |good: f64, bad: f64| {
            [
                vec![(good, weight), (-bad, weight), (-bad, weight), (-bad, weight)],
                vec![(bad, weight), (bad, weight), (-good, weight), (bad, weight)],
            ]
        };
        let gspo = minibatches(&config(PolicyGradientKind::Gspo), 20, false, (0, 2), &mixed_groups());
        assert_figures(&gspo, &expected(three_quarters, quarter));
        assert!(gspo.iter().flat_map(|it| &it.losses).all(|loss| matches!(loss.surrogate, Surrogate::OfSequence(_))));
        let rloo = minibatches(&config(PolicyGradientKind::Rloo), 20, false, (0, 2), &mixed_groups());
        assert_figures(&rloo, &expected(1.0, 1.0 / 3.0));
        assert!(rloo.iter().flat_map(|it| &it.losses).all(|loss| matches!(loss.surrogate, Surrogate::OfTokens(_))));
    }

    /// Every rollout has a distance to the reference, whatever its advantage, and the weight that it would have anyway.
    #[test]
    fn a_penalty_takes_the_rollouts_without_an_advantage_too() {
        let with = minibatches(&config(PolicyGradientKind::Grpo), 20, true, (0, 2), &mixed_groups());
        let weight = |num_tokens: f64| (0.0, 0.5 / (8.0 * num_tokens));
        let agreeing = [[2.0, 3.0, 2.0, 4.0], [2.0, 3.0, 1.0, 1.0]].map(|lengths| lengths.map(weight).to_vec());
        let without = minibatches(&config(PolicyGradientKind::Grpo), 20, false, (0, 2), &mixed_groups());
        let expected = without.iter().zip(agreeing).map(|(mixed, agreeing)| [widened(mixed), agreeing].concat());
        assert_figures(&with, &expected.collect::<Vec<_>>());
    }

    /// 14 + 11 tokens in the first update, and 7 + 7 in the second.
    #[test]
    fn distillation_takes_the_mean_over_the_tokens_of_all_rollouts() {
        let minibatches = minibatches(&config(PolicyGradientKind::Distill), 20, true, (0, 2), &mixed_groups());
        assert_figures(&minibatches, &[vec![(0.0, 0.5 / 25.0); 8], vec![(0.0, 0.5 / 14.0); 8]]);
    }

    #[test]
    fn a_batch_that_agrees_trains_nothing() {
        for kind in [PolicyGradientKind::DrGrpo, PolicyGradientKind::ReinforcePlusPlus] {
            for verdict in [RIGHT, WRONG] {
                let groups = [group(&[(verdict, 4), (verdict, 1)]), group(&[(verdict, 3), (verdict, 7)])];
                let minibatches = minibatches(&config(kind), 20, false, (0, 2), &groups);
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
        let minibatches = minibatches(&config(PolicyGradientKind::DrGrpo), 20, false, (0, 2), &groups);
        let lengths = |minibatch: &Minibatch| minibatch.sequences.iter().map(|it| it.chosen.len()).collect::<Vec<_>>();
        assert_eq!(minibatches.iter().map(lengths).collect::<Vec<_>>(), [vec![1, 2, 2, 3, 3, 4], vec![4, 5, 5, 6]]);
        let sequence = &minibatches[0].sequences[1];
        assert_eq!((&sequence.tokens[..], sequence.chosen[1].target), (&[9, 0][..], 1));
        let loss = of_tokens(&minibatches[0].losses[1]);
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
        let minibatches = minibatches(&config(PolicyGradientKind::DrGrpo), 20, false, (7, 2), &groups);
        for (minibatch, expected) in minibatches.iter().zip([[1.0, 1.0, 0.0], [0.8, 2.0 / 3.0, 0.0]]) {
            assert_eq!(of_tokens(&minibatch.losses[0]).proximal, expected);
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
        let report = PolicyGradientReport::of_solver(&config, &minibatches(&config, 20, false, (0, 2), &groups), &loss);
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
