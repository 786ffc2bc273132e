use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::adapter::{AdaptedMatrix, Adapter, Projection};

/// Longest sequence of any network. Pretrained networks for longer ones are cut to it.
pub(crate) const MAX_POSITIONS: usize = 1 << 17;
/// Most heads of any network.
const MAX_HEADS: usize = 512;
/// Widest head of any network.
const MAX_HEAD_DIM: usize = 512;

/// The shape of the network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Number of token ids.
    pub vocabulary_size: usize,
    /// Longest sequence, prompt and answer.
    pub max_positions: usize,
    /// Width of the residual stream; a multiple of 16.
    pub d_model: usize,
    /// Decoder blocks.
    pub num_layers: usize,
    /// Query heads. `d_model / num_heads` is the head width, a multiple of 16, unless the variant has its own.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads` (grouped-query attention, Ainslie et al. 2023).
    pub num_kv_heads: usize,
    /// Width of the SwiGLU layer; a multiple of 16.
    pub ff_dim: usize,
    /// How the decoder differs from that of a network from random weights.
    #[serde(default, skip_serializing_if = "Variant::is_plain")]
    pub variant: Variant,
    /// The adapter that is trained in place of the network's weights, which are then frozen; absent if they are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<Adapter>,
}

/// How the decoders of pretrained families differ from ours, and from each other. The default is the decoder of networks from
/// random weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Variant {
    /// Width of a head, a multiple of 16, if it is not `d_model / num_heads` (Qwen3).
    pub head_dim: Option<usize>,
    /// Whether queries, keys and values have biases (Qwen2).
    pub qkv_bias: bool,
    /// Whether every query and key head is normalised before it is rotated (Qwen3).
    pub qk_norm: bool,
    /// Whether the head is the transpose of the embedding, so that there is no tensor of its own.
    pub tied_head: bool,
    /// Added to the mean square of a row before it is normalised; over 0.
    pub rms_norm_eps: f32,
    /// Base of the wave lengths of rotary position embedding; over 1.
    pub rope_theta: f64,
    /// Stretches the longer wave lengths (Llama 3.1).
    pub rope_scaling: Option<RopeScaling>,
    /// Layers whose queries and keys are not rotated (SmolLM3), ascending, from 0.
    pub no_rope_layers: Vec<usize>,
    /// By layer, how many positions a row sees at most, its own included (Mistral). Empty if no layer is limited.
    pub windows: Vec<Option<usize>>,
}

/// The "llama3" scaling of rotary position embedding. Source: `_compute_llama3_parameters` of Hugging Face transformers 5.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeScaling {
    /// Factor of wave lengths over `original_max_positions / low_freq_factor`; 1 or more.
    pub factor: f64,
    /// Where the longest wave lengths begin; over 0.
    pub low_freq_factor: f64,
    /// Where the shortest wave lengths end, which are not stretched; over `low_freq_factor`.
    pub high_freq_factor: f64,
    /// Longest sequence before scaling.
    pub original_max_positions: usize,
}

impl Default for Variant {
    fn default() -> Variant {
        Variant {
            head_dim: None,
            qkv_bias: false,
            qk_norm: false,
            tied_head: false,
            rms_norm_eps: 1e-6,
            rope_theta: 10_000.0,
            rope_scaling: None,
            no_rope_layers: Vec::new(),
            windows: Vec::new(),
        }
    }
}

impl Variant {
    /// Whether this is the decoder of networks from random weights.
    pub fn is_plain(&self) -> bool {
        *self == Variant::default()
    }

    /// Returns the angles, in radians per position, by which the pairs of a head's elements are rotated.
    pub fn rope_frequencies(&self, head_dim: usize) -> Vec<f64> {
        let half = head_dim / 2;
        let plain = |index: usize| libm::pow(self.rope_theta, -(index as f64) / half as f64);
        (0..half).map(|index| self.rope_scaling.map_or(plain(index), |scaling| scaling.scaled(plain(index)))).collect()
    }
}

impl RopeScaling {
    fn scaled(&self, frequency: f64) -> f64 {
        let RopeScaling { factor, low_freq_factor, high_freq_factor, original_max_positions } = *self;
        let cycles = original_max_positions as f64 * frequency / (2.0 * std::f64::consts::PI);
        if cycles > high_freq_factor {
            frequency
        } else if cycles < low_freq_factor {
            frequency / factor
        } else {
            let unstretched = (cycles - low_freq_factor) / (high_freq_factor - low_freq_factor);
            (1.0 - unstretched) * frequency / factor + unstretched * frequency
        }
    }
}

