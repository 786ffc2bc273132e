use super::kernels::{MatrixView, PackedMatrix, RotaryTable};
use crate::{AttentionShape, ModelConfig, Params, TensorSpec};

/// One version of the weights in the order in which the kernels read them. Shared by all threads that use it.
#[derive(Debug)]
pub(crate) struct PackedWeights {
    pub(crate) config: ModelConfig,
    pub(crate) shape: AttentionShape,
    pub(crate) rotary: RotaryTable,
    pub(crate) embed: Vec<f32>,
    pub(crate) layers: Vec<PackedLayer>,
    pub(crate) norm: Vec<f32>,
    pub(crate) head: Linear,
}

/// One decoder block.
#[derive(Debug)]
pub(crate) struct PackedLayer {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) qkv: Linear,
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
        let specs = config.tensors();
        let mut tensors = specs.iter().zip(&params.tensors);
        let mut next = || tensors.next().expect("params have the config's tensors");
        let linear = |(spec, values): (&TensorSpec, &Vec<f32>)| {
            let (inputs, outputs) = (spec.shape[0], spec.shape[1]);
            let matrix = MatrixView::row_major(values, outputs);
            Linear {
                forward: PackedMatrix::new(matrix, inputs, outputs),
                transposed: transposes.then(|| PackedMatrix::new(matrix.transposed(), outputs, inputs)),
            }
        };
        let embed = next().1.clone();
        let layers = (0..config.num_layers)
            .map(|_| PackedLayer {
                attention_norm: next().1.clone(),
                qkv: linear(next()),
                out: linear(next()),
                mlp_norm: next().1.clone(),
                gate_up: linear(next()),
                down: linear(next()),
            })
            .collect();
        PackedWeights {
            config: config.clone(),
            shape: config.attention_shape(),
            rotary: RotaryTable::new(config.max_positions, config.head_dim()),
            embed,
            layers,
            norm: next().1.clone(),
            head: linear(next()),
        }
    }
}
