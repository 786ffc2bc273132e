use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::Error;

/// A low-rank adapter of every projection of every block (Hu et al. 2021, "LoRA"): `y = x W + s (x A) B` with a frozen W. It
/// begins with random A and with B = 0, so that it changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// Columns of A and rows of B; 1 to 256.
    pub rank: usize,
    /// Numerator of the scale s; over 0.
    pub alpha: f64,
    /// Whether s is `alpha / sqrt(rank)` (Kalajdzievski 2023) instead of `alpha / rank`.
    #[serde(default)]
    pub rslora: bool,
}

/// A matrix of a block that an adapter changes.
pub(crate) struct AdaptedMatrix {
    /// Name in the block.
    pub(crate) name: &'static str,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    /// Each has an A and a B of its own.
    pub(crate) projections: Vec<Projection>,
}

/// Columns of a matrix.
pub(crate) struct Projection {
    /// Name in the block.
    pub(crate) name: &'static str,
    pub(crate) columns: Range<usize>,
}

impl Adapter {
    /// Number of tensors of a block: A and B of seven projections.
    pub(crate) const TENSORS_PER_BLOCK: usize = 14;

    /// Returns the scale s.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.rslora { rank.sqrt() } else { rank }) as f32
    }

    /// Checks the values.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let refuse = |key, expected: &str, got: String| Err(Error::Config { key, expected: expected.to_owned(), got });
        if !(1..=256).contains(&self.rank) {
            return refuse("adapter.rank", "1 to 256", self.rank.to_string());
        }
        if !(self.alpha > 0.0 && self.alpha <= 1e6) {
            return refuse("adapter.alpha", "over 0, up to 1000000", self.alpha.to_string());
        }
        Ok(())
    }
}
