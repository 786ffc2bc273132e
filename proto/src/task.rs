use serde::{Deserialize, Serialize};

use crate::{Digest, Problem, ProblemOrigin};

/// Names a task within a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TaskId {
    /// What the task is for; evaluations have indices of their own.
    pub kind: TaskKind,
    /// The batch that it belongs to; for an evaluation, the step whose weights sit the exam.
    pub batch: u64,
    /// Position in the batch, or in the evaluations planned at that step.
    pub index: u32,
}

/// What an actor does with a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskKind {
    /// Solve a problem; the rollouts train the policy.
    Solve,
    /// Sit one problem of an exam; never seals a batch.
    Evaluate,
}

/// Where the tokens of a rollout come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Behavior {
    /// The network under the action mask.
    Policy,
    /// Uniformly random legal tokens; the control of every claim about learning from the policy's own play.
    UniformLegal,
}

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Where the tokens come from.
    pub behavior: Behavior,
    /// Divides the logits; 0 takes the most probable token (the lowest id among equals).
    pub temperature: f32,
}

/// One unit of an actor's work, complete: an actor needs this message and the weights, nothing else.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// Name within the run.
    pub id: TaskId,
    /// Seed of the run: with the id it keys every draw.
    pub seed: u64,
    /// Weights to play with.
    pub weights: Digest,
    /// The step after which these weights were published.
    pub policy_version: u64,
    /// What to solve.
    pub problem: Problem,
    /// Who wrote it.
    pub origin: ProblemOrigin,
    /// What the learner planned it as, for its statistics; empty for evaluations.
    pub family: String,
    /// How many rollouts to play (k).
    pub num_rollouts: u32,
    /// How to draw tokens.
    pub sampling: Sampling,
    /// Most answer tokens, forced ones included; a rollout that would pass it stops as [`crate::StopReason::Length`].
    pub max_tokens: u32,
}
