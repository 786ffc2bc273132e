//! Problems that the policy writes, and changes of problems.
//!
//! A proposal is the numbers, in descending order if it is in symbols, and the target. The prompt names a kind: the count of numbers, the decade of
//! the target, and the operators of the first solution that exhaustive search finds. Only the count of numbers is binding.

use std::fmt;

use proto::{CounterRng, Difficulty, Niche, TokenId, Verdict};

use super::puzzle::{LARGE_BOUND, MAX_NUMBERS, OPERATORS, Puzzle, SMALL_BOUND};
use super::stated::integer;
use crate::symbols::vocabulary::{COUNTDOWN, COUNTDOWN_LARGE, ROLE_PROPOSE, base_name, difficulty_token};
use crate::symbols::{Grammar, Next};
use crate::{Judged, quote};

/// Largest number of a proposal with intermediate results up to 99; other proposals have numbers up to 99.
const MAX_SMALL_NUMBER: u32 = 25;
const MIN_TARGET: u32 = 10;
const MAX_TARGET: u32 = 99;
/// Most draws of a change to find one that has a solution.
const NUM_MUTATION_DRAWS: usize = 32;

/// A niche, unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) num_numbers: usize,
    is_large: bool,
    /// Target divided by 10.
    bucket: u8,
    /// Operators of the first solution, as bits; none when there is no solution.
    operators: u8,
}

impl Kind {
    pub(super) fn of_puzzle(puzzle: &Puzzle) -> Kind {
        Kind {
            num_numbers: puzzle.numbers.len(),
            is_large: puzzle.bound > SMALL_BOUND,
            bucket: (puzzle.target / 10).min(10) as u8,
            operators: puzzle.first_solution().unwrap_or(0),
        }
    }

    /// Unpacks a niche; clamps values that are out of range to the nearest legal one.
    pub(super) fn of(niche: Niche) -> Kind {
        let [operators, bucket, num_numbers, is_large, ..] = niche.0.to_le_bytes();
        Kind {
            num_numbers: usize::from(num_numbers).clamp(2, MAX_NUMBERS),
            is_large: is_large != 0,
            bucket: bucket.min(10),
            operators: operators & 0b1111,
        }
    }

    pub(super) fn niche(self) -> Niche {
        let bytes = [self.operators, self.bucket, self.num_numbers as u8, u8::from(self.is_large), 0, 0, 0, 0];
        Niche(u64::from_le_bytes(bytes))
    }

    pub(super) fn is_of(self, num_numbers: usize, bound: u32) -> bool {
        self.num_numbers == num_numbers && self.is_large == (bound > SMALL_BOUND)
    }

    pub(super) fn prompt(self, difficulty: Difficulty) -> Vec<TokenId> {
        let domain = if self.is_large { COUNTDOWN_LARGE } else { COUNTDOWN };
        let mut tokens = vec![ROLE_PROPOSE, domain, self.num_numbers as TokenId, TokenId::from(self.bucket)];
        tokens.extend(self.operators());
        tokens.push(difficulty_token(difficulty));
        tokens
    }

    pub(super) fn grammar(self) -> ProposalGrammar {
        ProposalGrammar { numbers_left: self.num_numbers, largest: self.max_number(), is_done: false }
    }

