//! Prompts for networks that read symbols, and the grammar of their answers.

use proto::{Difficulty, Niche, Problem, TokenId, TokenSet};

use super::puzzle::{OPERATORS, Puzzle, SMALL_BOUND, Step, apply, read_steps, take};
use super::{Countdown, propose};
use crate::Error;
use crate::symbols::vocabulary::{
    ADD, COUNTDOWN, COUNTDOWN_LARGE, DIGIT_0, EQUALS, NUM_DIGITS, ROLE_SOLVE, base_name, read_integer, spell,
};
use crate::symbols::{Grammar, Next, Symbols};

impl Symbols for Countdown {
    fn tokens(&self) -> Vec<(TokenId, &'static str)> {
        vec![(COUNTDOWN, "<countdown>"), (COUNTDOWN_LARGE, "<countdown-large>")]
    }

    fn prompt(&self, problem: &Problem) -> Result<Vec<TokenId>, Error> {
        let puzzle = self.puzzle(problem)?;
        let mut tokens = vec![ROLE_SOLVE, if puzzle.bound > SMALL_BOUND { COUNTDOWN_LARGE } else { COUNTDOWN }];
        tokens.extend(spell(puzzle.target));
        puzzle.numbers.iter().for_each(|number| tokens.extend(spell(*number)));
        Ok(tokens)
    }

    fn grammar(&self, problem: &Problem) -> Result<Box<dyn Grammar>, Error> {
        Ok(Box::new(StepsGrammar::new(self.puzzle(problem)?, self.calculator)))
    }

    fn max_answer_tokens(&self, problem: &Problem) -> Result<u32, Error> {
        let puzzle = self.puzzle(problem)?;
        let integer_tokens = if puzzle.bound > SMALL_BOUND { NUM_DIGITS } else { 1 };
        Ok((puzzle.numbers.len() as u32 - 1) * (3 * integer_tokens + 2))
    }

    fn answer_text(&self, problem: &Problem, answer: &[TokenId]) -> Option<String> {
        let num_steps = self.puzzle(problem).ok()?.numbers.len() - 1;
        let is_complete = read_steps(answer)?.len() == num_steps;
        is_complete.then(|| self.show(answer)).flatten()
    }

    fn show(&self, answer: &[TokenId]) -> Option<String> {
        let steps = read_steps(answer)?;
        let step = |Step { first, operator, second, result }: &Step| {
            format!("{first} {} {second} = {result}", base_name(*operator).expect("an operator has a name"))
        };
        Some(steps.iter().map(step).collect::<Vec<_>>().join("; "))
    }

    fn spell(&self, _problem: &Problem, answer: &str) -> Option<Vec<TokenId>> {
        let mut tokens = Vec::new();
        for word in answer.split(';').flat_map(str::split_ascii_whitespace) {
            match OPERATORS.into_iter().chain([EQUALS]).find(|sign| base_name(*sign).as_deref() == Some(word)) {
                Some(sign) => tokens.push(sign),
                None => tokens.extend(word.parse().ok().filter(|integer| *integer <= super::LARGE_BOUND).map(spell)?),
            }
        }
        read_steps(&tokens).is_some().then_some(tokens)
    }

    fn propose_prompt(&self, niche: Niche, difficulty: Difficulty) -> Vec<TokenId> {
        propose::Kind::of(niche).prompt(difficulty)
    }

    fn proposal_grammar(&self, niche: Niche) -> Box<dyn Grammar> {
        Box::new(propose::Kind::of(niche).grammar())
    }

    fn max_proposal_tokens(&self, niche: Niche) -> u32 {
        propose::Kind::of(niche).num_numbers as u32 + 1
    }

    fn proposal_text(&self, niche: Niche, proposal: &[TokenId]) -> Option<String> {
        let (target, numbers) = proposal.split_last()?;
        let is_complete = numbers.len() == propose::Kind::of(niche).num_numbers;
        let are_integers = proposal.iter().all(|token| *token <= SMALL_BOUND);
        let numbers: Vec<String> = numbers.iter().map(TokenId::to_string).collect();
        (is_complete && are_integers).then(|| format!("{} -> {target}", numbers.join(" ")))
    }
}

/// Steps with the larger number first, so that every pair has one spelling; a step can always be completed, because two
/// positive integers have a positive difference or are equal and have the quotient 1.
#[derive(Clone)]
pub(super) struct StepsGrammar {
    calculator: bool,
    target: u32,
    bound: u32,
    /// Descending.
    available: Vec<u32>,
    slot: Slot,
    step: Step,
    /// Tokens of the integer that is being written.
    spelled: Vec<TokenId>,
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

    fn push(&mut self, token: TokenId) -> bool {
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

    /// Between steps, only the available numbers matter.
    fn state(&self) -> Option<Vec<u32>> {
        let is_between = self.slot == Slot::First && self.spelled.is_empty();
        is_between.then(|| [&[self.target, self.bound], &self.available[..]].concat())
    }
}

impl StepsGrammar {
    /// Returns the grammar at its start; the calculator fills in results.
    pub(super) fn new(puzzle: Puzzle, calculator: bool) -> StepsGrammar {
        StepsGrammar {
            calculator,
            target: puzzle.target,
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
    fn partners(&self, operator: TokenId) -> impl Iterator<Item = u32> + '_ {
        let first = self.step.first;
        let taken = self.available.iter().position(|number| *number == first);
        self.available.iter().enumerate().filter_map(move |(index, number)| {
            let legal =
                Some(index) != taken && *number <= first && apply(first, operator, *number, self.bound).is_some();
            legal.then_some(*number)
        })
    }

    fn integer_mask(&self, candidates: impl Iterator<Item = u32>) -> TokenSet {
        let written = self.spelled.len();
        candidates
            .filter_map(|integer| {
                let tokens = spell(integer);
                tokens.starts_with(&self.spelled).then(|| tokens[written])
            })
            .collect()
    }

    /// Returns the tokens that continue to some integer from 1 to the bound.
    fn any_integer_mask(&self) -> TokenSet {
        match self.spelled[..] {
            [] => (1..=99).chain((DIGIT_0..DIGIT_0 + 10).filter(|_| self.bound > SMALL_BOUND)).collect(),
            // 0123 is the smallest spelled hundred: 0042 would be a second spelling of 42.
            [DIGIT_0] => (DIGIT_0 + 1..DIGIT_0 + 10).collect(),
            _ => (DIGIT_0..DIGIT_0 + 10).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::Verdict;

    use super::*;
    use crate::symbols::vocabulary::{DIVIDE, MULTIPLY};
    use crate::{Checker, Forms};

    const DOMAIN: Countdown = Countdown { calculator: true };

    #[test]
    fn calculator_forces_results() {
        let problem = DOMAIN.problem_from_text("99 98 -> 9702 max 9999").unwrap();
        let mut grammar = DOMAIN.grammar(&problem).unwrap();
        let mut answer = Vec::new();
        loop {
            let token = match grammar.next() {
                Next::Done => break,
                Next::Forced(token) => token,
                Next::Choice(mask) => {
                    assert!(mask.contains(MULTIPLY) && !mask.contains(DIVIDE));
                    MULTIPLY
                }
            };
            assert!(grammar.push(token));
            answer.push(token);
        }
        assert_eq!(DOMAIN.answer_text(&problem, &answer).unwrap(), "99 * 98 = 9702");
        assert_eq!(DOMAIN.judge(&problem, None, "99 * 98 = 9702").unwrap().verdict, Verdict::Correct);
    }
}
