//! The network: a Llama-family decoder that plays and trains, on the CPU in kernels of our own whose results do not depend on who
//! computes them, and on the devices of candle.
//!
//! [`ModelConfig`] and [`Params`] say what the weights are. A [`Device`] is opened as a [`Backend`]; that has a [`Policy`], which plays with a
//! key-value cache, and a [`Trainer`], which moves the weights against a [`Loss`]. Each is there twice, in `cpu` and in `candle`, and
//! `tests/backends.rs` holds the two to each other. Dims: N rows (tokens of all sequences, packed), D model width, V
//! vocabulary, M chosen tokens.

mod candle;
mod config;
pub mod cpu;
mod device;
mod losses;
mod numerics;
mod params;
mod sampler;
mod sequence;

use std::borrow::Cow;

use proto::{CounterRng, LegalTokens, TokenId};

pub use config::{AttentionShape, ModelConfig, TensorSpec};
pub use device::{Backend, Device, Division, Weights};
pub use losses::{BatchScores, ClippedSurrogate, CrossEntropy, Loss, LossBatch, LossGrad, Scores, SurrogateStats};
pub use numerics::Numerics;
pub use params::{Params, TrainingState, read_weights, write_weights};
pub use sampler::{masked_logprob, sample};
pub use sequence::{ChosenToken, Sequence};

/// A version of the weights that plays: a key-value cache for a fixed number of sequences, the slots.
pub trait Policy: Send {
    /// Returns the shape of the network.
    fn config(&self) -> &ModelConfig;

    /// Plays other weights of the same backend from here on, every slot empty.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the device has no room.
    ///
    /// # Panics
    /// When the weights are of another backend.
    fn set_weights(&mut self, weights: &Weights) -> Result<(), Error>;

    /// Empties a slot.
    fn reset(&mut self, slot: usize);

    /// Has one slot hold what another one holds.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    fn fork(&mut self, from: usize, to: usize) -> Result<(), Error>;

    /// Appends tokens to slots, each slot at most once. Logits behind the last token of each are then there to be read or drawn from,
    /// until the next call that changes a slot.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    ///
    /// # Panics
    /// When a slot would grow past `max_positions`, or a token is not in the vocabulary.
    fn feed(&mut self, feeds: &[Feed<'_>]) -> Result<(), Error>;

    /// Reads the logits `[feeds, V]`.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    fn logits(&self) -> Result<Cow<'_, [f32]>, Error>;

    /// Draws a token after each feed, in order, and returns it with its log-probability: what [`sample`] draws from the logits, without
    /// taking all of them off the device.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    ///
    /// # Panics
    /// When the draws are not as many as the feeds, or one has no legal token.
    fn sample(&self, draws: &mut [Draw<'_>]) -> Result<Vec<(TokenId, f32)>, Error>;
}

/// Tokens to append to a slot.
#[derive(Clone, Copy, Debug)]
pub struct Feed<'a> {
    /// Which sequence.
    pub slot: usize,
    /// One or more tokens.
    pub tokens: &'a [TokenId],
}

/// A token to draw, as [`sample`] does.
#[derive(Debug)]
pub struct Draw<'a> {
    /// What is legal.
    pub legal: &'a LegalTokens,
    /// Divides the logits; 0 takes the most probable token.
    pub temperature: f32,
    /// Where randomness comes from.
    pub rng: &'a mut CounterRng,
}

/// Weights that train, with the optimizer's moments and the average of the weights.
pub trait Trainer: Send + Sync {
    /// Computes the log-probability of every chosen token, sequence after sequence.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    fn logprobs(&self, sequences: &[&Sequence]) -> Result<Vec<f32>, Error>;

    /// Computes the gradient of a batch's loss, which the next [`Trainer::step`] follows, and returns what the network made of the chosen
    /// tokens.
    ///
    /// # Errors
    /// [`Error::Tensor`]; [`Error::Weights`] when some weight got no gradient.
    fn gradients(&mut self, batch: &LossBatch<'_>) -> Result<BatchScores, Error>;

    /// Moves the weights against the gradient, and their average after them. Returns the gradient's norm before clipping; where that is
    /// not finite, nothing has moved.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    ///
    /// # Panics
    /// When there is no gradient that has not been followed.
    fn step(&mut self, step: &OptimizerStep) -> Result<f64, Error>;

    /// Counts the steps.
    fn num_updates(&self) -> u64;

    /// Reads the weights.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    fn weights(&self) -> Result<Cow<'_, Params>, Error>;

    /// Reads the averaged weights.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    fn average(&self) -> Result<Cow<'_, Params>, Error>;

    /// Reads everything that [`Backend::trainer`] goes on from.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    fn export(&self) -> Result<Cow<'_, TrainingState>, Error>;
}

/// Settings of a step of AdamW (Loshchilov and Hutter 2019).
#[derive(Clone, Copy, Debug)]
pub struct OptimizerStep {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay of the running mean of gradients.
    pub beta1: f64,
    /// Decay of the running mean of their squares.
    pub beta2: f64,
    /// How fast matrices decay, in units of the learning rate.
    pub weight_decay: f64,
    /// Longest gradient; a longer one is scaled down to it.
    pub max_grad_norm: f64,
    /// Decay of the averaged weights, once it has grown to that.
    pub average_decay: f64,
}

impl OptimizerStep {
    /// Returns the decay of the averaged weights after so many steps. It grows from 0.1, so that the average forgets the start.
    pub(crate) fn decay_after(&self, num_updates: u64) -> f64 {
        self.average_decay.min((1 + num_updates) as f64 / (10 + num_updates) as f64)
    }
}

/// What can go wrong with weights and tensors.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A shape that no network has.
    #[error("model.{key}: expected {expected}, got {got}")]
    Config {
        /// The key.
        key: &'static str,
        /// What would be legal.
        expected: String,
        /// What was given.
        got: String,
    },
    /// A weights file that is not what its config says.
    #[error("weights: expected {expected}, got {got}")]
    Weights {
        /// What the config asks for.
        expected: String,
        /// What the file holds.
        got: String,
    },
    /// A device that this build or this machine does not have.
    #[error(
        "expected cpu, candle-cpu, or cuda in a build with `--features cuda` on a machine with an NVIDIA GPU, got {got}: {reason}"
    )]
    Device {
        /// The device.
        got: Device,
        /// What candle says of it.
        reason: candle_core::Error,
    },
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}
