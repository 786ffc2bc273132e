//! Countdown: combine all the given numbers with + - * / into the target.
//!
//! A problem is `25 7 3 -> 78`: a multiset of numbers and a target. An answer is a list of steps `a op b = r`; each step
//! replaces two numbers by their result, every intermediate result is a positive integer up to a bound (99, or 9,999
//! where the problem ends in `max 9999`), and the last result is the target. As in Stream of Search (Gandhi et al. 2024)
//! and TinyZero, except that every number must be used exactly once.

mod propose;

use std::fmt::Write as _;

use proto::{
    ActionMask, Aim, CounterRng, Difficulty, Digest, KeyedProblem, LadderLevel, Niche, Problem, ProblemKey,
    ProblemSource, Purpose, Token, Verdict,
};

use crate::exam::{ExamSpec, exam_contains};
use crate::grammar::{Grammar, Next};
use crate::vocabulary::{
    ADD, COUNTDOWN, COUNTDOWN_LARGE, DIGIT_0, DIVIDE, EQUALS, MAX_INTEGER, MULTIPLY, NUM_DIGITS, ROLE_SOLVE, SUBTRACT,
    read_integer, spell, token_name,
};
use crate::{Domain, Error};

/// The countdown domain.
#[derive(Clone, Copy, Debug)]
pub struct Countdown {
    /// Whether the result of a step is filled in by the mask; otherwise the policy writes it.
    pub calculator: bool,
}

const OPERATORS: [Token; 4] = [ADD, SUBTRACT, MULTIPLY, DIVIDE];
const SMALL_BOUND: u32 = 99;
const LARGE_BOUND: u32 = MAX_INTEGER;
const MAX_NUMBERS: usize = 6;
const MAX_TEXT_BYTES: usize = 1_024;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Puzzle {
    /// Descending.
    numbers: Vec<u32>,
    target: u32,
    /// Largest intermediate result.
    bound: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    first: u32,
    operator: Token,
    second: u32,
    result: u32,
}

/// A family of puzzles: how many numbers, how large, which targets, which bound.
struct Family {
    num_numbers: usize,
    max_number: u32,
    min_target: u32,
    max_target: u32,
    bound: u32,
}

const fn small_family(num_numbers: usize) -> Family {
    Family { num_numbers, max_number: 25, min_target: 10, max_target: 99, bound: SMALL_BOUND }
}

const LARGE_FAMILY: Family =
    Family { num_numbers: 4, max_number: 99, min_target: 10, max_target: 100, bound: LARGE_BOUND };

/// By ladder level, from 1.
const FAMILIES: [Family; 5] = [small_family(2), small_family(3), small_family(4), LARGE_FAMILY, small_family(5)];

const LADDER_LEVELS: [LadderLevel; 5] = [
    LadderLevel { level: 1, description: "2 numbers from 1 to 25, target 10 to 99" },
    LadderLevel { level: 2, description: "3 numbers from 1 to 25, target 10 to 99" },
    LadderLevel { level: 3, description: "4 numbers from 1 to 25, target 10 to 99" },
    LadderLevel { level: 4, description: "4 numbers from 1 to 99, target 10 to 100, intermediate results up to 9,999" },
    LadderLevel { level: 5, description: "5 numbers from 1 to 25, target 10 to 99" },
];

const EXAM_SPECS: [ExamSpec; 3] = [
    ExamSpec { name: "countdown-3", domain: "countdown", level: 2 },
    ExamSpec { name: "countdown-4", domain: "countdown", level: 3 },
    ExamSpec { name: "countdown-sos", domain: "countdown", level: 4 },
];

