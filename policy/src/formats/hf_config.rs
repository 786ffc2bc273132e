//! The network that a folder of Hugging Face describes. Keys and defaults are those of transformers 4 and 5,
//! `configuration_*.py` and `modeling_rope_utils.py`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::source_file::read_small;
use super::{Family, FormatError, StoredType};
use crate::{ModelConfig, RopeScaling, Variant};

/// Longest config; those of real networks have a few kilobytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Longest `tokenizer_config.json`, which may list thousands of tokens.
const TOKENIZER_CONFIG_BYTES_MAX: u64 = 1 << 26;

const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// The configs of a folder.
pub(super) struct Described {
    folder: PathBuf,
    config: Map<String, Value>,
}

impl Described {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`FormatError`] when there is none, or it is no map.
    pub(super) fn read(folder: &Path) -> Result<Described, FormatError> {
        let config = read_map(&folder.join("config.json"))?;
        let config = config.ok_or_else(|| FormatError::broken(folder, "config.json in the folder", "none"))?;
        Ok(Described { folder: folder.to_owned(), config })
    }

    /// Returns the family and the shape of the network. `has_head`: whether there is a tensor of the head.
    ///
    /// # Errors
    /// [`FormatError`] when a key is missing or wrong, or calls for another network than those of [`ModelConfig`].
    pub(super) fn network(&self, has_head: bool) -> Result<(Family, ModelConfig), FormatError> {
        let path = self.folder.join("config.json");
        network(Keys { path: &path, prefix: "", map: &self.config }, has_head)
    }

    /// Returns the tokens at which text ends, by all configs of the folder.
    ///
    /// # Errors
    /// [`FormatError`] when a config is broken.
    pub(super) fn end_tokens(&self) -> Result<Vec<i128>, FormatError> {
        let mut tokens = Vec::new();
        let config_path = self.folder.join("config.json");
        Keys { path: &config_path, prefix: "", map: &self.config }.push_tokens("eos_token_id", &mut tokens)?;
        let path = self.folder.join("generation_config.json");
        if let Some(map) = read_map(&path)? {
            Keys { path: &path, prefix: "", map: &map }.push_tokens("eos_token_id", &mut tokens)?;
        }
        let path = self.folder.join("tokenizer_config.json");
        if let Some(bytes) = read_small(&path, TOKENIZER_CONFIG_BYTES_MAX)? {
            let config: TokenizerConfig = serde_json::from_slice(&bytes)
                .map_err(|error| FormatError::broken(&path, "a tokenizer config in JSON", error.to_string()))?;
            let end = config.eos_token.map(|token| match token {
                NamedToken::Plain(content) | NamedToken::Added(AddedToken { content }) => content,
            });
            let added = config.added_tokens_decoder.into_iter().flatten();
            let ends = added.filter(|(_, token)| Some(&token.content) == end.as_ref());
            tokens.extend(ends.filter_map(|(id, _)| id.parse::<i128>().ok()));
        }
        Ok(tokens)
    }
}

