use candle_core::{Device, Result};

use super::network::CandleWeights;
use super::scores::{logprobs, pass_rows};
use crate::{Error, ModelConfig, Params, Scorer, Sequence};

/// Scores with fixed weights.
pub(crate) struct CandleScorer(CandleWeights);

impl CandleScorer {
    pub(crate) fn new(config: &ModelConfig, params: &Params, device: &Device) -> Result<CandleScorer> {
        Ok(CandleScorer(CandleWeights::new(config, params, device)?))
    }
}

impl Scorer for CandleScorer {
    fn logprobs(&self, sequences: &[&Sequence]) -> std::result::Result<Vec<f32>, Error> {
        let CandleWeights { config, tensors, rotary, .. } = &self.0;
        Ok(logprobs(config, (tensors, &[]), rotary, pass_rows(config), sequences)?)
    }
}
