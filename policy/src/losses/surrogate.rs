//! The clipped surrogate of PPO, which losses of tokens and of sequences share.

/// Upper bound of `w`, the weight of a token whose behaviour policy is not the proximal one.
///
/// Source: the default of truncated importance sampling in verl and SkyRL.
const MAX_PROXIMAL_WEIGHT: f32 = 2.0;

/// Ratio beyond which a token of a bad answer has no gradient, whatever log-probability its actor reports: otherwise the token
/// could outweigh all others.
///
/// Source: the second clip of Ye et al. 2020 (dual-clip PPO), at 3 there; ours guards against forged log-probabilities.
const DUAL_CLIP: f32 = 10.0;

/// Largest difference of two log-probabilities of a token; larger ones are clamped, so that the loss stays finite whatever an
/// actor reports.
///
/// Source: the bound of verl's sequence weights, exp(+-20).
const MAX_LOG_RATIO: f32 = 20.0;

/// Statistics of a loss: sums over the chosen tokens of any number of sequences, in order.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SurrogateStats {
    /// Their loss.
    pub loss: f64,
    /// Their number.
    pub num_tokens: u64,
    /// Of these, the number whose surrogate was clipped: they have a gradient only from the entropy bonus.
    pub num_clipped: u64,
    /// Of these, the number whose weight `w` was truncated.
    pub num_truncated: u64,
    /// Sum of their importance ratios.
    pub sum_importance_ratio: f64,
    /// Sum of their entropies in nats.
    pub sum_entropy: f64,
}

/// The clipped surrogate of a token or a sequence, and its derivative with respect to the log of the ratio.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Surrogate {
    pub(super) value: f32,
    pub(super) slope: f32,
    /// Of the current policy to the behaviour policy.
    pub(super) importance_ratio: f32,
    pub(super) is_clipped: bool,
    pub(super) is_truncated: bool,
}

/// Logs of the ratios of policies: of the current one to the behaviour policy, of the current one to the proximal one, and of the
/// proximal one to the behaviour policy. The first is the sum of the others.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogRatios {
    pub(super) importance: f32,
    pub(super) to_proximal: f32,
    pub(super) of_proximal: f32,
}

/// How far a ratio has an effect: below 1, and above 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clips {
    pub(super) low: f32,
    pub(super) high: f32,
}

impl LogRatios {
    /// Returns the ratios of a token; `proximal` is the position of the proximal policy: 0 is the behaviour policy, 1 the current.
    pub(super) fn of_token(logprob: f32, behavior_logprob: f32, proximal: f32) -> LogRatios {
        let importance = (logprob - behavior_logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
        LogRatios { importance, to_proximal: (1.0 - proximal) * importance, of_proximal: proximal * importance }
    }
}

impl Surrogate {
    pub(super) fn new(advantage: f32, ratios: LogRatios, clips: Clips) -> Surrogate {
        let ratio = libm::expf(ratios.to_proximal);
        let proximal_weight = libm::expf(ratios.of_proximal);
        let weight = proximal_weight.min(MAX_PROXIMAL_WEIGHT);
        let unclipped = ratio * advantage;
        let clipped = ratio.clamp(1.0 - clips.low, 1.0 + clips.high) * advantage;
        // For a bad answer the clipped ratio has no upper bound of its own.
        let lowest = if advantage < 0.0 { DUAL_CLIP * advantage } else { f32::MIN };
        let is_clipped = clipped < unclipped || unclipped < lowest;
        // The derivative of exp is exp; a clipped ratio is a constant, and so is the proximal policy.
        let slope = if is_clipped { 0.0 } else { weight * unclipped };
        Surrogate {
            value: weight * unclipped.min(clipped).max(lowest),
            slope,
            importance_ratio: libm::expf(ratios.importance),
            is_clipped,
            is_truncated: weight < proximal_weight,
        }
    }
}

impl SurrogateStats {
    /// Adds the sums over other sequences.
    pub fn add(&mut self, other: &SurrogateStats) {
        self.loss += other.loss;
        self.num_tokens += other.num_tokens;
        self.num_clipped += other.num_clipped;
        self.num_truncated += other.num_truncated;
        self.sum_importance_ratio += other.sum_importance_ratio;
        self.sum_entropy += other.sum_entropy;
    }
}
