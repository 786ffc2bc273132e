//! Values: integers and lists, and their spellings in tokens and in text.

use proto::TokenId;

use crate::quote;

/// Ends a list or a program.
pub(super) const END: TokenId = 128;
/// Makes the integer that follows negative.
pub(super) const MINUS: TokenId = 129;
/// Most tokens of any answer, checked before parsing.
pub(super) const MAX_ANSWER_TOKENS: usize = 128;
/// Largest magnitude of an integer.
pub(super) const MAX_MAGNITUDE: i32 = 99;
/// Most elements of a list in a problem or an answer; lists inside a running program may be longer.
pub(super) const MAX_ELEMENTS: usize = 6;

/// The type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Integer,
    List,
}

/// An integer or a list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(untagged)]
pub(super) enum Value {
    Integer(i32),
    List(Vec<i32>),
}

/// A borrowed [`Value`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View<'a> {
    Integer(i32),
    List(&'a [i32]),
}

impl Value {
    pub(super) fn view(&self) -> View<'_> {
        match self {
            Value::Integer(integer) => View::Integer(*integer),
            Value::List(list) => View::List(list),
        }
    }

    /// Reads a value and nothing else from tokens: an integer, or elements and [`END`].
    pub(super) fn read(tokens: &[TokenId]) -> Option<Value> {
        if tokens.len() > MAX_ANSWER_TOKENS {
            return None;
        }
        if tokens.last() != Some(&END) {
            let (integer, rest) = read_integer(tokens)?;
            return rest.is_empty().then_some(Value::Integer(integer));
        }
        let mut list = Vec::with_capacity(MAX_ELEMENTS);
        let mut rest = &tokens[..tokens.len() - 1];
        while !rest.is_empty() {
            let (integer, after) = read_integer(rest)?;
            list.push(integer);
            rest = after;
        }
        Some(Value::List(list))
    }

    /// Reads a value such as `7`, `-7`, `[5 1 4]` or `[5, 1, 4]`: one comma between any two elements, or none at all.
    ///
    /// # Errors
    /// A message that names what was expected and what was found.
    pub(super) fn parse(text: &str) -> Result<Value, String> {
        let refuse = |expected: &str, got: &str| format!("expected {expected}, got {}", quote(got));
        let integer =
            |word: &str| parse_integer(word).ok_or_else(|| refuse("integers from -99 to 99 such as 7 or -7", word));
        let text = text.trim_matches(is_space);
        let Some(inner) = text.strip_prefix('[') else {
            let expected = "an integer from -99 to 99 such as 7, or a list such as [5 1 4]";
            return parse_integer(text).map(Value::Integer).ok_or_else(|| refuse(expected, text));
        };
        let inner =
            inner.strip_suffix(']').ok_or_else(|| refuse("a list that ends in ]", text))?.trim_matches(is_space);
        if inner.is_empty() {
            return Ok(Value::List(Vec::new()));
        }
        if !inner.contains(',') {
            let words = inner.split(is_space).filter(|word| !word.is_empty());
            return words.map(integer).collect::<Result<_, _>>().map(Value::List);
        }
        let elements = inner.split(',').map(|element| match element.trim_matches(is_space) {
            "" => Err(refuse("an element on both sides of every comma", text)),
            element if element.contains(is_space) => Err(refuse("one comma between any two elements, or none", text)),
            element => integer(element),
        });
        elements.collect::<Result<_, _>>().map(Value::List)
    }
}

impl View<'_> {
    pub(super) fn to_value(self) -> Value {
        match self {
            View::Integer(integer) => Value::Integer(integer),
            View::List(list) => Value::List(list.to_vec()),
        }
    }

    pub(super) fn type_of(self) -> Type {
        match self {
            View::Integer(_) => Type::Integer,
            View::List(_) => Type::List,
        }
    }

    /// Whether this is the empty list.
    pub(super) fn is_empty(self) -> bool {
        self == View::List(&[])
    }

    /// Returns the spelling in text.
    pub(super) fn text(self) -> String {
        let mut text = String::new();
        self.write(&mut text);
        text
    }

    /// Appends the spelling in text.
    pub(super) fn write(self, text: &mut String) {
        match self {
            View::Integer(integer) => write_integer(integer, text),
            View::List(list) => {
                text.push('[');
                for (index, element) in list.iter().enumerate() {
                    if index > 0 {
                        text.push(' ');
                    }
                    write_integer(*element, text);
                }
                text.push(']');
            }
        }
    }

    /// Appends the spelling in tokens.
    pub(super) fn spell(self, tokens: &mut Vec<TokenId>) {
        match self {
            View::Integer(integer) => spell_integer(integer, tokens),
            View::List(list) => {
                list.iter().for_each(|element| spell_integer(*element, tokens));
                tokens.push(END);
            }
        }
    }
}

