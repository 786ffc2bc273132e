use crate::model::Sequence;

/// What a sequence is trained for; the loss is a sum over chosen tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Objective {
    /// `-weight * logprob` a token.
    CrossEntropy {
        /// How much each token counts.
        weight: f32,
    },
    /// The clipped surrogate of a rollout that was rewarded.
    PolicyGradient(PolicyGradient),
}

/// `-weight * (w min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + entropy_bonus * H)` a token, where `A` is the
/// advantage and `H` the entropy over the legal tokens. Where `A` is negative, `min(...)` is no lower than
/// `MAX_BAD_RATIO A`.
///
/// `ratio` is the current probability over that of the proximal policy, from which a step may not lead far; `w`, a constant
/// to the gradient, is `min(proximal / behaviour, MAX_PROXIMAL_WEIGHT)`: what was drawn by older weights counts as often as
/// the proximal policy would have drawn it. Where the proximal policy is the behaviour policy, `w` is 1.
///
/// The proximal policy's log-probability is not computed but lies on the line between the other two, at `proximal` of the
/// way from the behaviour policy to the current one.
///
/// Source: Schulman et al. 2017 (PPO), eq. 7, with the two clips of Yu et al. 2025 (DAPO), section 3.1, the decoupling of
/// Hilton et al. 2022 (arXiv 2110.00641) as in Fu et al. 2025 (AReaL, arXiv 2505.24298), and AReaL's approximation by versions.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyGradient {
    /// In which role the policy played the rollout: its loss is added up apart.
    pub role: Role,
    /// Advantage of the rollout, for each of its tokens.
    pub advantage: f32,
    /// Log-probability of each chosen token when it was drawn.
    pub behavior_logprobs: Vec<f32>,
    /// Where the proximal policy is for each chosen token: 0 is the behaviour policy, 1 the current one.
    pub proximal: Vec<f32>,
    /// How far below 1 the importance ratio has an effect; in (0, 1].
    pub clip_low: f32,
    /// How far above 1 the importance ratio has an effect; over 0.
    pub clip_high: f32,
    /// How much a nat of entropy counts beside the surrogate; 0 or more.
    pub entropy_bonus: f32,
    /// How much each token counts.
    pub weight: f32,
}

/// What the policy was asked for when it played a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// An answer to a problem.
    Solver,
    /// A problem.
    Proposer,
}

/// Most that a token counts whose behaviour policy is not the proximal one.
///
/// Source: the default of truncated importance sampling in verl and SkyRL.
pub(crate) const MAX_PROXIMAL_WEIGHT: f32 = 2.0;

/// Ratio beyond which a bad answer's token moves nothing, whatever its actor says of the policy that drew it: else it could
/// outweigh all others.
///
/// Source: the second clip of Ye et al. 2020 (dual-clip PPO), at 3 there; ours is for what is forged.
const MAX_BAD_RATIO: f32 = 10.0;

/// Furthest that two log-probabilities of a token are taken to be apart: whatever an actor says, the loss stays finite.
///
/// Source: the bound of verl's sequence weights, exp(+-20).
pub(crate) const MAX_LOG_RATIO: f32 = 20.0;

/// What sequences cost under their objectives; sums over their chosen tokens, in order.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Loss of the tokens under cross-entropy.
    pub cross_entropy: f64,
    /// Of the solver's tokens under the policy gradient.
    pub solver: SurrogateLoss,
    /// Of the proposer's.
    pub proposer: SurrogateLoss,
}

/// What the tokens of a role cost under the policy gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SurrogateLoss {
    /// Their loss.
    pub loss: f64,
    /// Their number.
    pub num_tokens: u64,
    /// Of these, those whose surrogate was clipped: only the entropy bonus moves them.
    pub num_clipped: u64,
    /// And those that count less than the proximal policy would have it.
    pub num_truncated: u64,
    /// Sum of their importance ratios.
    pub sum_importance_ratio: f64,
    /// Sum of their entropies in nats.
    pub sum_entropy: f64,
}

/// Derivatives of the loss of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Slopes {
    /// By its log-probability.
    pub(crate) logprob: f32,
    /// By the entropy over the legal tokens, where the objective knows it.
    pub(crate) entropy: Option<f32>,
}

/// The clipped surrogate of a token, and its derivative by the log-probability.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Surrogate {
    value: f32,
    slope: f32,
    /// Of the current policy to the behaviour policy.
    importance_ratio: f32,
    is_clipped: bool,
    is_truncated: bool,
}

