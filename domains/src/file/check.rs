//! The ways in which answers are compared.

use serde::{Deserialize, Serialize};

/// How an answer is compared with the right one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Check {
    /// By its words.
    Exact,
    /// As a number.
    Number,
    /// As a rational function.
    Expression,
    /// By the letter of a choice.
    Choice,
    /// By a regular expression that it matches from its first character to its last.
    Regex,
    /// As a JSON value.
    Json,
}

/// The names of all checks, for messages.
pub(super) const NAMES: &str = "exact, number, expression, choice, regex or json";

impl Check {
    /// Returns a regular expression of well-formed answers, if they have a form.
    pub(super) fn pattern(self) -> Option<&'static str> {
        match self {
            Check::Number => Some("-?[0-9]{1,18}(?:[./][0-9]{1,9})?%?"),
            Check::Choice => Some("[A-Z]"),
            Check::Exact | Check::Expression | Check::Regex | Check::Json => None,
        }
    }
}