/// Writes an integer of at most two digits. Problems contain many of them, and general-purpose formatting would be most of
/// the work of reading a problem.
pub(super) fn write_integer(integer: i32, text: &mut String) {
    debug_assert!(integer.abs() <= MAX_MAGNITUDE, "integers are bounded");
    if integer < 0 {
        text.push('-');
    }
    let (tens, ones) = (integer.unsigned_abs() / 10, integer.unsigned_abs() % 10);
    if tens > 0 {
        text.push(char::from(b'0' + tens as u8));
    }
    text.push(char::from(b'0' + ones as u8));
}

fn spell_integer(integer: i32, tokens: &mut Vec<TokenId>) {
    debug_assert!(integer.abs() <= MAX_MAGNITUDE, "integers are bounded");
    if integer < 0 {
        tokens.push(MINUS);
    }
    tokens.push(integer.unsigned_abs() as TokenId);
}

fn read_integer(tokens: &[TokenId]) -> Option<(i32, &[TokenId])> {
    match *tokens {
        [MINUS, token @ 1..=99, ..] => Some((-(token as i32), &tokens[2..])),
        [token @ 0..=99, ..] => Some((token as i32, &tokens[1..])),
        _ => None,
    }
}

/// Reads an integer in its one spelling: no sign but `-`, no leading zero, no `-0`.
pub(super) fn parse_integer(text: &str) -> Option<i32> {
    match *text.as_bytes() {
        [ones @ b'0'..=b'9'] => Some(i32::from(ones - b'0')),
        [tens @ b'1'..=b'9', ones @ b'0'..=b'9'] => Some(i32::from(tens - b'0') * 10 + i32::from(ones - b'0')),
        [b'-', b'1'..=b'9', ..] => parse_integer(&text[1..]).map(|magnitude| -magnitude),
        _ => None,
    }
}

pub(super) fn is_space(character: char) -> bool {
    matches!(character, ' ' | '\t' | '\n' | '\r')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_one_spelling() {
        for integer in -MAX_MAGNITUDE..=MAX_MAGNITUDE {
            let value = Value::Integer(integer);
            let (mut tokens, mut text) = (Vec::new(), String::new());
            value.view().spell(&mut tokens);
            value.view().write(&mut text);
            assert_eq!(text, integer.to_string());
            assert_eq!(Value::read(&tokens), Some(value.clone()));
            assert_eq!(Value::parse(&text), Ok(value));
        }
        for text in ["[ 1, -2,3 ]", "[1 -2 3]", "[1 ,-2 , 3]", " [\t1\n-2\r\n3 ] "] {
            assert_eq!(Value::parse(text), Ok(Value::List(vec![1, -2, 3])), "{text:?}");
        }
        for text in ["[]", "[ ]"] {
            assert_eq!(Value::parse(text), Ok(Value::List(Vec::new())), "{text:?}");
        }
        for (text, says) in [
            ("[1,,4]", "an element on both sides of every comma"),
            ("[,1 4]", "an element on both sides of every comma"),
            ("[1,4,]", "an element on both sides of every comma"),
            ("[,]", "an element on both sides of every comma"),
            ("[1, ,4]", "an element on both sides of every comma"),
            ("[1, 4 5]", "one comma between any two elements, or none, got \"[1, 4 5]\""),
            ("[1 4, 5]", "one comma between any two elements, or none"),
            ("[1 x]", "integers from -99 to 99 such as 7 or -7, got \"x\""),
            ("[1 \u{feff}2]", "got \"\\u{feff}2\""),
            ("[1", "a list that ends in ], got \"[1\""),
            ("", "an integer from -99 to 99 such as 7, or a list such as [5 1 4], got \"\""),
            ("1, 4", "or a list such as [5 1 4], got \"1, 4\""),
        ] {
            let reason = Value::parse(text).unwrap_err();
            assert!(reason.contains(says), "{text:?}: {reason}");
        }
        for text in [
            "-0",
            "00",
            "007",
            "+5",
            "--5",
            "100",
            "1.0",
            "1e1",
            "1]",
            "[[1]]",
            "nan",
            "[1;2]",
            "-",
            "5 6",
            "[1] 2",
            "[+1]",
            "[01]",
            "[1\u{a0}2]",
            "[1]]",
            "[1][2]",
            "1,",
            ",1",
            "(1 2)",
            "[100]",
            "[1.]",
            "[1_0]",
        ] {
            assert!(Value::parse(text).is_err(), "{text:?}");
        }
        for tokens in
            [&[][..], &[MINUS], &[MINUS, 0], &[MINUS, MINUS, 1], &[END, END], &[1, 2], &[100, END], &[MINUS, END]]
        {
            assert_eq!(Value::read(tokens), None, "{tokens:?}");
        }
    }
}
