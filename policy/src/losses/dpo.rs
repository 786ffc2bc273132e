use super::{Loss, LossGrad, Scores};

/// The preference for one sequence over another, the better one first (DPO).
///
/// `-weight * log sigmoid(m)` with the margin `m = beta (D_better - D_worse)`, where `D` sums `logprob - reference` over the chosen
/// tokens of a sequence, or takes their mean if `per_token`.
///
/// Source: Rafailov et al. 2023 (DPO, arXiv 2305.18290), equation 7. `per_token` is the loss `sigmoid_norm` of TRL.
#[derive(Clone, Debug, PartialEq)]
pub struct Dpo {
    /// Log-probability of each chosen token under the reference, of the better sequence and of the worse one.
    pub reference_logprobs: [Vec<f32>; 2],
    /// Scale of the margin; over 0.
    pub beta: f32,
    /// Whether long sequences count as much as short ones.
    pub per_token: bool,
    /// The weight of the pair.
    pub weight: f32,
}

impl Dpo {
    /// Returns the margin by which the better sequence is preferred; below 0 if the other one is.
    ///
    /// # Panics
    /// When there are not two sequences.
    pub fn margin(&self, sequences: &[Scores<'_>]) -> f64 {
        let [better, worse] = self.slopes(sequences);
        let sum = |scores: &Scores<'_>, reference: &[f32]| -> f64 {
            let pairs = scores.logprobs.iter().zip(reference);
            pairs.map(|(logprob, reference)| f64::from(*logprob) - f64::from(*reference)).sum()
        };
        let [of_better, of_worse] = &self.reference_logprobs;
        better * sum(&sequences[0], of_better) + worse * sum(&sequences[1], of_worse)
    }

    /// Returns the derivative of the margin with respect to each log-probability of a sequence.
    fn slopes(&self, sequences: &[Scores<'_>]) -> [f64; 2] {
        let [better, worse] = sequences else { panic!("expected a pair of sequences, got {}", sequences.len()) };
        let share = |scores: &Scores<'_>| if self.per_token { 1.0 / scores.logprobs.len().max(1) as f64 } else { 1.0 };
        let beta = f64::from(self.beta);
        [beta * share(better), -beta * share(worse)]
    }
}

impl Loss for Dpo {
    fn value(&self, sequences: &[Scores<'_>]) -> f64 {
        let margin = self.margin(sequences);
        f64::from(self.weight) * ((-margin).max(0.0) + libm::log1p(libm::exp(-margin.abs())))
    }

    fn grad(&self, sequences: &[Scores<'_>]) -> Vec<LossGrad> {
        // The derivative of -log sigmoid(m) is -sigmoid(-m).
        let slope = -f64::from(self.weight) / (1.0 + libm::exp(self.margin(sequences)));
        let grads = sequences.iter().zip(self.slopes(sequences)).flat_map(|(scores, of_margin)| {
            let grad = LossGrad { logprob: (slope * of_margin) as f32, entropy: 0.0 };
            std::iter::repeat_n(grad, scores.logprobs.len())
        });
        grads.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BETTER: Scores<'_> = Scores { logprobs: &[-1.0, -2.0], entropies: &[0.0; 2] };
    const WORSE: Scores<'_> = Scores { logprobs: &[-0.5, -0.25, -1.25, -2.0], entropies: &[0.0; 4] };

    fn loss(per_token: bool) -> Dpo {
        Dpo {
            reference_logprobs: [vec![-1.5, -2.5], vec![-0.5, -0.75, -1.5, -2.25]],
            beta: 0.5,
            per_token,
            weight: 0.25,
        }
    }

    /// By hand: D is 1 and 1 as sums, 1/2 and 1/4 as means.
    #[test]
    fn the_margin_is_against_the_reference() {
        let pair = [BETTER, WORSE];
        let sums = loss(false);
        assert_eq!(sums.margin(&pair), 0.0);
        assert!((sums.value(&pair) - 0.25 * 2f64.ln()).abs() < 1e-12, "{}", sums.value(&pair));
        let slopes: Vec<f32> = sums.grad(&pair).iter().map(|grad| grad.logprob).collect();
        assert_eq!(slopes, [-0.0625, -0.0625, 0.0625, 0.0625, 0.0625, 0.0625], "0.25 x 0.5 x sigmoid(0)");

        let means = loss(true);
        assert_eq!(means.margin(&pair), 0.125);
        let sigmoid = 0.468_790_6; // 1 / (1 + exp(0.125))
        assert!((means.value(&pair) - 0.25 * -(1.0f64 - sigmoid).ln()).abs() < 1e-7, "{}", means.value(&pair));
        let slopes: Vec<f32> = means.grad(&pair).iter().map(|grad| grad.logprob).collect();
        for (got, share) in slopes.iter().zip([-0.5, -0.5, 0.25, 0.25, 0.25, 0.25]) {
            assert!((f64::from(*got) - 0.25 * 0.5 * sigmoid * share).abs() < 1e-7, "{slopes:?}");
        }
    }

    #[test]
    fn stays_finite_for_margins_of_any_size() {
        for shift in [-1e4f32, 1e4] {
            let logprobs = [-1.0 + shift, -2.0];
            let pair = [Scores { logprobs: &logprobs, entropies: &[0.0; 2] }, WORSE];
            let (value, grads) = (loss(false).value(&pair), loss(false).grad(&pair));
            let expected = if shift < 0.0 { 0.25 * 0.5 * 1e4 } else { 0.0 };
            assert!((value - expected).abs() < 1e-3, "{value}, expected {expected}");
            assert!(grads.iter().all(|grad| grad.logprob.is_finite()), "{grads:?}");
        }
    }
}
