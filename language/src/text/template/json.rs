//! JSON as Python writes it.

use std::fmt::Write;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

use super::MAX_TEXT_BYTES;

/// The widest indent that is written.
pub(super) const MAX_INDENT: usize = 64;

const MAX_DEPTH: usize = 100;

/// The arguments of `json.dumps`.
pub(super) struct Style {
    /// Characters outside ASCII are escaped, except those of the private planes, which stand for special tokens.
    pub(super) is_ascii: bool,
    pub(super) sorts_keys: bool,
    /// A level's indent, if items have lines of their own.
    pub(super) indent: Option<String>,
    /// Between items, and between a key and its value.
    pub(super) separators: (String, String),
}

/// Writes a value.
///
/// # Errors
/// When there is no JSON for the value, and when it is too deep or too long.
pub(super) fn write(value: &Value, style: &Style) -> Result<String, Error> {
    let mut writer = Writer { text: String::new(), style, depth: 0 };
    writer.value(value)?;
    Ok(writer.text)
}

/// Converts JSON to a value of a template.
pub(super) fn to_value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (_, Some(number)) => Value::from(number),
            _ => Value::from(number.as_f64()),
        },
        serde_json::Value::String(text) => Value::from(&**text),
        serde_json::Value::Array(items) => items.iter().map(to_value).collect(),
        serde_json::Value::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(key, value)| (&**key, to_value(value))))
        }
    }
}

struct Writer<'a> {
    text: String,
    style: &'a Style,
    depth: usize,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        if self.text.len() > MAX_TEXT_BYTES {
            return Err(refused(&format!("expected at most {MAX_TEXT_BYTES} bytes, got more")));
        }
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.text.push_str(&value.to_string()),
            ValueKind::Number => self.text.push_str(&float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.items('[', ']', value.try_iter()?, |writer, item| writer.value(&item))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.style.sorts_keys {
                    keys.sort();
                }
                self.items('{', '}', keys.into_iter(), |writer, key| {
                    writer.key(&key)?;
                    writer.text.push_str(&writer.style.separators.1);
                    writer.value(&value.get_item(&key)?)
                })?;
            }
            kind => return Err(refused(&format!("expected a value that JSON has, got {kind}"))),
        }
        Ok(())
    }

    fn items(
        &mut self,
        open: char,
        close: char,
        items: impl Iterator<Item = Value>,
        mut write: impl FnMut(&mut Self, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(refused(&format!("expected at most {MAX_DEPTH} levels, got more")));
        }
        self.text.push(open);
        let mut is_empty = true;
        for item in items {
            if !is_empty {
                self.text.push_str(&self.style.separators.0);
            }
            is_empty = false;
            self.new_line();
            write(self, item)?;
        }
        self.depth -= 1;
        if !is_empty {
            self.new_line();
        }
        self.text.push(close);
        Ok(())
    }

    fn new_line(&mut self) {
        if let Some(indent) = &self.style.indent {
            self.text.push('\n');
            (0..self.depth).for_each(|_| self.text.push_str(indent));
        }
    }

    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.value(key),
            ValueKind::Number | ValueKind::Bool | ValueKind::None => {
                self.text.push('"');
                self.value(key)?;
                self.text.push('"');
                Ok(())
            }
            kind => Err(refused(&format!("expected keys that JSON has, got {kind}"))),
        }
    }

    fn string(&mut self, text: &str) {
        self.text.push('"');
        for character in text.chars() {
            match character {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                '\0'..'\u{20}' => self.escape(character),
                '\u{80}'..'\u{f0000}' if self.style.is_ascii => self.escape(character),
                _ => self.text.push(character),
            }
        }
        self.text.push('"');
    }

    fn escape(&mut self, character: char) {
        for unit in character.encode_utf16(&mut [0; 2]) {
            write!(self.text, "\\u{unit:04x}").expect("a string takes all text");
        }
    }
}

/// Writes a number as Python's `float.__repr__` does.
fn float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    // Rust has the same shortest digits, and another rule for when an exponent is written.
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = number.to_string();
        return if plain.contains('.') { plain } else { format!("{plain}.0") };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

fn refused(reason: &str) -> Error {
    Error::new(ErrorKind::BadSerialization, format!("tojson: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_in_python() {
        // python: [repr(x) for x in ...]
        let cases = [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (123456789012345680.0, "1.2345678901234568e+17"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (5e-324, "5e-324"),
            (f64::INFINITY, "Infinity"),
            (f64::NEG_INFINITY, "-Infinity"),
            (f64::NAN, "NaN"),
        ];
        cases.into_iter().for_each(|(number, expected)| assert_eq!(float(number), expected));
    }
}
