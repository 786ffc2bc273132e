//! How a conversation is written as one text.

mod functions;
mod json;
mod tags;

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Value};

use super::MAX_TEXT_BYTES;
use crate::Error;

/// The longest template that is compiled, in bytes.
const MAX_TEMPLATE_BYTES: usize = 128 << 10;
const NAME: &str = "chat";

/// How long compiling or rendering may take: hundreds of times what the work that is allowed takes. Work on lists that contain each
/// other many times over is not counted as such.
const TIME_LIMIT: Duration = Duration::from_secs(20);
/// For templates of the longest tags, of which every byte is an operator.
const COMPILE_STACK_BYTES: usize = 128 << 20;

/// What a render may cost, in units of [`Environment::set_fuel`]: about an instruction or 64 bytes.
const BASE_FUEL: u64 = 20_000;
/// The 55 templates in the repository of TRL (at the end of 2026) take up to 332 for a message.
const FUEL_PER_MESSAGE: u64 = 1_000;
/// Every byte may be copied 16 times.
const FUEL_PER_BYTES: usize = 4;
const MAX_FUEL: u64 = 500_000;
const BASE_STACK_BYTES: usize = 4 << 20;
/// Lists can be nested as deep as there is fuel, and are compared, printed and dropped level by level: at most 1,200 bytes of stack for
/// a unit of fuel in a build without optimisation.
const STACK_BYTES_PER_FUEL: usize = 2 << 10;

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ChatMessage {
    /// Who says it: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// What else a template may use, by name: for example `enable_thinking`. Keys of objects are sorted.
pub type TemplateOptions = BTreeMap<String, serde_json::Value>;

/// The date that a template may write.
///
/// Given rather than read from the clock: equal conversations are equal prompts on every day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    year: u16,
    month: u8,
    day: u8,
}

/// A compiled template, with the settings and functions that templates for Hugging Face's `transformers` expect.
pub struct ChatTemplate {
    environment: Environment<'static>,
    named: BTreeMap<String, String>,
    source: String,
}

impl Date {
    /// Returns a date of the Gregorian calendar, years 1 to 9999; `None` if there is no such day.
    pub fn new(year: u16, month: u8, day: u8) -> Option<Date> {
        let is_leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let num_days = match month {
            1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
            4 | 6 | 9 | 11 => 30,
            2 if is_leap => 29,
            2 => 28,
            _ => return None,
        };
        ((1..=9999).contains(&year) && (1..=num_days).contains(&day)).then_some(Date { year, month, day })
    }
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// - `named_tokens`: [`Tokenizer::named_tokens`](super::Tokenizer::named_tokens), which the template can write.
    /// - `date`: what `strftime_now` formats, at midnight.
    ///
    /// # Errors
    /// [`Error::Template`] when the source does not parse or is too large.
    pub fn new(source: &str, named_tokens: &BTreeMap<String, String>, date: Date) -> Result<ChatTemplate, Error> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(fails(format!("expected at most {MAX_TEMPLATE_BYTES} bytes, got {}", source.len())));
        }
        let rewritten = tags::rewrite(source)?;
        let environment = on_own_stack(COMPILE_STACK_BYTES, move || {
            let mut environment = Environment::new();
            functions::add_all(&mut environment, date);
            let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
            environment.set_syntax(syntax.map_err(explain)?);
            environment.add_template_owned(NAME, rewritten).map_err(explain)?;
            Ok(environment)
        })?;
        Ok(ChatTemplate { environment, named: named_tokens.clone(), source: source.to_owned() })
    }

    /// Writes a conversation as one text.
    ///
    /// - `add_generation_prompt`: whether the text ends where the answer of the assistant begins.
    /// - `options`: take precedence over named tokens.
    ///
    /// # Errors
    /// [`Error::Template`] when there are no messages, when the template raises an error or makes one, and when it does too much or
    /// writes more than [`MAX_TEXT_BYTES`].
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        options: &TemplateOptions,
    ) -> Result<String, Error> {
        if messages.is_empty() {
            return Err(fails("expected at least one message, got none".to_owned()));
        }
        let num_bytes: usize = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        if num_bytes > MAX_TEXT_BYTES {
            return Err(fails(format!("expected messages of at most {MAX_TEXT_BYTES} bytes, got {num_bytes}")));
        }
        let for_messages = FUEL_PER_MESSAGE.saturating_mul(messages.len() as u64);
        let fuel = (BASE_FUEL + for_messages + (num_bytes / FUEL_PER_BYTES) as u64).min(MAX_FUEL);
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let context = self.context(messages, add_generation_prompt, options);
        on_own_stack(BASE_STACK_BYTES + STACK_BYTES_PER_FUEL * fuel as usize, move || {
            let template = environment.get_template(NAME).map_err(explain)?;
            let mut text = Bounded(Vec::new());
            let written = template.render_captured_to(context, &mut text).map(|_| ());
            written.map_err(|error| match error.kind() {
                minijinja::ErrorKind::OutOfFuel => Error::Template {
                    line: error.line(),
                    reason: "expected an end, got more work than a chat takes".to_owned(),
                },
                _ => explain(error),
            })?;
            String::from_utf8(text.0).map_err(|error| fails(error.to_string()))
        })
    }

    /// Returns the source that was compiled.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    fn context(&self, messages: &[ChatMessage], add_generation_prompt: bool, options: &TemplateOptions) -> Value {
        let message = |message: &ChatMessage| {
            Value::from_pairs([("role", Value::from(&*message.role)), ("content", Value::from(&*message.content))])
        };
        let mut variables = BTreeMap::new();
        // They are always defined in Hugging Face, and templates test whether they are none.
        variables.insert("tools", Value::from(()));
        variables.insert("documents", Value::from(()));
        variables.extend(self.named.iter().map(|(name, text)| (&**name, Value::from(&**text))));
        variables.extend(options.iter().map(|(name, value)| (&**name, json::to_value(value))));
        variables.insert("messages", messages.iter().map(message).collect());
        variables.insert("add_generation_prompt", Value::from(add_generation_prompt));
        Value::from_pairs(variables)
    }
}

/// Runs the template engine where it finds as much stack as it can need, for as long as [`TIME_LIMIT`].
fn on_own_stack<T: Send + 'static>(
    stack_bytes: usize,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let (sender, receiver) = sync_channel(1);
    let thread = thread::Builder::new().name("chat template".to_owned()).stack_size(stack_bytes);
    // Nobody listens after the time limit.
    let spawned = thread.spawn(move || drop(sender.send(work())));
    spawned.map_err(|error| fails(format!("cannot start a thread: {error}")))?;
    receiver.recv_timeout(TIME_LIMIT).unwrap_or_else(|error| match error {
        RecvTimeoutError::Timeout => Err(fails(format!("expected an end within {} s, got none", TIME_LIMIT.as_secs()))),
        RecvTimeoutError::Disconnected => Err(fails("the template engine panicked".to_owned())),
    })
}

fn fails(reason: String) -> Error {
    Error::Template { line: None, reason }
}

fn explain(error: minijinja::Error) -> Error {
    let mut reason = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        reason.push_str(&format!(": {error}"));
        cause = error.source();
    }
    Error::Template { line: error.line(), reason }
}

/// A text that does not grow beyond [`MAX_TEXT_BYTES`].
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_TEXT_BYTES {
            return Err(io::Error::other(format!("expected at most {MAX_TEXT_BYTES} bytes of text, got more")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
