//! The network in candle operations, on any candle device. Playing and training run on the device; only tokens, scores and
//! exported weights are copied back.

mod network;
mod policy;
mod sampler;
mod scorer;
mod scores;
mod trainer;

pub(crate) use network::{CandleBase, CandleWeights};
pub(crate) use policy::CandlePolicy;
pub(crate) use scorer::CandleScorer;
pub(crate) use trainer::CandleTrainer;
