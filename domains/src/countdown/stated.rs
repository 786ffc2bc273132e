//! A problem as stated in text or JSON. Without a named bound it has none: its numbers and its target may be larger than a
//! policy can write.

use std::fmt::{Display, Write as _};

use super::puzzle::{LARGE_BOUND, MAX_NUMBERS, MAX_TEXT_BYTES, Puzzle, SMALL_BOUND};
use crate::describe_json;
use crate::json::{Fields, Refusal, list};

/// Most numbers of a problem; a problem for a policy has at most [`MAX_NUMBERS`].
pub(super) const MAX_STATED_NUMBERS: usize = 16;

/// Ends the canonical text of a problem without a bound.
pub(super) const NO_MAX: &str = " no max";

/// A problem as stated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stated {
    /// Descending.
    pub(super) numbers: Vec<u64>,
    pub(super) target: u64,
    /// Largest intermediate result, 99 or 9,999, if there is one.
    pub(super) bound: Option<u64>,
}

impl Stated {
    pub(super) fn new(mut numbers: Vec<u64>, target: u64, bound: Option<u64>) -> Result<Stated, Refusal> {
        let refuse = |expected: String, got: String| Err((expected, got));
        if let Some(bound) = bound.filter(|bound| ![SMALL_BOUND, LARGE_BOUND].map(u64::from).contains(bound)) {
            return refuse("a largest intermediate result of 99 or 9999, or none".to_owned(), bound.to_string());
        }
        if !(2..=MAX_STATED_NUMBERS).contains(&numbers.len()) {
            return refuse(format!("2 to {MAX_STATED_NUMBERS} numbers"), numbers.len().to_string());
        }
        let legal = 1..=bound.unwrap_or(u64::MAX);
        let is_bound = bound.map_or("", |_| ", the largest intermediate result (max_intermediate)");
        if let Some(number) = numbers.iter().find(|number| !legal.contains(number)) {
            return refuse(format!("numbers from 1 to {}{is_bound}", legal.end()), number.to_string());
        }
        if !legal.contains(&target) {
            return refuse(format!("a target from 1 to {}{is_bound}", legal.end()), target.to_string());
        }
        numbers.sort_unstable_by(|left, right| right.cmp(left));
        Ok(Stated { numbers, target, bound })
    }

    pub(super) fn from_json(json: &serde_json::Value) -> Result<Stated, Refusal> {
        let mut fields = Fields::of(json)?;
        fields.take("domain");
        let is_nums = fields.has("nums");
        if is_nums && fields.has("numbers") {
            return Err(("one of numbers and nums".to_owned(), "both".to_owned()));
        }
        let integer = serde_json::Value::as_u64;
        let numbers = fields.read(
            if is_nums { "nums" } else { "numbers" },
            "a list of positive integers of up to 64 bits",
            |value| list(value, integer),
        )?;
        let target = fields.read("target", "a positive integer of up to 64 bits", integer)?;
        let bound = match fields.take("max_intermediate") {
            None => None,
            Some(bound) => {
                let refusal = || ("99, 9999 or null as max_intermediate".to_owned(), describe_json(bound));
                Some(integer(bound).ok_or_else(refusal)?)
            }
        };
        fields.end("domain, numbers (or nums), target and max_intermediate")?;
        Stated::new(numbers, target, bound)
    }

    /// Reads a problem as a person would type it, its canonical text included.
    ///
    /// Text is the form for policies, so the bound is 99 when the text names none. If a number or the target is larger, there is
    /// no bound.
    pub(super) fn typed(text: &str) -> Result<Stated, Refusal> {
        let refuse = || {
            let expected = "numbers, an arrow and a target, such as \"3 7 25 -> 78\", \"50 75 2 9 -> 98 max 9999\" or \
                            \"3 7 25 -> 78 no max\"";
            (expected.to_owned(), crate::quote(text))
        };
        if text.len() > MAX_TEXT_BYTES {
            return Err(refuse());
        }
        let (numbers, rest) = text.split_once("->").ok_or_else(refuse)?;
        let numbers: Option<Vec<u64>> = numbers.split_ascii_whitespace().map(integer).collect();
        let numbers = numbers.ok_or_else(refuse)?;
        let mut words = rest.split_ascii_whitespace();
        let target = words.next().and_then(integer).ok_or_else(refuse)?;
        let is_small = |number: &u64| *number <= u64::from(SMALL_BOUND);
        let bound = match (words.next(), words.next()) {
            (None, None) => numbers.iter().chain([&target]).all(is_small).then_some(u64::from(SMALL_BOUND)),
            (Some("max"), Some(bound)) => Some(integer(bound).ok_or_else(refuse)?),
            (Some("no"), Some("max")) => None,
            _ => return Err(refuse()),
        };
        if words.next().is_some() {
            return Err(refuse());
        }
        Stated::new(numbers, target, bound)
    }

    /// Reads a canonical text; `None` when it is not one.
    pub(super) fn read(text: &str) -> Option<Stated> {
        Stated::typed(text).ok().filter(|stated| stated.text() == text)
    }

    /// Returns the canonical text.
    pub(super) fn text(&self) -> String {
        text(&self.numbers, self.target, self.bound)
    }

    /// Returns the problem in the form for a policy, with the smallest bound that fits if it names none; `None` when no policy
    /// can write its numbers or its target, or when it has too many numbers.
    pub(super) fn puzzle(&self) -> Option<Puzzle> {
        let largest = self.numbers[0].max(self.target);
        let smallest_bound = if largest <= u64::from(SMALL_BOUND) { SMALL_BOUND } else { LARGE_BOUND };
        let bound = self.bound.map_or(smallest_bound, |bound| bound as u32);
        let fits = largest <= u64::from(bound) && self.numbers.len() <= MAX_NUMBERS;
        let numbers = || self.numbers.iter().map(|number| *number as u32).collect();
        fits.then(|| Puzzle { numbers: numbers(), target: self.target as u32, bound })
    }
}

/// Writes a canonical text; omits the bound when it is 99.
pub(super) fn text<N: Display>(numbers: &[N], target: N, bound: Option<u64>) -> String {
    let mut text = String::with_capacity(32);
    for number in numbers {
        let _ = write!(text, "{number} ");
    }
    let _ = write!(text, "-> {target}");
    match bound {
        None => text.push_str(NO_MAX),
        Some(bound) if bound == u64::from(SMALL_BOUND) => {}
        Some(bound) => drop(write!(text, " max {bound}")),
    }
    text
}

/// Reads a positive integer in its one spelling: digits alone, no leading zero.
pub(super) fn integer(text: &str) -> Option<u64> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    is_plain.then(|| text.parse().ok()).flatten()
}
