//! Answers in text, judged by exact arithmetic on 64 bits.
//!
//! An answer is steps `25 * 3 = 75; 75 + 7 = 82`, separated by `;`, `,` or a line break, or one expression
//! `(25 * 3) + 7`, with or without `= 82` after it. Integers are digits alone, without a sign or a leading zero. Every
//! intermediate result is a positive integer: a difference is over zero and a division leaves no remainder.
//!
//! Nothing here recurses, and an answer is short, so no text can stall the checker.

use std::collections::BTreeSet;
use std::fmt;

use proto::Verdict;

use super::puzzle::MAX_TEXT_BYTES;
use super::stated::Stated;
use crate::{Judged, quote};

/// Most parentheses around a number.
const MAX_DEPTH: usize = 32;

/// Most digits of an integer that a reason quotes: as many as a 64-bit integer can have.
const MAX_QUOTED_DIGITS: usize = 20;

/// Judges an answer in text, with a reason when it is not correct.
pub(super) fn judge(problem: &Stated, answer: &str) -> Judged {
    match check::<String>(problem, answer) {
        Ok(()) => Judged::correct(),
        Err((verdict, reason)) => Judged::because(verdict, reason),
    }
}

/// Judges an answer in text, without a reason.
pub(super) fn verdict(problem: &Stated, answer: &str) -> Verdict {
    check::<()>(problem, answer).map_or_else(|(verdict, ())| verdict, |()| Verdict::Correct)
}

/// Returns the last result of an answer that follows the rules, whatever the target; `None` when it breaks them.
pub(super) fn value_reached(problem: &Stated, answer: &str) -> Option<u64> {
    follow::<()>(problem, answer).ok()
}

/// Why an answer is not correct: a text, or nothing where nobody reads it. Most answers of an untrained policy are wrong, and
/// writing the reason takes longer than finding it.
trait Reason {
    fn of<S: Into<String>>(text: impl FnOnce() -> S) -> Self;
}

impl Reason for String {
    fn of<S: Into<String>>(text: impl FnOnce() -> S) -> String {
        text().into()
    }
}

impl Reason for () {
    fn of<S: Into<String>>(_text: impl FnOnce() -> S) {}
}

/// A verdict that is not `correct`, and why.
type Refusal<R> = (Verdict, R);

fn malformed<T, R: Reason, S: Into<String>>(reason: impl FnOnce() -> S) -> Result<T, Refusal<R>> {
    Err((Verdict::Malformed, R::of(reason)))
}

fn incorrect<T, R: Reason>(reason: impl FnOnce() -> String) -> Result<T, Refusal<R>> {
    Err((Verdict::Incorrect, R::of(reason)))
}

fn check<R: Reason>(problem: &Stated, answer: &str) -> Result<(), Refusal<R>> {
    let reached = follow(problem, answer)?;
    if reached == problem.target { Ok(()) } else { incorrect(|| format!("ends in {reached}, not {}", problem.target)) }
}

fn follow<R: Reason>(problem: &Stated, answer: &str) -> Result<u64, Refusal<R>> {
    if answer.len() > MAX_TEXT_BYTES {
        return malformed(|| format!("expected an answer of up to {MAX_TEXT_BYTES} bytes, got {}", answer.len()));
    }
    match lines(answer)?[..] {
        [only] => follow_expression(problem, only),
        ref steps => {
            let steps: Vec<Step> = steps.iter().map(|step| Step::read(step)).collect::<Result<_, _>>()?;
            follow_steps(problem, &steps)
        }
    }
}

/// Splits an answer into its steps. Line breaks are white space as well, so blank lines are not steps.
fn lines<R: Reason>(answer: &str) -> Result<Vec<&str>, Refusal<R>> {
    let is_blank = |text: &str| text.bytes().all(|byte| is_space(char::from(byte)) || byte == b'\n');
    if is_blank(answer) {
        return malformed(|| "expected steps or an expression, got nothing");
    }
    let mut lines = Vec::new();
    for part in answer.split([';', ',']) {
        if is_blank(part) {
            return malformed(|| "expected a step on both sides of every `;` and `,`, got none on one");
        }
        lines.extend(part.split('\n').filter(|line| !is_blank(line)));
    }
    Ok(lines)
}