impl ProblemSource for Countdown {
    fn name(&self) -> &'static str {
        if self.calculator { "countdown" } else { "countdown-no-calculator" }
    }

    fn ladder_levels(&self) -> &'static [LadderLevel] {
        &LADDER_LEVELS
    }

    fn level_of(&self, niche: Niche) -> u32 {
        let kind = propose::Kind::of(niche);
        level(|family| kind.is_of(family.num_numbers, family.bound))
    }

    fn ladder(&self, level: u32, seed: u64, index: u64) -> KeyedProblem {
        let mut rng = CounterRng::new(seed, Purpose::Ladder, u64::from(level), index, 0);
        let family = family(level);
        loop {
            let puzzle = family.draw(&mut rng);
            let problem = self.problem(&puzzle);
            if puzzle.is_solvable() && !self.is_exam(&problem) {
                return KeyedProblem { problem, key: None };
            }
        }
    }

    fn mutate(&self, parent: &KeyedProblem, rng: &mut CounterRng) -> Option<KeyedProblem> {
        let puzzle = self.puzzle(&parent.problem).ok()?;
        let mutant = propose::mutate(&puzzle, rng, |mutant| !self.is_exam(&self.problem(mutant)))?;
        Some(KeyedProblem { problem: self.problem(&mutant), key: None })
    }

    fn propose_prompt(&self, niche: Niche, difficulty: Difficulty) -> Vec<Token> {
        propose::Kind::of(niche).prompt(difficulty)
    }

    fn max_proposal_tokens(&self, niche: Niche) -> u32 {
        propose::Kind::of(niche).num_numbers as u32 + 1
    }

    fn describe_niche(&self, niche: Niche) -> String {
        propose::Kind::of(niche).to_string()
    }

    fn canonical_hash(&self, problem: &Problem) -> Digest {
        Digest::of_bytes(problem.text.as_bytes())
    }

    fn is_exam(&self, problem: &Problem) -> bool {
        exam_contains("countdown", &self.canonical_hash(problem))
    }
}

