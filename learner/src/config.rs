mod policy_gradient;
mod reference;

use policy::{Device, ModelConfig};
use proto::{Behavior, Digest, ProblemSource, Task};
use serde::{Deserialize, Serialize};

use crate::Error;

pub use self::policy_gradient::{PolicyGradientConfig, PolicyGradientKind};
pub use self::reference::{DistillConfig, DpoConfig, KlConfig, KlForm, KlReference};

/// Everything that determines what a run learns. Two runs with equal configs have equal weights at every step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Seed of every draw; 0 to 2^63 - 1.
    pub seed: u64,
    /// Shape of the network.
    pub model: ModelConfig,
    /// The pretrained model that the run begins with, and how it is asked; absent for a network from random weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<LanguageConfig>,
    /// Size and timing of batches.
    pub batch: BatchConfig,
    /// How actors sample tokens.
    pub actor: ActorConfig,
    /// The domains of the problems, with their shares.
    pub domains: Vec<DomainShare>,
    /// Problems that the run makes itself; absent for the ladder alone.
    pub self_play: Option<SelfPlayConfig>,
    /// The optimizer and its training data.
    pub learner: LearnerConfig,
    /// Learning rate over steps.
    pub schedule: ScheduleConfig,
    /// Exams during the run.
    pub exams: ExamsConfig,
}

/// A pretrained model, and how it is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LanguageConfig {
    /// Hash of the model's files.
    pub base: Digest,
    /// Worked examples in every prompt, 0 to 3.
    pub examples: usize,
    /// Which tokens an answer may have.
    pub constrain: Constrain,
}

/// Which tokens an answer of a pretrained model may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Constrain {
    /// Those that continue a well-formed answer, in domains that define one.
    Answer,
    /// All.
    None,
}

/// Size and timing of batches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchConfig {
    /// Tasks per batch (B); 1 or more.
    pub num_tasks: u32,
    /// Rollouts per task (k); 1 or more.
    pub num_rollouts: u32,
    /// Batch n is planned from state n - lag: 0 alternates generation and training, 1 overlaps them. With `max_staleness`: 1
    /// to 8, and at most `max_staleness`.
    pub lag: u64,
    /// Maximum age of a token in steps; 1 to 1000. If absent, the run is `pipelined`: step n folds batch n, even if an actor is
    /// slow. If present, the run is `free-running`: a step folds the first `num_tasks` groups that have arrived, played by the
    /// newest weights that their actor had, without older tokens.
    pub max_staleness: Option<u64>,
}

/// How actors sample tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActorConfig {
    /// Device of the policy: `cpu`, `candle-cpu` or `cuda[:N]`. An actor's `--device` overrides it.
    pub device: Device,
    /// `policy`, or `uniform-legal` for the control experiment that plays at random.
    pub behavior: Behavior,
    /// Divides the logits when sampling for training; over 0.
    pub temperature: f32,
    /// Maximum number of tokens of an answer, forced ones included; with the prompt it must fit `model.max_positions`.
    pub max_answer_tokens: u32,
}

/// A domain, its share of the training, and the levels of its ladder that are used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DomainShare {
    /// Name of the domain.
    pub name: String,
    /// Weight among all domains, for tasks and for input tokens trained on; over 0.
    pub share: f64,
    /// The levels to pose and train on.
    pub levels: Vec<LevelWeight>,
    /// Hash of the file of problems; absent unless the problems of the domain are those of a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<Digest>,
}

/// A level of a ladder, and how much it is posed and trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LevelWeight {
    /// The level.
    pub level: u32,
    /// Weight among the domain's levels, for tasks and for input tokens trained on; over 0.
    pub weight: f64,
}

/// Problems that the run makes itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelfPlayConfig {
    /// Number of initial steps in which all problems to solve come from the ladder; proposals are made from the start.
    pub bootstrap_steps: u64,
    /// Tasks per batch that ask for problems instead of answers, `batch.num_rollouts` problems each; 0 to below
    /// `batch.num_tasks`.
    pub propose_tasks: u32,
    /// How proposals train the policy after their problems were tried.
    pub proposer_loss: ProposerLoss,
    /// Share of the trained input tokens that are proposals; with policy gradient, the weight of that loss. 0 to below 1.
    pub proposer_share: f64,
    /// Sources of the problems to solve after the bootstrap.
    pub problems: ProblemShares,
}

/// How proposals train the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProposerLoss {
    /// As answers to a prompt that asks for their measured niche and difficulty.
    CrossEntropy,
    /// By a reward of 1 - solve rate, or 0 if all or none of the rollouts succeed (Zhao et al. 2025, equation 4). Half of it is
    /// for the requested niche, and half for the requested difficulty.
    PolicyGradient,
}

