//! Domains of text alone whose problems have one short answer each.
//!
//! A problem's niche is its level and its kind, and 0 if it is beyond the ladder, as a problem typed by a person may be. A verdict
//! gives the answer away, so no search may call these checkers.

use std::marker::PhantomData;

use proto::{BalanceKey, CounterRng, Digest, KeyedProblem, LadderLevel, Niche, Problem, ProblemKey, Purpose, Verdict};
use serde_json::{Map, Value};

use crate::exam::{ExamSpec, exam_contains};
use crate::json::{Fields, Refusal};
use crate::proposing::{drawn, expect_level};
use crate::{Admission, Checker, Domain, Error, Exams, Forms, Judged, Ladder, Proposing, Wording};

/// Most bytes of a problem as typed.
const MAX_PROBLEM_BYTES: usize = 128;
/// Most bytes of an answer.
const MAX_ANSWER_BYTES: usize = 1_024;
/// Most draws of a change to find one of the same level.
const NUM_MUTATION_DRAWS: usize = 32;
/// White space around an answer.
const SPACE: [char; 4] = [' ', '\t', '\r', '\n'];

/// A problem of a quiz.
pub(crate) trait QuizProblem: Sized + PartialEq + Send + Sync + 'static {
    /// Name of the domain.
    const NAME: &'static str;
    /// Describes the domain in one line.
    const DESCRIPTION: &'static str;
    /// Levels of the ladder, from 1.
    const LEVELS: &'static [LadderLevel];
    /// The exams. No two have the same level.
    const EXAMS: &'static [ExamSpec];
    /// Worked examples: problems with their answers.
    const EXAMPLES: [(&'static str, &'static str); 3];
    /// Describes a problem as a person types it.
    const FORM: &'static str;
    /// Names the fields of the JSON form.
    const FIELDS: &'static str;

    /// Reads a problem as a person would type it, its canonical text included. [`typed`] bounds the length.
    fn parse(text: &str) -> Option<Self>;

    /// Reads a problem from its fields in JSON.
    fn from_fields(fields: &mut Fields<'_>) -> Result<Self, Refusal>;

    /// Writes the fields of a problem in JSON.
    fn fields(&self) -> Map<String, Value>;

    /// Returns the canonical text.
    fn text(&self) -> String;

    /// Returns a text that is the same for all forms of the same problem.
    fn identity(&self) -> String {
        self.text()
    }

    /// Returns the level; 0 when there is none.
    fn level(&self) -> u32;

    /// Returns the kind of the problem within its level, by which proposals are asked for.
    fn kind(&self) -> u32;

    /// Describes what the problems of a kind have in common, after the description of their level; any number is a kind.
    fn describe_kind(kind: u32) -> String;

    /// Returns the pattern of the canonical texts of a level's problems. Some that match may be no problem of the level.
    fn proposal_pattern(level: u32) -> String;

    /// Draws a problem of a level. Draws that are of another level, or no problem, do not count.
    fn draw(level: u32, rng: &mut CounterRng) -> Option<Self>;

    /// Replaces a part of the problem; `None` when the outcome is no problem.
    fn changed(&self, rng: &mut CounterRng) -> Option<Self>;

    /// Lists the levels of an exam's problems.
    fn exam_levels(exam: &ExamSpec) -> &'static [u32];

    /// Returns the answer.
    fn answer(&self) -> String;

    /// Judges an answer without the white space around it.
    fn judge(&self, answer: &str) -> Judged;

    /// Lists other problems that an answer solves, the most similar first.
    fn solved_by(&self, answer: &str) -> Vec<Self>;

    /// Returns the value by which examples of a level are balanced.
    fn goal(&self) -> u64 {
        Digest::of_bytes(self.answer().as_bytes()).head()
    }

    /// Writes the question.
    fn question(&self) -> String;

    /// Returns the pattern of well-formed answers.
    fn answer_pattern(&self) -> String;
}

/// The domain of a kind of problems.
pub(crate) struct Quiz<P>(PhantomData<P>);

impl<P: QuizProblem> Quiz<P> {
    pub(crate) const fn new() -> Quiz<P> {
        Quiz(PhantomData)
    }

