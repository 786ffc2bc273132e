//! The run as a function: state n + 1 depends on state n and batch n, and on nothing else.
//!
//! [`Fold`] plans batches and folds them. The live loop and `replay` both call it. Its results do not depend on a clock, the
//! number of threads, or the order in which groups arrived.

mod answers;
mod training;

use std::collections::BTreeMap;
use std::sync::Arc;

use policy::{Backend, Division, Sequence, Trainer, TrainingState};
use proto::{
    Behavior, CounterRng, Difficulty, Digest, KeyedProblem, LabelOrigin, ProblemOrigin, ProblemSource, Purpose,
    Request, Sampling, ScoredGroup, Task, TaskId, TaskKind, Verdict,
};
use serde::{Deserialize, Serialize};

use crate::config::ProposerLoss;
use crate::minibatch::played_sequence;
use crate::plan::{Planned, Plans, plan_batch};
use crate::policy_gradient::PolicyGradientReport;
use crate::preferences::DpoReport;
use crate::references::References;
use crate::replay_buffers::Labelled;
use crate::self_play::StoredProposal;
use crate::shuffle::shuffled;
use crate::state::State;
use crate::{Config, Control, Error};

pub use answers::AnswersReport;

/// Statistics of one step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Number of the state after the step.
    pub step: u64,
    /// Hash of its weights.
    pub weights_digest: Digest,
    /// Hash of the whole state.
    pub state_digest: Digest,
    /// Learning rate.
    pub learning_rate: f64,
    /// Mean negative log-probability of a chosen token, weighted as trained.
    pub loss: f64,
    /// Mean gradient norm before clipping.
    pub grad_norm: f64,
    /// The policy gradient on answers; absent if it is off or no rollout had an advantage.
    pub policy_gradient: Option<PolicyGradientReport>,
    /// The policy gradient on proposals; absent if the proposer has another loss or no proposal had an advantage.
    pub proposer: Option<PolicyGradientReport>,
    /// Preferences between answers; absent if they are off or no group has both right and wrong answers.
    pub dpo: Option<DpoReport>,
    /// Mean log of the ratio of the policy to the model that the run began with, over the chosen tokens of the policy gradient's
    /// rollouts, when they were drawn: an estimate of the divergence, in nats. Absent without a penalty on it.
    pub kl_to_base: Option<f64>,
    /// The same to the teacher; absent without distillation.
    pub kl_to_teacher: Option<f64>,
    /// Share of the batch's answers that solve their problem.
    pub solve_rate: f64,
    /// Statistics of the batch's answers; absent if it has none.
    pub answers: Option<AnswersReport>,
    /// By family (domain and source, as planned): answers that solve and all answers, or proposals admitted and all proposals.
    pub solved_by_family: BTreeMap<String, (u64, u64)>,
    /// Present if the run makes problems itself.
    pub self_play: Option<SelfPlayReport>,
    /// Mean negative log-probability of the batch's chosen tokens under the behaviour policy: an estimate of its entropy.
    pub entropy: f64,
    /// Number of rollouts by staleness: steps between the oldest version that sampled one of their tokens and the trained state.
    pub rollouts_by_staleness: BTreeMap<u64, u64>,
    /// Examples of the batch whose levels the config lists.
    pub num_examples: u64,
    /// Of these, the ones that the replay buffers did not hold yet.
    pub num_new_examples: u64,
    /// Input tokens of the batch's examples, new or not.
    pub num_example_tokens: u64,
    /// Optimizer updates.
    pub num_updates: u64,
    /// Mean absolute difference between actor and learner log-probabilities at equal version, for the first group and the
    /// first that answers a problem, whichever is larger; absent if versions differ.
    pub logprob_mismatch: Option<f64>,
}