impl Objective {
    /// Computes the derivatives of the loss of the token that was chosen as number `index`.
    pub(crate) fn slopes(&self, index: usize, logprob: f32) -> Slopes {
        match self {
            Objective::CrossEntropy { weight } => Slopes { logprob: -weight, entropy: None },
            Objective::PolicyGradient(objective) => Slopes {
                logprob: -objective.weight * objective.surrogate(index, logprob).slope,
                entropy: Some(-objective.weight * objective.entropy_bonus),
            },
        }
    }
}

impl PolicyGradient {
    /// The least that a token is rewarded: for a bad answer the clipped ratio has no upper bound of its own.
    pub(crate) fn lowest(&self) -> f32 {
        if self.advantage < 0.0 { MAX_BAD_RATIO * self.advantage } else { f32::MIN }
    }

    fn surrogate(&self, index: usize, logprob: f32) -> Surrogate {
        let log_ratio = (logprob - self.behavior_logprobs[index]).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO);
        let proximal = self.proximal[index];
        let ratio = libm::expf((1.0 - proximal) * log_ratio);
        let proximal_weight = libm::expf(proximal * log_ratio);
        let weight = proximal_weight.min(MAX_PROXIMAL_WEIGHT);
        let free = ratio * self.advantage;
        let clipped = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high) * self.advantage;
        let lowest = self.lowest();
        let is_clipped = clipped < free || free < lowest;
        // The derivative of exp is exp; a clipped ratio is a constant, and so is the proximal policy.
        let slope = if is_clipped { 0.0 } else { weight * free };
        Surrogate {
            value: weight * free.min(clipped).max(lowest),
            slope,
            importance_ratio: libm::expf(log_ratio),
            is_clipped,
            is_truncated: weight < proximal_weight,
        }
    }
}

impl Loss {
    /// Sums up what sequences cost.
    ///
    /// - `logprobs`, `entropies`: of every chosen token, sequence after sequence; entropies are read where an objective
    ///   asks for them.
    pub(crate) fn new(sequences: &[&Sequence], objectives: &[Objective], logprobs: &[f32], entropies: &[f32]) -> Loss {
        let mut loss = Loss::default();
        let mut tokens = logprobs.iter().zip(entropies);
        for (sequence, objective) in sequences.iter().zip(objectives) {
            for (index, (logprob, entropy)) in tokens.by_ref().take(sequence.chosen.len()).enumerate() {
                loss.add_token(objective, index, *logprob, *entropy);
            }
        }
        loss
    }

    /// Returns what is minimised.
    pub fn total(&self) -> f64 {
        self.cross_entropy + self.solver.loss + self.proposer.loss
    }

    /// Adds what other sequences cost.
    pub fn add(&mut self, other: &Loss) {
        self.cross_entropy += other.cross_entropy;
        self.solver.add(&other.solver);
        self.proposer.add(&other.proposer);
    }

    fn add_token(&mut self, objective: &Objective, index: usize, logprob: f32, entropy: f32) {
        match objective {
            Objective::CrossEntropy { weight } => self.cross_entropy -= f64::from(logprob) * f64::from(*weight),
            Objective::PolicyGradient(objective) => {
                let of_role = match objective.role {
                    Role::Solver => &mut self.solver,
                    Role::Proposer => &mut self.proposer,
                };
                of_role.add_token(objective, index, logprob, entropy);
            }
        }
    }
}

impl SurrogateLoss {
    fn add(&mut self, other: &SurrogateLoss) {
        self.loss += other.loss;
        self.num_tokens += other.num_tokens;
        self.num_clipped += other.num_clipped;
        self.num_truncated += other.num_truncated;
        self.sum_importance_ratio += other.sum_importance_ratio;
        self.sum_entropy += other.sum_entropy;
    }

    fn add_token(&mut self, objective: &PolicyGradient, index: usize, logprob: f32, entropy: f32) {
        let surrogate = objective.surrogate(index, logprob);
        let bonus = f64::from(objective.entropy_bonus) * f64::from(entropy);
        self.loss -= f64::from(objective.weight) * (f64::from(surrogate.value) + bonus);
        self.num_tokens += 1;
        self.num_clipped += u64::from(surrogate.is_clipped);
        self.num_truncated += u64::from(surrogate.is_truncated);
        self.sum_importance_ratio += f64::from(surrogate.importance_ratio);
        self.sum_entropy += f64::from(entropy);
    }
}

#[cfg(test)]
mod tests {
    use proto::LegalTokens;

