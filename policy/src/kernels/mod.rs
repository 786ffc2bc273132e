//! The arithmetic of the network on plain slices, each result in one fixed order of operations.
//!
//! Sums run in the order of their index, or in 16 lanes that are added up as one fixed tree; `a * b + c` is fused only
//! where the code says `mul_add`. Rust never reorders floating point, so a result has the same bits in a batch of one or
//! of a thousand, on one thread or many, and with any vector instructions (`tests/determinism.rs` compares them).
//! Instruction sets are chosen at run time by `pulp`; the loops below are plain Rust that the compiler vectorises.

mod attention;
mod elementwise;
mod matmul;

pub use attention::{AttentionShape, RotaryTable, attend_row, attention_backward, attention_forward, rotate};
pub use elementwise::{exp, rms_norm, rms_norm_backward, softmax_in_place, sum_lanes, swiglu, swiglu_backward};
pub use matmul::{MatrixView, PackedMatrix, matmul, matmul_on};

/// Width of the lanes in which long sums run.
pub const LANES: usize = 16;
