//! The network in plain candle operations, with candle's autograd: for devices that have no kernels, and the reference
//! that the kernels are held to.
//!
//! Candle's own `softmax_last_dim`, `rms_norm` and `rope` are avoided: they silently give no gradient (candle issues 2168,
//! 3568, 3752).

use candle_core::{D, Device, Result, Tensor, Var};
use candle_nn::ops::{rms_norm_slow, softmax, swiglu};
use candle_nn::rotary_emb::rope_slow;
use proto::TokenId;

use crate::kernels::{AttentionShape, RMS_EPSILON, RotaryTable};
use crate::model::{ChosenToken, Scores, Sequence};
use crate::objective::{MAX_LOG_RATIO, MAX_PROXIMAL_WEIGHT, Objective, PolicyGradient};
use crate::{Error, ModelConfig, Params};

/// Log-probabilities of all chosen tokens.
pub(crate) fn logprobs(
    config: &ModelConfig,
    device: &Device,
    params: &Params,
    sequences: &[&Sequence],
) -> Result<Vec<f32>> {
    let specs = config.tensors();
    let load = |(spec, values): (&crate::TensorSpec, &Vec<f32>)| Tensor::from_slice(values, &spec.shape[..], device);
    let tensors = specs.iter().zip(&params.tensors).map(load).collect::<Result<Vec<_>>>()?;
    let (logprobs, _) = forward(config, device, &tensors, sequences)?;
    logprobs.to_vec1()
}

/// Scores of all chosen tokens, and the gradient of the loss.
pub(crate) fn gradients(
    config: &ModelConfig,
    device: &Device,
    params: &Params,
    sequences: &[&Sequence],
    objectives: &[Objective],
) -> std::result::Result<(Scores, Params), Error> {
    let specs = config.tensors();
    let load = |(spec, values): (&crate::TensorSpec, &Vec<f32>)| Var::from_slice(values, &spec.shape[..], device);
    let vars = specs.iter().zip(&params.tensors).map(load).collect::<Result<Vec<_>>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let (logprobs, entropies) = forward(config, device, &tensors, sequences)?;
    let mut gradients = loss(&logprobs, &entropies, sequences, objectives)?.backward()?;
    let take = |(spec, var): (&crate::TensorSpec, &Var)| {
        let missing = || Error::Weights { expected: format!("a gradient of {}", spec.name), got: "none".to_owned() };
        Ok::<_, Error>(gradients.remove(var).ok_or_else(missing)?.flatten_all()?.to_vec1()?)
    };
    let tensors = specs.iter().zip(&vars).map(take).collect::<std::result::Result<_, _>>()?;
    Ok((Scores { logprobs: logprobs.to_vec1()?, entropies: entropies.to_vec1()? }, Params { tensors }))
}

/// The loss of every chosen token `[M]`, from its log-probability and entropy `[M]`.
fn loss(logprobs: &Tensor, entropies: &Tensor, sequences: &[&Sequence], objectives: &[Objective]) -> Result<Tensor> {
    let chosen = |sequence: &Sequence| 0..sequence.chosen.len();
    let tokens = sequences.iter().zip(objectives);
    let tokens = tokens.flat_map(|(sequence, objective)| chosen(sequence).map(move |index| (objective, index)));
    // Tokens of the other objective weigh 0.
    let column = |of_cross_entropy: fn(f32) -> f32, of_policy_gradient: fn(&PolicyGradient, usize) -> f32| {
        let values = tokens.clone().map(|(objective, index)| match objective {
            Objective::CrossEntropy { weight } => of_cross_entropy(*weight),
            Objective::PolicyGradient(objective) => of_policy_gradient(objective, index),
        });
        Tensor::from_vec(values.collect::<Vec<f32>>(), logprobs.dims1()?, logprobs.device())
    };
    let cross_entropy_weight = column(|weight| weight, |_, _| 0.0)?;
    let policy_gradient_weight = column(|_| 0.0, |objective, _| objective.weight)?;
    let advantage = column(|_| 0.0, |objective, _| objective.advantage)?;
    let behavior_logprobs = column(|_| 0.0, |objective, index| objective.behavior_logprobs[index])?;
    let lowest = column(|_| 1.0, |objective, _| 1.0 - objective.clip_low)?;
    let highest = column(|_| 1.0, |objective, _| 1.0 + objective.clip_high)?;
    let entropy_bonus = column(|_| 0.0, |objective, _| objective.entropy_bonus)?;
    let proximal = column(|_| 0.0, |objective, index| objective.proximal[index])?;
    let floor = column(|_| f32::MIN, |objective, _| objective.lowest())?;
    let log_ratio = (logprobs - behavior_logprobs)?.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)?;
    // The way to the proximal policy is a constant to the gradient, so the whole slope is on the rest of it.
    let ahead = log_ratio.detach();
    let behind = (&ahead * &proximal)?;
    let weight = behind.exp()?.minimum(MAX_PROXIMAL_WEIGHT)?;
    let ratio = (&log_ratio - &behind)?.exp()?;
    let clipped = ratio.maximum(&lowest)?.minimum(&highest)?;
    let surrogate = (ratio * &advantage)?.minimum(&(clipped * advantage)?)?.maximum(&floor)?;
    let rewarded = ((surrogate * weight)? + (entropies * entropy_bonus)?)?;
    (logprobs * cross_entropy_weight)?.add(&(rewarded * policy_gradient_weight)?)?.neg()
}

