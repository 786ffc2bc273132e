use proto::{LegalTokens, TokenId};

/// A sequence to score: the prompt and the answer, as far as needed to predict the last chosen token.
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
    /// The chosen token.
    pub target: TokenId,
    /// The tokens that were legal.
    pub legal: LegalTokens,
}

impl Sequence {
    /// Builds a sequence from a prompt, an answer and its choices, as (position, legal tokens). Leaves out trailing tokens, which
    /// predict no choice.
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