    fn refuse((expected, got): Refusal) -> Error {
        Error::Problem { domain: P::NAME, expected, got }
    }

    fn problem(puzzle: &P) -> Problem {
        Problem { domain: P::NAME.to_owned(), text: puzzle.text() }
    }

    fn keyed(puzzle: &P) -> KeyedProblem {
        KeyedProblem { problem: Self::problem(puzzle), key: None }
    }

    /// Reads a problem's canonical text.
    fn read(problem: &Problem) -> Result<P, Error> {
        let puzzle = typed::<P>(&problem.text).filter(|puzzle| puzzle.text() == problem.text);
        let refusal = || (format!("the canonical text of {}", P::FORM), crate::quote(&problem.text));
        puzzle.filter(|_| problem.domain == P::NAME).ok_or_else(|| Self::refuse(refusal()))
    }

    fn is_exam(puzzle: &P) -> bool {
        exam_contains(P::NAME, &hash(puzzle))
    }

    /// Packs the level in the low byte, and the kind above it.
    fn niche_of(puzzle: &P) -> Niche {
        match puzzle.level() {
            0 => Niche(0),
            level => Niche(u64::from(puzzle.kind()) << 8 | u64::from(level)),
        }
    }

    fn level_in(niche: Niche) -> Option<&'static LadderLevel> {
        P::LEVELS.iter().find(|known| u64::from(known.level) == niche.0 & 0xff)
    }

    fn judge(puzzle: &P, answer: &str) -> Judged {
        if answer.len() > MAX_ANSWER_BYTES {
            let reason = format!("expected an answer of up to {MAX_ANSWER_BYTES} bytes, got {}", answer.len());
            return Judged::because(Verdict::Malformed, reason);
        }
        puzzle.judge(answer.trim_matches(SPACE))
    }
}

/// Reads a problem as a person would type it.
pub(crate) fn typed<P: QuizProblem>(text: &str) -> Option<P> {
    if text.len() <= MAX_PROBLEM_BYTES { P::parse(text) } else { None }
}

/// Whether a text is a whole number in its one spelling: digits without a leading zero.
pub(crate) fn is_whole_number(text: &str) -> bool {
    let has_leading_zero = text.len() > 1 && text.starts_with('0');
    !text.is_empty() && !has_leading_zero && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn hash<P: QuizProblem>(puzzle: &P) -> Digest {
    Digest::of_bytes(puzzle.identity().as_bytes())
}

/// Returns the batch number of the draws of a level, which no other domain shares.
fn batch<P: QuizProblem>(level: u32) -> u64 {
    Digest::of_bytes(P::NAME.as_bytes()).head().wrapping_add(level.into())
}

impl<P: QuizProblem> Domain for Quiz<P> {
    fn wording(&self) -> Option<&dyn Wording> {
        Some(self)
    }

    fn exams(&self) -> Option<&dyn Exams> {
        Some(self)
    }
}

impl<P: QuizProblem> Ladder for Quiz<P> {
    fn name(&self) -> &'static str {
        P::NAME
    }

    fn ladder_levels(&self) -> &'static [LadderLevel] {
        P::LEVELS
    }

    fn level_of(&self, niche: Niche) -> u32 {
        Self::level_in(niche).map_or(0, |known| known.level)
    }

    fn ladder(&self, level: u32, seed: u64, index: u64) -> KeyedProblem {
        let num_levels = P::LEVELS.len() as u32;
        assert!((1..=num_levels).contains(&level), "ladder level: expected 1 to {num_levels}, got {level}");
        let mut rng = CounterRng::new(seed, Purpose::Ladder, batch::<P>(level), index, 0);
        loop {
            let drawn = P::draw(level, &mut rng);
            if let Some(puzzle) = drawn.filter(|puzzle| puzzle.level() == level && !Self::is_exam(puzzle)) {
                return Self::keyed(&puzzle);
            }
        }
    }

    fn solution(&self, problem: &Problem) -> Option<String> {
        Some(Self::read(problem).ok()?.answer())
    }

    fn mutate(&self, parent: &KeyedProblem, rng: &mut CounterRng) -> Option<KeyedProblem> {
        let parent = Self::read(&parent.problem).ok().filter(|parent| parent.level() > 0)?;
        let is_new = |other: &P| *other != parent && other.level() == parent.level() && !Self::is_exam(other);
        let mutant = (0..NUM_MUTATION_DRAWS).find_map(|_| parent.changed(rng).filter(is_new))?;
        Some(Self::keyed(&mutant))
    }

    fn describe_niche(&self, niche: Niche) -> String {
        match Self::level_in(niche) {
            Some(level) => format!("{}, {}", level.description, P::describe_kind((niche.0 >> 8) as u32)),
            None => "beyond the ladder".to_owned(),
        }
    }

    fn canonical_hash(&self, problem: &Problem) -> Digest {
        Self::read(problem).map_or_else(|_| Digest::of_bytes(problem.text.as_bytes()), |puzzle| hash(&puzzle))
    }

    fn is_exam(&self, problem: &Problem) -> bool {
        exam_contains(P::NAME, &self.canonical_hash(problem))
    }
}