impl Domain for Countdown {
    fn description(&self) -> &'static str {
        if self.calculator {
            "combine all the given numbers into the target; the results of steps are filled in"
        } else {
            "combine all the given numbers into the target; the policy does the arithmetic as well"
        }
    }

    fn prompt(&self, problem: &Problem) -> Result<Vec<Token>, Error> {
        let puzzle = self.puzzle(problem)?;
        let mut tokens = vec![ROLE_SOLVE, if puzzle.bound > SMALL_BOUND { COUNTDOWN_LARGE } else { COUNTDOWN }];
        tokens.extend(spell(puzzle.target));
        puzzle.numbers.iter().for_each(|number| tokens.extend(spell(*number)));
        Ok(tokens)
    }

    fn grammar(&self, problem: &Problem) -> Result<Box<dyn Grammar>, Error> {
        let puzzle = self.puzzle(problem)?;
        Ok(Box::new(StepsGrammar {
            calculator: self.calculator,
            bound: puzzle.bound,
            available: puzzle.numbers,
            slot: Slot::First,
            step: Step { first: 0, operator: ADD, second: 0, result: 0 },
            spelled: Vec::new(),
        }))
    }

    fn max_answer_tokens(&self, problem: &Problem) -> Result<u32, Error> {
        let puzzle = self.puzzle(problem)?;
        let integer_tokens = if puzzle.bound > SMALL_BOUND { NUM_DIGITS } else { 1 };
        Ok((puzzle.numbers.len() as u32 - 1) * (3 * integer_tokens + 2))
    }

    fn judge_keyed(&self, problem: &Problem, _key: Option<&ProblemKey>, answer: &[Token]) -> Result<Verdict, Error> {
        let puzzle = self.puzzle(problem)?;
        Ok(read_steps(answer).map_or(Verdict::Malformed, |steps| puzzle.judge(&steps)))
    }

    fn judge_text(&self, problem: &Problem, answer: &str) -> Result<Verdict, Error> {
        let puzzle = self.puzzle(problem)?;
        Ok(parse_steps(answer).map_or(Verdict::Malformed, |steps| puzzle.judge(&steps)))
    }

    fn hindsight(&self, problem: &Problem, answer: &[Token]) -> Result<Option<Problem>, Error> {
        let puzzle = self.puzzle(problem)?;
        let reached = read_steps(answer).and_then(|steps| puzzle.value_reached(&steps));
        Ok(reached
            .filter(|value| targets(puzzle.bound).contains(value))
            .map(|target| self.problem(&Puzzle { target, ..puzzle })))
    }

    fn aim(&self, problem: &Problem, _answer: &[Token]) -> Result<Aim, Error> {
        let puzzle = self.puzzle(problem)?;
        let num_numbers = puzzle.numbers.len();
        let level = level(|family| (family.num_numbers, family.bound) == (num_numbers, puzzle.bound));
        Ok(Aim { level, goal: puzzle.target.into() })
    }

    fn niche(&self, problem: &Problem, _key: Option<&ProblemKey>) -> Result<Niche, Error> {
        Ok(propose::Kind::of_puzzle(&self.puzzle(problem)?).niche())
    }

    fn proposal_grammar(&self, niche: Niche) -> Box<dyn Grammar> {
        Box::new(propose::Kind::of(niche).grammar())
    }

    /// Admits what has a solution; exhaustive search tells.
    fn admit(&self, niche: Niche, proposal: &[Token]) -> Option<KeyedProblem> {
        let puzzle = propose::Kind::of(niche).read(proposal)?;
        let problem = self.problem(&puzzle);
        (puzzle.is_solvable() && !self.is_exam(&problem)).then_some(KeyedProblem { problem, key: None })
    }

    fn render_answer(&self, answer: &[Token]) -> String {
        match read_steps(answer) {
            Some(steps) => steps
                .iter()
                .map(|step| format!("{} {} {} = {}", step.first, token_name(step.operator), step.second, step.result))
                .collect::<Vec<_>>()
                .join("; "),
            None => answer.iter().map(|token| token_name(*token)).collect::<Vec<_>>().join(" "),
        }
    }

    fn problem_from_json(&self, json: &serde_json::Value) -> Result<Problem, Error> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Form {
            #[serde(rename = "domain")]
            _domain: String,
            numbers: Vec<u32>,
            target: u32,
            max_intermediate: Option<u32>,
        }
        let form: Form = serde_json::from_value(json.clone()).map_err(|error| {
            self.refuse(
                r#"{"domain":"countdown","numbers":[3,7,25],"target":78}, optionally with "max_intermediate":9999"#,
                error.to_string(),
            )
        })?;
        self.checked(form.numbers, form.target, form.max_intermediate.unwrap_or(SMALL_BOUND))
    }

    fn problem_from_text(&self, text: &str) -> Result<Problem, Error> {
        let expected = "numbers, an arrow and a target, such as \"3 7 25 -> 78\" or \"50 75 2 9 -> 98 max 9999\"";
        let refuse = || self.refuse(expected, format!("{text:?}"));
        let (numbers, rest) = text.split_once("->").ok_or_else(refuse)?;
        let (target, bound) = match rest.split_once("max") {
            Some((target, bound)) => (target, bound.trim().parse().map_err(|_| refuse())?),
            None => (rest, SMALL_BOUND),
        };
        let numbers: Result<Vec<u32>, _> = numbers.split_whitespace().map(str::parse).collect();
        self.checked(numbers.map_err(|_| refuse())?, target.trim().parse().map_err(|_| refuse())?, bound)
    }

    fn problem_to_json(&self, problem: &Problem) -> Result<serde_json::Value, Error> {
        let puzzle = self.puzzle(problem)?;
        let mut json = serde_json::json!({"domain": self.name(), "numbers": puzzle.numbers, "target": puzzle.target});
        if puzzle.bound > SMALL_BOUND {
            json["max_intermediate"] = puzzle.bound.into();
        }
        Ok(json)
    }

    fn exam_specs(&self) -> &'static [ExamSpec] {
        if self.calculator { &EXAM_SPECS } else { &[] }
    }

    fn exam_candidate(&self, exam: &ExamSpec, index: u64) -> Option<Problem> {
        let mut rng = CounterRng::new(0, Purpose::Exam, u64::from(exam.level), index, 0);
        let puzzle = family(exam.level).draw(&mut rng);
        puzzle.is_solvable().then(|| self.problem(&puzzle))
    }
}

impl Countdown {
    fn refuse(&self, expected: &str, got: String) -> Error {
        Error::Problem { domain: self.name(), expected: expected.to_owned(), got }
    }

