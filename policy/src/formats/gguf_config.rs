//! The network that a GGUF file describes. Source: llama.cpp, `src/models` and `conversion`.

use std::path::Path;

use candle_core::quantized::GgmlDType;

use super::gguf::Gguf;
use super::stored::Store;
use super::{Family, FormatError};
use crate::{ModelConfig, RopeScaling, Variant};

/// The tensor by whose elements the frequencies of rotary position embedding are divided.
pub(super) const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// Keys after the architecture's name, with a value at which they change nothing.
const NEUTRAL: [(&str, f64); 13] = [
    ("expert_count", 0.0),
    ("attention.scale", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.temperature_scale", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 0.0),
    ("residual_scale", 0.0),
    ("embedding_scale", 0.0),
    ("rope.scaling.attn_factor", 1.0),
    ("rope.scaling.yarn_ext_factor", 0.0),
    ("rope.scaling.yarn_attn_factor", 1.0),
];

/// Returns the family and the shape of the network.
///
/// # Errors
/// [`FormatError`] when a key is missing or wrong, or calls for another network than those of [`ModelConfig`].
pub(super) fn read(gguf: &Gguf, store: &Store, path: &Path) -> Result<(Family, ModelConfig), FormatError> {
    let keys = Keys { gguf, path, architecture: gguf.str("general.architecture").unwrap_or_default() };
    let family = match keys.architecture {
        "llama" => Family::Llama,
        "smollm3" => Family::SmolLm3,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        _ => {
            let expected = "general.architecture \"llama\", \"smollm3\", \"qwen2\" or \"qwen3\"";
            return Err(FormatError::unsupported(path, expected, gguf.shown("general.architecture")));
        }
    };
    if gguf.contains("general.type") && gguf.str("general.type") != Some("model") {
        return Err(FormatError::unsupported(path, "general.type \"model\"", gguf.shown("general.type")));
    }
    if gguf.contains("split.count") && gguf.u64("split.count").is_none_or(|count| count > 1) {
        return Err(FormatError::unsupported(path, "split.count 1, a single file", gguf.shown("split.count")));
    }
    keys.refuse_other_networks()?;

    let vocabulary_size = store.get("token_embd.weight").and_then(|tensor| tensor.shape.first().copied());
    let vocabulary_size =
        vocabulary_size.ok_or_else(|| FormatError::broken(path, "tensor \"token_embd.weight\"", "none"))?;
    let (d_model, num_heads) = (keys.size("embedding_length")?, keys.size("attention.head_count")?);
    let num_kv_heads = keys.optional_size("attention.head_count_kv")?.unwrap_or(num_heads);
    let head_dim = match keys.optional_size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None => d_model.checked_div(num_heads).unwrap_or(0),
    };
    for key in ["attention.value_length", "rope.dimension_count"] {
        if keys.optional_size(key)?.is_some_and(|width| width != head_dim) {
            return Err(keys.refuse(key, &format!("{head_dim}, the width of a head")));
        }
    }
    for (key, count) in [
        (keys.full("vocab_size"), keys.optional_size("vocab_size")?),
        ("tokenizer.ggml.tokens".to_owned(), gguf.strings("tokenizer.ggml.tokens").map(<[_]>::len)),
    ] {
        if let Some(count) = count.filter(|count| *count != vocabulary_size) {
            let expected = format!("{vocabulary_size} tokens in {key}, as in \"token_embd.weight\"");
            return Err(FormatError::broken(path, expected, count.to_string()));
        }
    }
    let num_layers = keys.size("block_count")?;
    let window = keys.optional_size("attention.sliding_window")?.filter(|window| *window > 0);
    // The files of Mistral are "llama", and are alone in that with a window, which is that of every layer.
    let family = match window {
        None => family,
        Some(_) if family == Family::Llama && !keys.contains("attention.sliding_window_pattern") => Family::Mistral,
        Some(_) => return Err(keys.refuse("attention.sliding_window", "none or 0")),
    };
    let mut variant = Variant {
        head_dim: (num_heads.checked_mul(head_dim) != Some(d_model)).then_some(head_dim),
        qkv_bias: family == Family::Qwen2,
        qk_norm: family == Family::Qwen3,
        tied_head: store.get("output.weight").is_none(),
        rms_norm_eps: keys.number("attention.layer_norm_rms_epsilon")? as f32,
        rope_theta: if keys.contains("rope.freq_base") { keys.number("rope.freq_base")? } else { 10_000.0 },
        rope_scaling: None,
        no_rope_layers: Vec::new(),
        windows: Vec::new(),
    };
    let max_positions = keys.size("context_length")?.min(crate::config::MAX_POSITIONS);
    let ff_dim = keys.size("feed_forward_length")?;
    let config = |variant| ModelConfig {
        vocabulary_size,
        max_positions,
        d_model,
        num_layers,
        num_heads,
        num_kv_heads,
        ff_dim,
        variant,
        adapter: None,
    };
    // Before anything is as long as the file says that the network is deep or wide.
    super::validate(&config(variant.clone()), path)?;
    variant.rope_scaling = rope_scaling(&variant, head_dim, store, path)?;
    if family == Family::SmolLm3 {
        variant.no_rope_layers = (0..num_layers).filter(|layer| layer % 4 == 3).collect();
    }
    if window.is_some() {
        variant.windows = vec![window; num_layers];
    }
    Ok((family, config(variant)))
}

