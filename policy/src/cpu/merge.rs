use std::borrow::Cow;

use super::kernels::{MatrixView, PackedMatrix, Start, matmul};
use crate::adapter::{AdaptedMatrix, Adapter, Projection};
use crate::{ModelConfig, Params};

/// Adds an adapter to the weights that it changes: every projection becomes `W + s A B`. Returns the weights of a network without
/// an adapter, which computes what the kernels compute with both, to the last bit.
///
/// - `config`: of the network with its adapter; `base`: its frozen weights.
///
/// # Panics
/// When the config has no adapter, or the tensors are not of its shape.
pub fn merge_adapter(config: &ModelConfig, mut base: Params, adapter: &Params) -> Params {
    for (spec, values) in config.base_tensors().iter().zip(&mut base.tensors) {
        let changed = match merged(config, adapter, &spec.name, values) {
            Cow::Owned(changed) => changed,
            Cow::Borrowed(_) => continue,
        };
        *values = changed;
    }
    base
}

/// Returns `W + s A B` for the frozen tensor of this name, or the tensor itself if the adapter does not change it.
pub(super) fn merged<'a>(config: &ModelConfig, adapter: &Params, name: &str, frozen: &'a [f32]) -> Cow<'a, [f32]> {
    let scale = config.adapter.expect("a config with an adapter").scale();
    let Some((layer, name)) = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) else {
        return Cow::Borrowed(frozen);
    };
    let layer: usize = layer.parse().expect("the number of a layer");
    let mut tensors = adapter.tensors[layer * Adapter::TENSORS_PER_BLOCK..].chunks_exact(2);
    for matrix in config.adapted_matrices() {
        let num_projections = matrix.projections.len();
        if matrix.name == name {
            let mut values = frozen.to_vec();
            let of_matrix = matrix.projections.iter().zip(tensors);
            of_matrix.for_each(|(projection, pair)| add(&matrix, projection, &pair[0], &pair[1], scale, &mut values));
            return Cow::Owned(values);
        }
        tensors.nth(num_projections - 1);
    }
    Cow::Borrowed(frozen)
}

/// Adds `s A B` to the columns of a projection.
fn add(matrix: &AdaptedMatrix, projection: &Projection, a: &[f32], b: &[f32], scale: f32, values: &mut [f32]) {
    let (inputs, rank) = (matrix.inputs, a.len() / matrix.inputs);
    let columns = &projection.columns;
    let scaled: Vec<f32> = a.iter().map(|value| scale * value).collect();
    let b = PackedMatrix::new(MatrixView::row_major(b, columns.len()), rank, columns.len());
    let mut part: Vec<f32> =
        values.chunks_exact(matrix.outputs).flat_map(|row| &row[columns.clone()]).copied().collect();
    matmul(MatrixView::row_major(&scaled, rank), inputs, &b, Start::Out, &mut part);
    for (row, part) in values.chunks_exact_mut(matrix.outputs).zip(part.chunks_exact(columns.len())) {
        row[columns.clone()].copy_from_slice(part);
    }
}
