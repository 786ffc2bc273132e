//! Tokenizers and chat templates against Hugging Face's: the golden files are made by `golden/reference.py`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use language::Error;
use language::text::{
    ChatMessage, ChatTemplate, Date, MAX_TEXT_BYTES, Specials, TemplateOptions, Tokenizer, TokenizerParts, encode_chat,
};
use proptest::prelude::*;
use proto::TokenId;
use serde::Deserialize;
use serde_json::{Value, json};

/// SmolLM2-135M-Instruct.
#[derive(Deserialize)]
struct SmolLm2 {
    /// The special tokens, and then the bytes.
    first_tokens: Vec<String>,
    num_special: usize,
    /// What they make are the rest of the tokens, in their order.
    merges: Vec<String>,
    named: BTreeMap<String, TokenId>,
    add_bos: Option<bool>,
    add_space_prefix: Option<bool>,
    chat_template: String,
    chats: Vec<Chat>,
    texts: Vec<Encoded>,
    decodes: Vec<Decoded>,
    missing_bytes: Vec<u8>,
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Message>,
    add_generation_prompt: bool,
    rendered: String,
    ids: Vec<TokenId>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
}

#[derive(Deserialize)]
struct Encoded {
    text: String,
    ids: Vec<TokenId>,
    with_specials: Vec<TokenId>,
}

#[derive(Deserialize)]
struct Decoded {
    ids: Vec<TokenId>,
    /// As hexadecimal digits.
    bytes: String,
}

/// A vocabulary by hand.
#[derive(Deserialize)]
struct Tiny {
    tokens: Vec<String>,
    merges: Vec<String>,
    special: Vec<String>,
    ordinary: Vec<String>,
    cases: Vec<TinyCase>,
}

#[derive(Deserialize)]
struct TinyCase {
    pre: String,
    texts: Vec<Encoded>,
}

#[derive(Deserialize)]
struct Templates {
    variables: BTreeMap<String, String>,
    cases: Vec<TemplateCase>,
}

#[derive(Deserialize)]
struct TemplateCase {
    name: String,
    source: String,
    messages: Vec<Message>,
    options: TemplateOptions,
    add_generation_prompt: bool,
    rendered: Option<String>,
    error: Option<String>,
}

static SMOLLM2: LazyLock<SmolLm2> = LazyLock::new(|| golden("smollm2.json.zst"));
static FROM_GGUF: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::new(SMOLLM2.gguf()).unwrap());
static TEMPLATE: LazyLock<ChatTemplate> =
    LazyLock::new(|| template(&SMOLLM2.chat_template, FROM_GGUF.named_tokens()).unwrap());
static TINY: LazyLock<Tiny> = LazyLock::new(|| golden("tiny.json.zst"));

fn golden<T: for<'a> Deserialize<'a>>(name: &str) -> T {
    let compressed = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)).unwrap();
    serde_json::from_slice(&zstd::decode_all(&compressed[..]).unwrap()).unwrap()
}

fn template(source: &str, named_tokens: &BTreeMap<String, String>) -> Result<ChatTemplate, Error> {
    ChatTemplate::new(source, named_tokens, Date::new(2024, 7, 26).unwrap())
}

fn messages(messages: &[Message]) -> Vec<ChatMessage> {
    let message = |message: &Message| ChatMessage { role: message.role.clone(), content: message.content.clone() };
    messages.iter().map(message).collect()
}

fn said(content: &str) -> Vec<ChatMessage> {
    vec![ChatMessage { role: "user".to_owned(), content: content.to_owned() }]
}

fn none() -> TemplateOptions {
    TemplateOptions::new()
}

impl SmolLm2 {
    fn tokens(&self) -> Vec<String> {
        let merged = self.merges.iter().map(|merge| merge.replace(' ', ""));
        self.first_tokens.iter().cloned().chain(merged).collect()
    }

