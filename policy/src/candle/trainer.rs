use std::borrow::Cow;

use candle_core::backprop::GradStore;
use candle_core::{D, Device, Result, Tensor, Var};
use proto::{LegalTokens, TokenId};

use super::network::{Hidden, Projected, Rotary, attention, logits};
use crate::losses::LossPart;
use crate::{
    BatchScores, ChosenToken, Error, LossBatch, LossGrad, ModelConfig, OptimizerStep, Params, Sequence, TensorSpec,
    Trainer, TrainingState,
};

/// Trains with candle's autograd. Weights, moments and the average stay on the device.
pub(crate) struct CandleTrainer {
    config: ModelConfig,
    specs: Vec<TensorSpec>,
    weights: Vec<Var>,
    average: Vec<Tensor>,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
    num_updates: u64,
    rotary: Rotary,
    /// Passes that a batch is divided into, one after the other.
    num_shards: usize,
    gradient: Option<Vec<Tensor>>,
}

impl CandleTrainer {
    pub(crate) fn new(
        config: &ModelConfig,
        state: TrainingState,
        num_shards: usize,
        device: &Device,
    ) -> Result<CandleTrainer> {
        let specs = config.tensors();
        let place = |params: &Params| {
            let tensors = specs.iter().zip(&params.tensors);
            tensors
                .map(|(spec, values)| Tensor::from_slice(values, &spec.shape[..], device))
                .collect::<Result<Vec<_>>>()
        };
        Ok(CandleTrainer {
            config: config.clone(),
            weights: place(&state.weights)?.iter().map(Var::from_tensor).collect::<Result<_>>()?,
            average: place(&state.average)?,
            first: place(&state.first)?,
            second: place(&state.second)?,
            num_updates: state.num_updates,
            rotary: Rotary::new(config, device)?,
            num_shards,
            gradient: None,
            specs,
        })
    }

    fn device(&self) -> &Device {
        self.weights[0].device()
    }

    /// Returns log-probabilities `[M]` of chosen tokens among the legal ones, and entropies `[M]` over these, as functions of the
    /// weights.
    fn scores(&self, weights: &[Tensor], sequences: &[&Sequence]) -> Result<(Tensor, Tensor)> {
        let tokens: Vec<TokenId> = sequences.iter().flat_map(|sequence| &sequence.tokens).copied().collect();
        let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.tokens.len()).collect();
        let positions: Vec<u32> = lengths.iter().flat_map(|len| 0..*len as u32).collect();
        let packing = Packing::new(&self.config, &lengths, self.device())?;
        let (rows, choices) = chosen_rows(sequences);
        let attend = |layer, projected| packing.attend(packing.hidden.of(&self.config, layer), projected);
        let logits = logits(&self.config, weights, &self.rotary, (&tokens, &positions), &rows, attend)?;
        masked_scores(&logits, &choices)
    }

    /// Computes the gradient of a part's loss, and the scores that the loss depends on.
    fn part_gradients(&self, part: LossPart<'_>) -> std::result::Result<(BatchScores, Vec<Tensor>), Error> {
        let weights: Vec<Tensor> = self.weights.iter().map(|var| var.as_tensor().clone()).collect();
        let is_read: Vec<bool> = part.reads_entropies().collect();
        let (logprobs, entropies) = self.scores(&weights, part.sequences)?;
        let mut scores = BatchScores { logprobs: logprobs.to_vec1()?, entropies: vec![0.0; is_read.len()] };
        if is_read.contains(&true) {
            let computed: Vec<f32> = entropies.to_vec1()?;
            let read = computed.into_iter().zip(is_read).map(|(entropy, is_read)| if is_read { entropy } else { 0.0 });
            scores.entropies = read.collect();
        }
        // The sum of the scores, each times its derivative, has the gradient of the loss.
        let grads = part.grad(&scores);
        let column = |of: fn(&LossGrad) -> f32| Tensor::new(grads.iter().map(of).collect::<Vec<f32>>(), self.device());
        let mut sloped = (logprobs * column(|grad| grad.logprob)?)?;
        if grads.iter().any(|grad| grad.entropy != 0.0) {
            sloped = (sloped + (entropies * column(|grad| grad.entropy)?)?)?;
        }
        let mut gradients = sloped.sum_all()?.backward()?;
        Ok((scores, self.take(&mut gradients)?))
    }

    fn take(&self, gradients: &mut GradStore) -> std::result::Result<Vec<Tensor>, Error> {
        let take = |(spec, var): (&TensorSpec, &Var)| {
            let missing =
                || Error::Weights { expected: format!("a gradient of {}", spec.name), got: "none".to_owned() };
            Ok(gradients.remove(var).ok_or_else(missing)?.detach())
        };
        self.specs.iter().zip(&self.weights).map(take).collect()
    }
}

