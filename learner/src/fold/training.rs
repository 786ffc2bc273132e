//! The updates of a step.

use policy::{CrossEntropy, Loss as _, LossBatch, OptimizerStep, SurrogateStats};
use proto::{CounterRng, Purpose, ScoredGroup};

use super::Fold;
use crate::Error;
use crate::config::{KlForm, LearnerConfig};
use crate::minibatch::{KlSum, Minibatch, NO_ROLLOUTS};
use crate::policy_gradient::{PolicyGradientReport, minibatches};
use crate::preferences::{DpoReport, NO_PAIRS, PairBatch, PairStats, pair_batches};
use crate::replay_buffers::Stored;
use crate::self_play::{StoredProposal, proposer_minibatch};

/// Statistics of the updates of a step.
pub(super) struct Trained {
    pub(super) num_updates: u64,
    /// Mean cross-entropy of the updates.
    pub(super) loss: f64,
    pub(super) grad_norm: f64,
    pub(super) policy_gradient: Option<PolicyGradientReport>,
    pub(super) proposer: Option<PolicyGradientReport>,
    pub(super) dpo: Option<DpoReport>,
    pub(super) kl_to_base: Option<f64>,
    pub(super) kl_to_teacher: Option<f64>,
}

impl Fold {
    /// Trains on examples from the replay buffers, for as many updates as `reuse` times the example tokens of the batch fill, and
    /// on the groups if the policy gradient is on or answers are compared.
    pub(super) fn train(
        &mut self,
        groups: &[ScoredGroup],
        num_example_tokens: u64,
        rewarded: Vec<(StoredProposal, f64)>,
        learning_rate: f64,
    ) -> Result<Trained, Error> {
        let learner = self.config.learner.clone();
        let policy_gradient = learner.policy_gradient.as_ref();
        let num_draws = if learner.draws_examples() { learner.num_updates(num_example_tokens) } else { 0 };
        let updates = num_draws.max(learner.updates_per_step());
        let (minibatches, [kl_to_base, kl_to_teacher]) = self.penalised_minibatches(groups, updates)?;
        let pair_batches = self.pair_batches(groups)?;
        let proposer_weight = self.config.self_play.as_ref().map_or(0.0, |own| own.proposer_share);
        let proposer_minibatch = proposer_minibatch(rewarded, proposer_weight);
        let num_proposals = proposer_minibatch.sequences.len();
        let mut proposer_minibatch = Some(proposer_minibatch);
        let (mut cross_entropy, mut solver, mut proposer) = (0.0, SurrogateStats::default(), SurrogateStats::default());
        let mut preferences = PairStats::default();
        let (mut grad_norm, mut num_updates, mut num_drawn) = (0.0, 0u64, 0u64);
        for update in 0..updates {
            let mut rng = CounterRng::new(self.config.seed, Purpose::Replay, self.state.step, u64::from(update), 0);
            let num_tokens = if update < num_draws { learner.update_tokens } else { 0 };
            let drawn = self.state.replay_buffers.sample(&self.config, num_tokens, &mut rng);
            num_drawn += u64::from(!drawn.is_empty());
            let chosen = |(stored, weight): &(&Stored, f64)| stored.sequence.chosen.len() as f64 * weight;
            let total: f64 = drawn.iter().map(chosen).sum();
            let losses = drawn.iter().map(|(_, weight)| CrossEntropy { weight: (weight / total) as f32 });
            let losses: Vec<CrossEntropy> = losses.collect();
            // Proposals are few, so the first update trains on all of them.
            let proposals = proposer_minibatch.take().unwrap_or_default();
            let answers = minibatches.get(update as usize).unwrap_or(&NO_ROLLOUTS);
            let mut batch = LossBatch::default();
            for ((stored, weight), loss) in drawn.iter().zip(&losses) {
                self.state.totals.count_example(stored, *weight);
                batch.push([&stored.sequence], loss);
            }
            for minibatch in [answers, &proposals] {
                minibatch.sequences.iter().for_each(|sequence| self.state.totals.count_sequence(sequence));
                minibatch.add_to(&mut batch);
            }
            let pairs = pair_batches.get(update as usize).unwrap_or(&NO_PAIRS);
            pairs.sequences.iter().for_each(|sequence| self.state.totals.count_sequence(sequence));
            pairs.add_to(&mut batch);
            if batch.is_empty() {
                continue;
            }
            let scores = self.trainer.gradients(&batch)?;
            let loss = batch.value(&scores);
            if !loss.is_finite() {
                return Err(Error::NotFinite { what: "loss", got: loss });
            }
            let mut scored = scores.by_sequence(batch.sequences()).into_iter();
            cross_entropy += losses.iter().zip(&mut scored).map(|(loss, scores)| loss.value(&[scores])).sum::<f64>();
            solver.add(&answers.stats(&mut scored));
            proposer.add(&proposals.stats(&mut scored));
            preferences.add(&pairs.stats(&mut scored));
            let norm = self.trainer.step(&OptimizerStep {
                learning_rate,
                beta1: learner.beta1,
                beta2: learner.beta2,
                weight_decay: learner.weight_decay,
                max_grad_norm: learner.max_grad_norm,
                average_decay: learner.ema_decay,
            })?;
            if !norm.is_finite() {
                return Err(Error::NotFinite { what: "gradient norm", got: norm });
            }
            grad_norm += norm;
            num_updates += 1;
        }
        Ok(Trained {
            num_updates,
            loss: cross_entropy / num_drawn.max(1) as f64,
            grad_norm: grad_norm / num_updates.max(1) as f64,
            policy_gradient: policy_gradient
                .and_then(|config| PolicyGradientReport::of_solver(config, &minibatches, &solver)),
            proposer: PolicyGradientReport::new(&proposer, proposer_weight, num_proposals),
            dpo: preferences.report(),
            kl_to_base,
            kl_to_teacher,
        })
    }

