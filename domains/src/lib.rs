//! Families of problems: their languages, checkers, generators and exams. One file per domain.
//!
//! To add a domain, write one file that implements [`Domain`], give its tokens names in [`vocabulary`], and add it to
//! [`registry`]; `tests/conformance.rs` then holds it to the contract.

mod countdown;
mod exam;
mod grammar;
mod json;
pub mod programs;
pub mod vocabulary;

use std::sync::Arc;

use proto::{Aim, KeyedProblem, Niche, Problem, ProblemKey, ProblemSource, Token, Verdict};

pub use countdown::Countdown;
pub use exam::{Exam, ExamSpec, Split, exam, exam_problems, exam_specs, exams_of, trained_variant};
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

    /// Judges an answer that a person or another program wrote, and says why where it is not correct.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn judge_text(&self, problem: &Problem, answer: &str) -> Result<Judged, Error>;

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

    /// Whether a record that names no domain is a problem of this one, by the names of its fields.
    fn is_unnamed_form(&self, _fields: &serde_json::Map<String, serde_json::Value>) -> bool {
        false
    }

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

/// What is said of an answer in text to whoever wrote it. The tokens of a policy get a [`Verdict`] alone.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Judged {
    /// The verdict.
    pub verdict: Verdict,
    /// Why the verdict is not `correct`, for people. Never gives away what the problem hides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Judged {
    /// Returns the verdict that needs no reason.
    pub(crate) fn correct() -> Judged {
        Judged { verdict: Verdict::Correct, reason: None }
    }

    /// Returns any other verdict with its reason.
    pub(crate) fn because(verdict: Verdict, reason: impl Into<String>) -> Judged {
        debug_assert_ne!(verdict, Verdict::Correct, "a reason is why an answer is not correct");
        Judged { verdict, reason: Some(reason.into()) }
    }
}

/// What can go wrong in a domain.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such domain.
    #[error("domain: expected one of {}, got {got}", names().join(", "))]
    UnknownDomain {
        /// What was given.
        got: String,
    },
    /// JSON that is no problem of any domain.
    #[error("problem: expected a JSON object, got {got}")]
    NoObject {
        /// What was given.
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
    let found = registry().iter().find(|domain| domain.name() == name);
    found.ok_or_else(|| Error::UnknownDomain { got: format!("{name:?}") })
}

/// Reads a problem from one JSON object such as `{"domain":"countdown","numbers":[3,7,25],"target":78}`. A record without
/// a domain is of the one that its fields belong to.
///
/// # Errors
/// [`Error::NoObject`], [`Error::UnknownDomain`] or [`Error::Problem`].
///
/// ```
/// let json = serde_json::json!({"nums": [3, 7, 25], "target": 78});
/// assert_eq!(domains::problem_from_json(&json).unwrap().domain, "countdown");
/// ```
pub fn problem_from_json(json: &serde_json::Value) -> Result<Problem, Error> {
    let fields = json.as_object().ok_or_else(|| Error::NoObject { got: describe_json(json) })?;
    match fields.get("domain") {
        Some(serde_json::Value::String(name)) => domain(name)?.problem_from_json(json),
        Some(other) => Err(Error::UnknownDomain { got: describe_json(other) }),
        None => match registry().iter().find(|domain| domain.is_unnamed_form(fields)) {
            Some(domain) => domain.problem_from_json(json),
            None => Err(Error::UnknownDomain { got: "none".to_owned() }),
        },
    }
}

/// Describes JSON that stands where something else was expected: as it is where it is short, else by its kind.
pub fn describe_json(json: &serde_json::Value) -> String {
    use serde_json::Value;
    let text = json.to_string();
    match json {
        // What stood there is lost.
        Value::Number(number) if number.as_f64().is_some_and(|number| number.abs() >= 2f64.powi(64)) => {
            "a number beyond 64 bits".to_owned()
        }
        // A byte order mark cannot be seen.
        _ if text.chars().count() <= MAX_DESCRIBED_CHARS => text.replace('\u{feff}', "\\ufeff"),
        Value::Array(elements) => format!("an array of {} elements", elements.len()),
        Value::Object(fields) => format!("an object of {} fields", fields.len()),
        Value::String(text) => format!("a string of {} bytes", text.len()),
        _ => "a number".to_owned(),
    }
}

/// Most characters that a message quotes of what it found.
const MAX_DESCRIBED_CHARS: usize = 60;

/// Quotes a part of a text for a message, shortened where it is long; what cannot be seen is escaped.
pub(crate) fn quote(text: &str) -> String {
    let text = text.trim_matches([' ', '\t', '\r', '\n']);
    match text.char_indices().nth(MAX_DESCRIBED_CHARS) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

fn names() -> Vec<&'static str> {
    registry().iter().map(|domain| domain.name()).collect()
}
