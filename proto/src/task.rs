use serde::{Deserialize, Serialize};

use crate::{Difficulty, Digest, Niche, Problem, ProblemOrigin};

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

/// What becomes of a task's group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskKind {
    /// It is part of a batch and trains the policy.
    Train,
    /// It answers one problem of an exam; it never seals a batch.
    Evaluate,
}

/// What an actor is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Answers to a problem.
    Solve {
        /// The problem's public part.
        problem: Problem,
        /// Who wrote it.
        origin: ProblemOrigin,
        /// Whether the verifier needs the problem's key, which travels apart.
        has_key: bool,
    },
    /// Problems.
    Propose {
        /// Of which domain.
        domain: String,
        /// Of which kind.
        niche: Niche,
        /// How hard for the current policy.
        difficulty: Difficulty,
    },
}

impl Request {
    /// Names the domain.
    pub fn domain(&self) -> &str {
        match self {
            Request::Solve { problem, .. } => &problem.domain,
            Request::Propose { domain, .. } => domain,
        }
    }

    /// Gives the problem to solve; `None` where problems are asked for.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Request::Solve { problem, .. } => Some(problem),
            Request::Propose { .. } => None,
        }
    }
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
    /// Whether newer weights than these may play it, also from the middle of a rollout on.
    pub free_running: bool,
    /// What to do.
    pub request: Request,
    /// What the learner planned it as, for its statistics: domain and source; empty for evaluations.
    pub family: String,
    /// How many rollouts to play (k).
    pub num_rollouts: u32,
    /// How to draw tokens.
    pub sampling: Sampling,
    /// Most answer tokens, forced ones included; a rollout that would pass it stops as [`crate::StopReason::Length`].
    pub max_tokens: u32,
}

impl Task {
    /// The most rollouts that a task may ask for.
    pub const MAX_ROLLOUTS: u32 = 4_096;

    /// The most tokens that it may ask for in each.
    pub const MAX_TOKENS: u32 = 4_096;
}
