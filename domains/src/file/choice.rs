//! Letters of choices.

use super::reply::bare;

/// Reads the letter of a choice, A to Z: `B`, `(B)`, `B.`, `B)`, `B:`, or such a letter with the text of the choice behind it. No
/// other letter may be named.
///
/// # Errors
/// What was expected and what was found.
pub(super) fn read(text: &str) -> Result<char, String> {
    let text = bare(text);
    find(text).ok_or_else(|| format!("expected the letter of one choice, such as B or (B), got {}", crate::quote(text)))
}

fn find(text: &str) -> Option<char> {
    let inner = text.strip_prefix('(');
    let mut letters = inner.unwrap_or(text).chars();
    let letter = letters.next().filter(char::is_ascii_uppercase)?;
    let rest = letters.as_str();
    let rest = match inner {
        Some(_) => rest.strip_prefix(')')?,
        None if rest.is_empty() => rest,
        None => rest.strip_prefix([')', '.', ':'])?,
    };
    let is_text = rest.is_empty() || rest.starts_with([' ', '\t']);
    (is_text && !names_another(rest, letter)).then_some(letter)
}

/// Whether a text names another choice than `letter`. The words "A" and "I" do not, unless they stand like a choice.
fn names_another(text: &str, letter: char) -> bool {
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    words.iter().enumerate().any(|(index, word)| {
        let marked = word.trim_matches(|sign: char| !sign.is_alphanumeric());
        let mut letters = marked.chars();
        let (Some(other), None) = (letters.next().filter(char::is_ascii_uppercase), letters.next()) else {
            return false;
        };
        let before = index.checked_sub(1).map(|index| words[index]);
        let is_word = matches!(other, 'A' | 'I')
            && *word == marked
            && index + 1 < words.len()
            && !before.is_some_and(|before| matches!(before, "or" | "and" | "/" | "&") || before.ends_with(','));
        other != letter && !is_word
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_letter_is_a_choice() {
        for text in [
            "B",
            " B ",
            "(B)",
            "B.",
            "B)",
            "B:",
            "$B$",
            "\\text{B}",
            "**B**",
            "B) A dog",
            "B. I think so",
            "(B) dogs",
            "B: B",
        ] {
            assert_eq!(read(text), Ok('B'), "{text}");
        }
        for text in [
            "",
            "b",
            "BC",
            "B C",
            "A or B",
            "B or C",
            "B) or C)",
            "(B), (C)",
            "B. C.",
            "B) dogs or A",
            "B and C",
            "A/B",
            "B) x (C) y",
            "Bob",
            "(B",
            "B-",
            "B,C",
            "\u{ff22}",
            "\u{412}",
            "B)C",
            "B) not A",
            "All",
            "5",
        ] {
            assert!(read(text).is_err(), "{text}: {:?}", read(text));
        }
    }
}