/// Returns a `config.json` that transformers 4 and 5 read: it has the keys of both.
///
/// # Errors
/// [`FormatError::Unsupported`] when the family has no key for what the variant does.
pub(super) fn describe(
    config: &ModelConfig,
    family: Family,
    stored_type: StoredType,
    path: &Path,
) -> Result<Value, FormatError> {
    let ModelConfig { vocabulary_size, max_positions, d_model, num_layers, num_heads, num_kv_heads, ff_dim, .. } =
        *config;
    let Variant { tied_head, rms_norm_eps, rope_theta, rope_scaling, ref no_rope_layers, ref windows, .. } =
        config.variant;
    refuse_inexpressible(config, family, path)?;
    let scaling = rope_scaling.map(|scaling| {
        json!({
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        })
    });
    let mut parameters = scaling.clone().unwrap_or_else(|| json!({"rope_type": "default"}));
    parameters["rope_theta"] = json!(rope_theta);
    let data_type = match stored_type {
        StoredType::F32 => "float32",
        StoredType::Bf16 => "bfloat16",
    };
    // Its shortest form, which is the same number again.
    let epsilon: f64 = rms_norm_eps.to_string().parse().expect("a number is written as one");
    let mut keys = json!({
        "architectures": [architecture(family)],
        "model_type": family.name(),
        "vocab_size": vocabulary_size,
        "hidden_size": d_model,
        "intermediate_size": ff_dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": config.head_dim(),
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": epsilon,
        "rope_theta": rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": parameters,
        "tie_word_embeddings": tied_head,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": true,
        "dtype": data_type,
        "torch_dtype": data_type,
        // Without them transformers takes those of the family's first network.
        "bos_token_id": null,
        "pad_token_id": null,
    });
    if matches!(family, Family::Llama | Family::SmolLm3) {
        keys["mlp_bias"] = json!(false);
    }
    if matches!(family, Family::Llama | Family::SmolLm3 | Family::Qwen3) {
        keys["attention_bias"] = json!(false);
    }
    let window = windows.iter().copied().flatten().next();
    if family != Family::Llama {
        keys["sliding_window"] = json!(window);
    }
    if matches!(family, Family::SmolLm3 | Family::Qwen2 | Family::Qwen3) {
        let types = (0..num_layers).map(|layer| windows.get(layer).copied().flatten().map_or(FULL, |_| SLIDING));
        keys["layer_types"] = types.collect();
        keys["use_sliding_window"] = json!(window.is_some());
    }
    if matches!(family, Family::Qwen2 | Family::Qwen3) {
        keys["max_window_layers"] = json!(windows.iter().position(Option::is_some).unwrap_or(num_layers));
    }
    if family == Family::SmolLm3 {
        keys["no_rope_layers"] = (0..num_layers).map(|layer| u8::from(!no_rope_layers.contains(&layer))).collect();
    }
    Ok(keys)
}

fn refuse_inexpressible(config: &ModelConfig, family: Family, path: &Path) -> Result<(), FormatError> {
    let variant = &config.variant;
    let refuse = |key: &str, expected: &str, got: String| {
        Err(FormatError::unsupported(path, format!("variant.{key} as {expected} in family {family}"), got))
    };
    for (key, has, always) in
        [("qkv_bias", variant.qkv_bias, Family::Qwen2), ("qk_norm", variant.qk_norm, Family::Qwen3)]
    {
        if has != (family == always) {
            return refuse(key, if has { "false" } else { "true" }, has.to_string());
        }
    }
    if family != Family::SmolLm3 && !variant.no_rope_layers.is_empty() {
        return refuse("no_rope_layers", "none", format!("{:?}", variant.no_rope_layers));
    }
    let mut distinct = variant.windows.clone();
    distinct.dedup();
    let is_expressible = match family {
        Family::Llama => variant.windows.iter().all(Option::is_none),
        Family::Mistral => distinct.len() <= 1,
        Family::SmolLm3 | Family::Qwen2 | Family::Qwen3 => {
            let mut sizes = variant.windows.iter().copied().flatten();
            let first = sizes.next();
            sizes.all(|size| Some(size) == first)
        }
    };
    if !is_expressible {
        let expected = match family {
            Family::Llama => "none",
            Family::Mistral => "the same for every layer",
            Family::SmolLm3 | Family::Qwen2 | Family::Qwen3 => "of one size",
        };
        return refuse("windows", expected, format!("{:?}", variant.windows));
    }
    Ok(())
}

