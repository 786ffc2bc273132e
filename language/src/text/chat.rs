//! Conversations as tokens.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use proto::TokenId;

use super::template::{ChatMessage, ChatTemplate, TemplateOptions};
use super::tokenizer::{Specials, Tokenizer};
use crate::Error;

/// Encodes a conversation: what a chat template writes, with the strings of special tokens in messages as text.
///
/// For messages without such strings, the tokens are those of `apply_chat_template` in Hugging Face's `transformers`. In others,
/// every occurrence of such a string stands for itself as a character of its own while the template is rendered, and is put back before
/// the text is encoded: so it is no special token, and merges with its neighbours as the rest of the message does. A template that
/// cuts messages to pieces and joins them can still make a special token of the parts.
///
/// - `add_generation_prompt`, `options`: as in [`ChatTemplate::render`].
///
/// # Errors
/// [`Error::Template`] when the template cannot be rendered, [`Error::Tokenizer`] when its text cannot be encoded.
pub fn encode_chat(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[ChatMessage],
    add_generation_prompt: bool,
    options: &TemplateOptions,
) -> Result<Vec<TokenId>, Error> {
    let special = Special::of(tokenizer);
    let strings = messages.iter().flat_map(|message| [&message.role, &message.content]);
    let found: BTreeSet<&str> = strings.flat_map(|text| special.find(text)).map(|(_, token)| token).collect();
    if found.is_empty() {
        let text = template.render(messages, add_generation_prompt, options)?;
        return tokenizer.encode(&text, Specials::Tokens);
    }

    let mask = Mask::new(found, &unavailable(tokenizer, template, messages, options))?;
    let hide = |message: &ChatMessage| ChatMessage {
        role: mask.hide(&message.role, &special),
        content: mask.hide(&message.content, &special),
    };
    let hidden: Vec<ChatMessage> = messages.iter().map(hide).collect();
    let text = template.render(&hidden, add_generation_prompt, options)?;
    let (text, added) = mask.show(&text, tokenizer.find_added(&text));
    tokenizer.encode_around(&text, &added)
}

/// Finds strings of special tokens.
struct Special<'a> {
    /// By their first byte, longest first.
    by_byte: BTreeMap<u8, Vec<&'a str>>,
}

impl<'a> Special<'a> {
    fn of(tokenizer: &'a Tokenizer) -> Special<'a> {
        let mut by_byte = BTreeMap::<u8, Vec<&str>>::new();
        for text in tokenizer.special_strings() {
            if let Some(byte) = text.bytes().next() {
                by_byte.entry(byte).or_default().push(text);
            }
        }
        by_byte.values_mut().for_each(|texts| texts.sort_by_key(|text| std::cmp::Reverse(text.len())));
        Special { by_byte }
    }

    /// Returns the leftmost occurrences, of the longest string at each place.
    fn find(&self, text: &str) -> Vec<(Range<usize>, &'a str)> {
        let mut found = Vec::new();
        let mut index = 0;
        while index < text.len() {
            let rest = &text.as_bytes()[index..];
            let candidates = self.by_byte.get(&rest[0]).into_iter().flatten();
            match candidates.copied().find(|token| rest.starts_with(token.as_bytes())) {
                Some(token) => {
                    found.push((index..index + token.len(), token));
                    index += token.len();
                }
                None => index += 1,
            }
        }
        found
    }
}

/// Characters that stand for strings of special tokens.
struct Mask<'a> {
    characters: BTreeMap<&'a str, char>,
    strings: BTreeMap<char, &'a str>,
}

impl<'a> Mask<'a> {
    fn new(strings: BTreeSet<&'a str>, unavailable: &BTreeSet<char>) -> Result<Mask<'a>, Error> {
        let free: Vec<char> =
            private().filter(|character| !unavailable.contains(character)).take(strings.len()).collect();
        if free.len() < strings.len() {
            let expected = format!("messages that leave {} private characters unused", strings.len());
            return Err(Error::Tokenizer { what: "chat".to_owned(), expected, got: format!("{} left", free.len()) });
        }
        let characters: BTreeMap<&str, char> = strings.into_iter().zip(free).collect();
        let strings = characters.iter().map(|(string, character)| (*character, *string)).collect();
        Ok(Mask { characters, strings })
    }

    fn hide(&self, text: &str, special: &Special<'_>) -> String {
        let mut hidden = String::with_capacity(text.len());
        let mut end = 0;
        for (range, token) in special.find(text) {
            hidden.push_str(&text[end..range.start]);
            hidden.push(self.characters[token]);
            end = range.end;
        }
        hidden.push_str(&text[end..]);
        hidden
    }

    /// Puts the strings back, and moves ranges of the text along.
    fn show(&self, text: &str, ranges: Vec<(Range<usize>, TokenId)>) -> (String, Vec<(Range<usize>, TokenId)>) {
        let mut shown = String::with_capacity(text.len());
        let mut end = 0;
        let mut show_until = |until: usize| {
            for character in text[end..until].chars() {
                match self.strings.get(&character) {
                    Some(string) => shown.push_str(string),
                    None => shown.push(character),
                }
            }
            end = until;
            shown.len()
        };
        let ranges =
            ranges.into_iter().map(|(range, token)| (show_until(range.start)..show_until(range.end), token)).collect();
        show_until(text.len());
        (shown, ranges)
    }
}

/// Returns the private characters that a text of the template could have in it already.
fn unavailable(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[ChatMessage],
    options: &TemplateOptions,
) -> BTreeSet<char> {
    let options = serde_json::to_string(options).unwrap_or_default();
    let messages = messages.iter().flat_map(|message| [&*message.role, &*message.content]);
    let named = tokenizer.named_tokens().values().map(String::as_str);
    let texts = messages.chain(tokenizer.added_strings()).chain(named).chain([template.source(), &*options]);
    texts.flat_map(str::chars).filter(|character| *character >= PRIVATE).collect()
}

/// The first character of the private planes.
const PRIVATE: char = '\u{f0000}';

fn private() -> impl Iterator<Item = char> {
    (PRIVATE..='\u{ffffd}').chain('\u{100000}'..='\u{10fffd}')
}
