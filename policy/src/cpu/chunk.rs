//! Sequences as packed rows. Rows that several sequences begin with are packed once, as in Prefix Grouper (Liu et al. 2025, arXiv
//! 2506.05433): many answers to one prompt cost little more than their own tokens.

use proto::TokenId;

use super::kernels::Segment;
use crate::{ChosenToken, Sequence};

/// Fewest rows that sequences share. A shared row adds up the gradients of its sequences before those of the weights, so it
/// changes their last bits, and makes them depend on where chunks end. Short prompts, as countdown's in symbols, gain little.
const MIN_SHARED: usize = 24;

/// Some sequences, as packed rows.
pub(super) struct Chunk<'a> {
    pub(super) tokens: Vec<TokenId>,
    pub(super) segments: Vec<Segment>,
    /// Rows that predict chosen tokens, ascending.
    pub(super) chosen_rows: Vec<usize>,
    /// Sequence after sequence.
    pub(super) choices: Vec<Choice<'a>>,
}

/// A chosen token.
pub(super) struct Choice<'a> {
    pub(super) chosen: &'a ChosenToken,
    /// Index in the chosen rows. The first tokens of several answers may have the same.
    pub(super) index: usize,
}

impl<'a> Chunk<'a> {
    pub(super) fn new(sequences: &[&'a Sequence]) -> Chunk<'a> {
        let mut prefixes = Prefixes::default();
        sequences.iter().for_each(|sequence| prefixes.insert(sequence));
        let (mut tokens, mut segments) = (Vec::new(), Vec::new());
        // The rows of the positions of a sequence.
        let mut path = Vec::new();
        let mut rows_by_sequence = vec![Vec::new(); sequences.len()];
        for Ordered { sequence, number, num_shared } in prefixes.ordered {
            let own = &sequence.tokens[num_shared..];
            path.truncate(num_shared);
            path.extend((tokens.len()..).take(own.len()));
            tokens.extend(own);
            segments.push(Segment { start: num_shared, num_rows: own.len() });
            rows_by_sequence[number] = sequence.chosen.iter().map(|chosen| path[chosen.row]).collect();
        }
        let rows = rows_by_sequence.concat();
        let mut chosen_rows = rows.clone();
        chosen_rows.sort_unstable();
        chosen_rows.dedup();
        let choice = |(chosen, row): (&'a ChosenToken, usize)| Choice {
            chosen,
            index: chosen_rows.binary_search(&row).expect("the row of a choice"),
        };
        let choices = sequences.iter().flat_map(|sequence| &sequence.chosen).zip(rows).map(choice).collect();
        Chunk { tokens, segments, chosen_rows, choices }
    }

    /// Returns the position of each row in its sequences.
    pub(super) fn positions(&self) -> impl Iterator<Item = usize> {
        self.segments.iter().flat_map(|segment| segment.start..segment.end())
    }
}

/// How many rows a chunk may have.
#[derive(Clone, Copy)]
pub(super) struct MaxRows {
    /// Of any sequences.
    pub(super) of_any: usize,
    /// As long as sequences share most of their rows with others of the chunk: the next chunk would compute these again.
    pub(super) of_shared: usize,
}

/// Returns a function that takes sequences and returns whether they fit in a chunk with all that it took before.
pub(super) fn fits<'a>(max_rows: MaxRows) -> impl FnMut(&[&'a Sequence]) -> bool {
    let mut prefixes = Prefixes::default();
    move |sequences| {
        let num_before = prefixes.num_rows;
        sequences.iter().for_each(|sequence| prefixes.insert(sequence));
        let num_tokens: usize = sequences.iter().map(|sequence| sequence.tokens.len()).sum();
        let is_shared = 2 * (prefixes.num_rows - num_before) <= num_tokens;
        prefixes.num_rows <= if is_shared { max_rows.of_shared } else { max_rows.of_any }
    }
}

/// Sequences, each after the one that it shares most with.
#[derive(Default)]
struct Prefixes<'a> {
    ordered: Vec<Ordered<'a>>,
    num_rows: usize,
}

struct Ordered<'a> {
    sequence: &'a Sequence,
    /// How many were inserted before.
    number: usize,
    /// How many of its first rows are those of the sequence before it in the order.
    num_shared: usize,
}

impl<'a> Prefixes<'a> {
    /// Inserts a sequence after the last one of those that it shares most with. The next one shares less with both of them, and so
    /// the same rows with either. Sequences that share nothing stay in the order in which they were inserted.
    fn insert(&mut self, sequence: &'a Sequence) {
        let shared = self.ordered.iter().map(|other| num_shared(&sequence.tokens, &other.sequence.tokens));
        let most = shared.enumerate().max_by_key(|(_, num_shared)| *num_shared);
        let (place, num_shared) = most.map_or((0, 0), |(place, num_shared)| (place + 1, num_shared));
        self.num_rows += sequence.tokens.len() - num_shared;
        self.ordered.insert(place, Ordered { sequence, number: self.ordered.len(), num_shared });
    }
}

