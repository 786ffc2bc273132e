use crate::kernels::{exp, vectorized};
use proto::{ActionMask, CounterRng, Token};

/// Maximum and sum of exponentials over the legal tokens, in ascending order of token.
#[derive(Clone, Copy)]
struct LegalSoftmax {
    max: f32,
    sum: f32,
    inverse_temperature: f32,
}

impl LegalSoftmax {
    #[inline(always)]
    fn new(logits: &[f32], mask: &ActionMask, inverse_temperature: f32) -> LegalSoftmax {
        let scaled = |token: Token| logits[usize::from(token)] * inverse_temperature;
        let max = mask.iter().map(scaled).fold(f32::NEG_INFINITY, f32::max);
        let sum = mask.iter().map(|token| exp(scaled(token) - max)).fold(0.0, |sum, weight| sum + weight);
        LegalSoftmax { max, sum, inverse_temperature }
    }

    #[inline(always)]
    fn weight(&self, logit: f32) -> f32 {
        exp(logit * self.inverse_temperature - self.max)
    }

    #[inline(always)]
    fn logprob(&self, logit: f32) -> f32 {
        logit * self.inverse_temperature - self.max - libm::logf(self.sum)
    }

    /// log(sum) - E[logit - max].
    #[inline(always)]
    fn entropy(&self, logits: &[f32], mask: &ActionMask) -> f32 {
        let scaled = |token: Token| logits[usize::from(token)] * self.inverse_temperature - self.max;
        let weighted = mask.iter().map(|token| self.weight(logits[usize::from(token)]) * scaled(token));
        libm::logf(self.sum) - weighted.fold(0.0, |sum, term| sum + term) / self.sum
    }
}

/// Computes the log-probability of a token among the legal ones. The one function for actor and learner.
///
/// - `logits`: `[V]`; `mask`: legal tokens, `target` one of them.
///
/// ```
/// let mask = [1, 3].into_iter().collect();
/// let logprob = policy::masked_logprob(&[9.0, 0.0, 9.0, 0.0], &mask, 3);
/// assert!((logprob - 0.5f32.ln()).abs() < 1e-6);
/// ```
pub fn masked_logprob(logits: &[f32], mask: &ActionMask, target: Token) -> f32 {
    vectorized!({ LegalSoftmax::new(logits, mask, 1.0).logprob(logits[usize::from(target)]) })
}

/// Adds `scale` times the gradient of [`masked_logprob`] to `grad_logits`.
pub(crate) fn masked_logprob_backward(
    logits: &[f32],
    mask: &ActionMask,
    target: Token,
    scale: f32,
    grad_logits: &mut [f32],
) {
    vectorized!({
        let softmax = LegalSoftmax::new(logits, mask, 1.0);
        for token in mask.iter().map(usize::from) {
            grad_logits[token] -= scale * (softmax.weight(logits[token]) / softmax.sum);
        }
        grad_logits[usize::from(target)] += scale;
    });
}

/// Computes the entropy over the legal tokens, in nats.
pub(crate) fn masked_entropy(logits: &[f32], mask: &ActionMask) -> f32 {
    vectorized!({ LegalSoftmax::new(logits, mask, 1.0).entropy(logits, mask) })
}

/// Adds `scale` times the gradient of [`masked_entropy`] to `grad_logits`.
pub(crate) fn masked_entropy_backward(logits: &[f32], mask: &ActionMask, scale: f32, grad_logits: &mut [f32]) {
    vectorized!({
        let softmax = LegalSoftmax::new(logits, mask, 1.0);
        let (entropy, log_sum) = (softmax.entropy(logits, mask), libm::logf(softmax.sum));
        for token in mask.iter().map(usize::from) {
            let logprob = logits[token] - softmax.max - log_sum;
            grad_logits[token] -= scale * (softmax.weight(logits[token]) / softmax.sum) * (logprob + entropy);
        }
    });
}

