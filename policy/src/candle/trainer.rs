use std::borrow::Cow;

use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var};

use super::network::{CandleBase, Rotary, place};
use super::scores::{fits, logprobs, pass_rows, scores};
use crate::losses::LossPart;
use crate::{
    BatchScores, Error, LossBatch, LossGrad, ModelConfig, OptimizerStep, Params, Sequence, TensorSpec, Trainer,
    TrainingState,
};

/// Trains with candle's autograd. Weights, moments and the average stay on the device.
pub(crate) struct CandleTrainer {
    config: ModelConfig,
    specs: Vec<TensorSpec>,
    /// The frozen weights, if an adapter is trained.
    base: Option<Vec<Tensor>>,
    weights: Vec<Var>,
    average: Vec<Tensor>,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
    num_updates: u64,
    rotary: Rotary,
    /// Parts that a batch is divided into, one after the other.
    num_shards: usize,
    /// Rows of a pass: a part with more takes several, whose gradients are added in order. It bounds the activations.
    max_rows: usize,
    gradient: Option<Vec<Tensor>>,
}

impl CandleTrainer {
    pub(crate) fn new(
        config: &ModelConfig,
        base: Option<&CandleBase>,
        state: TrainingState,
        num_shards: usize,
        device: &Device,
    ) -> Result<CandleTrainer> {
        let place = |params: &Params| place(config, params, device);
        Ok(CandleTrainer {
            config: config.clone(),
            specs: config.tensors(),
            base: base.map(|base| base.tensors.clone()),
            weights: place(&state.weights)?.iter().map(Var::from_tensor).collect::<Result<_>>()?,
            average: place(&state.average)?,
            first: place(&state.first)?,
            second: place(&state.second)?,
            num_updates: state.num_updates,
            rotary: Rotary::new(config, device)?,
            num_shards,
            max_rows: pass_rows(config),
            gradient: None,
        })
    }

    fn device(&self) -> &Device {
        self.weights[0].device()
    }

