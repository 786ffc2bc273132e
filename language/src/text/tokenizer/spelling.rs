//! How the strings of a vocabulary stand for bytes.

/// How the strings of a vocabulary stand for bytes.
pub(super) enum Spelling {
    /// A character for each byte, as in GPT-2.
    ByteLevel,
    /// Text, and `<0x0A>` for bytes that no token spells.
    ByteFallback {
        /// The character that stands for a space.
        space: Option<char>,
    },
}

impl Spelling {
    /// Appends the bytes that a token of the vocabulary stands for.
    pub(super) fn spell(&self, token: &str, bytes: &mut Vec<u8>) {
        match self {
            Spelling::ByteLevel => {
                let symbols = token.chars().map(byte_of).collect::<Option<Vec<u8>>>();
                // A token of other characters stands for itself.
                bytes.extend(symbols.unwrap_or_else(|| token.as_bytes().to_vec()));
            }
            Spelling::ByteFallback { space } => match fallback_byte(token) {
                Some(byte) => bytes.push(byte),
                None => match space {
                    Some(space) => bytes.extend(token.replace(*space, " ").as_bytes()),
                    None => bytes.extend(token.as_bytes()),
                },
            },
        }
    }

    /// Returns the bytes that no token of a vocabulary spells, ascending.
    pub(super) fn missing(&self, has_token: impl Fn(&str) -> bool) -> Vec<u8> {
        let symbol = |byte| match self {
            Spelling::ByteLevel => symbol_of(byte).to_string(),
            Spelling::ByteFallback { .. } => format!("<0x{byte:02X}>"),
        };
        (0..=u8::MAX).filter(|byte| !has_token(&symbol(*byte))).collect()
    }
}

/// Returns the character that stands for a byte: itself if it is printable in Latin-1, otherwise the next one from U+0100.
///
/// Source: <https://github.com/openai/gpt-2/blob/master/src/encoder.py>, `bytes_to_unicode`.
fn symbol_of(byte: u8) -> char {
    let from = |number: u32| char::from_u32(number).expect("the number is below 0x200");
    match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0..=b' ' => from(0x100 + u32::from(byte)),
        0x7f..=0xa0 => from(0x121 + u32::from(byte - 0x7f)),
        0xad => from(0x143),
    }
}

fn byte_of(symbol: char) -> Option<u8> {
    let byte = match u32::from(symbol) {
        number @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => number,
        number @ 0x100..=0x120 => number - 0x100,
        number @ 0x121..=0x142 => number - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_byte = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if is_byte { u8::from_str_radix(digits, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_a_symbol_of_its_own() {
        for byte in 0..=u8::MAX {
            assert_eq!(byte_of(symbol_of(byte)), Some(byte));
        }
        // python: {b: c for b, c in bytes_to_unicode().items()}
        let known = [
            (b' ', 'Ġ'),
            (b'\n', 'Ċ'),
            (b'\t', 'ĉ'),
            (0, 'Ā'),
            (0x7f, 'ġ'),
            (0xa0, 'ł'),
            (0xad, 'Ń'),
            (b'a', 'a'),
            (0xff, 'ÿ'),
        ];
        known.into_iter().for_each(|(byte, symbol)| assert_eq!(symbol_of(byte), symbol));
        assert_eq!(byte_of('\u{144}'), None);
        assert_eq!(byte_of('日'), None);
    }

    #[test]
    fn tokens_spell_bytes() {
        let spell = |spelling: &Spelling, token| {
            let mut bytes = Vec::new();
            spelling.spell(token, &mut bytes);
            bytes
        };
        assert_eq!(spell(&Spelling::ByteLevel, "Ġthe"), b" the");
        assert_eq!(spell(&Spelling::ByteLevel, "æĹ"), [0xe6, 0x97]);
        assert_eq!(spell(&Spelling::ByteLevel, "日a"), "日a".as_bytes());
        let fallback = Spelling::ByteFallback { space: Some('▁') };
        assert_eq!(spell(&fallback, "▁the"), b" the");
        assert_eq!(spell(&fallback, "<0x0A>"), b"\n");
        assert_eq!(spell(&fallback, "<0xE6>"), [0xe6]);
        assert_eq!(spell(&fallback, "<0x+1>"), b"<0x+1>");
        assert_eq!(spell(&fallback, "<0xé>"), "<0xé>".as_bytes());
    }
}
