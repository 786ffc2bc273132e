//! Countdown: combine all the given numbers with + - * / into the target.
//!
//! A problem is `25 7 3 -> 78`: a multiset of numbers and a target. An answer is a list of steps `a op b = r`; each step
//! replaces two numbers by their result, every intermediate result is a positive integer up to a bound (99, or 9,999
//! if the problem ends in `max 9999`), and the last result is the target. As in Stream of Search (Gandhi et al. 2024)
//! and TinyZero, except that every number must be used exactly once.
//!
//! The bound limits what a policy writes. A problem from elsewhere that names no bound ends in `no max`: answers in text are
//! then judged without one, and the policy gets the problem with the smallest bound that it fits.

mod answer;
mod propose;
mod puzzle;
mod stated;
mod symbols;
mod words;

use proto::{BalanceKey, CounterRng, Digest, KeyedProblem, LadderLevel, Niche, Problem, ProblemKey, Purpose, Verdict};

use self::puzzle::{LARGE_BOUND, MAX_NUMBERS, Puzzle, SMALL_BOUND};
use self::stated::{NO_MAX, Stated};
use crate::exam::{ExamSpec, exam_contains};
use crate::json::Refusal;
use crate::symbols::Symbols;
use crate::{Admission, Checker, Domain, Error, Exams, Forms, Judged, Ladder, Wording};

/// The countdown domain.
#[derive(Clone, Copy, Debug)]
pub struct Countdown {
    /// Whether the result of a step is filled in by the mask; otherwise the policy writes it.
    pub calculator: bool,
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

/// The domain whose exams both variants take.
const EXAMS_OF: &str = "countdown";

const EXAM_SPECS: [ExamSpec; 3] = [
    ExamSpec { name: "countdown-3", domain: "countdown", level: 2 },
    ExamSpec { name: "countdown-4", domain: "countdown", level: 3 },
    ExamSpec { name: "countdown-sos", domain: "countdown", level: 4 },
];

impl Domain for Countdown {
    fn symbols(&self) -> Option<&dyn Symbols> {
        Some(self)
    }

    /// The same for both variants: a model that reads text does the arithmetic itself in either.
    fn wording(&self) -> Option<&dyn Wording> {
        Some(self)
    }

    fn exams(&self) -> Option<&dyn Exams> {
        Some(self)
    }
}

impl Ladder for Countdown {
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

    fn solution(&self, problem: &Problem) -> Option<String> {
        self.puzzle(problem).ok()?.expression()
    }

    fn mutate(&self, parent: &KeyedProblem, rng: &mut CounterRng) -> Option<KeyedProblem> {
        let puzzle = self.puzzle(&parent.problem).ok()?;
        let mutant = propose::mutate(&puzzle, rng, |mutant| !self.is_exam(&self.problem(mutant)))?;
        Some(KeyedProblem { problem: self.problem(&mutant), key: None })
    }

    fn describe_niche(&self, niche: Niche) -> String {
        propose::Kind::of(niche).to_string()
    }

    fn canonical_hash(&self, problem: &Problem) -> Digest {
        Digest::of_bytes(problem.text.as_bytes())
    }

    fn is_exam(&self, problem: &Problem) -> bool {
        let contains = |text: &str| exam_contains(EXAMS_OF, &Digest::of_bytes(text.as_bytes()));
        match problem.text.strip_suffix(NO_MAX) {
            // Dropping the bound does not make it another problem.
            Some(bare) => contains(bare) || contains(&format!("{bare} max {LARGE_BOUND}")),
            None => contains(&problem.text),
        }
    }
}

impl Checker for Countdown {
    fn judge(&self, problem: &Problem, _key: Option<&ProblemKey>, answer: &str) -> Result<Judged, Error> {
        Ok(answer::judge(&self.stated(problem)?, answer))
    }

