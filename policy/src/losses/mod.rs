//! Losses: functions of the log-probabilities and entropies of chosen tokens. One file per loss.

mod clipped_surrogate;
mod cross_entropy;
mod dpo;
mod reference_kl;
mod sequence_surrogate;
mod surrogate;

use crate::Sequence;

pub use clipped_surrogate::ClippedSurrogate;
pub use cross_entropy::CrossEntropy;
pub use dpo::Dpo;
pub use reference_kl::ReferenceKl;
pub use sequence_surrogate::SequenceSurrogate;
pub use surrogate::SurrogateStats;

/// The loss of a group of sequences: one sequence, or several that are compared.
pub trait Loss: Sync {
    /// Whether the loss depends on entropies. They are read only then, and read as 0 otherwise.
    fn reads_entropies(&self) -> bool {
        false
    }

    /// Computes the loss.
    fn value(&self, sequences: &[Scores<'_>]) -> f64;

    /// Computes its derivatives, one for each chosen token, sequence after sequence.
    fn grad(&self, sequences: &[Scores<'_>]) -> Vec<LossGrad>;
}

/// The network's scores of the chosen tokens of a sequence, in order.
#[derive(Clone, Copy, Debug)]
pub struct Scores<'a> {
    /// Log-probability of each among the legal tokens.
    pub logprobs: &'a [f32],
    /// Entropy over the legal tokens, in nats.
    pub entropies: &'a [f32],
}

/// Returns the only sequence of a loss whose figures belong to one rollout.
fn one<'a>(sequences: &[Scores<'a>]) -> Scores<'a> {
    assert_eq!(sequences.len(), 1, "the loss is of one sequence");
    sequences[0]
}

/// Derivatives of a loss with respect to the scores of a chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossGrad {
    /// With respect to its log-probability.
    pub logprob: f32,
    /// With respect to the entropy over the legal tokens.
    pub entropy: f32,
}

/// The sequences of one update, in groups that each have a loss. The loss of the batch is the sum over its groups.
#[derive(Clone, Default)]
pub struct LossBatch<'a> {
    sequences: Vec<&'a Sequence>,
    groups: Vec<LossGroup<'a>>,
}

/// Consecutive sequences of the batch that share a loss.
#[derive(Clone, Copy)]
struct LossGroup<'a> {
    num_sequences: usize,
    loss: &'a dyn Loss,
}

/// Consecutive groups of a batch.
#[derive(Clone, Copy)]
pub(crate) struct LossPart<'a> {
    pub(crate) sequences: &'a [&'a Sequence],
    groups: &'a [LossGroup<'a>],
}

/// The network's scores of all chosen tokens of a batch, sequence after sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchScores {
    /// Log-probability of each among the legal tokens.
    pub logprobs: Vec<f32>,
    /// Entropy over the legal tokens, in nats; 0 if no loss reads it.
    pub entropies: Vec<f32>,
}

impl BatchScores {
    /// Splits the scores by the sequences of the batch, in order.
    pub fn by_sequence(&self, sequences: &[&Sequence]) -> Vec<Scores<'_>> {
        let mut first = 0;
        let scores = |sequence: &&Sequence| {
            let of_sequence = first..first + sequence.chosen.len();
            first = of_sequence.end;
            Scores { logprobs: &self.logprobs[of_sequence.clone()], entropies: &self.entropies[of_sequence] }
        };
        sequences.iter().map(scores).collect()
    }
}

impl<'a> LossBatch<'a> {
    /// Adds a group of sequences with its loss.
    pub fn push(&mut self, sequences: impl IntoIterator<Item = &'a Sequence>, loss: &'a dyn Loss) {
        let before = self.sequences.len();
        self.sequences.extend(sequences);
        self.groups.push(LossGroup { num_sequences: self.sequences.len() - before, loss });
    }

    /// Whether the batch has no sequences.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Returns the sequences, group after group.
    pub fn sequences(&self) -> &[&'a Sequence] {
        &self.sequences
    }

    /// Computes the sum of the losses of all groups.
    pub fn value(&self, scores: &BatchScores) -> f64 {
        let scores = scores.by_sequence(&self.sequences);
        self.whole().by_group(&scores).map(|(loss, scores)| loss.value(scores)).sum()
    }

