//! Preferences between the answers of a group: verified ones over others (DPO).

use policy::{Dpo, Loss as _, LossBatch, Scores, Sequence};
use proto::{Rollout, ScoredGroup, Verdict};
use serde::{Deserialize, Serialize};

use crate::config::DpoConfig;
use crate::minibatch::played_sequence;

/// Statistics of the preferences of one step. Means are over pairs, when they are trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DpoReport {
    /// Mean loss, without the weight of the loss.
    pub loss: f64,
    /// Share of pairs whose better answer is preferred: the margin is over 0.
    pub accuracy: f64,
    /// Mean margin: beta times the difference of the log ratios to the reference.
    pub margin: f64,
    /// Pairs of a right and a wrong answer.
    pub num_pairs: u64,
}

/// The pairs of one update.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct PairBatch {
    /// Two for each loss, the better one first.
    pub(crate) sequences: Vec<Sequence>,
    losses: Vec<Dpo>,
}

/// Sums over pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct PairStats {
    /// Sum of losses, each divided by its weight.
    loss: f64,
    num_preferred: u64,
    margin: f64,
    num_pairs: u64,
}

/// An update without pairs.
pub(crate) static NO_PAIRS: PairBatch = PairBatch { sequences: Vec::new(), losses: Vec::new() };

/// Pairs the i-th right answer of each group with the i-th wrong one, and divides the pairs among `updates_per_step` updates, in
/// order. An update's loss is the mean over its pairs. The reference is set later, by [`PairBatch::compare`].
pub(crate) fn pair_batches(config: &DpoConfig, groups: &[ScoredGroup]) -> Vec<PairBatch> {
    // Proposals are not answers.
    let answered = groups.iter().filter(|scored| scored.group.task.request.problem().is_some());
    let pairs: Vec<[Sequence; 2]> = answered.flat_map(pairs_of).collect();
    let per_update = pairs.len().div_ceil(config.updates_per_step as usize).max(1);
    let batches = pairs.chunks(per_update).map(|pairs| {
        let loss = Dpo {
            reference_logprobs: [Vec::new(), Vec::new()],
            beta: config.beta as f32,
            per_token: config.per_token,
            weight: (config.weight / pairs.len() as f64) as f32,
        };
        PairBatch { sequences: pairs.concat(), losses: vec![loss; pairs.len()] }
    });
    batches.collect()
}

fn pairs_of(scored: &ScoredGroup) -> Vec<[Sequence; 2]> {
    let of = |is_right: bool| {
        let judged = scored.group.rollouts.iter().zip(&scored.verdicts);
        let is_wanted = move |(rollout, verdict): &(&Rollout, &Verdict)| {
            (**verdict == Verdict::Correct) == is_right && !rollout.choices.is_empty()
        };
        judged.filter(is_wanted).map(|(rollout, _)| played_sequence(scored, rollout))
    };
    of(true).zip(of(false)).map(|(better, worse)| [better, worse]).collect()
}

impl PairBatch {
    /// Sets the reference, given its log-probabilities of all chosen tokens.
    pub(crate) fn compare(&mut self, mut reference_logprobs: &[f32]) {
        for (pair, loss) in self.sequences.chunks_exact(2).zip(&mut self.losses) {
            let mut take = |sequence: &Sequence| {
                let taken = reference_logprobs.split_off(..sequence.chosen.len());
                taken.expect("a log-probability for each chosen token").to_vec()
            };
            loss.reference_logprobs = [take(&pair[0]), take(&pair[1])];
        }
    }

    pub(crate) fn add_to<'a>(&'a self, batch: &mut LossBatch<'a>) {
        self.sequences.chunks_exact(2).zip(&self.losses).for_each(|(pair, loss)| batch.push(pair, loss));
    }

    /// Sums the statistics of the losses. Takes the scores of the batch's sequences from the iterator.
    pub(crate) fn stats<'a>(&self, scores: &mut impl Iterator<Item = Scores<'a>>) -> PairStats {
        let mut stats = PairStats::default();
        for loss in &self.losses {
            let pair: Vec<Scores<'_>> = scores.by_ref().take(2).collect();
            let margin = loss.margin(&pair);
            stats.loss += loss.value(&pair) / f64::from(loss.weight);
            stats.num_preferred += u64::from(margin > 0.0);
            stats.margin += margin;
            stats.num_pairs += 1;
        }
        stats
    }
}

