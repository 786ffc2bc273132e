//! JSON whose numbers are exact.

use std::collections::BTreeMap;

use num_rational::BigRational;

use super::number;

/// Deepest nesting.
const MAX_DEPTH: usize = 32;

/// Most digits and exponents of ten of all numbers.
const MAX_SHIFTS: u64 = 1 << 16;

/// A JSON value. Equal values are equal whatever the order of their keys and the spelling of their numbers and strings.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Json {
    Null,
    Bool(bool),
    Number(BigRational),
    Text(String),
    Array(Vec<Json>),
    Object(BTreeMap<String, Json>),
}

/// Reads a JSON text.
///
/// # Errors
/// What was expected and what was found, by byte.
pub(super) fn read(text: &str) -> Result<Json, String> {
    let mut reader = Reader { text, at: 0, num_shifts: 0 };
    let value = reader.value(0)?;
    reader.skip_space();
    if reader.at < text.len() { Err(reader.refusal("the end")) } else { Ok(value) }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    /// Sum of the exponents of ten, which bounds the time to read them.
    num_shifts: u64,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn skip_space(&mut self) {
        self.at = self.text.len() - self.rest().trim_start_matches([' ', '\t', '\r', '\n']).len();
    }

    fn refusal(&self, expected: &str) -> String {
        let rest = self.rest();
        let got = if rest.is_empty() { "the end".to_owned() } else { crate::quote(rest) };
        format!("expected JSON with {expected} at byte {}, got {got}", self.at)
    }

    fn take(&mut self, token: &str) -> bool {
        self.skip_space();
        let is_next = self.rest().starts_with(token);
        self.at += if is_next { token.len() } else { 0 };
        is_next
    }

    fn expect(&mut self, token: &str) -> Result<(), String> {
        if self.take(token) { Ok(()) } else { Err(self.refusal(token)) }
    }

    fn value(&mut self, depth: usize) -> Result<Json, String> {
        if depth > MAX_DEPTH {
            return Err(format!("expected JSON that is nested up to {MAX_DEPTH} deep, got a deeper one"));
        }
        self.skip_space();
        for (word, value) in [("null", Json::Null), ("true", Json::Bool(true)), ("false", Json::Bool(false))] {
            if self.take(word) {
                return Ok(value);
            }
        }
        if self.take("[") {
            let mut elements = Vec::new();
            while !self.take("]") {
                if !elements.is_empty() {
                    self.expect(",")?;
                }
                elements.push(self.value(depth + 1)?);
            }
            return Ok(Json::Array(elements));
        }
        if self.take("{") {
            let mut fields = BTreeMap::new();
            while !self.take("}") {
                if !fields.is_empty() {
                    self.expect(",")?;
                }
                self.skip_space();
                let key = self.string()?;
                self.expect(":")?;
                let value = self.value(depth + 1)?;
                if fields.insert(key.clone(), value).is_some() {
                    return Err(format!("expected JSON with every key once, got {} twice", crate::quote(&key)));
                }
            }
            return Ok(Json::Object(fields));
        }
        if self.rest().starts_with('"') { self.string().map(Json::Text) } else { self.number() }
    }

    fn string(&mut self) -> Result<String, String> {
        let rest = self.rest();
        let mut is_escaped = false;
        let close = rest.bytes().skip(1).position(|byte| {
            let closes = byte == b'"' && !is_escaped;
            is_escaped = byte == b'\\' && !is_escaped;
            closes
        });
        let string = close.filter(|_| rest.starts_with('"')).map(|close| &rest[..close + 2]);
        let read = string.and_then(|string| Some((string.len(), serde_json::from_str(string).ok()?)));
        let (length, text) = read.ok_or_else(|| self.refusal("a string"))?;
        self.at += length;
        Ok(text)
    }

    fn number(&mut self) -> Result<Json, String> {
        let rest = self.rest();
        let is_of_number = |sign: char| sign.is_ascii_digit() || matches!(sign, '-' | '+' | '.' | 'e' | 'E');
        let length = rest.find(|sign| !is_of_number(sign)).unwrap_or(rest.len());
        let (token, _) = rest.split_at(length);
        // The form is JSON's, which is narrower, and the value is exact.
        let is_json = serde_json::from_str::<serde_json::Number>(token).is_ok();
        let value = number::read(token).ok().filter(|_| is_json && !token.is_empty());
        let value = value.ok_or_else(|| self.refusal("a value"))?;
        let exponent = token.split_once(['e', 'E']).and_then(|(_, exponent)| exponent.parse::<i64>().ok());
        self.num_shifts += exponent.unwrap_or(0).unsigned_abs() + token.len() as u64;
        if self.num_shifts > MAX_SHIFTS {
            return Err("expected JSON with less of digits and exponents".to_owned());
        }
        self.at += length;
        Ok(Json::Number(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_equal_whatever_their_spelling() {
        for (left, right) in [
            (r#"{"a":1,"b":[true,null]}"#, " {\n\"b\" : [ true , null ], \"a\" : 1.0 }\n"),
            ("1e2", "100"),
            ("0.1", "1e-1"),
            (r#""\u0061\n""#, r#""a\n""#),
            ("-0", "0.0"),
            ("[]", "[ ]"),
            ("{}", "{ }"),
            ("123456789012345678901234567890", "123456789012345678901234567890.0"),
        ] {
            assert_eq!(read(left).unwrap(), read(right).unwrap(), "{left} {right}");
        }
        for (left, right) in [
            ("0.1", "0.10000000000000000001"),
            ("123456789012345678901234567890", "123456789012345678901234567891"),
            ("[1,2]", "[2,1]"),
            ("1", "\"1\""),
            ("1", "true"),
            ("null", "false"),
            (r#"{"a":1}"#, r#"{"a":1,"b":null}"#),
        ] {
            assert_ne!(read(left).unwrap(), read(right).unwrap(), "{left} {right}");
        }
    }

    #[test]
    fn other_texts_are_no_json() {
        for text in [
            "",
            "[",
            "[1",
            "[1,]",
            "[,1]",
            "[1 2]",
            "{",
            "{\"a\"}",
            "{\"a\":}",
            "{a:1}",
            "{\"a\":1,}",
            "{\"a\":1,\"a\":1}",
            "'a'",
            "\"a",
            "\"\\\"",
            "\"\n\"",
            "NaN",
            "Infinity",
            "01",
            "1.",
            ".5",
            "+1",
            "1e",
            "--1",
            "1 2",
            "nul",
            "truex",
            "$5",
            "1,234",
            "5%",
            "1/2",
            "1e999",
            "\u{feff}1",
        ] {
            assert!(read(text).is_err(), "{text}: {:?}", read(text));
        }
        assert!(read(&"[".repeat(100_000)).unwrap_err().contains("32 deep"));
        assert!(read(&"{\"a\":".repeat(100_000)).unwrap_err().contains("32 deep"));
    }
}