/// `first operator second = result`
struct Step<'a> {
    first: Integer<'a>,
    operator: Operator,
    second: Integer<'a>,
    result: Integer<'a>,
}

impl<'a> Step<'a> {
    fn read<R: Reason>(text: &'a str) -> Result<Step<'a>, Refusal<R>> {
        match lexemes(text)?[..] {
            [
                Lexeme::Integer(first),
                Lexeme::Operator(operator),
                Lexeme::Integer(second),
                Lexeme::Equals,
                Lexeme::Integer(result),
            ] => Ok(Step { first, operator, second, result }),
            _ => malformed(|| format!("expected steps such as `25 * 3 = 75`, got {}", quote(text))),
        }
    }
}

/// Follows the steps, each of which replaces two numbers by its result; returns the last result.
fn follow_steps<R: Reason>(problem: &Stated, steps: &[Step]) -> Result<u64, Refusal<R>> {
    // All numbers that are given or made by steps, and those of them that are left.
    let (mut there, mut left) = (problem.numbers.clone(), problem.numbers.clone());
    let mut taken = Vec::with_capacity(2 * steps.len());
    for step in steps {
        let mut take = |operand: Integer| {
            let num_taken = taken.iter().filter(|other| **other == operand.value()).count() + 1;
            taken.push(operand.value());
            match left.iter().position(|number| operand.value() == Some(*number)) {
                Some(at) => Ok(left.remove(at)),
                None => incorrect(|| used_too_often(operand, num_taken, count(&there, operand))),
            }
        };
        let (first, second) = (take(step.first)?, take(step.second)?);
        let result = step.operator.apply(first, second, problem.bound)?;
        if step.result.value() != Some(result) {
            return incorrect(|| format!("{first} {} {second} is {result}, not {}", step.operator, step.result));
        }
        there.push(result);
        left.push(result);
    }
    let last = left.pop().expect("an answer has a step, and a step a result");
    if left.is_empty() { Ok(last) } else { incorrect(|| not_used(&left, &problem.numbers)) }
}

/// Evaluates an expression that uses every number once, and checks the result that it claims after `=`, if any.
fn follow_expression<R: Reason>(problem: &Stated, text: &str) -> Result<u64, Refusal<R>> {
    let lexemes = lexemes(text)?;
    let (written, claimed) = match lexemes[..] {
        [ref written @ .., Lexeme::Equals, Lexeme::Integer(claimed)] => (written, Some(claimed)),
        ref written => (written, None),
    };
    if written.is_empty() {
        return malformed(|| format!("expected an expression before `=`, got {}", quote(text)));
    }
    let postfix = postfix(written)?;
    if let [only] = postfix[..] {
        return malformed(|| format!("expected steps or an expression, got {only} alone"));
    }
    let integers: Vec<Integer> = postfix.iter().filter_map(|lexeme| lexeme.integer()).collect();
    let mut unused = problem.numbers.clone();
    for integer in &integers {
        match unused.iter().position(|number| integer.value() == Some(*number)) {
            Some(at) => drop(unused.remove(at)),
            None => {
                let num_used = integers.iter().filter(|other| *other == integer).count();
                return incorrect(|| used_too_often(*integer, num_used, count(&problem.numbers, *integer)));
            }
        }
    }
    if !unused.is_empty() {
        return incorrect(|| not_used(&unused, &problem.numbers));
    }
    let value = evaluate(&postfix, problem.bound)?;
    match claimed.filter(|claimed| claimed.value() != Some(value)) {
        Some(claimed) => {
            let left = text.split('=').next().unwrap_or_default().trim_matches(is_space);
            incorrect(|| format!("{left} is {value}, not {claimed}"))
        }
        None => Ok(value),
    }
}

/// Converts an expression to postfix notation, in which every operator follows its operands.
///
/// Source: Dijkstra 1961, "Algol 60 translation".
fn postfix<'a, R: Reason>(lexemes: &[Lexeme<'a>]) -> Result<Vec<Lexeme<'a>>, Refusal<R>> {
    let (mut ordered, mut waiting) = (Vec::with_capacity(lexemes.len()), Vec::<Lexeme>::new());
    let (mut is_operand_next, mut depth) = (true, 0);
    for lexeme in lexemes {
        match (lexeme, is_operand_next) {
            (Lexeme::Integer(_), true) => {
                ordered.push(*lexeme);
                is_operand_next = false;
            }
            (Lexeme::Open, true) if depth == MAX_DEPTH => {
                return Err((Verdict::Resource, R::of(|| format!("nested more than {MAX_DEPTH} parentheses deep"))));
            }
            (Lexeme::Open, true) => {
                depth += 1;
                waiting.push(*lexeme);
            }
            (Lexeme::Operator(operator), false) => {
                while let Some(before) = waiting.pop_if(|before| before.binds_before(*operator)) {
                    ordered.push(before);
                }
                waiting.push(*lexeme);
                is_operand_next = true;
            }
            (Lexeme::Close, false) => {
                while let Some(before) = waiting.pop_if(|before| *before != Lexeme::Open) {
                    ordered.push(before);
                }
                if waiting.pop().is_none() {
                    return malformed(|| "`)` closes no `(`");
                }
                depth -= 1;
            }
            (_, true) => return malformed(|| format!("expected an integer or `(`, got {lexeme}")),
            (_, false) => return malformed(|| format!("expected an operator, got {lexeme}")),
        }
    }
    if is_operand_next {
        return malformed(|| "the expression ends where an integer is expected");
    }
    if depth > 0 {
        return malformed(|| "`(` is not closed");
    }
    ordered.extend(waiting.into_iter().rev());
    Ok(ordered)
}

