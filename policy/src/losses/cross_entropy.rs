use super::{Loss, LossGrad, Scores};

/// `-weight * logprob` per token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropy {
    /// The weight of each token.
    pub weight: f32,
}

impl Loss for CrossEntropy {
    fn value(&self, sequences: &[Scores<'_>]) -> f64 {
        let logprobs = sequences.iter().flat_map(|scores| scores.logprobs);
        logprobs.fold(0.0, |loss, logprob| loss - f64::from(*logprob) * f64::from(self.weight))
    }

    fn grad(&self, sequences: &[Scores<'_>]) -> Vec<LossGrad> {
        let num_tokens = sequences.iter().map(|scores| scores.logprobs.len()).sum();
        vec![LossGrad { logprob: -self.weight, entropy: 0.0 }; num_tokens]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn falls_as_tokens_become_likely() {
        let (likely, unlikely) = ([-0.5, -0.25], [-4.0, -2.0]);
        let of = |logprobs| [Scores { logprobs, entropies: &[0.0; 2] }];
        let loss = CrossEntropy { weight: 0.5 };
        assert_eq!((loss.value(&of(&likely)), loss.value(&of(&unlikely))), (0.375, 3.0));
        assert_eq!(loss.grad(&of(&likely)), [LossGrad { logprob: -0.5, entropy: 0.0 }; 2]);
    }
}
