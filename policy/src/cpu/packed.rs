use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use proto::TokenId;

use super::kernels::{MatrixView, PackedMatrix, RotaryTable, add, rms_norm_in_place};
use super::merge::merged;
use super::threads;
use crate::{AttentionShape, ModelConfig, Params, TensorSpec, Variant};

/// One version of the weights in the order in which the kernels read them. Shared by all threads that use it. An adapter is
/// merged into the matrices that it changes, so it costs nothing to play with.
#[derive(Debug)]
pub(crate) struct PackedWeights {
    pub(crate) config: ModelConfig,
    /// `[V, D]`; absent if the head is its transpose.
    pub(crate) embed: Option<Arc<Vec<f32>>>,
    pub(crate) layers: Vec<PackedLayer>,
    pub(crate) norm: Vec<f32>,
    pub(crate) head: Arc<PackedMatrix>,
}

/// One decoder block. Matrices are `[inputs, outputs]`.
#[derive(Debug)]
pub(crate) struct PackedLayer {
    pub(crate) shape: AttentionShape,
    pub(crate) rotary: Arc<RotaryTable>,
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) qkv: PackedMatrix,
    /// Added to queries, keys and values.
    pub(crate) qkv_bias: Option<Vec<f32>>,
    /// Weights of the norms of query heads and key heads.
    pub(crate) qk_norm: Option<[Vec<f32>; 2]>,
    pub(crate) out: PackedMatrix,
    pub(crate) mlp_norm: Vec<f32>,
    pub(crate) gate_up: PackedMatrix,
    pub(crate) down: PackedMatrix,
}

/// A version of the weights as it lies in [`Params`].
#[derive(Clone, Copy)]
pub(crate) struct Unpacked<'a> {
    pub(crate) config: &'a ModelConfig,
    /// All tensors; those of the adapter's base, if there is an adapter.
    pub(crate) params: &'a Params,
    pub(crate) adapter: Option<&'a Params>,
}

impl PackedWeights {
    /// Packs a version, on some threads.
    pub(crate) fn new(config: &ModelConfig, params: &Params, num_threads: usize) -> PackedWeights {
        let unpacked = Unpacked::own(config, params);
        let mut matrices = unpacked.pack(unpacked.matrices(), num_threads);
        let head = Arc::new(matrices.pop().expect("every network has a head"));
        let embed = (!config.variant.tied_head).then(|| Arc::new(params.tensors[0].clone()));
        unpacked.arrange(matrices, embed, head)
    }

    /// Packs a version whose embedding and head are there.
    pub(crate) fn with_head(
        unpacked: Unpacked<'_>,
        embed: Option<Arc<Vec<f32>>>,
        head: Arc<PackedMatrix>,
        num_threads: usize,
    ) -> PackedWeights {
        let matrices = unpacked.pack(unpacked.matrices_of_blocks(), num_threads);
        unpacked.arrange(matrices, embed, head)
    }

    /// Appends the embedding of each token.
    pub(crate) fn append_embeddings<'a>(&self, tokens: impl Iterator<Item = &'a TokenId>, rows: &mut Vec<f32>) {
        let width = self.config.d_model;
        for token in tokens.map(|token| *token as usize) {
            let start = rows.len();
            rows.resize(start + width, 0.0);
            match &self.embed {
                Some(embed) => rows[start..].copy_from_slice(&embed[token * width..][..width]),
                None => self.head.copy_column(token, &mut rows[start..]),
            }
        }
    }
}

/// A matrix to pack, `[inputs, outputs]`.
struct Matrix {
    /// Index of its tensor.
    tensor: usize,
    spec: TensorSpec,
    /// Whether it is the transpose of the embedding.
    is_tied_head: bool,
}

impl<'a> Unpacked<'a> {
    pub(crate) fn own(config: &'a ModelConfig, params: &'a Params) -> Unpacked<'a> {
        Unpacked { config, params, adapter: None }
    }

    /// Packs the head.
    pub(crate) fn head(&self) -> PackedMatrix {
        self.pack(self.matrices().pop().into_iter().collect(), 1).pop().expect("every network has a head")
    }

    /// Lists the matrices of the blocks in order, and then the head.
    fn matrices(&self) -> Vec<Matrix> {
        let (width, vocabulary_size) = (self.config.d_model, self.config.vocabulary_size);
        let specs = self.config.base_tensors().into_iter().enumerate().skip(1);
        let matrices = specs.filter(|(_, spec)| spec.shape.len() == 2);
        let matrices = matrices.map(|(tensor, spec)| Matrix { tensor, spec, is_tied_head: false });
        let spec = TensorSpec { name: "head.weight".to_owned(), shape: vec![width, vocabulary_size] };
        let tied_head = Matrix { tensor: 0, spec, is_tied_head: true };
        matrices.chain(self.config.variant.tied_head.then_some(tied_head)).collect()
    }

    fn matrices_of_blocks(&self) -> Vec<Matrix> {
        let mut matrices = self.matrices();
        matrices.pop();
        matrices
    }

    fn pack(&self, matrices: Vec<Matrix>, num_threads: usize) -> Vec<PackedMatrix> {
        let num_values = matrices.iter().map(|matrix| matrix.spec.num_elements()).sum();
        let mut packed: Vec<Option<PackedMatrix>> = matrices.iter().map(|_| None).collect();
        // From the last on: the head of a large vocabulary takes longest.
        let to_pack = packed.iter_mut().zip(matrices).rev();
        threads::for_each(threads::worth_starting(num_threads, num_values), to_pack, |(packed, matrix)| {
            let (inputs, outputs) = (matrix.spec.shape[0], matrix.spec.shape[1]);
            let values = self.values(&matrix);
            let view = match matrix.is_tied_head {
                true => MatrixView::row_major(&values, inputs).transposed(),
                false => MatrixView::row_major(&values, outputs),
            };
            *packed = Some(PackedMatrix::new(view, inputs, outputs));
        });
        packed.into_iter().map(|packed| packed.expect("every matrix is packed")).collect()
    }

    fn values(&self, matrix: &Matrix) -> Cow<'a, [f32]> {
        let own = &self.params.tensors[matrix.tensor];
        match self.adapter {
            Some(adapter) => merged(self.config, adapter, &matrix.spec.name, own),
            None => Cow::Borrowed(own),
        }
    }

    /// Puts packed matrices in their places, beside the vectors.
    fn arrange(
        &self,
        matrices: Vec<PackedMatrix>,
        embed: Option<Arc<Vec<f32>>>,
        head: Arc<PackedMatrix>,
    ) -> PackedWeights {
        let Variant { qkv_bias, qk_norm, no_rope_layers, .. } = &self.config.variant;
        let specs = self.config.base_tensors();
        let vectors = specs.iter().zip(&self.params.tensors).filter(|(spec, _)| spec.shape.len() == 1);
        let mut vectors = vectors.map(|(_, values)| values.clone());
        let mut vector = || vectors.next().expect("params have the config's tensors");
        let mut matrices = matrices.into_iter();
        let mut matrix = || matrices.next().expect("params have the config's tensors");
        let config = self.config;
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
                qkv: matrix(),
                qkv_bias: qkv_bias.then(&mut vector),
                qk_norm: qk_norm.then(|| [vector(), vector()]),
                out: matrix(),
                mlp_norm: vector(),
                gate_up: matrix(),
                down: matrix(),
            })
            .collect();
        PackedWeights { config: config.clone(), embed, layers, norm: vector(), head }
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