/// The shape of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head, a multiple of 16.
    pub head_dim: usize,
    /// How many positions a row sees at most, its own included.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// Returns the width of the queries in a row, and of the attended values.
    pub fn queries_dim(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Returns the positions that a row sees: its own and those before it, as far as the window reaches.
    pub fn seen_by(&self, position: usize) -> Range<usize> {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1
    }

    /// Returns the width of a packed row: queries, then keys, then values.
    pub fn qkv_dim(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// Returns the query heads that share a key-value head.
    pub fn heads_of(&self, kv_head: usize) -> Range<usize> {
        let per_kv_head = self.num_heads / self.num_kv_heads;
        kv_head * per_kv_head..(kv_head + 1) * per_kv_head
    }

    /// Returns the offset of a key-value head's keys in a packed row.
    pub fn key_offset(&self, kv_head: usize) -> usize {
        (self.num_heads + kv_head) * self.head_dim
    }

    /// Returns the offset of a key-value head's values in a packed row.
    pub fn value_offset(&self, kv_head: usize) -> usize {
        (self.num_heads + self.num_kv_heads + kv_head) * self.head_dim
    }
}

/// Name and shape of one weight tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in checkpoints.
    pub name: String,
    /// Linear layers are `[inputs, outputs]`.
    pub shape: Vec<usize>,
}

