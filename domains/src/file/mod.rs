//! Problems of a user's own file: what is asked, word for word, and the right answer with the check that compares others with it.
//!
//! The text of a problem is what is asked and the name of the check. The right answer is its key, so judging needs no file. A problem
//! of countdown has no key: its checker knows what is right.
//!
//! A problem is held out for the exam `file` by the hash of what is asked alone, so no copy of it is trained on.

mod check;
mod choice;
mod expression;
mod json_text;
mod number;
mod polynomial;
mod problems;
mod question;
mod record;
mod reference;
mod reply;

use std::sync::Arc;

use proto::{BalanceKey, CounterRng, Digest, KeyedProblem, LadderLevel, Niche, Problem, ProblemKey, Verdict};
use serde_json::{Map, Value};

use self::check::Check;
pub use self::problems::Problems;
use self::question::{Asked, NAME, Question, split};
use self::reference::{Reference, taken};
use self::reply::bare;
use crate::json::Refusal;
use crate::{Admission, Checker, Countdown, Domain, Error, Forms, Judged, Ladder, Turn, Wording};

/// The domain of problems of a user's own file.
#[derive(Clone, Debug, Default)]
pub struct File {
    /// `None` if only its checker is needed.
    problems: Option<Arc<Problems>>,
}

const LEVEL: u32 = 1;
const LEVELS: [LadderLevel; 1] = [LadderLevel { level: LEVEL, description: "the problems of the file" }];
const COUNTDOWN: Countdown = Countdown { calculator: true };

impl File {
    /// The name of the domain, and of its exam.
    pub const NAME: &'static str = NAME;
    /// The fields of a record that are read. Others are ignored.
    pub const FIELDS: [&'static str; 10] = record::FIELDS;

    /// Builds the domain with problems to draw.
    pub fn of(problems: Arc<Problems>) -> File {
        File { problems: Some(problems) }
    }

    fn refuse((expected, got): Refusal) -> Error {
        Error::Problem { domain: NAME, expected, got }
    }

    fn read(problem: &Problem) -> Result<Question, Error> {
        let question = Question::read(&problem.text).filter(|_| problem.domain == NAME);
        let expected = "a canonical text such as {\"check\":\"number\",\"prompt\":\"What is 6 * 7?\"}";
        question.ok_or_else(|| Self::refuse((expected.to_owned(), crate::quote(&problem.text))))
    }

    fn reference(asked: &Asked, key: Option<&ProblemKey>) -> Result<Reference, Error> {
        let refuse = |got: String| Self::refuse(("a right answer to compare with".to_owned(), got));
        let key = key.ok_or_else(|| refuse("none".to_owned()))?;
        Reference::read(asked.check, &key.text).map_err(refuse)
    }
}

/// Finds the answer to a problem of countdown in a reply, and writes its operators as that domain does.
///
/// # Errors
/// Why there is none.
fn countdown_answer(reply: &str) -> Result<String, String> {
    const OF_LATEX: [(&str, &str); 5] =
        [("\\times", "\u{d7}"), ("\\cdot", "\u{d7}"), ("\\div", "\u{f7}"), ("\\left", ""), ("\\right", "")];
    let answer = bare(taken(Check::Exact, reply)?).to_owned();
    Ok(OF_LATEX.into_iter().fold(answer, |answer, (command, sign)| answer.replace(command, sign)))
}

impl Question {
    /// Returns the problem of countdown, if it is one.
    fn countdown(&self) -> Option<Problem> {
        match self {
            Question::Asked(_) => None,
            Question::Countdown(text) => Some(Problem { domain: "countdown".to_owned(), text: text.clone() }),
        }
    }

    /// Returns the check, if its right answer is a key.
    fn check(&self) -> Option<Check> {
        match self {
            Question::Asked(Asked { check, .. }) => Some(*check),
            Question::Countdown(_) => None,
        }
    }
}

impl Domain for File {
    fn wording(&self) -> Option<&dyn Wording> {
        Some(self)
    }
}

impl Ladder for File {
    fn name(&self) -> &'static str {
        NAME
    }

