//! The network: a Llama-family decoder for playing and training. It runs on the CPU in our own kernels, which are
//! bit-reproducible, and on the devices of candle.
//!
//! [`ModelConfig`] and [`Params`] define the weights. A [`Device`] is opened as a [`Backend`]. A backend has a [`Policy`], which
//! plays with a key-value cache, and a [`Trainer`], which trains the weights on a [`Loss`]. Both have two implementations, in
//! `cpu` and in `candle`, and `tests/backends.rs` compares them. [`formats`] reads pretrained networks. Dims: N rows (tokens of
//! all sequences, packed), D model width, V vocabulary, M chosen tokens.

mod adapter;
mod candle;
mod config;
pub mod cpu;
mod device;
pub mod formats;
mod losses;
mod numerics;
mod params;
mod sampler;
mod sequence;
mod weights;

use std::borrow::Cow;

use proto::{CounterRng, LegalTokens, TokenId};

pub use adapter::Adapter;
pub use config::{AttentionShape, ModelConfig, RopeScaling, TensorSpec, Variant};
pub use cpu::{ThreadPool, merge_adapter};
pub use device::{Backend, Base, Device};
pub use losses::{
    BatchScores, ClippedSurrogate, CrossEntropy, Dpo, Loss, LossBatch, LossGrad, ReferenceKl, Scores,
    SequenceSurrogate, SurrogateStats,
};
pub use numerics::Numerics;
pub use params::{Params, TrainingState, read_weights, write_weights};
pub use sampler::{masked_logprob, sample};
pub use sequence::{ChosenToken, Sequence};
pub use weights::Weights;

/// A version of the weights for playing, with a key-value cache for a fixed number of sequences, the slots.
pub trait Policy: Send {
    /// Returns the shape of the network.
    fn config(&self) -> &ModelConfig;

    /// Replaces the weights by others of the same backend, and empties every slot.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the device has no room.
    ///
    /// # Panics
    /// When the weights are of another backend.
    fn set_weights(&mut self, weights: &Weights) -> Result<(), Error>;

    /// Empties a slot.
    fn reset(&mut self, slot: usize);

    /// Replaces the contents of the slot `to` by the first `len` tokens of the slot `from`, or shortens a slot when both are the
    /// same.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    ///
    /// # Panics
    /// When the slot `from` holds fewer tokens.
    fn fork(&mut self, from: usize, to: usize, len: usize) -> Result<(), Error>;

    /// Appends tokens to slots, each slot at most once. The logits after the last token of each feed are then available to read
    /// or sample, until the next feed or other weights.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    ///
    /// # Panics
    /// When a slot would grow past `max_positions`, or a token is not in the vocabulary.
    fn feed(&mut self, feeds: &[Feed<'_>]) -> Result<(), Error>;

    /// Returns the logits `[feeds, V]`.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    fn logits(&self) -> Result<Cow<'_, [f32]>, Error>;

    /// Draws tokens after feeds, and returns each with its log-probability, in the order of the draws. Samples as [`sample`] does,
    /// without copying all logits off the device.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    ///
    /// # Panics
    /// When a draw has no legal token, or names no feed.
    fn sample(&self, draws: &mut [Draw<'_>]) -> Result<Vec<(TokenId, f32)>, Error>;
}

/// Tokens to append to a slot.
#[derive(Clone, Copy, Debug)]
pub struct Feed<'a> {
    /// The slot of the sequence.
    pub slot: usize,
    /// One or more tokens.
    pub tokens: &'a [TokenId],
}

/// A token to draw, as [`sample`] does.
#[derive(Debug)]
pub struct Draw<'a> {
    /// Index of the feed after which to draw. Several draws after one feed begin different continuations.
    pub feed: usize,
    /// The legal tokens.
    pub legal: &'a LegalTokens,
    /// Divides the logits; 0 takes the most probable token.
    pub temperature: f32,
    /// Source of randomness.
    pub rng: &'a mut CounterRng,
}

/// Weights in training, with the optimizer's moments and the average of the weights.
pub trait Trainer: Send + Sync {
    /// Computes the log-probability of every chosen token, sequence after sequence.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    fn logprobs(&self, sequences: &[&Sequence]) -> Result<Vec<f32>, Error>;

    /// Computes the gradient of a batch's loss for the next [`Trainer::step`], and returns the network's scores of the chosen
    /// tokens.
    ///
    /// # Errors
    /// [`Error::Tensor`]; [`Error::Weights`] when some weight got no gradient.
    fn gradients(&mut self, batch: &LossBatch<'_>) -> Result<BatchScores, Error>;

    /// Updates the weights with the gradient, and then their average. Returns the gradient's norm before clipping. If the norm is
    /// not finite, nothing changes.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    ///
    /// # Panics
    /// When no gradient was computed since the last step.
    fn step(&mut self, step: &OptimizerStep) -> Result<f64, Error>;

    /// Returns the number of steps.
    fn num_updates(&self) -> u64;

    /// Returns the weights.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    fn weights(&self) -> Result<Cow<'_, Params>, Error>;

    /// Returns the averaged weights.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    fn average(&self) -> Result<Cow<'_, Params>, Error>;

    /// Returns the state from which [`Backend::trainer`] resumes.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    fn export(&self) -> Result<Cow<'_, TrainingState>, Error>;
}

/// Fixed weights that score sequences: a reference for losses.
pub trait Scorer: Send + Sync {
    /// Computes the log-probability of every chosen token, sequence after sequence.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    fn logprobs(&self, sequences: &[&Sequence]) -> Result<Vec<f32>, Error>;
}

/// How a trainer divides a batch.
#[derive(Clone, Copy, Debug)]
pub struct Division {
    /// Parts whose gradients are computed separately and added in order: their number affects the last bits.
    pub num_shards: usize,
    /// Threads that compute them on the CPU; any number gives the same bits.
    pub num_threads: usize,
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
    /// Weight decay of matrices, in units of the learning rate.
    pub weight_decay: f64,
    /// Largest norm of the gradient; a larger gradient is scaled down to it.
    pub max_grad_norm: f64,
    /// Decay of the averaged weights, after its warm-up.
    pub average_decay: f64,
}

impl OptimizerStep {
    /// Returns the decay of the averaged weights after `num_updates` steps. It grows from 0.1, so that the average forgets the
    /// start.
    pub(crate) fn decay_after(&self, num_updates: u64) -> f64 {
        self.average_decay.min((1 + num_updates) as f64 / (10 + num_updates) as f64)
    }
}

/// Errors of weights, devices and tensors.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An invalid shape of the network.
    #[error("model.{key}: expected {expected}, got {got}")]
    Config {
        /// The key.
        key: &'static str,
        /// The legal values.
        expected: String,
        /// The given value.
        got: String,
    },
    /// A weights file that does not match its config.
    #[error("weights: expected {expected}, got {got}")]
    Weights {
        /// What the config requires.
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
        /// The error from candle.
        reason: candle_core::Error,
    },
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}
