//! `model show`: what a pretrained model is, and what it needs.

use anyhow::Result;
use language::Language as _;
use language::text::{Constraint, TextLanguage, TextOptions};
use policy::formats::Pretrained;
use policy::{Adapter, ModelConfig};

use super::known::resolve;
use crate::needs::{playing_bytes, size, training_bytes};
use crate::pretrained;
use crate::report::{count, print, quoted_path};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Hugging Face folder, GGUF file, or the name of a model from `autodidact model get`.
    model: String,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let pretrained = Pretrained::open(&resolve(&args.model)?)?;
    let tokenizer = pretrained::tokenizer(&pretrained)?;
    let shown = Shown {
        num_tokens: tokenizer.vocabulary_size(),
        num_missing_bytes: tokenizer.missing_bytes().len(),
        has_template: tokenizer.chat_template().is_some(),
        language: pretrained::language(
            &pretrained,
            TextOptions { max_reply_tokens: 1, num_examples: 0, constraint: Constraint::None },
        )?,
        pretrained,
    };
    print(&if args.json { shown.json().to_string() } else { shown.text() })
}

/// The rank of the adapter whose memory is shown: that of the preset `smollm2-lora`.
const RANK: usize = 16;
const ADAPTER: Adapter = Adapter { rank: RANK, alpha: 32.0, rslora: false };

struct Shown {
    pretrained: Pretrained,
    language: TextLanguage,
    num_tokens: usize,
    /// Bytes that no token has.
    num_missing_bytes: usize,
    has_template: bool,
}

impl Shown {
    fn text(&self) -> String {
        let Shown { pretrained, language, num_tokens, num_missing_bytes, has_template } = self;
        let config = pretrained.config();
        let ModelConfig { num_layers, d_model, num_heads, num_kv_heads, ff_dim, max_positions, .. } = config;
        let variant = &config.variant;
        let parts = [
            (variant.qkv_bias, "biases on queries, keys and values"),
            (variant.qk_norm, "normalised queries and keys"),
            (variant.tied_head, "tied head"),
            (variant.rope_scaling.is_some(), "scaled rotary embedding"),
            (!variant.no_rope_layers.is_empty(), "layers without rotary embedding"),
            (variant.windows.iter().any(Option::is_some), "sliding windows"),
        ];
        let parts: Vec<&str> = parts.into_iter().filter(|(has, _)| *has).map(|(_, part)| part).collect();
        let parts = if parts.is_empty() { String::new() } else { format!("; {}", parts.join(", ")) };
        let stored: Vec<String> =
            pretrained.stored_types().into_iter().map(|(kind, number)| format!("{number} {kind}")).collect();
        let ends: Vec<String> =
            language.end_tokens().iter().map(|token| format!("{} ({token})", language.token_name(*token))).collect();
        let missing = match num_missing_bytes {
            0 => String::new(),
            number => format!("; {number} bytes have no token and are dropped from prompts"),
        };
        let template = if *has_template { "its own" } else { "none: asked as \"Question: ... Answer:\"" };
        let weights = 4.0 * config.num_parameters() as f64 / 1e9;
        let loading = 2.0 * weights;
        let cache = config.cache_bytes() / max_positions;
        format!(
            "{}\n\
             family         {}, {} parameters, {num_layers} layers of width {d_model} and {ff_dim}, {num_heads} heads of {} \
             ({num_kv_heads} for keys and values){parts}\n\
             positions      up to {max_positions}\n\
             stored         {:.1} MB, tensors: {}\n\
             tokenizer      {num_tokens} tokens{missing}\n\
             chat template  {template}\n\
             end tokens     {}\n\
             to play        {weights:.2} GB for the weights as f32, {loading:.2} GB while they load, and {:.1} kB per token of \
             every sequence\n\
             to train       {} at least for all weights, {} for an adapter of rank {RANK}; activations and caches on top\n\
             try it         autodidact solve {} \"3 7 25 -> 82\"",
            pretrained.path().display(),
            pretrained.family(),
            count(config.num_parameters() as f64),
            config.head_dim(),
            pretrained.size_bytes() as f64 / 1e6,
            stored.join(", "),
            ends.join(", "),
            cache as f64 / 1e3,
            size(self.bytes_to_train(None)),
            size(self.bytes_to_train(Some(ADAPTER))),
            quoted_path(pretrained.path()),
        )
    }

    /// Returns the least bytes in which one process with one thread trains the model, or an adapter, and plays.
    fn bytes_to_train(&self, adapter: Option<Adapter>) -> u64 {
        let config = ModelConfig { adapter, ..self.pretrained.config().clone() };
        // With an adapter, learner and actor share the weights.
        let of_actor = if adapter.is_some() { 0 } else { playing_bytes(&config) };
        training_bytes(&config, 1, 2) + of_actor
    }

    fn json(&self) -> serde_json::Value {
        let Shown { pretrained, language, num_tokens, num_missing_bytes, has_template } = self;
        let config = pretrained.config();
        serde_json::json!({
            "path": pretrained.path(),
            "family": pretrained.family().to_string(),
            "num_parameters": config.num_parameters(),
            "config": config,
            "size_bytes": pretrained.size_bytes(),
            "stored_types": pretrained.stored_types(),
            "num_tokens": num_tokens,
            "num_missing_bytes": num_missing_bytes,
            "has_chat_template": has_template,
            "end_tokens": language.end_tokens(),
            "weights_bytes": 4 * config.num_parameters(),
            "training_bytes": self.bytes_to_train(None),
            "adapter_training_bytes": self.bytes_to_train(Some(ADAPTER)),
            "cache_bytes_per_token": config.cache_bytes() / config.max_positions,
        })
    }
}
