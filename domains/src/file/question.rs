//! What is asked: the canonical text of a problem.

use proto::{Digest, Problem};
use serde::{Deserialize, Serialize};

use super::check::Check;
use crate::{Countdown, Turn};

/// The name of the domain.
pub(super) const NAME: &str = "file";

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// Messages whose answer is compared with the right one.
    Asked(Asked),
    /// A problem of countdown without a bound, in its canonical text.
    Countdown(String),
}

/// Messages, and how the answer to them is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) check: Check,
    /// The last one is a user's.
    pub(super) turns: Vec<Turn>,
}

/// The canonical text, as JSON: one of a prompt with its check, messages with their check, and countdown.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    check: Option<Check>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    prompt: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    messages: Option<Vec<Turn>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    countdown: Option<String>,
}

/// One digest in this many is that of a problem of the dev set, and another one that of a problem of the test set.
const SPLIT: u64 = 20;

impl Question {
    /// Reads a canonical text; `None` when it is not one.
    pub(super) fn read(text: &str) -> Option<Question> {
        let Text { check, prompt, messages, countdown } = serde_json::from_str(text).ok()?;
        let question = match (check, prompt, messages, countdown) {
            (Some(check), Some(prompt), None, None) => {
                Question::Asked(Asked { check, turns: vec![Turn::user(prompt)] })
            }
            (Some(check), None, Some(turns), None) => Question::Asked(Asked { check, turns }),
            (None, None, None, Some(problem)) => Question::Countdown(problem),
            _ => return None,
        };
        (question.is_valid() && question.text() == text).then_some(question)
    }

    /// Whether the messages end with a user's, or the problem of countdown is one.
    pub(super) fn is_valid(&self) -> bool {
        match self {
            Question::Asked(Asked { turns, .. }) => {
                let is_known = |turn: &Turn| ["system", "user", "assistant"].contains(&turn.role.as_str());
                turns.iter().all(is_known)
                    && turns.last().is_some_and(|last| last.role == "user" && !last.content.trim().is_empty())
            }
            Question::Countdown(text) => Countdown::without_bound(text).is_some_and(|bare| bare == *text),
        }
    }

    /// Returns the canonical text.
    pub(super) fn text(&self) -> String {
        let mut text = Text { check: None, prompt: None, messages: None, countdown: None };
        match self {
            Question::Asked(Asked { check, turns }) => {
                text.check = Some(*check);
                match &turns[..] {
                    [Turn { role, content }] if role == "user" => text.prompt = Some(content.clone()),
                    _ => text.messages = Some(turns.clone()),
                }
            }
            Question::Countdown(problem) => text.countdown = Some(problem.clone()),
        }
        serde_json::to_string(&text).expect("strings have a JSON form")
    }

    pub(super) fn problem(&self) -> Problem {
        Problem { domain: NAME.to_owned(), text: self.text() }
    }

    /// Hashes what is asked, whatever the white space and the check: who says what, word by word.
    pub(super) fn hash(&self) -> Digest {
        match self {
            Question::Asked(Asked { turns, .. }) => {
                let words = |turn: &Turn| {
                    (turn.role.clone(), turn.content.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
                };
                Digest::of(&turns.iter().map(words).collect::<Vec<_>>())
            }
            Question::Countdown(text) => Digest::of_bytes(text.as_bytes()),
        }
    }
}

/// Returns the exam split of the problem with this hash; `None` if it is trained on.
pub(super) fn split(hash: &Digest) -> Option<crate::Split> {
    match hash.head() % SPLIT {
        0 => Some(crate::Split::Dev),
        1 => Some(crate::Split::Test),
        _ => None,
    }
}
