use proto::{ActionMask, ExampleChoice, Token};

/// What may follow a prefix of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The answer is complete.
    Done,
    /// One token is legal: it is appended without a sampling step and carries no loss.
    Forced(Token),
    /// Two or more tokens are legal.
    Choice(ActionMask),
}

/// An answer language as an automaton that stands behind some legal prefix.
///
/// Every prefix that can be reached can be completed.
pub trait Grammar: Send {
    /// Tells what may follow.
    fn next(&self) -> Next;

    /// Appends a token; `false` when it is not legal, and nothing changes.
    fn push(&mut self, token: Token) -> bool;

    /// Copies the automaton where it stands.
    fn fork(&self) -> Box<dyn Grammar>;
}

/// Walks an answer through its grammar and gives the choices in it, their masks entered in `masks`.
///
/// `None` when the answer is not a complete word of the language.
pub fn trace(
    mut grammar: Box<dyn Grammar>,
    answer: &[Token],
    masks: &mut MaskDictionary,
) -> Option<Vec<ExampleChoice>> {
    let mut choices = Vec::new();
    for (position, token) in answer.iter().enumerate() {
        if let Next::Choice(mask) = grammar.next() {
            choices.push(ExampleChoice { position: position as u16, mask: masks.index_of(mask) });
        }
        if !grammar.push(*token) {
            return None;
        }
    }
    (grammar.next() == Next::Done).then_some(choices)
}

/// Action masks in order of first use.
#[derive(Clone, Debug, Default)]
pub struct MaskDictionary {
    masks: Vec<ActionMask>,
    index: std::collections::HashMap<ActionMask, u16>,
}

impl MaskDictionary {
    /// Finds a mask, or enters it.
    pub fn index_of(&mut self, mask: ActionMask) -> u16 {
        *self.index.entry(mask).or_insert_with(|| {
            self.masks.push(mask);
            (self.masks.len() - 1) as u16
        })
    }

    /// Gives the masks by index.
    pub fn into_masks(self) -> Vec<ActionMask> {
        self.masks
    }
}

/// Lists complete answers in canonical order: depth first, tokens ascending. This is the blind baseline.
pub fn enumerate_answers(grammar: Box<dyn Grammar>) -> impl Iterator<Item = Vec<Token>> {
    let mut open = vec![(grammar, Vec::new())];
    std::iter::from_fn(move || {
        while let Some((mut grammar, mut answer)) = open.pop() {
            match grammar.next() {
                Next::Done => return Some(answer),
                Next::Forced(token) => {
                    let legal = grammar.push(token);
                    debug_assert!(legal, "a forced token is legal");
                    answer.push(token);
                    open.push((grammar, answer));
                }
                Next::Choice(mask) => {
                    let tokens: Vec<Token> = mask.iter().collect();
                    for token in tokens.into_iter().rev() {
                        let mut branch = grammar.fork();
                        branch.push(token);
                        let mut longer = answer.clone();
                        longer.push(token);
                        open.push((branch, longer));
                    }
                }
            }
        }
        None
    })
}
