//! Tokenizers as the files of Hugging Face describe them.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use proto::TokenId;
use serde::Deserialize;
use serde_json::{Value, json};
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper};

use super::spelling::Spelling;
use super::{Plan, TokenizerParts, unfit};
use crate::Error;

pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";

/// The largest file that is read, in bytes; Gemma 3 has the largest vocabulary that we know, 33 MB.
const MAX_FILE_BYTES: u64 = 128 << 20;

/// The names that templates know special tokens by.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Steps that a tokenizer may take before it splits a text. Others are of models that are no language models.
const NORMALIZERS: [&str; 8] = ["Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "Sequence"];
const PRE_TOKENIZERS: [&str; 6] = ["ByteLevel", "Digits", "Metaspace", "Punctuation", "Sequence", "Split"];

/// Reads the files of a folder.
pub(super) fn read(folder: &Path) -> Result<TokenizerParts, Error> {
    let missing = || unfit(folder.display().to_string(), "tokenizer.json beside the weights", "none".to_owned());
    let tokenizer_json = read_file(folder, TOKENIZER)?.ok_or_else(missing)?;
    let tokenizer_config = read_file(folder, CONFIG)?;
    let chat_template = read_file(folder, TEMPLATE)?.map(String::from_utf8).transpose();
    let chat_template = chat_template.map_err(|error| unfit(TEMPLATE, "UTF-8", error.utf8_error().to_string()))?;
    Ok(TokenizerParts::HuggingFace { tokenizer_json, tokenizer_config, chat_template })
}

fn read_file(folder: &Path, name: &str) -> Result<Option<Vec<u8>>, Error> {
    let path = folder.join(name);
    let mut bytes = Vec::new();
    match File::open(&path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)) {
        Ok(_) if bytes.len() as u64 > MAX_FILE_BYTES => {
            Err(unfit(name, format!("at most {MAX_FILE_BYTES} bytes"), "more".to_owned()))
        }
        Ok(_) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read { path, source }),
    }
}

#[derive(Deserialize)]
struct Outline {
    model: Kind,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "type")]
    name: Option<String>,
}

#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<AddedTokenJson>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    model: ModelJson,
}