/// Log-probabilities and entropies `[M]`. The whole network, top to bottom.
fn forward(
    config: &ModelConfig,
    device: &Device,
    weights: &[Tensor],
    sequences: &[&Sequence],
) -> Result<(Tensor, Tensor)> {
    let tokens: Vec<TokenId> = sequences.iter().flat_map(|sequence| &sequence.tokens).copied().collect();
    let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.tokens.len()).collect();
    let rotary = RotaryTable::new(config.max_positions, config.head_dim());
    let num_rows = tokens.len();
    let mut weights = weights.iter();
    let mut next = || weights.next().expect("one tensor for each of the config's specs");
    let norm = |x: &Tensor, weight: &Tensor| rms_norm_slow(x, weight, RMS_EPSILON);
    let mut x = next().index_select(&Tensor::from_vec(tokens, num_rows, device)?, 0)?; // [N, D]
    for _ in 0..config.num_layers {
        let qkv = norm(&x, next())?.matmul(next())?;
        x = (x + attention(&qkv, config.attention_shape(), &rotary, &lengths)?.matmul(next())?)?;
        let gate_up = norm(&x, next())?.matmul(next())?;
        x = (x + swiglu(&gate_up)?.matmul(next())?)?;
    }
    let (rows, choices) = chosen_rows(sequences);
    let num_chosen = rows.len();
    let chosen = x.index_select(&Tensor::from_vec(rows, num_chosen, device)?, 0)?; // [M, D]
    let logits = norm(&chosen, next())?.matmul(next())?; // [M, V]
    masked_scores(&logits, &choices)
}

/// Causal attention over packed sequences, one after another: `qkv [N, qkv_dim]` to `[N, D]`. B sequences are padded to the
/// longest, T; nothing that counts attends to padding, which comes last.
fn attention(qkv: &Tensor, shape: AttentionShape, rotary: &RotaryTable, lengths: &[usize]) -> Result<Tensor> {
    let (_, dim) = qkv.dims2()?;
    let AttentionShape { num_heads, num_kv_heads, head_dim } = shape;
    let device = qkv.device();
    let (batch, longest) = (lengths.len(), lengths.iter().copied().max().unwrap_or(0));
    let (mut padded, mut packed, mut start) = (Vec::<u32>::new(), Vec::<u32>::new(), 0);
    for (sequence, len) in lengths.iter().enumerate() {
        padded.extend((0..longest).map(|position| if position < *len { (start + position) as u32 } else { 0 }));
        packed.extend((0..*len).map(|position| (sequence * longest + position) as u32));
        start += len;
    }
    let rows = qkv.index_select(&Tensor::new(padded, device)?, 0)?;
    let heads = rows.reshape((batch, longest, dim / head_dim, head_dim))?.transpose(1, 2)?; // [B, heads, T, head_dim]
    let split = |from: usize, count: usize| heads.narrow(1, from, count)?.contiguous();
    let (cosines, sines): (Vec<&[f32]>, Vec<&[f32]>) = (0..longest).map(|position| rotary.at(position)).unzip();
    let table = |rows: Vec<&[f32]>| Tensor::from_vec(rows.concat(), (longest, head_dim / 2), device);
    let (cosines, sines) = (table(cosines)?, table(sines)?);
    let repeat = |x: Tensor| {
        let per_head = num_heads / num_kv_heads;
        let repeated = x.unsqueeze(2)?.broadcast_as((batch, num_kv_heads, per_head, longest, head_dim))?;
        repeated.reshape((batch, num_heads, longest, head_dim))
    };
    let queries = rope_slow(&split(0, num_heads)?, &cosines, &sines)?;
    let keys = repeat(rope_slow(&split(num_heads, num_kv_heads)?, &cosines, &sines)?)?;
    let values = repeat(split(num_heads + num_kv_heads, num_kv_heads)?)?;
    let future = (0..longest * longest).map(|index| if index % longest > index / longest { -1e9f32 } else { 0.0 });
    let future = Tensor::from_vec(future.collect::<Vec<_>>(), (longest, longest), device)?;
    let scores = (queries.matmul(&keys.t()?)? * (1.0 / (head_dim as f64).sqrt()))?.broadcast_add(&future)?;
    let out = softmax(&scores, D::Minus1)?.matmul(&values)?.transpose(1, 2)?; // [B, T, heads, head_dim]
    out.reshape((batch * longest, num_heads * head_dim))?.index_select(&Tensor::new(packed, device)?, 0)
}

/// Log-probabilities `[M]` of chosen tokens among the legal ones, and entropies `[M]` over these, from `logits [M, V]`.
fn masked_scores(logits: &Tensor, choices: &[&ChosenToken]) -> Result<(Tensor, Tensor)> {
    let (rows, vocabulary) = logits.dims2()?;
    let illegal = choices.iter().flat_map(|chosen| {
        (0..vocabulary as TokenId).map(|token| if chosen.legal.contains(token) { 0.0f32 } else { -1e9 })
    });
    let illegal = Tensor::from_vec(illegal.collect::<Vec<_>>(), (rows, vocabulary), logits.device())?;
    let targets: Vec<u32> = choices.iter().map(|chosen| chosen.target).collect();
    let masked = (logits + illegal)?;
    let logprobs = masked.broadcast_sub(&masked.log_sum_exp(D::Minus1)?.unsqueeze(1)?)?;
    let chosen = logprobs.gather(&Tensor::from_vec(targets, (rows, 1), logits.device())?, 1)?.squeeze(1)?;
    let entropies = (logprobs.exp()? * logprobs)?.sum(D::Minus1)?.neg()?;
    Ok((chosen, entropies))
}

/// The rows, among those of all sequences, that predict chosen tokens.
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
