//! Tokenizers and chat templates of pretrained models.
//!
//! A [`ChatTemplate`] writes a conversation as one text, and a [`Tokenizer`] cuts the text into tokens. [`encode_chat`] does both,
//! and keeps what people and models wrote apart from what the template wrote: only the template can produce special tokens.
//!
//! Both come with a model and are untrusted: what they get wrong is an error, never a panic.

mod chat;
mod language;
mod pattern;
mod template;
mod tokenizer;

pub use chat::encode_chat;
pub use language::{Constraint, TextLanguage, TextOptions};
pub use template::{ChatMessage, ChatTemplate, Date, TemplateOptions};
pub use tokenizer::{Specials, Tokenizer, TokenizerParts};

/// The longest text that is encoded or rendered, in bytes.
///
/// A pattern that splits text gives up after a million steps, and silently leaves the rest of the text whole: other tokens, and
/// no error. Patterns in use take at most about one step a byte.
pub const MAX_TEXT_BYTES: usize = 1 << 19;