    /// Splits the groups into at most `num_parts` parts, each with about as many groups.
    pub(crate) fn parts(&self, num_parts: usize) -> Vec<LossPart<'_>> {
        let groups_per_part = self.groups.len().div_ceil(num_parts).max(1);
        let (mut parts, mut rest) = (Vec::new(), self.whole());
        while !rest.is_empty() {
            let mut num_groups = 0;
            let (part, later) = rest.split(|_| {
                num_groups += 1;
                num_groups <= groups_per_part
            });
            parts.push(part);
            rest = later;
        }
        parts
    }

    fn whole(&self) -> LossPart<'_> {
        LossPart { sequences: &self.sequences, groups: &self.groups }
    }
}

impl<'a> LossPart<'a> {
    /// Whether the part has no groups.
    pub(crate) fn is_empty(self) -> bool {
        self.groups.is_empty()
    }

    /// Splits off the first groups: one, and more as long as `takes` returns true for their sequences. It is asked for each group
    /// in order, the first included.
    pub(crate) fn split(self, mut takes: impl FnMut(&[&'a Sequence]) -> bool) -> (LossPart<'a>, LossPart<'a>) {
        let (mut num_groups, mut num_sequences) = (0, 0);
        for group in self.groups {
            let end = num_sequences + group.num_sequences;
            if !takes(&self.sequences[num_sequences..end]) && num_groups > 0 {
                break;
            }
            num_groups += 1;
            num_sequences = end;
        }
        let (groups, later_groups) = self.groups.split_at(num_groups);
        let (sequences, later_sequences) = self.sequences.split_at(num_sequences);
        (LossPart { sequences, groups }, LossPart { sequences: later_sequences, groups: later_groups })
    }

    /// Returns for each chosen token, in order, whether its loss reads entropies.
    pub(crate) fn reads_entropies(self) -> impl Iterator<Item = bool> {
        self.by_group(self.sequences).flat_map(|(loss, sequences)| {
            let num_chosen = sequences.iter().map(|sequence| sequence.chosen.len()).sum();
            std::iter::repeat_n(loss.reads_entropies(), num_chosen)
        })
    }

    /// Computes the derivatives of the loss with respect to the scores of each chosen token.
    pub(crate) fn grad(self, scores: &BatchScores) -> Vec<LossGrad> {
        let scores = scores.by_sequence(self.sequences);
        self.by_group(&scores).flat_map(|(loss, scores)| loss.grad(scores)).collect()
    }

    /// Pairs each group's loss with the items of its sequences.
    fn by_group<'b, T>(self, mut of_sequences: &'b [T]) -> impl Iterator<Item = (&'a dyn Loss, &'b [T])> {
        self.groups.iter().map(move |group| {
            let of_group = of_sequences.split_off(..group.num_sequences).expect("a group has its sequences");
            (group.loss, of_group)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its derivatives encode the size of a token's group, and the index of the token's sequence in it.
    struct Labels;

    impl Loss for Labels {
        fn value(&self, sequences: &[Scores<'_>]) -> f64 {
            sequences.len() as f64
        }

        fn grad(&self, sequences: &[Scores<'_>]) -> Vec<LossGrad> {
            let grad = |(index, scores): (usize, &Scores<'_>)| {
                let label = (10 * sequences.len() + index) as f32;
                scores
                    .logprobs
                    .iter()
                    .map(move |logprob| LossGrad { logprob: label, entropy: *logprob })
                    .collect::<Vec<_>>()
            };
            sequences.iter().enumerate().flat_map(grad).collect()
        }
    }

    /// Finite differences of every loss, for scores on either side of clips and references. The proximal policy is the behaviour
    /// policy: any other is a constant in the gradient alone.
    #[test]
    fn every_loss_has_the_gradient_of_its_value() {
        let (advantages, behavior_logprobs) = (vec![2.0, -3.0, 0.5], vec![-1.0, -0.5, -2.0]);
        let (clip_low, clip_high, entropy_bonus, weight) = (0.2, 0.28, 0.3, 0.7);
        let proximal = vec![0.0; 3];
        let of_tokens = ClippedSurrogate {
            advantages,
            behavior_logprobs: behavior_logprobs.clone(),
            proximal: proximal.clone(),
            clip_low,
            clip_high,
            entropy_bonus,
            weight,
        };
        let of_sequence = SequenceSurrogate {
            advantage: -1.5,
            behavior_logprobs,
            proximal,
            clip_low,
            clip_high,
            entropy_bonus,
            weight,
        };
        let reference = || vec![-0.75, -1.0, -1.5];
        let pair =
            |per_token| Dpo { reference_logprobs: [reference(), vec![-2.0, -0.25]], beta: 0.4, per_token, weight };
        let losses: [(&dyn Loss, usize); 6] = [
            (&CrossEntropy { weight }, 2),
            (&of_tokens, 1),
            (&of_sequence, 1),
            (&ReferenceKl { reference_logprobs: reference(), weight }, 1),
            (&pair(false), 2),
            (&pair(true), 2),
        ];
        for (number, (loss, num_sequences)) in losses.into_iter().enumerate() {
            for shift in [-0.5f32, -0.05, 0.0, 0.1, 0.5] {
                let values = [-1.1 + shift, -0.6 + shift, -1.8 + shift, -1.0 + shift, -0.5, 0.9, 0.4, 0.7, 0.2, 0.1];
                let value = |values: &[f32]| {
                    let (logprobs, entropies) = values.split_at(5);
                    let sequences = [
                        Scores { logprobs: &logprobs[..3], entropies: &entropies[..3] },
                        Scores { logprobs: &logprobs[3..], entropies: &entropies[3..] },
                    ];
                    (loss.value(&sequences[..num_sequences]), loss.grad(&sequences[..num_sequences]))
                };
                let grads = value(&values).1;
                assert_eq!(grads.len(), [3, 5][num_sequences - 1]);
                for (index, grad) in grads.iter().enumerate() {
                    for (place, slope) in [(index, grad.logprob), (index + 5, grad.entropy)] {
                        let shifted = |by: f32| {
                            let mut values = values;
                            values[place] += by;
                            value(&values).0
                        };
                        let difference = (shifted(1e-2) - shifted(-1e-2)) / 2e-2;
                        let case = format!("loss {number}, shift {shift}, score {place}");
                        assert!((difference - f64::from(slope)).abs() < 2e-3, "{case}: {difference}, gradient {slope}");
                    }
                }
            }
        }
    }

    fn sequence(num_chosen: usize) -> Sequence {
        let answer = vec![1; num_chosen];
        Sequence::new(&[0], &answer, (0..num_chosen).map(|position| (position, proto::LegalTokens::Any)))
    }

    #[test]
    fn groups_stay_together() {
        let [one, two, three] = [1, 2, 3].map(sequence);
        let mut batch = LossBatch::default();
        batch.push([&one, &three], &Labels);
        batch.push([&two], &Labels);
        batch.push([&one], &Labels);
        let scores = BatchScores { logprobs: (1..8).map(|index| -(index as f32)).collect(), entropies: vec![0.0; 7] };
        assert_eq!(batch.value(&scores), 4.0);
        let grads = batch.whole().grad(&scores);
        let labels: Vec<f32> = grads.iter().map(|grad| grad.logprob).collect();
        assert_eq!(labels, [20.0, 21.0, 21.0, 21.0, 10.0, 10.0, 10.0]);
        assert_eq!(grads.iter().map(|grad| grad.entropy).collect::<Vec<_>>(), scores.logprobs);
        let lengths = |parts: Vec<LossPart<'_>>| {
            parts.iter().map(|part| (part.groups.len(), part.sequences.len())).collect::<Vec<_>>()
        };
        assert_eq!(lengths(batch.parts(2)), [(2, 3), (1, 1)]);
        assert_eq!(lengths(batch.parts(9)), [(1, 2), (1, 1), (1, 1)]);
        // Four tokens, then two and one.
        let first = |max_tokens: usize| {
            let mut num_tokens = 0;
            let (first, rest) = batch.whole().split(|sequences| {
                num_tokens += sequences.iter().map(|sequence| sequence.tokens.len()).sum::<usize>();
                num_tokens <= max_tokens
            });
            lengths(vec![first, rest])
        };
        assert_eq!(first(3), [(1, 2), (2, 2)]);
        assert_eq!(first(6), [(2, 3), (1, 1)]);
        assert_eq!(first(7), [(3, 4), (0, 0)]);
    }
}
