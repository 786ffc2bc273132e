use std::ops::Range;
use std::sync::Arc;

use super::kernels::{MatrixView, PackedMatrix, RotaryTable, add, rms_norm_in_place};
use super::threads;
use crate::{AttentionShape, ModelConfig, Params, Variant};

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
        PackedWeights::pack(config, params, false, 1)
    }

    /// Packs a version for training it, on some threads.
    pub(crate) fn with_transposes(config: &ModelConfig, params: &Params, num_threads: usize) -> PackedWeights {
        PackedWeights::pack(config, params, true, num_threads)
    }

    fn pack(config: &ModelConfig, params: &Params, transposes: bool, num_threads: usize) -> PackedWeights {
        let Variant { qkv_bias, qk_norm, tied_head, no_rope_layers, .. } = &config.variant;
        let specs = config.tensors();
        let embed = &params.tensors[0];
        let (matrices, vectors): (Vec<_>, Vec<_>) =
            specs.iter().zip(&params.tensors).skip(1).partition(|(spec, _)| spec.shape.len() == 2);
        let mut vectors = vectors.into_iter().map(|(_, values)| values.clone());
        let mut vector = || vectors.next().expect("params have the config's tensors");
        let matrices = matrices.into_iter().map(|(spec, values)| {
            let (inputs, outputs) = (spec.shape[0], spec.shape[1]);
            Matrix { view: MatrixView::row_major(values, outputs), inputs, outputs }
        });
        let tied_head = tied_head.then(|| {
            let view = MatrixView::row_major(embed, config.d_model).transposed();
            Matrix { view, inputs: config.d_model, outputs: config.vocabulary_size }
        });
        let mut linears = pack_all(matrices.chain(tied_head).collect(), transposes, num_threads).into_iter();
        let mut linear = || linears.next().expect("params have the config's tensors");
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
                attention_norm: vector(),
                qkv: linear(),
                qkv_bias: qkv_bias.then(&mut vector),
                qk_norm: qk_norm.then(|| [vector(), vector()]),
                out: linear(),
                mlp_norm: vector(),
                gate_up: linear(),
                down: linear(),
            })
            .collect();
        PackedWeights { config: config.clone(), embed: embed.clone(), layers, norm: vector(), head: linear() }
    }
}

/// A matrix to pack.
struct Matrix<'a> {
    view: MatrixView<'a>,
    inputs: usize,
    outputs: usize,
}

fn pack_all(matrices: Vec<Matrix<'_>>, transposes: bool, num_threads: usize) -> Vec<Linear> {
    let num_values = matrices.iter().map(|Matrix { inputs, outputs, .. }| inputs * outputs).sum();
    let mut linears: Vec<Option<Linear>> = matrices.iter().map(|_| None).collect();
    // From the last on: the head of a large vocabulary takes longest.
    let to_pack = linears.iter_mut().zip(matrices).rev();
    threads::for_each(threads::worth_starting(num_threads, num_values), to_pack, |(linear, matrix)| {
        let Matrix { view, inputs, outputs } = matrix;
        let forward = PackedMatrix::new(view, inputs, outputs);
        let transposed = transposes.then(|| PackedMatrix::new(view.transposed(), outputs, inputs));
        *linear = Some(Linear { forward, transposed });
    });
    linears.into_iter().map(|linear| linear.expect("every matrix is packed")).collect()
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