fn network(keys: Keys<'_>, has_head: bool) -> Result<(Family, ModelConfig), FormatError> {
    let named = keys.get("model_type").and_then(Value::as_str);
    let family = Family::ALL.into_iter().find(|family| Some(family.name()) == named);
    let family = family.ok_or_else(|| {
        let names = Family::ALL.map(|family| format!("{:?}", family.name())).join(", ");
        keys.refuse("model_type", &format!("one of {names}"))
    })?;
    refuse_other_networks(&keys, family)?;

    let (d_model, num_heads) = (keys.size("hidden_size")?, keys.size("num_attention_heads")?);
    let num_kv_heads = keys.optional_size("num_key_value_heads")?.unwrap_or(num_heads);
    let head_dim = match keys.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
        None if family == Family::Qwen3 => 128,
        None => d_model.checked_div(num_heads).unwrap_or(0),
    };
    let (rope_theta, rope_scaling) = rope(&keys, family)?;
    let tied_by_default = family == Family::SmolLm3;
    let mut config = ModelConfig {
        vocabulary_size: keys.size("vocab_size")?,
        max_positions: keys.size("max_position_embeddings")?.min(crate::config::MAX_POSITIONS),
        d_model,
        num_layers: keys.size("num_hidden_layers")?,
        num_heads,
        num_kv_heads,
        ff_dim: keys.size("intermediate_size")?,
        variant: Variant {
            head_dim: (num_heads.checked_mul(head_dim) != Some(d_model)).then_some(head_dim),
            qkv_bias: family == Family::Qwen2,
            qk_norm: family == Family::Qwen3,
            tied_head: !has_head || keys.truth("tie_word_embeddings")?.unwrap_or(tied_by_default),
            rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope_theta,
            rope_scaling,
            no_rope_layers: Vec::new(),
            windows: Vec::new(),
        },
        adapter: None,
    };
    // Before anything is as long as the config says that the network is deep.
    super::validate(&config, keys.path)?;
    if family == Family::SmolLm3 {
        config.variant.no_rope_layers = no_rope_layers(&keys, config.num_layers)?;
    }
    config.variant.windows = windows(&keys, family, config.num_layers)?;
    super::validate(&config, keys.path)?;
    Ok((family, config))
}

fn refuse_other_networks(keys: &Keys<'_>, family: Family) -> Result<(), FormatError> {
    if let Some(architectures) = keys.get("architectures") {
        let is_ours = |name: &Value| name.as_str().is_some_and(|name| name.eq_ignore_ascii_case(&architecture(family)));
        if !architectures.as_array().is_some_and(|names| names.iter().all(is_ours)) {
            return Err(keys.refuse("architectures", &format!("[{:?}]", architecture(family))));
        }
    }
    if keys.get("hidden_act").is_some_and(|name| name.as_str() != Some("silu")) {
        return Err(keys.refuse("hidden_act", "\"silu\""));
    }
    if keys.get("quantization_config").is_some() {
        return Err(keys.refuse("quantization_config", "none"));
    }
    // Qwen2 has biases of its own, which its config does not mention.
    for key in ["attention_bias", "mlp_bias"] {
        if (family != Family::Qwen2 || key == "mlp_bias") && keys.truth(key)? == Some(true) {
            return Err(keys.refuse(key, "false"));
        }
    }
    Ok(())
}

/// Returns the base of rotary position embedding and its scaling. transformers 4 has `rope_theta` and `rope_scaling`,
/// transformers 5 has `rope_parameters`; what is said twice must be the same.
fn rope(keys: &Keys<'_>, family: Family) -> Result<(f64, Option<RopeScaling>), FormatError> {
    let mut theta = keys.number("rope_theta")?;
    let mut scaling = None;
    keys.refuse_partial_rotation()?;
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(value) = keys.get(key) else { continue };
        let map = value.as_object().ok_or_else(|| keys.broken(key, "a map"))?;
        if map.is_empty() {
            continue;
        }
        let inner = Keys { path: keys.path, prefix: &format!("{key}."), map };
        let own_theta = inner.number("rope_theta")?;
        if theta.is_some() && own_theta.is_some() && theta != own_theta {
            return Err(inner.refuse("rope_theta", "the same as elsewhere in the config"));
        }
        theta = theta.or(own_theta);
        let own_scaling = rope_scaling(&inner, keys)?;
        if scaling.is_some_and(|scaling| scaling != own_scaling) {
            return Err(keys.refuse(key, "the same as rope_parameters"));
        }
        scaling = Some(own_scaling);
    }
    let default_theta = if family == Family::SmolLm3 { 2_000_000.0 } else { 10_000.0 };
    Ok((theta.unwrap_or(default_theta), scaling.flatten()))
}

