use serde::{Deserialize, Serialize};

use crate::Token;

/// How many tokens a mask covers: the largest vocabulary.
pub const MASK_BITS: usize = 256;

/// The set of tokens that are legal at one position.
///
/// ```
/// let mask: proto::ActionMask = [3, 200].into_iter().collect();
/// assert!(mask.contains(200) && !mask.contains(4));
/// assert_eq!(mask.iter().collect::<Vec<_>>(), [3, 200]);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ActionMask([u64; MASK_BITS / 64]);

impl ActionMask {
    /// Adds a token.
    ///
    /// # Panics
    /// When the token is not below [`MASK_BITS`].
    pub fn insert(&mut self, token: Token) {
        self.0[usize::from(token) / 64] |= 1 << (token % 64);
    }

    /// Tells whether a token is legal; tokens past [`MASK_BITS`] never are.
    pub fn contains(&self, token: Token) -> bool {
        self.0.get(usize::from(token) / 64).is_some_and(|word| word & (1 << (token % 64)) != 0)
    }

    /// Counts the legal tokens.
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Tells whether nothing is legal.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// Lists the legal tokens in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Token> + '_ {
        self.0.iter().enumerate().flat_map(|(word_index, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                if rest == 0 {
                    return None;
                }
                let bit = rest.trailing_zeros();
                rest &= rest - 1;
                Some((word_index * 64) as Token + bit as Token)
            })
        })
    }
}

impl FromIterator<Token> for ActionMask {
    fn from_iter<I: IntoIterator<Item = Token>>(tokens: I) -> ActionMask {
        let mut mask = ActionMask::default();
        tokens.into_iter().for_each(|token| mask.insert(token));
        mask
    }
}
