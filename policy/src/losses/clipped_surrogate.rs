use super::surrogate::{Clips, LogRatios, Surrogate, SurrogateStats};
use super::{Loss, LossGrad, Scores, one};

/// The clipped surrogate of the tokens of a rollout.
///
/// `-weight * (w min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + entropy_bonus * H)` per token, where `A` is its
/// advantage and `H` the entropy over the legal tokens. If `A` is negative, `min(...)` is at least `10 A`.
///
/// `ratio` is the current probability over that of the proximal policy, which a step must stay close to. `w` is
/// `min(proximal / behaviour, 2)`, a constant in the gradient. It reweights tokens that older weights drew to
/// the proximal policy. If the proximal policy is the behaviour policy, `w` is 1.
///
/// The proximal policy's log-probability is not computed by the network but interpolated: it lies at the fraction `proximal` of
/// the way from the behaviour policy's log-probability to the current one.
///
/// Source: Schulman et al. 2017 (PPO), eq. 7, with the two clips of Yu et al. 2025 (DAPO), section 3.1, the decoupling of
/// Hilton et al. 2022 (arXiv 2110.00641) as in Fu et al. 2025 (AReaL, arXiv 2505.24298), and AReaL's approximation by versions.
#[derive(Clone, Debug, PartialEq)]
pub struct ClippedSurrogate {
    /// Advantage of each chosen token.
    pub advantages: Vec<f32>,
    /// Log-probability of each chosen token when it was drawn.
    pub behavior_logprobs: Vec<f32>,
    /// Position of the proximal policy for each chosen token: 0 is the behaviour policy, 1 the current one.
    pub proximal: Vec<f32>,
    /// How far below 1 the importance ratio has an effect; in (0, 1].
    pub clip_low: f32,
    /// How far above 1 the importance ratio has an effect; over 0.
    pub clip_high: f32,
    /// Weight of a nat of entropy relative to the surrogate; 0 or more.
    pub entropy_bonus: f32,
    /// The weight of each token.
    pub weight: f32,
}

impl Loss for ClippedSurrogate {
    fn reads_entropies(&self) -> bool {
        true
    }

