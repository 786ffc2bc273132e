use super::{Loss, LossGrad, Scores, one};

/// A penalty on the distance of a policy to a reference, on tokens that the policy drew: `weight * k1^2 / 2` per token, where
/// `k1 = logprob - reference`.
///
/// This is the estimator k2. Its gradient on the policy's own tokens, `k1` times that of the log-probability, is in expectation the
/// gradient of the reverse divergence KL(policy || reference). The gradient of k1 is 0 in expectation, and that of
/// `k3 = exp(-k1) + k1 - 1` is that of another divergence.
///
/// Source: Schulman 2020, "Approximating KL divergence", k2; Tang and Munos 2025 (arXiv 2506.09477) for its gradient.
#[derive(Clone, Debug, PartialEq)]
pub struct ReferenceKl {
    /// Log-probability of each chosen token under the reference.
    pub reference_logprobs: Vec<f32>,
    /// The weight of each token.
    pub weight: f32,
}

impl ReferenceKl {
    fn k1<'a>(&'a self, scores: Scores<'a>) -> impl Iterator<Item = f32> + 'a {
        scores.logprobs.iter().zip(&self.reference_logprobs).map(|(logprob, reference)| logprob - reference)
    }
}

impl Loss for ReferenceKl {
    fn value(&self, sequences: &[Scores<'_>]) -> f64 {
        let k2 = self.k1(one(sequences)).map(|k1| 0.5 * f64::from(k1).powi(2));
        f64::from(self.weight) * k2.sum::<f64>()
    }

    fn grad(&self, sequences: &[Scores<'_>]) -> Vec<LossGrad> {
        self.k1(one(sequences)).map(|k1| LossGrad { logprob: self.weight * k1, entropy: 0.0 }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: k1 is 1/2 and -2, so k2 is 1/8 and 2.
    #[test]
    fn pulls_towards_the_reference_from_either_side() {
        let loss = ReferenceKl { reference_logprobs: vec![-1.5, -1.0], weight: 0.25 };
        let scores = [Scores { logprobs: &[-1.0, -3.0], entropies: &[0.0; 2] }];
        assert_eq!(loss.value(&scores), 0.25 * (0.125 + 2.0));
        let slopes: Vec<f32> = loss.grad(&scores).iter().map(|grad| grad.logprob).collect();
        assert_eq!(slopes, [0.125, -0.5], "a descent lowers the first log-probability and raises the second");
    }
}
