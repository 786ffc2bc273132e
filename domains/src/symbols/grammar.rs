use proto::{TokenId, TokenSet};

/// What may follow a prefix of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// The answer is complete.
    Done,
    /// One token is legal: it is appended without a sampling step and carries no loss.
    Forced(TokenId),
    /// Two or more tokens are legal.
    Choice(TokenSet),
}

impl Next {
    /// Sorts a set of one legal token or more.
    pub(crate) fn of(legal: TokenSet) -> Next {
        let mut tokens = legal.iter();
        let (first, second) = (tokens.next(), tokens.next());
        drop(tokens);
        match (first, second) {
            (Some(only), None) => Next::Forced(only),
            _ => Next::Choice(legal),
        }
    }

    /// Whether a token is legal.
    pub(crate) fn allows(&self, token: TokenId) -> bool {
        match self {
            Next::Done => false,
            Next::Forced(forced) => *forced == token,
            Next::Choice(legal) => legal.contains(token),
        }
    }
}

/// An answer language as an automaton that stands behind some legal prefix.
///
/// Every prefix that can be reached can be completed.
pub trait Grammar: Send {
    /// Returns what may follow.
    fn next(&self) -> Next;

    /// Appends a token; `false` when it is not legal, and nothing changes.
    fn push(&mut self, token: TokenId) -> bool;

    /// Copies the automaton where it stands.
    fn fork(&self) -> Box<dyn Grammar>;

    /// Returns all that what may follow, and what it is worth, depends on, where another history can lead to the same.
    fn state(&self) -> Option<Vec<u32>> {
        None
    }
}
