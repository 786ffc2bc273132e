//! Where a backward pass adds gradients: those of all weights, or those of an adapter alone.

use super::kernels::{MatrixView, PackedMatrix, Start, matmul};
use crate::adapter::{AdaptedMatrix, Adapter, Projection};
use crate::{ModelConfig, Params, Variant};

/// The gradients of a network. Those of frozen weights are absent.
pub(super) struct NetworkGradients<'a> {
    pub(super) embed: Option<&'a mut Vec<f32>>,
    pub(super) blocks: Vec<BlockGradients<'a>>,
    pub(super) norm: Option<&'a mut Vec<f32>>,
    /// Absent if it is tied, too.
    pub(super) head: Option<&'a mut Vec<f32>>,
}

/// The gradients of a block.
pub(super) struct BlockGradients<'a> {
    pub(super) attention_norm: Option<&'a mut Vec<f32>>,
    pub(super) qkv: MatrixGradient<'a>,
    pub(super) qkv_bias: Option<&'a mut Vec<f32>>,
    pub(super) qk_norm: Option<[&'a mut Vec<f32>; 2]>,
    pub(super) out: MatrixGradient<'a>,
    pub(super) mlp_norm: Option<&'a mut Vec<f32>>,
    pub(super) gate_up: MatrixGradient<'a>,
    pub(super) down: MatrixGradient<'a>,
}

/// The gradient of a matrix `[inputs, outputs]`.
pub(super) enum MatrixGradient<'a> {
    Whole(&'a mut Vec<f32>),
    /// Of A and B of each projection.
    Adapter(&'a AdaptedProjections, Vec<[&'a mut Vec<f32>; 2]>),
}

/// An adapter in the order in which the backward pass reads it.
pub(crate) struct PackedAdapter {
    blocks: Vec<[AdaptedProjections; 4]>,
}

/// A and B of the projections of a matrix.
pub(super) struct AdaptedProjections {
    scale: f32,
    projections: Vec<AdaptedProjection>,
}

struct AdaptedProjection {
    first_column: usize,
    /// `[inputs, rank]`
    a: PackedMatrix,
    /// `[columns, rank]`
    b_transposed: PackedMatrix,
}

/// Buffers for products, reused: each is written before it is read.
#[derive(Default)]
pub(super) struct Scratch {
    packed: PackedMatrix,
    /// `[N, rank]`
    low_rank: Vec<f32>,
    /// Gradients of frozen vectors, which nobody reads.
    ignored: [Vec<f32>; 2],
}

impl Scratch {
    /// Adds `left^T right` to `out [left_width, right_width]`.
    pub(super) fn add_product(
        &mut self,
        left: &[f32],
        left_width: usize,
        right: &[f32],
        right_width: usize,
        out: &mut [f32],
    ) {
        self.packed.pack(MatrixView::row_major(right, right_width), right.len() / right_width, right_width);
        matmul(MatrixView::row_major(left, left_width).transposed(), left_width, &self.packed, Start::Out, out);
    }

    /// Returns where to add the gradient of a vector: its own place, or one that nobody reads.
    pub(super) fn vector<'a>(&'a mut self, own: Option<&'a mut Vec<f32>>, len: usize) -> &'a mut [f32] {
        own.unwrap_or_else(|| {
            self.ignored[0].resize(len, 0.0);
            &mut self.ignored[0]
        })
    }

    /// Returns as [`Scratch::vector`] does for two vectors.
    pub(super) fn vectors<'a>(&'a mut self, own: Option<[&'a mut Vec<f32>; 2]>, len: usize) -> [&'a mut Vec<f32>; 2] {
        own.unwrap_or_else(|| {
            self.ignored.iter_mut().for_each(|vector| vector.resize(len, 0.0));
            self.ignored.each_mut()
        })
    }
}

impl PackedAdapter {
    pub(super) fn new(config: &ModelConfig, adapter: &Params) -> PackedAdapter {
        let scale = config.adapter.expect("a config with an adapter").scale();
        let blocks = adapter.tensors.chunks_exact(Adapter::TENSORS_PER_BLOCK).map(|tensors| {
            let mut pairs = tensors.chunks_exact(2);
            config.adapted_matrices().map(|AdaptedMatrix { inputs, projections, .. }| {
                let pack = |projection: &Projection, pair: &[Vec<f32>]| {
                    let (columns, rank) = (projection.columns.len(), pair[0].len() / inputs);
                    AdaptedProjection {
                        first_column: projection.columns.start,
                        a: PackedMatrix::new(MatrixView::row_major(&pair[0], rank), inputs, rank),
                        b_transposed: PackedMatrix::new(
                            MatrixView::row_major(&pair[1], columns).transposed(),
                            columns,
                            rank,
                        ),
                    }
                };
                let projections = projections.iter().zip(&mut pairs).map(|(projection, pair)| pack(projection, pair));
                AdaptedProjections { scale, projections: projections.collect() }
            })
        });
        PackedAdapter { blocks: blocks.collect() }
    }
}

