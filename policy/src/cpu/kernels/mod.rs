//! The arithmetic of the network on plain slices, each result in one fixed order of operations.
//!
//! Sums run in the order of their index, or in 16 lanes that are added up as one fixed tree; `a * b + c` is fused only
//! where the code says `mul_add`. Rust never reorders floating point, so a result has the same bits in a batch of one or
//! of a thousand, on one thread or many, and with any vector instructions (`tests/determinism.rs` compares them).
//! Instruction sets are chosen at run time by `pulp`; the loops below are plain Rust that the compiler vectorises.

/// Compiles a block for each instruction set and runs the best one that the machine has.
///
/// The closure consumes `once`, so it is callable only once and its `call_once` is its body, which is inlined into the function
/// that has the instructions. If the closure could be called again, `call_once` would be a shim too large to inline, and every
/// `mul_add` in it a call into the C library.
macro_rules! vectorized {
    ($body:block) => {{
        let once = $crate::cpu::kernels::Once;
        pulp::Arch::new().dispatch(
            #[inline(always)]
            move || {
                let _ = { once };
                $body
            },
        )
    }};
}

/// See `vectorized!`: a value that cannot be copied.
pub(crate) struct Once;

mod attention;
mod elementwise;
mod matmul;
mod peak;

pub(crate) use attention::for_row_tiles;
pub(crate) use vectorized;

pub use attention::{
    KeyValues, ROW_TILE, RotaryTable, Segment, attend, attention_backward, attention_forward, set_position,
};
pub use elementwise::{
    AdamWStep, adamw, add, exp, rms_norm, rms_norm_backward, rms_norm_in_place, softmax_in_place, sum, sum_lanes,
    swiglu, swiglu_backward,
};
pub use matmul::{MatrixView, PackedMatrix, Part, Start, matmul, matmul_on, matmul_transposed, parts};
pub use peak::{instruction_set, multiply_adds};

/// Number of lanes in which long sums run.
pub const LANES: usize = 16;
