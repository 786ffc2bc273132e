use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::base::CpuBase;
use super::gradients::PackedAdapter;
use super::network::{self, Trained, Workspaces};
use super::packed::PackedWeights;
use super::{optimizer, threads};
use crate::{
    BatchScores, Division, Error, LossBatch, ModelConfig, OptimizerStep, Params, Sequence, Trainer, TrainingState,
};

/// Trains with hand-written gradients, one shard per thread at a time.
pub(crate) struct CpuTrainer {
    config: ModelConfig,
    /// The frozen weights, if an adapter is trained.
    base: Option<Arc<CpuBase>>,
    state: TrainingState,
    division: Division,
    /// The weights as the kernels read them, until the next step.
    packed: OnceLock<Arc<PackedWeights>>,
    workspaces: Workspaces,
    gradient: Option<Params>,
}

impl CpuTrainer {
    /// Resumes from a state: of an adapter, if there is a base.
    pub(crate) fn new(
        config: &ModelConfig,
        base: Option<Arc<CpuBase>>,
        state: TrainingState,
        division: Division,
    ) -> CpuTrainer {
        CpuTrainer {
            config: config.clone(),
            base,
            state,
            division,
            packed: OnceLock::new(),
            workspaces: Workspaces::default(),
            gradient: None,
        }
    }

    fn packed(&self) -> &Arc<PackedWeights> {
        let num_threads = self.division.num_threads;
        self.packed.get_or_init(|| match &self.base {
            Some(base) => base.packed(&self.config, &self.state.weights, num_threads),
            None => Arc::new(PackedWeights::new(&self.config, &self.state.weights, num_threads)),
        })
    }

    fn trained(&self) -> Trained {
        let adapter = self.base.as_ref().map(|_| PackedAdapter::new(&self.config, &self.state.weights));
        Trained { network: self.packed().clone(), adapter }
    }
}

impl Trainer for CpuTrainer {
    fn logprobs(&self, sequences: &[&Sequence]) -> Result<Vec<f32>, Error> {
        Ok(network::logprobs(self.packed(), &self.workspaces, self.division.num_threads, sequences))
    }

    /// Computes the gradient in shards, on any number of threads, and adds the shards in order.
    fn gradients(&mut self, batch: &LossBatch<'_>) -> Result<BatchScores, Error> {
        let shards = batch.parts(self.division.num_shards);
        let trained = self.trained();
        let sum = Mutex::new(ShardSum::default());
        threads::for_each(
            self.division.num_threads.min(shards.len()),
            shards.into_iter().enumerate(),
            |(index, shard)| {
                let mut gradient = Params::zeros(&self.config);
                let scores = network::add_gradients(&trained, &self.workspaces, shard, &mut gradient);
                sum.lock().unwrap_or_else(PoisonError::into_inner).add(index, scores, gradient);
            },
        );
        let ShardSum { scores, gradient, .. } = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.gradient = Some(gradient.unwrap_or_else(|| Params::zeros(&self.config)));
        Ok(scores)
    }

    fn step(&mut self, step: &OptimizerStep) -> Result<f64, Error> {
        let gradient = self.gradient.take().expect("a gradient to follow");
        // Of weights that are about to change.
        self.packed.take();
        Ok(optimizer::step(&self.config, &mut self.state, &gradient, step, self.division.num_threads))
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

/// Results of the first shards. A shard's gradient is freed as soon as it is added.
#[derive(Default)]
struct ShardSum {
    num_added: usize,
    scores: BatchScores,
    gradient: Option<Params>,
    /// Results whose turn has not come.
    later: BTreeMap<usize, (BatchScores, Params)>,
}

impl ShardSum {
    fn add(&mut self, index: usize, scores: BatchScores, gradient: Params) {
        self.later.insert(index, (scores, gradient));
        while let Some((scores, gradient)) = self.later.remove(&self.num_added) {
            self.num_added += 1;
            self.scores.logprobs.extend(scores.logprobs);
            self.scores.entropies.extend(scores.entropies);
            match &mut self.gradient {
                Some(sum) => sum.add(&gradient),
                None => self.gradient = Some(gradient),
            }
        }
    }
}