/// Weights of the sources of problems; 0 or more each, not all 0. If a source has no problem to offer, the next one in this
/// order is used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProblemShares {
    /// Proposals that were not tried yet.
    pub proposer: f64,
    /// Mutated problems of the archive.
    pub mutation: f64,
    /// Problems of the archive, posed again.
    pub archive: f64,
    /// The ladder.
    pub ladder: f64,
}

/// The optimizer and its training data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearnerConfig {
    /// Device that computes updates: `cpu`, `candle-cpu` or `cuda[:N]`. Actors use `actor.device`.
    pub device: Device,
    /// Peak learning rate of AdamW; over 0.
    pub learning_rate: f64,
    /// Decay of the first moment; in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment; in [0, 1).
    pub beta2: f64,
    /// Decoupled weight decay on matrices; 0 or more.
    pub weight_decay: f64,
    /// Maximum Euclidean norm of the gradient; larger ones are scaled down to it; over 0.
    pub max_grad_norm: f64,
    /// Decay of the averaged weights (for exams and export) at each update; in [0, 1).
    pub ema_decay: f64,
    /// Capacity of a domain's replay buffers for solving, in examples, and as much again for proposing; every level has its
    /// share. Without duplicates, first in first out. 1 or more.
    pub window_examples: usize,
    /// Ratio of the input tokens that a step trains on to those of all its groups' examples, repeated ones included; over 0. A
    /// step makes as many updates as these tokens fill, rounded, and at least one once there is anything to train on.
    pub reuse: f64,
    /// Input tokens of an update: examples are drawn until their tokens reach this number; 1 to 16777216.
    pub update_tokens: u64,
    /// Maximum weight of an example, min(this, sqrt(mean count / count of its goal)); 1 gives rare goals no extra weight.
    pub max_goal_weight: f64,
    /// Whether rollouts that fail their problem train as solutions of the problem that they do solve.
    pub hindsight: bool,
    /// Whether problems whose givens or answers a machine computed train as well.
    pub executor_labels: bool,
    /// A control experiment: verdicts are permuted within a batch, and prompts among its examples of equal shape.
    pub shuffle_labels: bool,
    /// Parts of an update whose gradients are computed separately and added in order; more parts can use more threads.
    pub num_shards: usize,
    /// Policy gradients on the rollouts of each batch; absent for none.
    pub policy_gradient: Option<PolicyGradientConfig>,
    /// A penalty on the distance of these rollouts to the pretrained model; absent for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl: Option<KlConfig>,
    /// A teacher that the rollouts of the policy gradient are compared with; absent for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<DistillConfig>,
    /// Preferences for right answers over wrong ones, relative to the pretrained model; absent for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dpo: Option<DpoConfig>,
}

/// Learning rate over steps: linear warm-up, constant, linear decay to zero.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleConfig {
    /// Number of steps; absent if a time limit ends the run (`--minutes`).
    pub num_steps: Option<u64>,
    /// Steps of warm-up.
    pub warmup_steps: u64,
    /// First step of the decay; absent for the last fifth.
    pub decay_from: Option<u64>,
}

/// Exams during the run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExamsConfig {
    /// Names of the exams whose dev sets are used.
    pub names: Vec<String>,
    /// Steps between exams, besides those at the start and at the end; 0 for these two alone.
    pub every_steps: u64,
}

/// The part of the schedule that a time limit or the config fixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Control {
    /// First step of the decay.
    pub decay_from: u64,
    /// Number of steps of the run.
    pub stop_at: u64,
}

impl Config {
    /// Whether every device of the run is reproducible bit by bit.
    pub fn is_reproducible(&self) -> bool {
        self.learner.device.is_reproducible() && self.actor.device.is_reproducible()
    }

    /// Whether the run is free-running, so that groups depend on when they are played.
    pub fn is_free_running(&self) -> bool {
        self.batch.max_staleness.is_some()
    }

