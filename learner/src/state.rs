use policy::formats::Pretrained;
use policy::{Sequence, TrainingState};
use proto::{Digest, LabelOrigin, ProblemOrigin};
use serde::{Deserialize, Serialize};

use crate::replay_buffers::{ReplayBuffers, Stored};
use crate::self_play::SelfPlay;
use crate::{Config, Error};

/// The state after n steps, except what the trainer holds: version n of the weights and the optimizer state.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// The number of steps, n.
    pub step: u64,
    /// Counts over the whole run.
    pub totals: Totals,
    pub(crate) replay_buffers: ReplayBuffers,
    pub(crate) self_play: SelfPlay,
    /// Hash chain over every group that was folded.
    pub(crate) history: Digest,
}

/// Counts over a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Answers folded; problems that the policy wrote are not among them.
    pub num_rollouts: u64,
    /// Of these, the ones that solve the posed problem.
    pub num_correct: u64,
    /// Sequences trained on, with repeats.
    pub num_trained_sequences: u64,
    /// Input tokens trained on, with repeats.
    pub num_trained_tokens: u64,
    /// Origins of the tokens of trained examples: problem origin, label origin, chosen tokens times weight.
    pub trained_by_origin: Vec<(ProblemOrigin, LabelOrigin, f64)>,
}

/// Returns the weights of state 0 with their optimizer state: random ones, those of a pretrained model, or an adapter that changes
/// nothing yet.
///
/// # Errors
/// [`Error::Base`].
pub(crate) fn initial_training(config: &Config, base: Option<&Pretrained>) -> Result<TrainingState, Error> {
    Ok(match base.filter(|_| config.model.adapter.is_none()) {
        Some(base) => TrainingState::from_weights(&config.model, base.load()?),
        None => TrainingState::initial(&config.model, config.seed),
    })
}

impl State {
    /// Returns state 0 of a run.
    pub fn initial() -> State {
        State {
            step: 0,
            totals: Totals::default(),
            replay_buffers: ReplayBuffers::default(),
            self_play: SelfPlay::default(),
            history: Digest::of_bytes(b""),
        }
    }
}

impl Totals {
    pub(crate) fn count_sequence(&mut self, sequence: &Sequence) {
        self.num_trained_sequences += 1;
        self.num_trained_tokens += sequence.tokens.len() as u64;
    }

    pub(crate) fn count_example(&mut self, stored: &Stored, weight: f64) {
        self.count_sequence(&stored.sequence);
        let (problem_origin, label_origin) = stored.origins();
        let weighted = stored.sequence.chosen.len() as f64 * weight;
        let cell = self.trained_by_origin.iter_mut().find(|cell| (cell.0, cell.1) == (problem_origin, label_origin));
        match cell {
            Some(cell) => cell.2 += weighted,
            None => self.trained_by_origin.push((problem_origin, label_origin, weighted)),
        }
    }
}