impl<P: QuizProblem> Checker for Quiz<P> {
    fn judge(&self, problem: &Problem, _key: Option<&ProblemKey>, answer: &str) -> Result<Judged, Error> {
        Ok(Self::judge(&Self::read(problem)?, answer))
    }

    fn verdicts(&self, problem: &Problem, _key: Option<&ProblemKey>, answers: &[&str]) -> Result<Vec<Verdict>, Error> {
        let puzzle = Self::read(problem)?;
        Ok(answers.iter().map(|answer| Self::judge(&puzzle, answer).verdict).collect())
    }

    fn hindsight(&self, problem: &Problem, answer: &str) -> Result<Option<Problem>, Error> {
        let puzzle = Self::read(problem)?;
        Ok(match Self::judge(&puzzle, answer).verdict {
            Verdict::Correct => Some(problem.clone()),
            Verdict::Incorrect => {
                let mut solved = puzzle.solved_by(answer.trim_matches(SPACE)).into_iter();
                let is_alike = |other: &P| other.level() == puzzle.level() && !Self::is_exam(other);
                solved.find(is_alike).map(|other| Self::problem(&other))
            }
            _ => None,
        })
    }

    fn niche(&self, problem: &Problem, _key: Option<&ProblemKey>) -> Result<Niche, Error> {
        Self::read(problem).map(|puzzle| Self::niche_of(&puzzle))
    }

    /// Admits every problem of the level that was asked for.
    fn admit(&self, niche: Niche, proposal: &str) -> Result<Admission, Error> {
        let refuse = |verdict, reason: String| Ok(Err(Judged::because(verdict, reason)));
        let Some(puzzle) = typed::<P>(proposal) else {
            let got = crate::quote(proposal);
            return refuse(Verdict::Malformed, format!("expected {}, got {got}", P::FORM));
        };
        if puzzle.text() != proposal {
            let got = crate::quote(proposal);
            return refuse(Verdict::Malformed, format!("expected the canonical text {:?}, got {got}", puzzle.text()));
        }
        let level = Self::level_in(niche).filter(|level| level.level == puzzle.level());
        if level.is_none() {
            let reason =
                format!("is not of the level that was asked for: {}", self.describe_niche(Self::niche_of(&puzzle)));
            return refuse(Verdict::Incorrect, reason);
        }
        if Self::is_exam(&puzzle) {
            return refuse(Verdict::Incorrect, "is in an exam".to_owned());
        }
        Ok(Ok(Self::keyed(&puzzle)))
    }

    fn balance_key(&self, problem: &Problem, _answer: Option<&str>) -> Result<BalanceKey, Error> {
        let puzzle = Self::read(problem)?;
        Ok(BalanceKey { level: puzzle.level(), goal: puzzle.goal() })
    }
}

impl<P: QuizProblem> Forms for Quiz<P> {
    fn description(&self) -> &'static str {
        P::DESCRIPTION
    }

    fn problem_from_json(&self, json: &Value) -> Result<Problem, Error> {
        let read = || {
            let mut fields = Fields::of(json)?;
            fields.take("domain");
            let puzzle = P::from_fields(&mut fields)?;
            fields.end(P::FIELDS)?;
            Ok(Self::problem(&puzzle))
        };
        read().map_err(Self::refuse)
    }

    fn problem_from_text(&self, text: &str) -> Result<Problem, Error> {
        let refusal = || Self::refuse((P::FORM.to_owned(), crate::quote(text)));
        typed(text).map(|puzzle: P| Self::problem(&puzzle)).ok_or_else(refusal)
    }

    fn problem_to_json(&self, problem: &Problem) -> Result<Value, Error> {
        let mut fields = Self::read(problem)?.fields();
        fields.insert("domain".to_owned(), P::NAME.into());
        Ok(Value::Object(fields))
    }
}