#[derive(Deserialize)]
struct AddedTokenJson {
    /// Its key, in `tokenizer_config.json`.
    #[serde(default)]
    id: TokenId,
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(Deserialize)]
struct ModelJson {
    vocab: HashMap<String, TokenId>,
    merges: Merges,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merges {
    Pairs(Vec<(String, String)>),
    Lines(Vec<String>),
}

/// Reads [`TokenizerParts::HuggingFace`].
pub(super) fn plan(tokenizer: &[u8], config: Option<&[u8]>, chat_template: Option<String>) -> Result<Plan, Error> {
    let outline: Outline = parse(TOKENIZER, tokenizer)?;
    // Files of old have no type; the lists that a byte-pair encoding needs are asked for below.
    if let Some(kind) = outline.model.name.filter(|name| name != "BPE") {
        return Err(unfit(format!("{TOKENIZER} model"), "BPE", kind));
    }
    let TokenizerJson { added_tokens, normalizer, pre_tokenizer, model } = parse(TOKENIZER, tokenizer)?;
    let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if let Some(affix) = affixes.into_iter().flatten().find(|affix| !affix.is_empty()) {
        return Err(unfit(format!("{TOKENIZER} model"), "no prefix or suffix of words", format!("{affix:?}")));
    }
    if let Some(dropout) = model.dropout.filter(|dropout| *dropout != 0.0) {
        return Err(unfit(format!("{TOKENIZER} model"), "no dropout", dropout.to_string()));
    }
    let merges = match model.merges {
        Merges::Pairs(pairs) => pairs,
        Merges::Lines(lines) => split_lines(&lines)?,
    };
    let falls_back_to_bytes = model.byte_fallback.unwrap_or(false);
    let spelling = if has_step(&pre_tokenizer, "ByteLevel") {
        Spelling::ByteLevel
    } else if falls_back_to_bytes {
        Spelling::ByteFallback { space: space_symbol(&normalizer, &pre_tokenizer) }
    } else {
        let expected = "the pre-tokenizer ByteLevel, or a model with byte_fallback";
        return Err(unfit(TOKENIZER, expected, "neither"));
    };

    let config = config.map(|config| parse::<HashMap<String, Value>>(CONFIG, config)).transpose()?.unwrap_or_default();
    let mut added = Vec::new();
    for token in added_tokens.into_iter().chain(tokens_of_config(&config)?) {
        add(&mut added, token);
    }
    let mut named = BTreeMap::new();
    for name in NAMES {
        if let Some(text) =
            config.get(name).filter(|value| !value.is_null()).map(|value| token_text(name, value)).transpose()?
        {
            named.insert(name.to_owned(), text);
        }
    }
    let lists = ["additional_special_tokens", "extra_special_tokens"];
    let listed = lists.iter().filter_map(|list| Some((list, config.get(*list)?.as_array()?)));
    let listed = listed.flat_map(|(list, texts)| texts.iter().map(|text| token_text(list, text)));
    let listed = listed.collect::<Result<Vec<_>, Error>>()?;
    for text in named.values().chain(&listed) {
        let id = model.vocab.get(text).copied();
        match (added.iter_mut().find(|(_, known)| known.content == *text), id) {
            (Some((_, known)), _) => known.special = true,
            (None, Some(id)) => added.push((id, AddedToken::from(text.clone(), true))),
            (None, None) => {
                return Err(unfit(format!("{CONFIG} special token"), "a token of the vocabulary", format!("{text:?}")));
            }
        }
    }
    added.sort_by_key(|(id, _)| *id);

    let (normalizer, pre_tokenizer) = read_steps(normalizer, pre_tokenizer)?;
    let chat_template = match chat_template {
        Some(template) => Some(template),
        None => template_of_config(&config)?,
    };
    Ok(Plan {
        source: TOKENIZER,
        vocabulary: model.vocab,
        merges,
        ignores_merges: model.ignore_merges.unwrap_or(false),
        falls_back_to_bytes,
        unknown: model.unk_token,
        fuses_unknown: model.fuse_unk.unwrap_or(false),
        normalizer,
        pre_tokenizer,
        added,
        spelling,
        named,
        add_bos: config.get("add_bos_token").and_then(Value::as_bool),
        chat_template,
    })
}

/// Adds a token unless its text is known: what comes first stands, as in Hugging Face.
fn add(added: &mut Vec<(TokenId, AddedToken)>, token: AddedTokenJson) {
    let AddedTokenJson { id, content, single_word, lstrip, rstrip, normalized, special } = token;
    if added.iter().all(|(_, other)| other.content != content) {
        added.push((id, AddedToken { content, single_word, lstrip, rstrip, normalized, special }));
    }
}

fn split_lines(lines: &[String]) -> Result<Vec<(String, String)>, Error> {
    let lines = lines.iter().filter(|line| !line.starts_with("#version")).enumerate();
    let pairs = lines.map(|(index, line)| match line.split_once(' ') {
        Some((left, right)) if !right.contains(' ') => Ok((left.to_owned(), right.to_owned())),
        _ => Err(unfit(format!("{TOKENIZER} merge {index}"), "two tokens with a space between", format!("{line:?}"))),
    });
    pairs.collect()
}

/// Reads `added_tokens_decoder`, which holds tokens that older files lack in `tokenizer.json`.
fn tokens_of_config(config: &HashMap<String, Value>) -> Result<Vec<AddedTokenJson>, Error> {
    let Some(tokens) = config.get("added_tokens_decoder").and_then(Value::as_object) else { return Ok(Vec::new()) };
    let tokens = tokens.iter().map(|(id, token)| {
        let what = || format!("{CONFIG} added token {id}");
        let mut read =
            AddedTokenJson::deserialize(token).map_err(|error| unfit(what(), "a token", error.to_string()))?;
        read.id = id.parse().map_err(|_| unfit(what(), "a number as its id", id))?;
        Ok(read)
    });
    let mut tokens = tokens.collect::<Result<Vec<_>, Error>>()?;
    tokens.sort_by_key(|token| token.id);
    Ok(tokens)
}

/// Reads a token that is given as text, or as an object.
fn token_text(name: &str, value: &Value) -> Result<String, Error> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    let text = text.ok_or_else(|| unfit(format!("{CONFIG} {name}"), "the text of a token", value.to_string()))?;
    Ok(text.to_owned())
}

