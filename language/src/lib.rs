//! How a policy reads a request and writes its answer.
//!
//! A [`Language`] opens an [`Episode`] for each request. The episode has the prompt, lists the legal next tokens, and accepts one
//! token at a time. Actors, search and verifiers use nothing else of a language, and domains know nothing of tokens.

mod source;
pub mod symbols;
pub mod text;
mod walk;

use std::path::PathBuf;

use proto::{Difficulty, Digest, LegalTokens, Niche, Problem, Request, TokenId, Verdict};

pub use source::Source;
pub use symbols::SymbolLanguage;
pub use walk::{enumerate_answers, random_answer, solution, trace};

/// A tokenizer, with the prompts and the answer languages written in its tokens.
pub trait Language: Send + Sync {
    /// Returns the number of tokens, unused ids included.
    fn vocabulary_size(&self) -> usize;

    /// Returns the human-readable name of a token.
    fn token_name(&self, token: TokenId) -> String;

    /// Opens the episode in which a request is answered.
    ///
    /// # Errors
    /// [`Error::Domain`] when the request is not valid in its domain, [`Error::NoSymbols`] when the domain has no symbols,
    /// [`Error::NoWording`] when it has no wording, [`Error::NoProposals`] when its problems cannot be proposed in words,
    /// [`Error::Pattern`] when its pattern of answers or of proposals cannot be used.
    fn open(&self, request: &Request) -> Result<Box<dyn Episode>, Error>;

    /// Writes the prompt that asks for a problem of a niche and a difficulty.
    ///
    /// # Errors
    /// [`Error::NoSymbols`] when the domain has no symbols, [`Error::NoProposals`] when its problems cannot be proposed in words,
    /// [`Error::Domain`] when the niche belongs to no level of its ladder.
    fn propose_prompt(&self, domain: &str, niche: Niche, difficulty: Difficulty) -> Result<Vec<TokenId>, Error>;

    /// Returns the length of the longest prompt that relabelling or changing a problem can produce, and of the longest answer to
    /// it, forced tokens included.
    ///
    /// # Errors
    /// As [`Language::open`].
    fn room(&self, problem: &Problem) -> Result<Room, Error>;

    /// Returns the same lengths for a request to propose a problem of a niche.
    ///
    /// # Errors
    /// As [`Language::propose_prompt`].
    fn proposal_room(&self, domain: &str, niche: Niche) -> Result<Room, Error>;

    /// Converts a complete answer, or a complete proposal, to the text that is judged; `None` if the tokens are neither.
    ///
    /// # Errors
    /// As [`Language::open`].
    fn text(&self, request: &Request, answer: &[TokenId]) -> Result<Option<String>, Error>;

    /// Tokenizes an answer given as text; `None` if no tokens express it.
    ///
    /// # Errors
    /// As [`Language::open`].
    fn spell(&self, problem: &Problem, answer: &str) -> Result<Option<Vec<TokenId>>, Error>;

    /// Formats an answer of a domain for people; the answer may be incomplete.
    fn show(&self, domain: &str, answer: &[TokenId]) -> String;

    /// Formats tokens for people.
    fn show_tokens(&self, tokens: &[TokenId]) -> String {
        tokens.iter().map(|token| self.token_name(*token)).collect::<Vec<_>>().join(" ")
    }
}

/// The most tokens that a request takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Tokens of its prompt.
    pub prompt: usize,
    /// Tokens of its answer.
    pub answer: usize,
}

/// A request that is being answered.
pub trait Episode: Send {
    /// Returns the tokens that the policy reads before it answers.
    fn prompt(&self) -> &[TokenId];

    /// Returns the legal continuations.
    fn next(&self) -> Next;

    /// Appends a token. Returns `false` and changes nothing if it is illegal.
    fn push(&mut self, token: TokenId) -> bool;

    /// Copies the episode in its current state.
    fn fork(&self) -> Box<dyn Episode>;

    /// Returns the player who chooses next, counted from 0; always 0 if one player answers the request alone.
    fn to_move(&self) -> usize {
        0
    }

    /// Returns the payoff of each player, in [-1, 1], if the episode is over and its rules define one. A checker says more: see
    /// [`Episode::check`].
    fn returns(&self) -> Option<Vec<f64>> {
        None
    }

    /// Hashes everything that the continuation depends on: two histories with equal hashes have the same continuations.
    fn state_hash(&self) -> Digest;

    /// Asks the checker about a complete answer. Returns `None` if the answer is incomplete, or if a verdict would reveal what
    /// the problem hides.
    fn check(&self) -> Option<Verdict>;
}

/// The legal continuations of a prefix of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing: the answer is complete.
    Done,
    /// One token, which is appended without a sampling step and carries no loss.
    Forced(TokenId),
    /// One of several tokens.
    Choice(LegalTokens),
}

/// Errors of a language.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The domain rejects the request, or fails.
    #[error(transparent)]
    Domain(#[from] domains::Error),
    /// The domain has only text, no symbols.
    #[error(
        "domain {domain}: expected a domain with a symbol vocabulary, which a network trained from scratch needs, got a text-only domain"
    )]
    NoSymbols {
        /// The domain.
        domain: String,
    },
    /// The domain has no wording.
    #[error("domain {domain}: expected a domain in words, which a pretrained model needs, got one without a wording")]
    NoWording {
        /// The domain.
        domain: String,
    },
    /// Problems of the domain cannot be proposed in words.
    #[error("domain {domain}: expected a domain whose problems a model can propose in words, got another one")]
    NoProposals {
        /// The domain.
        domain: String,
    },
    /// A tokenizer cannot be built from its files, or does not encode a text.
    #[error("{what}: expected {expected}, got {got}")]
    Tokenizer {
        /// What is wrong.
        what: String,
        /// What it has to be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A domain's pattern of answers cannot be used.
    #[error("domain {domain}: expected a pattern that answers in tokens can match, got {pattern:?}: {reason}")]
    Pattern {
        /// The domain.
        domain: String,
        /// The pattern.
        pattern: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// A chat template cannot be compiled, or fails on a chat.
    #[error("chat template{}: {reason}", .line.map(|line| format!(", line {line}")).unwrap_or_default())]
    Template {
        /// The line of the template, counted from 1, where one is to blame.
        line: Option<usize>,
        /// What the template engine says.
        reason: String,
    },
    /// A file of a model cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}