    fn checked(&self, mut numbers: Vec<u32>, target: u32, bound: u32) -> Result<Problem, Error> {
        if bound != SMALL_BOUND && bound != LARGE_BOUND {
            return Err(self.refuse("a largest intermediate result of 99 or 9999", bound.to_string()));
        }
        if !(2..=MAX_NUMBERS).contains(&numbers.len()) {
            return Err(self.refuse("2 to 6 numbers", format!("{} numbers", numbers.len())));
        }
        if let Some(number) = numbers.iter().find(|number| !(1..=SMALL_BOUND).contains(*number)) {
            return Err(self.refuse("numbers from 1 to 99", number.to_string()));
        }
        if !(1..=bound).contains(&target) {
            return Err(self.refuse(&format!("a target from 1 to {bound}"), target.to_string()));
        }
        numbers.sort_unstable_by(|left, right| right.cmp(left));
        Ok(self.problem(&Puzzle { numbers, target, bound }))
    }

    fn problem(&self, puzzle: &Puzzle) -> Problem {
        let mut text = String::with_capacity(24);
        for number in &puzzle.numbers {
            let _ = write!(text, "{number} ");
        }
        let _ = write!(text, "-> {}", puzzle.target);
        if puzzle.bound > SMALL_BOUND {
            let _ = write!(text, " max {}", puzzle.bound);
        }
        Problem { domain: self.name().to_owned(), text }
    }

    /// Reads a problem's canonical text.
    fn puzzle(&self, problem: &Problem) -> Result<Puzzle, Error> {
        let refuse = || self.refuse("a canonical text such as \"25 7 3 -> 78\"", format!("{:?}", problem.text));
        if problem.text.len() > MAX_TEXT_BYTES || problem.domain != self.name() {
            return Err(refuse());
        }
        let (mut numbers, mut target, mut bound) = (Vec::with_capacity(MAX_NUMBERS), None, SMALL_BOUND);
        let mut words = problem.text.split(' ');
        for word in words.by_ref() {
            if word == "->" {
                break;
            }
            numbers.push(word.parse().map_err(|_| refuse())?);
        }
        if let Some(word) = words.next() {
            target = word.parse().ok();
        }
        if words.next().is_some() {
            bound = words.next().and_then(|word| word.parse().ok()).ok_or_else(refuse)?;
        }
        let puzzle = Puzzle { numbers, target: target.ok_or_else(refuse)?, bound };
        let in_range = (2..=MAX_NUMBERS).contains(&puzzle.numbers.len())
            && puzzle.numbers.iter().all(|number| (1..=SMALL_BOUND).contains(number))
            && (bound == SMALL_BOUND || bound == LARGE_BOUND)
            && (1..=bound).contains(&puzzle.target);
        if !in_range
            || self.problem(&puzzle).text != problem.text
            || !puzzle.numbers.is_sorted_by(|left, right| left >= right)
        {
            return Err(refuse());
        }
        Ok(puzzle)
    }
}

impl Family {
    fn draw(&self, rng: &mut CounterRng) -> Puzzle {
        let mut numbers: Vec<u32> =
            (0..self.num_numbers).map(|_| 1 + rng.below(u64::from(self.max_number)) as u32).collect();
        numbers.sort_unstable_by(|left, right| right.cmp(left));
        let target = self.min_target + rng.below(u64::from(self.max_target - self.min_target + 1)) as u32;
        Puzzle { numbers, target, bound: self.bound }
    }
}

impl Puzzle {
    fn judge(&self, steps: &[Step]) -> Verdict {
        if self.value_reached(steps) == Some(self.target) { Verdict::Correct } else { Verdict::Incorrect }
    }

    /// Follows the steps; gives the last result if every step is right and every number is used exactly once.
    fn value_reached(&self, steps: &[Step]) -> Option<u32> {
        let mut available = self.numbers.clone();
        for step in steps {
            let larger = step.first.max(step.second);
            let smaller = step.first.min(step.second);
            let swapped = step.first < step.second;
            if swapped && (step.operator == SUBTRACT || step.operator == DIVIDE) {
                return None;
            }
            if !take(&mut available, step.first) || !take(&mut available, step.second) {
                return None;
            }
            if apply(larger, step.operator, smaller, self.bound) != Some(step.result) {
                return None;
            }
            available.push(step.result);
        }
        match available[..] {
            [last] if !steps.is_empty() => Some(last),
            _ => None,
        }
    }

