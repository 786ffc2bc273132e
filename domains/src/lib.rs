//! Families of problems: their generators, checkers and exams, in text. A folder per domain.
//!
//! To add a domain, implement [`Domain`] and add it to [`registry`]; `tests/conformance.rs` then checks it against the contract.

mod arithmetic;
mod comparison;
mod countdown;
mod exam;
mod file;
mod json;
pub mod programs;
mod proposing;
mod quiz;
mod strings;
pub mod symbols;
mod wording;

use std::sync::Arc;

use proto::{BalanceKey, CounterRng, Digest, KeyedProblem, LadderLevel, Niche, Problem, ProblemKey, Verdict};

pub use countdown::Countdown;
pub use exam::{Exam, ExamSpec, Split, exam, exam_problems, exam_specs, exams_of, trained_variant};
pub use file::{File, Problems};
pub use programs::Programs;
pub use proposing::{Admission, Proposing};
use quiz::Quiz;
pub use symbols::Symbols;
pub use wording::{Turn, Wording, answer_of, reply_with};

/// A family of problems, in text.
///
/// Everything here and in the supertraits is a function of its arguments: no clock, no hidden state, no randomness of its own.
pub trait Domain: Ladder + Checker + Forms {
    /// Returns the interface for networks that read symbols; `None` for a domain of text alone.
    fn symbols(&self) -> Option<&dyn Symbols> {
        None
    }

    /// Returns the domain in words, for models that read text; `None` if only networks that read symbols can be asked.
    fn wording(&self) -> Option<&dyn Wording> {
        None
    }

    /// Returns the domain's exams; `None` when it has none.
    fn exams(&self) -> Option<&dyn Exams> {
        None
    }
}

/// The source of problems: the part of a domain that a learner uses.
pub trait Ladder: Send + Sync {
    /// Returns the name in the registry.
    fn name(&self) -> &'static str;

    /// Lists the ladder's levels, easiest first.
    fn ladder_levels(&self) -> &'static [LadderLevel];

    /// Returns the level whose problems belong to a niche; 0 when there is none.
    fn level_of(&self, niche: Niche) -> u32;

    /// Generates problem `index` of a level: a function of its arguments, never an exam problem.
    ///
    /// # Panics
    /// When the level is not one of [`Ladder::ladder_levels`].
    fn ladder(&self, level: u32, seed: u64, index: u64) -> KeyedProblem;

    /// Returns a correct answer, if the domain has a solver that finds one.
    fn solution(&self, _problem: &Problem) -> Option<String> {
        None
    }

    /// Changes a problem into another one that would be admitted as a proposal; `None` when no draw succeeds.
    fn mutate(&self, parent: &KeyedProblem, rng: &mut CounterRng) -> Option<KeyedProblem>;

    /// Describes a niche for people.
    fn describe_niche(&self, niche: Niche) -> String;

    /// Hashes the identity of a problem: two forms of the same problem have equal hashes.
    fn canonical_hash(&self, problem: &Problem) -> Digest;

    /// Whether a problem belongs to an exam, so that nothing may train on it.
    fn is_exam(&self, _problem: &Problem) -> bool {
        false
    }
}

/// The judge of answers and proposals: the part of a domain that a verifier uses.
pub trait Checker: Send + Sync {
    /// Judges an answer, with a reason when it is not correct. Without a key, judges by what the problem shows; the keys of exam
    /// problems are known.
    ///
    /// # Errors
    /// [`Error::Problem`] when the problem or the key is not in its language; [`Error::Unavailable`] when the checker is not part
    /// of this process and does not answer. A domain that calls a remote checker needs a timeout of its own: a verifier abandons
    /// a call that takes too long, and its thread with it.
    fn judge(&self, problem: &Problem, key: Option<&ProblemKey>, answer: &str) -> Result<Judged, Error>;

    /// Judges the answers of a group, without reasons. A checker that reads the problem once for all of them is faster, and a
    /// remote one needs one call.
    ///
    /// # Errors
    /// As of [`Checker::judge`].
    fn verdicts(&self, problem: &Problem, key: Option<&ProblemKey>, answers: &[&str]) -> Result<Vec<Verdict>, Error> {
        answers.iter().map(|answer| Ok(self.judge(problem, key, answer)?.verdict)).collect()
    }

