use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::Error;

/// The shape of the network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Query heads; `d_model / num_heads` is the head width, a multiple of 16.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads` (grouped-query attention, Ainslie et al. 2023).
    pub num_kv_heads: usize,
    /// Width of the SwiGLU layer; a multiple of 16.
    pub ff_dim: usize,
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
}

impl AttentionShape {
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
        if !(1..=1 << 20).contains(&self.vocabulary_size) {
            return refuse("vocabulary_size", "1 to 1048576", self.vocabulary_size);
        }
        if !(8..=4_096).contains(&self.max_positions) {
            return refuse("max_positions", "8 to 4096", self.max_positions);
        }
        if !multiple_of_16(self.d_model) || self.d_model > 8_192 {
            return refuse("d_model", "a multiple of 16 up to 8192", self.d_model);
        }
        if !(1..=128).contains(&self.num_layers) {
            return refuse("num_layers", "1 to 128", self.num_layers);
        }
        if self.num_heads == 0 || !self.d_model.is_multiple_of(self.num_heads) || !multiple_of_16(self.head_dim()) {
            return refuse(
                "num_heads",
                "a divisor of d_model such that the head width is a multiple of 16",
                self.num_heads,
            );
        }
        if self.num_kv_heads == 0 || !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return refuse("num_kv_heads", "a divisor of num_heads", self.num_kv_heads);
        }
        if !multiple_of_16(self.ff_dim) || self.ff_dim > 65_536 {
            return refuse("ff_dim", "a multiple of 16 up to 65536", self.ff_dim);
        }
        Ok(())
    }

    /// Returns the width of a head.
    pub fn head_dim(&self) -> usize {
        self.d_model / self.num_heads
    }

    /// Returns the shape of the attention layers.
    pub fn attention_shape(&self) -> AttentionShape {
        AttentionShape { num_heads: self.num_heads, num_kv_heads: self.num_kv_heads, head_dim: self.head_dim() }
    }

    /// Lists the weight tensors in the order of [`crate::Params`].
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut specs = vec![("embed.weight".to_owned(), vec![self.vocabulary_size, self.d_model])];
        for layer in 0..self.num_layers {
            let mut add = |name: &str, shape: &[usize]| specs.push((format!("layers.{layer}.{name}"), shape.to_vec()));
            add("attention_norm.weight", &[self.d_model]);
            add("attention.qkv.weight", &[self.d_model, self.attention_shape().qkv_dim()]);
            add("attention.out.weight", &[self.d_model, self.d_model]);
            add("mlp_norm.weight", &[self.d_model]);
            add("mlp.gate_up.weight", &[self.d_model, 2 * self.ff_dim]);
            add("mlp.down.weight", &[self.ff_dim, self.d_model]);
        }
        specs.push(("norm.weight".to_owned(), vec![self.d_model]));
        specs.push(("head.weight".to_owned(), vec![self.d_model, self.vocabulary_size]));
        specs.into_iter().map(|(name, shape)| TensorSpec { name, shape }).collect()
    }

    /// Returns the number of weights.
    pub fn num_parameters(&self) -> usize {
        self.tensors().iter().map(TensorSpec::num_elements).sum()
    }
}

impl TensorSpec {
    /// Returns the number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}
