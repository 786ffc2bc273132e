use serde::{Deserialize, Serialize};

use crate::{Difficulty, Digest, Niche, Problem, ProblemOrigin};

/// Identifies a task within a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TaskId {
    /// The purpose of the task; evaluations have indices of their own.
    pub kind: TaskKind,
    /// The batch that it belongs to; for an evaluation, the step whose weights are evaluated.
    pub batch: u64,
    /// Position in the batch, or in the evaluations planned at that step.
    pub index: u32,
}

/// How the learner uses a task's group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskKind {
    /// It is part of a batch and trains the policy.
    Train,
    /// It answers one problem of an exam; it never seals a batch.
    Evaluate,
}

/// The work that a task requests from an actor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Requests answers to a problem.
    Solve {
        /// The problem's public part.
        problem: Problem,
        /// Who wrote it.
        origin: ProblemOrigin,
        /// Whether the verifier needs the problem's key, which is sent separately.
        has_key: bool,
    },
    /// Requests new problems.
    Propose {
        /// The domain of the problems.
        domain: String,
        /// The kind of the problems.
        niche: Niche,
        /// How hard they should be for the current policy.
        difficulty: Difficulty,
    },
}

impl Request {
    /// Returns the name of the domain.
    pub fn domain(&self) -> &str {
        match self {
            Request::Solve { problem, .. } => &problem.domain,
            Request::Propose { domain, .. } => domain,
        }
    }

    /// Returns the problem to solve; `None` if new problems are requested.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Request::Solve { problem, .. } => Some(problem),
            Request::Propose { .. } => None,
        }
    }
}

/// The source of a rollout's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Behavior {
    /// Sampling from the network under the action mask.
    Policy,
    /// Uniformly random legal tokens: the control for every claim about learning from the policy's own play.
    UniformLegal,
    /// The domain's own solutions: the control that imitates a machine instead of playing.
    Solver,
}

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// The source of the tokens.
    pub behavior: Behavior,
    /// Divides the logits; 0 takes the most probable token (the lowest id among equals).
    pub temperature: f32,
}

/// One self-contained unit of an actor's work: the actor needs only this message and the weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// Name within the run.
    pub id: TaskId,
    /// Seed of the run; with the id, it is the key of every random draw.
    pub seed: u64,
    /// Weights to play with.
    pub weights: Digest,
    /// The step after which these weights were published.
    pub policy_version: u64,
    /// Whether newer weights may play it, and may take over in the middle of a rollout.
    pub free_running: bool,
    /// What to do.
    pub request: Request,
    /// Domain and source as planned by the learner, for its statistics; empty for evaluations.
    pub family: String,
    /// How many rollouts to play (k).
    pub num_rollouts: u32,
    /// How to draw tokens.
    pub sampling: Sampling,
    /// Most answer tokens, forced ones included; a rollout that would exceed it stops as [`crate::StopReason::Length`].
    pub max_tokens: u32,
}

impl Task {
    /// The most rollouts that a task may ask for.
    pub const MAX_ROLLOUTS: u32 = 4_096;

    /// The most tokens per rollout that a task may ask for.
    pub const MAX_TOKENS: u32 = 4_096;
}
