//! Families of problems: their languages, checkers, generators and exams. One file per domain.
//!
//! To add a domain, write one file that implements [`Domain`], give its tokens names in [`vocabulary`], and add it to
//! [`registry`]; `tests/conformance.rs` then holds it to the contract.

mod countdown;
mod exam;
mod grammar;
pub mod programs;
pub mod vocabulary;

use std::sync::Arc;

use proto::{Aim, KeyedProblem, Niche, Problem, ProblemKey, ProblemSource, Token, Verdict};

pub use countdown::Countdown;
pub use exam::{Exam, ExamSpec, Split, exam, exam_problems, exam_specs, exams_of};
pub use grammar::{Grammar, MaskDictionary, Next, enumerate_answers, random_answer, trace};
pub use programs::Programs;

/// A family of problems.
///
/// Everything here is a function of its arguments: no clock, no hidden state, no randomness of its own.
pub trait Domain: ProblemSource {
    /// What the domain is, in one line.
    fn description(&self) -> &'static str;

    /// Writes the problem as the prompt that the policy reads.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn prompt(&self, problem: &Problem) -> Result<Vec<Token>, Error>;

    /// Opens the answer language of a problem at its start.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn grammar(&self, problem: &Problem) -> Result<Box<dyn Grammar>, Error>;

    /// Gives the length of the longest prompt that relabelling or changing the problem can lead to.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn max_prompt_tokens(&self, problem: &Problem) -> Result<usize, Error> {
        Ok(self.prompt(problem)?.len())
    }

    /// Gives the length of the longest legal answer, forced tokens included.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn max_answer_tokens(&self, problem: &Problem) -> Result<u32, Error>;

    /// Judges an answer in tokens. Does not use the grammar: the two hold each other to the same language.
    ///
    /// # Errors
    /// [`Error::Problem`] when the problem or the key is not in its language.
    fn judge_keyed(&self, problem: &Problem, key: Option<&ProblemKey>, answer: &[Token]) -> Result<Verdict, Error>;

    /// As [`Domain::judge_keyed`], for problems that come without a key. The keys of exam problems are known.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn judge(&self, problem: &Problem, answer: &[Token]) -> Result<Verdict, Error> {
        self.judge_keyed(problem, None, answer)
    }

    /// Judges an answer that a person or another program wrote.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn judge_text(&self, problem: &Problem, answer: &str) -> Result<Verdict, Error>;

    /// Names the problem that an answer solves exactly, if there is one.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn hindsight(&self, problem: &Problem, answer: &[Token]) -> Result<Option<Problem>, Error>;

    /// Lists problems whose answers follow from running what a problem shows or what an answer is, with those answers; at most
    /// one of a mode. Training on them is supervision by the machine that runs it, and is called so.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn executions(&self, _problem: &Problem, _answer: &[Token]) -> Result<Vec<(Problem, Vec<Token>)>, Error> {
        Ok(Vec::new())
    }

    /// Gives the niche of a problem.
    ///
    /// # Errors
    /// [`Error::Problem`] when the problem or the key is not in its language.
    fn niche(&self, problem: &Problem, key: Option<&ProblemKey>) -> Result<Niche, Error>;

    /// Opens the problem language at its start, as far as the niche that is asked for binds it.
    fn proposal_grammar(&self, niche: Niche) -> Box<dyn Grammar>;

    /// Reads a proposal that was asked for a niche; `None` unless it is a problem worth asking and of no exam. A function
    /// of the text alone: whether the problem is new is for others to say.
    fn admit(&self, niche: Niche, proposal: &[Token]) -> Option<KeyedProblem>;

    /// Gives what an answer aims at: by the problem and, where the answer is a program, by what it does. Without tokens, by
    /// the problem alone.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn aim(&self, problem: &Problem, answer: &[Token]) -> Result<Aim, Error>;

    /// Tells whether what a problem is about is held out of every source of training, and not the problem alone.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn is_held_out(&self, _problem: &Problem) -> Result<bool, Error> {
        Ok(false)
    }

    /// Writes an answer for people.
    fn render_answer(&self, answer: &[Token]) -> String;

    /// Reads a problem from its JSON form.
    ///
    /// # Errors
    /// [`Error::Problem`] when a field is missing, unknown or out of range.
    fn problem_from_json(&self, json: &serde_json::Value) -> Result<Problem, Error>;

    /// Reads a problem as a person would type it.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn problem_from_text(&self, text: &str) -> Result<Problem, Error>;

    /// Writes a problem in its JSON form, `domain` included.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn problem_to_json(&self, problem: &Problem) -> Result<serde_json::Value, Error>;

    /// Names the domain whose exams are this one's too: another where this is a variant of it, with the same problems.
    fn sits_exams_of(&self) -> &'static str {
        self.name()
    }

    /// Lists the domain's exams.
    fn exam_specs(&self) -> &'static [ExamSpec];

    /// Writes the keys of an exam's problems as their file; `None` where checking needs none.
    ///
    /// # Panics
    /// When the exam is not what [`Exam::generate`] gives.
    fn exam_keys_file(&self, _spec: &ExamSpec, _exam: &Exam) -> Option<Vec<u8>> {
        None
    }

    /// Draws candidate `index` of an exam: `None` when the draw is not a problem (no solution).
    fn exam_candidate(&self, exam: &ExamSpec, index: u64) -> Option<Problem>;
}