impl<P: QuizProblem> Exams for Quiz<P> {
    fn of(&self) -> &'static str {
        P::NAME
    }

    fn specs(&self) -> &'static [ExamSpec] {
        P::EXAMS
    }

    fn candidate(&self, exam: &ExamSpec, index: u64) -> Option<Problem> {
        let mut rng = CounterRng::new(0, Purpose::Exam, batch::<P>(exam.level), index, 0);
        let levels = P::exam_levels(exam);
        let level = levels[rng.below(levels.len() as u64) as usize];
        let drawn = P::draw(level, &mut rng).filter(|puzzle| puzzle.level() == level);
        drawn.map(|puzzle| Self::problem(&puzzle))
    }
}

impl<P: QuizProblem> Wording for Quiz<P> {
    fn question(&self, problem: &Problem) -> Result<String, Error> {
        Ok(Self::read(problem)?.question())
    }

    fn examples(&self) -> Vec<(Problem, String)> {
        let problem = |text: &str| Problem { domain: P::NAME.to_owned(), text: text.to_owned() };
        P::EXAMPLES.into_iter().map(|(text, answer)| (problem(text), crate::reply_with(answer))).collect()
    }

    fn answer_pattern(&self, problem: &Problem) -> Result<Option<String>, Error> {
        Ok(Some(Self::read(problem)?.answer_pattern()))
    }

    fn proposing(&self) -> Option<&dyn Proposing> {
        Some(self)
    }
}

/// A proposal is the canonical text of a problem.
impl<P: QuizProblem> Proposing for Quiz<P> {
    fn request(&self, niche: Niche) -> Result<String, Error> {
        let (_, sample) = &drawn(self, niche, canonical)?[0];
        Ok(format!("Reply with a problem only, such as {sample}. Kind: {}.", self.describe_niche(niche)))
    }

    fn examples(&self, niche: Niche) -> Result<Vec<(Niche, String)>, Error> {
        Ok(drawn(self, niche, canonical)?.split_off(1))
    }

    fn pattern(&self, niche: Niche) -> Result<String, Error> {
        expect_level(self, niche).map(P::proposal_pattern)
    }
}