fn evaluate<R: Reason>(postfix: &[Lexeme], bound: Option<u64>) -> Result<u64, Refusal<R>> {
    let mut values = Vec::with_capacity(postfix.len());
    for lexeme in postfix {
        let value = match lexeme {
            Lexeme::Operator(operator) => {
                let second = values.pop().expect("an operator stands behind its operands");
                let first = values.pop().expect("an operator stands behind its operands");
                operator.apply(first, second, bound)?
            }
            other => {
                let given = other.integer().and_then(Integer::value);
                given.expect("what is left of an expression is integers, and each is a given number")
            }
        };
        values.push(value);
    }
    Ok(values.pop().expect("an expression has a value"))
}

fn count(numbers: &[u64], integer: Integer) -> usize {
    numbers.iter().filter(|number| integer.value() == Some(**number)).count()
}

fn used_too_often(integer: Integer, num_used: usize, num_there: usize) -> String {
    match (num_used, num_there) {
        (_, 0) => format!("uses {integer}, which is not given"),
        (2, 1) => format!("uses {integer} twice"),
        _ => format!("uses {integer} too often: {}, not {}", times(num_used), times(num_there)),
    }
}

/// Lists the numbers that an answer does not use, and those that it uses less often than they are given.
fn not_used(left: &[u64], given: &[u64]) -> String {
    let count = |numbers: &[u64], number: &u64| numbers.iter().filter(|other| *other == number).count();
    let (partly, wholly): (Vec<u64>, Vec<u64>) =
        left.iter().partition(|number| count(left, number) < count(given, number));
    let wholly: Vec<String> = wholly.iter().map(u64::to_string).collect();
    let mut reasons = Vec::from_iter((!wholly.is_empty()).then(|| format!("does not use {}", wholly.join(", "))));
    for number in partly.iter().collect::<BTreeSet<_>>() {
        let num_given = count(given, number);
        let num_used = num_given - count(left, number);
        reasons.push(format!("uses {number} too seldom: {}, not {}", times(num_used), times(num_given)));
    }
    reasons.join("; ")
}

fn times(count: usize) -> String {
    match count {
        1 => "once".to_owned(),
        2 => "twice".to_owned(),
        more => format!("{more} times"),
    }
}

/// An integer as it is written: equal integers have equal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Integer<'a> {
    digits: &'a str,
}

impl Integer<'_> {
    /// Returns the value; `None` when it does not fit into 64 bits.
    fn value(self) -> Option<u64> {
        self.digits.parse().ok()
    }
}