    /// Returns the part of a text that is judged as the answer, if the checker looks for one in it; for people.
    fn answer_read(&self, _problem: &Problem, _text: &str) -> Option<String> {
        None
    }

    /// Whether a search may query the checker about answers, because a positive verdict reveals nothing that the problem hides.
    fn may_be_searched(&self, _problem: &Problem) -> bool {
        false
    }

    /// Returns the problem that an answer solves exactly, if there is one.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn hindsight(&self, problem: &Problem, answer: &str) -> Result<Option<Problem>, Error>;

    /// Lists problems whose answers follow from running a program that the problem shows or that the answer is, with those
    /// answers; at most one per mode. Training on them is supervision by the machine that runs it, and is labelled as such.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn executions(&self, _problem: &Problem, _answer: &str) -> Result<Vec<(Problem, String)>, Error> {
        Ok(Vec::new())
    }

    /// Returns the niche of a problem.
    ///
    /// # Errors
    /// [`Error::Problem`] when the problem or the key is not in its language.
    fn niche(&self, problem: &Problem, key: Option<&ProblemKey>) -> Result<Niche, Error>;

    /// Reads a proposal that was requested for a niche, and admits it if it is a worthwhile problem that is in no exam. What is no
    /// problem of the domain is malformed, any other refusal incorrect. Depends on the arguments alone: novelty is checked
    /// elsewhere.
    ///
    /// # Errors
    /// [`Error::Unavailable`], as of [`Checker::judge`].
    fn admit(&self, niche: Niche, proposal: &str) -> Result<Admission, Error>;

    /// Returns the key by which examples of an answer are balanced. It depends on the problem and, when the answer is a program,
    /// on what the program does. Without an answer, it depends on the problem alone.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn balance_key(&self, problem: &Problem, answer: Option<&str>) -> Result<BalanceKey, Error>;
}

/// The forms in which people write problems: JSON and text.
pub trait Forms: Send + Sync {
    /// Describes the domain in one line.
    fn description(&self) -> &'static str;

    /// Whether the field names of a record without a domain identify it as a problem of this domain.
    fn is_unnamed_form(&self, _fields: &serde_json::Map<String, serde_json::Value>) -> bool {
        false
    }

    /// Reads a problem from its JSON form.
    ///
    /// # Errors
    /// [`Error::Problem`] when a field is missing, unknown or out of range.
    fn problem_from_json(&self, json: &serde_json::Value) -> Result<Problem, Error>;

    /// Reads a problem with its key, if its JSON form has one.
    ///
    /// # Errors
    /// [`Error::Problem`], as of [`Forms::problem_from_json`], and when a key that is needed is missing.
    fn keyed_from_json(&self, json: &serde_json::Value) -> Result<KeyedProblem, Error> {
        Ok(KeyedProblem { problem: self.problem_from_json(json)?, key: None })
    }

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

    /// Writes a problem in its JSON form, with its key if the form has one.
    ///
    /// # Errors
    /// As of [`Forms::problem_to_json`].
    fn keyed_to_json(&self, keyed: &KeyedProblem) -> Result<serde_json::Value, Error> {
        self.problem_to_json(&keyed.problem)
    }
}

/// Frozen evaluation sets of a domain.
pub trait Exams: Send + Sync {
    /// Returns the name of the domain that owns these exams. For a variant, this is the other domain that has the same problems.
    fn of(&self) -> &'static str;

    /// Lists the exams that are built from this domain; none for a variant of another domain.
    fn specs(&self) -> &'static [ExamSpec];

    /// Draws candidate `index` of an exam: `None` when the draw is not a problem (no solution).
    fn candidate(&self, exam: &ExamSpec, index: u64) -> Option<Problem>;

    /// Writes the keys of an exam's problems as the content of their file; `None` when checking needs none.
    ///
    /// # Panics
    /// When the exam is not the output of [`Exam::generate`].
    fn keys_file(&self, _spec: &ExamSpec, _exam: &Exam) -> Option<Vec<u8>> {
        None
    }

    /// Whether the subject of a problem, and not just the problem, is held out of every source of training.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn is_held_out(&self, _problem: &Problem) -> Result<bool, Error> {
        Ok(false)
    }
}

