//! The language of answers: which tokens may follow.

use proto::{ActionMask, Token};

use super::puzzle::{OPERATORS, Puzzle, SMALL_BOUND, Step, apply, take};
use crate::grammar::{Grammar, Next};
use crate::vocabulary::{ADD, DIGIT_0, EQUALS, read_integer, spell};

/// Steps with the larger number first, so that every pair has one spelling; a step can always be completed, because two
/// positive integers have a positive difference or are equal and have the quotient 1.
#[derive(Clone)]
pub(super) struct StepsGrammar {
    calculator: bool,
    bound: u32,
    /// Descending.
    available: Vec<u32>,
    slot: Slot,
    step: Step,
    /// Tokens of the integer that is being written.
    spelled: Vec<Token>,
}

/// The part of a step that is being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    First,
    Operator,
    Second,
    Equals,
    Result,
}

impl Grammar for StepsGrammar {
    fn next(&self) -> Next {
        let mask = match self.slot {
            Slot::First if self.available.len() < 2 => return Next::Done,
            Slot::First => self.integer_mask(self.available[..self.available.len() - 1].iter().copied()),
            Slot::Operator => {
                OPERATORS.into_iter().filter(|operator| self.partners(*operator).next().is_some()).collect()
            }
            Slot::Second => self.integer_mask(self.partners(self.step.operator)),
            Slot::Equals => return Next::Forced(EQUALS),
            Slot::Result if self.calculator => return Next::Forced(spell(self.step.result)[self.spelled.len()]),
            Slot::Result => self.any_integer_mask(),
        };
        Next::of(mask)
    }

    fn push(&mut self, token: Token) -> bool {
        if !self.next().allows(token) {
            return false;
        }
        match self.slot {
            Slot::Operator => {
                self.step.operator = token;
                self.slot = Slot::Second;
            }
            Slot::Equals => self.slot = Slot::Result,
            Slot::First | Slot::Second | Slot::Result => {
                self.spelled.push(token);
                if let Some((integer, _)) = read_integer(&self.spelled) {
                    self.spelled.clear();
                    self.end_integer(integer);
                }
            }
        }
        true
    }

    fn fork(&self) -> Box<dyn Grammar> {
        Box::new(self.clone())
    }
}

impl StepsGrammar {
    /// Opens the language at its start; the calculator fills in results.
    pub(super) fn new(puzzle: Puzzle, calculator: bool) -> StepsGrammar {
        StepsGrammar {
            calculator,
            bound: puzzle.bound,
            available: puzzle.numbers,
            slot: Slot::First,
            step: Step { first: 0, operator: ADD, second: 0, result: 0 },
            spelled: Vec::new(),
        }
    }

    fn end_integer(&mut self, integer: u32) {
        match self.slot {
            Slot::First => {
                self.step.first = integer;
                self.slot = Slot::Operator;
            }
            Slot::Second => {
                self.step.second = integer;
                let result = apply(self.step.first, self.step.operator, integer, self.bound);
                self.step.result = result.expect("partners are legal operands");
                self.slot = Slot::Equals;
            }
            _ => {
                take(&mut self.available, self.step.first);
                take(&mut self.available, self.step.second);
                let at = self.available.partition_point(|number| *number > integer);
                self.available.insert(at, integer);
                self.slot = Slot::First;
            }
        }
    }

    /// Lists the second operands that give `first operator second` a legal result.
    fn partners(&self, operator: Token) -> impl Iterator<Item = u32> + '_ {
        let first = self.step.first;
        let taken = self.available.iter().position(|number| *number == first);
        self.available.iter().enumerate().filter_map(move |(index, number)| {
            let legal =
                Some(index) != taken && *number <= first && apply(first, operator, *number, self.bound).is_some();
            legal.then_some(*number)
        })
    }

    fn integer_mask(&self, candidates: impl Iterator<Item = u32>) -> ActionMask {
        let written = self.spelled.len();
        candidates
            .filter_map(|integer| {
                let tokens = spell(integer);
                tokens.starts_with(&self.spelled).then(|| tokens[written])
            })
            .collect()
    }

    /// The tokens that go on to some integer from 1 to the bound.
    fn any_integer_mask(&self) -> ActionMask {
        match self.spelled[..] {
            [] => (1..=99).chain((DIGIT_0..DIGIT_0 + 10).filter(|_| self.bound > SMALL_BOUND)).collect(),
            // 0123 is the smallest spelled hundred: 0042 would be a second spelling of 42.
            [DIGIT_0] => (DIGIT_0 + 1..DIGIT_0 + 10).collect(),
            _ => (DIGIT_0..DIGIT_0 + 10).collect(),
        }
    }
}
