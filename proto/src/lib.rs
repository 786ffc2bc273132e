//! The data types of autodidact: the messages between learner, actor and verifier.
//!
//! This crate uses no tensors and no sockets. Everything here is data with one encoding ([`wire`]), one digest
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
pub use message::{Beat, Envelope, Message, Refusal, RefusalCause, Role, Version};
pub use problem::{Difficulty, KeyedProblem, LadderLevel, Niche, Problem, ProblemKey, ProblemOrigin, ProblemSource};
pub use rng::{CounterRng, Purpose};
pub use rollout::{
    BalanceKey, Choices, Example, Group, LabelOrigin, Legal, Proposal, Rollout, ScoredGroup, SearchTarget,
    SetDictionary, StopReason, Verdict, VersionSpan,
};
pub use task::{Behavior, Request, Sampling, Task, TaskId, TaskKind};
pub use token_set::{LegalTokens, TokenSet};

/// An index into a vocabulary.
pub type TokenId = u32;

/// Errors from reading bytes or text that should encode a type of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes were written in another version of their format.
    #[error("{format} version: expected {expected}, got {got}")]
    Version {
        /// The name of the format.
        format: &'static str,
        /// The version that this build supports.
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
        /// The error of the codec.
        #[source]
        source: postcard::Error,
    },
    /// Bytes are left over after a complete value.
    #[error("decode {what}: {extra_bytes} bytes follow the value")]
    TrailingBytes {
        /// The type that was expected.
        what: &'static str,
        /// How many bytes follow the value.
        extra_bytes: usize,
    },
    /// A digest that is not 64 hexadecimal digits.
    #[error("digest: expected 64 hexadecimal digits, got {got:?}")]
    DigestText {
        /// The text that was given.
        got: String,
    },
}
