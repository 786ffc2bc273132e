//! Text input from people: an optional leading byte order mark, one JSON object per line, no duplicate keys.

use std::fmt;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use domains::describe_json;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Number, Value};

/// Maximum line length, far longer than any problem with an answer.
const MAX_LINE_BYTES: u64 = 1 << 20;

/// Some editors and spreadsheets write it at the start of a text.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// Maximum characters of a key that a message quotes.
const MAX_KEY_CHARS: usize = 60;

/// JSON objects, one per line. Blank lines are skipped but counted in line numbers.
pub(crate) struct JsonLines {
    input: BufReader<Box<dyn Read>>,
    /// The file, or `standard input`.
    pub(crate) name: String,
    num_read: usize,
    line: Vec<u8>,
}

impl JsonLines {
    /// Opens a file; `-` is standard input.
    pub(crate) fn open(path: &Path) -> Result<JsonLines> {
        let name = name_of_input(path).display().to_string();
        let input: Box<dyn Read> = match path == Path::new("-") {
            true => Box::new(std::io::stdin()),
            false => Box::new(File::open(path).with_context(|| format!("open {name}"))?),
        };
        Ok(JsonLines { input: BufReader::new(input), name, num_read: 0, line: Vec::new() })
    }

    /// Reads bytes that were read from a file.
    pub(crate) fn of(bytes: Vec<u8>, name: String) -> JsonLines {
        let input: Box<dyn Read> = Box::new(std::io::Cursor::new(bytes));
        JsonLines { input: BufReader::new(input), name, num_read: 0, line: Vec::new() }
    }

    /// Reads the next line that is not blank. Returns its number with its object or an error about it, and `None` at the end.
    ///
    /// # Errors
    /// When reading the input fails.
    pub(crate) fn next(&mut self) -> Result<Option<(usize, Result<Value>)>> {
        loop {
            self.line.clear();
            let limit = MAX_LINE_BYTES + 1;
            let read = |error| anyhow::Error::new(error).context(format!("read {}", self.name));
            let num_bytes = self.input.by_ref().take(limit).read_until(b'\n', &mut self.line).map_err(read)?;
            if num_bytes == 0 {
                return Ok(None);
            }
            self.num_read += 1;
            if self.line.pop_if(|byte| *byte == b'\n').is_none() && num_bytes as u64 == limit {
                self.input.skip_until(b'\n').map_err(read)?;
                let error = anyhow!("expected a line of up to {MAX_LINE_BYTES} bytes, got a longer one");
                return Ok(Some((self.num_read, Err(error))));
            }
            let text = match self.num_read {
                1 => without_mark(&self.line),
                _ => utf8(&self.line),
            };
            if !text.as_ref().is_ok_and(|text| text.trim_ascii().is_empty()) {
                return Ok(Some((self.num_read, text.and_then(object))));
            }
        }
    }
}

/// Reads one JSON object. The error for other text names what was found.
fn object(text: &str) -> Result<Value> {
    const EXPECTED: &str = "expected one JSON object per line";
    match json(text) {
        Ok(json) if json.is_object() => Ok(json),
        Ok(json) => Err(anyhow!("{EXPECTED}, got {}", describe_json(&json))),
        Err(error) if text.trim_ascii_start().starts_with('[') => {
            Err(error.context(format!("{EXPECTED}, got part of an array")))
        }
        Err(error) => Err(error.context(EXPECTED)),
    }
}

/// Returns the name of an input in error messages: its path, or `standard input` for `-`.
pub(crate) fn name_of_input(path: &Path) -> PathBuf {
    if path == Path::new("-") { PathBuf::from("standard input") } else { path.to_owned() }
}

/// Reads a text file without its leading byte order mark; `-` is standard input.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let bytes = match path == Path::new("-") {
        true => {
            let mut bytes = Vec::new();
            std::io::stdin().read_to_end(&mut bytes)?;
            bytes
        }
        false => std::fs::read(path)?,
    };
    Ok(without_mark(&bytes)?.to_owned())
}

/// Parses JSON in which no object has a key twice.
///
/// # Errors
/// States what was expected, what was found, and where.
pub(crate) fn json(text: &str) -> Result<Value> {
    let read = serde_json::from_str::<Strict>(text).map(|Strict(mut json)| {
        keep_digits(text, &mut json);
        json
    });
    read.map_err(|error| {
        let (line, column) = (error.line(), error.column());
        let message = error.to_string();
        let message = message.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&message);
        let line = if line > 1 { format!("line {line}, ") } else { String::new() };
        let mark = stray_mark(text).map_or(String::new(), |offset| {
            let column = text[..offset].chars().count() + 1;
            format!(
                "; a byte order mark (U+FEFF) is at character {column}; it is allowed only at the start of the input"
            )
        });
        anyhow!("{message} at {line}column {column}{mark}")
    })
}

/// Replaces the right answer of a problem by its text if it has numbers whose digits a `Value` may not keep: `0.10000000000000000001`.
/// The problem is the record, or its field `problem`.
fn keep_digits(text: &str, json: &mut Value) {
    #[derive(serde::Deserialize)]
    struct Spelled<'a> {
        #[serde(borrow)]
        problem: Option<&'a RawValue>,
        #[serde(borrow)]
        answer: Option<&'a RawValue>,
    }
    let spelled = |text| serde_json::from_str::<Spelled<'_>>(text).ok();
    let is_within = json.get("problem").is_some_and(Value::is_object);
    let problem = if is_within { &mut json["problem"] } else { json };
    let is_json = problem.get("check").is_some_and(|check| check == "json");
    let Some(answer) = problem.get_mut("answer").filter(|answer| (is_json || answer.is_number()) && has_float(answer))
    else {
        return;
    };
    let outer = spelled(text);
    let inner = if is_within { outer.and_then(|outer| spelled(outer.problem?.get())) } else { outer };
    if let Some(digits) = inner.and_then(|inner| inner.answer) {
        *answer = digits.get().into();
    }
}

