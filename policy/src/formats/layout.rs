//! Where the tensors of other formats lie in ours. Theirs are `[outputs, inputs]` and one per projection; ours are
//! `[inputs, outputs]`, and the projections of one input are side by side.

use std::collections::BTreeSet;
use std::path::Path;

use super::stored::Store;
use super::{Family, FormatError};
use crate::{ModelConfig, Params, TensorSpec};

/// A tensor of another format, and its place in [`Params`].
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) name: String,
    /// Of the other format.
    pub(super) shape: Vec<usize>,
    /// Index of our tensor.
    pub(super) tensor: usize,
    place: Place,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// A run of values from `first`, in the same order.
    Run { first: usize },
    /// Columns from `first` of a matrix that is `width` wide, one for each row of the part. `interleaved` is the number of
    /// heads whose rows are to be put back in order, or 0.
    Columns { first: usize, width: usize, interleaved: usize },
}

/// How a format names and orders tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Convention {
    HuggingFace,
    /// `interleaved`: whether the two halves of each query and key head are interleaved.
    Gguf {
        interleaved: bool,
    },
}

/// Our name of each tensor, and for each of its parts the name in Hugging Face folders and in GGUF.
const NAMES: [(&str, &[(&str, &str)]); 12] = [
    ("embed.weight", &[("model.embed_tokens.weight", "token_embd.weight")]),
    ("attention_norm.weight", &[("input_layernorm.weight", "attn_norm.weight")]),
    (
        "attention.qkv.weight",
        &[
            ("self_attn.q_proj.weight", "attn_q.weight"),
            ("self_attn.k_proj.weight", "attn_k.weight"),
            ("self_attn.v_proj.weight", "attn_v.weight"),
        ],
    ),
    (
        "attention.qkv.bias",
        &[
            ("self_attn.q_proj.bias", "attn_q.bias"),
            ("self_attn.k_proj.bias", "attn_k.bias"),
            ("self_attn.v_proj.bias", "attn_v.bias"),
        ],
    ),
    ("attention.q_norm.weight", &[("self_attn.q_norm.weight", "attn_q_norm.weight")]),
    ("attention.k_norm.weight", &[("self_attn.k_norm.weight", "attn_k_norm.weight")]),
    ("attention.out.weight", &[("self_attn.o_proj.weight", "attn_output.weight")]),
    ("mlp_norm.weight", &[("post_attention_layernorm.weight", "ffn_norm.weight")]),
    ("mlp.gate_up.weight", &[("mlp.gate_proj.weight", "ffn_gate.weight"), ("mlp.up_proj.weight", "ffn_up.weight")]),
    ("mlp.down.weight", &[("mlp.down_proj.weight", "ffn_down.weight")]),
    ("norm.weight", &[("model.norm.weight", "output_norm.weight")]),
    ("head.weight", &[("lm_head.weight", "output.weight")]),
];

impl Convention {
    /// Returns the name of the head, which tied networks do without.
    pub(super) fn head_name(self) -> &'static str {
        match self {
            Convention::HuggingFace => "lm_head.weight",
            Convention::Gguf { .. } => "output.weight",
        }
    }

    fn full_name(self, layer: Option<&str>, (hugging_face, gguf): (&str, &str)) -> String {
        match (self, layer) {
            (Convention::HuggingFace, None) => hugging_face.to_owned(),
            (Convention::HuggingFace, Some(layer)) => format!("model.layers.{layer}.{hugging_face}"),
            (Convention::Gguf { .. }, None) => gguf.to_owned(),
            (Convention::Gguf { .. }, Some(layer)) => format!("blk.{layer}.{gguf}"),
        }
    }

    /// Whether a tensor holds nothing that is not also in the config.
    fn is_redundant(self, name: &str) -> bool {
        match self {
            Convention::HuggingFace => name.ends_with("rotary_emb.inv_freq"),
            Convention::Gguf { .. } => name == super::gguf_config::ROPE_DIVISORS,
        }
    }
}