fn num_shared(left: &[TokenId], right: &[TokenId]) -> usize {
    let num_equal = left.iter().zip(right).take_while(|(left, right)| left == right).count();
    if num_equal < MIN_SHARED { 0 } else { num_equal }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::LegalTokens;

    use super::*;

    fn sequence(tokens: &[TokenId]) -> Sequence {
        let chosen = |row: usize| ChosenToken { row, target: row as TokenId, legal: LegalTokens::Any };
        Sequence { tokens: tokens.to_vec(), chosen: (0..tokens.len()).filter(|row| row % 3 == 1).map(chosen).collect() }
    }

    /// By hand: of sequences with 30 tokens, one has 30 rows of its own, one that shares 24 has 6, and one that shares none has 30.
    #[test]
    fn sequences_that_share_most_rows_fit_longer() {
        let with = |first: TokenId, last: TokenId| {
            sequence(&(first..first + 24).chain(100 * last..100 * last + 6).collect::<Vec<_>>())
        };
        let (first, second, third, other) = (with(0, 1), with(0, 2), with(0, 3), with(50, 1));
        let fitting = |sequences: &[&Sequence]| {
            let mut fits = fits(MaxRows { of_any: 35, of_shared: 42 });
            sequences.iter().take_while(|sequence| fits(std::slice::from_ref(*sequence))).count()
        };
        assert_eq!(fitting(&[&first, &second, &third]), 3);
        assert_eq!(fitting(&[&first, &second, &third, &with(0, 4)]), 3);
        assert_eq!(fitting(&[&first, &other]), 1);
        // Half of these tokens have no rows of their own, but together they have more than the first limit allows.
        assert_eq!(fitting(&[&first, &second, &other]), 2);
    }

    /// By hand: 24 rows are shared by three sequences, and 26 by two of them; 23 are not.
    #[test]
    fn a_chunk_has_every_prefix_once() {
        let prompt: Vec<TokenId> = (0..24).collect();
        let with = |rest: &[TokenId]| sequence(&[&prompt[..], rest].concat());
        let sequences =
            [with(&[50, 51, 52]), sequence(&[&prompt[..23], &[7]].concat()), with(&[60]), with(&[50, 51, 53])];
        let chunk = Chunk::new(&sequences.each_ref());
        let segments = [(0, 27), (26, 1), (24, 1), (0, 24)];
        assert_eq!(chunk.segments, segments.map(|(start, num_rows)| Segment { start, num_rows }));
        assert_eq!(chunk.tokens[24..29], [50, 51, 52, 53, 60]);
        // The first and the last choose after the same rows: what differs is their last token, which no choice follows.
        let rows = |choices: &[Choice<'_>]| choices.iter().map(|choice| choice.index).collect::<Vec<_>>();
        let num_chosen = sequences[0].chosen.len();
        let (first, rest) = chunk.choices.split_at(num_chosen);
        assert_eq!(rows(first), rows(&rest[rest.len() - num_chosen..]));
    }

    proptest! {
        /// Every sequence finds its own tokens at its positions, and no row is there twice.
        #[test]
        fn paths_are_the_sequences(
            // Tails of a few prompts, so that they share prefixes of many lengths.
            parts in prop::collection::vec((0u32..3, 0usize..50, prop::collection::vec(0u32..2, 0..5)), 0..30),
        ) {
            let sequences: Vec<Sequence> = parts
                .iter()
                .map(|(prompt, len, tail)| {
                    let token = |position: u32| 10 + if position < 25 { position } else { position * prompt };
                    let prompt = (0..*len as u32).map(token);
                    sequence(&prompt.chain(tail.iter().copied()).collect::<Vec<_>>())
                })
                .collect();
            let chunk = Chunk::new(&sequences.iter().collect::<Vec<_>>());
            let (mut path, mut paths, mut next) = (Vec::new(), Vec::new(), 0);
            for segment in &chunk.segments {
                prop_assert!(segment.start <= path.len() && (segment.start == 0 || segment.start >= MIN_SHARED));
                path.truncate(segment.start);
                path.extend(next..next + segment.num_rows);
                next += segment.num_rows;
                paths.push(path.clone());
            }
            prop_assert_eq!(next, chunk.tokens.len());
            let tokens = |path: &Vec<usize>| path.iter().map(|row| chunk.tokens[*row]).collect::<Vec<_>>();
            let mut got: Vec<_> = paths.iter().map(tokens).collect();
            let mut expected: Vec<_> = sequences.iter().map(|sequence| sequence.tokens.clone()).collect();
            got.sort();
            expected.sort();
            prop_assert_eq!(got, expected);
            // A prefix that is long enough has one row for its last token.
            let distinct: std::collections::BTreeSet<_> = sequences
                .iter()
                .flat_map(|sequence| (MIN_SHARED..=sequence.tokens.len()).map(|len| &sequence.tokens[..len]))
                .collect();
            let num_deep = chunk.positions().filter(|position| position + 1 >= MIN_SHARED).count();
            prop_assert_eq!(num_deep, distinct.len());
            // Choices are in the order of the sequences, at the rows that hold their tokens.
            let mut choices = chunk.choices.iter();
            for sequence in &sequences {
                for chosen in &sequence.chosen {
                    let choice = choices.next().unwrap();
                    prop_assert_eq!(choice.chosen, chosen);
                    prop_assert_eq!(chunk.tokens[chunk.chosen_rows[choice.index]], sequence.tokens[chosen.row]);
                }
            }
            let mut all = fits(MaxRows { of_any: chunk.tokens.len(), of_shared: chunk.tokens.len() });
            prop_assert!(all(&sequences.iter().collect::<Vec<_>>()));
        }
    }
}
