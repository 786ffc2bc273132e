//! Pretrained models: a network from a Hugging Face folder or a GGUF file, with the language in which it is asked.

use anyhow::{Context as _, Result};
use language::text::{TextLanguage, TextOptions, Tokenizer, TokenizerParts};
use policy::formats::{Gguf, Pretrained};

/// Builds the tokenizer that lies beside the weights.
pub(crate) fn tokenizer(pretrained: &Pretrained) -> Result<Tokenizer> {
    let parts = match pretrained.gguf() {
        Some(gguf) => parts_of(gguf),
        None => TokenizerParts::from_folder(pretrained.path())?,
    };
    Tokenizer::new(parts).with_context(|| pretrained.path().display().to_string())
}

/// Builds the language in which the model is asked.
pub(crate) fn language(pretrained: &Pretrained, options: TextOptions) -> Result<TextLanguage> {
    let (size, ends) = (pretrained.config().vocabulary_size, pretrained.end_tokens());
    let language = TextLanguage::new(tokenizer(pretrained)?, size, ends, options);
    language.with_context(|| pretrained.path().display().to_string())
}

fn parts_of(gguf: &Gguf) -> TokenizerParts {
    let text = |key: &str| gguf.str(key).map(str::to_owned);
    let strings = |key: &str| gguf.strings(key).unwrap_or_default().to_vec();
    // An id or a type that does not fit belongs to no token.
    let token = |key: &str| gguf.u64(key).map(|id| u32::try_from(id).unwrap_or(u32::MAX));
    let types = gguf.ints("tokenizer.ggml.token_type").unwrap_or_default();
    TokenizerParts::Gguf {
        model: text("tokenizer.ggml.model").unwrap_or_default(),
        pre: text("tokenizer.ggml.pre"),
        tokens: strings("tokenizer.ggml.tokens"),
        token_types: types.iter().map(|kind| i32::try_from(*kind).unwrap_or(i32::MAX)).collect(),
        merges: strings("tokenizer.ggml.merges"),
        bos: token("tokenizer.ggml.bos_token_id"),
        eos: token("tokenizer.ggml.eos_token_id"),
        unknown: token("tokenizer.ggml.unknown_token_id"),
        padding: token("tokenizer.ggml.padding_token_id"),
        add_bos: gguf.bool("tokenizer.ggml.add_bos_token"),
        add_space_prefix: gguf.bool("tokenizer.ggml.add_space_prefix"),
        chat_template: text("tokenizer.chat_template"),
    }
}
