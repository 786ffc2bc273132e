//! Tokenizers as GGUF files describe them.
//!
//! A GGUF file names how text is split before tokens are merged; what a name means is the reader's to know. Guessing wrong costs
//! no error, only other tokens than the model was trained on: so names that are not known are refused.

use std::collections::{BTreeMap, HashMap};

use proto::TokenId;
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::spelling::Spelling;
use super::{LibraryError, Plan, TokenizerParts, unfit};
use crate::Error;

const SOURCE: &str = "GGUF tokenizer";

/// How text is split, and its names.
const SPLITS: [(&str, SplitRule); 8] = [
    ("default", SplitRule::Gpt2),
    ("gpt-2", SplitRule::Gpt2),
    ("llama-bpe", SplitRule::Llama3),
    ("llama-v3", SplitRule::Llama3),
    ("llama3", SplitRule::Llama3),
    ("qwen2", SplitRule::Qwen2),
    ("smollm", SplitRule::StarCoder),
    ("starcoder", SplitRule::StarCoder),
];

/// `pre_tokenizer` of tokenizer.json of meta-llama/Meta-Llama-3-8B.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// `pre_tokenizer` of tokenizer.json of Qwen/Qwen2-7B; Qwen2.5 and Qwen3 have the same.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `tokenizer.ggml.token_type` of control tokens.
const CONTROL: i32 = 3;
/// Of tokens that the model's makers added, which are found whole in a text but are not special.
const USER_DEFINED: i32 = 4;

#[derive(Clone, Copy, PartialEq, Eq)]
enum SplitRule {
    Gpt2,
    Llama3,
    Qwen2,
    StarCoder,
}

/// Reads [`TokenizerParts::Gguf`].
pub(super) fn plan(parts: TokenizerParts) -> Result<Plan, Error> {
    let TokenizerParts::Gguf {
        model,
        pre,
        tokens,
        token_types,
        merges,
        bos,
        eos,
        unknown,
        padding,
        add_bos,
        add_space_prefix,
        chat_template,
    } = parts
    else {
        return Err(unfit(SOURCE, "metadata of a GGUF file", "files of Hugging Face"));
    };
    if model != "gpt2" {
        return Err(unfit("tokenizer.ggml.model", "gpt2", model));
    }
    let named = SPLITS.into_iter().find(|(name, _)| Some(*name) == pre.as_deref());
    let Some((_, rule)) = named else {
        let names = SPLITS.map(|(name, _)| name).join(", ");
        return Err(unfit("tokenizer.ggml.pre", format!("one of {names}"), pre.unwrap_or("none".to_owned())));
    };
    if !token_types.is_empty() && token_types.len() != tokens.len() {
        let expected = format!("{} types, one for each token", tokens.len());
        return Err(unfit("tokenizer.ggml.token_type", expected, token_types.len().to_string()));
    }
    let size = TokenId::try_from(tokens.len()).unwrap_or(TokenId::MAX);

    let names = [("bos", bos), ("eos", eos), ("unk", unknown), ("pad", padding)];
    let mut special: Vec<TokenId> = names.into_iter().filter_map(|(_, id)| id).collect();
    let mut named = BTreeMap::new();
    for (name, id) in names.into_iter().filter_map(|(name, id)| Some((name, id?))) {
        let Some(text) = tokens.get(id as usize) else {
            return Err(unfit(format!("{SOURCE} {name}_token"), format!("an id below {size}"), id.to_string()));
        };
        named.insert(format!("{name}_token"), text.clone());
    }
    let of_type = |wanted| (0..size).zip(&token_types).filter(move |(_, kind)| **kind == wanted).map(|(id, _)| id);
    special.extend(of_type(CONTROL));
    let added = |id: TokenId, is_special| {
        let token = AddedToken::from(tokens[id as usize].clone(), is_special).normalized(false);
        (id, token)
    };
    let user_defined = of_type(USER_DEFINED).map(|id| added(id, false));
    let added: BTreeMap<TokenId, AddedToken> = user_defined.chain(special.iter().map(|id| added(*id, true))).collect();

    let merges = merges.iter().enumerate().map(|(index, merge)| match merge.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
            Ok((left.to_owned(), right.to_owned()))
        }
        _ => Err(unfit(format!("{SOURCE} merge {index}"), "two tokens with a space between", format!("{merge:?}"))),
    });
    let merges = merges.collect::<Result<Vec<_>, Error>>()?;
    let mut vocabulary = HashMap::with_capacity(tokens.len());
    for (id, token) in (0..size).zip(tokens) {
        if let Some(other) = vocabulary.insert(token.clone(), id) {
            return Err(unfit(
                "tokenizer.ggml.tokens",
                "every token once",
                format!("{token:?} with ids {other} and {id}"),
            ));
        }
    }
    Ok(Plan {
        source: SOURCE,
        vocabulary,
        merges,
        ignores_merges: rule == SplitRule::Llama3,
        falls_back_to_bytes: false,
        unknown: None,
        fuses_unknown: false,
        normalizer: (rule == SplitRule::Qwen2).then(|| NormalizerWrapper::NFC(NFC)),
        pre_tokenizer: Some(pre_tokenizer(rule, add_space_prefix.unwrap_or(false))?),
        added: added.into_iter().collect(),
        spelling: Spelling::ByteLevel,
        named,
        add_bos,
        chat_template,
    })
}

fn pre_tokenizer(rule: SplitRule, add_space_prefix: bool) -> Result<PreTokenizerWrapper, Error> {
    let refused = |error: LibraryError| unfit(SOURCE, "a pattern that compiles", error.to_string());
    let byte_level = |has_pattern| ByteLevel::new(add_space_prefix, true, has_pattern).into();
    let split =
        |pattern: &str| Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false);
    let first: PreTokenizerWrapper = match rule {
        SplitRule::Gpt2 => return Ok(byte_level(true)),
        SplitRule::StarCoder => Digits::new(true).into(),
        SplitRule::Llama3 => split(LLAMA3).map_err(refused)?.into(),
        SplitRule::Qwen2 => split(QWEN2).map_err(refused)?.into(),
    };
    Ok(Sequence::new(vec![first, byte_level(rule == SplitRule::StarCoder)]).into())
}
