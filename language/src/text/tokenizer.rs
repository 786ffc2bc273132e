//! What text is as tokens, and what tokens are as bytes.

mod gguf;
mod hugging_face;
mod spelling;
mod written;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::Path;

use proto::TokenId;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizer::Range as Slice;
use tokenizers::{
    AddedToken, AddedVocabulary, Model, Normalizer, NormalizerWrapper, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Token,
};

use self::spelling::Spelling;
use super::MAX_TEXT_BYTES;
use crate::Error;

/// The largest vocabulary that is read.
const MAX_VOCABULARY: usize = 1 << 20;

/// A tokenizer of a pretrained model: byte-pair encoding of bytes, or of characters with bytes to fall back on.
pub struct Tokenizer {
    model: BPE,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    /// Finds all added tokens in a text.
    added: AddedVocabulary,
    /// Finds only those that are not special.
    ordinary: AddedVocabulary,
    /// The bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// Where the bytes of each token end.
    ends: Vec<usize>,
    special: BTreeMap<String, TokenId>,
    is_special: Vec<bool>,
    /// The strings of all added tokens, special or not.
    added_strings: BTreeSet<String>,
    missing_bytes: Vec<u8>,
    named: BTreeMap<String, String>,
    add_bos: Option<bool>,
    chat_template: Option<String>,
}

/// What a tokenizer is built from.
#[derive(Clone, Debug)]
pub enum TokenizerParts {
    /// The files of a model in the format of Hugging Face.
    HuggingFace {
        /// `tokenizer.json`.
        tokenizer_json: Vec<u8>,
        /// `tokenizer_config.json`: the special tokens that have a name, and the chat template.
        tokenizer_config: Option<Vec<u8>>,
        /// `chat_template.jinja`. Takes precedence over the template in `tokenizer_config.json`.
        chat_template: Option<String>,
    },
    /// Metadata of a GGUF file; the keys below are its.
    Gguf {
        /// `tokenizer.ggml.model`; only `gpt2` is supported.
        model: String,
        /// `tokenizer.ggml.pre`: how text is split before tokens are merged.
        pre: Option<String>,
        /// `tokenizer.ggml.tokens`.
        tokens: Vec<String>,
        /// `tokenizer.ggml.token_type`, or empty where the file has none: then all tokens are ordinary.
        token_types: Vec<i32>,
        /// `tokenizer.ggml.merges`.
        merges: Vec<String>,
        /// `tokenizer.ggml.bos_token_id`.
        bos: Option<TokenId>,
        /// `tokenizer.ggml.eos_token_id`.
        eos: Option<TokenId>,
        /// `tokenizer.ggml.unknown_token_id`.
        unknown: Option<TokenId>,
        /// `tokenizer.ggml.padding_token_id`.
        padding: Option<TokenId>,
        /// `tokenizer.ggml.add_bos_token`.
        add_bos: Option<bool>,
        /// `tokenizer.ggml.add_space_prefix`: whether a space is put before a text that does not begin with one. Default: no.
        add_space_prefix: Option<bool>,
        /// `tokenizer.chat_template`.
        chat_template: Option<String>,
    },
}

/// What the strings of special tokens are in a text that is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Specials {
    /// Text like any other.
    Text,
    /// The special tokens.
    Tokens,
}

impl TokenizerParts {
    /// Reads `tokenizer.json`, and `tokenizer_config.json` and `chat_template.jinja` if they exist, from the folder of a model.
    ///
    /// # Errors
    /// [`Error::Read`] when a file cannot be read, [`Error::Tokenizer`] when one is too large.
    pub fn from_folder(folder: &Path) -> Result<TokenizerParts, Error> {
        hugging_face::read(folder)
    }
}

impl Tokenizer {
    /// Builds a tokenizer.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the parts do not parse, do not fit together, or are of a kind that is not supported.
    pub fn new(parts: TokenizerParts) -> Result<Tokenizer, Error> {
        Tokenizer::assemble(match parts {
            TokenizerParts::HuggingFace { tokenizer_json, tokenizer_config, chat_template } => {
                hugging_face::plan(&tokenizer_json, tokenizer_config.as_deref(), chat_template)?
            }
            gguf @ TokenizerParts::Gguf { .. } => gguf::plan(gguf)?,
        })
    }

