//! Rollouts with their losses, as one optimizer update trains on them.

use policy::{
    ClippedSurrogate, Loss, LossBatch, LossGrad, ReferenceKl, Scores, Sequence, SequenceSurrogate, SurrogateStats,
};
use proto::{Rollout, ScoredGroup};

use crate::config::KlForm;

/// The rollouts of one update, each with its loss.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Minibatch {
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) losses: Vec<RolloutLoss>,
}

/// An update without rollouts.
pub(crate) static NO_ROLLOUTS: Minibatch = Minibatch { sequences: Vec::new(), losses: Vec::new() };

/// The loss of a rollout.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RolloutLoss {
    pub(crate) surrogate: Surrogate,
    /// Added to the surrogate.
    pub(crate) kl: Option<ReferenceKl>,
}

/// What raises the probability of good answers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Surrogate {
    /// Every token has an importance ratio and an advantage.
    OfTokens(ClippedSurrogate),
    /// The rollout has an importance ratio and an advantage.
    OfSequence(SequenceSurrogate),
}

/// Sum of the estimator k1 of the divergence from a reference, over the tokens of rollouts under the policy that drew them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct KlSum {
    sum: f64,
    num_tokens: u64,
}

/// Largest log ratio that counts, so that the loss stays finite whatever log-probability an actor reports.
const MAX_LOG_RATIO: f32 = 20.0;

/// Returns the sequence of a rollout as it was played.
pub(crate) fn played_sequence(scored: &ScoredGroup, rollout: &Rollout) -> Sequence {
    let choices = rollout.choices.iter().map(|(position, legal)| (position, legal.tokens(&scored.group.sets)));
    Sequence::new(&scored.prompt, &rollout.tokens, choices)
}

impl Minibatch {
    pub(crate) fn add_to<'a>(&'a self, batch: &mut LossBatch<'a>) {
        self.sequences.iter().zip(&self.losses).for_each(|(sequence, loss)| batch.push([sequence], loss));
    }

    /// Sums the statistics of the surrogates. Takes the scores of the minibatch's sequences from the iterator.
    pub(crate) fn stats<'a>(&self, scores: &mut impl Iterator<Item = Scores<'a>>) -> SurrogateStats {
        let mut sum = SurrogateStats::default();
        self.losses.iter().zip(scores).for_each(|(loss, scores)| sum.add(&loss.surrogate.stats(scores)));
        sum
    }

    /// Adds a penalty on the distance to a reference, given the reference's log-probabilities of all chosen tokens. Returns the sum
    /// of the distances.
    pub(crate) fn penalise(&mut self, form: KlForm, weight: f64, mut reference_logprobs: &[f32]) -> KlSum {
        let mut kl = KlSum::default();
        for loss in &mut self.losses {
            let num_tokens = loss.surrogate.behavior_logprobs().len();
            let of_rollout =
                reference_logprobs.split_off(..num_tokens).expect("a log-probability for each chosen token");
            let k1 = loss.surrogate.k1(of_rollout);
            kl.sum += k1.iter().map(|k1| f64::from(*k1)).sum::<f64>();
            kl.num_tokens += num_tokens as u64;
            match (form, &mut loss.surrogate) {
                (KlForm::Loss, surrogate) => {
                    let weight = (f64::from(surrogate.token_weight()) * weight) as f32;
                    loss.kl = Some(ReferenceKl { reference_logprobs: of_rollout.to_vec(), weight });
                }
                (KlForm::Advantage, Surrogate::OfTokens(surrogate)) => {
                    let advantages = surrogate.advantages.iter_mut().zip(k1);
                    advantages.for_each(|(advantage, k1)| *advantage -= weight as f32 * k1);
                }
                (KlForm::Advantage, Surrogate::OfSequence(_)) => unreachable!("refused in the config"),
            }
        }
        kl
    }
}

impl From<ClippedSurrogate> for RolloutLoss {
    fn from(surrogate: ClippedSurrogate) -> RolloutLoss {
        RolloutLoss { surrogate: Surrogate::OfTokens(surrogate), kl: None }
    }
}

impl From<SequenceSurrogate> for RolloutLoss {
    fn from(surrogate: SequenceSurrogate) -> RolloutLoss {
        RolloutLoss { surrogate: Surrogate::OfSequence(surrogate), kl: None }
    }
}

impl Loss for RolloutLoss {
    fn reads_entropies(&self) -> bool {
        self.surrogate.loss().reads_entropies()
    }

