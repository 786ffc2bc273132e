use proto::{Digest, LegalTokens, TokenId};
use serde::{Deserialize, Serialize};

use crate::{DeviceKind, Error, Model, ModelConfig, Objective, Params, Sequence};

/// What arithmetic a process does. Two processes of one run must agree on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numerics {
    /// Which implementation of the operations.
    pub kernels: String,
    /// Where they run.
    pub device: DeviceKind,
    /// Type of the weights.
    pub dtype: String,
    /// Hash of a fixed forward and backward pass, where it is the same twice.
    pub pass_digest: Option<Digest>,
}

impl Numerics {
    /// Runs the fixed pass.
    ///
    /// # Errors
    /// [`Error::Device`] when there is none; [`Error::Tensor`] when it cannot run the pass.
    pub fn measure(device: DeviceKind) -> Result<Numerics, Error> {
        let config = ModelConfig {
            vocabulary_size: 32,
            max_positions: 24,
            d_model: 48,
            num_layers: 2,
            num_heads: 3,
            num_kv_heads: 1,
            ff_dim: 80,
        };
        let params = Params::init(&config, 0);
        let legal: LegalTokens = (0..32).collect();
        let sequences: Vec<Sequence> = [3, 24, 17]
            .into_iter()
            .map(|len| {
                let tokens: Vec<TokenId> = (0..len).map(|index| (index * 7 % 32) as TokenId).collect();
                Sequence::new(&tokens[..1], &tokens[1..], (0..len - 1).map(|position| (position, legal.clone())))
            })
            .collect();
        let model = Model::new(&config, device.open()?)?;
        let sequences: Vec<&Sequence> = sequences.iter().collect();
        let objectives = [1.0, 0.5, 0.25].map(|weight| Objective::CrossEntropy { weight });
        let gradients = model.load(&params)?.gradients(&sequences, &objectives)?;
        let logprobs: Vec<u8> = gradients.logprobs.iter().flat_map(|logprob| logprob.to_le_bytes()).collect();
        let pass_digest = Digest::of_digests(&[Digest::of_bytes(&logprobs), gradients.params.digest(&config)]);
        Ok(Numerics {
            kernels: if device == DeviceKind::Cpu { "fixed-order/2" } else { "candle" }.to_owned(),
            device,
            dtype: "f32".to_owned(),
            pass_digest: device.is_reproducible().then_some(pass_digest),
        })
    }
}