fn rope_scaling(inner: &Keys<'_>, outer: &Keys<'_>) -> Result<Option<RopeScaling>, FormatError> {
    inner.refuse_partial_rotation()?;
    if let Some((key, _)) = inner.map.iter().find(|(_, value)| value.is_object()) {
        return Err(inner.refuse(key, "none: one rotation for all layers"));
    }
    let key = if inner.get("rope_type").is_some() { "rope_type" } else { "type" };
    match inner.get(key).map(Value::as_str) {
        None | Some(Some("default")) => {
            if inner.number("factor")?.is_some_and(|factor| factor != 1.0) {
                return Err(inner.refuse("factor", "1 or none, without a rope_type"));
            }
            Ok(None)
        }
        Some(Some("llama3")) => {
            let number = |key| inner.number(key)?.ok_or_else(|| inner.broken(key, "a number"));
            let original = "original_max_position_embeddings";
            let original_max_positions = match (inner.optional_size(original)?, outer.optional_size(original)?) {
                (Some(own), Some(other)) if own != other => {
                    return Err(inner.refuse(original, &format!("{other}, as elsewhere in the config")));
                }
                (Some(positions), _) | (None, Some(positions)) => positions,
                (None, None) => outer.size("max_position_embeddings")?,
            };
            Ok(Some(RopeScaling {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_positions,
            }))
        }
        Some(_) => Err(inner.refuse(key, "\"default\" or \"llama3\"")),
    }
}

fn no_rope_layers(keys: &Keys<'_>, num_layers: usize) -> Result<Vec<usize>, FormatError> {
    let Some(listed) = keys.get("no_rope_layers") else {
        let interval = keys.optional_size("no_rope_layer_interval")?.unwrap_or(4);
        if interval == 0 {
            return Err(keys.refuse("no_rope_layer_interval", "1 or more"));
        }
        return Ok((0..num_layers).filter(|layer| (layer + 1).is_multiple_of(interval)).collect());
    };
    let expected = || keys.broken("no_rope_layers", &format!("0 or 1 for each of {num_layers} layers"));
    let flags = listed.as_array().filter(|flags| flags.len() >= num_layers).ok_or_else(expected)?;
    let mut layers = Vec::new();
    for (layer, flag) in flags[..num_layers].iter().enumerate() {
        match flag.as_u64() {
            Some(0) => layers.push(layer),
            Some(1) => {}
            _ => return Err(expected()),
        }
    }
    Ok(layers)
}

/// Returns the window of each layer, or nothing if there is none.
fn windows(keys: &Keys<'_>, family: Family, num_layers: usize) -> Result<Vec<Option<usize>>, FormatError> {
    let window = match family {
        Family::Llama => None,
        Family::Mistral => keys.window(Some(4_096))?,
        Family::SmolLm3 | Family::Qwen2 | Family::Qwen3 if keys.truth("use_sliding_window")? != Some(true) => None,
        Family::SmolLm3 => keys.window(None)?,
        Family::Qwen2 | Family::Qwen3 => keys.window(Some(4_096))?,
    };
    let by_default: Vec<bool> = match family {
        Family::Llama | Family::Mistral => vec![window.is_some(); num_layers],
        Family::Qwen2 | Family::Qwen3 => {
            let first = keys.optional_size("max_window_layers")?.unwrap_or(28);
            (0..num_layers).map(|layer| window.is_some() && layer >= first).collect()
        }
        Family::SmolLm3 => {
            let without_rope = no_rope_layers(keys, num_layers)?;
            (0..num_layers).map(|layer| window.is_some() && without_rope.contains(&layer)).collect()
        }
    };
    let sliding = match keys.get("layer_types") {
        None => by_default,
        Some(listed) => {
            let expected = || keys.broken("layer_types", &format!("{FULL:?} or {SLIDING:?} for {num_layers} layers"));
            let types = listed.as_array().filter(|types| types.len() == num_layers).ok_or_else(expected)?;
            let is_sliding = |name: &Value| match name.as_str() {
                Some(FULL) => Ok(false),
                Some(SLIDING) => Ok(true),
                _ => Err(expected()),
            };
            let sliding = types.iter().map(is_sliding).collect::<Result<Vec<bool>, _>>()?;
            let is_overridden = matches!(family, Family::SmolLm3 | Family::Qwen2 | Family::Qwen3) && window.is_some();
            if !is_overridden && sliding != by_default {
                return Err(keys.refuse("layer_types", "the layers that have a window by the other keys"));
            }
            sliding
        }
    };
    if !sliding.contains(&true) {
        return Ok(Vec::new());
    }
    Ok(sliding.into_iter().map(|sliding| window.filter(|_| sliding)).collect())
}

