//! The interface for networks that read symbols.

use proto::{Difficulty, Niche, Problem, TokenId};

use super::language::words;
use super::puzzle::{MAX_RELABELLED_PROMPT, Mode, written_program};
use super::value::Value;
use super::{Programs, propose};
use crate::Error;
use crate::symbols::{Grammar, Symbols};

impl Symbols for Programs {
    fn tokens(&self) -> Vec<(TokenId, &'static str)> {
        words(self.dialect)
    }

    fn prompt(&self, problem: &Problem) -> Result<Vec<TokenId>, Error> {
        Ok(self.puzzle(problem)?.prompt())
    }

    fn grammar(&self, problem: &Problem) -> Result<Box<dyn Grammar>, Error> {
        Ok(self.puzzle(problem)?.grammar())
    }

    fn max_prompt_tokens(&self, problem: &Problem) -> Result<usize, Error> {
        Ok(self.prompt(problem)?.len().max(MAX_RELABELLED_PROMPT))
    }

    fn max_answer_tokens(&self, problem: &Problem) -> Result<u32, Error> {
        Ok(self.puzzle(problem)?.max_answer_tokens())
    }

    fn answer_text(&self, problem: &Problem, answer: &[TokenId]) -> Option<String> {
        match self.puzzle(problem).ok()?.mode() {
            Mode::Induction => written_program(self.dialect, answer).map(|program| program.text()),
            Mode::Deduction | Mode::Abduction => Value::read(answer).map(|value| value.view().text()),
        }
    }

    fn show(&self, answer: &[TokenId]) -> Option<String> {
        let value = Value::read(answer).map(|value| value.view().text());
        value.or_else(|| written_program(self.dialect, answer).map(|program| program.text()))
    }

    fn spell(&self, problem: &Problem, answer: &str) -> Option<Vec<TokenId>> {
        self.puzzle(problem).ok()?.parse_answer(answer).ok()
    }

    fn propose_prompt(&self, niche: Niche, difficulty: Difficulty) -> Vec<TokenId> {
        propose::Kind::of(self.dialect, niche).prompt(difficulty)
    }

    fn proposal_grammar(&self, niche: Niche) -> Box<dyn Grammar> {
        Box::new(propose::Kind::of(self.dialect, niche).grammar())
    }

    fn max_proposal_tokens(&self, niche: Niche) -> u32 {
        propose::Kind::of(self.dialect, niche).max_tokens()
    }

    fn proposal_text(&self, niche: Niche, proposal: &[TokenId]) -> Option<String> {
        propose::Kind::of(self.dialect, niche).text(proposal)
    }
}
