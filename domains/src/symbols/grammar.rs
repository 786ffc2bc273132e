use proto::{TokenId, TokenSet};

/// The legal continuations of a prefix of an answer.
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
    /// Classifies a set of one or more legal tokens.
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

/// An answer language as an automaton, in its state after some legal prefix.
///
/// Every reachable prefix can be completed.
pub trait Grammar: Send {
    /// Returns the legal continuations.
    fn next(&self) -> Next;

    /// Appends a token. Returns `false` and changes nothing when the token is not legal.
    fn push(&mut self, token: TokenId) -> bool;

    /// Copies the automaton in its current state.
    fn fork(&self) -> Box<dyn Grammar>;

    /// Returns everything that the continuations and their value depend on, if different prefixes can lead to the same state.
    fn state(&self) -> Option<Vec<u32>> {
        None
    }
}