/// Returns the name that transformers gives the network.
fn architecture(family: Family) -> String {
    let name = match family {
        Family::Llama => "Llama",
        Family::SmolLm3 => "SmolLM3",
        Family::Qwen2 => "Qwen2",
        Family::Qwen3 => "Qwen3",
        Family::Mistral => "Mistral",
    };
    format!("{name}ForCausalLM")
}

fn read_map(path: &Path) -> Result<Option<Map<String, Value>>, FormatError> {
    let Some(bytes) = read_small(path, CONFIG_BYTES_MAX)? else { return Ok(None) };
    let map = serde_json::from_slice(&bytes);
    map.map(Some).map_err(|error| FormatError::broken(path, "a map in JSON", error.to_string()))
}

/// The keys of a config, or of a map in it. A key that is null is as good as absent.
struct Keys<'a> {
    path: &'a Path,
    /// Stands before the keys in messages.
    prefix: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn shown(&self, key: &str) -> String {
        self.get(key).map_or("none".to_owned(), Value::to_string)
    }

    fn refuse(&self, key: &str, expected: &str) -> FormatError {
        FormatError::unsupported(self.path, format!("{}{key} {expected}", self.prefix), self.shown(key))
    }

    fn broken(&self, key: &str, expected: &str) -> FormatError {
        FormatError::broken(self.path, format!("{}{key} as {expected}", self.prefix), self.shown(key))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, FormatError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.map(Some).ok_or_else(|| self.broken(key, "an integer"))
    }

    fn size(&self, key: &str) -> Result<usize, FormatError> {
        self.optional_size(key)?.ok_or_else(|| self.broken(key, "an integer"))
    }

    /// Returns the size of windows, of which null says that there are none.
    fn window(&self, by_default: Option<usize>) -> Result<Option<usize>, FormatError> {
        if self.map.contains_key("sliding_window") { self.optional_size("sliding_window") } else { Ok(by_default) }
    }

    fn number(&self, key: &str) -> Result<Option<f64>, FormatError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.broken(key, "a number"))
    }

    fn truth(&self, key: &str) -> Result<Option<bool>, FormatError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.broken(key, "true or false"))
    }

    fn refuse_partial_rotation(&self) -> Result<(), FormatError> {
        let factor = self.number("partial_rotary_factor")?;
        if factor.is_some_and(|factor| factor != 1.0) {
            return Err(self.refuse("partial_rotary_factor", "1"));
        }
        Ok(())
    }

    /// Adds a token, or each of a list.
    fn push_tokens(&self, key: &str, tokens: &mut Vec<i128>) -> Result<(), FormatError> {
        let listed = match self.get(key) {
            None => &[],
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        for value in listed {
            let token = value.as_i64().ok_or_else(|| self.broken(key, "a token or a list of tokens"))?;
            tokens.push(token.into());
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct TokenizerConfig {
    eos_token: Option<NamedToken>,
    added_tokens_decoder: Option<BTreeMap<String, AddedToken>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum NamedToken {
    Plain(String),
    Added(AddedToken),
}

#[derive(Deserialize)]
struct AddedToken {
    content: String,
}