    /// Checks ranges.
    ///
    /// # Errors
    /// [`Error::Config`] names the first invalid key, its allowed values and its actual value.
    pub fn validate(&self, sources: &[&dyn ProblemSource]) -> Result<(), Error> {
        self.model.validate()?;
        let learner = &self.learner;
        check("batch.num_tasks", "1 to 65536", self.batch.num_tasks, (1..=65_536).contains(&self.batch.num_tasks))?;
        check(
            "batch.num_rollouts",
            "1 to 4096",
            self.batch.num_rollouts,
            (1..=Task::MAX_ROLLOUTS).contains(&self.batch.num_rollouts),
        )?;
        let lag = self.batch.lag;
        match self.batch.max_staleness {
            None => check("batch.lag", "0 or 1", lag, lag <= 1)?,
            Some(limit) => {
                check("batch.max_staleness", "1 to 1000", limit, (1..=1_000).contains(&limit))?;
                check("batch.lag", "1 to 8, at most batch.max_staleness", lag, (1..=limit.min(8)).contains(&lag))?;
            }
        }
        let temperature = self.actor.temperature;
        check("actor.temperature", "over 0, up to 10", temperature, temperature > 0.0 && temperature <= 10.0)?;
        let max_answer_tokens = self.actor.max_answer_tokens;
        let room = self.model.max_positions as u32;
        check(
            "actor.max_answer_tokens",
            "at least 1, below model.max_positions",
            max_answer_tokens,
            (1..room).contains(&max_answer_tokens),
        )?;
        let has_base = self.language.is_some() || self.model.adapter.is_none();
        check("model.adapter", "none in a run without a pretrained model", "an adapter", has_base)?;
        if let Some(LanguageConfig { examples, .. }) = self.language {
            check("language.examples", "0 to 3", examples, examples <= 3)?;
        }
        check("domains", "at least one entry", "none", !self.domains.is_empty())?;
        for (index, entry) in self.domains.iter().enumerate() {
            let source = sources.iter().find(|source| source.name() == entry.name);
            check("domains.name", "a domain listed by `autodidact domains`", &entry.name, source.is_some())?;
            let is_new = self.domains[..index].iter().all(|earlier| earlier.name != entry.name);
            check("domains.name", "each domain once", &entry.name, is_new)?;
            check("domains.share", "over 0", entry.share, entry.share > 0.0 && entry.share.is_finite())?;
            check("domains.levels", "at least one entry", "none", !entry.levels.is_empty())?;
            let levels = source.map(|source| source.ladder_levels()).unwrap_or_default();
            for LevelWeight { level, weight } in &entry.levels {
                let is_known = levels.iter().any(|known| known.level == *level);
                check("domains.levels.level", "a level listed by `autodidact domains`", level, is_known)?;
                check("domains.levels.weight", "over 0", weight, *weight > 0.0 && weight.is_finite())?;
            }
        }
        if let Some(self_play) = &self.self_play {
            self_play.validate(self)?;
        }
        let positive = |value: f64| value > 0.0 && value.is_finite();
        let fraction = |value: f64| (0.0..1.0).contains(&value);
        check(
            "learner.learning_rate",
            "over 0, up to 1",
            learner.learning_rate,
            positive(learner.learning_rate) && learner.learning_rate <= 1.0,
        )?;
        check("learner.beta1", "at least 0, below 1", learner.beta1, fraction(learner.beta1))?;
        check("learner.beta2", "at least 0, below 1", learner.beta2, fraction(learner.beta2))?;
        check("learner.weight_decay", "at least 0, below 1", learner.weight_decay, fraction(learner.weight_decay))?;
        check("learner.max_grad_norm", "over 0", learner.max_grad_norm, positive(learner.max_grad_norm))?;
        check("learner.ema_decay", "at least 0, below 1", learner.ema_decay, fraction(learner.ema_decay))?;
        check("learner.window_examples", "1 or more", learner.window_examples, learner.window_examples > 0)?;
        check("learner.reuse", "over 0, up to 100", learner.reuse, positive(learner.reuse) && learner.reuse <= 100.0)?;
        let update_tokens = learner.update_tokens;
        check("learner.update_tokens", "1 to 16777216", update_tokens, (1..=1 << 24).contains(&update_tokens))?;
        check(
            "learner.max_goal_weight",
            "1 or more",
            learner.max_goal_weight,
            learner.max_goal_weight >= 1.0 && learner.max_goal_weight.is_finite(),
        )?;
        check("learner.num_shards", "1 to 1024", learner.num_shards, (1..=1_024).contains(&learner.num_shards))?;
        if let Some(policy_gradient) = &learner.policy_gradient {
            policy_gradient.validate(self)?;
        }
        if let Some(kl) = &learner.kl {
            kl.validate(self)?;
        }
        if let Some(distill) = &learner.distill {
            distill.validate(self)?;
        }
        if let Some(dpo) = &learner.dpo {
            dpo.validate(self)?;
        }
        let schedule = &self.schedule;
        check("schedule.num_steps", "1 or more", 0, schedule.num_steps != Some(0))?;
        let decay_from = schedule.decay_from.unwrap_or(0);
        let last = schedule.num_steps.unwrap_or(u64::MAX);
        check("schedule.decay_from", "at most schedule.num_steps", decay_from, decay_from <= last)?;
        check(
            "schedule.decay_from",
            "absent unless schedule.num_steps is set",
            decay_from,
            schedule.decay_from.is_none() || schedule.num_steps.is_some(),
        )
    }

    /// Hashes the config. The hash identifies what the run learns.
    pub fn digest(&self) -> Digest {
        Digest::of_bytes(serde_json::to_string(self).expect("a config has a JSON form").as_bytes())
    }