    /// Makes the minibatches of the policy gradient, with the penalties of the config. Returns the mean distances to the model that the
    /// run began with and to the teacher as well.
    fn penalised_minibatches(
        &self,
        groups: &[ScoredGroup],
        num_updates: u32,
    ) -> Result<(Vec<Minibatch>, [Option<f64>; 2]), Error> {
        let LearnerConfig { policy_gradient, kl, distill, .. } = &self.config.learner;
        let Some(config) = policy_gradient else { return Ok((Vec::new(), [None; 2])) };
        let (step, max_answer_tokens) = (self.state.step, self.config.actor.max_answer_tokens);
        let is_penalised = kl.is_some() || distill.is_some();
        let mut minibatches = minibatches(config, max_answer_tokens, is_penalised, (step, num_updates), groups);
        let (mut to_base, mut to_teacher) = (KlSum::default(), KlSum::default());
        for minibatch in &mut minibatches {
            if let Some(kl) = kl {
                let logprobs = self.references.base_logprobs(&minibatch.sequences)?;
                to_base.add(minibatch.penalise(kl.form, kl.weight, &logprobs));
            }
            if let Some(distill) = distill {
                let logprobs = self.references.teacher_logprobs(&minibatch.sequences)?;
                to_teacher.add(minibatch.penalise(KlForm::Advantage, distill.weight, &logprobs));
            }
        }
        Ok((minibatches, [to_base.mean(), to_teacher.mean()]))
    }

    /// Makes the pairs of answers that are compared, if the config has preferences.
    fn pair_batches(&self, groups: &[ScoredGroup]) -> Result<Vec<PairBatch>, Error> {
        let Some(config) = &self.config.learner.dpo else { return Ok(Vec::new()) };
        let mut batches = pair_batches(config, groups);
        for batch in &mut batches {
            batch.compare(&self.references.base_logprobs(&batch.sequences)?);
        }
        Ok(batches)
    }
}