fn canonical(problem: &Problem) -> &str {
    &problem.text
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use proptest::strategy::{Strategy as _, ValueTree as _};
    use proptest::string::string_regex;
    use proptest::test_runner::TestRunner;
    use regex::Regex;

    use super::*;
    use crate::arithmetic::Expression;
    use crate::comparison::Comparison;
    use crate::strings::Exercise;

    fn for_each_quiz_problem<P: QuizProblem + Debug>(mut visit: impl FnMut(&Quiz<P>, &P, &Problem)) {
        let quiz = Quiz::<P>::new();
        for level in P::LEVELS {
            for index in 0..100 {
                let problem = quiz.ladder(level.level, 6, index).problem;
                visit(&quiz, &Quiz::<P>::read(&problem).unwrap(), &problem);
            }
        }
    }

    /// The right answer matches the pattern. Answers that match are never malformed, and the problem that hindsight finds for
    /// one is of the same level, in no exam, and solved by it. Counts those of wrong answers.
    fn patterns_and_hindsight<P: QuizProblem + Debug>() -> usize {
        let (mut runner, mut num_found) = (TestRunner::deterministic(), 0);
        for_each_quiz_problem(|quiz: &Quiz<P>, puzzle, problem| {
            let pattern = quiz.answer_pattern(problem).unwrap().unwrap();
            let whole = Regex::new(&format!("^(?:{pattern})$")).unwrap();
            let right = puzzle.answer();
            assert!(whole.is_match(&right), "{problem:?}: {pattern} does not match {right}");
            assert_eq!(Checker::judge(quiz, problem, None, &right).unwrap(), Judged::correct());
            assert_eq!(quiz.hindsight(problem, &format!(" {right}\n")).unwrap().as_ref(), Some(problem));
            let answers = string_regex(&pattern).unwrap();
            for _ in 0..20 {
                let answer = answers.new_tree(&mut runner).unwrap().current();
                let Judged { verdict, reason } = Checker::judge(quiz, problem, None, &answer).unwrap();
                assert_eq!(verdict == Verdict::Correct, answer == right, "{problem:?} {answer}");
                assert_eq!(verdict != Verdict::Correct, verdict == Verdict::Incorrect, "{problem:?} {answer}");
                // Of the right answer, a reason quotes nothing that the question does not show.
                let told = reason.unwrap_or_default();
                assert!(problem.text.contains(&right) || !told.contains(&right), "{problem:?} {answer}: {told}");
                let Some(solved) = quiz.hindsight(problem, &answer).unwrap() else { continue };
                assert_eq!(quiz.hindsight(problem, &answer).unwrap().as_ref(), Some(&solved));
                assert_eq!(Checker::judge(quiz, &solved, None, &answer).unwrap(), Judged::correct(), "{solved:?}");
                let level = |problem| Quiz::<P>::read(problem).unwrap().level();
                assert_eq!(level(&solved), level(problem), "{problem:?} {answer}: {solved:?}");
                assert_eq!(solved == *problem, verdict == Verdict::Correct);
                assert!(solved == *problem || !quiz.is_exam(&solved));
                num_found += usize::from(verdict == Verdict::Incorrect);
            }
        });
        num_found
    }

    #[test]
    fn answers_that_match_the_pattern_are_well_formed_and_solve_something() {
        assert!(patterns_and_hindsight::<Expression>() > 500);
        // Of numbers as long as the given ones, hardly any is the other number.
        assert!(patterns_and_hindsight::<Comparison>() > 50);
        assert!(patterns_and_hindsight::<Exercise>() > 500);
    }

    fn proposals_and_exams<P: QuizProblem + Debug>() {
        for_each_quiz_problem(|quiz: &Quiz<P>, puzzle, problem| {
            for niche in (0..P::LEVELS.len() as u64 + 2).map(Niche) {
                let admitted = quiz.admit(niche, &problem.text).unwrap().ok();
                let expected = (niche.0 == u64::from(puzzle.level())).then(|| problem.clone());
                assert_eq!(admitted.map(|keyed| keyed.problem), expected, "{problem:?} in {niche:?}");
            }
            let niche = quiz.niche(problem, None).unwrap();
            assert_eq!(quiz.level_of(niche), puzzle.level(), "{problem:?}");
            assert!(quiz.admit(niche, &problem.text).unwrap().is_ok(), "{problem:?}");
            assert!(!quiz.may_be_searched(problem));
        });
        for LadderLevel { level, .. } in P::LEVELS {
            let mut rng = CounterRng::new(8, Purpose::Ladder, u64::from(*level), 0, 0);
            let drawn: Vec<P> = (0..1_000).filter_map(|_| P::draw(*level, &mut rng)).collect();
            let num_held_out = drawn.iter().filter(|puzzle| Quiz::<P>::is_exam(puzzle)).count();
            assert!(3 * num_held_out < drawn.len(), "exams leave most of level {level} to train on: {num_held_out}");
        }
        for spec in P::EXAMS {
            let quiz = Quiz::<P>::new();
            let problems = crate::exam(spec.name).unwrap();
            for problem in problems.test.iter().chain(&problems.dev) {
                let niche = quiz.niche(problem, None).unwrap();
                assert!(P::exam_levels(spec).contains(&quiz.level_of(niche)), "{problem:?}");
                let refused = Judged::because(Verdict::Incorrect, "is in an exam");
                assert_eq!(quiz.admit(niche, &problem.text).unwrap(), Err(refused), "{problem:?}");
            }
        }
    }

    #[test]
    fn proposals_are_admitted_at_their_level_unless_an_exam_has_them() {
        proposals_and_exams::<Expression>();
        proposals_and_exams::<Comparison>();
        proposals_and_exams::<Exercise>();
    }
}