/// Returns the tokens at which text ends.
pub(super) fn end_tokens(gguf: &Gguf) -> Vec<i128> {
    let ends = ["eos", "eot", "eom"].map(|name| gguf.u64(&format!("tokenizer.ggml.{name}_token_id")));
    ends.into_iter().flatten().map(i128::from).collect()
}

/// Recovers the scaling whose divisors the file holds.
///
/// # Errors
/// [`FormatError::Unsupported`] when they are not those of Llama 3.1 or 3.2.
fn rope_scaling(
    variant: &Variant,
    head_dim: usize,
    store: &Store,
    path: &Path,
) -> Result<Option<RopeScaling>, FormatError> {
    let Some(stored) = store.get(ROPE_DIVISORS) else { return Ok(None) };
    if stored.shape != [head_dim / 2] || stored.element_type != GgmlDType::F32 {
        let expected = format!("tensor {ROPE_DIVISORS:?} as F32 [{}]", head_dim / 2);
        return Err(FormatError::broken(path, expected, format!("{:?} {:?}", stored.element_type, stored.shape)));
    }
    let mut divisors = Vec::new();
    store.read_rows(stored, |_, _, values| {
        divisors.extend_from_slice(values);
        Ok(())
    })?;
    let standard =
        |factor| RopeScaling { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_positions: 8_192 };
    let plain = variant.rope_frequencies(head_dim);
    for scaling in [None, Some(standard(8.0)), Some(standard(32.0))] {
        let scaled = Variant { rope_scaling: scaling, ..variant.clone() }.rope_frequencies(head_dim);
        let is_close = |((plain, scaled), divisor): ((&f64, &f64), &f32)| {
            (f64::from(*divisor) * scaled / plain - 1.0).abs() <= 1e-4
        };
        if plain.iter().zip(&scaled).zip(&divisors).all(is_close) {
            return Ok(scaling);
        }
    }
    let expected = format!("{ROPE_DIVISORS:?} of the llama3 scaling by 8 or 32 of 8192 positions");
    Err(FormatError::unsupported(path, expected, format!("{divisors:?}")))
}

/// The keys of the file's architecture.
struct Keys<'a> {
    gguf: &'a Gguf,
    path: &'a Path,
    architecture: &'a str,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn contains(&self, key: &str) -> bool {
        self.gguf.contains(&self.full(key))
    }

    fn refuse(&self, key: &str, expected: &str) -> FormatError {
        let key = self.full(key);
        FormatError::unsupported(self.path, format!("{key} {expected}"), self.gguf.shown(&key))
    }

    fn broken(&self, key: &str, expected: &str) -> FormatError {
        let key = self.full(key);
        FormatError::broken(self.path, format!("{key} as {expected}"), self.gguf.shown(&key))
    }

    fn size(&self, key: &str) -> Result<usize, FormatError> {
        let value = self.gguf.u64(&self.full(key)).and_then(|value| usize::try_from(value).ok());
        value.ok_or_else(|| self.broken(key, "an integer"))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, FormatError> {
        self.contains(key).then(|| self.size(key)).transpose()
    }

    fn number(&self, key: &str) -> Result<f64, FormatError> {
        self.gguf.f64(&self.full(key)).ok_or_else(|| self.broken(key, "a number"))
    }

    fn refuse_other_networks(&self) -> Result<(), FormatError> {
        for (key, neutral) in NEUTRAL {
            if self.contains(key) && self.number(key)? != neutral {
                return Err(self.refuse(key, &format!("{neutral} or none")));
            }
        }
        for (key, neutral) in [("attention.causal", true), ("use_parallel_residual", false)] {
            if self.contains(key) && self.gguf.bool(&self.full(key)) != Some(neutral) {
                return Err(self.refuse(key, &format!("{neutral} or none")));
            }
        }
        let scaling_type = self.gguf.str(&self.full("rope.scaling.type"));
        if self.contains("rope.scaling.type") && !matches!(scaling_type, Some("none" | "linear")) {
            return Err(self.refuse("rope.scaling.type", "\"none\", or \"linear\" by 1"));
        }
        for key in ["rope.scaling.factor", "rope.scale_linear"] {
            let is_read = scaling_type != Some("none") && self.contains(key);
            if is_read && ![0.0, 1.0].contains(&self.number(key)?) {
                return Err(self.refuse(key, "1 or none"));
            }
        }
        Ok(())
    }
}