/// Statistics of self-play after a step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelfPlayReport {
    /// Admitted proposals of the batch that were not posed or proposed before.
    pub num_new_proposals: u64,
    /// Admitted ones that were.
    pub num_repeated_proposals: u64,
    /// Proposals of the batch that were not admitted: problems of their domain that are not worth asking, of another level than
    /// was asked for, or in an exam.
    pub num_refused_proposals: u64,
    /// Proposals of the batch that are no problem of their domain.
    pub num_malformed_proposals: u64,
    /// Proposals whose problems have not been tried yet.
    pub num_pending: u64,
    /// Niches in the archive.
    pub num_niches: u64,
    /// Problems in the archive.
    pub num_archived: u64,
    /// Tried proposals of the batch by measured difficulty: unsolved, hard, easy, trivial.
    pub difficulties: [u64; 4],
    /// Of these, the ones with the requested niche and difficulty.
    pub num_as_asked: u64,
    /// Steps between the version that wrote a proposal and the one that tried it, summed over the batch's tried proposals.
    pub sum_ages: u64,
}

/// The contributions of the groups of a batch.
#[derive(Default)]
struct Brought {
    num_examples: u64,
    num_new_examples: u64,
    /// Input tokens of all examples, repeated ones included.
    num_example_tokens: u64,
    /// Proposals whose problems were tried, with their advantages; empty unless the proposer trains by policy gradient.
    rewarded: Vec<(StoredProposal, f64)>,
    self_play: Option<SelfPlayReport>,
}

/// Plans and folds batches.
pub struct Fold {
    config: Config,
    sources: Vec<Arc<dyn ProblemSource>>,
    trainer: Box<dyn Trainer>,
    references: References,
    state: State,
    /// Digest of the current state's weights, computed once.
    weights_digest: Digest,
    planned: Plans,
}

impl Fold {
    /// Continues from a state, on the config's device, which is opened. `planned` holds the tasks that earlier states planned,
    /// `references` what the losses of the config are relative to.
    ///
    /// # Errors
    /// [`Error::Config`] when the config is invalid; [`Error::Policy`] when the device has no room, or lacks the frozen weights
    /// that an adapter changes.
    pub fn new(
        config: Config,
        sources: Vec<Arc<dyn ProblemSource>>,
        backend: &Backend,
        num_threads: usize,
        (state, training): (State, TrainingState),
        planned: Plans,
        references: References,
    ) -> Result<Fold, Error> {
        config.validate(&sources.iter().map(AsRef::as_ref).collect::<Vec<_>>())?;
        let division = Division { num_shards: config.learner.num_shards, num_threads };
        let weights_digest = training.weights.digest(&config.model);
        let trainer = backend.trainer(&config.model, training, division)?;
        Ok(Fold { config, sources, trainer, references, state, weights_digest, planned })
    }

    /// Returns the current state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Returns the trainer, which holds the current state's weights.
    pub fn trainer(&self) -> &dyn Trainer {
        self.trainer.as_ref()
    }

    /// Returns the config.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Returns the digest of the current state's weights.
    pub fn weights_digest(&self) -> Digest {
        self.weights_digest
    }

    /// Returns the tasks that are planned and not folded.
    pub fn planned(&self) -> &Plans {
        &self.planned
    }

    /// Plans every batch that the current state allows, and returns the new tasks' ids.
    pub fn plan(&mut self) -> Vec<TaskId> {
        let mut new = Vec::new();
        while self.planned.num_batches() <= self.state.step + self.config.batch.lag {
            let batch = self.planned.num_batches();
            let tasks = plan_batch(&self.config, &self.sources, &mut self.state, self.weights_digest, batch);
            new.extend(tasks.iter().map(|planned| planned.task.id));
            self.planned.push_batch(tasks);
        }
        new
    }

    /// Whether some token of a free-running group is too old for the next step, or comes from a version that does not exist
    /// yet.
    pub(crate) fn is_stale(&self, scored: &ScoredGroup) -> bool {
        let step = self.state.step;
        let Some(limit) = self.config.batch.max_staleness else { return false };
        scored.group.versions().any(|version| version > step || version + limit < step)
    }

    /// Returns the tasks of an exam for the current state's averaged weights.
    pub fn exam_tasks(&self, ema_digest: Digest, problems: &[KeyedProblem]) -> Vec<Task> {
        let tasks = problems.iter().enumerate().map(|(index, KeyedProblem { problem, key })| Task {
            id: TaskId { kind: TaskKind::Evaluate, batch: self.state.step, index: index as u32 },
            seed: self.config.seed,
            weights: ema_digest,
            policy_version: self.state.step,
            free_running: false,
            request: Request::Solve { problem: problem.clone(), origin: ProblemOrigin::Exam, has_key: key.is_some() },
            family: String::new(),
            num_rollouts: 1,
            sampling: Sampling { behavior: Behavior::Policy, temperature: 0.0 },
            max_tokens: self.config.actor.max_answer_tokens,
        });
        tasks.collect()
    }

