//! The learner: plans batches, folds what comes back, trains, and remembers everything in a journal.
//!
//! Start at [`main_loop`](run); the run as a function is [`Fold`].

mod checkpoint;
mod config;
mod fold;
mod journal;
mod main_loop;
mod manifest;
mod optimizer;
mod policy_gradient;
mod replay;
mod window;

use std::path::PathBuf;

pub use checkpoint::{Checkpoint, list_checkpoints, load_checkpoint, load_latest};
pub use config::{ActorConfig, BatchConfig, Config, Control, ExamsConfig, LadderShare, LearnerConfig, ScheduleConfig};
pub use fold::{Fold, State, StepReport, Totals};
pub use journal::{EvalRecord, Journal, JournalReader, Record, RecordError, StepRecord};
pub use main_loop::{Event, Exam, Outcome, RunOptions, StepEvent, Summary, run};
pub use manifest::{BuildId, Manifest};
pub use policy_gradient::{PolicyGradientConfig, PolicyGradientKind, PolicyGradientReport};
pub use replay::{ReplayReport, replay};

/// What can go wrong in a learner.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key that is out of range.
    #[error("{key}: expected {expected}, got {got}")]
    Config {
        /// The key.
        key: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        got: String,
    },
    /// The network refused.
    #[error(transparent)]
    Policy(#[from] policy::Error),
    /// The bus failed.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// A file operation failed.
    #[error("{operation} {}: {reason}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// Why it failed; not named `source`, since the message has it already.
        reason: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: expected {expected}, got {got}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What belongs there.
        expected: String,
        /// What is there.
        got: String,
    },
    /// Something was computed twice with different results, or does not belong to this run.
    #[error("integrity: {what} of step {step}: {reason}")]
    Integrity {
        /// What disagrees.
        what: &'static str,
        /// At which step.
        step: u64,
        /// How it disagrees.
        reason: String,
    },
    /// A resumed run is not the run that was started.
    #[error("manifest: {field} was {was}, is {is}; `--fork` starts a new run from this config")]
    Manifest {
        /// Which field changed.
        field: &'static str,
        /// Its value in the run directory.
        was: String,
        /// Its value now.
        is: String,
    },
    /// Training diverged.
    #[error("training diverged: expected a finite {what}, got {got}")]
    NotFinite {
        /// Which figure.
        what: &'static str,
        /// Its value.
        got: f64,
    },
    /// Nothing came back for too long.
    #[error("stalled for {seconds} s at step {step}: waiting for {missing} of {total} tasks, the first is {first}")]
    Stalled {
        /// How long.
        seconds: u64,
        /// At which step.
        step: u64,
        /// How many tasks are missing.
        missing: usize,
        /// Of how many.
        total: usize,
        /// The first of them.
        first: String,
    },
}

impl Error {
    pub(crate) fn io<'a>(
        operation: &'static str,
        path: &'a std::path::Path,
    ) -> impl FnOnce(std::io::Error) -> Error + 'a {
        move |reason| Error::Io { operation, path: path.to_owned(), reason }
    }
}

#[cfg(test)]
fn test_config() -> Config {
    Config {
        seed: 1,
        model: policy::ModelConfig {
            vocabulary_size: 256,
            max_positions: 32,
            d_model: 16,
            num_layers: 1,
            num_heads: 1,
            num_kv_heads: 1,
            ff_dim: 16,
        },
        batch: BatchConfig { num_tasks: 4, num_rollouts: 2, lag: 0 },
        actor: ActorConfig { behavior: proto::Behavior::Policy, temperature: 1.0, max_answer_tokens: 20 },
        ladder: vec![LadderShare { domain: "countdown".to_owned(), level: 1, share: 1.0 }],
        learner: LearnerConfig {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.98,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            ema_decay: 0.9,
            window_examples: 64,
            reuse: 2.0,
            updates_per_step: 2,
            max_goal_weight: 4.0,
            hindsight: true,
            num_shards: 2,
            policy_gradient: None,
        },
        schedule: ScheduleConfig { num_steps: Some(10), warmup_steps: 2, decay_from: None },
        exams: ExamsConfig { names: Vec::new(), every_steps: 0 },
    }
}
