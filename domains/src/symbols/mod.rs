//! The interface for networks that read symbols: one vocabulary of 256 tokens, and for each domain that supports it the prompts,
//! the grammar of its answers, and their spellings in text.

mod grammar;
pub mod vocabulary;

use proto::{Difficulty, Niche, Problem, TokenId};

use crate::Error;

pub use grammar::{Grammar, Next};

/// The symbols of a domain. Everything here is a function of its arguments.
pub trait Symbols: Send + Sync {
    /// Lists the tokens that the domain adds to the vocabulary, with their names.
    fn tokens(&self) -> Vec<(TokenId, &'static str)>;

    /// Writes the problem as the prompt that the policy reads.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn prompt(&self, problem: &Problem) -> Result<Vec<TokenId>, Error>;

    /// Returns the grammar of a problem's answers, at its start.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn grammar(&self, problem: &Problem) -> Result<Box<dyn Grammar>, Error>;

    /// Returns the length of the longest prompt that relabelling or changing the problem can produce.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn max_prompt_tokens(&self, problem: &Problem) -> Result<usize, Error> {
        Ok(self.prompt(problem)?.len())
    }

    /// Returns the length of the longest legal answer, forced tokens included.
    ///
    /// # Errors
    /// [`Error::Problem`] when the text is not in the problem language.
    fn max_answer_tokens(&self, problem: &Problem) -> Result<u32, Error>;

    /// Converts a complete answer to the text that the checker judges; `None` when the tokens are not an answer.
    fn answer_text(&self, problem: &Problem, answer: &[TokenId]) -> Option<String>;

    /// Writes an answer for people, whichever problem it answers; `None` when the tokens are not an answer.
    fn show(&self, answer: &[TokenId]) -> Option<String>;

    /// Converts an answer in text to tokens; `None` when it has no spelling.
    fn spell(&self, problem: &Problem, answer: &str) -> Option<Vec<TokenId>>;

    /// Writes the prompt that asks the policy for a problem of a niche and a difficulty.
    fn propose_prompt(&self, niche: Niche, difficulty: Difficulty) -> Vec<TokenId>;

    /// Returns the grammar of proposals at its start, with the constraints that the requested niche imposes.
    fn proposal_grammar(&self, niche: Niche) -> Box<dyn Grammar>;

    /// Returns the length of the longest legal proposal for [`Symbols::propose_prompt`].
    fn max_proposal_tokens(&self, niche: Niche) -> u32;

    /// Converts a complete proposal to the text for [`crate::Checker::admit`]; `None` when the tokens are not a proposal.
    fn proposal_text(&self, niche: Niche, proposal: &[TokenId]) -> Option<String>;
}