    fn gguf(&self) -> TokenizerParts {
        let tokens = self.tokens();
        let id = |name| self.named.get(name).copied();
        TokenizerParts::Gguf {
            model: "gpt2".to_owned(),
            pre: Some("smollm".to_owned()),
            token_types: (0..tokens.len()).map(|id| if id < self.num_special { 3 } else { 1 }).collect(),
            tokens,
            merges: self.merges.clone(),
            bos: id("bos"),
            eos: id("eos"),
            unknown: id("unk"),
            padding: id("pad"),
            add_bos: self.add_bos,
            add_space_prefix: self.add_space_prefix,
            chat_template: Some(self.chat_template.clone()),
        }
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json`.
    fn hugging_face(&self) -> (Value, Value) {
        let tokens = self.tokens();
        let added_tokens: Vec<Value> =
            tokens[..self.num_special].iter().enumerate().map(|(id, token)| added_token(id, token, true)).collect();
        let vocabulary: BTreeMap<&String, usize> = tokens.iter().zip(0..).collect();
        let tokenizer = json!({
            "version": "1.0",
            // Neither may change what is encoded.
            "truncation": { "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 },
            "padding": null,
            "added_tokens": added_tokens,
            "normalizer": null,
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
                { "type": "Digits", "individual_digits": true },
                { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
            ] },
            "post_processor": null,
            "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocabulary, "merges": self.merges,
            },
        });
        let mut config = json!({ "add_bos_token": self.add_bos, "chat_template": self.chat_template });
        for (name, id) in &self.named {
            config[format!("{name}_token")] = tokens[*id as usize].clone().into();
        }
        (tokenizer, config)
    }
}

fn added_token(id: usize, content: &str, special: bool) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": special,
    })
}

fn hugging_face(tokenizer: &Value, config: Option<&Value>) -> Result<Tokenizer, Error> {
    Tokenizer::new(TokenizerParts::HuggingFace {
        tokenizer_json: serde_json::to_vec(tokenizer).unwrap(),
        tokenizer_config: config.map(|config| serde_json::to_vec(config).unwrap()),
        chat_template: None,
    })
}

impl Tiny {
    fn gguf(&self, pre: &str) -> TokenizerParts {
        let kind = |token: &String| match () {
            () if self.special.contains(token) => 3,
            () if self.ordinary.contains(token) => 4,
            () if token.starts_with("[PAD") => 5,
            () => 1,
        };
        TokenizerParts::Gguf {
            model: "gpt2".to_owned(),
            pre: Some(pre.to_owned()),
            token_types: self.tokens.iter().map(kind).collect(),
            tokens: self.tokens.clone(),
            merges: self.merges.clone(),
            bos: None,
            eos: None,
            unknown: None,
            padding: None,
            add_bos: None,
            add_space_prefix: None,
            chat_template: None,
        }
    }

    /// Writes a tokenizer.json of its own tokens, changed by the caller.
    fn json(&self) -> Value {
        let kinds = [(&self.special, true), (&self.ordinary, false)];
        let added = kinds.into_iter().flat_map(|(texts, special)| texts.iter().map(move |text| (text, special)));
        let id = |text: &String| self.tokens.iter().position(|token| token == text).unwrap();
        let vocabulary: BTreeMap<&String, usize> = self.tokens.iter().zip(0..).collect();
        json!({
            "added_tokens": added.map(|(text, special)| added_token(id(text), text, special)).collect::<Vec<_>>(),
            "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
            "model": { "type": "BPE", "vocab": vocabulary, "merges": self.merges },
        })
    }
}

fn refused<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn chats_have_the_text_and_the_tokens_of_hugging_face() {
    assert_eq!(SMOLLM2.chats.len(), 40);
    for chat in &SMOLLM2.chats {
        let messages = messages(&chat.messages);
        let rendered = TEMPLATE.render(&messages, chat.add_generation_prompt, &none()).unwrap();
        assert_eq!(rendered, chat.rendered);
        let ids = encode_chat(&FROM_GGUF, &TEMPLATE, &messages, chat.add_generation_prompt, &none()).unwrap();
        assert_eq!(ids, chat.ids, "{rendered:?}");
        if SMOLLM2.missing_bytes.iter().all(|byte| !rendered.as_bytes().contains(byte)) {
            assert_eq!(FROM_GGUF.decode(&ids), rendered.as_bytes());
        }
    }
}

#[test]
fn texts_have_the_tokens_of_hugging_face() {
    assert_eq!(SMOLLM2.texts.len(), 60);
    for Encoded { text, ids, with_specials } in &SMOLLM2.texts {
        assert_eq!(FROM_GGUF.encode(text, Specials::Text).unwrap(), *ids, "{text:?}");
        assert_eq!(FROM_GGUF.encode(text, Specials::Tokens).unwrap(), *with_specials, "{text:?}");
    }
}

#[test]
fn tokens_have_the_bytes_of_hugging_face() {
    for Decoded { ids, bytes } in &SMOLLM2.decodes {
        let decoded = FROM_GGUF.decode(ids);
        assert_eq!(decoded.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), *bytes);
        let concatenated: Vec<u8> = ids.iter().flat_map(|id| FROM_GGUF.bytes(*id)).copied().collect();
        assert_eq!(decoded, concatenated);
    }
    assert_eq!(FROM_GGUF.missing_bytes(), SMOLLM2.missing_bytes);
    assert_eq!(FROM_GGUF.missing_bytes().len(), 21);
    // What the research on this tokenizer found: a byte without a symbol vanishes.
    let encoded = FROM_GGUF.encode("a\u{4}b", Specials::Text).unwrap();
    assert_eq!(FROM_GGUF.decode(&encoded), b"ab");
    assert_eq!(FROM_GGUF.bytes(49_152), b"");
    assert_eq!(FROM_GGUF.decode(&[TokenId::MAX]), b"");
}

#[test]
fn tokenizer_json_gives_the_tokens_of_the_gguf_file() {
    let (tokenizer, config) = SMOLLM2.hugging_face();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    let read = || Tokenizer::new(TokenizerParts::from_folder(folder.path()).unwrap()).unwrap();
    write("tokenizer.json", &serde_json::to_vec(&tokenizer).unwrap());
    write("tokenizer_config.json", &serde_json::to_vec(&config).unwrap());
    let from_json = read();
    write("chat_template.jinja", b"{{ 'from its own file' }}");
    let with_file = read();
    assert!(
        refused(TokenizerParts::from_folder(&folder.path().join("none")))
            .ends_with("none: expected tokenizer.json beside the weights, got none")
    );

    assert_eq!(with_file.chat_template(), Some("{{ 'from its own file' }}"));
    for tokenizer in [from_json, written(&FROM_GGUF)] {
        assert_eq!(tokenizer.chat_template(), FROM_GGUF.chat_template());
        assert_eq!(tokenizer.named_tokens(), FROM_GGUF.named_tokens());
        assert_eq!((tokenizer.add_bos(), FROM_GGUF.add_bos()), (Some(false), Some(false)));
        assert_eq!(tokenizer.vocabulary_size(), 49_152);
        for id in 0..49_152 {
            assert_eq!(tokenizer.bytes(id), FROM_GGUF.bytes(id));
            assert_eq!(tokenizer.is_special(id), FROM_GGUF.is_special(id));
        }
        for Encoded { text, ids, with_specials } in &SMOLLM2.texts {
            assert_eq!(tokenizer.encode(text, Specials::Text).unwrap(), *ids, "{text:?}");
            assert_eq!(tokenizer.encode(text, Specials::Tokens).unwrap(), *with_specials, "{text:?}");
        }
        for chat in &SMOLLM2.chats {
            let messages = messages(&chat.messages);
            let tokens = encode_chat(&tokenizer, &TEMPLATE, &messages, chat.add_generation_prompt, &none());
            assert_eq!(tokens.unwrap(), chat.ids);
        }
    }
}

/// Returns the tokenizer that the files describe that are written for a model from a GGUF file.
fn written(tokenizer: &Tokenizer) -> Tokenizer {
    let [(json_name, json), (config_name, config)] = tokenizer.hugging_face_files().unwrap();
    assert_eq!((json_name, config_name), ("tokenizer.json", "tokenizer_config.json"));
    let parts =
        TokenizerParts::HuggingFace { tokenizer_json: json, tokenizer_config: Some(config), chat_template: None };
    Tokenizer::new(parts).unwrap()
}

#[test]
fn special_tokens_are_known_by_their_text() {
    assert_eq!(FROM_GGUF.special_id("<|im_end|>"), Some(2));
    assert_eq!(FROM_GGUF.special_id("user"), None);
    assert!(FROM_GGUF.is_special(16) && !FROM_GGUF.is_special(17) && !FROM_GGUF.is_special(49_152));
    assert_eq!(FROM_GGUF.named_tokens()["bos_token"], "<|im_start|>");
    assert_eq!(FROM_GGUF.bytes(2), b"<|im_end|>");
}

#[test]
fn names_of_tokens_are_for_people() {
    let name = |text| {
        let ids = FROM_GGUF.encode(text, Specials::Tokens).unwrap();
        ids.iter().map(|id| FROM_GGUF.token_name(*id)).collect::<Vec<_>>()
    };
    assert_eq!(name("<|im_start|>user\n the\t"), ["<|im_start|>", "user", "\\n", "␣the", "\\t"]);
    assert_eq!(name("'\"\0"), ["'\"", "\\0"]);
    assert_eq!(name("🫠"), ["\\xf0\\x9f", "\\xab", "\\xa0"]);
    assert_eq!(FROM_GGUF.token_name(60_000), "<unused-60000>");
}

#[test]
fn a_model_needs_a_row_for_every_token() {
    assert!(FROM_GGUF.expect_fits(49_152).is_ok() && FROM_GGUF.expect_fits(49_280).is_ok());
    assert_eq!(
        refused(FROM_GGUF.expect_fits(49_151)),
        "vocabulary of the tokenizer: expected at most the 49151 tokens of the model, got 49152 tokens"
    );
}

#[test]
fn every_rule_of_gguf_files_gives_the_tokens_of_hugging_face() {
    assert_eq!(TINY.cases.len(), 4);
    for TinyCase { pre, texts } in &TINY.cases {
        let tokenizer = Tokenizer::new(TINY.gguf(pre)).unwrap();
        for tokenizer in [written(&tokenizer), tokenizer] {
            for Encoded { text, ids, with_specials } in texts {
                assert_eq!(tokenizer.encode(text, Specials::Text).unwrap(), *ids, "{pre}: {text:?}");
                assert_eq!(tokenizer.encode(text, Specials::Tokens).unwrap(), *with_specials, "{pre}: {text:?}");
            }
        }
    }
    let aliases = [("llama3", "llama-bpe"), ("llama-v3", "llama-bpe"), ("default", "gpt-2"), ("starcoder", "smollm")];
    for (alias, name) in aliases {
        let encode = |pre| Tokenizer::new(TINY.gguf(pre)).unwrap().encode("xyz 123 the!!\n\n", Specials::Text).unwrap();
        assert_eq!(encode(alias), encode(name));
    }
}

#[test]
fn a_space_prefix_is_added_where_the_file_says_so() {
    let mut parts = TINY.gguf("gpt-2");
    let TokenizerParts::Gguf { add_space_prefix, .. } = &mut parts else { unreachable!() };
    *add_space_prefix = Some(true);
    let tokenizer = Tokenizer::new(parts).unwrap();
    assert_eq!(tokenizer.decode(&tokenizer.encode("the", Specials::Text).unwrap()), b" the");
}

/// Patterns give up on long texts, and then leave digits together.
#[test]
fn the_longest_texts_are_still_split() {
    let tokenizer = Tokenizer::new(TINY.gguf("qwen2")).unwrap();
    let digits = tokenizer.encode("!12", Specials::Text).unwrap();
    let text = " ".repeat(MAX_TEXT_BYTES - 3) + "!12";
    assert!(tokenizer.encode(&text, Specials::Text).unwrap().ends_with(&digits[1..]));
    let error = refused(tokenizer.encode(&" ".repeat(MAX_TEXT_BYTES + 1), Specials::Text));
    assert_eq!(error, "text to encode: expected at most 524288 bytes, got 524289 bytes");
}

#[test]
fn gguf_metadata_that_does_not_fit_is_refused() {
    let with = |change: &dyn Fn(&mut TokenizerParts)| {
        let mut parts = TINY.gguf("gpt-2");
        change(&mut parts);
        refused(Tokenizer::new(parts))
    };
    macro_rules! changed {
        ($field:ident, $change:expr) => {
            with(&|parts| {
                let TokenizerParts::Gguf { $field, .. } = parts else { unreachable!() };
                #[allow(clippy::redundant_closure_call)]
                $change($field)
            })
        };
    }
    let names = "default, gpt-2, llama-bpe, llama-v3, llama3, qwen2, smollm, starcoder";
    assert_eq!(
        changed!(pre, |pre: &mut Option<String>| *pre = Some("tekken".to_owned())),
        format!("tokenizer.ggml.pre: expected one of {names}, got tekken")
    );
    assert_eq!(
        changed!(pre, |pre: &mut Option<String>| *pre = None),
        format!("tokenizer.ggml.pre: expected one of {names}, got none")
    );
    assert_eq!(
        changed!(model, |model: &mut String| *model = "llama".to_owned()),
        "tokenizer.ggml.model: expected gpt2, got llama"
    );
    assert_eq!(
        changed!(token_types, |types: &mut Vec<i32>| types.truncate(289)),
        "tokenizer.ggml.token_type: expected 290 types, one for each token, got 289"
    );
    assert_eq!(
        changed!(eos, |eos: &mut Option<TokenId>| *eos = Some(290)),
        "GGUF tokenizer eos_token: expected an id below 290, got 290"
    );
    assert_eq!(
        changed!(tokens, |tokens: &mut Vec<String>| tokens[5] = tokens[4].clone()),
        "tokenizer.ggml.tokens: expected every token once, got \"Ą\" with ids 4 and 5"
    );
    assert_eq!(
        changed!(merges, |merges: &mut Vec<String>| merges[1] = "he".to_owned()),
        "GGUF tokenizer merge 1: expected two tokens with a space between, got \"he\""
    );
    assert_eq!(
        changed!(merges, |merges: &mut Vec<String>| merges[1] = "a b c".to_owned()),
        "GGUF tokenizer merge 1: expected two tokens with a space between, got \"a b c\""
    );
    assert_eq!(
        changed!(merges, |merges: &mut Vec<String>| merges[1] = "123123 [PAD300]".to_owned()),
        "GGUF tokenizer merge 1: expected tokens of the vocabulary merged into one, got \"123123[PAD300]\", which is none"
    );
    let error = with(&|parts| {
        let TokenizerParts::Gguf { tokens, token_types, merges, .. } = parts else { unreachable!() };
        tokens.clear();
        token_types.clear();
        merges.clear();
    });
    assert_eq!(error, "GGUF tokenizer vocabulary: expected 1 to 1048576 tokens, got 0");
    let error = with(&|parts| {
        let TokenizerParts::Gguf { tokens, token_types, .. } = parts else { unreachable!() };
        token_types.clear();
        tokens.extend((0..1 << 20).map(|index| format!("{index:020}")));
    });
    assert_eq!(error, "GGUF tokenizer vocabulary: expected 1 to 1048576 tokens, got 1048866");
}

#[test]
fn tokenizer_json_that_does_not_fit_is_refused() {
    let with = |pointer: &str, value: Value| {
        let mut tokenizer = TINY.json();
        let parent = tokenizer.pointer_mut(pointer.rsplit_once('/').unwrap().0).unwrap();
        match parent {
            Value::Array(items) => items[pointer.rsplit('/').next().unwrap().parse::<usize>().unwrap()] = value,
            other => other[pointer.rsplit('/').next().unwrap()] = value,
        }
        refused(hugging_face(&tokenizer, None))
    };
    let parts = |bytes: &[u8]| TokenizerParts::HuggingFace {
        tokenizer_json: bytes.to_vec(),
        tokenizer_config: None,
        chat_template: None,
    };
    assert!(
        refused(Tokenizer::new(parts(b"{")))
            .starts_with("tokenizer.json: expected JSON as Hugging Face writes it, got EOF")
    );
    assert!(refused(Tokenizer::new(parts(b"[]"))).starts_with("tokenizer.json: expected JSON"));
    assert!(
        refused(Tokenizer::new(parts("[".repeat(100_000).as_bytes()))).starts_with("tokenizer.json: expected JSON")
    );
    assert_eq!(with("/model/type", json!("Unigram")), "tokenizer.json model: expected BPE, got Unigram");
    assert!(with("/model/vocab", json!([["a", 1.0]])).starts_with("tokenizer.json: expected JSON"));
    assert!(with("/model/vocab/a", json!(-1)).starts_with("tokenizer.json: expected JSON"));
    assert_eq!(
        with("/model/vocab/a", json!(4_294_967_295_u32)),
        "tokenizer.json vocabulary: expected 290 tokens without gaps between their ids, got id 4294967295, \"a\""
    );
    assert!(
        with("/model/vocab/a", json!(3))
            .starts_with("tokenizer.json vocabulary: expected one token for an id, got id 3 for")
    );
    assert_eq!(
        with("/model/vocab/more", json!(291)),
        "tokenizer.json vocabulary: expected 291 tokens without gaps between their ids, got id 291, \"more\""
    );
    assert_eq!(
        with("/model/merges/0", json!("a no")),
        "tokenizer.json merge 0: expected tokens of the vocabulary merged into one, got \"no\", which is none"
    );
    assert_eq!(
        with("/model/unk_token", json!("<none>")),
        "tokenizer.json unk_token: expected a token of the vocabulary, got \"<none>\""
    );
    assert!(with("/model/dropout", json!(0.5)).contains("expected no dropout"));
    assert!(with("/model/continuing_subword_prefix", json!("##")).contains("expected no prefix or suffix of words"));
    assert_eq!(
        with("/pre_tokenizer", json!(null)),
        "tokenizer.json: expected the pre-tokenizer ByteLevel, or a model with byte_fallback, got neither"
    );
    assert!(
        with("/normalizer", json!({ "type": "Precompiled", "precompiled_charsmap": "AAAA" }))
            .ends_with("got Precompiled")
    );
    let replace = json!({ "type": "Replace", "pattern": { "Regex": "a*" }, "content": "b" });
    assert!(with("/normalizer", replace).starts_with("tokenizer.json normalizer: expected a text to replace, got"));
    assert!(with("/normalizer", json!({ "type": "Prepend", "prepend": "" })).ends_with("got an empty one"));
    let split = |pattern| {
        json!({ "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false }, { "type": "ByteLevel" },
        ] })
    };
    assert!(
        with("/pre_tokenizer", split(json!({ "Regex": "(" })))
            .starts_with("tokenizer.json: expected steps as documented")
    );
    assert!(
        with("/pre_tokenizer", split(json!({ "Regex": "" })))
            .ends_with("expected a pattern or a prefix, got an empty one")
    );
    assert!(with("/added_tokens/0", added_token(7, "<|endoftext|>", true)).contains("id 7"));
    assert_eq!(
        with("/added_tokens/0", added_token(290, "", true)),
        "tokenizer.json added token \"\": expected id 290, after those of the vocabulary, got none"
    );

    let config = |config: Value| refused(hugging_face(&TINY.json(), Some(&config)));
    assert_eq!(
        config(json!({ "eos_token": "<none>" })),
        "tokenizer_config.json special token: expected a token of the vocabulary, got \"<none>\""
    );
    assert!(
        config(json!({ "eos_token": 3 })).starts_with("tokenizer_config.json eos_token: expected the text of a token")
    );
    assert!(
        config(json!({ "chat_template": [{ "name": "rag", "template": "" }] }))
            .contains("a template with the name default")
    );
    assert!(config(json!([])).starts_with("tokenizer_config.json: expected JSON"));
}

#[test]
fn tokenizer_config_names_and_adds_special_tokens() {
    let config = json!({
        "bos_token": { "content": "xyz", "lstrip": false },
        "eos_token": "<think>",
        "pad_token": null,
        "additional_special_tokens": ["Ġxyz", { "content": "<|end|>" }],
        "added_tokens_decoder": {
            "290": { "content": "<new>", "lstrip": true, "rstrip": true, "single_word": false, "normalized": false, "special": true },
            "1": { "content": "<think>", "lstrip": true, "rstrip": true, "single_word": false, "normalized": false, "special": true },
        },
        "chat_template": [{ "name": "tool_use", "template": "no" }, { "name": "default", "template": "yes" }],
    });
    let tokenizer = hugging_face(&TINY.json(), Some(&config)).unwrap();
    assert_eq!(tokenizer.chat_template(), Some("yes"));
    let named: Vec<(&str, &str)> = tokenizer.named_tokens().iter().map(|(name, text)| (&**name, &**text)).collect();
    assert_eq!(named, [("bos_token", "xyz"), ("eos_token", "<think>")]);
    for text in ["xyz", "<think>", "Ġxyz", "<|end|>", "<new>"] {
        assert!(tokenizer.special_id(text).is_some(), "{text}");
    }
    assert_eq!(tokenizer.special_id("</think>"), None);
    let ids = tokenizer.encode("a <new> b", Specials::Tokens).unwrap();
    assert_eq!(ids, [b'a'.into(), 290, b'b'.into()], "a token that swallows the spaces around it");
    assert_eq!(tokenizer.encode("<new>", Specials::Text).unwrap().len(), 5);
    let refused = refused(hugging_face(
        &TINY.json(),
        Some(&json!({ "added_tokens_decoder": { "295": config["added_tokens_decoder"]["290"] } })),
    ));
    assert!(refused.contains("without gaps"), "{refused}");
}

/// Byte-pair encoding of characters, as in Llama 2.
#[test]
fn vocabularies_with_byte_fallback_spell_bytes() {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["▁", "a", "b", "▁a", "▁ab"].map(str::to_owned));
    let vocabulary: BTreeMap<&String, usize> = tokens.iter().zip(0..).collect();
    let steps = |list: &str, steps: Value| json!({ "type": "Sequence", list: steps });
    let mut json = json!({
        "added_tokens": [added_token(0, "<unk>", true), added_token(1, "<s>", true), added_token(2, "</s>", true)],
        "normalizer": steps("normalizers", json!([
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
        ])),
        "pre_tokenizer": null,
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true, "vocab": vocabulary,
            "merges": [["▁", "a"], ["▁a", "b"]],
        },
    });
    let named = BTreeMap::new();
    let template = template("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}", &named).unwrap();
    let check = |json: &Value, is_once: bool| {
        let tokenizer = hugging_face(json, None).unwrap();
        assert!(tokenizer.missing_bytes().is_empty());
        let encode = |text, specials| tokenizer.encode(text, specials).unwrap();
        assert_eq!(
            encode("ab é\0", Specials::Text).iter().map(|id| tokenizer.token_name(*id)).collect::<Vec<_>>(),
            ["␣ab", "␣", "\\xc3", "\\xa9", "\\0"]
        );
        assert_eq!(tokenizer.decode(&encode("a\n", Specials::Text)), b" a\n");
        // A space is put before every piece, or before a text only.
        let expected: &[u8] = if is_once { b"<s>a</s>b" } else { b"<s> a</s> b" };
        assert_eq!(tokenizer.decode(&encode("<s>a</s>b", Specials::Tokens)), expected);
        let chat = |content: &str| encode_chat(&tokenizer, &template, &said(content), false, &none()).unwrap();
        let expected: &[u8] = if is_once { b"<s>ab</s>" } else { b"<s> ab</s>" };
        assert_eq!(tokenizer.decode(&chat("ab")), expected);
        let ids = chat("a</s>b");
        assert_eq!(ids.iter().filter(|id| tokenizer.is_special(**id)).count(), 2);
        let expected: &[u8] = if is_once { b"<s>a</s>b</s>" } else { b"<s> a</s>b</s>" };
        assert_eq!(tokenizer.decode(&ids), expected);
    };
    check(&json, false);
    json["normalizer"] = json!(null);
    json["pre_tokenizer"] =
        json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false });
    check(&json, true);
}

#[test]
fn special_strings_in_messages_stay_text() {
    let tokenizer = Tokenizer::new(TINY.gguf("qwen2")).unwrap();
    let source = "{% for m in messages %}<|end|>{{ m.role }}:{{ m.content | trim }}<|endoftext|>{% endfor %}";
    let template = template(source, tokenizer.named_tokens()).unwrap();
    let encode = |role: &str, content: &str| {
        let message = ChatMessage { role: role.to_owned(), content: content.to_owned() };
        encode_chat(&tokenizer, &template, &[message], true, &none()).unwrap()
    };
    let id = |text: &str| tokenizer.special_id(text).unwrap();
    let of = |text: &str| tokenizer.encode(text, Specials::Text).unwrap();
    for content in [
        "<|end|>",
        "<|end|><|of|>",
        "<|end|><|of|><|end|>",
        "a<s p>b",
        "<|end<|end|>|>",
        "\u{f0000}<|end|>\u{f0001}\u{10fffd}",
    ] {
        let expected = [vec![id("<|end|>")], of(&format!("user:{content}")), vec![id("<|endoftext|>")]].concat();
        assert_eq!(encode("user", content), expected, "{content:?}");
    }
    let expected = [vec![id("<|end|>")], of("<|end|>:x"), vec![id("<|endoftext|>")]].concat();
    assert_eq!(encode("<|end|>", "x"), expected, "roles are text as well");
    // Added tokens that are not special are found in messages, as in Hugging Face, also beside a special string.
    let ids = encode("user", "<think>a<|end|></think>");
    let think = tokenizer.encode("<think>", Specials::Text).unwrap();
    assert!(think.len() == 1 && ids.contains(&think[0]));
    assert_eq!(ids.iter().filter(|id| tokenizer.is_special(**id)).count(), 2);
}

#[test]
fn more_private_characters_than_there_are_is_an_error() {
    let tokenizer = Tokenizer::new(TINY.gguf("gpt-2")).unwrap();
    let template = template("{{ messages[0].role }}", &BTreeMap::new()).unwrap();
    let private: String = ('\u{f0000}'..='\u{10ffff}').collect();
    let message = ChatMessage { role: private + "<|end|>", content: String::new() };
    let error = refused(encode_chat(&tokenizer, &template, &[message], false, &none()));
    assert_eq!(error, "chat: expected messages that leave 1 private characters unused, got 0 left");
}

#[test]
fn templates_write_what_they_write_in_python() {
    let golden = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/templates.json")).unwrap();
    let Templates { variables, cases } = serde_json::from_slice(&golden).unwrap();
    assert!(cases.len() > 50);
    for case in cases {
        let compiled = template(&case.source, &variables);
        let rendered = compiled
            .and_then(|template| template.render(&messages(&case.messages), case.add_generation_prompt, &case.options));
        match (rendered, case.rendered, case.error) {
            (Ok(rendered), Some(expected), _) => assert_eq!(rendered, expected, "{}", case.name),
            (Err(error), None, Some(reason)) => {
                if case.source.contains("raise_exception") {
                    assert!(
                        error.to_string().ends_with(&format!("the template raises {reason:?}")),
                        "{error} / {reason}"
                    );
                }
            }
            (rendered, expected, reason) => panic!("{}: got {rendered:?}, expected {expected:?} {reason:?}", case.name),
        }
    }
}

#[test]
fn errors_of_templates_name_the_line() {
    let fails = |source: &str| {
        let compiled = template(source, &BTreeMap::new());
        refused(compiled.and_then(|template| template.render(&said("hello"), true, &none())))
    };
    let raised = fails("\n\n{{ raise_exception('only \"one\"') }}");
    assert_eq!(raised, r#"chat template, line 3: invalid operation: the template raises "only \"one\"""#);
    assert!(fails("a\n{% if %}").starts_with("chat template, line 2: syntax error: "), "{}", fails("a\n{% if %}"));
    assert_eq!(fails("a\nb\n{{ f() }}"), "chat template, line 3: unknown function: f is unknown");
    assert!(fails("{{ strftime_now('%Q') }}").contains("expected a directive for a date, got %Q"));
    assert!(fails("{{ debug() }}").contains("unknown function"));
    assert!(fails("{% include 'a' %}").starts_with("chat template, line 1: "), "{}", fails("{% include 'a' %}"));
    let template = template("a", &BTreeMap::new()).unwrap();
    assert_eq!(refused(template.render(&[], true, &none())), "chat template: expected at least one message, got none");
}

#[test]
fn hostile_templates_end() {
    let fails = |source: &str| {
        let compiled = template(source, &BTreeMap::new());
        refused(compiled.and_then(|template| template.render(&said("hello"), true, &none())))
    };
    let too_much = "expected an end, got more work than a chat takes";
    let loops = "{% for a in range(1000) %}{% for b in range(1000) %}{% for c in range(1000) %}{% endfor %}{% endfor %}{% endfor %}";
    assert_eq!(fails(loops), format!("chat template, line 1: {too_much}"));
    let doubled = "{% set ns = namespace(x='a') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
    assert!(fails(doubled).ends_with(too_much));
    assert!(fails("{{ 'a' * 1000000000000 }}").starts_with("chat template, line 1: "));
    assert!(fails("{% for a in range(100000000) %}{% endfor %}").starts_with("chat template, line 1: "));
    assert!(fails("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").contains("recursion limit exceeded"));
    assert!(fails("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}").contains("recursion limit exceeded"));
    assert!(fails(&"{% if a %}".repeat(5000)).contains("recursion limits"));
    assert!(fails(&format!("{{{{ {}1{} }}}}", "(".repeat(2000), ")".repeat(2000))).contains("recursion limits"));
    assert!(fails(&format!("{{{{ a{} }}}}", "+a".repeat(5000))).contains("expected tags of at most 4096 bytes"));
    assert!(fails(&" ".repeat((128 << 10) + 1)).contains("expected at most 131072 bytes, got 131073"));
    assert!(fails("{{ 'a' * 524289 }}").contains("expected at most 524288 bytes of text, got more"));
    // Lists in lists take stack when they are compared, printed and dropped.
    let nested = "{% set ns = namespace(x=[], y=[]) %}{% for a in range(100000) %}{% set ns.x = [[[[[[[[ns.x]]]]]]]] %}{% endfor %}";
    assert!(fails(nested).ends_with(too_much));
    let deep = |rest: &str| {
        format!(
            "{{% set ns = namespace(x=[1], y=[1]) %}}{{% for a in range(60) %}}{{% set ns.x = {open}ns.x{close} %}}{{% set ns.y = {open}ns.y{close} %}}{{% endfor %}}{rest}",
            open = "[".repeat(50),
            close = "]".repeat(50)
        )
    };
    let render = |source: &str| template(source, &BTreeMap::new()).unwrap().render(&said(""), true, &none());
    assert_eq!(render(&deep("{{ ns.x == ns.y }}")).unwrap(), "True");
    assert_eq!(render(&deep("{{ ns.x }}")).unwrap().len(), 6003);
    assert!(refused(render(&deep("{{ ns.x | tojson }}"))).contains("expected at most 100 levels"));
    let shared = "{% set ns = namespace(x=[1]) %}{% for a in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    assert!(
        refused(render(&format!("{shared}{{{{ ns.x | tojson }}}}")))
            .contains("expected at most 524288 bytes, got more")
    );
    assert!(
        refused(render(&format!("{shared}{{{{ ns.x }}}}"))).contains("expected at most 524288 bytes of text, got more")
    );
}

/// The longest tags of the kinds that take most stack.
#[test]
fn long_templates_compile() {
    let long = [
        format!("{{{{ a{} }}}}", "+a".repeat(2040)),
        format!("{{{{ {}a }}}}", "-".repeat(4000)),
        format!("{{{{ a{} }}}}", "()".repeat(2000)),
        format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(10_000)),
        format!("{{% set {}a{} = a %}}", "(".repeat(2000), ")".repeat(2000)),
    ];
    for source in long {
        if let Ok(template) = template(&source, &BTreeMap::new()) {
            let _ = template.render(&said(""), true, &none());
        }
    }
}

/// Texts of what tokenizers and templates are sensitive to.
fn text() -> impl Strategy<Value = String> {
    let special = prop::sample::select(vec![
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_",
        "end|>",
        "\n",
        "  ",
        "\t",
        "12",
        "é",
        "e\u{301}",
        "漢字",
        "🙂",
        "\u{f0000}",
        "'s",
        " the",
        "\u{a0}",
        "\u{2028}",
        "\0",
        "\u{4}",
    ]);
    let piece = prop_oneof![special.prop_map(str::to_owned), any::<char>().prop_map(String::from), "[ -~]{0,8}"];
    prop::collection::vec(piece, 0..20).prop_map(|pieces| pieces.concat())
}

/// Texts that nearly are templates.
fn source() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "#}",
        "-",
        "+",
        " for ",
        " in ",
        " if ",
        " else ",
        " elif ",
        " endif ",
        " endfor ",
        " set ",
        " macro ",
        " endmacro ",
        " generation ",
        " endgeneration ",
        " raw ",
        " endraw ",
        "messages",
        "message",
        "m",
        ".role",
        ".content",
        "['content']",
        "[",
        "]",
        "(",
        ")",
        "{",
        "}",
        "|",
        " | tojson",
        " | trim",
        "'",
        "\"",
        "\\",
        "1",
        "99999999999",
        "1.5",
        "*",
        "**",
        "~",
        "==",
        "=",
        ",",
        ":",
        "loop",
        ".index0",
        "[::-1]",
        "raise_exception",
        "strftime_now('%Y')",
        "namespace(a=1)",
        "range(9)",
        " is ",
        "defined",
        "none",
        "\n",
        " ",
        "é",
        "\u{f0000}",
        " not ",
        " and ",
        " break ",
        " continue ",
        " filter ",
        " call ",
        " with ",
        " recursive ",
        ".split('a')",
        ".items()",
        "%",
    ]);
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

fn statement() -> impl Strategy<Value = String> {
    let expression = prop::sample::select(vec![
        "messages",
        "messages | tojson",
        "messages[0].content[::-1]",
        "messages[-1].role ~ 1",
        "m",
        "x",
        "loop",
        "ns.x",
        "[x, x]",
        "{'a': x}",
        "x * 3",
        "x + x",
        "x in m",
        "x | length",
        "m.content.strip()",
        "m.items() | list",
        "range(5) | list",
        "x.foo",
        "x()",
        "f(x)",
        "caller()",
        "x is mapping",
        "-x",
        "x | default(1) | string",
        "strftime_now(x)",
        "x | tojson(indent=x)",
    ]);
    let leaf = expression.prop_map(|expression| format!("{{{{ {expression} }}}}"));
    leaf.prop_recursive(4, 24, 4, |inner| {
        let wrap = prop::sample::select(vec![
            ("{% for m in messages %}", "{% endfor %}"),
            ("{% for x in m %}", "{% endfor %}"),
            ("{% if x %}", "{% endif %}"),
            ("{% set x %}", "{% endset %}"),
            ("{% macro f(x) %}", "{% endmacro %}"),
            ("{% generation %}", "{% endgeneration %}"),
            ("{% call f(1) %}", "{% endcall %}"),
            ("{%- set x = messages -%}", "{% set x = [x] %}"),
            ("{% set ns = namespace(x=1) %}", "{% set ns.x = m %}"),
            ("{% filter upper %}", "{% endfilter %}"),
        ]);
        (wrap, prop::collection::vec(inner, 1..4))
            .prop_map(|((open, close), inner)| format!("{open}{}{close}", inner.concat()))
    })
}

/// Steps of a tokenizer that are known, with arguments that nobody uses.
fn steps() -> impl Strategy<Value = (Value, Value)> {
    let pattern = || {
        let patterns = ["a*", "(?=a)", "$", "^", r"\\b", r"\\s*", ".", "a|", "()", "(a)(?!b)", " ", "é"];
        let pattern = prop::sample::select(patterns.to_vec());
        (pattern, any::<bool>()).prop_map(|(text, is_regex)| json!({ if is_regex { "Regex" } else { "String" }: text }))
    };
    let content = || prop::sample::select(vec!["", "▁", "a", "xx", "\u{301}", "<|end|>"]);
    let normalizer = prop_oneof![
        prop::sample::select(vec!["NFC", "NFD", "NFKC", "NFKD", "Lowercase"]).prop_map(|kind| json!({ "type": kind })),
        content().prop_map(|content| json!({ "type": "Prepend", "prepend": content })),
        (pattern(), content())
            .prop_map(|(pattern, content)| json!({ "type": "Replace", "pattern": pattern, "content": content })),
    ];
    let behavior = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"];
    let behavior = || prop::sample::select(behavior.to_vec());
    let split = (pattern(), behavior(), any::<bool>()).prop_map(
        |(pattern, behavior, invert)| json!({ "type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert }),
    );
    let pre_tokenizer = prop_oneof![
        split,
        behavior().prop_map(|behavior| json!({ "type": "Punctuation", "behavior": behavior })),
        any::<bool>().prop_map(|individual| json!({ "type": "Digits", "individual_digits": individual })),
        any::<bool>()
            .prop_map(|prefix| json!({ "type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true })),
        (
            prop::sample::select(vec!["▁", "a", " "]),
            prop::sample::select(vec!["first", "always", "never"]),
            any::<bool>()
        )
            .prop_map(|(replacement, scheme, split)| {
                json!({ "type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme, "split": split })
            }),
    ];
    let many = |list: &'static str, step: BoxedStrategy<Value>| {
        prop::collection::vec(step, 0..4).prop_map(move |steps| json!({ "type": "Sequence", list: steps }))
    };
    (many("normalizers", normalizer.boxed()), many("pretokenizers", pre_tokenizer.boxed()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn texts_come_back_from_their_tokens(text in text()) {
        let kept: Vec<u8> = text.bytes().filter(|byte| !FROM_GGUF.missing_bytes().contains(byte)).collect();
        for specials in [Specials::Text, Specials::Tokens] {
            let ids = FROM_GGUF.encode(&text, specials).unwrap();
            prop_assert_eq!(FROM_GGUF.decode(&ids), kept.clone());
            let has_special = ids.iter().any(|id| FROM_GGUF.is_special(*id));
            prop_assert!(specials == Specials::Tokens || !has_special);
        }
    }

    #[test]
    fn chats_come_back_from_their_tokens_and_hold_the_special_tokens_of_the_template(texts in prop::collection::vec(text(), 1..4)) {
        let role = |index: usize| ["user", "assistant"][index % 2];
        let message = |(index, content): (usize, &String)| ChatMessage { role: role(index).to_owned(), content: content.clone() };
        let messages: Vec<ChatMessage> = texts.iter().enumerate().map(message).collect();
        let rendered = TEMPLATE.render(&messages, true, &none()).unwrap();
        let ids = encode_chat(&FROM_GGUF, &TEMPLATE, &messages, true, &none()).unwrap();
        let kept: Vec<u8> = rendered.bytes().filter(|byte| !FROM_GGUF.missing_bytes().contains(byte)).collect();
        prop_assert_eq!(FROM_GGUF.decode(&ids), kept);
        // Two for each message, two for the default system prompt, one for the answer.
        prop_assert_eq!(ids.iter().filter(|id| FROM_GGUF.is_special(**id)).count(), 2 * messages.len() + 3);
    }

    #[test]
    fn random_templates_never_panic(source in source()) {
        let outcome = template(&source, FROM_GGUF.named_tokens()).and_then(|template| template.render(&said("a"), true, &none()));
        prop_assert!(outcome.map_or_else(|error| !error.to_string().contains("panicked"), |_| true));
    }

    #[test]
    fn random_programs_never_panic(source in statement()) {
        let outcome = template(&source, FROM_GGUF.named_tokens()).and_then(|template| template.render(&said("a"), true, &none()));
        prop_assert!(outcome.map_or_else(|error| !error.to_string().contains("panicked"), |_| true));
    }

    #[test]
    fn odd_tokenizers_never_panic(
        (normalizer, pre_tokenizer) in steps(), flags in prop::collection::vec(any::<bool>(), 20), text in text(),
    ) {
        let mut json = TINY.json();
        json["normalizer"] = normalizer;
        json["pre_tokenizer"] = pre_tokenizer;
        json["model"]["byte_fallback"] = json!(true);
        for (token, flags) in json["added_tokens"].as_array_mut().unwrap().iter_mut().zip(flags.chunks(4)) {
            for (name, flag) in ["lstrip", "rstrip", "single_word", "normalized"].iter().zip(flags) {
                token[name] = json!(flag);
            }
        }
        if let Ok(tokenizer) = hugging_face(&json, None) {
            let text = format!("{text} <|end|> a<|end|><|of|>\u{e9}<think> {text}");
            let _ = tokenizer.encode(&text, Specials::Text);
            let _ = tokenizer.encode(&text, Specials::Tokens);
            let template = template("<|end|>{{ messages[0].content }}<|end|><think> ", &BTreeMap::new()).unwrap();
            let _ = encode_chat(&tokenizer, &template, &said(&text), true, &none());
        }
    }
}

/// A model's language over the real tokenizer.
mod asked {
    use domains::{Wording, domain, registry};
    use language::text::{Constraint, Specials, TextLanguage, TextOptions, Tokenizer, TokenizerParts};
    use language::{Error, Language as _, Next, random_answer, trace};
    use proto::{
        CounterRng, Difficulty, LegalTokens, Niche, Problem, ProblemOrigin, Purpose, Request, SetDictionary, TokenId,
        Verdict,
    };
    use regex::Regex;

    use super::SMOLLM2;

    const END: TokenId = 2;
    const OPTIONS: TextOptions = TextOptions { max_reply_tokens: 8, num_examples: 1, constraint: Constraint::None };

    fn language(options: TextOptions) -> TextLanguage {
        TextLanguage::new(Tokenizer::new(SMOLLM2.gguf()).unwrap(), 50_000, &[0], options).unwrap()
    }

    fn encode(text: &str) -> Vec<TokenId> {
        Tokenizer::new(SMOLLM2.gguf()).unwrap().encode(text, Specials::Text).unwrap()
    }

    fn problem() -> Problem {
        Problem { domain: "countdown".to_owned(), text: "7 3 -> 10".to_owned() }
    }

    fn request() -> Request {
        Request::Solve { problem: problem(), origin: ProblemOrigin::Exam, has_key: false }
    }

    #[test]
    fn a_request_is_a_conversation_that_the_template_writes() {
        let language = language(OPTIONS);
        let episode = language.open(&request()).unwrap();
        let prompt = Tokenizer::new(SMOLLM2.gguf()).unwrap().decode(episode.prompt());
        let prompt = String::from_utf8(prompt).unwrap();
        assert_eq!(prompt.matches("<|im_start|>user\n").count(), 2, "{prompt}");
        assert!(prompt.contains("make 10 from 7 and 3.<|im_end|>"), "{prompt}");
        assert!(prompt.contains("<|im_start|>assistant\n5 + 3<|im_end|>"), "{prompt}");
        assert!(prompt.ends_with("<|im_start|>assistant\n"), "{prompt}");
        assert_eq!(language.room(&problem()).unwrap().prompt, episode.prompt().len());
        assert_eq!(language.end_tokens(), [0, END]);
        // Another request is not answered from the last one's prompt.
        let other = Request::Solve {
            problem: Problem { text: "9 2 -> 11".to_owned(), ..problem() },
            origin: ProblemOrigin::Exam,
            has_key: false,
        };
        assert_ne!(language.open(&other).unwrap().prompt(), episode.prompt());
    }

    #[test]
    fn a_reply_ends_with_an_end_token_and_is_judged_by_its_text() {
        let language = language(OPTIONS);
        for (reply, verdict) in
            [("<answer>7 + 3</answer>", Verdict::Correct), ("7 - 3", Verdict::Incorrect), ("?", Verdict::Malformed)]
        {
            let mut episode = language.open(&request()).unwrap();
            let mut tokens = encode(reply);
            for token in &tokens {
                assert_eq!((episode.next(), episode.check()), (Next::Choice(LegalTokens::Any), None));
                assert!(episode.push(*token));
            }
            assert_eq!(language.text(&request(), &tokens).unwrap(), None, "it is not complete");
            assert!(!episode.push(50_000), "no token of the model");
            assert!(episode.push(END) && !episode.push(END));
            assert_eq!((episode.next(), episode.check()), (Next::Done, Some(verdict)), "{reply}");
            tokens.push(END);
            assert_eq!(language.text(&request(), &tokens).unwrap().as_deref(), Some(domains::answer_of(reply)));
            assert_eq!(language.show("countdown", &tokens), reply);
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_no_answer() {
        let (language, tokenizer) = (language(OPTIONS), Tokenizer::new(SMOLLM2.gguf()).unwrap());
        let broken = (0..49_152).find(|token| std::str::from_utf8(tokenizer.bytes(*token)).is_err()).unwrap();
        assert_eq!(language.text(&request(), &[broken, END]).unwrap(), None);
        let mut episode = language.open(&request()).unwrap();
        assert!(episode.push(broken) && episode.push(END));
        assert_eq!(episode.check(), Some(Verdict::Malformed));
    }

    #[test]
    fn an_answer_is_spelled_as_a_reply() {
        let language = language(OPTIONS);
        for (answer, reply) in [("7 + 3", "7 + 3"), ("7\n+ 3", "<answer>7\n+ 3</answer>")] {
            let spelled = language.spell(&problem(), answer).unwrap().unwrap();
            assert_eq!(spelled, [encode(reply), vec![END]].concat());
            assert_eq!(language.text(&request(), &spelled).unwrap().as_deref(), Some(answer));
        }
        assert_eq!(language.spell(&problem(), "7\u{4}3").unwrap(), None, "no token has this byte");
    }

    /// The domain `strings` shows and asks for letters in this form, so that no token holds two of them.
    #[test]
    fn letters_apart_are_tokens_of_their_own() {
        let tokenizer = Tokenizer::new(SMOLLM2.gguf()).unwrap();
        let num_tokens = |text: &str| tokenizer.encode(text, Specials::Text).unwrap().len();
        let num_around = num_tokens("Reverse the letters:");
        for (first, second) in ('a'..='z').flat_map(|first| ('a'..='z').map(move |second| (first, second))) {
            let answer = format!("{first} {second} {first}");
            assert_eq!(num_tokens(&answer), 3, "{answer}");
            assert_eq!(num_tokens(&format!("Reverse the letters: {answer}")), num_around + 3, "{answer}");
        }
        assert_eq!(num_tokens("dog"), 1);
    }

    #[test]
    fn a_model_without_a_template_is_shown_where_replies_end() {
        let mut without_template = SMOLLM2.gguf();
        if let TokenizerParts::Gguf { chat_template, .. } = &mut without_template {
            *chat_template = None;
        }
        let language = TextLanguage::new(Tokenizer::new(without_template).unwrap(), 49_152, &[0], OPTIONS).unwrap();
        let prompt = language.open(&request()).unwrap().prompt().to_vec();
        let text = String::from_utf8(Tokenizer::new(SMOLLM2.gguf()).unwrap().decode(&prompt)).unwrap();
        assert!(text.starts_with("Question: Reply with an expression only") && text.ends_with("\n\nAnswer:"), "{text}");
        assert!(text.contains("Answer: 5 + 3<|im_end|>\n\nQuestion: Reply with an expression only"), "{text}");
        assert!(prompt.contains(&END));
    }

    #[test]
    fn what_cannot_be_proposed_in_words_is_refused() {
        let language = language(OPTIONS);
        for (name, is_expected) in [
            ("file", (|error| matches!(error, Error::NoProposals { .. })) as fn(&Error) -> bool),
            ("arithmetic", |error| matches!(error, Error::Domain(_))),
        ] {
            let niche = Niche(if name == "arithmetic" { 0 } else { 1 });
            let request = Request::Propose { domain: name.to_owned(), niche, difficulty: Difficulty::Hard };
            let refusals = [
                language.open(&request).err(),
                language.propose_prompt(name, niche, Difficulty::Hard).err(),
                language.proposal_room(name, niche).err(),
            ];
            assert!(refusals.iter().all(|error| error.as_ref().is_some_and(is_expected)), "{name}: {refusals:?}");
        }
        assert!(TextLanguage::new(Tokenizer::new(SMOLLM2.gguf()).unwrap(), 49_151, &[0], OPTIONS).is_err());
    }

    #[test]
    fn constrained_answers_match_the_pattern_of_their_domain() {
        let constrained = TextOptions { max_reply_tokens: 64, num_examples: 3, constraint: Constraint::Answer };
        let [constrained, free] =
            [constrained, TextOptions { constraint: Constraint::None, ..constrained }].map(language);
        let in_words = registry().iter().filter_map(|domain| domain.wording());
        for (problem, reply) in in_words.clone().flat_map(|wording| wording.examples()) {
            let wording = domain(&problem.domain).unwrap().wording().unwrap();
            let request = Request::Solve { problem: problem.clone(), origin: ProblemOrigin::Exam, has_key: false };
            let open = || constrained.open(&request).unwrap();
            let Some(pattern) = wording.answer_pattern(&problem).unwrap() else {
                assert_eq!(open().next(), Next::Choice(LegalTokens::Any));
                assert_eq!(open().prompt(), free.open(&request).unwrap().prompt());
                continue;
            };
            let whole = Regex::new(&format!(r"\A(?:{pattern})\z")).unwrap();
            let text = |tokens: &[TokenId]| constrained.text(&request, tokens).unwrap().unwrap();
            for walk in 0..20 {
                let mut rng = CounterRng::new(5, Purpose::Rollout, walk, 0, 0);
                let answer = text(&random_answer(open(), &mut rng));
                assert!(whole.is_match(&answer), "{}: {answer:?}", problem.domain);
            }
            let answer = domains::answer_of(&reply);
            let spelled = constrained.spell(&problem, answer).unwrap();
            let spelled = spelled.unwrap_or_else(|| panic!("{problem:?}: {answer:?} does not match {pattern:?}"));
            assert_eq!(spelled, [encode(answer), vec![END]].concat());
            assert_eq!(text(&spelled), answer);
            assert!(trace(open(), &spelled, &mut SetDictionary::default()).is_some());
            assert_eq!(constrained.spell(&problem, "\u{e9}\n\n\n").unwrap(), None, "it matches no pattern");
        }
        assert!(in_words.count() > 0);
    }

    /// The largest patterns are of programs: every answer is one of the type and the length that are asked for.
    #[test]
    fn programs_can_be_asked_for() {
        let constrained = TextOptions { max_reply_tokens: 64, num_examples: 3, constraint: Constraint::Answer };
        let language = language(constrained);
        let programs = domain("programs").unwrap();
        for text in ["? max 4 : [1 2] -> [2 1] ; [3 4] -> [4 3]", "? max 4 : [1 2] -> 3 ; [3 4] -> 7"] {
            let problem = Problem { domain: "programs".to_owned(), text: text.to_owned() };
            let request = Request::Solve { problem: problem.clone(), origin: ProblemOrigin::Exam, has_key: false };
            for walk in 0..50 {
                let mut rng = CounterRng::new(5, Purpose::Rollout, walk, 0, 0);
                let answer = random_answer(language.open(&request).unwrap(), &mut rng);
                let text = language.text(&request, &answer).unwrap().unwrap();
                let judged = programs.judge(&problem, None, &text).unwrap();
                assert_ne!(judged.verdict, Verdict::Malformed, "{text}: {judged:?}");
            }
        }
    }

    fn ask(name: &str, niche: Niche, difficulty: Difficulty) -> Request {
        Request::Propose { domain: name.to_owned(), niche, difficulty }
    }

    /// From the request over its constraint to the problem that is read, and back to the request that the problem answers.
    #[test]
    fn proposals_are_asked_for_in_words_and_read_from_what_matches() {
        let constrained = TextOptions { max_reply_tokens: 96, num_examples: 2, constraint: Constraint::Answer };
        let (language, tokenizer) = (language(constrained), Tokenizer::new(SMOLLM2.gguf()).unwrap());
        for domain in registry() {
            let Some(proposing) = domain.wording().and_then(Wording::proposing) else { continue };
            for level in domain.ladder_levels() {
                let (mut num_admitted, mut num_moved) = (0, 0);
                for index in 0..5 {
                    let keyed = domain.ladder(level.level, 3, index);
                    let niche = domain.niche(&keyed.problem, keyed.key.as_ref()).unwrap();
                    let request = ask(domain.name(), niche, Difficulty::Hard);
                    let prompt = language.open(&request).unwrap().prompt().to_vec();
                    let text = String::from_utf8(tokenizer.decode(&prompt)).unwrap();
                    let [(_, first), (_, second), _] = &proposing.examples(niche).unwrap()[..] else { panic!() };
                    assert!(
                        [first, second].iter().all(|shown| text.contains(&format!("\n{shown}<|im_end|>"))),
                        "{text}"
                    );
                    let asked = format!("Kind: {}. Difficulty: hard.<|im_end|>", domain.describe_niche(niche));
                    assert!(text.contains(&asked) && text.matches("Difficulty").count() == 1, "{text}");
                    assert_eq!(language.propose_prompt(domain.name(), niche, Difficulty::Hard).unwrap(), prompt);
                    let room = language.proposal_room(domain.name(), niche).unwrap();
                    assert!(prompt.len() <= room.prompt && room.answer == 96);
                    for walk in 0..8 {
                        let mut rng = CounterRng::new(5, Purpose::Rollout, walk, index, 0);
                        let proposal = random_answer(language.open(&request).unwrap(), &mut rng);
                        assert!(proposal.len() <= 96, "{proposal:?}");
                        let text = language.text(&request, &proposal).unwrap().unwrap();
                        let Ok(admitted) = domain.admit(niche, &text).unwrap() else { continue };
                        num_admitted += 1;
                        let found = domain.niche(&admitted.problem, admitted.key.as_ref()).unwrap();
                        num_moved += usize::from(found != niche);
                        let as_found = language.open(&ask(domain.name(), found, Difficulty::Easy)).unwrap();
                        assert!(trace(as_found, &proposal, &mut SetDictionary::default()).is_some(), "{text}");
                    }
                }
                assert!(num_admitted > 0 && num_moved > 0, "{} {level:?}: {num_admitted} {num_moved}", domain.name());
            }
        }
    }

    #[test]
    fn the_prompt_of_a_proposal_names_its_niche_and_difficulty() {
        let language = language(OPTIONS);
        let easy = language.propose_prompt("arithmetic", Niche(0x0902), Difficulty::Easy).unwrap();
        let text = String::from_utf8(Tokenizer::new(SMOLLM2.gguf()).unwrap().decode(&easy)).unwrap();
        assert!(text.contains("with a value from 80 to 89. Difficulty: easy."), "{text}");
        let other = |niche, difficulty| language.propose_prompt("arithmetic", Niche(niche), difficulty).unwrap();
        assert!(other(0x0902, Difficulty::Hard) != easy && other(0x0802, Difficulty::Easy) != easy);
        assert_eq!(other(0x0902, Difficulty::Easy), easy);
    }

    #[test]
    fn a_free_proposal_is_read_as_an_answer_is() {
        let language = language(OPTIONS);
        let request = ask("arithmetic", Niche(0x0902), Difficulty::Hard);
        for (reply, proposal) in [
            ("47 + 38", "47 + 38"),
            ("Here is one:\n47 + 38\n", "47 + 38"),
            ("<answer>47 + 38</answer> is hard.", "47 + 38"),
            ("", ""),
        ] {
            let reply = encode(reply);
            assert_eq!(language.text(&request, &reply).unwrap(), None, "it is not complete");
            let text = language.text(&request, &[reply, vec![END]].concat()).unwrap();
            assert_eq!(text.as_deref(), Some(proposal));
        }
        let mut episode = language.open(&request).unwrap();
        assert_eq!(episode.next(), Next::Choice(LegalTokens::Any));
        assert!(episode.push(END));
        assert_eq!(
            (episode.next(), episode.check()),
            (Next::Done, None),
            "nothing is to be found out about a proposal"
        );
    }
}