fn has_float(json: &Value) -> bool {
    match json {
        Value::Number(number) => number.is_f64(),
        Value::Array(elements) => elements.iter().any(has_float),
        Value::Object(fields) => fields.values().any(has_float),
        Value::Null | Value::Bool(_) | Value::String(_) => false,
    }
}

/// Removes a leading byte order mark from a text that did not come from a file.
pub(crate) fn strip_mark(text: &str) -> &str {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// Returns the offset of the first byte order mark in a text whose leading mark was removed.
pub(crate) fn stray_mark(text: &str) -> Option<usize> {
    text.find(BYTE_ORDER_MARK)
}

/// Reads an input as UTF-8, and removes the leading byte order mark.
fn without_mark(bytes: &[u8]) -> Result<&str> {
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        bail!("expected UTF-8, got a UTF-16 byte order mark");
    }
    utf8(bytes).map(strip_mark)
}

fn utf8(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).context("expected UTF-8")
}

/// JSON in which no object has a key twice, at any depth: a duplicate key is ambiguous.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Strict, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut elements = Vec::new();
        while let Some(Strict(element)) = access.next_element()? {
            elements.push(element);
        }
        Ok(Value::Array(elements))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            let shown = || key.chars().take(MAX_KEY_CHARS).collect::<String>().escape_debug().to_string();
            if key.contains(BYTE_ORDER_MARK) {
                return Err(A::Error::custom(format_args!("unexpected key {}", shown())));
            }
            if fields.contains_key(&key) {
                return Err(A::Error::custom(format_args!("{} is given twice", shown())));
            }
            let Strict(value) = access.next_value()?;
            fields.insert(key, value);
        }
        Ok(Value::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_read_as_serde_json_reads_it() {
        let text = r#" {"a":[1,-2,2.5,1e300,18446744073709551615,true,null,"x\n\u00e9"],"b":{"c":{}},"":[]} "#;
        assert_eq!(json(text).unwrap(), serde_json::from_str::<Value>(text).unwrap());
    }

    #[test]
    fn right_answers_keep_their_digits() {
        for (text, answer) in [
            (r#"{"prompt":"?","answer": 0.10000000000000000001 }"#, "\"0.10000000000000000001\""),
            (r#"{"answer":123456789012345678901234567890}"#, "\"123456789012345678901234567890\""),
            (r#"{"answer":-1E-30}"#, "\"-1E-30\""),
            (r#"{"answer":42}"#, "42"),
            (r#"{"answer":"0.1"}"#, "\"0.1\""),
            (r#"{"answer":null}"#, "null"),
            (
                r#"{"answer":[ 0.10000000000000000001, {"a":1}],"check":"json"}"#,
                r#""[ 0.10000000000000000001, {\"a\":1}]""#,
            ),
            (r#"{"answer":{"a":1},"check":"json"}"#, r#"{"a":1}"#),
            (r#"{"answer":[0.5]}"#, "[0.5]"),
            (r#"{"problem":"Find it.","answer":0.50}"#, "\"0.50\""),
        ] {
            assert_eq!(json(text).unwrap()["answer"].to_string(), answer, "{text}");
        }
        let text =
            r#"{"problem":{"prompt":"?","answer":0.10000000000000000001},"answer":0.2,"b":0.10000000000000000001}"#;
        let expected = r#"{"problem":{"prompt":"?","answer":"0.10000000000000000001"},"answer":0.2,"b":0.1}"#;
        assert_eq!(json(text).unwrap(), serde_json::from_str::<Value>(expected).unwrap());
    }

    #[test]
    fn a_key_is_given_once_at_any_depth() {
        for (text, says) in [
            (r#"{"a":1,"a":1}"#, "a is given twice at column 10"),
            (r#"{"a":{"b":[{"c":1,"d":2,"c":3}]}}"#, "c is given twice at column 27"),
            (r#"[{"x":null,"x":null}]"#, "x is given twice at column 14"),
            // One key, spelled with and without an escape.
            ("{\"target\":1,\n\"t\\u0061rget\":2}", "target is given twice at line 2, column 13"),
            (r#"{"a\nb":1,"a\nb":1}"#, "a\\nb is given twice at column 16"),
            (
                "{\"\u{feff}a\":1}",
                "unexpected key \\u{feff}a at column 7; a byte order mark (U+FEFF) is at character 3; it is allowed only at \
                 the start of the input",
            ),
        ] {
            assert_eq!(json(text).unwrap_err().to_string(), says, "{text}");
        }
        let long = json(&format!("{{\"{0}\":1,\"{0}\":2}}", "k".repeat(10_000))).unwrap_err().to_string();
        assert!(long.len() < 100, "{long}");
        assert!(json(r#"{"a":{"a":1},"b":[{"a":1},{"a":1}]}"#).is_ok(), "other objects");
    }

    #[test]
    fn deep_nesting_is_refused() {
        for text in ["[".repeat(100_000), "{\"a\":".repeat(100_000)] {
            assert!(json(&text).unwrap_err().to_string().starts_with("recursion limit exceeded"));
        }
    }
}