    fn verdicts(&self, problem: &Problem, _key: Option<&ProblemKey>, answers: &[&str]) -> Result<Vec<Verdict>, Error> {
        let stated = self.stated(problem)?;
        Ok(answers.iter().map(|answer| answer::verdict(&stated, answer)).collect())
    }

    /// Always true: the problem shows all that its checker knows.
    fn may_be_searched(&self, _problem: &Problem) -> bool {
        true
    }

    fn hindsight(&self, problem: &Problem, answer: &str) -> Result<Option<Problem>, Error> {
        let puzzle = self.puzzle(problem)?;
        let bounded = Stated { bound: Some(puzzle.bound.into()), ..self.stated(problem)? };
        let reached = answer::value_reached(&bounded, answer).and_then(|value| u32::try_from(value).ok());
        Ok(reached
            .filter(|value| targets(puzzle.bound).contains(value))
            .map(|target| self.problem(&Puzzle { target, ..puzzle })))
    }

    fn niche(&self, problem: &Problem, _key: Option<&ProblemKey>) -> Result<Niche, Error> {
        Ok(propose::Kind::of_puzzle(&self.puzzle(problem)?).niche())
    }

    /// Admits problems that exhaustive search can solve.
    fn admit(&self, niche: Niche, proposal: &str) -> Result<Admission, Error> {
        let admitted = propose::Kind::of(niche).read(proposal).and_then(|puzzle| {
            let problem = self.problem(&puzzle);
            if self.is_exam(&problem) {
                Err(Judged::because(Verdict::Incorrect, "is in an exam"))
            } else if !puzzle.is_solvable() {
                Err(Judged::because(Verdict::Incorrect, "has no solution"))
            } else {
                Ok(KeyedProblem { problem, key: None })
            }
        });
        Ok(admitted)
    }

    fn balance_key(&self, problem: &Problem, _answer: Option<&str>) -> Result<BalanceKey, Error> {
        let puzzle = self.puzzle(problem)?;
        let num_numbers = puzzle.numbers.len();
        let level = level(|family| (family.num_numbers, family.bound) == (num_numbers, puzzle.bound));
        Ok(BalanceKey { level, goal: puzzle.target.into() })
    }
}

impl Forms for Countdown {
    fn description(&self) -> &'static str {
        if self.calculator {
            "combine all the given numbers into the target; the results of steps are filled in"
        } else {
            "combine all the given numbers into the target; the policy does the arithmetic as well"
        }
    }

    fn is_unnamed_form(&self, fields: &serde_json::Map<String, serde_json::Value>) -> bool {
        let has = |key| fields.contains_key(key);
        self.calculator && ["target", "numbers", "nums"].into_iter().any(has)
    }

    fn problem_from_json(&self, json: &serde_json::Value) -> Result<Problem, Error> {
        self.problem_of(Stated::from_json(json))
    }

    fn problem_from_text(&self, text: &str) -> Result<Problem, Error> {
        self.problem_of(Stated::typed(text))
    }

    fn problem_to_json(&self, problem: &Problem) -> Result<serde_json::Value, Error> {
        let stated = self.stated(problem)?;
        let mut json = serde_json::json!({"domain": self.name(), "numbers": stated.numbers, "target": stated.target});
        if let Some(bound) = stated.bound {
            json["max_intermediate"] = bound.into();
        }
        Ok(json)
    }
}

impl Exams for Countdown {
    fn of(&self) -> &'static str {
        EXAMS_OF
    }

    fn specs(&self) -> &'static [ExamSpec] {
        if self.calculator { &EXAM_SPECS } else { &[] }
    }

    fn candidate(&self, exam: &ExamSpec, index: u64) -> Option<Problem> {
        let mut rng = CounterRng::new(0, Purpose::Exam, u64::from(exam.level), index, 0);
        let puzzle = family(exam.level).draw(&mut rng);
        puzzle.is_solvable().then(|| self.problem(&puzzle))
    }
}

