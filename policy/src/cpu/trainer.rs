use std::borrow::Cow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::network::{self, Workspaces};
use super::optimizer;
use super::packed::PackedWeights;
use crate::{
    BatchScores, Division, Error, LossBatch, ModelConfig, OptimizerStep, Params, Sequence, Trainer, TrainingState,
};

/// Trains with hand-written gradients, one shard per thread at a time.
pub(crate) struct CpuTrainer {
    config: ModelConfig,
    state: TrainingState,
    division: Division,
    workspaces: Workspaces,
    gradient: Option<Params>,
}

impl CpuTrainer {
    pub(crate) fn new(config: &ModelConfig, state: TrainingState, division: Division) -> CpuTrainer {
        CpuTrainer { config: config.clone(), state, division, workspaces: Workspaces::default(), gradient: None }
    }

    fn packed(&self) -> PackedWeights {
        PackedWeights::with_transposes(&self.config, &self.state.weights)
    }
}

impl Trainer for CpuTrainer {
    fn logprobs(&self, sequences: &[&Sequence]) -> Result<Vec<f32>, Error> {
        Ok(network::logprobs(&self.packed(), &self.workspaces, sequences))
    }

    /// Computes the gradient in shards, on any number of threads, and adds the shards in order.
    fn gradients(&mut self, batch: &LossBatch<'_>) -> Result<BatchScores, Error> {
        let shards = batch.parts(self.division.num_shards);
        let network = self.packed();
        let results: Vec<Mutex<Option<_>>> = shards.iter().map(|_| Mutex::new(None)).collect();
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(shard) = shards.get(index) else { return };
                let mut gradient = Params::zeros(&self.config);
                let scores = network::add_gradients(&network, &self.workspaces, *shard, &mut gradient);
                *results[index].lock().unwrap_or_else(PoisonError::into_inner) = Some((scores, gradient));
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.division.num_threads.min(shards.len()) {
                scope.spawn(work);
            }
            work();
        });
        let (mut scores, mut sum) = (BatchScores::default(), None::<Params>);
        for result in results {
            let result = result.into_inner().unwrap_or_else(PoisonError::into_inner);
            let (of_shard, gradient) = result.expect("every shard was computed");
            scores.logprobs.extend(of_shard.logprobs);
            scores.entropies.extend(of_shard.entropies);
            match &mut sum {
                Some(sum) => sum.add(&gradient),
                None => sum = Some(gradient),
            }
        }
        self.gradient = Some(sum.unwrap_or_else(|| Params::zeros(&self.config)));
        Ok(scores)
    }

    fn step(&mut self, step: &OptimizerStep) -> Result<f64, Error> {
        let gradient = self.gradient.take().expect("a gradient to follow");
        Ok(optimizer::step(&self.config, &mut self.state, &gradient, step))
    }

    fn num_updates(&self) -> u64 {
        self.state.num_updates
    }

    fn weights(&self) -> Result<Cow<'_, Params>, Error> {
        Ok(Cow::Borrowed(&self.state.weights))
    }

    fn average(&self) -> Result<Cow<'_, Params>, Error> {
        Ok(Cow::Borrowed(&self.state.average))
    }

    fn export(&self) -> Result<Cow<'_, TrainingState>, Error> {
        Ok(Cow::Borrowed(&self.state))
    }
}