    /// One level, if there is a file to draw problems from.
    fn ladder_levels(&self) -> &'static [LadderLevel] {
        if self.problems.is_some() { &LEVELS } else { &[] }
    }

    fn level_of(&self, niche: Niche) -> u32 {
        if niche == Niche(LEVEL.into()) { LEVEL } else { 0 }
    }

    fn ladder(&self, level: u32, seed: u64, index: u64) -> KeyedProblem {
        assert_eq!(level, LEVEL, "ladder level: expected {LEVEL}");
        let problems = self.problems.as_ref().expect("levels are those of a file");
        problems.draw(seed, index).clone()
    }

    fn mutate(&self, _parent: &KeyedProblem, _rng: &mut CounterRng) -> Option<KeyedProblem> {
        None
    }

    fn describe_niche(&self, niche: Niche) -> String {
        if self.level_of(niche) == LEVEL { LEVELS[0].description } else { "no problem of a file" }.to_owned()
    }

    fn canonical_hash(&self, problem: &Problem) -> Digest {
        Self::read(problem).map_or_else(|_| Digest::of_bytes(problem.text.as_bytes()), |question| question.hash())
    }

    fn is_exam(&self, problem: &Problem) -> bool {
        let Ok(question) = Self::read(problem) else { return false };
        // The committed exams of countdown hold out their own.
        split(&question.hash()).is_some() || question.countdown().is_some_and(|problem| COUNTDOWN.is_exam(&problem))
    }
}

impl Checker for File {
    fn judge(&self, problem: &Problem, key: Option<&ProblemKey>, reply: &str) -> Result<Judged, Error> {
        match Self::read(problem)? {
            Question::Asked(asked) => Ok(Self::reference(&asked, key)?.judge(reply)),
            question @ Question::Countdown(_) => match countdown_answer(reply) {
                Ok(answer) => COUNTDOWN.judge(&question.countdown().expect("it is one"), None, &answer),
                Err(reason) => Ok(Judged::because(Verdict::Malformed, reason)),
            },
        }
    }

    fn verdicts(&self, problem: &Problem, key: Option<&ProblemKey>, replies: &[&str]) -> Result<Vec<Verdict>, Error> {
        match Self::read(problem)? {
            Question::Asked(asked) => {
                let reference = Self::reference(&asked, key)?;
                Ok(replies.iter().map(|reply| reference.judge(reply).verdict).collect())
            }
            Question::Countdown(_) => {
                replies.iter().map(|reply| Ok(self.judge(problem, key, reply)?.verdict)).collect()
            }
        }
    }

    fn answer_read(&self, problem: &Problem, reply: &str) -> Option<String> {
        match Self::read(problem).ok()? {
            Question::Asked(Asked { check, .. }) => taken(check, reply).ok().map(str::to_owned),
            Question::Countdown(_) => countdown_answer(reply).ok(),
        }
    }

    fn may_be_searched(&self, problem: &Problem) -> bool {
        Self::read(problem).is_ok_and(|question| question.countdown().is_some())
    }

    /// Returns the other problem of countdown that an answer solves. Other problems may be anything.
    fn hindsight(&self, problem: &Problem, reply: &str) -> Result<Option<Problem>, Error> {
        let Some(countdown) = Self::read(problem)?.countdown() else { return Ok(None) };
        let Ok(answer) = countdown_answer(reply) else { return Ok(None) };
        // A problem that is too large for a policy has none.
        let Some(solved) = COUNTDOWN.hindsight(&countdown, &answer).ok().flatten() else { return Ok(None) };
        let solved = Countdown::without_bound(&solved.text).map(|text| Question::Countdown(text).problem());
        Ok(solved.filter(|solved| solved == problem || !self.is_exam(solved)))
    }

    fn niche(&self, problem: &Problem, _key: Option<&ProblemKey>) -> Result<Niche, Error> {
        Self::read(problem).map(|_| Niche(LEVEL.into()))
    }

    /// Admits none: nobody knows the right answer.
    fn admit(&self, _niche: Niche, _proposal: &str) -> Result<Admission, Error> {
        Ok(Err(Judged::because(Verdict::Incorrect, "nobody knows its right answer")))
    }

    fn balance_key(&self, problem: &Problem, _answer: Option<&str>) -> Result<BalanceKey, Error> {
        Ok(BalanceKey { level: LEVEL, goal: Self::read(problem)?.hash().head() })
    }
}

