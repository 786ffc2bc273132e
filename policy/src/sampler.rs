use crate::cpu::kernels::{exp, vectorized};
use proto::{CounterRng, LegalTokens, TokenId};

/// Legal logits that are computed together, with vector instructions.
const CHUNK: usize = 64;

/// Calls a function with the logits of the legal tokens, in ascending order: chunks, each with the number of its logits. What follows
/// them is negative infinity.
#[inline(always)]
fn for_chunks(legal: &LegalTokens, logits: &[f32], mut call: impl FnMut(&[f32; CHUNK], usize)) {
    let mut rest = [f32::NEG_INFINITY; CHUNK];
    match legal {
        LegalTokens::Any => {
            let (chunks, last) = logits.as_chunks();
            for chunk in chunks {
                call(chunk, CHUNK);
            }
            rest[..last.len()].copy_from_slice(last);
            call(&rest, last.len());
        }
        LegalTokens::Only(set) => {
            let mut len = 0;
            for token in set.iter() {
                rest[len] = logits[token as usize];
                len += 1;
                if len == CHUNK {
                    call(&rest, CHUNK);
                    (rest, len) = ([f32::NEG_INFINITY; CHUNK], 0);
                }
            }
            call(&rest, len);
        }
    }
}

/// Changes the gradients of the legal logits.
#[inline(always)]
fn change_legal(legal: &LegalTokens, logits: &[f32], grad_logits: &mut [f32], change: impl Fn(&mut f32, f32)) {
    match legal {
        LegalTokens::Any => {
            for (grad, logit) in grad_logits.iter_mut().zip(logits) {
                change(grad, *logit);
            }
        }
        LegalTokens::Only(set) => {
            for token in set.iter() {
                change(&mut grad_logits[token as usize], logits[token as usize]);
            }
        }
    }
}

/// Maximum and sum of exponentials over the legal tokens.
#[derive(Clone, Copy)]
struct LegalSoftmax {
    max: f32,
    sum: f32,
    inverse_temperature: f32,
}

impl LegalSoftmax {
    #[inline(always)]
    fn new(logits: &[f32], legal: &LegalTokens, inverse_temperature: f32) -> LegalSoftmax {
        let mut lanes = [f32::NEG_INFINITY; CHUNK];
        for_chunks(
            legal,
            logits,
            #[inline(always)]
            |chunk, _| {
                for (lane, logit) in lanes.iter_mut().zip(chunk) {
                    *lane = lane.max(logit * inverse_temperature);
                }
            },
        );
        let max = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
        let mut softmax = LegalSoftmax { max, sum: 0.0, inverse_temperature };
        let mut sum = 0.0;
        for_chunks(
            legal,
            logits,
            #[inline(always)]
            |chunk, len| {
                for weight in &softmax.weights(chunk)[..len] {
                    sum += weight;
                }
            },
        );
        softmax.sum = sum;
        softmax
    }

    #[inline(always)]
    fn shifted(&self, logit: f32) -> f32 {
        logit * self.inverse_temperature - self.max
    }

    #[inline(always)]
    fn weight(&self, logit: f32) -> f32 {
        exp(self.shifted(logit))
    }

    #[inline(always)]
    fn weights(&self, logits: &[f32; CHUNK]) -> [f32; CHUNK] {
        let mut weights = *logits;
        for weight in &mut weights {
            *weight = self.weight(*weight);
        }
        weights
    }

    #[inline(always)]
    fn logprob(&self, logit: f32) -> f32 {
        logit * self.inverse_temperature - self.max - libm::logf(self.sum)
    }

    /// log(sum) - E[logit - max].
    #[inline(always)]
    fn entropy(&self, logits: &[f32], legal: &LegalTokens) -> f32 {
        let mut sum = 0.0;
        for_chunks(
            legal,
            logits,
            #[inline(always)]
            |chunk, len| {
                let mut terms = self.weights(chunk);
                for (term, logit) in terms.iter_mut().zip(chunk) {
                    *term *= self.shifted(*logit);
                }
                for term in &terms[..len] {
                    sum += term;
                }
            },
        );
        libm::logf(self.sum) - sum / self.sum
    }
}

/// Computes the log-probability of a token among the legal ones. Actor and learner both use this function.
///
/// - `logits`: `[V]`; `target`: a legal token.
///
/// ```
/// let legal = [1, 3].into_iter().collect();
/// let logprob = policy::masked_logprob(&[9.0, 0.0, 9.0, 0.0], &legal, 3);
/// assert!((logprob - 0.5f32.ln()).abs() < 1e-6);
/// ```
pub fn masked_logprob(logits: &[f32], legal: &LegalTokens, target: TokenId) -> f32 {
    vectorized!({ LegalSoftmax::new(logits, legal, 1.0).logprob(logits[target as usize]) })
}

/// Adds `scale` times the gradient of [`masked_logprob`] to `grad_logits`.
pub(crate) fn masked_logprob_backward(
    logits: &[f32],
    legal: &LegalTokens,
    target: TokenId,
    scale: f32,
    grad_logits: &mut [f32],
) {
    vectorized!({
        let softmax = LegalSoftmax::new(logits, legal, 1.0);
        change_legal(
            legal,
            logits,
            grad_logits,
            #[inline(always)]
            |grad, logit| *grad -= scale * (softmax.weight(logit) / softmax.sum),
        );
        grad_logits[target as usize] += scale;
    });
}

