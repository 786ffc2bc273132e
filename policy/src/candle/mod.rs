//! The network in candle operations, on any device that candle has: it plays and trains there, and nothing but tokens, scores and the weights
//! that leave a step comes back.

mod network;
mod policy;
mod sampler;
mod trainer;

pub(crate) use network::CandleWeights;
pub(crate) use policy::CandlePolicy;
pub(crate) use trainer::CandleTrainer;