/// Lists the parts of a network in the order of our tensors.
pub(super) fn parts(config: &ModelConfig, convention: Convention) -> Vec<Part> {
    let mut parts = Vec::new();
    for (tensor, spec) in config.base_tensors().into_iter().enumerate() {
        let in_layer = spec.name.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
        let (layer, own_name) = in_layer.map_or((None, spec.name.as_str()), |(layer, name)| (Some(layer), name));
        let (_, names) = NAMES.iter().find(|(name, _)| *name == own_name).expect("every tensor has names elsewhere");
        let shape = config.attention_shape(0);
        let key_dim = shape.num_kv_heads * shape.head_dim;
        let widths = match names.len() {
            3 => vec![shape.queries_dim(), key_dim, key_dim],
            count => vec![spec.shape[spec.shape.len() - 1] / count; count],
        };
        let mut first = 0;
        for ((part, names), width) in names.iter().enumerate().zip(widths) {
            let transposed = spec.shape.len() == 2 && own_name != "embed.weight";
            let interleaved = match (convention, own_name, part) {
                (Convention::Gguf { interleaved: true }, "attention.qkv.weight", 0) => shape.num_heads,
                (Convention::Gguf { interleaved: true }, "attention.qkv.weight", 1) => shape.num_kv_heads,
                _ => 0,
            };
            let (part_shape, place) = if transposed {
                let whole_width = spec.shape[1];
                (vec![width, spec.shape[0]], Place::Columns { first, width: whole_width, interleaved })
            } else if spec.shape.len() == 2 {
                (spec.shape.clone(), Place::Run { first: 0 })
            } else {
                (vec![width], Place::Run { first })
            };
            parts.push(Part { name: convention.full_name(layer, *names), shape: part_shape, tensor, place });
            first += width;
        }
    }
    parts
}

/// Our name of each projection that an adapter changes, and that of Hugging Face.
const PROJECTIONS: [(&str, &str); 7] = [
    ("attention.q", "self_attn.q_proj"),
    ("attention.k", "self_attn.k_proj"),
    ("attention.v", "self_attn.v_proj"),
    ("attention.o", "self_attn.o_proj"),
    ("mlp.gate", "mlp.gate_proj"),
    ("mlp.up", "mlp.up_proj"),
    ("mlp.down", "mlp.down_proj"),
];

/// Returns the modules of transformers that an adapter changes, as PEFT names them.
pub(super) fn target_modules() -> [&'static str; 7] {
    PROJECTIONS.map(|(_, module)| module.rsplit_once('.').map_or(module, |(_, name)| name))
}

/// Lists the tensors of an adapter as PEFT names and orders them. The rows of B are those of the projection, which transformers
/// and we order alike.
pub(super) fn adapter_parts(config: &ModelConfig) -> Vec<Part> {
    let part = |(tensor, spec): (usize, TensorSpec)| {
        let (path, matrix) = match spec.name.strip_suffix(".lora_a.weight") {
            Some(path) => (path, "lora_A"),
            None => (spec.name.strip_suffix(".lora_b.weight").expect("a tensor of an adapter"), "lora_B"),
        };
        let layer_and_name = path.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
        let (layer, own_name) = layer_and_name.expect("a tensor of a block");
        let (_, module) = PROJECTIONS.iter().find(|(name, _)| *name == own_name).expect("every projection has a name");
        let (inputs, outputs) = (spec.shape[0], spec.shape[1]);
        Part {
            name: format!("base_model.model.model.layers.{layer}.{module}.{matrix}.weight"),
            shape: vec![outputs, inputs],
            tensor,
            place: Place::Columns { first: 0, width: outputs, interleaved: 0 },
        }
    };
    config.tensors().into_iter().enumerate().map(part).collect()
}

