//! One vocabulary for all domains: integers 0 to 99 are one token each, larger ones are spelled in digits.

use proto::{Difficulty, MASK_BITS, Token};

/// How many tokens there are, unused ids included.
pub const VOCABULARY_SIZE: usize = MASK_BITS;

/// The digit 0 of a spelled number; the digits 1 to 9 follow.
pub const DIGIT_0: Token = 100;
/// `+`
pub const ADD: Token = 110;
/// `-`
pub const SUBTRACT: Token = 111;
/// `*`
pub const MULTIPLY: Token = 112;
/// `/`
pub const DIVIDE: Token = 113;
/// `=`
pub const EQUALS: Token = 114;
/// Opens a prompt that asks for an answer.
pub const ROLE_SOLVE: Token = 120;
/// Opens a prompt that asks for a problem.
pub const ROLE_PROPOSE: Token = 121;
/// Domain token: countdown with intermediate results up to 99.
pub const COUNTDOWN: Token = 124;
/// Domain token: countdown with intermediate results up to 9,999.
pub const COUNTDOWN_LARGE: Token = 125;
/// Domain token: programs on integers and lists. The words of their language, from 128 on, are in `programs`.
pub const PROGRAMS: Token = 126;
/// Domain token: straight-line programs on digits.
pub const PROGRAMS_DIGITS: Token = 127;

/// Ends a prompt that asks for a problem: how hard it is to be. The other difficulties follow.
const FIRST_DIFFICULTY: Token = 116;

/// Most digits of a spelled number. Every spelled number has exactly this many, so that no spelling is a prefix of
/// another and a number never needs a token to end it.
pub const NUM_DIGITS: u32 = 4;
/// The largest integer that has a spelling.
pub const MAX_INTEGER: u32 = 9_999;

/// Spells a difficulty.
pub fn difficulty_token(difficulty: Difficulty) -> Token {
    FIRST_DIFFICULTY + difficulty as Token
}

/// Spells an integer: one token up to 99, else four digits.
///
/// ```
/// assert_eq!(domains::vocabulary::spell(42), [42]);
/// assert_eq!(domains::vocabulary::spell(123), [100, 101, 102, 103]);
/// ```
///
/// # Panics
/// When the integer is over [`MAX_INTEGER`].
pub fn spell(integer: u32) -> Vec<Token> {
    assert!(integer <= MAX_INTEGER, "spell: expected at most {MAX_INTEGER}, got {integer}");
    if integer <= 99 {
        return vec![integer as Token];
    }
    (0..NUM_DIGITS).rev().map(|place| DIGIT_0 + (integer / 10u32.pow(place) % 10) as Token).collect()
}

/// Reads a spelled integer from the front of `tokens`; gives it and the rest.
///
/// `None` when the tokens do not begin with a canonical spelling.
pub fn read_integer(tokens: &[Token]) -> Option<(u32, &[Token])> {
    let (first, rest) = tokens.split_first()?;
    if *first <= 99 {
        return Some((u32::from(*first), rest));
    }
    let (digits, rest) = tokens.split_at_checked(NUM_DIGITS as usize)?;
    let mut integer = 0;
    for token in digits {
        integer = integer * 10 + digit(*token)?;
    }
    (integer > 99).then_some((integer, rest))
}

fn digit(token: Token) -> Option<u32> {
    (DIGIT_0..DIGIT_0 + 10).contains(&token).then(|| u32::from(token - DIGIT_0))
}

/// Names a token, for people and for `tokenizer.json`.
pub fn token_name(token: Token) -> String {
    match token {
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
        COUNTDOWN => "<countdown>".to_owned(),
        COUNTDOWN_LARGE => "<countdown-large>".to_owned(),
        PROGRAMS => "<programs>".to_owned(),
        PROGRAMS_DIGITS => "<programs-digits>".to_owned(),
        _ => crate::programs::token_name(token).map_or_else(|| format!("<unused-{token}>"), str::to_owned),
    }
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

    #[test]
    fn token_names_are_distinct() {
        let names: std::collections::BTreeSet<_> = (0..VOCABULARY_SIZE as Token).map(token_name).collect();
        assert_eq!(names.len(), VOCABULARY_SIZE);
    }
}