    /// Returns the weights of the network and those of the adapter, of which there are none without a base.
    fn network<'a>(&'a self, trained: &'a [Tensor]) -> (&'a [Tensor], &'a [Tensor]) {
        self.base.as_ref().map_or((trained, &[]), |base| (base, trained))
    }

    /// Computes the gradient of the loss of one pass, and the scores that the loss depends on.
    fn pass_gradients(&self, part: LossPart<'_>) -> std::result::Result<(BatchScores, Vec<Tensor>), Error> {
        let weights: Vec<Tensor> = self.weights.iter().map(|var| var.as_tensor().clone()).collect();
        let is_read: Vec<bool> = part.reads_entropies().collect();
        let (logprobs, entropies) = scores(&self.config, self.network(&weights), &self.rotary, part.sequences)?;
        let mut of_pass = BatchScores { logprobs: logprobs.to_vec1()?, entropies: vec![0.0; is_read.len()] };
        if is_read.contains(&true) {
            let computed: Vec<f32> = entropies.to_vec1()?;
            let read = computed.into_iter().zip(is_read).map(|(entropy, is_read)| if is_read { entropy } else { 0.0 });
            of_pass.entropies = read.collect();
        }
        // The sum of the scores, each times its derivative, has the gradient of the loss.
        let grads = part.grad(&of_pass);
        let column = |of: fn(&LossGrad) -> f32| Tensor::new(grads.iter().map(of).collect::<Vec<f32>>(), self.device());
        let mut sloped = (logprobs * column(|grad| grad.logprob)?)?;
        if grads.iter().any(|grad| grad.entropy != 0.0) {
            sloped = (sloped + (entropies * column(|grad| grad.entropy)?)?)?;
        }
        let mut gradients = sloped.sum_all()?.backward()?;
        Ok((of_pass, self.take(&mut gradients)?))
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
        Ok(logprobs(&self.config, self.network(&weights), &self.rotary, self.max_rows, sequences)?)
    }

    fn gradients(&mut self, batch: &LossBatch<'_>) -> std::result::Result<BatchScores, Error> {
        let (mut scores, mut sum) = (BatchScores::default(), None::<Vec<Tensor>>);
        for mut rest in batch.parts(self.num_shards) {
            while !rest.is_empty() {
                let (pass, later) = rest.split(fits(self.max_rows));
                let (of_pass, gradient) = self.pass_gradients(pass)?;
                scores.logprobs.extend(of_pass.logprobs);
                scores.entropies.extend(of_pass.entropies);
                sum = Some(match sum {
                    Some(sum) => sum.iter().zip(&gradient).map(|(sum, pass)| sum + pass).collect::<Result<_>>()?,
                    None => gradient,
                });
                rest = later;
            }
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

fn to_params(tensors: &[Tensor]) -> Result<Params> {
    let tensors = tensors.iter().map(|tensor| tensor.flatten_all()?.to_vec1()).collect::<Result<_>>()?;
    Ok(Params { tensors })
}

#[cfg(test)]
mod tests {
    use proto::{LegalTokens, TokenId};

    use super::*;
    use crate::{CrossEntropy, Variant};

    /// Passes of at most a few rows, padding included, or of one group, give the gradient of a single pass.
    #[test]
    fn passes_change_no_gradient_beyond_rounding() {
        let config = ModelConfig {
            vocabulary_size: 24,
            max_positions: 16,
            d_model: 32,
            num_layers: 2,
            num_heads: 2,
            num_kv_heads: 1,
            ff_dim: 32,
            variant: Variant::default(),
            adapter: None,
        };
        let sequence = |len: usize| {
            let tokens: Vec<TokenId> = (0..len).map(|index| (index * 7 % 24) as TokenId).collect();
            Sequence::new(&tokens[..1], &tokens[1..], (0..len - 1).map(|position| (position, LegalTokens::Any)))
        };
        let sequences = [3, 9, 2, 14, 5, 5].map(sequence);
        let losses = [1.0, -0.5, 0.25].map(|weight| CrossEntropy { weight });
        let mut batch = LossBatch::default();
        sequences.chunks(2).zip(&losses).for_each(|(pair, loss)| batch.push(pair, loss));
        let gradients = |max_rows: usize| {
            let state = TrainingState::initial(&config, 1);
            let mut trainer = CandleTrainer::new(&config, None, state, 1, &Device::Cpu).unwrap();
            assert!(trainer.max_rows > 1_000, "a network as small as this one takes one pass");
            trainer.max_rows = max_rows;
            let scores = trainer.gradients(&batch).unwrap();
            assert_eq!(scores.logprobs.len(), trainer.logprobs(batch.sequences()).unwrap().len());
            (scores, to_params(trainer.gradient.as_ref().unwrap()).unwrap())
        };
        let (scores, expected) = gradients(1_000);
        // 1: every group alone. 56: the first two groups, four sequences padded to 14 rows, and the last.
        for max_rows in [1, 56] {
            let (of_passes, got) = gradients(max_rows);
            let is_close = |(got, expected): (&f32, &f32)| (got - expected).abs() < 1e-5;
            assert!(of_passes.logprobs.iter().zip(&scores.logprobs).all(is_close), "{of_passes:?}, {scores:?}");
            for (got, expected) in got.tensors.iter().zip(&expected.tensors) {
                let scale = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
                let is_close = |(got, expected): (&f32, &f32)| (got - expected).abs() <= 1e-5 * scale;
                assert!(scale > 0.0 && got.iter().zip(expected).all(is_close));
            }
        }
    }

    #[test]
    fn a_pass_is_padded_to_its_longest_sequence() {
        let [short, long] = [2, 5].map(|len| Sequence { tokens: vec![0; len], chosen: Vec::new() });
        let mut fits = fits(12);
        assert!(fits(&[&short, &short]) && fits(&[&short]) && !fits(&[&long]), "4 sequences of 5 rows are 20");
    }
}
