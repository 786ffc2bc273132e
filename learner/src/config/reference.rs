use proto::Digest;
use serde::{Deserialize, Serialize};

use super::{Config, PolicyGradientKind, check};
use crate::Error;

/// A penalty that holds the policy near a reference, in runs with a policy gradient.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KlConfig {
    /// The reference: `base`, the pretrained model that the run begins with.
    pub to: KlReference,
    /// Weight of a nat of divergence relative to the surrogate, or to the advantage; over 0, up to 100. 0.04 in GRPO, 0.05 in
    /// TRL's RLOO.
    pub weight: f64,
    /// Where the penalty is added.
    pub form: KlForm,
}

/// Preferences for the right answers of a group over its wrong ones (DPO), relative to the pretrained model that the run begins with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DpoConfig {
    /// Weight of its loss relative to the cross-entropy; over 0, up to 1000. Ours.
    pub weight: f64,
    /// Scale of the difference of log ratios; over 0, up to 100. 0.1 in DPO.
    pub beta: f64,
    /// Whether log ratios are means over the tokens of an answer rather than sums, as in DPO.
    pub per_token: bool,
    /// Number of updates that share a step's pairs in equal parts, the first of the step; 1 to 1000.
    pub updates_per_step: u32,
    /// Whether examples train by cross-entropy as well.
    pub cross_entropy: bool,
}

/// Distillation of a teacher on the policy's own answers, by the policy gradient.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistillConfig {
    /// Hash of the teacher's files. A config that a person writes names the teacher or its place instead.
    pub teacher: Digest,
    /// Weight of a nat of divergence from the teacher, taken off the advantage of each token; over 0, up to 100.
    pub weight: f64,
}

/// A reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KlReference {
    /// The pretrained model that the run begins with.
    Base,
}

/// Where a penalty is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KlForm {
    /// To the loss of each token: the estimator k2 of the current policy.
    Loss,
    /// Taken off the advantage of each token: the estimator k1 of the policy that drew it.
    Advantage,
}

impl DpoConfig {
    /// Checks ranges, and that the rest of the config is compatible with preferences.
    pub(crate) fn validate(&self, config: &Config) -> Result<(), Error> {
        let within = |value: f64, last: f64| value > 0.0 && value <= last;
        check("learner.dpo.weight", "over 0, up to 1000", self.weight, within(self.weight, 1_000.0))?;
        check("learner.dpo.beta", "over 0, up to 100", self.beta, within(self.beta, 100.0))?;
        let updates = self.updates_per_step;
        check("learner.dpo.updates_per_step", "1 to 1000", updates, (1..=1_000).contains(&updates))?;
        let expected = "none in a run without a pretrained model, which has no reference";
        check("learner.dpo", expected, "preferences", config.language.is_some())?;
        let is_alone = config.learner.policy_gradient.is_none();
        check("learner.dpo", "none with learner.policy_gradient: one loss on fresh groups", "both", is_alone)?;
        let is_shuffled = config.learner.shuffle_labels;
        let expected = "false with learner.dpo, which would use the unshuffled verdicts";
        check("learner.shuffle_labels", expected, is_shuffled, !is_shuffled)?;
        let num_rollouts = config.batch.num_rollouts;
        check("batch.num_rollouts", "2 or more with learner.dpo", num_rollouts, num_rollouts > 1)
    }
}

impl DistillConfig {
    /// Checks ranges, and that the rest of the config is compatible with distillation.
    pub(crate) fn validate(&self, config: &Config) -> Result<(), Error> {
        check("learner.distill.weight", "over 0, up to 100", self.weight, self.weight > 0.0 && self.weight <= 100.0)?;
        let expected = "none in a run without a pretrained model, whose tokens a teacher could score";
        check("learner.distill", expected, "a teacher", config.language.is_some())?;
        let policy_gradient = config.learner.policy_gradient.as_ref();
        let expected =
            "none without learner.policy_gradient (its kind is distill if verdicts are to give no advantage)";
        check("learner.distill", expected, "a teacher", policy_gradient.is_some())?;
        let expected = "none if learner.policy_gradient.kind is gspo, whose advantages are of whole rollouts";
        check("learner.distill", expected, "a teacher", !is_of_sequences(config))
    }
}

impl KlConfig {
    /// Checks ranges, and that the rest of the config is compatible with the penalty.
    pub(crate) fn validate(&self, config: &Config) -> Result<(), Error> {
        check("learner.kl.weight", "over 0, up to 100", self.weight, self.weight > 0.0 && self.weight <= 100.0)?;
        let expected = "none in a run without a pretrained model, which has no reference";
        check("learner.kl", expected, "a penalty", config.language.is_some())?;
        let policy_gradient = config.learner.policy_gradient.as_ref();
        let expected = "none without learner.policy_gradient, whose rollouts it is a penalty on";
        check("learner.kl", expected, "a penalty", policy_gradient.is_some())?;
        let is_per_token = self.form == KlForm::Loss || !is_of_sequences(config);
        let expected = "loss if learner.policy_gradient.kind is gspo, whose advantages are of whole rollouts";
        check("learner.kl.form", expected, "advantage", is_per_token)
    }
}

/// Whether rollouts have one advantage as a whole.
fn is_of_sequences(config: &Config) -> bool {
    config.learner.policy_gradient.as_ref().is_some_and(|config| config.kind == PolicyGradientKind::Gspo)
}
