//! Pretrained models: a network from a Hugging Face folder or a GGUF file, with the language in which it is asked.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use language::text::{TextLanguage, TextOptions, Tokenizer, TokenizerParts};
use policy::ModelConfig;
use policy::formats::{Gguf, Pretrained};
use proto::Digest;

use crate::model::known::{is_known, resolve};

/// Worked examples in a prompt, unless a config or an option says otherwise.
pub(crate) const NUM_EXAMPLES: usize = 3;

/// The pretrained model that a run begins with, and the language in which it is asked.
#[derive(Clone)]
pub(crate) struct Base {
    pub(crate) pretrained: Arc<Pretrained>,
    pub(crate) language: Arc<TextLanguage>,
}

impl Base {
    /// Checks that a model is the one that a run begins with, and builds its language.
    ///
    /// - `digest`: of the model's files; `shape`: as the run's config describes it.
    pub(crate) fn new(opened: Opened, digest: Digest, shape: &ModelConfig, options: TextOptions) -> Result<Base> {
        let Opened { pretrained, digest: got } = opened;
        let path = pretrained.path().display();
        ensure!(got == digest, "{path}: expected a model with digest {}, got {}", digest.short(), got.short());
        let own = ModelConfig { max_positions: shape.max_positions, ..pretrained.config().clone() };
        ensure!(own == shape.base(), "model: expected the shape of {path}, got another");
        let longest = pretrained.config().max_positions;
        ensure!(
            shape.max_positions <= longest,
            "model.max_positions: expected up to {longest}, as {path} has, got {}",
            shape.max_positions
        );
        let language = Arc::new(language(&pretrained, options)?);
        Ok(Base { pretrained: Arc::new(pretrained), language })
    }
}

impl fmt::Debug for Base {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.pretrained.path().fmt(formatter)
    }
}

/// A pretrained model with the digest of its files.
pub(crate) struct Opened {
    pub(crate) pretrained: Pretrained,
    pub(crate) digest: Digest,
}

impl Opened {
    /// Opens the model that is named or lies at a path.
    pub(crate) fn named(name_or_path: &str) -> Result<Opened> {
        let path = model_of(Path::new(name_or_path))?.with_context(|| {
            format!(
                "{name_or_path}: expected a pretrained model (a folder with config.json, a GGUF file, or a name from \
                 `autodidact model get`), found none"
            )
        })?;
        Opened::at(&path)
    }

    /// Opens the model at a path.
    pub(crate) fn at(path: &Path) -> Result<Opened> {
        let pretrained = Pretrained::open(path)?;
        let digest = pretrained.digest()?;
        Ok(Opened { pretrained, digest })
    }
}

/// Opens the teacher of a run that begins with `student`, and checks that it is the model with this digest and reads the same tokens.
///
/// - `max_positions`: of the run.
pub(crate) fn teacher(place: &str, digest: Digest, student: &Base, max_positions: usize) -> Result<Arc<Pretrained>> {
    let Opened { pretrained, digest: got } = Opened::named(place)?;
    ensure!(got == digest, "{place}: expected a model with digest {}, got {}", digest.short(), got.short());
    let longest = pretrained.config().max_positions;
    ensure!(max_positions <= longest, "{place}: expected {max_positions} positions or more, got {longest}");
    let [own, other] = [&student.pretrained, &pretrained].map(|model| model.config().vocabulary_size);
    let of_base = student.pretrained.path().display();
    ensure!(own == other, "{place}: expected a teacher with the {own} tokens of {of_base}, got {other}");
    let (own, other) = (tokenizer(&student.pretrained)?, tokenizer(&pretrained)?);
    let is_same =
        |token: &u32| own.bytes(*token) == other.bytes(*token) && own.is_special(*token) == other.is_special(*token);
    if let Some(token) = (0..student.pretrained.config().vocabulary_size as u32).find(|token| !is_same(token)) {
        let [own, other] = [&own, &other].map(|tokenizer| tokenizer.token_name(token));
        bail!(
            "{place}: expected a teacher with the tokens of {of_base}, whose token {token} is {own:?}, got {other:?}"
        );
    }
    Ok(Arc::new(pretrained))
}

/// Returns the file or folder of the pretrained model that is named or lies at a path, if there is one.
pub(crate) fn model_of(named: &Path) -> Result<Option<PathBuf>> {
    if named.is_file() || named.join("config.json").exists() {
        return Ok(Some(named.to_owned()));
    }
    named.to_str().filter(|name| is_known(name)).map(resolve).transpose()
}

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