    /// Returns the number of tokens. Ids are smaller.
    pub fn vocabulary_size(&self) -> usize {
        self.ends.len()
    }

    /// Checks that a model has a row for every token. It may have more: many are padded.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when it has fewer.
    pub fn expect_fits(&self, model_vocabulary_size: usize) -> Result<(), Error> {
        let size = self.vocabulary_size();
        if size > model_vocabulary_size {
            let expected = format!("at most the {model_vocabulary_size} tokens of the model");
            return Err(unfit("vocabulary of the tokenizer", expected, format!("{size} tokens")));
        }
        Ok(())
    }

    /// Encodes a text. Adds no token before or after it.
    ///
    /// Bytes without a symbol of their own vanish, as they do in the original tokenizer: see [`Tokenizer::missing_bytes`].
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the text is longer than [`MAX_TEXT_BYTES`].
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<TokenId>, Error> {
        check_length(text)?;
        let added = match specials {
            Specials::Text => &self.ordinary,
            Specials::Tokens => &self.added,
        };
        self.encode_split(added.extract_and_normalize(self.normalizer.as_ref(), text))
    }

    /// Returns the bytes that a token stands for; special tokens stand for their text. Empty for ids outside the vocabulary.
    ///
    /// A token need not be valid UTF-8 on its own.
    pub fn bytes(&self, token: TokenId) -> &[u8] {
        let index = token as usize;
        let Some(end) = self.ends.get(index) else { return &[] };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start..*end]
    }

    /// Concatenates the bytes of tokens.
    ///
    /// Nothing is cleaned up or stripped: a vocabulary with byte fallback also returns the space that it puts before a text.
    pub fn decode(&self, tokens: &[TokenId]) -> Vec<u8> {
        tokens.iter().flat_map(|token| self.bytes(*token)).copied().collect()
    }

    /// Returns the human-readable name of a token: spaces are shown as `␣`, control characters and stray bytes as escapes.
    pub fn token_name(&self, token: TokenId) -> String {
        if token as usize >= self.vocabulary_size() {
            return format!("<unused-{token}>");
        }
        let mut name = String::new();
        for chunk in self.bytes(token).utf8_chunks() {
            for character in chunk.valid().chars() {
                match character {
                    ' ' => name.push('␣'),
                    '\'' | '"' => name.push(character),
                    _ => name.extend(character.escape_debug()),
                }
            }
            name.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
        }
        name
    }

    /// Returns the special token with a text.
    pub fn special_id(&self, text: &str) -> Option<TokenId> {
        self.special.get(text).copied()
    }

    /// Whether a token is special: one that only templates write, never text.
    pub fn is_special(&self, token: TokenId) -> bool {
        self.is_special.get(token as usize).copied().unwrap_or(false)
    }

    /// Returns the bytes that no token spells, ascending: [`Tokenizer::encode`] drops them.
    pub fn missing_bytes(&self) -> &[u8] {
        &self.missing_bytes
    }

    /// Returns the texts of the special tokens that have a name, by the names that templates use: `bos_token`, `eos_token`,
    /// `pad_token`, `unk_token` and others.
    pub fn named_tokens(&self) -> &BTreeMap<String, String> {
        &self.named
    }

    /// Whether a text that no chat template wrote begins with `bos_token`, as far as the files of the model say.
    pub fn add_bos(&self) -> Option<bool> {
        self.add_bos
    }

    /// Returns the source of the model's chat template.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Returns the strings of the special tokens.
    pub(super) fn special_strings(&self) -> impl Iterator<Item = &str> {
        self.special.keys().map(String::as_str)
    }

    /// Returns the strings of all added tokens.
    pub(super) fn added_strings(&self) -> impl Iterator<Item = &str> {
        self.added_strings.iter().map(String::as_str)
    }

    /// Finds the added tokens of a text, with the spaces that they swallow.
    pub(super) fn find_added(&self, text: &str) -> Vec<(Range<usize>, TokenId)> {
        let split = self.added.extract_and_normalize(self.normalizer.as_ref(), text);
        let pieces = split.get_splits(OffsetReferential::Original, OffsetType::Byte).into_iter();
        let found = pieces.filter_map(|(_, (start, end), tokens)| Some((start..end, tokens.as_ref()?.first()?.id)));
        found.collect()
    }

    /// Encodes a text in which added tokens stand at the given ranges, ascending, and nowhere else.
    pub(super) fn encode_around(&self, text: &str, added: &[(Range<usize>, TokenId)]) -> Result<Vec<TokenId>, Error> {
        check_length(text)?;
        let mut pieces = Vec::with_capacity(2 * added.len() + 1);
        let mut end = 0;
        for (range, token) in added {
            pieces.push((end..range.start, None));
            pieces.push((range.clone(), Some(*token)));
            end = range.end;
        }
        pieces.push((end..text.len(), None));
        let mut split = PreTokenizedString::from(text);
        let cut = split.split(|_, text| {
            let pieces = pieces.iter().filter(|(range, _)| !range.is_empty()).map(|(range, token)| {
                let slice = text.slice(Slice::Normalized(range.clone()));
                let slice = slice.ok_or_else(|| format!("bytes {} to {} are no characters", range.start, range.end))?;
                Ok((slice, token.map(|token| vec![Token::new(token, String::new(), (0, 0))])))
            });
            pieces.collect::<tokenizers::Result<Vec<_>>>()
        });
        cut.map_err(fails)?;
        if let Some(normalizer) = &self.normalizer {
            split.normalize(|piece| normalizer.normalize(piece)).map_err(fails)?;
        }
        self.encode_split(split)
    }

    fn encode_split(&self, mut text: PreTokenizedString) -> Result<Vec<TokenId>, Error> {
        if let Some(pre_tokenizer) = &self.pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut text).map_err(fails)?;
        }
        text.tokenize(|piece| self.model.tokenize(piece.get())).map_err(fails)?;
        let pieces = text.get_splits(OffsetReferential::Original, OffsetType::None).into_iter();
        Ok(pieces.filter_map(|(_, _, tokens)| tokens.as_ref()).flatten().map(|token| token.id).collect())
    }

    fn assemble(plan: Plan) -> Result<Tokenizer, Error> {
        let Plan { source, vocabulary, merges, added: wanted, spelling, .. } = &plan;
        let texts = texts(source, vocabulary, wanted)?;
        check_merges(source, vocabulary, merges)?;
        if let Some(unknown) = &plan.unknown
            && !vocabulary.contains_key(unknown)
            && wanted.iter().all(|(_, token)| token.content != *unknown)
        {
            return Err(unfit(format!("{source} unk_token"), "a token of the vocabulary", format!("{unknown:?}")));
        }

        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(texts.len()));
        for text in &texts {
            match text {
                Text::Learned(text) => spelling.spell(text, &mut bytes),
                Text::Added(text) => bytes.extend(text.as_bytes()),
            }
            ends.push(bytes.len());
        }
        let mut is_special = vec![false; texts.len()];
        wanted.iter().for_each(|(id, token)| is_special[*id as usize] = token.special);
        let special = wanted.iter().filter(|(_, token)| token.special);
        let special = special.map(|(id, token)| (token.content.clone(), *id)).collect();
        let added_strings = wanted.iter().map(|(_, token)| token.content.clone()).collect();
        let missing_bytes = spelling.missing(|symbol| vocabulary.contains_key(symbol));

        let builder = BPE::builder().fuse_unk(plan.fuses_unknown).byte_fallback(plan.falls_back_to_bytes);
        let mut builder = builder.ignore_merges(plan.ignores_merges);
        if let Some(unknown) = plan.unknown {
            builder = builder.unk_token(unknown);
        }
        let vocabulary: Vocab = plan.vocabulary.into_iter().collect();
        let refused = |error: LibraryError| unfit(plan.source, "a vocabulary that fits together", error.to_string());
        let model = builder.vocab_and_merges(vocabulary, plan.merges).build().map_err(refused)?;
        let mut added = AddedVocabulary::new();
        let tokens = plan.added.iter().map(|(_, token)| token.clone());
        added.add_tokens(tokens, &model, plan.normalizer.as_ref()).map_err(refused)?;
        for (id, token) in &plan.added {
            let got = added.get_vocab().get(&token.content).copied();
            if got != Some(*id) {
                let what = format!("{} added token {:?}", plan.source, token.content);
                let got = got.map_or("none".to_owned(), |got| got.to_string());
                return Err(unfit(what, format!("id {id}, after those of the vocabulary"), got));
            }
        }
        let mut ordinary = added.clone();
        ordinary.set_encode_special_tokens(true);
        Ok(Tokenizer {
            model,
            normalizer: plan.normalizer,
            pre_tokenizer: plan.pre_tokenizer,
            added,
            ordinary,
            bytes,
            ends,
            special,
            is_special,
            added_strings,
            missing_bytes,
            named: plan.named,
            add_bos: plan.add_bos,
            chat_template: plan.chat_template,
        })
    }
}

