use std::sync::Arc;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::TokenId;

/// A set of tokens of a vocabulary of any size. It needs no heap memory if all tokens are below 256; copies of a larger one
/// share theirs.
///
/// ```
/// let set: proto::TokenSet = [3, 200, 49_151].into_iter().collect();
/// assert!(set.contains(200) && !set.contains(4));
/// assert_eq!(set.iter().collect::<Vec<_>>(), [3, 200, 49_151]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TokenSet(Words);

/// Bit `t % 64` of word `t / 64` stands for token `t`. Equal sets have equal words.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Words {
    Few([u64; NUM_FEW]),
    /// More of them, of which the last is not 0.
    Many(Arc<Vec<u64>>),
}

const NUM_FEW: usize = 4;

impl Default for TokenSet {
    fn default() -> TokenSet {
        TokenSet(Words::Few([0; NUM_FEW]))
    }
}

impl TokenSet {
    /// Adds a token.
    pub fn insert(&mut self, token: TokenId) {
        let (index, bit) = (token as usize / 64, 1 << (token % 64));
        match &mut self.0 {
            Words::Few(words) if index < NUM_FEW => words[index] |= bit,
            Words::Few(words) => {
                let mut words = words.to_vec();
                words.resize(index + 1, 0);
                words[index] |= bit;
                self.0 = Words::Many(Arc::new(words));
            }
            Words::Many(words) => {
                let words = Arc::make_mut(words);
                words.resize(words.len().max(index + 1), 0);
                words[index] |= bit;
            }
        }
    }

    /// Whether the set holds a token.
    pub fn contains(&self, token: TokenId) -> bool {
        self.words().get(token as usize / 64).is_some_and(|word| word & (1 << (token % 64)) != 0)
    }

    /// Returns the number of tokens.
    pub fn len(&self) -> usize {
        self.words().iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether the set holds no token.
    pub fn is_empty(&self) -> bool {
        self.words().iter().all(|word| *word == 0)
    }

    /// Returns the largest token.
    pub fn last(&self) -> Option<TokenId> {
        let words = self.words();
        let index = words.iter().rposition(|word| *word != 0)?;
        Some((64 * index) as TokenId + words[index].ilog2())
    }

    /// Lists the tokens in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = TokenId> + Clone + '_ {
        self.words().iter().enumerate().flat_map(|(word_index, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                if rest == 0 {
                    return None;
                }
                let bit = rest.trailing_zeros();
                rest &= rest - 1;
                Some((64 * word_index) as TokenId + bit)
            })
        })
    }

    fn words(&self) -> &[u64] {
        match &self.0 {
            Words::Few(words) => words,
            Words::Many(words) => words,
        }
    }
}

impl FromIterator<TokenId> for TokenSet {
    fn from_iter<I: IntoIterator<Item = TokenId>>(tokens: I) -> TokenSet {
        let mut set = TokenSet::default();
        tokens.into_iter().for_each(|token| set.insert(token));
        set
    }
}

impl Serialize for TokenSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let words = self.words();
        let num_words = words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
        words[..num_words].serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for TokenSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<TokenSet, D::Error> {
        // `Vec` does not trust a claimed length: its memory grows with the words that are present.
        let words = Vec::<u64>::deserialize(deserializer)?;
        match words.last() {
            Some(0) => Err(D::Error::custom("a set of tokens ends with a word that is not 0")),
            _ if words.len() > (TokenId::MAX / 64) as usize + 1 => {
                Err(D::Error::custom("a set holds tokens of 32 bits"))
            }
            _ if words.len() > NUM_FEW => Ok(TokenSet(Words::Many(Arc::new(words)))),
            _ => {
                let mut few = [0; NUM_FEW];
                few[..words.len()].copy_from_slice(&words);
                Ok(TokenSet(Words::Few(few)))
            }
        }
    }
}

/// The tokens that are legal at a choice.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LegalTokens {
    /// The whole vocabulary.
    Any,
    /// The tokens of a set.
    Only(TokenSet),
}

impl LegalTokens {
    /// Whether a token of the vocabulary may be chosen.
    pub fn contains(&self, token: TokenId) -> bool {
        match self {
            LegalTokens::Any => true,
            LegalTokens::Only(set) => set.contains(token),
        }
    }
}

impl FromIterator<TokenId> for LegalTokens {
    fn from_iter<I: IntoIterator<Item = TokenId>>(tokens: I) -> LegalTokens {
        LegalTokens::Only(tokens.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::wire;

    #[test]
    fn a_copy_keeps_its_tokens_when_the_other_grows() {
        for last in [9, 300] {
            let mut set: TokenSet = [2, last].into_iter().collect();
            let copy = set.clone();
            for more in [5, 400, 6_000] {
                set.insert(more);
            }
            assert_eq!(copy.iter().collect::<Vec<_>>(), [2, last]);
            assert_eq!(
                set.iter().collect::<Vec<_>>(),
                BTreeSet::from([2, last, 5, 400, 6_000]).into_iter().collect::<Vec<_>>()
            );
        }
    }

    #[test]
    fn equal_sets_have_equal_bytes_and_no_others_are_read() {
        let sets = [&[][..], &[0], &[63, 64], &[255], &[256, 3], &[49_151, 0]];
        for tokens in sets {
            let forward: TokenSet = tokens.iter().copied().collect();
            let backward: TokenSet = tokens.iter().rev().copied().collect();
            assert_eq!(forward, backward);
            let bytes = wire::encode(&forward);
            assert_eq!(bytes, wire::encode(&backward));
            assert_eq!(wire::decode::<TokenSet>(&bytes).unwrap(), forward);
            assert_eq!((forward.len(), forward.last()), (tokens.len(), tokens.iter().max().copied()));
            assert_eq!(forward.is_empty(), tokens.is_empty());
        }
        assert!(wire::decode::<TokenSet>(&wire::encode(&vec![1u64, 0])).is_err(), "a second spelling of {{0}}");
        let claims = [&wire::encode(&())[..], &[0xff, 0xff, 0xff, 0xff, 0x7f, 1]].concat();
        assert!(wire::decode::<TokenSet>(&claims).is_err(), "words that are not there");
    }
}
