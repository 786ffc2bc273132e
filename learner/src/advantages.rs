//! Advantages of rollouts, from their verdicts.

use proto::{ScoredGroup, Verdict};

use crate::config::PolicyGradientKind;

/// Computes the advantages of the rollouts of groups, by group. All tokens of a rollout have the same advantage: it is rewarded at
/// its end, and nothing is discounted.
pub(crate) fn advantages(kind: PolicyGradientKind, groups: &[&ScoredGroup]) -> Vec<Vec<f64>> {
    let rewards = groups.iter().map(|scored| rewards(scored));
    match kind {
        PolicyGradientKind::DrGrpo => rewards.map(|rewards| centred(&rewards)).collect(),
        PolicyGradientKind::Grpo | PolicyGradientKind::Dapo | PolicyGradientKind::Gspo => {
            rewards.map(|rewards| standardised(&rewards)).collect()
        }
        PolicyGradientKind::Rloo => rewards.map(|rewards| left_one_out(&rewards)).collect(),
        PolicyGradientKind::Distill => rewards.map(|rewards| vec![0.0; rewards.len()]).collect(),
        PolicyGradientKind::ReinforcePlusPlus => whitened_over_tokens(groups, rewards.collect()),
        PolicyGradientKind::ReinforcePlusPlusBaseline => {
            whitened_over_tokens(groups, rewards.map(|rewards| centred(&rewards)).collect())
        }
    }
}

/// Whether some rollouts of a group solve its problem, and others do not.
pub(crate) fn disagrees(scored: &ScoredGroup) -> bool {
    let num_correct = scored.verdicts.iter().filter(|verdict| **verdict == Verdict::Correct).count();
    num_correct > 0 && num_correct < scored.verdicts.len()
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

/// Computes advantages within a group: reward minus mean, divided by the standard deviation (unbiased) plus 1e-4.
///
/// Source: Shao et al. 2024 (GRPO, arXiv 2402.03300), section 4.1.2; the deviation and the constant are those of TRL.
fn standardised(rewards: &[f64]) -> Vec<f64> {
    let centred = centred(rewards);
    let squares: f64 = centred.iter().map(|value| value * value).sum();
    let deviation = (squares / (rewards.len() as f64 - 1.0).max(1.0)).sqrt();
    centred.iter().map(|value| value / (deviation + 1e-4)).collect()
}

/// Computes advantages within a group: reward minus the mean reward of the others, which is `G / (G - 1)` times the difference to
/// the mean of all G.
///
/// Source: Ahmadian et al. 2024 (RLOO, arXiv 2402.14740).
fn left_one_out(rewards: &[f64]) -> Vec<f64> {
    let num_others = (rewards.len() as f64 - 1.0).max(1.0);
    centred(rewards).iter().map(|value| value * (rewards.len() as f64 / num_others)).collect()
}

/// Shifts and scales returns over all chosen tokens of a batch. A rollout is rewarded at its end, without discount, so all of its
/// tokens have the reward as their return, and the same advantage.
fn whitened_over_tokens(groups: &[&ScoredGroup], returns: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let returns = returns.concat();
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
    use super::*;

    fn assert_close(got: &[f64], expected: &[f64]) {
        let is_close = |(got, expected): (&f64, &f64)| (got - expected).abs() < 1e-9;
        assert!(
            got.len() == expected.len() && got.iter().zip(expected).all(is_close),
            "expected {expected:?}, got {got:?}"
        );
    }

    /// By hand, for one right answer of four: mean 1/4, sum of squares 3/4, unbiased variance 1/4.
    #[test]
    fn advantages_within_a_group() {
        let rewards = [1.0, 0.0, 0.0, 0.0];
        assert_close(&centred(&rewards), &[0.75, -0.25, -0.25, -0.25]);
        let (good, bad) = (0.75 / 0.5001, -0.25 / 0.5001);
        assert_close(&standardised(&rewards), &[good, bad, bad, bad]);
        let others = -1.0 / 3.0;
        assert_close(&left_one_out(&rewards), &[1.0, others, others, others]);
        for equal in [[1.0; 3], [0.0; 3]] {
            for advantages in [centred(&equal), standardised(&equal), left_one_out(&equal)] {
                assert_eq!(advantages, [0.0; 3]);
            }
        }
    }

    /// By hand: nine tokens of 1 and one of 0 have mean 0.9 and unbiased variance 0.1.
    #[test]
    fn whitening_counts_tokens() {
        let deviation = (0.1 + 1e-8f64).sqrt();
        assert_close(&whitened(&[1.0, 0.0, 1.0], &[4.0, 1.0, 5.0]), &[0.1, -0.9, 0.1].map(|value| value / deviation));
    }
}