/// What both formats are read into.
struct Plan {
    /// What errors name.
    source: &'static str,
    vocabulary: HashMap<String, TokenId>,
    merges: Vec<(String, String)>,
    ignores_merges: bool,
    falls_back_to_bytes: bool,
    unknown: Option<String>,
    fuses_unknown: bool,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    /// Tokens that are found in a text before it is split, by ascending id.
    added: Vec<(TokenId, AddedToken)>,
    spelling: Spelling,
    named: BTreeMap<String, String>,
    add_bos: Option<bool>,
    chat_template: Option<String>,
}

enum Text<'a> {
    Learned(&'a str),
    Added(&'a str),
}

/// Returns the text of every token by id.
fn texts<'a>(
    source: &str,
    vocabulary: &'a HashMap<String, TokenId>,
    added: &'a [(TokenId, AddedToken)],
) -> Result<Vec<Text<'a>>, Error> {
    let what = || format!("{source} vocabulary");
    let added_ids: HashMap<&str, TokenId> = added.iter().map(|(id, token)| (token.content.as_str(), *id)).collect();
    let size = vocabulary.len() + added_ids.keys().filter(|text| !vocabulary.contains_key(**text)).count();
    if size == 0 || size > MAX_VOCABULARY {
        return Err(unfit(what(), format!("1 to {MAX_VOCABULARY} tokens"), size.to_string()));
    }
    let learned = vocabulary.iter().map(|(text, id)| (*id, text.as_str()));
    let mut by_id: Vec<Option<Text<'_>>> = (0..size).map(|_| None).collect();
    for (id, text) in learned.chain(added.iter().map(|(id, token)| (*id, token.content.as_str()))) {
        let Some(slot) = by_id.get_mut(id as usize) else {
            return Err(unfit(
                what(),
                format!("{size} tokens without gaps between their ids"),
                format!("id {id}, {text:?}"),
            ));
        };
        match slot {
            Some(Text::Learned(other) | Text::Added(other)) if *other != text => {
                // The order of a hash map is another in every run.
                let (first, second) = if *other < text { (*other, text) } else { (text, *other) };
                return Err(unfit(what(), "one token for an id", format!("id {id} for {first:?} and for {second:?}")));
            }
            _ => {}
        }
        *slot = Some(if added_ids.contains_key(text) { Text::Added(text) } else { Text::Learned(text) });
    }
    // As many tokens as ids, and no id twice.
    let gap =
        |id| unfit(what(), format!("{size} tokens without gaps between their ids"), format!("no token with id {id}"));
    by_id.into_iter().enumerate().map(|(id, text)| text.ok_or_else(|| gap(id))).collect()
}

/// Checks what the model would panic about.
fn check_merges(source: &str, vocabulary: &HashMap<String, TokenId>, merges: &[(String, String)]) -> Result<(), Error> {
    let mut merged = String::new();
    for (index, (left, right)) in merges.iter().enumerate() {
        merged.clear();
        merged.push_str(left);
        merged.push_str(right);
        for text in [left, right, &merged] {
            if !vocabulary.contains_key(text.as_str()) {
                let expected = "tokens of the vocabulary merged into one";
                return Err(unfit(format!("{source} merge {index}"), expected, format!("{text:?}, which is none")));
            }
        }
    }
    Ok(())
}

fn check_length(text: &str) -> Result<(), Error> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(unfit(
            "text to encode",
            format!("at most {MAX_TEXT_BYTES} bytes"),
            format!("{} bytes", text.len()),
        ));
    }
    Ok(())
}

fn unfit(what: impl Into<String>, expected: impl Into<String>, got: impl Into<String>) -> Error {
    Error::Tokenizer { what: what.into(), expected: expected.into(), got: got.into() }
}

type LibraryError = Box<dyn std::error::Error + Send + Sync>;

fn fails(error: LibraryError) -> Error {
    unfit("tokenizer", "text that it can encode", error.to_string())
}