    use super::*;

    fn objective(advantage: f32) -> PolicyGradient {
        PolicyGradient {
            role: Role::Solver,
            advantage,
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
            let surrogate = objective(advantage).surrogate(0, f32::ln(probability));
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
                PolicyGradient { proximal: vec![2.0 / 3.0], ..objective(advantage) }.surrogate(0, f32::ln(probability));
            let case = format!("advantage {advantage}, probability {probability}: {surrogate:?}");
            assert!((surrogate.value - value).abs() < 1e-5, "{case}");
            assert!((surrogate.slope - slope).abs() < 1e-5, "{case}");
            assert!((surrogate.importance_ratio - 4.0 * probability).abs() < 1e-5, "{case}");
            assert_eq!((surrogate.is_clipped, surrogate.is_truncated), (slope == 0.0, is_truncated), "{case}");
        }
    }

    /// What no actor of ours says, and what may be said all the same.
    #[test]
    fn stays_finite_whatever_the_behaviour_policy_is_said_to_be() {
        for (advantage, proximal) in [(2.0, 0.0), (-2.0, 0.0), (-2.0, 2.0 / 3.0)] {
            let behavior_logprobs = vec![f32::MIN];
            let surrogate = PolicyGradient { behavior_logprobs, proximal: vec![proximal], ..objective(advantage) };
            let Surrogate { value, slope, importance_ratio, .. } = surrogate.surrogate(0, -1.0);
            let all = [value, slope, importance_ratio];
            assert!(all.iter().all(|figure| figure.is_finite()) && importance_ratio > 1e8, "{all:?}");
            // For a good answer the upper clip is there anyway.
            assert!(slope == 0.0 && value.abs() <= 2.0 * 10.0 * 2.0, "{all:?}");
        }
        // By hand: a ratio of 9.9 counts, one of 10.1 does not.
        for (ratio, value, slope) in [(9.9f32, -19.8, -19.8), (10.1, -20.0, 0.0)] {
            let surrogate = objective(-2.0).surrogate(0, 0.25f32.ln() + ratio.ln());
            assert!((surrogate.value - value).abs() < 1e-4 && (surrogate.slope - slope).abs() < 1e-4, "{surrogate:?}");
            assert_eq!(surrogate.is_clipped, slope == 0.0);
        }
    }

    #[test]
    fn sums_what_each_objective_counts_and_each_role_apart() {
        let mask: LegalTokens = [1, 2].into_iter().collect();
        let one = Sequence::new(&[0], &[1], [(0, mask.clone())].into_iter());
        let two = Sequence::new(&[0], &[1, 2], [(0, mask.clone()), (1, mask)].into_iter());
        let proposed = PolicyGradient { role: Role::Proposer, weight: 1.0, entropy_bonus: 0.0, ..objective(-1.0) };
        let objectives = [
            Objective::CrossEntropy { weight: 0.5 },
            Objective::PolicyGradient(objective(2.0)),
            Objective::PolicyGradient(proposed),
        ];
        let logprobs = [-1.0, -2.0, 0.5f32.ln(), 0.25f32.ln()];
        let loss = Loss::new(&[&two, &one, &one], &objectives, &logprobs, &[0.0, 0.0, 0.75, 0.5]);
        assert_eq!(loss.cross_entropy, 1.5);
        // -0.1 (2 * 1.28 + 0.5 * 0.75)
        assert!((loss.solver.loss + 0.2935).abs() < 1e-6, "{loss:?}");
        assert_eq!((loss.solver.num_tokens, loss.solver.num_clipped, loss.solver.sum_entropy), (1, 1, 0.75));
        assert!((loss.solver.sum_importance_ratio - 2.0).abs() < 1e-6, "{loss:?}");
        let proposer = SurrogateLoss {
            loss: 1.0,
            num_tokens: 1,
            num_clipped: 0,
            num_truncated: 0,
            sum_importance_ratio: 1.0,
            sum_entropy: 0.5,
        };
        assert_eq!(loss.proposer, proposer);
        assert!((loss.total() - (1.5 - 0.2935 + 1.0)).abs() < 1e-6, "{loss:?}");
        let mut twice = loss;
        twice.add(&loss);
        assert_eq!((twice.solver.loss, twice.proposer.loss), (2.0 * loss.solver.loss, 2.0));
        assert_eq!((twice.cross_entropy, twice.solver.num_tokens, twice.proposer.num_tokens), (3.0, 2, 2));
    }
}
