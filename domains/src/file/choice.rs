//! Letters of choices.

use super::reply::bare;

/// Reads the letter of a choice, A to Z: `B`, `(B)`, `[B]` or `**B**`, with `)`, `.` or `:` behind it or not. If it is marked in one
/// of these ways, text may follow, in which no other choice is named.
///
/// # Errors
/// What was expected and what was found.
pub(super) fn read(text: &str) -> Result<char, String> {
    let text = bare(text);
    find(text).ok_or_else(|| format!("expected the letter of one choice, such as B or (B), got {}", crate::quote(text)))
}

fn find(text: &str) -> Option<char> {
    const MARKS: [char; 3] = [')', '.', ':'];
    let bold = text.strip_prefix("**");
    let text = bold.unwrap_or(text);
    let close = match text.chars().next()? {
        '(' => Some(')'),
        '[' => Some(']'),
        _ => None,
    };
    let mut letters = text[usize::from(close.is_some())..].chars();
    let letter = letters.next().filter(char::is_ascii_uppercase)?;
    let mut rest = letters.as_str();
    if let Some(close) = close {
        rest = rest.strip_prefix(close)?;
    }
    let mut is_marked = close.is_some() || bold.is_some();
    let mut take_mark = |rest: &mut &str| {
        let unmarked = rest.strip_prefix(MARKS);
        is_marked |= unmarked.is_some();
        *rest = unmarked.unwrap_or(rest);
    };
    take_mark(&mut rest);
    if bold.is_some() {
        match rest.strip_prefix("**") {
            Some(unbold) => {
                rest = unbold;
                take_mark(&mut rest);
            }
            // **B) Vitamin C** is bold: because
            None => rest = rest.strip_prefix([' ', '\t']).filter(|rest| rest.contains("**")).and(Some(rest))?,
        }
    }
    let is_text = rest.is_empty() || is_marked && rest.starts_with([' ', '\t']);
    (is_text && !names_another(rest, letter)).then_some(letter)
}

/// Whether a text names another choice than `letter`: one in parentheses or with a mark, such as `(C)` or `C)`, or a capital alone
/// where a choice may stand. In "Vitamin C" it is part of a name, and "A dog" and "I think" begin with a word.
fn names_another(text: &str, letter: char) -> bool {
    const LINKS: [&str; 12] =
        ["or", "and", "not", "nor", "than", "but", "also", "both", "is", "option", "choice", "answer"];
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    words.iter().enumerate().any(|(index, word)| {
        let alone = word.trim_matches(|sign: char| !sign.is_alphanumeric());
        let mut letters = alone.chars();
        let (Some(other), None) = (letters.next().filter(char::is_ascii_uppercase), letters.next()) else {
            return false;
        };
        if other == letter {
            return false;
        }
        let is_marked = word.starts_with(['(', '[', '*']) || word.ends_with([')', ']', ':', '*']);
        let before = index.checked_sub(1).map(|index| words[index]);
        // At the start of a sentence, or behind a word or a sign that joins choices.
        let may_be_choice = before.is_none_or(|before| {
            let word = before.trim_matches(|sign: char| !sign.is_alphanumeric()).to_ascii_lowercase();
            word.is_empty() || !before.ends_with(char::is_alphanumeric) || LINKS.contains(&word.as_str())
        });
        let is_word = matches!(other, 'A' | 'I') && *word == alone && index + 1 < words.len();
        let begins = before.is_none_or(|before| before.ends_with(['.', '!', '?', ':', '-', '\u{2013}', '\u{2014}']));
        is_marked || may_be_choice && !(is_word && begins)
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
            "[B]",
            "(B).",
            "(B): dogs",
            "**(B)**",
            "**B.**",
            "**B**. Because dogs bark.",
            "**B**: Because dogs bark",
            "**B** because dogs bark",
            "**B) dogs** is right",
            "**B) dogs**",
            "**(B)** dogs",
            "B) Vitamin C",
            "B) Vitamin C.",
            "B) Vitamin C, which fruits have",
            "B. Hepatitis B",
            "B. A dog. A cat is none.",
            "B. It is - I think - a dog",
            "B) A dog is what I see",
            "B. Because A has no wings.",
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
            "A dog",
            "I think B",
            "B because",
            "B, because",
            "**B",
            "**B dogs",
            "**A** or **B**",
            "**B** or C",
            "**B**. Not A, B",
            "B) Vitamin C or A",
            "B) x; C",
            "B) x, C",
            "B) x. C",
            "B) x / C",
            "B) dogs C)",
            "B) dogs [C] cats",
            "B) dogs *C* cats",
            "B: the answer is C",
            "B. Option C is wrong",
            "[B)",
            "(B]",
            "((B))",
            "(B) (C)",
            "B))",
            "**B**C",
        ] {
            assert!(read(text).is_err(), "{text}: {:?}", read(text));
        }
    }
}
