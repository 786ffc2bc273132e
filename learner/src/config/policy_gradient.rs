use proto::Behavior;
use serde::{Deserialize, Serialize};

use super::{Config, check};
use crate::Error;

/// How rollouts train the policy, in addition to or instead of the cross-entropy on examples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyGradientConfig {
    /// Computation of advantages and divisor of the loss: `grpo`, `dr-grpo`, `dapo`, `gspo`, `rloo`, `reinforce-plus-plus`,
    /// `reinforce-plus-plus-baseline`, or `distill`.
    pub kind: PolicyGradientKind,
    /// Weight of its loss relative to the cross-entropy; over 0. Ours; 1 in an update without cross-entropy.
    pub weight: f64,
    /// Importance ratios below 1 minus this are not pushed further down; over 0, up to 1. 0.2 in PPO and DAPO, 3e-4 in GSPO.
    pub clip_low: f64,
    /// Importance ratios over 1 plus this are not pushed further up; over 0, up to 100. 0.28 in DAPO, 4e-4 in GSPO.
    pub clip_high: f64,
    /// Weight of a token's entropy, in nats, relative to its surrogate; 0 to 1. 0 in Dr.GRPO, REINFORCE++ and DAPO.
    pub entropy_bonus: f64,
    /// Number of updates that share a step's fresh groups in equal parts, the first of the step; 1 to 1000. A step makes at least
    /// this many updates. Ours: the later an update, the further its weights are from those that generated the rollouts.
    pub updates_per_step: u32,
    /// With `dapo`: train on the first so many groups that disagree, in the order of the batch, and leave out the others; 1 to
    /// `batch.num_tasks`. Absent for all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups_per_step: Option<u32>,
    /// Whether examples train by cross-entropy as well; if false, the policy gradient trains alone.
    pub cross_entropy: bool,
}

/// Computation of advantages and divisor of the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyGradientKind {
    /// Reward minus the mean of the group, divided by its standard deviation; the loss is the mean over rollouts of the mean over
    /// tokens (Shao et al. 2024).
    Grpo,
    /// Reward minus the mean of the group; the loss is divided by a constant, rollouts times the longest answer allowed
    /// (Liu et al. 2025).
    DrGrpo,
    /// The advantage of `grpo`; the loss is the mean over the tokens of groups that disagree (Yu et al. 2025).
    Dapo,
    /// The advantage of `grpo`; an importance ratio for the whole rollout, and the mean over rollouts (Zheng et al. 2025).
    Gspo,
    /// Reward minus the mean of the group's others; the loss is the mean over rollouts of the sum over tokens
    /// (Ahmadian et al. 2024).
    Rloo,
    /// Return, whitened over the tokens of the batch; the loss is a mean over tokens (Hu 2025).
    ReinforcePlusPlus,
    /// None from verdicts: that of `learner.distill` alone; the loss is a mean over tokens.
    Distill,
    /// As `reinforce-plus-plus`, for rewards minus the mean of the group (Hu 2025).
    ReinforcePlusPlusBaseline,
}

impl PolicyGradientConfig {
    /// Checks ranges, and that the rest of the config is compatible with policy gradients.
    pub(crate) fn validate(&self, config: &Config) -> Result<(), Error> {
        let within = |value: f64, last: f64| value > 0.0 && value <= last;
        check("learner.policy_gradient.weight", "over 0, up to 1000", self.weight, within(self.weight, 1_000.0))?;
        check("learner.policy_gradient.clip_low", "over 0, up to 1", self.clip_low, within(self.clip_low, 1.0))?;
        check("learner.policy_gradient.clip_high", "over 0, up to 100", self.clip_high, within(self.clip_high, 100.0))?;
        let bonus = self.entropy_bonus;
        check("learner.policy_gradient.entropy_bonus", "0 to 1", bonus, (0.0..=1.0).contains(&bonus))?;
        check(
            "learner.policy_gradient.updates_per_step",
            "1 to 1000",
            self.updates_per_step,
            (1..=1_000).contains(&self.updates_per_step),
        )?;
        let is_shuffled = config.learner.shuffle_labels;
        let expected = "false with learner.policy_gradient, which would use the unshuffled verdicts";
        check("learner.shuffle_labels", expected, is_shuffled, !is_shuffled)?;
        let (behavior, temperature, num_rollouts) =
            (config.actor.behavior, config.actor.temperature, config.batch.num_rollouts);
        // Importance ratios compare two versions of the network, at the temperature at which the learner computes.
        check(
            "actor.behavior",
            "policy if learner.policy_gradient is set",
            "uniform-legal",
            behavior == Behavior::Policy,
        )?;
        check("actor.temperature", "1 if learner.policy_gradient is set", temperature, temperature == 1.0)?;
        let is_of_batch = matches!(self.kind, PolicyGradientKind::ReinforcePlusPlus | PolicyGradientKind::Distill);
        let has_baseline = num_rollouts > 1 || is_of_batch;
        let expected = "2 or more unless learner.policy_gradient.kind is reinforce-plus-plus or distill";
        check("batch.num_rollouts", expected, num_rollouts, has_baseline)?;
        let has_teacher = self.kind != PolicyGradientKind::Distill || config.learner.distill.is_some();
        check("learner.policy_gradient.kind", "another kind without learner.distill", "distill", has_teacher)?;
        let Some(num_groups) = self.groups_per_step else { return Ok(()) };
        let key = "learner.policy_gradient.groups_per_step";
        check(key, "none unless the kind is dapo", num_groups, self.kind == PolicyGradientKind::Dapo)?;
        check(key, "1 to batch.num_tasks", num_groups, (1..=config.batch.num_tasks).contains(&num_groups))
    }
}