/// What can go wrong in a domain.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such domain.
    #[error("domain: expected one of {}, got {got:?}", names().join(", "))]
    UnknownDomain {
        /// The name that was given.
        got: String,
    },
    /// No such exam.
    #[error("exam: expected one of {}, got {got:?}", exam_specs().iter().map(|spec| spec.name).collect::<Vec<_>>().join(", "))]
    UnknownExam {
        /// The name that was given.
        got: String,
    },
    /// A problem or a key that is not in its domain's language.
    #[error("{domain} problem: expected {expected}, got {got}")]
    Problem {
        /// The domain.
        domain: &'static str,
        /// What the language asks for.
        expected: String,
        /// What was there.
        got: String,
    },
}

/// Lists every domain.
pub fn registry() -> &'static [Arc<dyn Domain>] {
    static REGISTRY: std::sync::LazyLock<Vec<Arc<dyn Domain>>> = std::sync::LazyLock::new(|| {
        vec![
            Arc::new(Countdown { calculator: true }),
            Arc::new(Countdown { calculator: false }),
            Arc::new(Programs { dialect: programs::Dialect::Full }),
            Arc::new(Programs { dialect: programs::Dialect::Digits }),
        ]
    });
    &REGISTRY
}

/// Finds a domain by name.
///
/// # Errors
/// [`Error::UnknownDomain`].
///
/// ```
/// assert_eq!(domains::domain("countdown").unwrap().name(), "countdown");
/// assert!(domains::domain("chess").is_err());
/// ```
pub fn domain(name: &str) -> Result<&'static Arc<dyn Domain>, Error> {
    registry().iter().find(|domain| domain.name() == name).ok_or_else(|| Error::UnknownDomain { got: name.to_owned() })
}

/// Reads a problem from one JSON object such as `{"domain":"countdown","numbers":[3,7,25],"target":78}`.
///
/// # Errors
/// [`Error::UnknownDomain`] or [`Error::Problem`].
pub fn problem_from_json(json: &serde_json::Value) -> Result<Problem, Error> {
    match json.get("domain").and_then(serde_json::Value::as_str) {
        Some(name) => domain(name)?.problem_from_json(json),
        None => Err(Error::UnknownDomain { got: json.get("domain").map_or("nothing".to_owned(), ToString::to_string) }),
    }
}

fn names() -> Vec<&'static str> {
    registry().iter().map(|domain| domain.name()).collect()
}
