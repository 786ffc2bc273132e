use proto::Behavior;
use serde::{Deserialize, Serialize};

use super::{Config, check};
use crate::Error;

/// How rollouts train the policy, in addition to or instead of the cross-entropy on examples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyGradientConfig {
    /// Computation of advantages and divisor of the loss: `dr-grpo` or `reinforce-plus-plus`.
    pub kind: PolicyGradientKind,
    /// Weight of its loss relative to the cross-entropy; over 0. Ours; 1 in an update without cross-entropy.
    pub weight: f64,
    /// Importance ratios below 1 minus this are not pushed further down; over 0, up to 1. 0.2 in PPO and DAPO.
    pub clip_low: f64,
    /// Importance ratios over 1 plus this are not pushed further up; over 0, up to 100. 0.28 in DAPO.
    pub clip_high: f64,
    /// Weight of a token's entropy, in nats, relative to its surrogate; 0 to 1. 0 in Dr.GRPO, REINFORCE++ and DAPO.
    pub entropy_bonus: f64,
    /// Number of updates that share a step's fresh groups in equal parts, the first of the step; 1 to 1000. A step makes at least
    /// this many updates. Ours: the later an update, the further its weights are from those that generated the rollouts.
    pub updates_per_step: u32,
    /// Whether examples train by cross-entropy as well; if false, the policy gradient trains alone.
    pub cross_entropy: bool,
}

/// Computation of advantages and divisor of the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyGradientKind {
    /// Reward minus the mean of the group; the loss is divided by a constant, rollouts times the longest answer allowed
    /// (Liu et al. 2025).
    DrGrpo,
    /// Return, whitened over the tokens of the batch; the loss is a mean over tokens (Hu 2025).
    ReinforcePlusPlus,
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
        let is_enough = num_rollouts > 1 || self.kind != PolicyGradientKind::DrGrpo;
        check("batch.num_rollouts", "2 or more if learner.policy_gradient.kind is dr-grpo", num_rollouts, is_enough)
    }
}