    fn is_solvable(&self) -> bool {
        self.first_solution().is_some()
    }

    /// Gives the operators of the first solution in the order of search, as bits in the order of [`OPERATORS`].
    fn first_solution(&self) -> Option<u8> {
        let mut found = None;
        reaches(&self.numbers, self.bound, 0, &mut |value, operators| {
            found = (value == self.target).then_some(operators);
            found.is_some()
        });
        found
    }
}

/// Applies an operator to `first >= second`; `None` unless the result is an integer from 1 to `bound`.
fn apply(first: u32, operator: Token, second: u32, bound: u32) -> Option<u32> {
    let result = match operator {
        ADD => first + second,
        SUBTRACT => first - second,
        MULTIPLY => first * second,
        DIVIDE if first.is_multiple_of(second) => first / second,
        _ => return None,
    };
    (1..=bound).contains(&result).then_some(result)
}

/// Visits every value that all the numbers can make, with the operators that make it (those in `used` among them) and
/// with repeats, until `stop` says so; tells whether it did.
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

fn take(available: &mut Vec<u32>, number: u32) -> bool {
    let found = available.iter().position(|candidate| *candidate == number);
    found.map(|index| available.remove(index)).is_some()
}

/// Gives the level of a family; 0 where there is none.
fn level(is_its: impl Fn(&Family) -> bool) -> u32 {
    FAMILIES.iter().position(is_its).map_or(0, |index| index as u32 + 1)
}

fn family(level: u32) -> &'static Family {
    let index = (level as usize).wrapping_sub(1);
    FAMILIES.get(index).unwrap_or_else(|| panic!("ladder level: expected 1 to {}, got {level}", FAMILIES.len()))
}

fn targets(bound: u32) -> std::ops::RangeInclusive<u32> {
    if bound == SMALL_BOUND { 10..=99 } else { 10..=100 }
}

