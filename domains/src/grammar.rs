use proto::{ActionMask, CounterRng, ExampleChoice, Token};

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

impl Next {
    /// Sorts a mask of one legal token or more.
    pub(crate) fn of(mask: ActionMask) -> Next {
        let mut tokens = mask.iter();
        match (tokens.next(), tokens.next()) {
            (Some(only), None) => Next::Forced(only),
            _ => Next::Choice(mask),
        }
    }

    /// Tells whether a token is legal.
    pub(crate) fn allows(self, token: Token) -> bool {
        match self {
            Next::Done => false,
            Next::Forced(forced) => forced == token,
            Next::Choice(mask) => mask.contains(token),
        }
    }
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

/// Plays uniformly random legal tokens to the end.
pub fn random_answer(mut grammar: Box<dyn Grammar>, rng: &mut CounterRng) -> Vec<Token> {
    let mut answer = Vec::new();
    loop {
        let token = match grammar.next() {
            Next::Done => return answer,
            Next::Forced(token) => token,
            Next::Choice(mask) => {
                let drawn = mask.iter().nth(rng.below(mask.len() as u64) as usize);
                drawn.expect("a choice has tokens")
            }
        };
        let legal = grammar.push(token);
        debug_assert!(legal, "the grammar offered the token");
        answer.push(token);
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
