use proto::{LegalTokens, TokenId};

/// A sequence to score: prompt and answer as far as the last chosen token needs them.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Input tokens.
    pub tokens: Vec<TokenId>,
    /// The tokens that were chosen, in order.
    pub chosen: Vec<ChosenToken>,
}

/// A chosen token of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct ChosenToken {
    /// The input position whose output predicts it.
    pub row: usize,
    /// What was chosen.
    pub target: TokenId,
    /// What was legal.
    pub legal: LegalTokens,
}

impl Sequence {
    /// Builds a sequence from a prompt and the choices of an answer, as (position, what was legal); the tokens after the last
    /// choice predict nothing and are left out.
    pub fn new(
        prompt: &[TokenId],
        answer: &[TokenId],
        choices: impl Iterator<Item = (usize, LegalTokens)>,
    ) -> Sequence {
        let chosen: Vec<ChosenToken> = choices
            .map(|(position, legal)| ChosenToken { row: prompt.len() + position - 1, target: answer[position], legal })
            .collect();
        let needed = chosen.last().map_or(0, |last| last.row + 1);
        let tokens = prompt.iter().chain(answer).take(needed).copied().collect();
        Sequence { tokens, chosen }
    }
}