impl fmt::Display for Integer<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.digits.get(MAX_QUOTED_DIGITS..) {
            None | Some("") => formatter.write_str(self.digits),
            Some(_) => write!(formatter, "{}... ({} digits)", &self.digits[..MAX_QUOTED_DIGITS], self.digits.len()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
}

impl Operator {
    fn of(sign: char) -> Option<Operator> {
        Some(match sign {
            '+' => Operator::Add,
            '-' | '\u{2212}' => Operator::Subtract,
            '*' | '\u{d7}' => Operator::Multiply,
            '/' | '\u{f7}' => Operator::Divide,
            _ => return None,
        })
    }

    fn precedence(self) -> u8 {
        match self {
            Operator::Add | Operator::Subtract => 0,
            Operator::Multiply | Operator::Divide => 1,
        }
    }

    /// Computes a result, which is a positive integer up to the bound.
    fn apply<R: Reason>(self, first: u64, second: u64, bound: Option<u64>) -> Result<u64, Refusal<R>> {
        let step = format_args!("{first} {self} {second}");
        let result = match self {
            Operator::Add => first.checked_add(second),
            Operator::Multiply => first.checked_mul(second),
            Operator::Subtract if first <= second => return incorrect(|| format!("{step} is no positive integer")),
            Operator::Subtract => Some(first - second),
            Operator::Divide if !first.is_multiple_of(second) => return incorrect(|| format!("{step} is no integer")),
            Operator::Divide => Some(first / second),
        };
        match (result, bound) {
            (None, _) => Err((Verdict::Resource, R::of(|| format!("{step} is larger than 64 bits hold")))),
            (Some(result), Some(bound)) if result > bound => {
                incorrect(|| format!("{step} is {result}, over the max_intermediate of {bound}"))
            }
            (Some(result), _) => Ok(result),
        }
    }
}

impl fmt::Display for Operator {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Operator::Add => "+",
            Operator::Subtract => "-",
            Operator::Multiply => "*",
            Operator::Divide => "/",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lexeme<'a> {
    Integer(Integer<'a>),
    Operator(Operator),
    Open,
    Close,
    Equals,
}

impl<'a> Lexeme<'a> {
    fn integer(&self) -> Option<Integer<'a>> {
        match self {
            Lexeme::Integer(integer) => Some(*integer),
            _ => None,
        }
    }

    /// Whether this is an operator that is applied before the operator `right`, which follows it.
    fn binds_before(&self, right: Operator) -> bool {
        matches!(self, Lexeme::Operator(left) if left.precedence() >= right.precedence())
    }
}

impl fmt::Display for Lexeme<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lexeme::Integer(integer) => write!(formatter, "{integer}"),
            Lexeme::Operator(operator) => write!(formatter, "`{operator}`"),
            Lexeme::Open => formatter.write_str("`(`"),
            Lexeme::Close => formatter.write_str("`)`"),
            Lexeme::Equals => formatter.write_str("`=`"),
        }
    }
}

fn lexemes<R: Reason>(text: &str) -> Result<Vec<Lexeme<'_>>, Refusal<R>> {
    let mut lexemes = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while let Some(first) = rest.chars().next() {
        let mut len = first.len_utf8();
        lexemes.push(match first {
            '0'..='9' => {
                len = rest.bytes().take_while(u8::is_ascii_digit).count();
                Lexeme::Integer(integer(&rest[..len])?)
            }
            '(' => Lexeme::Open,
            ')' => Lexeme::Close,
            '=' => Lexeme::Equals,
            other => match Operator::of(other) {
                Some(operator) => Lexeme::Operator(operator),
                None => return malformed(|| format!("expected integers, + - * / ( ) and =, got {}", name(other))),
            },
        });
        rest = rest[len..].trim_start_matches(is_space);
    }
    Ok(lexemes)
}

fn integer<R: Reason>(digits: &str) -> Result<Integer<'_>, Refusal<R>> {
    let integer = Integer { digits };
    if digits.starts_with('0') {
        return malformed(|| format!("expected integers from 1 on without leading zeros, got {integer}"));
    }
    Ok(integer)
}

