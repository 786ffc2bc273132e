use proto::Problem;
use serde::{Deserialize, Serialize};

use crate::{Error, Proposing};

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Turn {
    /// Who says it: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Turn {
    /// Returns what a user says.
    pub fn user(content: String) -> Turn {
        Turn { role: "user".to_owned(), content }
    }
}

/// A domain in words, for models that read text.
pub trait Wording: Send + Sync {
    /// Writes a problem as a question, with the form of the reply that [`answer_of`] reads. What all problems of a kind have in
    /// common comes first: networks read the shared beginning of prompts once.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn question(&self, problem: &Problem) -> Result<String, Error>;

    /// Writes a problem as a conversation that ends with a user's message: the question alone, unless the domain has more to say.
    ///
    /// # Errors
    /// As of [`Wording::question`].
    fn messages(&self, problem: &Problem) -> Result<Vec<Turn>, Error> {
        Ok(vec![Turn::user(self.question(problem)?)])
    }

    /// Lists worked examples, each a problem with a correct reply. None is in an exam.
    fn examples(&self) -> Vec<(Problem, String)>;

    /// Returns a regular expression that a well-formed answer matches from its first character to its last, for constrained
    /// decoding; `None` if answers are free text. It bounds the length, and reveals nothing that the problem hides.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn answer_pattern(&self, _problem: &Problem) -> Result<Option<String>, Error> {
        Ok(None)
    }

    /// Returns how a model is asked for problems; `None` if it cannot be.
    fn proposing(&self) -> Option<&dyn Proposing> {
        None
    }

    /// Returns the part of a free reply that is judged.
    fn answer_in<'a>(&self, reply: &'a str) -> &'a str {
        answer_of(reply)
    }
}

/// Finds the answer in a model's reply: the text within the last `<answer>` and `</answer>`, else the last line that is not blank.
/// Empty if the reply is blank.
///
/// ```
/// assert_eq!(domains::answer_of("Let me see.\n<answer> 3 * 7 </answer>\nDone."), "3 * 7");
/// assert_eq!(domains::answer_of("25 * 3 = 75\n75 + 7\n"), "75 + 7");
/// ```
pub fn answer_of(reply: &str) -> &str {
    let tagged = reply.rfind(OPEN).map(|start| &reply[start + OPEN.len()..]);
    let tagged = tagged.and_then(|rest| rest.find(CLOSE).map(|end| &rest[..end]));
    let last_line = || reply.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    tagged.unwrap_or_else(last_line).trim()
}

/// Writes the reply in which [`answer_of`] finds an answer: the answer alone, or within tags if it would not be found.
///
/// ```
/// assert_eq!(domains::reply_with("3 * 7"), "3 * 7");
/// assert_eq!(domains::reply_with("3 * 7 = 21\n21 + 4 = 25"), "<answer>3 * 7 = 21\n21 + 4 = 25</answer>");
/// ```
pub fn reply_with(answer: &str) -> String {
    if answer_of(answer) == answer { answer.to_owned() } else { format!("{OPEN}{answer}{CLOSE}") }
}

const OPEN: &str = "<answer>";
const CLOSE: &str = "</answer>";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_found() {
        for (reply, answer) in [
            ("", ""),
            (" \n\t\n", ""),
            ("7 - 3", "7 - 3"),
            ("First.\n7 - 3\n\n", "7 - 3"),
            ("<answer>7 - 3</answer>", "7 - 3"),
            ("<answer>1</answer> no: <answer>2</answer>.", "2"),
            ("<answer>\n7\n- 3\n</answer>", "7\n- 3"),
            ("<answer></answer>", ""),
            ("<answer>7 - 3", "<answer>7 - 3"),
            ("<answer>1</answer>\n<answer>2", "<answer>2"),
        ] {
            assert_eq!(answer_of(reply), answer, "{reply:?}");
            assert_eq!(answer_of(&reply_with(answer)), answer);
        }
    }
}
