//! The nouns of autodidact: what a learner, an actor and a verifier say to each other.
//!
//! This crate knows no tensors and no sockets. Everything here is data with one encoding ([`wire`]), one digest
//! ([`Digest`]) and one source of randomness ([`CounterRng`]).

mod digest;
mod message;
mod problem;
mod rng;
mod rollout;
mod task;
mod token_set;
pub mod wire;

pub use digest::Digest;
pub use message::{Beat, Envelope, Message, Refusal, Role, Version};
pub use problem::{Difficulty, KeyedProblem, LadderLevel, Niche, Problem, ProblemKey, ProblemOrigin, ProblemSource};
pub use rng::{CounterRng, Purpose};
pub use rollout::{
    Aim, Choices, Example, Group, LabelOrigin, Legal, Proposal, Rollout, ScoredGroup, SearchTarget, SetDictionary,
    StopReason, Verdict, VersionSpan,
};
pub use task::{Behavior, Request, Sampling, Task, TaskId, TaskKind};
pub use token_set::{LegalTokens, TokenSet};

/// An index into a vocabulary.
pub type TokenId = u32;

/// What can go wrong while reading bytes that claim to be one of our nouns.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes were written in another version of their format.
    #[error("{format} version: expected {expected}, got {got}")]
    Version {
        /// Which format.
        format: &'static str,
        /// The version that this build speaks.
        expected: u8,
        /// The version that the bytes claim.
        got: u8,
    },
    /// The bytes are not an encoding of the type.
    #[error("decode {what}: {size_bytes} bytes are not a valid encoding")]
    Decode {
        /// The type that was expected.
        what: &'static str,
        /// How many bytes there were.
        size_bytes: usize,
        /// Why the codec refused.
        #[source]
        source: postcard::Error,
    },
    /// Bytes are left over after a complete value.
    #[error("decode {what}: {extra_bytes} bytes follow the value")]
    TrailingBytes {
        /// The type that was expected.
        what: &'static str,
        /// How many bytes are too many.
        extra_bytes: usize,
    },
    /// A digest that is not 64 hexadecimal digits.
    #[error("digest: expected 64 hexadecimal digits, got {got:?}")]
    DigestText {
        /// The text that was given.
        got: String,
    },
}
