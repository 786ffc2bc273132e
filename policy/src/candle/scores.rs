//! Log-probabilities and entropies of chosen tokens.

use std::slice;

use candle_core::{D, Device, Result, Tensor};
use proto::{LegalTokens, TokenId};

use super::network::{Hidden, Projected, Rotary, attention, logits};
use crate::{ChosenToken, ModelConfig, Sequence};

/// Computes log-probabilities `[M]` of chosen tokens among the legal ones, and entropies `[M]` over these, as functions of the
/// weights.
pub(super) fn scores(
    config: &ModelConfig,
    weights: (&[Tensor], &[Tensor]),
    rotary: &Rotary,
    sequences: &[&Sequence],
) -> Result<(Tensor, Tensor)> {
    let tokens: Vec<TokenId> = sequences.iter().flat_map(|sequence| &sequence.tokens).copied().collect();
    let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.tokens.len()).collect();
    let positions: Vec<u32> = lengths.iter().flat_map(|len| 0..*len as u32).collect();
    let packing = Packing::new(config, &lengths, weights.0[0].device())?;
    let (rows, choices) = chosen_rows(sequences);
    let attend = |layer, projected| packing.attend(packing.hidden.of(config, layer), projected);
    let logits = logits(config, weights, rotary, (&tokens, &positions), &rows, attend)?;
    masked_scores(&logits, &choices)
}

/// Computes the log-probability of every chosen token, in passes of at most `max_rows` rows or one sequence.
pub(super) fn logprobs(
    config: &ModelConfig,
    weights: (&[Tensor], &[Tensor]),
    rotary: &Rotary,
    max_rows: usize,
    sequences: &[&Sequence],
) -> Result<Vec<f32>> {
    let (mut logprobs, mut rest) = (Vec::new(), sequences);
    while !rest.is_empty() {
        let mut fits = fits(max_rows);
        let num_sequences = rest.iter().take_while(|sequence| fits(slice::from_ref(*sequence))).count().max(1);
        let (pass, later) = rest.split_at(num_sequences);
        logprobs.extend(scores(config, weights, rotary, pass)?.0.to_vec1::<f32>()?);
        rest = later;
    }
    Ok(logprobs)
}

/// Returns a function that takes sequences and returns whether all that it took so far have at most `max_rows` rows, each padded to
/// the longest.
pub(super) fn fits(max_rows: usize) -> impl FnMut(&[&Sequence]) -> bool {
    let (mut num_sequences, mut longest) = (0, 0);
    move |sequences| {
        num_sequences += sequences.len();
        longest = sequences.iter().map(|sequence| sequence.tokens.len()).fold(longest, usize::max);
        num_sequences * longest <= max_rows
    }
}

/// Returns the rows of a pass, so that what autograd keeps of them takes about [`PASS_BYTES`].
pub(super) fn pass_rows(config: &ModelConfig) -> usize {
    let shape = config.attention_shape(0);
    // Counted in `network::logits` and `masked_scores`: norms and residuals, heads and their rotations, products of attention, MLP.
    let layer =
        14 * config.d_model + 10 * shape.qkv_dim() + 6 * config.num_heads * config.max_positions + 8 * config.ff_dim;
    let row_bytes = size_of::<f32>() * (config.num_layers * layer + 5 * config.vocabulary_size);
    (PASS_BYTES / row_bytes).max(1)
}

/// Memory for the activations of a pass.
const PASS_BYTES: usize = 8 << 30;

/// B packed sequences, padded to the longest, T, for attention. Padding comes last, so that no real row attends to it.
struct Packing {
    /// The row at each place of `[B, T]`, any row at places of padding.
    padded: Tensor,
    /// The place of each row.
    places: Tensor,
    hidden: Hidden,
    batch: usize,
    longest: usize,
}

impl Packing {
    fn new(config: &ModelConfig, lengths: &[usize], device: &Device) -> Result<Packing> {
        let (batch, longest) = (lengths.len(), lengths.iter().copied().max().unwrap_or(0));
        let (mut padded, mut places, mut start) = (Vec::<u32>::new(), Vec::<u32>::new(), 0);
        for (sequence, len) in lengths.iter().enumerate() {
            padded.extend((0..longest).map(|position| if position < *len { (start + position) as u32 } else { 0 }));
            places.extend((0..*len).map(|position| (sequence * longest + position) as u32));
            start += len;
        }
        let hidden = Hidden::new(config, (0..longest as u32).collect(), (1, longest), longest, device)?;
        let (padded, places) = (Tensor::new(padded, device)?, Tensor::new(places, device)?);
        Ok(Packing { padded, places, hidden, batch, longest })
    }

    fn attend(&self, hidden: &Tensor, Projected { queries, keys, values }: Projected) -> Result<Tensor> {
        let heads = |x: Tensor| {
            let (num_rows, num_heads, head_dim) = x.dims3()?;
            let padded = x.reshape((num_rows, num_heads * head_dim))?.index_select(&self.padded, 0)?;
            padded.reshape((self.batch, self.longest, num_heads, head_dim))?.transpose(1, 2)?.contiguous()
        };
        let out = attention(&heads(queries)?, &heads(keys)?, &heads(values)?, hidden)?;
        let (batch, longest, width) = out.dims3()?;
        out.reshape((batch * longest, width))?.index_select(&self.places, 0)
    }
}

/// Computes log-probabilities `[M]` of chosen tokens among the legal ones, and entropies `[M]` over these, from `logits [M, V]`.
fn masked_scores(logits: &Tensor, choices: &[&ChosenToken]) -> Result<(Tensor, Tensor)> {
    let (num_rows, vocabulary_size) = logits.dims2()?;
    let device = logits.device();
    let mut masked = logits.clone();
    if choices.iter().any(|chosen| chosen.legal != LegalTokens::Any) {
        let illegal = choices.iter().flat_map(|chosen| {
            let tokens = 0..vocabulary_size as TokenId;
            tokens.map(|token| if chosen.legal.contains(token) { 0.0f32 } else { -1e9 })
        });
        let illegal = Tensor::from_vec(illegal.collect::<Vec<_>>(), (num_rows, vocabulary_size), device)?;
        masked = (logits + illegal)?;
    }
    let targets: Vec<u32> = choices.iter().map(|chosen| chosen.target).collect();
    let logprobs = masked.broadcast_sub(&masked.log_sum_exp(D::Minus1)?.unsqueeze(1)?)?;
    let chosen = logprobs.gather(&Tensor::from_vec(targets, (num_rows, 1), device)?, 1)?.squeeze(1)?;
    let entropies = (logprobs.exp()? * logprobs)?.sum(D::Minus1)?.neg()?;
    Ok((chosen, entropies))
}

/// Returns the rows, among those of all sequences, that predict chosen tokens, and these tokens.
fn chosen_rows<'a>(sequences: &[&'a Sequence]) -> (Vec<u32>, Vec<&'a ChosenToken>) {
    let (mut rows, mut choices, mut start) = (Vec::new(), Vec::new(), 0);
    for sequence in sequences {
        for chosen in &sequence.chosen {
            rows.push((start + chosen.row) as u32);
            choices.push(chosen);
        }
        start += sequence.tokens.len();
    }
    (rows, choices)
}