/// Checks that a file holds the parts of a network, and nothing else.
///
/// # Errors
/// [`FormatError::Broken`] when a part is missing or misshapen, [`FormatError::Unsupported`] when there is another tensor.
pub(super) fn check(
    store: &Store,
    path: &Path,
    (family, convention): (Family, Convention),
    parts: &[Part],
) -> Result<(), FormatError> {
    for part in parts {
        let expected = || format!("tensor {:?} {:?}", part.name, part.shape);
        let stored = store.get(&part.name).ok_or_else(|| FormatError::broken(path, expected(), "none"))?;
        if stored.shape != part.shape {
            return Err(FormatError::broken(store.path_of(stored), expected(), format!("{:?}", stored.shape)));
        }
    }
    let known: BTreeSet<&str> = parts.iter().map(|part| part.name.as_str()).collect();
    let is_known = |name: &str| known.contains(name) || convention.is_redundant(name);
    match store.tensors().find(|(name, _)| !is_known(name)) {
        None => Ok(()),
        Some((name, stored)) => {
            let expected = format!("the tensors of a {family} network alone");
            Err(FormatError::unsupported(store.path_of(stored), expected, format!("tensor {name:?}")))
        }
    }
}

impl Part {
    /// Returns another tensor that is to hold the same.
    pub(super) fn copy_named(&self, name: &str) -> Part {
        Part { name: name.to_owned(), ..self.clone() }
    }

    /// Copies rows of the part, from the index `first_row`, into our tensor. A vector is one row.
    pub(super) fn copy_in(&self, params: &mut Params, first_row: usize, num_columns: usize, rows: &[f32]) {
        let own = &mut params.tensors[self.tensor];
        match self.place {
            Place::Run { first } => {
                let start = first + first_row * num_columns;
                own[start..start + rows.len()].copy_from_slice(rows);
            }
            Place::Columns { first, width, interleaved } => {
                let num_rows = rows.len() / num_columns;
                // Some rows at a time, so that both sides of the transposition stay in the cache.
                for block in (0..num_rows).step_by(BLOCK_ROWS) {
                    let block = block..(block + BLOCK_ROWS).min(num_rows);
                    let outputs: Vec<usize> =
                        block.clone().map(|row| first + self.own_row(first_row + row, interleaved)).collect();
                    for (input, own_row) in own.chunks_exact_mut(width).enumerate() {
                        for (row, output) in block.clone().zip(&outputs) {
                            own_row[*output] = rows[row * num_columns + input];
                        }
                    }
                }
            }
        }
    }

    /// Copies the part out of our tensor, some rows at a time. The rows must be in order.
    pub(super) fn copy_out<E>(&self, params: &Params, mut give: impl FnMut(&[f32]) -> Result<(), E>) -> Result<(), E> {
        let own = &params.tensors[self.tensor];
        match self.place {
            Place::Run { first } => {
                let run = &own[first..first + self.shape.iter().product::<usize>()];
                run.chunks(1 << 18).try_for_each(give)
            }
            Place::Columns { first, width, interleaved } => {
                assert_eq!(interleaved, 0, "only GGUF, which is read alone, interleaves");
                let (num_rows, num_columns) = (self.shape[0], self.shape[1]);
                let mut rows = vec![0.0; BLOCK_ROWS * num_columns];
                for block in (0..num_rows).step_by(BLOCK_ROWS) {
                    let block_rows = BLOCK_ROWS.min(num_rows - block);
                    for (input, own_row) in own.chunks_exact(width).enumerate() {
                        for row in 0..block_rows {
                            rows[row * num_columns + input] = own_row[first + block + row];
                        }
                    }
                    give(&rows[..block_rows * num_columns])?;
                }
                Ok(())
            }
        }
    }

    /// Returns where a row belongs. Heads whose halves are interleaved have the rows 0, w/2, 1, w/2 + 1, and so on.
    fn own_row(&self, row: usize, interleaved: usize) -> usize {
        if interleaved == 0 {
            return row;
        }
        let head_dim = self.shape[0] / interleaved;
        let (head, in_head) = (row / head_dim, row % head_dim);
        head * head_dim + in_head % 2 * (head_dim / 2) + in_head / 2
    }
}

const BLOCK_ROWS: usize = 32;
