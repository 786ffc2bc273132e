//! Draws tokens without copying all logits off the device. For a set of legal tokens, the logits of its members leave the device.
//! If any token is legal, sums over blocks of the vocabulary leave it, and then one block.

use candle_core::{D, Result, Tensor};
use proto::{LegalTokens, TokenId};

use crate::{Draw, sampler};

/// Tokens of a block: about the square root of a large vocabulary, so that transfers off the device are small.
const BLOCK: usize = 256;

/// Draws tokens after rows of `logits [feeds, V]`, as [`sampler::sample`] does from the same rows.
pub(super) fn sample(logits: &Tensor, draws: &mut [Draw<'_>]) -> Result<Vec<(TokenId, f32)>> {
    let (_, vocabulary_size) = logits.dims2()?;
    let mut drawn = vec![(0, 0.0); draws.len()];
    let (mut bounded, mut free) = (Vec::new(), Vec::new());
    for (number, draw) in draws.iter_mut().enumerate() {
        match draw.legal {
            LegalTokens::Only(set) => bounded.push((number, set, draw)),
            LegalTokens::Any => free.push((number, draw)),
        }
    }
    if !bounded.is_empty() {
        let members = bounded.iter().flat_map(|(_, set, draw)| {
            let start = draw.feed * vocabulary_size;
            set.iter().map(move |token| (start + token as usize) as u32)
        });
        let members = Tensor::new(members.collect::<Vec<u32>>(), logits.device())?;
        let members: Vec<f32> = logits.flatten_all()?.index_select(&members, 0)?.to_vec1()?;
        let mut rest = &members[..];
        for (number, set, draw) in bounded {
            let logits = rest.split_off(..set.len()).expect("a logit for each member");
            // The members, in order, act as a vocabulary of their own.
            let (index, logprob) = sampler::sample(logits, &any_of(logits), draw.temperature, draw.rng);
            let token = set.iter().nth(index as usize).expect("a member was drawn");
            drawn[number] = (token, logprob);
        }
    }
    if !free.is_empty() {
        let rows = Tensor::new(free.iter().map(|(_, draw)| draw.feed as u32).collect::<Vec<_>>(), logits.device())?;
        let (numbers, draws): (Vec<usize>, Vec<&mut Draw<'_>>) = free.into_iter().unzip();
        let tokens = sample_any(&logits.index_select(&rows, 0)?, draws)?;
        numbers.into_iter().zip(tokens).for_each(|(number, token)| drawn[number] = token);
    }
    Ok(drawn)
}

/// Returns all members as legal, or nothing if there are none, which [`sampler::sample`] refuses.
fn any_of(logits: &[f32]) -> LegalTokens {
    if logits.is_empty() { LegalTokens::Only(Default::default()) } else { LegalTokens::Any }
}

/// Draws among all tokens, from `logits [R, V]`.
fn sample_any(logits: &Tensor, draws: Vec<&mut Draw<'_>>) -> Result<Vec<(TokenId, f32)>> {
    let (num_rows, vocabulary_size) = logits.dims2()?;
    let device = logits.device();
    // At temperature 0, the log-probability is that at temperature 1.
    let inverse = draws.iter().map(|draw| if draw.temperature == 0.0 { 1.0 } else { 1.0 / draw.temperature });
    let inverse = Tensor::from_vec(inverse.collect::<Vec<f32>>(), (num_rows, 1), device)?;
    let scaled = logits.broadcast_mul(&inverse)?;
    let weights = scaled.broadcast_sub(&scaled.max_keepdim(D::Minus1)?)?.exp()?; // [R, V]
    let num_blocks = vocabulary_size.div_ceil(BLOCK);
    let blocks = weights.pad_with_zeros(1, 0, num_blocks * BLOCK - vocabulary_size)?;
    let blocks = blocks.reshape((num_rows * num_blocks, BLOCK))?;
    let sums: Vec<f32> = blocks.sum(1)?.to_vec1()?;
    let best: Vec<u32> = logits.argmax(D::Minus1)?.to_vec1()?;
    // For each row: the block of its token, the weight in the block before the token, and the weight of all tokens.
    let places = sums.chunks_exact(num_blocks).zip(draws).zip(&best).map(|((sums, draw), best)| {
        let total: f64 = sums.iter().map(|sum| f64::from(*sum)).sum();
        if draw.temperature == 0.0 {
            return Place { block: *best as usize / BLOCK, token: Some(*best as usize % BLOCK), threshold: 0.0, total };
        }
        let mut threshold = draw.rng.unit_f64() * total;
        let last = sums.iter().rposition(|sum| *sum > 0.0).expect("the largest weight is 1");
        for (block, sum) in sums[..last].iter().enumerate() {
            if f64::from(*sum) > threshold {
                return Place { block, token: None, threshold, total };
            }
            threshold -= f64::from(*sum);
        }
        Place { block: last, token: None, threshold, total }
    });
    let places: Vec<Place> = places.collect();
    let chosen = places.iter().enumerate().map(|(row, place)| (row * num_blocks + place.block) as u32);
    let chosen = Tensor::new(chosen.collect::<Vec<_>>(), device)?;
    let chosen: Vec<f32> = blocks.index_select(&chosen, 0)?.flatten_all()?.to_vec1()?;
    Ok(chosen.chunks_exact(BLOCK).zip(places).map(|(weights, place)| place.draw(weights)).collect())
}

/// The place in a row's vocabulary where a token is drawn.
struct Place {
    block: usize,
    /// The token in the block, if it is known.
    token: Option<usize>,
    /// Weight in the block before the token that is drawn.
    threshold: f64,
    /// Weight of all tokens.
    total: f64,
}

impl Place {
    fn draw(&self, weights: &[f32]) -> (TokenId, f32) {
        let first_above = || {
            let mut cumulative = 0.0;
            let is_drawn = |weight: &f32| {
                cumulative += f64::from(*weight);
                cumulative > self.threshold
            };
            let last = weights.iter().rposition(|weight| *weight > 0.0).unwrap_or(0);
            weights.iter().position(is_drawn).unwrap_or(last)
        };
        let token = self.token.unwrap_or_else(first_above);
        let logprob = libm::log(f64::from(weights[token]) / self.total);
        ((self.block * BLOCK + token) as TokenId, logprob as f32)
    }
}
