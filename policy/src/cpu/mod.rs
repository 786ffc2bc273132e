//! The network on the CPU, in bit-reproducible kernels: a log-probability has the same bits whether it is played or trained,
//! alone or in a batch, on one thread or many.

mod base;
mod cache;
mod chunk;
mod gradients;
pub mod kernels;
mod merge;
mod network;
mod optimizer;
mod packed;
mod policy;
mod scorer;
mod threads;
mod trainer;

pub use merge::merge_adapter;
pub use threads::ThreadPool;

pub(crate) use base::CpuBase;
pub(crate) use packed::PackedWeights;
pub(crate) use policy::CpuPolicy;
pub(crate) use scorer::CpuScorer;
pub(crate) use trainer::CpuTrainer;
