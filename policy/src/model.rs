use std::sync::Arc;

use candle_core::Device;
use proto::{LegalTokens, TokenId};

use crate::network::Workspaces;
use crate::objective::{Loss, Objective};
use crate::packed::PackedWeights;
use crate::{Error, ModelConfig, Params, network, reference};

/// A sequence to score: prompt and answer as far as the last chosen token needs them.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Input tokens.
    pub tokens: Vec<TokenId>,
    /// The tokens that were chosen, in order.
    pub chosen: Vec<ChosenToken>,
}

/// A chosen token of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct ChosenToken {
    /// The input position whose output predicts it.
    pub row: usize,
    /// What was chosen.
    pub target: TokenId,
    /// What was legal.
    pub legal: LegalTokens,
}

impl Sequence {
    /// Builds a sequence from a prompt and the choices of an answer, as (position, what was legal); the tokens after the last
    /// choice predict nothing and are left out.
    pub fn new(
        prompt: &[TokenId],
        answer: &[TokenId],
        choices: impl Iterator<Item = (usize, LegalTokens)>,
    ) -> Sequence {
        let chosen: Vec<ChosenToken> = choices
            .map(|(position, legal)| ChosenToken { row: prompt.len() + position - 1, target: answer[position], legal })
            .collect();
        let needed = chosen.last().map_or(0, |last| last.row + 1);
        let tokens = prompt.iter().chain(answer).take(needed).copied().collect();
        Sequence { tokens, chosen }
    }
}

/// The network as a differentiable function: kernels on the CPU, candle elsewhere.
#[derive(Clone, Debug)]
pub struct Model {
    config: ModelConfig,
    backend: Backend,
}

#[derive(Clone, Debug)]
enum Backend {
    Kernels(Arc<Workspaces>),
    Candle(Device),
}

/// One version of the weights, ready for a model.
#[derive(Debug)]
pub struct Loaded<'a> {
    model: &'a Model,
    params: &'a Params,
    /// For the kernels only.
    packed: Option<PackedWeights>,
}

/// What [`Loaded::gradients`] gives.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// The loss.
    pub loss: Loss,
    /// Log-probabilities as [`Loaded::logprobs`] gives them.
    pub logprobs: Vec<f32>,
    /// The gradient of the loss, one value for each weight.
    pub params: Params,
}

/// What a pass finds out about every chosen token, sequence after sequence.
#[derive(Debug, Default)]
pub(crate) struct Scores {
    pub(crate) logprobs: Vec<f32>,
    /// Over the legal tokens, in nats; 0 where no objective asks for it. Empty without objectives.
    pub(crate) entropies: Vec<f32>,
}

impl Model {
    /// Prepares the network for a device.
    ///
    /// # Errors
    /// [`Error::Config`] when the shape is none.
    pub fn new(config: &ModelConfig, device: Device) -> Result<Model, Error> {
        config.validate()?;
        let backend = if device.is_cpu() { Backend::Kernels(Arc::default()) } else { Backend::Candle(device) };
        Ok(Model { config: config.clone(), backend })
    }

    /// Prepares the network in plain candle operations on any device: the reference for the kernels.
    ///
    /// # Errors
    /// [`Error::Config`] when the shape is none.
    pub fn reference(config: &ModelConfig, device: Device) -> Result<Model, Error> {
        config.validate()?;
        Ok(Model { config: config.clone(), backend: Backend::Candle(device) })
    }

    /// Packs a version of the weights; threads may share the result.
    ///
    /// # Errors
    /// [`Error::Config`] when the shape is none.
    pub fn load<'a>(&'a self, params: &'a Params) -> Result<Loaded<'a>, Error> {
        let packed = match self.backend {
            Backend::Kernels(_) => Some(PackedWeights::with_transposes(&self.config, params)?),
            Backend::Candle(_) => None,
        };
        Ok(Loaded { model: self, params, packed })
    }
}

impl Loaded<'_> {
    /// Computes the log-probability of every chosen token, sequence after sequence.
    ///
    /// # Errors
    /// [`Error::Tensor`].
    pub fn logprobs(&self, sequences: &[&Sequence]) -> Result<Vec<f32>, Error> {
        match (&self.model.backend, &self.packed) {
            (Backend::Candle(device), _) => {
                Ok(reference::logprobs(&self.model.config, device, self.params, sequences)?)
            }
            (Backend::Kernels(workspaces), packed) => {
                let packed = packed.as_ref().expect("packed for the kernels");
                Ok(network::run(packed, workspaces, sequences, None).logprobs)
            }
        }
    }

    /// Computes the gradient of the loss of all sequences, each under its objective.
    ///
    /// # Errors
    /// [`Error::Tensor`]; [`Error::Weights`] when some weight got no gradient.
    pub fn gradients(&self, sequences: &[&Sequence], objectives: &[Objective]) -> Result<Gradients, Error> {
        let (scores, params) = match (&self.model.backend, &self.packed) {
            (Backend::Candle(device), _) => {
                reference::gradients(&self.model.config, device, self.params, sequences, objectives)?
            }
            (Backend::Kernels(workspaces), packed) => {
                let mut gradients = Params::zeros(&self.model.config);
                let packed = packed.as_ref().expect("packed for the kernels");
                let scores = network::run(packed, workspaces, sequences, Some((objectives, &mut gradients)));
                (scores, gradients)
            }
        };
        let loss = Loss::new(sequences, objectives, &scores.logprobs, &scores.entropies);
        Ok(Gradients { loss, logprobs: scores.logprobs, params })
    }
}