    /// Folds the groups of the next step, in order, and trains.
    ///
    /// # Errors
    /// [`Error::Integrity`] when a group does not answer its task; [`Error::NotFinite`] when training diverges.
    pub fn fold(&mut self, groups: &[ScoredGroup], control: Option<Control>) -> Result<StepReport, Error> {
        let batch = self.state.step;
        let planned = self.take_planned(groups)?;
        let logprob_mismatch = self.logprob_mismatch(groups)?;
        let mut rollouts_by_staleness = BTreeMap::new();
        for rollout in groups.iter().flat_map(|scored| &scored.group.rollouts) {
            *rollouts_by_staleness.entry(batch.saturating_sub(rollout.version_at(0))).or_default() += 1;
        }
        let brought = self.take_groups(groups, planned);
        let learning_rate = self.config.learning_rate(batch, control);
        let trained = self.train(groups, brought.num_example_tokens, brought.rewarded, learning_rate)?;
        self.state.step += 1;
        self.weights_digest = self.trainer.weights()?.digest(&self.config.model);
        let mut solved_by_family = BTreeMap::<String, (u64, u64)>::new();
        for scored in groups {
            let counts = solved_by_family.entry(scored.group.task.family.clone()).or_default();
            counts.0 += scored.verdicts.iter().filter(|verdict| **verdict == Verdict::Correct).count() as u64;
            counts.1 += scored.verdicts.len() as u64;
        }
        let (num_correct, num_rollouts) =
            groups.iter().filter_map(solved).fold((0, 0), |sum, (correct, played)| (sum.0 + correct, sum.1 + played));
        self.state.totals.num_correct += num_correct;
        self.state.totals.num_rollouts += num_rollouts;
        Ok(StepReport {
            step: self.state.step,
            weights_digest: self.weights_digest,
            state_digest: self.state_digest()?,
            learning_rate,
            loss: trained.loss,
            grad_norm: trained.grad_norm,
            policy_gradient: trained.policy_gradient,
            proposer: trained.proposer,
            dpo: trained.dpo,
            kl_to_base: trained.kl_to_base,
            kl_to_teacher: trained.kl_to_teacher,
            solve_rate: num_correct as f64 / num_rollouts.max(1) as f64,
            answers: AnswersReport::of(groups),
            solved_by_family,
            self_play: brought.self_play,
            entropy: sampled_entropy(groups),
            rollouts_by_staleness,
            num_examples: brought.num_examples,
            num_new_examples: brought.num_new_examples,
            num_example_tokens: brought.num_example_tokens,
            num_updates: trained.num_updates,
            logprob_mismatch,
        })
    }

    /// Hashes the state. The history covers the replay buffers and the self-play state, which are functions of it. On a device
    /// that is not reproducible it covers the optimizer state too, which then stays on the device.
    fn state_digest(&self) -> Result<Digest, Error> {
        let State { step, totals, history, .. } = &self.state;
        let mut parts = vec![Digest::of(&(step, self.trainer.num_updates(), totals)), self.weights_digest];
        if self.config.is_reproducible() {
            let training = self.trainer.export()?;
            let tensors = [&training.average, &training.first, &training.second];
            parts.extend(tensors.map(|params| params.digest(&self.config.model)));
        }
        parts.push(*history);
        Ok(Digest::of_digests(&parts))
    }

    /// Removes the tasks of a step's groups from the plans and returns them.
    fn take_planned(&mut self, groups: &[ScoredGroup]) -> Result<Vec<Planned>, Error> {
        let step = self.state.step;
        let refuse = |reason: String| Err(Error::Integrity { what: "batch", step, reason });
        let num_tasks = self.config.batch.num_tasks as usize;
        if groups.len() != num_tasks {
            return refuse(format!("expected {num_tasks} groups, got {}", groups.len()));
        }
        let mut taken = Vec::with_capacity(num_tasks);
        for (index, scored) in (0..).zip(groups) {
            let task = &scored.group.task;
            let is_next = self.config.is_free_running() || (task.id.batch, task.id.index) == (step, index);
            if self.is_stale(scored) {
                return refuse(format!("group {index} is older than batch.max_staleness allows: {:?}", task.id));
            }
            match self.planned.remove(task.id).filter(|planned| is_next && planned.task == *task) {
                Some(planned) => taken.push(planned),
                None => return refuse(format!("group {index} does not match a planned task: {:?}", task.id)),
            }
        }
        Ok(taken)
    }