impl Trainer for CandleTrainer {
    fn logprobs(&self, sequences: &[&Sequence]) -> std::result::Result<Vec<f32>, Error> {
        let weights: Vec<Tensor> = self.weights.iter().map(Var::as_detached_tensor).collect();
        Ok(self.scores(&weights, sequences)?.0.to_vec1()?)
    }

    fn gradients(&mut self, batch: &LossBatch<'_>) -> std::result::Result<BatchScores, Error> {
        let (mut scores, mut sum) = (BatchScores::default(), None::<Vec<Tensor>>);
        for part in batch.parts(self.num_shards) {
            let (of_part, gradient) = self.part_gradients(part)?;
            scores.logprobs.extend(of_part.logprobs);
            scores.entropies.extend(of_part.entropies);
            sum = Some(match sum {
                Some(sum) => sum.iter().zip(&gradient).map(|(sum, part)| sum + part).collect::<Result<_>>()?,
                None => gradient,
            });
        }
        let zeros = || self.first.iter().map(Tensor::zeros_like).collect::<Result<_>>();
        self.gradient = Some(sum.map_or_else(zeros, Ok)?);
        Ok(scores)
    }

    fn step(&mut self, step: &OptimizerStep) -> std::result::Result<f64, Error> {
        let gradient = self.gradient.take().expect("a gradient to follow");
        let squares = gradient.iter().map(|gradient| gradient.sqr()?.sum_all()).collect::<Result<Vec<_>>>()?;
        let squares: Vec<f32> = Tensor::stack(&squares, 0)?.to_vec1()?;
        let norm = squares.iter().map(|square| f64::from(*square)).sum::<f64>().sqrt();
        if !norm.is_finite() {
            return Ok(norm);
        }
        let num_updates = self.num_updates + 1;
        let OptimizerStep { beta1, beta2, .. } = *step;
        let clip = (step.max_grad_norm / norm.max(1e-30)).min(1.0);
        let step_size = step.learning_rate / (1.0 - libm::pow(beta1, num_updates as f64));
        let inverse_root = 1.0 / (1.0 - libm::pow(beta2, num_updates as f64)).sqrt();
        let decay = step.decay_after(num_updates);
        for (index, gradient) in gradient.iter().enumerate() {
            let gradient = (gradient * clip)?;
            let (first, second, average) = (&self.first[index], &self.second[index], &self.average[index]);
            let first = ((first * beta1)? + (&gradient * (1.0 - beta1))?)?;
            let second = ((second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
            let decays = self.specs[index].shape.len() > 1;
            let keep = if decays { 1.0 - step.learning_rate * step.weight_decay } else { 1.0 };
            let moved = ((&first * step_size)? / ((second.sqrt()? * inverse_root)? + 1e-8)?)?;
            let weights = ((self.weights[index].as_detached_tensor() * keep)? - moved)?;
            self.average[index] = ((average * decay)? + (&weights * (1.0 - decay))?)?;
            self.weights[index].set(&weights)?;
            (self.first[index], self.second[index]) = (first, second);
        }
        self.num_updates = num_updates;
        Ok(norm)
    }

    fn num_updates(&self) -> u64 {
        self.num_updates
    }

    fn weights(&self) -> std::result::Result<Cow<'_, Params>, Error> {
        let weights: Vec<Tensor> = self.weights.iter().map(Var::as_detached_tensor).collect();
        Ok(Cow::Owned(to_params(&weights)?))
    }

    fn average(&self) -> std::result::Result<Cow<'_, Params>, Error> {
        Ok(Cow::Owned(to_params(&self.average)?))
    }

    fn export(&self) -> std::result::Result<Cow<'_, TrainingState>, Error> {
        Ok(Cow::Owned(TrainingState {
            weights: self.weights()?.into_owned(),
            average: to_params(&self.average)?,
            first: to_params(&self.first)?,
            second: to_params(&self.second)?,
            num_updates: self.num_updates,
        }))
    }
}

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

fn to_params(tensors: &[Tensor]) -> Result<Params> {
    let tensors = tensors.iter().map(|tensor| tensor.flatten_all()?.to_vec1()).collect::<Result<_>>()?;
    Ok(Params { tensors })
}
