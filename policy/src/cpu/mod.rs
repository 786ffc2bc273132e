//! The network on the CPU, in kernels whose results do not depend on who computes them: a log-probability has the same bits whether it is
//! played or trained, alone or beside others, on one thread or many.

pub mod kernels;
mod network;
mod optimizer;
mod packed;
mod policy;
mod trainer;

pub(crate) use packed::PackedWeights;
pub(crate) use policy::CpuPolicy;
pub(crate) use trainer::CpuTrainer;