    fn value(&self, sequences: &[Scores<'_>]) -> f64 {
        self.stats(one(sequences)).loss
    }

    fn grad(&self, sequences: &[Scores<'_>]) -> Vec<LossGrad> {
        let grad = |(index, logprob): (usize, &f32)| LossGrad {
            logprob: -self.weight * self.surrogate(index, *logprob).slope,
            entropy: -self.weight * self.entropy_bonus,
        };
        one(sequences).logprobs.iter().enumerate().map(grad).collect()
    }
}

impl ClippedSurrogate {
    fn surrogate(&self, index: usize, logprob: f32) -> Surrogate {
        let ratios = LogRatios::of_token(logprob, self.behavior_logprobs[index], self.proximal[index]);
        Surrogate::new(self.advantages[index], ratios, Clips { low: self.clip_low, high: self.clip_high })
    }

    /// Computes the statistics of its sequence.
    pub fn stats(&self, scores: Scores<'_>) -> SurrogateStats {
        let mut stats = SurrogateStats::default();
        for (index, (logprob, entropy)) in scores.logprobs.iter().zip(scores.entropies).enumerate() {
            let surrogate = self.surrogate(index, *logprob);
            let bonus = f64::from(self.entropy_bonus) * f64::from(*entropy);
            stats.loss -= f64::from(self.weight) * (f64::from(surrogate.value) + bonus);
            stats.num_tokens += 1;
            stats.num_clipped += u64::from(surrogate.is_clipped);
            stats.num_truncated += u64::from(surrogate.is_truncated);
            stats.sum_importance_ratio += f64::from(surrogate.importance_ratio);
            stats.sum_entropy += f64::from(*entropy);
        }
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loss(advantage: f32) -> ClippedSurrogate {
        ClippedSurrogate {
            advantages: vec![advantage],
            behavior_logprobs: vec![0.25f32.ln()],
            proximal: vec![0.0],
            clip_low: 0.2,
            clip_high: 0.28,
            entropy_bonus: 0.5,
            weight: 0.1,
        }
    }

    /// By hand, for a behaviour probability of 1/4: the ratio is four times the probability.
    #[test]
    fn clips_above_for_good_and_below_for_bad_answers() {
        for (advantage, probability, value, slope) in [
            (2.0, 0.25, 2.0, 2.0),
            (2.0, 0.5, 2.0 * 1.28, 0.0),
            (2.0, 0.125, 2.0 * 0.5, 2.0 * 0.5),
            (-2.0, 0.25, -2.0, -2.0),
            (-2.0, 0.5, -2.0 * 2.0, -2.0 * 2.0),
            (-2.0, 0.125, -2.0 * 0.8, 0.0),
        ] {
            let surrogate = loss(advantage).surrogate(0, f32::ln(probability));
            let case = format!("advantage {advantage}, probability {probability}: {surrogate:?}");
            assert!((surrogate.value - value).abs() < 1e-6, "{case}");
            assert!((surrogate.slope - slope).abs() < 1e-6, "{case}");
            assert!((surrogate.importance_ratio - 4.0 * probability).abs() < 1e-6, "{case}");
            assert_eq!(surrogate.is_clipped, slope == 0.0, "{case}");
        }
    }

    /// By hand, for a behaviour probability of 1/4 and a proximal policy two thirds of the way: at probability p, the ratio
    /// to it is (4 p)^(1/3) and its ratio to the behaviour policy (4 p)^(2/3).
    #[test]
    fn weighs_by_the_proximal_policy_and_clips_around_it() {
        for (advantage, probability, value, slope, is_truncated) in [
            (2.0, 0.25, 2.0, 2.0, false),
            (2.0, 0.25 * 0.729, 0.81 * 0.9 * 2.0, 0.81 * 0.9 * 2.0, false),
            (2.0, 0.25 * 1.331, 1.21 * 1.1 * 2.0, 1.21 * 1.1 * 2.0, false),
            (2.0, 0.25 * 2.197, 1.69 * 1.28 * 2.0, 0.0, false),
            (-2.0, 0.25 * 3.375, 2.0 * 1.5 * -2.0, 2.0 * 1.5 * -2.0, true),
            (-2.0, 0.25 * 0.343, 0.49 * 0.8 * -2.0, 0.0, false),
        ] {
            let surrogate =
                ClippedSurrogate { proximal: vec![2.0 / 3.0], ..loss(advantage) }.surrogate(0, f32::ln(probability));
            let case = format!("advantage {advantage}, probability {probability}: {surrogate:?}");
            assert!((surrogate.value - value).abs() < 1e-5, "{case}");
            assert!((surrogate.slope - slope).abs() < 1e-5, "{case}");
            assert!((surrogate.importance_ratio - 4.0 * probability).abs() < 1e-5, "{case}");
            assert_eq!((surrogate.is_clipped, surrogate.is_truncated), (slope == 0.0, is_truncated), "{case}");
        }
    }

    /// No correct actor reports such a log-probability, but a hostile one may.
    #[test]
    fn stays_finite_whatever_the_behaviour_policy_is_said_to_be() {
        for (advantage, proximal) in [(2.0, 0.0), (-2.0, 0.0), (-2.0, 2.0 / 3.0)] {
            let behavior_logprobs = vec![f32::MIN];
            let surrogate = ClippedSurrogate { behavior_logprobs, proximal: vec![proximal], ..loss(advantage) };
            let Surrogate { value, slope, importance_ratio, .. } = surrogate.surrogate(0, -1.0);
            let all = [value, slope, importance_ratio];
            assert!(all.iter().all(|figure| figure.is_finite()) && importance_ratio > 1e8, "{all:?}");
            // The upper clip bounds a good answer anyway.
            assert!(slope == 0.0 && value.abs() <= 2.0 * 10.0 * 2.0, "{all:?}");
        }
        // By hand: a ratio of 9.9 counts, one of 10.1 does not.
        for (ratio, value, slope) in [(9.9f32, -19.8, -19.8), (10.1, -20.0, 0.0)] {
            let surrogate = loss(-2.0).surrogate(0, 0.25f32.ln() + ratio.ln());
            assert!((surrogate.value - value).abs() < 1e-4 && (surrogate.slope - slope).abs() < 1e-4, "{surrogate:?}");
            assert_eq!(surrogate.is_clipped, slope == 0.0);
        }
    }

    #[test]
    fn stats_are_sums_over_tokens() {
        let loss = ClippedSurrogate {
            advantages: vec![2.0; 2],
            behavior_logprobs: vec![0.25f32.ln(); 2],
            proximal: vec![0.0; 2],
            ..loss(2.0)
        };
        let scores = Scores { logprobs: &[0.5f32.ln(), 0.125f32.ln()], entropies: &[0.75, 0.25] };
        let stats = loss.stats(scores);
        // -0.1 (2 * 1.28 + 0.5 * 0.75) - 0.1 (2 * 0.5 + 0.5 * 0.25)
        assert!((stats.loss + 0.2935 + 0.1125).abs() < 1e-6, "{stats:?}");
        assert_eq!((stats.num_tokens, stats.num_clipped, stats.num_truncated, stats.sum_entropy), (2, 1, 0, 1.0));
        assert!((stats.sum_importance_ratio - 2.5).abs() < 1e-6, "{stats:?}");
        assert_eq!(loss.value(&[scores]), stats.loss);
        let mut twice = stats;
        twice.add(&stats);
        assert_eq!((twice.loss, twice.num_tokens, twice.sum_entropy), (2.0 * stats.loss, 4, 2.0));
        let [clipped, free] = loss.grad(&[scores])[..] else { panic!("two tokens") };
        assert_eq!((clipped.logprob, clipped.entropy), (0.0, -0.05));
        assert!((free.logprob + 0.1).abs() < 1e-6 && free.entropy == -0.05, "{free:?}");
    }

    /// By hand: 0.1 (2 * 1.28 - 3 * 2), as the second token has twice its behaviour probability too.
    #[test]
    fn every_token_has_its_own_advantage() {
        let loss = ClippedSurrogate {
            advantages: vec![2.0, -3.0],
            behavior_logprobs: vec![0.25f32.ln(); 2],
            proximal: vec![0.0; 2],
            entropy_bonus: 0.0,
            ..loss(0.0)
        };
        let scores = Scores { logprobs: &[0.5f32.ln(); 2], entropies: &[0.0; 2] };
        assert!((loss.value(&[scores]) + 0.1 * (2.56 - 6.0)).abs() < 1e-6);
        let slopes: Vec<f32> = loss.grad(&[scores]).iter().map(|grad| grad.logprob).collect();
        assert!(slopes[0] == 0.0 && (slopes[1] - 0.6).abs() < 1e-6, "{slopes:?}");
    }
}
