use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use proto::{ActionMask, Token};

use crate::kernels::{AttentionShape, RotaryTable};
use crate::ops::Ops;
use crate::{Error, ModelConfig, Params};

/// A sequence to score: prompt and answer as far as the last chosen token needs them.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Input tokens.
    pub tokens: Vec<Token>,
    /// The tokens that were chosen, in order.
    pub chosen: Vec<ChosenToken>,
}

/// A chosen token of a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChosenToken {
    /// The input position whose output predicts it.
    pub row: usize,
    /// What was chosen.
    pub target: Token,
    /// What was legal.
    pub mask: ActionMask,
}

impl Sequence {
    /// Builds a sequence from a prompt and the chosen (position, mask) pairs of an answer; the tokens after the last
    /// choice predict nothing and are left out.
    pub fn new(prompt: &[Token], answer: &[Token], choices: impl Iterator<Item = (usize, ActionMask)>) -> Sequence {
        let chosen: Vec<ChosenToken> = choices
            .map(|(position, mask)| ChosenToken { row: prompt.len() + position - 1, target: answer[position], mask })
            .collect();
        let needed = chosen.last().map_or(0, |last| last.row + 1);
        let tokens = prompt.iter().chain(answer).take(needed).copied().collect();
        Sequence { tokens, chosen }
    }
}

/// Sequences and how much each chosen token counts.
#[derive(Clone, Debug, Default)]
pub struct TrainBatch<'a> {
    /// The sequences.
    pub sequences: Vec<&'a Sequence>,
    /// One weight a sequence, for each of its chosen tokens.
    pub weights: Vec<f32>,
}

/// The network as a differentiable function.
#[derive(Clone, Debug)]
pub struct Model {
    config: ModelConfig,
    shape: AttentionShape,
    rotary: Arc<RotaryTable>,
    device: Device,
    ops: Ops,
}

impl Model {
    /// Prepares the network, with the kernels on the CPU and plain candle operations elsewhere.
    ///
    /// # Errors
    /// [`Error::Config`] when the shape is none.
    pub fn new(config: &ModelConfig, device: Device) -> Result<Model, Error> {
        let fused = device.is_cpu();
        Model::with_ops(config, device, Ops { fused })
    }

    /// Prepares the network in plain candle operations on any device: the reference for the kernels.
    ///
    /// # Errors
    /// [`Error::Config`] when the shape is none.
    pub fn plain(config: &ModelConfig, device: Device) -> Result<Model, Error> {
        Model::with_ops(config, device, Ops { fused: false })
    }

    fn with_ops(config: &ModelConfig, device: Device, ops: Ops) -> Result<Model, Error> {
        config.validate()?;
        let shape = config.attention_shape();
        let rotary = Arc::new(RotaryTable::new(config.max_positions, config.head_dim()));
        Ok(Model { config: config.clone(), shape, rotary, device, ops })
    }

    /// Gives the network's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Computes the log-probability of every chosen token, sequence after sequence.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    pub fn logprobs(&self, params: &Params, sequences: &[&Sequence]) -> Result<Vec<f32>, Error> {
        let specs = self.config.tensors();
        let tensors: Vec<Tensor> = specs
            .iter()
            .zip(&params.tensors)
            .map(|(spec, values)| Tensor::from_slice(values, &spec.shape[..], &self.device))
            .collect::<Result<_, _>>()?;
        Ok(self.forward(&tensors, sequences)?.to_vec1()?)
    }

    /// Computes the gradient of `-sum(weight * logprob)` over all chosen tokens.
    ///
    /// Returns the log-probabilities as [`Model::logprobs`] does, and the gradient.
    ///
    /// # Errors
    /// [`Error::Tensor`]; [`Error::Weights`] when some weight got no gradient.
    pub fn gradients(&self, params: &Params, batch: &TrainBatch<'_>) -> Result<(Vec<f32>, Params), Error> {
        let specs = self.config.tensors();
        let vars: Vec<Var> = specs
            .iter()
            .zip(&params.tensors)
            .map(|(spec, values)| Var::from_slice(values, &spec.shape[..], &self.device))
            .collect::<Result<_, _>>()?;
        let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let logprobs = self.forward(&tensors, &batch.sequences)?;
        let weights = batch.sequences.iter().zip(&batch.weights);
        let weights: Vec<f32> = weights.flat_map(|(sequence, weight)| sequence.chosen.iter().map(|_| -*weight)).collect();
        let num_chosen = weights.len();
        let weights = Tensor::from_vec(weights, num_chosen, &self.device)?;
        let mut gradients = logprobs.mul(&weights)?.backward()?;
        let take = |(spec, var): (&crate::TensorSpec, &Var)| {
            let gradient = gradients.remove(var).ok_or_else(|| Error::Weights {
                expected: format!("a gradient of {}", spec.name),
                got: "none".to_owned(),
            })?;
            Ok::<_, Error>(gradient.flatten_all()?.to_vec1()?)
        };
        let tensors = specs.iter().zip(&vars).map(take).collect::<Result<_, _>>()?;
        Ok((logprobs.to_vec1()?, Params { tensors }))
    }

    /// Log-probabilities `[M]`. The whole network, top to bottom.
    fn forward(&self, weights: &[Tensor], sequences: &[&Sequence]) -> Result<Tensor, Error> {
        let tokens: Vec<u32> = sequences.iter().flat_map(|sequence| &sequence.tokens).map(|token| u32::from(*token)).collect();
        let lengths = Arc::new(sequences.iter().map(|sequence| sequence.tokens.len()).collect::<Vec<_>>());
        let (num_rows, ops) = (tokens.len(), self.ops);
        let mut weights = weights.iter();
        let mut next = || weights.next().expect("one tensor for each of the config's specs");
        let mut x = next().index_select(&Tensor::from_vec(tokens, num_rows, &self.device)?, 0)?; // [N, D]
        for _ in 0..self.config.num_layers {
            let qkv = ops.linear(&ops.rms_norm(&x, next())?, next())?;
            let attended = ops.attention(&qkv, self.shape, &self.rotary, &lengths)?;
            x = (x + ops.linear(&attended, next())?)?;
            let gate_up = ops.linear(&ops.rms_norm(&x, next())?, next())?;
            x = (x + ops.linear(&ops.swiglu(&gate_up)?, next())?)?;
        }
        let (rows, choices) = chosen_rows(sequences);
        let num_chosen = rows.len();
        let chosen = x.index_select(&Tensor::from_vec(rows, num_chosen, &self.device)?, 0)?; // [M, D]
        let logits = ops.linear(&ops.rms_norm(&chosen, next())?, next())?; // [M, V]
        Ok(ops.masked_logprob(&logits, choices)?)
    }
}

/// The rows, among those of all sequences, that predict chosen tokens.
fn chosen_rows(sequences: &[&Sequence]) -> (Vec<u32>, Vec<(Token, ActionMask)>) {
    let (mut rows, mut choices, mut start) = (Vec::new(), Vec::new(), 0);
    for sequence in sequences {
        for chosen in &sequence.chosen {
            rows.push((start + chosen.row) as u32);
            choices.push((chosen.target, chosen.mask));
        }
        start += sequence.tokens.len();
    }
    (rows, choices)
}