impl ModelConfig {
    /// Checks that the shape is valid.
    ///
    /// # Errors
    /// [`Error::Config`] names the first key that does not fit.
    pub fn validate(&self) -> Result<(), Error> {
        let refuse = |key, expected: &str, got: usize| {
            Err(Error::Config { key, expected: expected.to_owned(), got: got.to_string() })
        };
        let multiple_of_16 = |value: usize| value > 0 && value.is_multiple_of(16);
        let Variant { head_dim, rms_norm_eps, rope_theta, ref no_rope_layers, ref windows, .. } = self.variant;
        if !(1..=1 << 20).contains(&self.vocabulary_size) {
            return refuse("vocabulary_size", "1 to 1048576", self.vocabulary_size);
        }
        if !(8..=MAX_POSITIONS).contains(&self.max_positions) {
            return refuse("max_positions", &format!("8 to {MAX_POSITIONS}"), self.max_positions);
        }
        if !multiple_of_16(self.d_model) || self.d_model > 8_192 {
            return refuse("d_model", "a multiple of 16 up to 8192", self.d_model);
        }
        if !(1..=128).contains(&self.num_layers) {
            return refuse("num_layers", "1 to 128", self.num_layers);
        }
        let divides = head_dim.is_some() || self.d_model.is_multiple_of(self.num_heads.max(1));
        if !(1..=MAX_HEADS).contains(&self.num_heads) || !divides || !multiple_of_16(self.head_dim()) {
            return refuse(
                "num_heads",
                "a divisor of d_model such that the head width is a multiple of 16",
                self.num_heads,
            );
        }
        if self.head_dim() > MAX_HEAD_DIM {
            return refuse("variant.head_dim", &format!("a multiple of 16 up to {MAX_HEAD_DIM}"), self.head_dim());
        }
        if self.num_kv_heads == 0 || !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return refuse("num_kv_heads", "a divisor of num_heads", self.num_kv_heads);
        }
        if !multiple_of_16(self.ff_dim) || self.ff_dim > 65_536 {
            return refuse("ff_dim", "a multiple of 16 up to 65536", self.ff_dim);
        }
        if let Some(layer) = no_rope_layers.iter().find(|layer| **layer >= self.num_layers) {
            return refuse("variant.no_rope_layers", "layers of the network", *layer);
        }
        if !windows.is_empty() && windows.len() != self.num_layers || windows.contains(&Some(0)) {
            return refuse("variant.windows", "a window of 1 or more, or none, for each layer", windows.len());
        }
        let is_legal = |value: f64, above: f64| value.is_finite() && value > above;
        let wrong = |key, expected: &str, got: f64| {
            Err(Error::Config { key, expected: expected.to_owned(), got: got.to_string() })
        };
        if !is_legal(rms_norm_eps.into(), 0.0) {
            return wrong("variant.rms_norm_eps", "a number over 0", rms_norm_eps.into());
        }
        if !is_legal(rope_theta, 1.0) {
            return wrong("variant.rope_theta", "a number over 1", rope_theta);
        }
        if let Some(RopeScaling { factor, low_freq_factor, high_freq_factor, .. }) = self.variant.rope_scaling {
            let legal = factor >= 1.0 && is_legal(low_freq_factor, 0.0) && is_legal(high_freq_factor, low_freq_factor);
            if !legal || !factor.is_finite() {
                return wrong("variant.rope_scaling", "a factor of 1 or more, and ascending bounds over 0", factor);
            }
        }
        self.adapter.as_ref().map_or(Ok(()), Adapter::validate)
    }

    /// Returns the width of a head.
    pub fn head_dim(&self) -> usize {
        self.variant.head_dim.unwrap_or(self.d_model / self.num_heads.max(1))
    }

    /// Returns the shape of a layer's attention.
    pub fn attention_shape(&self, layer: usize) -> AttentionShape {
        AttentionShape {
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim(),
            window: self.variant.windows.get(layer).copied().flatten(),
        }
    }

    /// Returns the config of the network without its adapter.
    pub fn base(&self) -> ModelConfig {
        ModelConfig { adapter: None, ..self.clone() }
    }

    /// Lists the tensors that are trained, stored and sent, in the order of [`crate::Params`]: those of the adapter alone, if
    /// there is one.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let Some(Adapter { rank, .. }) = self.adapter else { return self.base_tensors() };
        let mut specs = Vec::new();
        for layer in 0..self.num_layers {
            for AdaptedMatrix { inputs, projections, .. } in self.adapted_matrices() {
                for Projection { name, columns } in projections {
                    let mut add = |part: &str, shape: [usize; 2]| {
                        let name = format!("layers.{layer}.{name}.{part}.weight");
                        specs.push(TensorSpec { name, shape: shape.to_vec() });
                    };
                    add("lora_a", [inputs, rank]);
                    add("lora_b", [rank, columns.len()]);
                }
            }
        }
        specs
    }

    /// Lists the matrices of a block that an adapter changes, in the order of [`ModelConfig::base_tensors`].
    pub(crate) fn adapted_matrices(&self) -> [AdaptedMatrix; 4] {
        let shape = self.attention_shape(0);
        let (queries, keys, values) = (shape.queries_dim(), shape.value_offset(0), shape.qkv_dim());
        let (width, ff_dim) = (self.d_model, self.ff_dim);
        let matrix = |name, inputs, outputs, projections: &[(&'static str, Range<usize>)]| {
            let projection =
                |(name, columns): &(&'static str, Range<usize>)| Projection { name, columns: columns.clone() };
            AdaptedMatrix { name, inputs, outputs, projections: projections.iter().map(projection).collect() }
        };
        let attention = [("attention.q", 0..queries), ("attention.k", queries..keys), ("attention.v", keys..values)];
        [
            matrix("attention.qkv.weight", width, values, &attention),
            matrix("attention.out.weight", queries, width, &[("attention.o", 0..width)]),
            matrix("mlp.gate_up.weight", width, 2 * ff_dim, &[("mlp.gate", 0..ff_dim), ("mlp.up", ff_dim..2 * ff_dim)]),
            matrix("mlp.down.weight", ff_dim, width, &[("mlp.down", 0..width)]),
        ]
    }

    /// Lists the tensors of the network without an adapter. If there is one, these are frozen.
    pub fn base_tensors(&self) -> Vec<TensorSpec> {
        let Variant { qkv_bias, qk_norm, tied_head, .. } = self.variant;
        let mut specs = vec![("embed.weight".to_owned(), vec![self.vocabulary_size, self.d_model])];
        for layer in 0..self.num_layers {
            let shape = self.attention_shape(layer);
            let mut add = |name: &str, shape: &[usize]| specs.push((format!("layers.{layer}.{name}"), shape.to_vec()));
            add("attention_norm.weight", &[self.d_model]);
            add("attention.qkv.weight", &[self.d_model, shape.qkv_dim()]);
            if qkv_bias {
                add("attention.qkv.bias", &[shape.qkv_dim()]);
            }
            if qk_norm {
                add("attention.q_norm.weight", &[shape.head_dim]);
                add("attention.k_norm.weight", &[shape.head_dim]);
            }
            add("attention.out.weight", &[shape.queries_dim(), self.d_model]);
            add("mlp_norm.weight", &[self.d_model]);
            add("mlp.gate_up.weight", &[self.d_model, 2 * self.ff_dim]);
            add("mlp.down.weight", &[self.ff_dim, self.d_model]);
        }
        specs.push(("norm.weight".to_owned(), vec![self.d_model]));
        if !tied_head {
            specs.push(("head.weight".to_owned(), vec![self.d_model, self.vocabulary_size]));
        }
        specs.into_iter().map(|(name, shape)| TensorSpec { name, shape }).collect()
    }

    /// Returns the bytes that the keys and values of one sequence take on the CPU.
    pub fn cache_bytes(&self) -> usize {
        2 * self.num_layers * self.num_kv_heads * self.head_dim() * self.max_positions * size_of::<f32>()
    }

    /// Returns the number of weights, frozen ones included.
    pub fn num_parameters(&self) -> usize {
        let num_frozen = self.adapter.map_or(0, |_| self.base().num_trained());
        num_frozen + self.num_trained()
    }

    /// Returns the number of weights that are trained.
    pub fn num_trained(&self) -> usize {
        self.tensors().iter().map(TensorSpec::num_elements).sum()
    }
}

impl TensorSpec {
    /// Returns the number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}
