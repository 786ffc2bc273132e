//! Pretrained networks, read from the folders of Hugging Face and from GGUF files, and folders written for other programs.
//!
//! [`Pretrained::open`] reads headers alone and checks them against the network that they describe; [`Pretrained::load`] reads
//! the weights. Files are untrusted: nothing panics, and memory is bounded by the size of the files, not by what they say.

mod error;
mod gguf;
mod gguf_config;
mod hf_config;
mod layout;
mod safetensors;
mod source_file;
mod stored;
mod write;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use proto::{Digest, TokenId};

use self::layout::{Convention, Part};
use self::stored::Store;
use crate::{Error, ModelConfig, Params};

pub use error::FormatError;
pub use gguf::Gguf;
pub use write::{Companions, write_hf, write_peft};

/// A family of networks, by the name that Hugging Face gives its architecture.
///
/// ```
/// assert_eq!(policy::formats::Family::SmolLm3.to_string(), "smollm3");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// Llama 2 and 3, SmolLM2.
    Llama,
    /// SmolLM3: some layers do not rotate.
    SmolLm3,
    /// Qwen2 and Qwen2.5: queries, keys and values have biases.
    Qwen2,
    /// Qwen3: queries and keys are normalised.
    Qwen3,
    /// Mistral: every layer may have a window.
    Mistral,
}

/// A type in which weights are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredType {
    /// 32 bits: the same weights are read again.
    F32,
    /// The upper half of F32, rounded to the nearest, ties to even.
    Bf16,
}

/// A pretrained network on the disk, whose headers have been read and checked.
///
/// ```
/// use policy::formats::{Companions, Family, Pretrained, StoredType, write_hf};
///
/// let config = policy::ModelConfig { vocabulary_size: 8, max_positions: 8, d_model: 16, num_layers: 1, num_heads: 1,
///     num_kv_heads: 1, ff_dim: 16, variant: policy::Variant::default(), adapter: None };
/// let params = policy::Params::init(&config, 0);
/// let folder = tempfile::tempdir().unwrap();
/// write_hf(folder.path(), &config, Family::Llama, &params, StoredType::F32, Companions::default()).unwrap();
/// let pretrained = Pretrained::open(folder.path()).unwrap();
/// assert_eq!((pretrained.family(), pretrained.config()), (Family::Llama, &config));
/// assert_eq!(pretrained.load().unwrap(), params);
/// ```
#[derive(Debug)]
pub struct Pretrained {
    path: PathBuf,
    family: Family,
    config: ModelConfig,
    store: Store,
    parts: Vec<Part>,
    /// The name of a head that must equal the embedding, because the network says that they are tied.
    head_copy: Option<&'static str>,
    end_tokens: Vec<TokenId>,
    gguf: Option<Gguf>,
}

impl Pretrained {
    /// Opens a folder of Hugging Face, with `config.json` and safetensors, or a GGUF file.
    ///
    /// # Errors
    /// [`FormatError`] when a file is unreadable, contradicts its format or itself, or describes a network other than those of
    /// [`ModelConfig`].
    pub fn open(path: &Path) -> Result<Pretrained, FormatError> {
        let is_folder =
            path.metadata().map_err(FormatError::io(path, "a folder of Hugging Face or a GGUF file"))?.is_dir();
        if is_folder { Pretrained::open_folder(path) } else { Pretrained::open_gguf(path) }
    }

    fn open_folder(path: &Path) -> Result<Pretrained, FormatError> {
        let described = hf_config::Described::read(path)?;
        let store = safetensors::read_folder(path)?;
        let has_head = store.get(Convention::HuggingFace.head_name()).is_some();
        let (family, config) = described.network(has_head)?;
        let end_tokens = within_vocabulary(described.end_tokens()?, config.vocabulary_size);
        Pretrained::check(path, Convention::HuggingFace, (family, config), store, end_tokens, None)
    }

    fn open_gguf(path: &Path) -> Result<Pretrained, FormatError> {
        let (gguf, store) = gguf::read_file(path)?;
        let (family, config) = gguf_config::read(&gguf, &store, path)?;
        let interleaved = matches!(family, Family::Llama | Family::Mistral | Family::SmolLm3);
        let end_tokens = within_vocabulary(gguf_config::end_tokens(&gguf), config.vocabulary_size);
        Pretrained::check(path, Convention::Gguf { interleaved }, (family, config), store, end_tokens, Some(gguf))
    }

    fn check(
        path: &Path,
        convention: Convention,
        (family, config): (Family, ModelConfig),
        store: Store,
        end_tokens: Vec<TokenId>,
        gguf: Option<Gguf>,
    ) -> Result<Pretrained, FormatError> {
        let parts = layout::parts(&config, convention);
        let head_name = convention.head_name();
        let head_copy = (config.variant.tied_head && store.get(head_name).is_some()).then_some(head_name);
        let mut present = parts.clone();
        present.extend(head_copy.map(|name| parts[0].copy_named(name)));
        layout::check(&store, path, (family, convention), &present)?;
        Ok(Pretrained { path: path.to_owned(), family, config, store, parts, head_copy, end_tokens, gguf })
    }

