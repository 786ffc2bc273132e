//! The network: a Llama-family decoder, in candle and in kernels of our own whose results do not depend on who computes them.
//!
//! Reading order: [`ModelConfig`] and [`Params`] say what the weights are; [`Model`] trains them for an [`Objective`]; [`Decoder`] plays them
//! with a key-value cache. Both call the same [`kernels`], so a log-probability has the same bits on either side. Dims: N rows (tokens of all sequences, packed), D model width, V vocabulary, M chosen tokens.

mod config;
mod decode;
mod device;
pub mod kernels;
mod model;
mod network;
mod numerics;
mod objective;
mod packed;
mod params;
mod reference;
mod sampler;

pub use candle_core::Device;
pub use config::{ModelConfig, TensorSpec};
pub use decode::{Decoder, Feed};
pub use device::DeviceKind;
pub use model::{ChosenToken, Gradients, Loaded, Model, Sequence};
pub use numerics::Numerics;
pub use objective::{Loss, Objective, PolicyGradient, Role, SurrogateLoss};
pub use packed::PackedWeights;
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
    /// A device that this build or this machine does not have.
    #[error(
        "learner.device: expected cpu, or cuda in a build with `--features cuda` on a machine with an NVIDIA GPU, got cuda: {0}"
    )]
    Device(candle_core::Error),
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}
