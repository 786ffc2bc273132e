//! One vocabulary for all domains: integers 0 to 99 are one token each, larger ones are spelled in digits.
//! [`super::Symbols::tokens`] lists the tokens that a domain adds.

use proto::{Difficulty, TokenId};

/// Number of tokens, unused ids included.
pub const VOCABULARY_SIZE: usize = 256;

/// The digit 0 of a spelled number; the digits 1 to 9 follow.
pub const DIGIT_0: TokenId = 100;
/// `+`
pub const ADD: TokenId = 110;
/// `-`
pub const SUBTRACT: TokenId = 111;
/// `*`
pub const MULTIPLY: TokenId = 112;
/// `/`
pub const DIVIDE: TokenId = 113;
/// `=`
pub const EQUALS: TokenId = 114;
/// Opens a prompt that asks for an answer.
pub const ROLE_SOLVE: TokenId = 120;
/// Opens a prompt that asks for a problem.
pub const ROLE_PROPOSE: TokenId = 121;
/// Domain token: countdown with intermediate results up to 99.
pub const COUNTDOWN: TokenId = 124;
/// Domain token: countdown with intermediate results up to 9,999.
pub const COUNTDOWN_LARGE: TokenId = 125;
/// Domain token: programs on integers and lists. The words of their language, from 128 on, are in `programs`.
pub const PROGRAMS: TokenId = 126;
/// Domain token: straight-line programs on digits.
pub const PROGRAMS_DIGITS: TokenId = 127;

/// Ends a prompt that asks for a problem: the first of the requested difficulties. The others follow.
const FIRST_DIFFICULTY: TokenId = 116;

/// Most digits of a spelled number. Every spelled number has exactly this many, so that no spelling is a prefix of
/// another and a number never needs a token to end it.
pub const NUM_DIGITS: u32 = 4;
/// The largest integer that has a spelling.
pub const MAX_INTEGER: u32 = 9_999;

/// Spells a difficulty.
pub fn difficulty_token(difficulty: Difficulty) -> TokenId {
    FIRST_DIFFICULTY + difficulty as TokenId
}

/// Spells an integer: one token up to 99, else four digits.
///
/// ```
/// assert_eq!(domains::symbols::vocabulary::spell(42), [42]);
/// assert_eq!(domains::symbols::vocabulary::spell(123), [100, 101, 102, 103]);
/// ```
///
/// # Panics
/// When the integer is over [`MAX_INTEGER`].
pub fn spell(integer: u32) -> Vec<TokenId> {
    assert!(integer <= MAX_INTEGER, "spell: expected at most {MAX_INTEGER}, got {integer}");
    if integer <= 99 {
        return vec![integer as TokenId];
    }
    (0..NUM_DIGITS).rev().map(|place| DIGIT_0 + (integer / 10u32.pow(place) % 10) as TokenId).collect()
}

/// Reads a spelled integer from the front of `tokens`; returns it and the rest.
///
/// `None` when the tokens do not begin with a canonical spelling.
pub fn read_integer(tokens: &[TokenId]) -> Option<(u32, &[TokenId])> {
    let (first, rest) = tokens.split_first()?;
    if *first <= 99 {
        return Some((*first, rest));
    }
    let (digits, rest) = tokens.split_at_checked(NUM_DIGITS as usize)?;
    let mut integer = 0;
    for token in digits {
        integer = integer * 10 + digit(*token)?;
    }
    (integer > 99).then_some((integer, rest))
}

fn digit(token: TokenId) -> Option<u32> {
    (DIGIT_0..DIGIT_0 + 10).contains(&token).then(|| token - DIGIT_0)
}

/// Returns the name of a token that no domain adds: integers, digits, signs, and the words of prompts.
pub fn base_name(token: TokenId) -> Option<String> {
    Some(match token {
        0..=99 => token.to_string(),
        DIGIT_0..ADD => format!("d{}", token - DIGIT_0),
        ADD => "+".to_owned(),
        SUBTRACT => "-".to_owned(),
        MULTIPLY => "*".to_owned(),
        DIVIDE => "/".to_owned(),
        EQUALS => "=".to_owned(),
        FIRST_DIFFICULTY => "<unsolved>".to_owned(),
        117 => "<hard>".to_owned(),
        118 => "<easy>".to_owned(),
        119 => "<trivial>".to_owned(),
        ROLE_SOLVE => "<solve>".to_owned(),
        ROLE_PROPOSE => "<propose>".to_owned(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_integer_reads_back() {
        for integer in 0..=MAX_INTEGER {
            let mut tokens = spell(integer);
            tokens.push(EQUALS);
            assert_eq!(read_integer(&tokens), Some((integer, &[EQUALS][..])));
        }
        assert_eq!(read_integer(&[DIGIT_0, DIGIT_0, DIGIT_0 + 4, DIGIT_0 + 2]), None, "42 has one spelling");
        assert_eq!(read_integer(&[DIGIT_0 + 1, DIGIT_0]), None);
        assert_eq!(read_integer(&[]), None);
    }
}
