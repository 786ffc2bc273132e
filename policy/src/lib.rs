//! The network: a Llama-family decoder on candle, with operations whose results do not depend on who computes them.
//!
//! Reading order: [`ModelConfig`] and [`Params`] say what the weights are; [`Model`] trains them (candle, autograd);
//! [`Decoder`] plays them (key-value cache); both call the same [`kernels`], so a log-probability has the same bits on
//! either side. Dims: N rows (tokens of all sequences, packed), D model width, V vocabulary, M chosen tokens.

mod config;
mod decode;
pub mod kernels;
mod model;
mod numerics;
mod ops;
mod params;
mod sampler;

pub use config::{ModelConfig, TensorSpec};
pub use decode::{Decoder, DecoderWeights, Feed};
pub use model::{ChosenToken, Model, Sequence, TrainBatch};
pub use numerics::{Numerics, instruction_set};
pub use ops::{attention_plain, masked_logprob_plain, rms_norm_plain, swiglu_plain};
pub use params::{Params, read_weights, write_weights};
pub use sampler::{masked_logprob, sample};

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
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}