/// Describes a character that is not legal in an answer; many look like one that is.
fn name(character: char) -> String {
    match character {
        '\u{feff}' => "a byte order mark (U+FEFF)".to_owned(),
        '!'..='~' => format!("`{character}`"),
        other => format!("{other:?} (U+{:04X})", u32::from(other)),
    }
}

fn is_space(character: char) -> bool {
    matches!(character, ' ' | '\t' | '\r')
}

#[cfg(test)]
mod tests {
    use Verdict::{Correct, Incorrect, Malformed, Resource};

    use super::*;

    fn stated(numbers: &[u64], target: u64, bound: Option<u64>) -> Stated {
        Stated::new(numbers.to_vec(), target, bound).unwrap()
    }

    fn judged(problem: &Stated, answer: &str) -> (Verdict, String) {
        let Judged { verdict, reason } = judge(problem, answer);
        assert_eq!(verdict == Correct, reason.is_none(), "{answer:?}: every verdict but correct has a reason");
        (verdict, reason.unwrap_or_default())
    }

    #[test]
    fn right_answers_in_every_spelling() {
        let problem = stated(&[25, 3, 7], 82, None);
        for answer in [
            "25 * 3 = 75; 75 + 7 = 82",
            "3*25=75,7+75=82",
            "3 * 25 = 75\n75 + 7 = 82\n",
            "\r\n3 * 25 = 75;\r\n\r\n75 + 7 = 82\r\n",
            "25 × 3 = 75; 75 + 7 = 82",
            "(25 * 3) + 7",
            "(25 * 3) + 7 = 82",
            "25*3+7",
            "7+25*3",
            "7 + 3 × 25 = 82",
            " ( ( (25)*(3) ) +\t7)\n",
        ] {
            assert_eq!(judged(&problem, answer).0, Correct, "{answer:?}");
        }
        let problem = stated(&[50, 2, 8, 3], 14, None);
        for (answer, reason) in [
            ("50 ÷ 2 = 25; 25 − 8 = 17; 17 − 3 = 14", ""),
            // Operators of one precedence are applied from left to right.
            ("50 ÷ 2 − 8 − 3", ""),
            ("50 / 2 - (8 + 3)", ""),
            ("50 / 2 - (8 - 3)", "ends in 20, not 14"),
            ("50 - 8 / 2 - 3", "ends in 43, not 14"),
            ("50 / (8 / 2) - 3", "50 / 4 is no integer"),
        ] {
            assert_eq!(judged(&problem, answer).1, reason, "{answer:?}");
        }
        assert_eq!(judged(&stated(&[48, 2, 8], 3, None), "48 / 2 / 8").0, Correct);
        assert_eq!(judged(&stated(&[48, 2, 8], 12, None), "48 / (8 / 2)").0, Correct);
    }

    #[test]
    fn reasons_by_hand() {
        let problem = stated(&[25, 3, 7], 82, None);
        for (answer, reason) in [
            ("25 * 3 = 75; 75 + 3 = 78", "uses 3 twice"),
            ("25 * 25 + 7", "uses 25 twice"),
            ("25 * 3 * 3 * 3", "uses 3 too often: 3 times, not once"),
            ("25 * 4 = 100; 100 + 7 = 107", "uses 4, which is not given"),
            ("25 * 3 = 75; 70 + 7 = 77", "uses 70, which is not given"),
            ("25 - 7 = 18", "does not use 3"),
            ("25 + 7 = 32; 32 - 3 = 29", "ends in 29, not 82"),
            ("25 * 3 + 7 = 81", "25 * 3 + 7 is 82, not 81"),
            ("25 * 3 = 78; 78 + 7 = 85", "25 * 3 is 75, not 78"),
            ("7 - 25 = 18; 18 + 3 = 21", "7 - 25 is no positive integer"),
            ("25 / 7 = 3; 3 + 3 = 6", "25 / 7 is no integer"),
            ("25 + 3 * 7", "ends in 46, not 82"),
        ] {
            assert_eq!(judged(&problem, answer), (Incorrect, reason.to_owned()), "{answer:?}");
        }
        let pairs = stated(&[3, 3, 9], 9, None);
        assert_eq!(judged(&pairs, "3 + 3 - 3").1, "uses 3 too often: 3 times, not twice");
        assert_eq!(judged(&pairs, "9 - 3 = 6; 9 + 6 = 15").1, "uses 9 twice");
        assert_eq!(judged(&stated(&[9, 8, 2, 1], 9, None), "9 * 1 = 9; 8 * 2 = 16").1, "does not use 9");
        assert_eq!(judged(&stated(&[9, 8, 2, 1], 9, None), "9 * 1").1, "does not use 8, 2");
        let threes = stated(&[3, 3, 3, 7], 9, None);
        for answer in ["3 * 3", "3 * 3 = 9"] {
            assert_eq!(judged(&threes, answer).1, "does not use 7; uses 3 too seldom: twice, not 3 times");
        }
    }