impl Forms for File {
    fn description(&self) -> &'static str {
        "problems of your own file, each with its right answer: docs/formats.md"
    }

    fn is_unnamed_form(&self, fields: &Map<String, Value>) -> bool {
        record::ASKED.into_iter().any(|name| fields.contains_key(name))
    }

    fn problem_from_json(&self, json: &Value) -> Result<Problem, Error> {
        record::read(json, false).map(|keyed| keyed.problem).map_err(Self::refuse)
    }

    fn keyed_from_json(&self, json: &Value) -> Result<KeyedProblem, Error> {
        record::read(json, true).map_err(Self::refuse)
    }

    fn problem_from_text(&self, text: &str) -> Result<Problem, Error> {
        let problem = Problem { domain: NAME.to_owned(), text: text.to_owned() };
        let expected = "JSON with the right answer, such as {\"prompt\":\"What is 6 * 7?\",\"answer\":\"42\"}";
        Self::read(&problem).map_err(|_| Self::refuse((expected.to_owned(), crate::quote(text))))?;
        Ok(problem)
    }

    fn problem_to_json(&self, problem: &Problem) -> Result<Value, Error> {
        Ok(record::write(&Self::read(problem)?, None))
    }

    fn keyed_to_json(&self, keyed: &KeyedProblem) -> Result<Value, Error> {
        let answer = keyed.key.as_ref().map(|key| key.text.as_str());
        Ok(record::write(&Self::read(&keyed.problem)?, answer))
    }
}

impl Wording for File {
    fn question(&self, problem: &Problem) -> Result<String, Error> {
        let contents: Vec<String> = self.messages(problem)?.into_iter().map(|turn| turn.content).collect();
        Ok(contents.join("\n\n"))
    }

    fn messages(&self, problem: &Problem) -> Result<Vec<Turn>, Error> {
        match Self::read(problem)? {
            Question::Asked(Asked { turns, .. }) => Ok(turns),
            question @ Question::Countdown(_) => COUNTDOWN.messages(&question.countdown().expect("it is one")),
        }
    }

    /// None: nothing is known of what a file asks.
    fn examples(&self) -> Vec<(Problem, String)> {
        Vec::new()
    }

    fn answer_pattern(&self, problem: &Problem) -> Result<Option<String>, Error> {
        match Self::read(problem)? {
            Question::Asked(Asked { check, .. }) => Ok(check.pattern().map(str::to_owned)),
            question @ Question::Countdown(_) => COUNTDOWN.answer_pattern(&question.countdown().expect("it is one")),
        }
    }

    /// The whole reply: its checker finds the answer.
    fn answer_in<'a>(&self, reply: &'a str) -> &'a str {
        reply
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn answers_to_countdown_may_be_in_a_box() {
        let domain = File::default();
        let problem = domain.problem_from_json(&json!({"nums": [3, 7, 25], "target": 82})).unwrap();
        for (reply, read, verdict) in [
            ("25 * 3 + 7", Some("25 * 3 + 7"), Verdict::Correct),
            ("So it is $\\boxed{25 \\times 3 + 7}$.\nDone.", Some("25 × 3 + 7"), Verdict::Correct),
            ("\\boxed{\\left(25 \\cdot 3\\right) + 7 = 82}", Some("(25 × 3) + 7 = 82"), Verdict::Correct),
            ("\\boxed{1} <answer>25 * 3 + 7</answer>", Some("25 * 3 + 7"), Verdict::Correct),
            ("<answer>25 * 3 = 75\n75 + 7 = 82</answer>", Some("25 * 3 = 75\n75 + 7 = 82"), Verdict::Correct),
            ("The answer is 25 * 3 + 7.", Some("25 * 3 + 7"), Verdict::Correct),
            ("\\boxed{25 + 3 + 7}", Some("25 + 3 + 7"), Verdict::Incorrect),
            ("\\boxed{25 \\div 3 + 7}", Some("25 ÷ 3 + 7"), Verdict::Incorrect),
            ("\\boxed{\\frac{25}{3}}", Some("\\frac{25}{3}"), Verdict::Malformed),
            ("\\boxed{25 * 3 + 7} or \\boxed{1}", None, Verdict::Malformed),
            ("", None, Verdict::Malformed),
        ] {
            assert_eq!(domain.answer_read(&problem, reply).as_deref(), read, "{reply}");
            assert_eq!(domain.judge(&problem, None, reply).unwrap().verdict, verdict, "{reply}");
        }
        let solved = domain.hindsight(&problem, "It is \\boxed{25 + 3 + 7}.").unwrap().unwrap();
        assert_eq!(solved, domain.problem_from_json(&json!({"nums": [3, 7, 25], "target": 35})).unwrap());
    }
}