    /// Records the groups' examples, measurements and problems, in order.
    fn take_groups(&mut self, groups: &[ScoredGroup], planned: Vec<Planned>) -> Brought {
        let mut examples = Vec::new();
        let mut brought = Brought::default();
        let mut report = SelfPlayReport::default();
        for (scored, planned) in groups.iter().zip(planned) {
            self.state.history = Digest::of_digests(&[self.state.history, Digest::of(scored)]);
            examples.extend(self.wanted_examples(scored));
            if let Some(own) = &self.config.self_play {
                let loss = own.proposer_loss;
                let Some((proposal, difficulty, solve_rate)) = self.make_problems(scored, planned, &mut report) else {
                    continue;
                };
                let domain = scored.group.task.request.domain();
                match loss {
                    ProposerLoss::CrossEntropy => examples.extend(self.proposer_example(domain, proposal, difficulty)),
                    ProposerLoss::PolicyGradient => {
                        let source = self.source(domain);
                        let own = &mut self.state.self_play;
                        let advantage = own.reward(source.as_ref(), &proposal, difficulty, solve_rate);
                        brought.rewarded.push((proposal, advantage));
                    }
                }
            }
        }
        if self.config.learner.shuffle_labels {
            let mut rng = CounterRng::new(self.config.seed, Purpose::Shuffle, self.state.step, 0, 0);
            examples = shuffled(groups, examples, &mut rng);
        }
        // A pretrained model is to answer the same way without the constraint.
        if self.config.language.is_some() {
            examples = examples.into_iter().map(Labelled::without_constraint).collect();
        }
        for labelled in examples {
            let made = self.state.replay_buffers.push(labelled, &self.config);
            brought.num_examples += u64::from(made.num_tokens > 0);
            brought.num_new_examples += u64::from(made.is_new);
            brought.num_example_tokens += made.num_tokens;
        }
        let own = &self.state.self_play;
        let (num_niches, num_archived) = own.archive.size();
        report.num_pending = own.num_pending() as u64;
        (report.num_niches, report.num_archived) = (num_niches as u64, num_archived as u64);
        brought.self_play = self.config.self_play.is_some().then_some(report);
        brought
    }

    /// Returns the examples of a group whose kind the config accepts.
    fn wanted_examples(&self, scored: &ScoredGroup) -> Vec<Labelled> {
        let learner = &self.config.learner;
        let is_wanted = |label_origin| match label_origin {
            LabelOrigin::Hindsight => learner.hindsight,
            LabelOrigin::Executor => learner.executor_labels,
            _ => true,
        };
        let label = |example: &proto::Example| Labelled {
            domain: scored.group.task.request.domain().to_owned(),
            legal: example.choices.iter().map(|(_, legal)| legal.tokens(&scored.example_sets)).collect(),
            example: example.clone(),
        };
        let wanted = scored.examples.iter().filter(|example| is_wanted(example.label_origin));
        wanted.map(label).collect()
    }

