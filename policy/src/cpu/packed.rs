use std::ops::Range;
use std::sync::Arc;

use super::kernels::{MatrixView, PackedMatrix, RotaryTable, add, rms_norm_in_place};
use crate::{AttentionShape, ModelConfig, Params, TensorSpec, Variant};

/// One version of the weights in the order in which the kernels read them. Shared by all threads that use it.
#[derive(Debug)]
pub(crate) struct PackedWeights {
    pub(crate) config: ModelConfig,
    pub(crate) embed: Vec<f32>,
    pub(crate) layers: Vec<PackedLayer>,
    pub(crate) norm: Vec<f32>,
    pub(crate) head: Linear,
}

/// One decoder block.
#[derive(Debug)]
pub(crate) struct PackedLayer {
    pub(crate) shape: AttentionShape,
    pub(crate) rotary: Arc<RotaryTable>,
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) qkv: Linear,
    /// Added to queries, keys and values.
    pub(crate) qkv_bias: Option<Vec<f32>>,
    /// Weights of the norms of query heads and key heads.
    pub(crate) qk_norm: Option<[Vec<f32>; 2]>,
    pub(crate) out: Linear,
    pub(crate) mlp_norm: Vec<f32>,
    pub(crate) gate_up: Linear,
    pub(crate) down: Linear,
}

/// A linear layer: `[inputs, outputs]`, and its transpose if gradients are needed.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) forward: PackedMatrix,
    transposed: Option<PackedMatrix>,
}

impl Linear {
    /// Returns the transpose.
    ///
    /// # Panics
    /// When the weights were packed for playing.
    pub(crate) fn transposed(&self) -> &PackedMatrix {
        self.transposed.as_ref().expect("packed for training")
    }
}

impl PackedWeights {
    /// Packs a version for playing it.
    pub(crate) fn new(config: &ModelConfig, params: &Params) -> PackedWeights {
        PackedWeights::pack(config, params, false)
    }

    /// Packs a version for training it.
    pub(crate) fn with_transposes(config: &ModelConfig, params: &Params) -> PackedWeights {
        PackedWeights::pack(config, params, true)
    }

    fn pack(config: &ModelConfig, params: &Params, transposes: bool) -> PackedWeights {
        let Variant { qkv_bias, qk_norm, tied_head, no_rope_layers, .. } = &config.variant;
        let specs = config.tensors();
        let mut tensors = specs.iter().zip(&params.tensors);
        let mut next = || tensors.next().expect("params have the config's tensors");
        let pack = |matrix: MatrixView<'_>, inputs: usize, outputs: usize| Linear {
            forward: PackedMatrix::new(matrix, inputs, outputs),
            transposed: transposes.then(|| PackedMatrix::new(matrix.transposed(), outputs, inputs)),
        };
        let linear = |(spec, values): (&TensorSpec, &Vec<f32>)| {
            let (inputs, outputs) = (spec.shape[0], spec.shape[1]);
            pack(MatrixView::row_major(values, outputs), inputs, outputs)
        };
        let embed = next().1.clone();
        let frequencies = config.variant.rope_frequencies(config.head_dim());
        let rotary = Arc::new(RotaryTable::new(config.max_positions, &frequencies));
        let still = match no_rope_layers[..] {
            [] => rotary.clone(),
            [..] => Arc::new(RotaryTable::new(config.max_positions, &vec![0.0; frequencies.len()])),
        };
        let layers = (0..config.num_layers)
            .map(|layer| PackedLayer {
                shape: config.attention_shape(layer),
                rotary: if no_rope_layers.contains(&layer) { still.clone() } else { rotary.clone() },
                attention_norm: next().1.clone(),
                qkv: linear(next()),
                qkv_bias: qkv_bias.then(|| next().1.clone()),
                qk_norm: qk_norm.then(|| [next().1.clone(), next().1.clone()]),
                out: linear(next()),
                mlp_norm: next().1.clone(),
                gate_up: linear(next()),
                down: linear(next()),
            })
            .collect();
        let norm = next().1.clone();
        let head = match tied_head {
            true => {
                pack(MatrixView::row_major(&embed, config.d_model).transposed(), config.d_model, config.vocabulary_size)
            }
            false => linear(next()),
        };
        PackedWeights { config: config.clone(), embed, layers, norm, head }
    }
}

impl PackedLayer {
    /// Turns the products of the query, key and value weights into what attention reads: adds the bias, normalises heads, rotates
    /// them to their positions, and scales queries. Returns the rows as they were before the norms in `unnormed`, if there are
    /// norms.
    pub(crate) fn finish_qkv(
        &self,
        epsilon: f32,
        positions: impl Iterator<Item = usize>,
        qkv: &mut [f32],
        unnormed: Option<&mut Vec<f32>>,
    ) {
        let row_len = self.shape.qkv_dim();
        if let Some(bias) = &self.qkv_bias {
            qkv.chunks_exact_mut(row_len).for_each(|row| add(row, bias));
        }
        if let Some(norms) = &self.qk_norm {
            if let Some(unnormed) = unnormed {
                unnormed.clear();
                unnormed.extend_from_slice(qkv);
            }
            for row in qkv.chunks_exact_mut(row_len) {
                for (heads, norm) in self.qk_columns().into_iter().zip(norms) {
                    rms_norm_in_place(&mut row[heads], norm, epsilon);
                }
            }
        }
        self.rotary.rotate(self.shape, positions, qkv);
    }

    /// Returns the columns of the queries and those of the keys in a row.
    pub(crate) fn qk_columns(&self) -> [Range<usize>; 2] {
        [0..self.shape.key_offset(0), self.shape.key_offset(0)..self.shape.value_offset(0)]
    }
}