    fn value(&self, sequences: &[Scores<'_>]) -> f64 {
        self.surrogate.loss().value(sequences) + self.kl.as_ref().map_or(0.0, |kl| kl.value(sequences))
    }

    fn grad(&self, sequences: &[Scores<'_>]) -> Vec<LossGrad> {
        let mut grads = self.surrogate.loss().grad(sequences);
        if let Some(kl) = &self.kl {
            grads.iter_mut().zip(kl.grad(sequences)).for_each(|(grad, of_kl)| grad.logprob += of_kl.logprob);
        }
        grads
    }
}

impl Surrogate {
    fn loss(&self) -> &dyn Loss {
        match self {
            Surrogate::OfTokens(loss) => loss,
            Surrogate::OfSequence(loss) => loss,
        }
    }

    fn stats(&self, scores: Scores<'_>) -> SurrogateStats {
        match self {
            Surrogate::OfTokens(loss) => loss.stats(scores),
            Surrogate::OfSequence(loss) => loss.stats(scores),
        }
    }

    fn behavior_logprobs(&self) -> &[f32] {
        match self {
            Surrogate::OfTokens(loss) => &loss.behavior_logprobs,
            Surrogate::OfSequence(loss) => &loss.behavior_logprobs,
        }
    }

    /// Returns the weight of a token's loss.
    fn token_weight(&self) -> f32 {
        match self {
            Surrogate::OfTokens(loss) => loss.weight,
            Surrogate::OfSequence(loss) => loss.weight / loss.behavior_logprobs.len().max(1) as f32,
        }
    }

    /// Returns, for each token, the log of the ratio of the policy that drew it to the reference.
    fn k1(&self, reference_logprobs: &[f32]) -> Vec<f32> {
        let pairs = self.behavior_logprobs().iter().zip(reference_logprobs);
        pairs.map(|(behavior, reference)| (behavior - reference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).collect()
    }
}

impl KlSum {
    pub(crate) fn add(&mut self, other: KlSum) {
        self.sum += other.sum;
        self.num_tokens += other.num_tokens;
    }

    /// Returns the mean over tokens, in nats; `None` if there are none.
    pub(crate) fn mean(self) -> Option<f64> {
        (self.num_tokens > 0).then(|| self.sum / self.num_tokens as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_tokens(advantage: f32, behavior_logprobs: &[f32]) -> RolloutLoss {
        let num_tokens = behavior_logprobs.len();
        RolloutLoss::from(ClippedSurrogate {
            advantages: vec![advantage; num_tokens],
            behavior_logprobs: behavior_logprobs.to_vec(),
            proximal: vec![0.0; num_tokens],
            clip_low: 0.2,
            clip_high: 0.28,
            entropy_bonus: 0.0,
            weight: 0.5,
        })
    }

    fn minibatch() -> Minibatch {
        let losses = vec![of_tokens(1.0, &[-1.0, -0.5]), of_tokens(-2.0, &[-2.0])];
        Minibatch { sequences: Vec::new(), losses }
    }

    /// Distances of -1/2, 1 and 1/4 at weight 0.4.
    const REFERENCE: [f32; 3] = [-0.5, -1.5, -2.25];

    #[test]
    fn a_penalty_is_taken_off_the_advantage_of_each_token() {
        let mut minibatch = minibatch();
        let kl = minibatch.penalise(KlForm::Advantage, 0.4, &REFERENCE);
        assert_eq!(kl.mean(), Some(0.25));
        let advantages = minibatch.losses.iter().map(|loss| match &loss.surrogate {
            Surrogate::OfTokens(surrogate) => surrogate.advantages.clone(),
            Surrogate::OfSequence(_) => panic!("{loss:?}"),
        });
        let expected = [vec![1.0 + 0.4 * 0.5, 1.0 - 0.4], vec![-2.0 - 0.4 * 0.25]];
        assert_eq!(advantages.collect::<Vec<_>>(), expected);
        assert!(minibatch.losses.iter().all(|loss| loss.kl.is_none()));
        // An actor that reports nonsense.
        let mut forged = Minibatch { sequences: Vec::new(), losses: vec![of_tokens(1.0, &[f32::MIN])] };
        assert_eq!(forged.penalise(KlForm::Advantage, 0.4, &[-1.0]).mean(), Some(-20.0));
        let grads = forged.losses[0].grad(&[Scores { logprobs: &[-1.0], entropies: &[0.0] }]);
        assert!(grads[0].logprob.is_finite(), "{grads:?}");
    }

    /// By hand, at the behaviour policy: the ratio is 1, k2 is 1/8, 1/2 and 1/32, and each token weighs 0.5 x 0.4.
    #[test]
    fn a_penalty_is_added_to_the_loss_of_each_token() {
        let mut minibatch = minibatch();
        minibatch.penalise(KlForm::Loss, 0.4, &REFERENCE);
        let scores = Scores { logprobs: &[-1.0, -0.5], entropies: &[0.0; 2] };
        let value = minibatch.losses[0].value(&[scores]);
        assert!((value - (0.5 * -2.0 + 0.2 * 0.625)).abs() < 1e-6, "{value}");
        let slopes: Vec<f32> = minibatch.losses[0].grad(&[scores]).iter().map(|grad| grad.logprob).collect();
        for (got, expected) in slopes.iter().zip([-0.5 + 0.2 * -0.5, -0.5 + 0.2]) {
            assert!((got - expected).abs() < 1e-6, "{slopes:?}");
        }
        let stats = minibatch.stats(&mut [scores].into_iter());
        assert!((stats.loss + 1.0).abs() < 1e-6, "statistics are those of the surrogate: {stats:?}");
        let second = Scores { logprobs: &[-2.0], entropies: &[0.0] };
        let value = minibatch.losses[1].value(&[second]);
        assert!((value - (0.5 * 2.0 + 0.2 / 32.0)).abs() < 1e-6, "{value}");
    }

    /// A rollout of weight 1/2 and two tokens: 1/4 for each.
    #[test]
    fn the_penalty_of_a_sequence_is_the_mean_over_its_tokens() {
        let surrogate = SequenceSurrogate {
            advantage: 1.0,
            behavior_logprobs: vec![-1.0, -0.5],
            proximal: vec![0.0; 2],
            clip_low: 0.2,
            clip_high: 0.28,
            entropy_bonus: 0.0,
            weight: 0.5,
        };
        let mut minibatch = Minibatch { sequences: Vec::new(), losses: vec![surrogate.into()] };
        minibatch.penalise(KlForm::Loss, 0.4, &REFERENCE[..2]);
        assert_eq!(minibatch.losses[0].kl.as_ref().unwrap().weight, 0.1);
    }
}
