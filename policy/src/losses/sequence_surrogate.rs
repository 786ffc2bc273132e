use super::surrogate::{Clips, LogRatios, Surrogate, SurrogateStats};
use super::{Loss, LossGrad, Scores, one};

/// The clipped surrogate of a rollout as a whole (GSPO).
///
/// `-weight * (w min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) + entropy_bonus * mean_t H_t)`, where `A` is the advantage of the
/// rollout and `s = exp(mean_t log ratio_t)` the geometric mean of its tokens' ratios. `ratio_t` and `w` are as in
/// [`ClippedSurrogate`](crate::ClippedSurrogate), `w` from the geometric mean too. The gradient passes through `s`, so that each
/// token has the same share of it.
///
/// Source: Zheng et al. 2025 (GSPO, arXiv 2507.18071), equations 5 and 7.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceSurrogate {
    /// Advantage of the rollout.
    pub advantage: f32,
    /// Log-probability of each chosen token when it was drawn.
    pub behavior_logprobs: Vec<f32>,
    /// Position of the proximal policy for each chosen token: 0 is the behaviour policy, 1 the current one.
    pub proximal: Vec<f32>,
    /// How far below 1 `s` has an effect; in (0, 1]. 3e-4 in GSPO.
    pub clip_low: f32,
    /// How far above 1 `s` has an effect; over 0. 4e-4 in GSPO.
    pub clip_high: f32,
    /// Weight of a nat of mean entropy relative to the surrogate; 0 or more.
    pub entropy_bonus: f32,
    /// The weight of the sequence.
    pub weight: f32,
}

impl Loss for SequenceSurrogate {
    fn reads_entropies(&self) -> bool {
        true
    }

    fn value(&self, sequences: &[Scores<'_>]) -> f64 {
        self.stats(one(sequences)).loss
    }

    fn grad(&self, sequences: &[Scores<'_>]) -> Vec<LossGrad> {
        let logprobs = one(sequences).logprobs;
        let token_weight = self.weight / logprobs.len() as f32;
        let slope = self.surrogate(logprobs).slope;
        let grad = LossGrad { logprob: -token_weight * slope, entropy: -token_weight * self.entropy_bonus };
        vec![grad; logprobs.len()]
    }
}

impl SequenceSurrogate {
    fn surrogate(&self, logprobs: &[f32]) -> Surrogate {
        let behavior = self.behavior_logprobs.iter().zip(&self.proximal);
        let ratios: Vec<LogRatios> = logprobs
            .iter()
            .zip(behavior)
            .map(|(logprob, (behavior, proximal))| LogRatios::of_token(*logprob, *behavior, *proximal))
            .collect();
        let mean =
            |of: fn(&LogRatios) -> f32| ratios.iter().map(of).fold(0.0, |sum, log| sum + log) / ratios.len() as f32;
        let ratios = LogRatios {
            importance: mean(|ratios| ratios.importance),
            to_proximal: mean(|ratios| ratios.to_proximal),
            of_proximal: mean(|ratios| ratios.of_proximal),
        };
        Surrogate::new(self.advantage, ratios, Clips { low: self.clip_low, high: self.clip_high })
    }

    /// Computes the statistics of its sequence. All of its tokens are clipped, or none.
    pub fn stats(&self, scores: Scores<'_>) -> SurrogateStats {
        let num_tokens = scores.logprobs.len() as u64;
        if num_tokens == 0 {
            return SurrogateStats::default();
        }
        let surrogate = self.surrogate(scores.logprobs);
        let sum_entropy: f64 = scores.entropies.iter().map(|entropy| f64::from(*entropy)).sum();
        let bonus = f64::from(self.entropy_bonus) * sum_entropy / num_tokens as f64;
        SurrogateStats {
            loss: -f64::from(self.weight) * (f64::from(surrogate.value) + bonus),
            num_tokens,
            num_clipped: if surrogate.is_clipped { num_tokens } else { 0 },
            num_truncated: if surrogate.is_truncated { num_tokens } else { 0 },
            sum_importance_ratio: f64::from(surrogate.importance_ratio) * num_tokens as f64,
            sum_entropy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loss(advantage: f32) -> SequenceSurrogate {
        SequenceSurrogate {
            advantage,
            behavior_logprobs: vec![-1.0, -2.0],
            proximal: vec![0.0; 2],
            clip_low: 0.2,
            clip_high: 0.28,
            entropy_bonus: 0.5,
            weight: 0.1,
        }
    }

    /// By hand: log ratios of `mean + 1/4` and `mean - 1/4` have the geometric mean `exp(mean)`; mean entropy 1/2.
    #[test]
    fn the_ratio_is_the_geometric_mean_and_is_clipped_as_a_whole() {
        for (advantage, mean, value, slope) in [
            (2.0f32, 0.0f32, 2.0f32, 2.0f32),
            (2.0, 0.1, 2.0 * 1.105_171, 2.0 * 1.105_171),
            (2.0, 0.3, 2.0 * 1.28, 0.0),
            (2.0, -0.3, 2.0 * 0.740_818, 2.0 * 0.740_818),
            (-2.0, -0.3, -2.0 * 0.8, 0.0),
            (-2.0, 0.3, -2.0 * 1.349_859, -2.0 * 1.349_859),
        ] {
            let loss = loss(advantage);
            let logprobs = [-1.0 + mean + 0.25, -2.0 + mean - 0.25];
            let scores = Scores { logprobs: &logprobs, entropies: &[0.75, 0.25] };
            let case = format!("advantage {advantage}, mean {mean}");
            let expected = -0.1 * (f64::from(value) + 0.5 * 0.5);
            assert!((loss.value(&[scores]) - expected).abs() < 1e-6, "{case}: {}", loss.value(&[scores]));
            for grad in loss.grad(&[scores]) {
                assert!((grad.logprob + 0.1 * slope / 2.0).abs() < 1e-6, "{case}: {grad:?}");
                assert!((grad.entropy + 0.1 * 0.5 / 2.0).abs() < 1e-7, "{case}: {grad:?}");
            }
            let stats = loss.stats(scores);
            assert_eq!((stats.num_tokens, stats.num_clipped), (2, if slope == 0.0 { 2 } else { 0 }), "{case}");
            assert!((stats.sum_importance_ratio - 2.0 * f64::from(mean.exp())).abs() < 1e-5, "{case}: {stats:?}");
        }
    }

    /// By hand: with the proximal policy half way, a log ratio of 0.4 is 0.2 to it and 0.2 from it to the behaviour policy.
    #[test]
    fn weighs_by_the_proximal_policy_and_clips_around_it() {
        let loss = SequenceSurrogate { proximal: vec![0.5; 2], entropy_bonus: 0.0, ..loss(2.0) };
        let scores = Scores { logprobs: &[-0.6, -1.6], entropies: &[0.0; 2] };
        let expected = -0.1 * 2.0 * 1.221_403 * 1.221_403;
        assert!((loss.value(&[scores]) - expected).abs() < 1e-6, "{}", loss.value(&[scores]));
        for grad in loss.grad(&[scores]) {
            assert!((f64::from(grad.logprob) - expected / 2.0).abs() < 1e-6, "{grad:?}");
        }
    }
}