/// Computes the entropy over the legal tokens, in nats.
pub(crate) fn masked_entropy(logits: &[f32], legal: &LegalTokens) -> f32 {
    vectorized!({ LegalSoftmax::new(logits, legal, 1.0).entropy(logits, legal) })
}

/// Adds `scale` times the gradient of [`masked_entropy`] to `grad_logits`.
pub(crate) fn masked_entropy_backward(logits: &[f32], legal: &LegalTokens, scale: f32, grad_logits: &mut [f32]) {
    vectorized!({
        let softmax = LegalSoftmax::new(logits, legal, 1.0);
        let (entropy, log_sum) = (softmax.entropy(logits, legal), libm::logf(softmax.sum));
        change_legal(
            legal,
            logits,
            grad_logits,
            #[inline(always)]
            |grad, logit| {
                let logprob = logit - softmax.max - log_sum;
                *grad -= scale * (softmax.weight(logit) / softmax.sum) * (logprob + entropy);
            },
        );
    });
}

/// Draws a legal token and returns its log-probability.
///
/// - `logits`: `[V]`.
/// - `temperature`: divides the logits; 0 takes the most probable token (the lowest id among equals) and returns its
///   log-probability at temperature 1.
///
/// # Panics
/// When no token is legal.
pub fn sample(logits: &[f32], legal: &LegalTokens, temperature: f32, rng: &mut CounterRng) -> (TokenId, f32) {
    let is_none_legal = matches!(legal, LegalTokens::Only(set) if set.is_empty());
    assert!(!is_none_legal, "sample: expected a legal token, got none");
    if temperature == 0.0 {
        let better = |best: TokenId, token: TokenId| {
            if logits[token as usize] > logits[best as usize] { token } else { best }
        };
        let best = match legal {
            LegalTokens::Any => (0..logits.len() as TokenId).reduce(better),
            LegalTokens::Only(set) => set.iter().reduce(better),
        };
        let best = best.expect("a token is legal");
        return (best, masked_logprob(logits, legal, best));
    }
    let threshold = rng.unit_f64();
    vectorized!({
        let softmax = LegalSoftmax::new(logits, legal, 1.0 / temperature);
        let threshold = threshold * f64::from(softmax.sum);
        let (mut cumulative, mut place) = (0.0, 0);
        for_chunks(
            legal,
            logits,
            #[inline(always)]
            |chunk, len| {
                if cumulative > threshold {
                    return;
                }
                for weight in &softmax.weights(chunk)[..len] {
                    cumulative += f64::from(*weight);
                    place += 1;
                    if cumulative > threshold {
                        break;
                    }
                }
            },
        );
        // If rounding keeps the sum below the threshold, the last one.
        let drawn = match legal {
            LegalTokens::Any => place as TokenId - 1,
            LegalTokens::Only(set) => set.iter().nth(place - 1).expect("as many tokens as places"),
        };
        (drawn, softmax.logprob(logits[drawn as usize]))
    })
}

#[cfg(test)]
mod tests {
    use proto::Purpose;

    use super::*;

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.0, 1.0, 50.0, 2.0];
        let mask: LegalTokens = [0, 1, 3].into_iter().collect();
        let mut counts = [0u32; 4];
        let mut rng = CounterRng::new(0, Purpose::Rollout, 0, 0, 0);
        for _ in 0..30_000 {
            let (token, logprob) = sample(&logits, &mask, 1.0, &mut rng);
            assert_eq!(logprob, masked_logprob(&logits, &mask, token));
            counts[token as usize] += 1;
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
        let mask: LegalTokens = [0, 2, 3].into_iter().collect();
        type Value = fn(&[f32], &LegalTokens) -> f32;
        type Backward = fn(&[f32], &LegalTokens, &mut [f32]);
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
    fn any_token_is_every_token() {
        let logits = [0.3f32, -1.0, 0.7, 2.0];
        let all: LegalTokens = (0..4).collect();
        let draw = |legal: &LegalTokens, temperature| {
            let mut rng = CounterRng::new(0, Purpose::Rollout, 0, 0, 0);
            [(); 20].map(|()| sample(&logits, legal, temperature, &mut rng))
        };
        for temperature in [0.0, 0.5, 1.0] {
            assert_eq!(draw(&LegalTokens::Any, temperature), draw(&all, temperature));
        }
        assert_eq!(masked_entropy(&logits, &LegalTokens::Any), masked_entropy(&logits, &all));
        let backward = |legal: &LegalTokens| {
            let mut gradient = [0.0; 4];
            masked_logprob_backward(&logits, legal, 2, 1.5, &mut gradient);
            masked_entropy_backward(&logits, legal, 0.5, &mut gradient);
            gradient
        };
        assert_eq!(backward(&LegalTokens::Any), backward(&all));
    }

    #[test]
    fn entropy_counts_legal_tokens_only() {
        let mask: LegalTokens = [0, 1, 3].into_iter().collect();
        // scipy.stats.entropy(scipy.special.softmax([0, 1, 2]))
        let entropy = masked_entropy(&[0.0, 1.0, 50.0, 2.0], &mask);
        assert!((entropy - 0.832_396).abs() < 1e-5, "{entropy}");
    }
}