fn template_of_config(config: &HashMap<String, Value>) -> Result<Option<String>, Error> {
    let what = format!("{CONFIG} chat_template");
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(templates)) => {
            let default = templates.iter().find(|template| template["name"] == "default");
            let default = default.and_then(|template| template["template"].as_str());
            let missing = || unfit(what, "a template with the name default", "none");
            Ok(Some(default.ok_or_else(missing)?.to_owned()))
        }
        Some(other) => Err(unfit(what, "text, or a list of templates", other.to_string())),
    }
}

/// Reads the steps that a tokenizer takes before it merges tokens.
fn read_steps(
    normalizer: Value,
    pre_tokenizer: Value,
) -> Result<(Option<NormalizerWrapper>, Option<PreTokenizerWrapper>), Error> {
    check_steps("normalizer", &normalizer, &NORMALIZERS)?;
    check_steps("pre_tokenizer", &pre_tokenizer, &PRE_TOKENIZERS)?;
    // Read as part of a whole file: that code is compiled once, with the crate, rather than here.
    let model = json!({ "type": "BPE", "vocab": {}, "merges": [] });
    let file = json!({ "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "model": model }).to_string();
    let read = file.parse::<tokenizers::Tokenizer>();
    let read = read.map_err(|error| unfit(TOKENIZER, "steps as documented", error.to_string()))?;
    Ok((read.get_normalizer().cloned(), read.get_pre_tokenizer().cloned()))
}

/// Checks that the kinds of a step, and of the steps in it, are among those known.
fn check_steps(name: &str, value: &Value, known: &[&str]) -> Result<(), Error> {
    if value.is_null() {
        return Ok(());
    }
    for step in steps(value) {
        let kind = step["type"].as_str().unwrap_or("a step without a type");
        if !known.contains(&kind) {
            return Err(unfit(format!("{TOKENIZER} {name}"), format!("one of {}", known.join(", ")), kind));
        }
        if kind == "Replace" && !step["pattern"]["String"].is_string() {
            return Err(unfit(format!("{TOKENIZER} {name}"), "a text to replace", step["pattern"].to_string()));
        }
        // The library panics about an empty prefix, and an empty pattern matches between all characters.
        let texts = [&step["pattern"]["String"], &step["pattern"]["Regex"], &step["prepend"]];
        if texts.into_iter().any(|text| text == "") {
            return Err(unfit(format!("{TOKENIZER} {name}"), "a pattern or a prefix", "an empty one"));
        }
    }
    Ok(())
}

/// Lists a step and the steps in it.
fn steps(value: &Value) -> Vec<&Value> {
    let inner = ["normalizers", "pretokenizers"].into_iter().filter_map(|list| value[list].as_array());
    std::iter::once(value).chain(inner.flatten().flat_map(steps)).collect()
}

fn has_step(value: &Value, kind: &str) -> bool {
    steps(value).iter().any(|step| step["type"] == kind)
}

/// Returns the character that spaces are replaced by.
fn space_symbol(normalizer: &Value, pre_tokenizer: &Value) -> Option<char> {
    let replaced = steps(normalizer).into_iter().filter(|step| step["pattern"]["String"] == " ");
    let replaced = replaced.filter_map(|step| step["content"].as_str());
    let metaspace = steps(pre_tokenizer).into_iter().filter(|step| step["type"] == "Metaspace");
    let metaspace = metaspace.filter_map(|step| step["replacement"].as_str());
    let mut symbols = replaced.chain(metaspace).map(str::chars);
    symbols.next().and_then(|mut symbol| symbol.next().filter(|_| symbol.next().is_none()))
}

fn parse<'a, T: Deserialize<'a>>(file: &str, bytes: &'a [u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| unfit(file, "JSON as Hugging Face writes it", error.to_string()))
}