/// Reads steps from tokens; `None` unless the tokens are steps and nothing else.
fn read_steps(mut tokens: &[Token]) -> Option<Vec<Step>> {
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

/// Reads steps from text such as `25 * 3 = 75; 75 + 3 = 78`; steps end in `;`, `,` or a line break.
fn parse_steps(text: &str) -> Option<Vec<Step>> {
    if text.len() > MAX_TEXT_BYTES {
        return None;
    }
    text.split([';', ',', '\n'])
        .filter(|step| !step.trim().is_empty())
        .map(parse_step)
        .collect::<Option<Vec<_>>>()
        .filter(|steps| !steps.is_empty())
}

fn parse_step(text: &str) -> Option<Step> {
    let (left, result) = text.split_once('=')?;
    let at = left.find(['+', '-', '*', '/'])?;
    let operator = OPERATORS[['+', '-', '*', '/'].iter().position(|sign| left[at..].starts_with(*sign))?];
    let integer = |text: &str| {
        let digits = text.trim();
        let plain = digits.bytes().all(|byte| byte.is_ascii_digit()) && !digits.starts_with('0') && digits.len() <= 4;
        plain.then(|| digits.parse::<u32>().ok()).flatten()
    };
    Some(Step { first: integer(&left[..at])?, operator, second: integer(&left[at + 1..])?, result: integer(result)? })
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

/// Steps with the larger number first, so that every pair has one spelling; a step can always be completed, because two
/// positive integers have a positive difference or are equal and have the quotient 1.
#[derive(Clone)]
struct StepsGrammar {
    calculator: bool,
    bound: u32,
    /// Descending.
    available: Vec<u32>,
    slot: Slot,
    step: Step,
    /// Tokens of the integer that is being written.
    spelled: Vec<Token>,
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const DOMAIN: Countdown = Countdown { calculator: true };

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

    #[test]
    fn judges_by_hand() {
        let problem = DOMAIN.problem_from_text("3 7 25 -> 78").unwrap();
        assert_eq!(problem.text, "25 7 3 -> 78");
        for (answer, verdict) in [
            ("25 * 3 = 75; 75 + 7 = 82", Verdict::Incorrect),
            ("25 + 7 = 32; 32 + 3 = 35", Verdict::Incorrect),
            ("25 - 7 = 18", Verdict::Incorrect),
            ("25 * 3 = 78", Verdict::Incorrect),
            ("25 * 3 = 75; 75 + 3 = 78", Verdict::Incorrect),
            ("", Verdict::Malformed),
            (" ; ", Verdict::Malformed),
            ("78", Verdict::Malformed),
            ("25 * 3 = 075; 75 + 7 = 82", Verdict::Malformed),
            ("25 ** 3 = 75", Verdict::Malformed),
            ("25 * -3 = 75", Verdict::Malformed),
            ("２５ * 3 = 75", Verdict::Malformed),
            ("0 + 0 = 0", Verdict::Malformed),
        ] {
            assert_eq!(DOMAIN.judge_text(&problem, answer).unwrap(), verdict, "{answer:?}");
        }
        let problem = DOMAIN.problem_from_text("3 7 25 -> 82").unwrap();
        for answer in ["25 * 3 = 75; 75 + 7 = 82", "3*25=75,7+75=82", "3 * 25 = 75\n75 + 7 = 82\n"] {
            assert_eq!(DOMAIN.judge_text(&problem, answer).unwrap(), Verdict::Correct, "{answer:?}");
        }
        let backwards = DOMAIN.problem_from_text("3 7 -> 4").unwrap();
        assert_eq!(DOMAIN.judge_text(&backwards, "7 - 3 = 4").unwrap(), Verdict::Correct);
        assert_eq!(DOMAIN.judge_text(&backwards, "3 - 7 = 4").unwrap(), Verdict::Incorrect);
    }

    #[test]
    fn intermediate_results_stay_in_bounds() {
        let small = DOMAIN.problem_from_text("50 40 90 -> 1").unwrap();
        let large = DOMAIN.problem_from_text("50 40 90 -> 1 max 9999").unwrap();
        let answer = "50 + 40 = 90; 90 / 90 = 1";
        assert_eq!(DOMAIN.judge_text(&small, answer).unwrap(), Verdict::Correct);
        let problem = DOMAIN.problem_from_text("99 99 99 -> 99").unwrap();
        let over = "99 * 99 = 9801; 9801 / 99 = 99";
        assert_eq!(DOMAIN.judge_text(&problem, over).unwrap(), Verdict::Incorrect);
        let problem = DOMAIN.problem_from_text("99 99 99 -> 99 max 9999").unwrap();
        assert_eq!(DOMAIN.judge_text(&problem, over).unwrap(), Verdict::Correct);
        assert_ne!(DOMAIN.canonical_hash(&small), DOMAIN.canonical_hash(&large));
    }

    #[test]
    fn refuses_what_is_not_a_problem() {
        for text in [
            "",
            "3 7 25",
            "3 7 25 -> x",
            "3 -> 3",
            "0 4 -> 4",
            "3 100 -> 4",
            "1 2 -> 0",
            "1 2 -> 100",
            "1 2 3 4 5 6 7 -> 9",
            "1 2 -> 3 max 50",
            "-> 4",
            "1 2 -> 99999999999",
        ] {
            assert!(DOMAIN.problem_from_text(text).is_err(), "{text:?}");
        }
        for text in ["3 7 25 -> 78", "25 7 3 -> 078", "25 7 3 ->  78", "25 7 3 -> 78 max 99", "25 7 3 -> 78 "] {
            let problem = Problem { domain: "countdown".to_owned(), text: text.to_owned() };
            assert!(DOMAIN.prompt(&problem).is_err(), "{text:?} is not canonical");
        }
    }

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
        assert_eq!(DOMAIN.render_answer(&answer), "99 * 98 = 9702");
        assert_eq!(DOMAIN.judge(&problem, &answer).unwrap(), Verdict::Correct);
    }
}