impl Countdown {
    /// Reads the canonical text of a problem, and writes it without a bound; `None` when it is none.
    pub(crate) fn without_bound(text: &str) -> Option<String> {
        Stated::read(text).map(|stated| Stated { bound: None, ..stated }.text())
    }

    /// Reads a problem without a bound from its numbers and its target in JSON; returns its canonical text.
    pub(crate) fn unbounded_from_json(json: &serde_json::Value) -> Result<String, Refusal> {
        Stated::from_json(json).map(|stated| Stated { bound: None, ..stated }.text())
    }

    fn refuse(&self, (expected, got): Refusal) -> Error {
        Error::Problem { domain: self.name(), expected, got }
    }

    fn problem_of(&self, stated: Result<Stated, Refusal>) -> Result<Problem, Error> {
        let text = stated.map_err(|refusal| self.refuse(refusal))?.text();
        Ok(Problem { domain: self.name().to_owned(), text })
    }

    fn problem(&self, puzzle: &Puzzle) -> Problem {
        let text = stated::text(&puzzle.numbers, puzzle.target, Some(puzzle.bound.into()));
        Problem { domain: self.name().to_owned(), text }
    }

    /// Reads a problem's canonical text.
    fn stated(&self, problem: &Problem) -> Result<Stated, Error> {
        let stated = Stated::read(&problem.text).filter(|_| problem.domain == self.name());
        let refusal = || ("a canonical text such as \"25 7 3 -> 78\"".to_owned(), crate::quote(&problem.text));
        stated.ok_or_else(|| self.refuse(refusal()))
    }

    /// Reads a problem's canonical text in the form for a policy.
    fn puzzle(&self, problem: &Problem) -> Result<Puzzle, Error> {
        let refusal = || {
            let expected = format!(
                "what a policy can be asked, 2 to {MAX_NUMBERS} numbers from 1 to {LARGE_BOUND} and a \
                                    target up to {LARGE_BOUND}"
            );
            self.refuse((expected, crate::quote(&problem.text)))
        };
        self.stated(problem)?.puzzle().ok_or_else(refusal)
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

/// Returns the level of a family; 0 when there is none.
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

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: Countdown = Countdown { calculator: true };

    #[test]
    fn refuses_what_is_not_a_problem() {
        for text in [
            "",
            "3 7 25",
            "3 7 25 -> x",
            "3 -> 3",
            "0 4 -> 4",
            "1 2 -> 0",
            "1 2 -> 3 max 50",
            "1 100 -> 3 max 99",
            "1 2 -> 100 max 99",
            "1 2 -> 3 max",
            "1 2 -> 3 no",
            "1 2 -> 3 max 99 99",
            "1 2 -> 3 no max 99",
            "1 2 -> 3max 99",
            "-> 4",
            "1 2 -> 99999999999999999999",
            "+1 2 -> 3",
            "1 2 -> +3",
            "01 2 -> 3",
            "1 2 -> 03",
            "1, 2 -> 3",
            "1_0 2 -> 12",
            "1 2 -> 3 -> 3",
            "１ 2 -> 3",
            "1\u{a0}2 -> 3",
            "\u{feff}1 2 -> 3",
        ] {
            assert!(DOMAIN.problem_from_text(text).is_err(), "{text:?}");
        }
        for text in ["3 7 25 -> 78", "25 7 3 -> 078", "25 7 3 ->  78", "25 7 3 -> 78 max 99", "25 7 3 -> 78 "] {
            let problem = Problem { domain: "countdown".to_owned(), text: text.to_owned() };
            assert!(DOMAIN.prompt(&problem).is_err(), "{text:?} is not canonical");
            assert!(DOMAIN.judge(&problem, None, "25 * 3 + 7").is_err(), "{text:?} is not canonical");
        }
        let other = Problem { domain: "countdown-no-calculator".to_owned(), text: "25 7 3 -> 78".to_owned() };
        assert!(DOMAIN.judge(&other, None, "25 * 3 + 7").is_err(), "a problem of another domain");
    }
}