    /// Returns the end of the schedule if the config fixes it.
    pub fn control(&self) -> Option<Control> {
        let stop_at = self.schedule.num_steps?;
        Some(Control { decay_from: self.schedule.decay_from.unwrap_or(stop_at - stop_at / 5), stop_at })
    }

    /// Returns the learning rate of a step, 0 being the first.
    pub fn learning_rate(&self, step: u64, control: Option<Control>) -> f64 {
        let warmup = ((step + 1) as f64 / (self.schedule.warmup_steps + 1) as f64).min(1.0);
        let decay = match control {
            Some(Control { decay_from, stop_at }) if step >= decay_from => {
                (stop_at.saturating_sub(step)) as f64 / (stop_at - decay_from + 1) as f64
            }
            _ => 1.0,
        };
        self.learner.learning_rate * warmup * decay
    }
}

impl LearnerConfig {
    /// Whether some loss is relative to the pretrained model that the run begins with.
    pub(crate) fn needs_base(&self) -> bool {
        self.kl.is_some() || self.dpo.is_some()
    }

    /// Whether examples train by cross-entropy.
    pub(crate) fn draws_examples(&self) -> bool {
        let of_policy_gradient = self.policy_gradient.as_ref().map(|config| config.cross_entropy);
        of_policy_gradient.or(self.dpo.as_ref().map(|config| config.cross_entropy)).unwrap_or(true)
    }

    /// Returns the number of updates that share the fresh groups of a step, and that it makes at least.
    pub(crate) fn updates_per_step(&self) -> u32 {
        let of_policy_gradient = self.policy_gradient.as_ref().map(|config| config.updates_per_step);
        of_policy_gradient.or(self.dpo.as_ref().map(|config| config.updates_per_step)).unwrap_or(1)
    }

    /// Returns the number of updates of a step whose groups' examples have this many input tokens.
    pub(crate) fn num_updates(&self, num_example_tokens: u64) -> u32 {
        ((self.reuse * num_example_tokens as f64 / self.update_tokens as f64).round() as u32).max(1)
    }
}

impl SelfPlayConfig {
    fn validate(&self, config: &Config) -> Result<(), Error> {
        let num_tasks = config.batch.num_tasks;
        let key = "self_play.propose_tasks";
        check(key, "at least 0, below batch.num_tasks", self.propose_tasks, self.propose_tasks < num_tasks)?;
        let share = self.proposer_share;
        check("self_play.proposer_share", "at least 0, below 1", share, (0.0..1.0).contains(&share))?;
        let ProblemShares { proposer, mutation, archive, ladder } = self.problems;
        let shares = [proposer, mutation, archive, ladder];
        let holds = shares.iter().all(|share| *share >= 0.0 && share.is_finite()) && shares.iter().sum::<f64>() > 0.0;
        check("self_play.problems", "weights of 0 or more, not all 0", format!("{shares:?}"), holds)?;
        let learner = &config.learner;
        let expected = "false with self_play, whose measurements would use the unshuffled verdicts";
        check("learner.shuffle_labels", expected, learner.shuffle_labels, !learner.shuffle_labels)?;
        let holds = learner.draws_examples() || self.proposer_loss == ProposerLoss::PolicyGradient;
        let expected = "policy-gradient if learner.policy_gradient.cross_entropy is false";
        check("self_play.proposer_loss", expected, "cross-entropy", holds)?;
        let is_played = config.actor.behavior == Behavior::Policy && config.actor.temperature == 1.0;
        let holds = self.proposer_loss == ProposerLoss::CrossEntropy || is_played;
        let expected = "cross-entropy unless actor.behavior is policy and actor.temperature is 1";
        check("self_play.proposer_loss", expected, "policy-gradient", holds)
    }
}

pub(crate) fn check(
    key: &'static str,
    expected: &'static str,
    got: impl std::fmt::Display,
    holds: bool,
) -> Result<(), Error> {
    if holds { Ok(()) } else { Err(Error::Config { key, expected, got: got.to_string() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learning_rate_warms_up_stays_and_decays() {
        let mut config = crate::test_config();
        config.learner.learning_rate = 1.0;
        config.schedule = ScheduleConfig { num_steps: Some(10), warmup_steps: 3, decay_from: Some(8) };
        let rates: Vec<f64> = (0..10).map(|step| config.learning_rate(step, config.control())).collect();
        let expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0 / 3.0, 1.0 / 3.0];
        assert_eq!(rates, expected);
    }

    #[test]
    fn decay_takes_the_last_fifth() {
        let mut config = crate::test_config();
        config.schedule = ScheduleConfig { num_steps: Some(100), warmup_steps: 0, decay_from: None };
        assert_eq!(config.control(), Some(Control { decay_from: 80, stop_at: 100 }));
    }
}
