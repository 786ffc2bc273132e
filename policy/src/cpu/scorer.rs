use super::network::{self, Workspaces};
use super::packed::PackedWeights;
use crate::{Error, ModelConfig, Params, Scorer, Sequence};

/// Scores with fixed weights, on some threads.
pub(crate) struct CpuScorer {
    packed: PackedWeights,
    workspaces: Workspaces,
    num_threads: usize,
}

impl CpuScorer {
    pub(crate) fn new(config: &ModelConfig, params: &Params, num_threads: usize) -> CpuScorer {
        CpuScorer {
            packed: PackedWeights::new(config, params, num_threads),
            workspaces: Workspaces::default(),
            num_threads,
        }
    }
}

impl Scorer for CpuScorer {
    fn logprobs(&self, sequences: &[&Sequence]) -> Result<Vec<f32>, Error> {
        Ok(network::logprobs(&self.packed, &self.workspaces, self.num_threads, sequences))
    }
}