impl PairStats {
    pub(crate) fn add(&mut self, other: &PairStats) {
        self.loss += other.loss;
        self.num_preferred += other.num_preferred;
        self.margin += other.margin;
        self.num_pairs += other.num_pairs;
    }

    /// Returns the means; `None` if there are no pairs.
    pub(crate) fn report(&self) -> Option<DpoReport> {
        let mean = |sum: f64| sum / self.num_pairs as f64;
        (self.num_pairs > 0).then(|| DpoReport {
            loss: mean(self.loss),
            accuracy: mean(self.num_preferred as f64),
            margin: mean(self.margin),
            num_pairs: self.num_pairs,
        })
    }
}

#[cfg(test)]
mod tests {
    use policy::BatchScores;

    use super::*;
    use crate::test_groups::{RIGHT, WRONG, group};

    fn config(per_token: bool, updates_per_step: u32) -> DpoConfig {
        DpoConfig { weight: 0.5, beta: 0.25, per_token, updates_per_step, cross_entropy: true }
    }

    /// Three right and two wrong answers make two pairs, one and three make one, and a group that agrees makes none.
    fn groups() -> [ScoredGroup; 3] {
        [
            group(&[(RIGHT, 3), (WRONG, 2), (Verdict::Malformed, 5), (RIGHT, 4), (RIGHT, 6)]),
            group(&[(RIGHT, 2), (RIGHT, 3)]),
            group(&[(WRONG, 2), (WRONG, 1), (WRONG, 1), (RIGHT, 7)]),
        ]
    }

    fn lengths(batch: &PairBatch) -> Vec<usize> {
        batch.sequences.iter().map(|sequence| sequence.chosen.len()).collect()
    }

    #[test]
    fn right_answers_are_paired_with_wrong_ones_in_order() {
        let batches = pair_batches(&config(false, 1), &groups());
        assert_eq!(batches.iter().map(lengths).collect::<Vec<_>>(), [[3, 2, 4, 5, 7, 2]]);
        assert!(batches[0].losses.iter().all(|loss| loss.weight == (0.5 / 3.0) as f32));
        let batches = pair_batches(&config(false, 2), &groups());
        assert_eq!(batches.iter().map(lengths).collect::<Vec<_>>(), [vec![3, 2, 4, 5], vec![7, 2]]);
        assert_eq!(batches[1].losses[0].weight, 0.5);
        // An answer without a choice cannot be preferred.
        assert_eq!(pair_batches(&config(false, 1), &[group(&[(RIGHT, 0), (WRONG, 2)])]), []);
    }

    /// By hand: all tokens are 0.5 likelier than under the reference, which is -1.5. D is 1.5 and 1 for three and two tokens, so the
    /// margin is a quarter of 0.5; of means it is 0.
    #[test]
    fn the_report_is_a_mean_over_pairs() {
        for (per_token, margins) in [(false, [0.125, -0.125, 0.625]), (true, [0.0; 3])] {
            let mut batches = pair_batches(&config(per_token, 1), &groups());
            batches[0].compare(&[-1.5; 23]);
            let mut batch = LossBatch::default();
            batches[0].add_to(&mut batch);
            let scores = BatchScores { logprobs: vec![-1.0; 23], entropies: vec![0.0; 23] };
            let stats = batches[0].stats(&mut scores.by_sequence(batch.sequences()).into_iter());
            let report = stats.report().unwrap();
            let loss = margins.map(|margin: f64| (-margin).exp().ln_1p()).iter().sum::<f64>() / 3.0;
            assert!((report.loss - loss).abs() < 1e-6, "{report:?}, expected {loss}");
            assert!((batch.value(&scores) - 0.5 * loss).abs() < 1e-6);
            let preferred = margins.iter().filter(|margin| **margin > 0.0).count() as f64;
            assert_eq!((report.accuracy, report.num_pairs), (preferred / 3.0, 3));
            assert!((report.margin - margins.iter().sum::<f64>() / 3.0).abs() < 1e-9, "{report:?}");
        }
        assert_eq!(PairStats::default().report(), None);
    }
}
