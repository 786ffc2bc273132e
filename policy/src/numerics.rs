use proto::{Digest, LegalTokens, TokenId};
use serde::{Deserialize, Serialize};

use crate::{
    CrossEntropy, Device, Division, Error, LossBatch, ModelConfig, OptimizerStep, Sequence, TrainingState, Variant,
};

/// The arithmetic of a process. Two processes of one run must agree on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numerics {
    /// The implementation of the operations.
    pub kernels: String,
    /// The device that they run on.
    pub device: Device,
    /// Type of the weights.
    pub dtype: String,
    /// Hash of a fixed forward and backward pass, if the device is reproducible.
    pub pass_digest: Option<Digest>,
}

impl Numerics {
    /// Runs the fixed pass.
    ///
    /// # Errors
    /// [`Error::Device`] when there is no such device; [`Error::Tensor`] when it cannot run the pass.
    pub fn measure(device: Device) -> Result<Numerics, Error> {
        let config = ModelConfig {
            vocabulary_size: 32,
            max_positions: 24,
            d_model: 48,
            num_layers: 2,
            num_heads: 3,
            num_kv_heads: 1,
            ff_dim: 80,
            variant: Variant::default(),
            adapter: None,
        };
        let legal: LegalTokens = (0..32).collect();
        let sequences: Vec<Sequence> = [3, 24, 17]
            .into_iter()
            .map(|len| {
                let tokens: Vec<TokenId> = (0..len).map(|index| (index * 7 % 32) as TokenId).collect();
                Sequence::new(&tokens[..1], &tokens[1..], (0..len - 1).map(|position| (position, legal.clone())))
            })
            .collect();
        let losses = [1.0, 0.5, 0.25].map(|weight| CrossEntropy { weight });
        let mut batch = LossBatch::default();
        sequences.iter().zip(&losses).for_each(|(sequence, loss)| batch.push([sequence], loss));
        let division = Division { num_shards: 1, num_threads: 1 };
        let mut trainer = device.open()?.trainer(&config, TrainingState::initial(&config, 0), division)?;
        let scores = trainer.gradients(&batch)?;
        trainer.step(&MEASURED_STEP)?;
        let logprobs: Vec<u8> = scores.logprobs.iter().flat_map(|logprob| logprob.to_le_bytes()).collect();
        let gradient = trainer.export()?.first.digest(&config);
        let pass_digest = Digest::of_digests(&[Digest::of_bytes(&logprobs), gradient]);
        Ok(Numerics {
            kernels: if device == Device::Cpu { "fixed-order/2" } else { "candle" }.to_owned(),
            device,
            dtype: "f32".to_owned(),
            pass_digest: device.is_reproducible().then_some(pass_digest),
        })
    }
}

/// A step that keeps the gradient as it is: after a first such step, the running mean of gradients equals the gradient.
const MEASURED_STEP: OptimizerStep = OptimizerStep {
    learning_rate: 0.0,
    beta1: 0.0,
    beta2: 0.0,
    weight_decay: 0.0,
    max_grad_norm: f64::INFINITY,
    average_decay: 0.0,
};