/// Draws a legal token and gives its log-probability.
///
/// - `logits`: `[V]`; `mask`: at least one legal token.
/// - `temperature`: divides the logits; 0 takes the most probable token (the lowest id among equals) and gives its
///   log-probability at temperature 1.
///
/// # Panics
/// When the mask is empty.
pub fn sample(logits: &[f32], mask: &ActionMask, temperature: f32, rng: &mut CounterRng) -> (Token, f32) {
    assert!(!mask.is_empty(), "sample: expected a legal token, got none");
    if temperature == 0.0 {
        let best = mask
            .iter()
            .reduce(|best, token| if logits[usize::from(token)] > logits[usize::from(best)] { token } else { best });
        let best = best.expect("the mask is not empty");
        return (best, masked_logprob(logits, mask, best));
    }
    let threshold = rng.unit_f64();
    vectorized!({
        let softmax = LegalSoftmax::new(logits, mask, 1.0 / temperature);
        let threshold = threshold * f64::from(softmax.sum);
        let (mut cumulative, mut drawn) = (0.0, 0);
        for token in mask.iter() {
            drawn = token;
            cumulative += f64::from(softmax.weight(logits[usize::from(token)]));
            if cumulative > threshold {
                break;
            }
        }
        (drawn, softmax.logprob(logits[usize::from(drawn)]))
    })
}

#[cfg(test)]
mod tests {
    use proto::Purpose;

    use super::*;

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.0, 1.0, 50.0, 2.0];
        let mask: ActionMask = [0, 1, 3].into_iter().collect();
        let mut counts = [0u32; 4];
        let mut rng = CounterRng::new(0, Purpose::Rollout, 0, 0, 0);
        for _ in 0..30_000 {
            let (token, logprob) = sample(&logits, &mask, 1.0, &mut rng);
            assert_eq!(logprob, masked_logprob(&logits, &mask, token));
            counts[usize::from(token)] += 1;
        }
        // scipy.special.softmax([0, 1, 2])
        for (count, expected) in [counts[0], counts[1], counts[3]].into_iter().zip([0.0900, 0.2447, 0.6652]) {
            assert!((f64::from(count) / 30_000.0 - expected).abs() < 0.01, "{counts:?}");
        }
        assert_eq!(counts[2], 0);
        assert_eq!(sample(&logits, &mask, 0.0, &mut rng).0, 3);
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        let logits = [0.3f32, -1.0, 0.7, 2.0];
        let mask: ActionMask = [0, 2, 3].into_iter().collect();
        type Value = fn(&[f32], &ActionMask) -> f32;
        type Backward = fn(&[f32], &ActionMask, &mut [f32]);
        let logprob: (Value, Backward) = (
            |logits, mask| 1.5 * masked_logprob(logits, mask, 2),
            |logits, mask, gradient| masked_logprob_backward(logits, mask, 2, 1.5, gradient),
        );
        let entropy: (Value, Backward) = (
            |logits, mask| 1.5 * masked_entropy(logits, mask),
            |logits, mask, gradient| masked_entropy_backward(logits, mask, 1.5, gradient),
        );
        for (value, backward) in [logprob, entropy] {
            let mut gradient = [0.0; 4];
            backward(&logits, &mask, &mut gradient);
            for index in 0..4 {
                let shifted = |by: f32| {
                    let mut logits = logits;
                    logits[index] += by;
                    f64::from(value(&logits, &mask))
                };
                let difference = (shifted(1e-2) - shifted(-1e-2)) / 2e-2;
                assert!((difference - f64::from(gradient[index])).abs() < 1e-3, "{index}: {difference} {gradient:?}");
            }
        }
    }

    #[test]
    fn entropy_counts_legal_tokens_only() {
        let mask: ActionMask = [0, 1, 3].into_iter().collect();
        // scipy.stats.entropy(scipy.special.softmax([0, 1, 2]))
        let entropy = masked_entropy(&[0.0, 1.0, 50.0, 2.0], &mask);
        assert!((entropy - 0.832_396).abs() < 1e-5, "{entropy}");
    }
}