    /// Measures the posed problem, or queues the proposed ones. Returns the proposal that the posed problem came from, its
    /// measured difficulty, and its solve rate.
    fn make_problems(
        &mut self,
        scored: &ScoredGroup,
        planned: Planned,
        report: &mut SelfPlayReport,
    ) -> Option<(StoredProposal, Difficulty, f64)> {
        let source = self.source(planned.task.request.domain());
        let own = &mut self.state.self_play;
        let Request::Solve { problem, .. } = planned.task.request else {
            let num_new = own.take_proposals(scored, source.as_ref());
            let count = |verdict| scored.verdicts.iter().filter(|other| **other == verdict).count() as u64;
            let num_malformed = count(Verdict::Malformed);
            report.num_new_proposals += num_new;
            report.num_repeated_proposals += count(Verdict::Correct).saturating_sub(num_new);
            report.num_malformed_proposals += num_malformed;
            report.num_refused_proposals += scored.verdicts.len() as u64 - count(Verdict::Correct) - num_malformed;
            return None;
        };
        let (num_correct, num_rollouts) = solved(scored)?;
        let solve_rate = num_correct as f64 / num_rollouts as f64;
        own.measure(&KeyedProblem { problem, key: planned.key }, scored.niche, solve_rate, self.state.step);
        let proposal = planned.proposal?;
        let difficulty = Difficulty::of(num_correct, num_rollouts);
        report.difficulties[difficulty as usize] += 1;
        report.num_as_asked += u64::from(proposal.is_as_asked(difficulty));
        report.sum_ages += planned.task.policy_version - proposal.policy_version;
        Some((proposal, difficulty, solve_rate))
    }

    /// Makes an example of a proposal, with its problem's measured difficulty; `None` if the request for such a problem leaves too
    /// few positions for it.
    fn proposer_example(&self, domain: &str, proposal: StoredProposal, difficulty: Difficulty) -> Option<Labelled> {
        let (example, legal) = proposal.into_example(self.source(domain).as_ref(), difficulty);
        let fits = example.prompt.len() + example.answer.len() <= self.config.model.max_positions;
        fits.then(|| Labelled { domain: domain.to_owned(), example, legal })
    }

    fn source(&self, domain: &str) -> Arc<dyn ProblemSource> {
        let source = self.sources.iter().find(|source| source.name() == domain);
        source.expect("every planned domain is known").clone()
    }

    /// Compares the actors' log-probabilities with the learner's, in the first group that the current weights played and in the
    /// first such group that answers a problem. Returns the larger difference.
    fn logprob_mismatch(&self, groups: &[ScoredGroup]) -> Result<Option<f64>, Error> {
        let sampling = Sampling { behavior: Behavior::Policy, temperature: 1.0 };
        let is_comparable = |scored: &&ScoredGroup| {
            scored.group.task.sampling == sampling && scored.group.is_of_version(self.state.step)
        };
        let first = groups.iter().find(is_comparable);
        let answered = groups.iter().filter(is_comparable).find(|scored| scored.group.task.request.problem().is_some());
        let mut mismatches = Vec::new();
        for scored in first.into_iter().chain(answered) {
            mismatches.extend(self.group_mismatch(scored)?);
        }
        Ok(mismatches.into_iter().reduce(f64::max))
    }

    fn group_mismatch(&self, scored: &ScoredGroup) -> Result<Option<f64>, Error> {
        let group = &scored.group;
        let sequences: Vec<Sequence> = group
            .rollouts
            .iter()
            .map(|rollout| played_sequence(scored, rollout))
            .filter(|sequence| !sequence.chosen.is_empty())
            .collect();
        if sequences.is_empty() {
            return Ok(None);
        }
        let logprobs = self.trainer.logprobs(&sequences.iter().collect::<Vec<_>>())?;
        let played = group.rollouts.iter().flat_map(|rollout| &rollout.logprobs);
        let differences = played.zip(&logprobs).map(|(played, logprob)| f64::from((played - logprob).abs()));
        Ok(Some(differences.sum::<f64>() / logprobs.len() as f64))
    }
}

/// Returns the number of correct answers and of all answers; `None` if the task asked for problems.
fn solved(scored: &ScoredGroup) -> Option<(u64, u64)> {
    scored.group.task.request.problem()?;
    let num_correct = scored.verdicts.iter().filter(|verdict| **verdict == Verdict::Correct).count();
    Some((num_correct as u64, scored.verdicts.len() as u64))
}

fn sampled_entropy(groups: &[ScoredGroup]) -> f64 {
    let rollouts = groups.iter().flat_map(|scored| &scored.group.rollouts);
    let logprobs = rollouts.flat_map(|rollout| &rollout.logprobs).map(|logprob| f64::from(*logprob));
    let (sum, count) = logprobs.fold((0.0, 0u64), |(sum, count), logprob| (sum - logprob, count + 1));
    sum / count.max(1) as f64
}

#[cfg(test)]
mod tests;