    #[test]
    fn only_a_bound_that_is_named_binds() {
        let steps = "40 * 25 = 1000; 1000 / 20 = 50";
        for (bound, verdict) in [(None, Correct), (Some(9_999), Correct), (Some(99), Incorrect)] {
            let problem = stated(&[40, 25, 20], 50, bound);
            assert_eq!(judged(&problem, steps).0, verdict, "{bound:?}");
            assert_eq!(judged(&problem, "40 * 25 / 20").0, verdict, "{bound:?}");
        }
        let bounded = stated(&[40, 25, 20], 50, Some(99));
        assert_eq!(judged(&bounded, steps).1, "40 * 25 is 1000, over the max_intermediate of 99");
        assert_eq!(judged(&stated(&[40, 30, 75, 60], 6_000, None), "75 * 40 / 30 * 60").0, Correct);
    }

    #[test]
    fn what_64_bits_do_not_hold_is_neither_right_nor_wrong() {
        let large = stated(&[u64::MAX, u64::MAX, 2, 2], u64::MAX, None);
        let max = u64::MAX;
        for answer in [format!("{max} * 2 / 2 * {max}"), format!("{max} + {max} = 36893488147419103230; 2 * 2 = 4")] {
            let (verdict, reason) = judged(&large, &answer);
            assert_eq!(verdict, Resource, "{answer}");
            assert!(reason.ends_with("is larger than 64 bits hold"), "{reason}");
        }
        assert_eq!(judged(&large, &format!("{max} / {max} * 2 * 2")), (Incorrect, format!("ends in 4, not {max}")));
        // Wrapped around, 2^32 * 2^32 + 7 is 7.
        let wrapping = stated(&[1 << 32, 1 << 32, 7], 7, None);
        assert_eq!(judged(&wrapping, "4294967296 * 4294967296 + 7").0, Resource);
        let small = stated(&[25, 3, 7], 82, None);
        let (verdict, reason) = judged(&small, "25 * 3 = 18446744073709551691; 75 + 7 = 82");
        assert_eq!((verdict, &*reason), (Incorrect, "25 * 3 is 75, not 18446744073709551691"));
        assert_eq!(judged(&small, "18446744073709551641 * 3 + 7").0, Incorrect);
        let reason = judged(&small, &format!("{} * 3 + 7", "9".repeat(32)));
        assert_eq!(reason, (Incorrect, "uses 99999999999999999999... (32 digits), which is not given".to_owned()));
    }

    #[test]
    fn characters_that_look_right_are_named() {
        let problem = stated(&[25, 3, 7], 82, None);
        for (answer, says) in [
            ("\u{feff}25 * 3 + 7", "got a byte order mark (U+FEFF)"),
            ("25\u{a0}* 3 + 7", "got '\\u{a0}' (U+00A0)"),
            ("25 – 3", "got '–' (U+2013)"),
            ("25 x 3 + 7", "got `x`"),
            ("25 * 3 = 75;; 75 + 7 = 82", "on both sides of every `;` and `,`"),
            ("025 * 3", "without leading zeros, got 025"),
            ("25 ** 3", "expected an integer or `(`, got `*`"),
            ("25(3) + 7", "expected an operator, got `(`"),
            ("82", "got 82 alone"),
        ] {
            let (verdict, reason) = judged(&problem, answer);
            assert_eq!(verdict, Malformed);
            assert!(reason.contains(says), "{answer:?}: {reason}");
        }
    }
}