/// The judgement of an answer, as its author sees it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Judged {
    /// The verdict.
    pub verdict: Verdict,
    /// Why the verdict is not `correct`, for people. Never reveals what the problem hides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Judged {
    /// Returns the verdict `correct`, which needs no reason.
    pub fn correct() -> Judged {
        Judged { verdict: Verdict::Correct, reason: None }
    }

    /// Returns any other verdict with its reason.
    pub fn because(verdict: Verdict, reason: impl Into<String>) -> Judged {
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
    /// JSON that is not an object, so not a problem of any domain.
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
    /// The checker does not answer, so there is no judgement.
    #[error("the checker of {domain} is unavailable: {reason}")]
    Unavailable {
        /// The domain.
        domain: &'static str,
        /// Why.
        reason: String,
    },
    /// A problem or a key that is not in its domain's language.
    #[error("{domain} problem: expected {expected}, got {got}")]
    Problem {
        /// The domain.
        domain: &'static str,
        /// What the language requires.
        expected: String,
        /// What was found.
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
            Arc::new(Quiz::<arithmetic::Expression>::new()),
            Arc::new(Quiz::<comparison::Comparison>::new()),
            Arc::new(Quiz::<strings::Exercise>::new()),
            Arc::new(File::default()),
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

/// Reads a problem from one JSON object such as `{"domain":"countdown","numbers":[3,7,25],"target":78}`. Without `domain`, the
/// names of the other fields determine the domain.
///
/// # Errors
/// [`Error::NoObject`], [`Error::UnknownDomain`] or [`Error::Problem`].
///
/// ```
/// let json = serde_json::json!({"nums": [3, 7, 25], "target": 78});
/// assert_eq!(domains::problem_from_json(&json).unwrap().domain, "countdown");
/// ```
pub fn problem_from_json(json: &serde_json::Value) -> Result<Problem, Error> {
    domain_of_json(json)?.problem_from_json(json)
}

/// Reads a problem from one JSON object as [`problem_from_json`] does, with its key if its form has one.
///
/// # Errors
/// As of [`problem_from_json`], and [`Error::Problem`] when a key that is needed is missing.
///
/// ```
/// let json = serde_json::json!({"prompt": "What is 6 * 7?", "answer": "42"});
/// assert_eq!(domains::keyed_from_json(&json).unwrap().key.unwrap().text, "42");
/// ```
pub fn keyed_from_json(json: &serde_json::Value) -> Result<KeyedProblem, Error> {
    domain_of_json(json)?.keyed_from_json(json)
}

fn domain_of_json(json: &serde_json::Value) -> Result<&'static Arc<dyn Domain>, Error> {
    let fields = json.as_object().ok_or_else(|| Error::NoObject { got: describe_json(json) })?;
    match fields.get("domain") {
        Some(serde_json::Value::String(name)) => domain(name),
        Some(other) => Err(Error::UnknownDomain { got: describe_json(other) }),
        None => {
            let named = registry().iter().find(|domain| domain.is_unnamed_form(fields));
            named.ok_or_else(|| Error::UnknownDomain { got: "none".to_owned() })
        }
    }
}

/// Describes JSON that was found in place of something else: verbatim when it is short, else by its kind.
pub fn describe_json(json: &serde_json::Value) -> String {
    use serde_json::Value;
    let text = json.to_string();
    match json {
        // The original digits are lost.
        Value::Number(number) if number.as_f64().is_some_and(|number| number.abs() >= 2f64.powi(64)) => {
            "a number beyond 64 bits".to_owned()
        }
        // A byte order mark is invisible.
        _ if text.chars().count() <= MAX_DESCRIBED_CHARS => text.replace('\u{feff}', "\\ufeff"),
        Value::Array(elements) => format!("an array of {} elements", elements.len()),
        Value::Object(fields) => format!("an object of {} fields", fields.len()),
        Value::String(text) => format!("a string of {} bytes", text.len()),
        _ => "a number".to_owned(),
    }
}

/// Most characters of the input that a message quotes.
const MAX_DESCRIBED_CHARS: usize = 60;

/// Quotes a part of a text for a message, shortened when it is long; invisible characters are escaped.
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