impl<'a> NetworkGradients<'a> {
    /// Sorts the tensors of gradients. With an adapter, these are its own.
    pub(super) fn new(
        config: &ModelConfig,
        adapter: Option<&'a PackedAdapter>,
        gradients: &'a mut Params,
    ) -> NetworkGradients<'a> {
        let mut tensors = gradients.tensors.iter_mut();
        let mut next = || tensors.next().expect("gradients have the config's tensors");
        if let Some(PackedAdapter { blocks }) = adapter {
            let block = |matrices: &'a [AdaptedProjections; 4]| {
                let [qkv, out, gate_up, down] = matrices.each_ref().map(|matrix| {
                    let pairs = matrix.projections.iter().map(|_| [next(), next()]);
                    MatrixGradient::Adapter(matrix, pairs.collect())
                });
                let (attention_norm, qkv_bias, qk_norm, mlp_norm) = (None, None, None, None);
                BlockGradients { attention_norm, qkv, qkv_bias, qk_norm, out, mlp_norm, gate_up, down }
            };
            return NetworkGradients {
                embed: None,
                blocks: blocks.iter().map(block).collect(),
                norm: None,
                head: None,
            };
        }
        let Variant { qkv_bias, qk_norm, tied_head, .. } = config.variant;
        NetworkGradients {
            embed: Some(next()),
            blocks: (0..config.num_layers)
                .map(|_| BlockGradients {
                    attention_norm: Some(next()),
                    qkv: MatrixGradient::Whole(next()),
                    qkv_bias: qkv_bias.then(&mut next),
                    qk_norm: qk_norm.then(|| [next(), next()]),
                    out: MatrixGradient::Whole(next()),
                    mlp_norm: Some(next()),
                    gate_up: MatrixGradient::Whole(next()),
                    down: MatrixGradient::Whole(next()),
                })
                .collect(),
            norm: Some(next()),
            head: (!tied_head).then(next),
        }
    }
}

impl MatrixGradient<'_> {
    /// Adds the gradient of a product `x W`, of N rows: `x^T grad_out`, or for `W + s A B` that of A, `s x^T (grad_out B^T)`, and of
    /// B, `s (x A)^T grad_out`.
    pub(super) fn add(self, x: &[f32], inputs: usize, grad_out: &[f32], outputs: usize, scratch: &mut Scratch) {
        let (adapted, pairs) = match self {
            MatrixGradient::Whole(gradient) => return scratch.add_product(x, inputs, grad_out, outputs, gradient),
            MatrixGradient::Adapter(adapted, pairs) => (adapted, pairs),
        };
        let Scratch { packed, low_rank, .. } = scratch;
        let num_rows = x.len() / inputs;
        if num_rows == 0 {
            return;
        }
        for (AdaptedProjection { first_column, a, b_transposed }, [grad_a, grad_b]) in
            adapted.projections.iter().zip(pairs)
        {
            let (columns, rank) = (b_transposed.num_rows(), a.num_columns());
            let grad_out = MatrixView::row_major(&grad_out[*first_column..], outputs);
            scaled_product(adapted.scale, grad_out, num_rows, b_transposed, low_rank);
            packed.pack(MatrixView::row_major(low_rank, rank), num_rows, rank);
            matmul(MatrixView::row_major(x, inputs).transposed(), inputs, packed, Start::Out, grad_a);
            scaled_product(adapted.scale, MatrixView::row_major(x, inputs), num_rows, a, low_rank);
            packed.pack(grad_out, num_rows, columns);
            matmul(MatrixView::row_major(low_rank, rank).transposed(), rank, packed, Start::Out, grad_b);
        }
    }
}

/// Writes `scale left right`.
fn scaled_product(scale: f32, left: MatrixView<'_>, num_rows: usize, right: &PackedMatrix, out: &mut Vec<f32>) {
    out.resize(num_rows * right.num_columns(), 0.0);
    matmul(left, num_rows, right, Start::Zero, out);
    out.iter_mut().for_each(|value| *value *= scale);
}
