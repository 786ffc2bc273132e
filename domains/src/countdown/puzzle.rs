//! A problem: its numbers and target, the steps of an answer, and the search for solutions.

use proto::TokenId;

use crate::symbols::vocabulary::{ADD, DIVIDE, EQUALS, MAX_INTEGER, MULTIPLY, SUBTRACT, read_integer};

pub(super) const OPERATORS: [TokenId; 4] = [ADD, SUBTRACT, MULTIPLY, DIVIDE];
pub(super) const SMALL_BOUND: u32 = 99;
pub(super) const LARGE_BOUND: u32 = MAX_INTEGER;
pub(super) const MAX_NUMBERS: usize = 6;
pub(super) const MAX_TEXT_BYTES: usize = 1_024;

/// A problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Puzzle {
    /// Descending.
    pub(super) numbers: Vec<u32>,
    pub(super) target: u32,
    /// Largest intermediate result.
    pub(super) bound: u32,
}

/// A step of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) first: u32,
    pub(super) operator: TokenId,
    pub(super) second: u32,
    pub(super) result: u32,
}

impl Puzzle {
    pub(super) fn is_solvable(&self) -> bool {
        self.first_solution().is_some()
    }

    /// Returns the operators of the first solution in the order of search, as bits in the order of [`OPERATORS`].
    pub(super) fn first_solution(&self) -> Option<u8> {
        let mut found = None;
        reaches(&self.numbers, self.bound, 0, &mut |value, operators| {
            found = (value == self.target).then_some(operators);
            found.is_some()
        });
        found
    }
}

/// A number with the expression that makes it.
#[derive(Clone)]
struct Made {
    value: u32,
    text: String,
    /// The operator that is applied last.
    operator: Option<TokenId>,
}

impl Puzzle {
    /// Returns the expression of the first solution that a search finds.
    pub(super) fn expression(&self) -> Option<String> {
        let number = |value: &u32| Made { value: *value, text: value.to_string(), operator: None };
        self.search(&self.numbers.iter().map(number).collect::<Vec<_>>())
    }

    fn search(&self, numbers: &[Made]) -> Option<String> {
        if let [Made { value, text, .. }] = numbers {
            return (*value == self.target).then(|| text.clone());
        }
        let places = (0..numbers.len()).flat_map(|i| (i + 1..numbers.len()).map(move |j| (i, j)));
        places.flat_map(|pair| OPERATORS.map(|operator| (pair, operator))).find_map(|((i, j), operator)| {
            let is_larger = numbers[i].value >= numbers[j].value;
            let (larger, smaller) = if is_larger { (&numbers[i], &numbers[j]) } else { (&numbers[j], &numbers[i]) };
            let made = larger.with(operator, smaller, self.bound)?;
            let others = numbers.iter().enumerate().filter(|(index, _)| *index != i && *index != j);
            let rest: Vec<Made> = others.map(|(_, number)| number.clone()).chain([made]).collect();
            self.search(&rest)
        })
    }
}

impl Made {
    /// Applies an operator, whose steps read from left to right are those of the search.
    fn with(&self, operator: TokenId, second: &Made, bound: u32) -> Option<Made> {
        let value = apply(self.value, operator, second.value, bound)?;
        let binds = |operator: TokenId| [MULTIPLY, DIVIDE].contains(&operator);
        let loose = |inner: Option<TokenId>| inner.is_some_and(|inner| binds(operator) && !binds(inner));
        let equal = |inner: Option<TokenId>| inner.is_some_and(|inner| binds(operator) == binds(inner));
        let within =
            |number: &Made, needs: bool| if needs { format!("({})", number.text) } else { number.text.clone() };
        let first = within(self, loose(self.operator));
        let last = within(second, loose(second.operator) || equal(second.operator));
        let sign = ["+", "-", "*", "/"][OPERATORS.iter().position(|known| *known == operator).expect("an operator")];
        Some(Made { value, text: format!("{first} {sign} {last}"), operator: Some(operator) })
    }
}

/// Applies an operator to `first >= second`; `None` unless the result is an integer from 1 to `bound`.
pub(super) fn apply(first: u32, operator: TokenId, second: u32, bound: u32) -> Option<u32> {
    let result = match operator {
        ADD => first + second,
        SUBTRACT => first - second,
        MULTIPLY => first * second,
        DIVIDE if first.is_multiple_of(second) => first / second,
        _ => return None,
    };
    (1..=bound).contains(&result).then_some(result)
}

/// Visits every value that all the numbers can make, repeats included, with the operators that make it (those in `used`
/// among them), until `stop` returns true. Returns whether it did.
fn reaches(numbers: &[u32], bound: u32, used: u8, stop: &mut impl FnMut(u32, u8) -> bool) -> bool {
    if let [value] = numbers {
        return stop(*value, used);
    }
    for i in 0..numbers.len() {
        for j in i + 1..numbers.len() {
            let mut rest = [0; MAX_NUMBERS];
            let mut len = 0;
            for (index, number) in numbers.iter().enumerate() {
                if index != i && index != j {
                    rest[len] = *number;
                    len += 1;
                }
            }
            let (larger, smaller) = (numbers[i].max(numbers[j]), numbers[i].min(numbers[j]));
            for (index, operator) in OPERATORS.into_iter().enumerate() {
                if let Some(result) = apply(larger, operator, smaller, bound) {
                    rest[len] = result;
                    if reaches(&rest[..len + 1], bound, used | 1 << index, stop) {
                        return true;
                    }
                }
            }
        }
    }
    false
}

pub(super) fn take(available: &mut Vec<u32>, number: u32) -> bool {
    let found = available.iter().position(|candidate| *candidate == number);
    found.map(|index| available.remove(index)).is_some()
}

/// Reads steps from tokens; `None` unless the tokens are steps and nothing else.
pub(super) fn read_steps(mut tokens: &[TokenId]) -> Option<Vec<Step>> {
    let mut steps = Vec::with_capacity(MAX_NUMBERS);
    while !tokens.is_empty() && steps.len() < MAX_NUMBERS {
        let (first, rest) = read_integer(tokens)?;
        let (operator, rest) = rest.split_first()?;
        let (second, rest) = read_integer(rest)?;
        let rest = rest.strip_prefix(&[EQUALS])?;
        let (result, rest) = read_integer(rest)?;
        let integers = [first, second, result];
        if !OPERATORS.contains(operator) || integers.contains(&0) {
            return None;
        }
        steps.push(Step { first, operator: *operator, second, result });
        tokens = rest;
    }
    tokens.is_empty().then_some(steps)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn count_problems(num_numbers: usize) -> usize {
        fn multisets(prefix: &mut Vec<u32>, left: usize, visit: &mut impl FnMut(&[u32])) {
            if left == 0 {
                return visit(prefix);
            }
            for number in 1..=prefix.last().copied().unwrap_or(25) {
                prefix.push(number);
                multisets(prefix, left - 1, visit);
                prefix.pop();
            }
        }
        let mut count = 0;
        multisets(&mut Vec::new(), num_numbers, &mut |numbers| {
            let mut values = BTreeSet::new();
            reaches(numbers, SMALL_BOUND, 0, &mut |value, _| {
                values.insert(value);
                false
            });
            count += values.range(10..=99).count();
        });
        count
    }

    /// The sizes of both problem spaces, counted by an independent prototype.
    #[test]
    fn problem_spaces_have_their_known_sizes() {
        assert_eq!(count_problems(3), 20_596);
        assert_eq!(count_problems(4), 626_706);
    }
}
