//! How a policy reads a request and writes its answer.
//!
//! A [`Language`] opens an [`Episode`] for each request: it gives the prompt, says what may follow, and takes one token after the
//! other. Actors, search and verifiers know nothing else of a language, and domains know nothing of tokens.

mod source;
pub mod symbols;
mod walk;

use proto::{Difficulty, Digest, LegalTokens, Niche, Problem, Request, TokenId, Verdict};

pub use source::Source;
pub use symbols::SymbolLanguage;
pub use walk::{enumerate_answers, random_answer, trace};

/// A tokenizer with the prompts and the answer languages that are written in it.
pub trait Language: Send + Sync {
    /// Returns the number of tokens, unused ids included.
    fn vocabulary_size(&self) -> usize;

    /// Names a token for people.
    fn token_name(&self, token: TokenId) -> String;

    /// Opens the episode in which a request is answered.
    ///
    /// # Errors
    /// [`Error::Domain`] when the request is none of its domain, [`Error::NoSymbols`] when the domain cannot be asked so.
    fn open(&self, request: &Request) -> Result<Box<dyn Episode>, Error>;

    /// Writes the prompt that asks for a problem of a niche and a difficulty.
    ///
    /// # Errors
    /// [`Error::NoSymbols`] when the domain cannot be asked so.
    fn propose_prompt(&self, domain: &str, niche: Niche, difficulty: Difficulty) -> Result<Vec<TokenId>, Error>;

    /// Returns the lengths of the longest prompt that relabelling or changing a problem can lead to, and of the longest answer to it,
    /// forced tokens included.
    ///
    /// # Errors
    /// As [`Language::open`].
    fn room(&self, problem: &Problem) -> Result<Room, Error>;

    /// Returns the same for problems of a niche that are asked for.
    ///
    /// # Errors
    /// As [`Language::propose_prompt`].
    fn proposal_room(&self, domain: &str, niche: Niche) -> Result<Room, Error>;

    /// Reads a complete answer, or a complete proposal, as the text that is judged; `None` where the tokens are none.
    ///
    /// # Errors
    /// As [`Language::open`].
    fn text(&self, request: &Request, answer: &[TokenId]) -> Result<Option<String>, Error>;

    /// Spells an answer that is given in text; `None` where it has no spelling.
    ///
    /// # Errors
    /// As [`Language::open`].
    fn spell(&self, problem: &Problem, answer: &str) -> Result<Option<Vec<TokenId>>, Error>;

    /// Writes an answer of a domain for people, also one that is not complete.
    fn show(&self, domain: &str, answer: &[TokenId]) -> String;

    /// Writes tokens for people.
    fn show_tokens(&self, tokens: &[TokenId]) -> String {
        tokens.iter().map(|token| self.token_name(*token)).collect::<Vec<_>>().join(" ")
    }
}

/// How many tokens a request takes at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Of its prompt.
    pub prompt: usize,
    /// Of its answer.
    pub answer: usize,
}

/// A request that is being answered.
pub trait Episode: Send {
    /// Returns what the policy reads before it answers.
    fn prompt(&self) -> &[TokenId];

    /// Returns what may follow.
    fn next(&self) -> Next;

    /// Appends a token; `false` when it is not legal, and nothing changes.
    fn push(&mut self, token: TokenId) -> bool;

    /// Copies the episode where it stands.
    fn fork(&self) -> Box<dyn Episode>;

    /// Names who chooses next, from 0 on; of a request that one answers alone it is always 0.
    fn to_move(&self) -> usize {
        0
    }

    /// Returns what each player has won, in [-1, 1], where the episode is over and its rules say so. A checker says more: see
    /// [`Episode::check`].
    fn returns(&self) -> Option<Vec<f64>> {
        None
    }

    /// Hashes all that what follows depends on: two histories with one hash can be continued alike.
    fn state_hash(&self) -> Digest;

    /// Asks the checker about a complete answer; `None` where that would give away what the problem hides, and of an answer that is
    /// not complete.
    fn check(&self) -> Option<Verdict>;
}

/// What may follow a prefix of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing: the answer is complete.
    Done,
    /// One token, which is appended without a sampling step and carries no loss.
    Forced(TokenId),
    /// One of several tokens.
    Choice(LegalTokens),
}

/// What can go wrong in a language.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What was asked is not of its domain.
    #[error(transparent)]
    Domain(#[from] domains::Error),
    /// The domain has text alone.
    #[error("domain {domain}: expected one with symbols for networks from random weights, got one of text alone")]
    NoSymbols {
        /// The domain.
        domain: String,
    },
}