    /// Reads a proposal such as `25 7 3 -> 82`.
    pub(super) fn read(self, proposal: &str) -> Result<Puzzle, Judged> {
        let refuse = |verdict, expected: String| {
            Judged::because(verdict, format!("expected {expected}, got {}", quote(proposal)))
        };
        let words = proposal.split_once(" -> ").and_then(|(numbers, target)| {
            Some((numbers.split(' ').map(integer).collect::<Option<Vec<u64>>>()?, integer(target)?))
        });
        let form = "numbers, an arrow and a target, such as \"25 7 3 -> 82\"";
        let (numbers, target) = words.ok_or_else(|| refuse(Verdict::Malformed, form.to_owned()))?;
        let (num_numbers, most) = (self.num_numbers, self.max_number());
        let is_asked = numbers.len() == num_numbers
            && numbers.iter().all(|number| (1..=u64::from(most)).contains(number))
            && (u64::from(MIN_TARGET)..=u64::from(MAX_TARGET)).contains(&target);
        if !is_asked {
            let kind = format!("{num_numbers} numbers from 1 to {most} and a target from {MIN_TARGET} to {MAX_TARGET}");
            return Err(refuse(Verdict::Incorrect, kind));
        }
        let mut numbers: Vec<u32> = numbers.into_iter().map(|number| number as u32).collect();
        numbers.sort_unstable_by(|left, right| right.cmp(left));
        Ok(Puzzle { numbers, target: target as u32, bound: self.bound() })
    }

    /// Returns the pattern of proposals in text.
    pub(super) fn pattern(self) -> String {
        let number = if self.is_large { "[1-9][0-9]?" } else { "(?:[1-9]|1[0-9]|2[0-5])" };
        format!("{number}(?: {number}){{{}}} -> [1-9][0-9]", self.num_numbers - 1)
    }

    pub(super) fn max_number(self) -> u32 {
        if self.is_large { SMALL_BOUND } else { MAX_SMALL_NUMBER }
    }

    fn bound(self) -> u32 {
        if self.is_large { LARGE_BOUND } else { SMALL_BOUND }
    }

    fn operators(self) -> impl Iterator<Item = TokenId> {
        (0..OPERATORS.len()).filter(move |index| self.operators & 1 << index != 0).map(|index| OPERATORS[index])
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operators: Vec<String> = self.operators().filter_map(base_name).collect();
        let (numbers, tens) = (self.num_numbers, 10 * u32::from(self.bucket));
        write!(formatter, "{numbers} numbers, target {tens} to {}, {}", tens + 9, operators.join(" "))
    }
}

/// Numbers in descending order, then a target; a number never ends the answer, so every prefix can be completed.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProposalGrammar {
    numbers_left: usize,
    largest: u32,
    is_done: bool,
}

impl Grammar for ProposalGrammar {
    fn next(&self) -> Next {
        if self.is_done {
            return Next::Done;
        }
        let legal = if self.numbers_left > 0 { 1..=self.largest } else { MIN_TARGET..=MAX_TARGET };
        Next::of(legal.map(|integer| integer as TokenId).collect())
    }

    fn push(&mut self, token: TokenId) -> bool {
        let legal = self.next().allows(token);
        if legal && self.numbers_left > 0 {
            self.numbers_left -= 1;
            self.largest = token;
        } else if legal {
            self.is_done = true;
        }
        legal
    }

    fn fork(&self) -> Box<dyn Grammar> {
        Box::new(*self)
    }
}

/// Replaces one number or the target, until the outcome has a solution and is allowed.
pub(super) fn mutate(parent: &Puzzle, rng: &mut CounterRng, is_allowed: impl Fn(&Puzzle) -> bool) -> Option<Puzzle> {
    let largest = if parent.bound > SMALL_BOUND { SMALL_BOUND } else { MAX_SMALL_NUMBER };
    (0..NUM_MUTATION_DRAWS).find_map(|_| {
        let mut mutant = parent.clone();
        let place = rng.below(mutant.numbers.len() as u64 + 1) as usize;
        match mutant.numbers.get_mut(place) {
            Some(number) => *number = 1 + rng.below(u64::from(largest)) as u32,
            None => mutant.target = MIN_TARGET + rng.below(u64::from(MAX_TARGET - MIN_TARGET + 1)) as u32,
        }
        mutant.numbers.sort_unstable_by(|left, right| right.cmp(left));
        (mutant != *parent && mutant.is_solvable() && is_allowed(&mutant)).then_some(mutant)
    })
}