    /// Returns the shape of the network. `max_positions` is the file's, or the largest that [`ModelConfig`] allows.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns the family of the network.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Returns the tokens at which the files say that text ends, ascending. A tokenizer may know more.
    pub fn end_tokens(&self) -> &[TokenId] {
        &self.end_tokens
    }

    /// Counts the tensors by the type in which they are stored, such as `BF16` or `Q4_1`.
    pub fn stored_types(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for (_, tensor) in self.store.tensors() {
            *counts.entry(stored::type_name(tensor.element_type)).or_default() += 1;
        }
        counts
    }

    /// Returns the size of the files that hold the weights.
    pub fn size_bytes(&self) -> u64 {
        self.store.size_bytes()
    }

    /// Returns the metadata of a GGUF file.
    pub fn gguf(&self) -> Option<&Gguf> {
        self.gguf.as_ref()
    }

    /// Returns the folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lists the files of the network with their names, in order: the GGUF file, or every `.json`, `.jinja` and `.safetensors`
    /// file of the folder that is not hidden.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn files(&self) -> Result<Vec<(String, PathBuf)>, FormatError> {
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if self.gguf.is_some() {
            return Ok(vec![(name(&self.path), self.path.clone())]);
        }
        let reading = || FormatError::io(&self.path, "a readable model");
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(reading())? {
            let path = entry.map_err(reading())?.path();
            let is_part = |extension: &OsStr| ["json", "jinja", "safetensors"].iter().any(|part| extension == *part);
            let name = name(&path);
            // Some systems leave hidden files beside those that they copy, such as `._config.json`.
            if path.extension().is_some_and(is_part) && !name.starts_with('.') && path.is_file() {
                files.push((name, path));
            }
        }
        files.sort();
        Ok(files)
    }

    /// Hashes the [files](Pretrained::files) of the network, those of a folder with their names. Equal files have equal digests
    /// wherever they lie.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn digest(&self) -> Result<Digest, FormatError> {
        if self.gguf.is_some() {
            return digest_of_file(&self.path);
        }
        let parts = self.files()?.into_iter().map(|(name, path)| Ok((name, digest_of_file(&path)?)));
        Ok(Digest::of(&parts.collect::<Result<Vec<_>, FormatError>>()?))
    }

    /// Reads the weights as F32. Beside them, memory holds a few rows at a time.
    ///
    /// # Errors
    /// [`FormatError::Io`]; [`FormatError::Broken`] when a weight is not finite, or a tied network has a head of its own.
    pub fn load(&self) -> Result<Params, FormatError> {
        let mut params = Params::zeros(&self.config);
        for part in &self.parts {
            let stored = self.store.get(&part.name).expect("it was there when the headers were checked");
            self.store.read_rows(stored, |first_row, num_columns, rows| {
                part.copy_in(&mut params, first_row, num_columns, rows);
                Ok(())
            })?;
        }
        if let Some(name) = self.head_copy {
            let stored = self.store.get(name).expect("it was there when the headers were checked");
            let embedding = &params.tensors[0];
            self.store.read_rows(stored, |first_row, num_columns, rows| {
                let start = first_row * num_columns;
                if embedding[start..start + rows.len()] == *rows {
                    return Ok(());
                }
                let expected = format!("tensor {name:?} as the embedding, to which it is tied");
                Err(FormatError::broken(self.store.path_of(stored), expected, "other weights"))
            })?;
        }
        Ok(params)
    }
}

impl Family {
    const ALL: [Family; 5] = [Family::Llama, Family::SmolLm3, Family::Qwen2, Family::Qwen3, Family::Mistral];

    /// Returns the name as it is written in configs.
    fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::SmolLm3 => "smollm3",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Mistral => "mistral",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

fn digest_of_file(path: &Path) -> Result<Digest, FormatError> {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).map_err(FormatError::io(path, "a readable file"))?;
    hasher.update_reader(file).map_err(FormatError::io(path, "a readable file"))?;
    Ok(Digest::from_bytes(*hasher.finalize().as_bytes()))
}

/// Checks the shape that a file describes.
fn validate(config: &ModelConfig, path: &Path) -> Result<(), FormatError> {
    config.validate().map_err(|error| match error {
        Error::Config { key, expected, got } => FormatError::unsupported(path, format!("{key} as {expected}"), got),
        other => FormatError::unsupported(path, "a network of this program", other.to_string()),
    })
}

/// Keeps the tokens of the vocabulary, ascending and once each: others, such as -1, stand for none.
fn within_vocabulary(tokens: Vec<i128>, vocabulary_size: usize) -> Vec<TokenId> {
    let tokens = tokens.into_iter().filter_map(|token| TokenId::try_from(token).ok());
    let mut tokens: Vec<TokenId> = tokens.filter(|token| (*token as usize) < vocabulary_size).collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}
