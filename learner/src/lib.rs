//! The learner: plans batches, folds the groups that come back, trains, and records everything in a journal.
//!
//! Start at [`main_loop`](run). [`Fold`] is the run as a function.

mod advantages;
mod archive;
mod audit;
mod baseline;
mod checkpoint;
mod config;
mod curriculum;
mod draw;
mod event;
mod fold;
#[cfg(test)]
mod golden;
mod journal;
mod ledger;
mod main_loop;
mod manifest;
mod minibatch;
mod plan;
mod point;
mod policy_gradient;
mod preferences;
mod received;
mod references;
mod replay_buffers;
mod run_dir;
mod run_lock;
mod self_play;
mod shuffle;
mod state;
#[cfg(test)]
mod test_groups;
#[cfg(test)]
mod test_run;
mod verify_journal;
mod waiting;
mod writer;

use std::path::PathBuf;

use policy::formats::FormatError;

pub use audit::Audit;
pub use checkpoint::{Checkpoint, load_checkpoint};
pub use config::{
    ActorConfig, BatchConfig, Config, Constrain, Control, DistillConfig, DomainShare, DpoConfig, ExamsConfig, KlConfig,
    KlForm, KlReference, LanguageConfig, LearnerConfig, LevelWeight, PolicyGradientConfig, PolicyGradientKind,
    ProblemShares, ProposerLoss, ScheduleConfig, SelfPlayConfig,
};
pub use event::{Ban, Event, Observer, Sample, StepEvent};
pub use fold::{AnswersReport, Fold, SelfPlayReport, StepReport};
pub use journal::{
    BanRecord, Damage, EvalRecord, GroupRecord, Journal, JournalReader, Known, Opening, Place, Record, RecordError,
    StepRecord, read_journal,
};
pub use main_loop::{Exam, KeepJournal, Outcome, RunOptions, Summary, run};
pub use manifest::{BuildId, Manifest};
pub use plan::{Planned, Plans, families};
pub use policy_gradient::PolicyGradientReport;
pub use preferences::DpoReport;
pub use references::{Models, References};
pub use run_dir::{expect_begun_with, expect_known, load_newest};
pub use run_lock::{RunLock, expect_in_place};
pub use state::{State, Totals};
pub use verify_journal::{ReplayReport, verify_journal};
pub use waiting::{Holder, Missing, Waiting};

/// Errors of a learner.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key of the config is out of range.
    #[error("{key}: expected {expected}, got {got}")]
    Config {
        /// The key.
        key: &'static str,
        /// The allowed values.
        expected: &'static str,
        /// The actual value.
        got: String,
    },
    /// The policy failed.
    #[error(transparent)]
    Policy(#[from] policy::Error),
    /// The pretrained model that the run begins with cannot be read.
    #[error(transparent)]
    Base(#[from] FormatError),
    /// The bus failed.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// A file operation failed.
    #[error("{operation} {}: {reason}", path.display())]
    Io {
        /// The operation.
        operation: &'static str,
        /// Its file or folder.
        path: PathBuf,
        /// Why it failed. Not named `source`, because the message includes it already.
        reason: std::io::Error,
    },
    /// A file does not have the expected content.
    #[error("{}: expected {expected}, got {got}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The expected content.
        expected: String,
        /// The actual content.
        got: String,
    },
    /// A result differs when it is computed again, or does not belong to this run.
    #[error("integrity: {what} of step {step}: {reason}")]
    Integrity {
        /// The item that disagrees.
        what: &'static str,
        /// Its step.
        step: u64,
        /// How it disagrees.
        reason: String,
    },
    /// A resumed run differs from the run that was started.
    #[error("manifest: {field} was {was}, is {is}; `--fork` starts a new run from this config")]
    Manifest {
        /// The field that changed, down to the key of a table.
        field: String,
        /// Its value in the run directory.
        was: String,
        /// Its value now.
        is: String,
    },
    /// The run cannot be replayed, because it uses a device that is not reproducible.
    #[error(
        "replay: expected a run on reproducible devices (learner.device and actor.device = \"cpu\"), got a run on other devices"
    )]
    NotReproducible,
    /// Training diverged.
    #[error("training diverged: expected a finite {what}, got {got}")]
    NotFinite {
        /// The quantity that is not finite.
        what: &'static str,
        /// Its value.
        got: f64,
    },
    /// An observer of events failed.
    #[error(transparent)]
    Observer(#[from] Box<dyn std::error::Error + Send + Sync>),
    /// No group of a task could be judged, whichever actor played it.
    #[error("task {} of batch {}: {num_tries} consecutive groups could not be scored (actors {}): {reason}", task.index, task.batch, players.join(", "))]
    Unjudged {
        /// The task.
        task: proto::TaskId,
        /// How many of its groups could not be judged.
        num_tries: usize,
        /// The actors that played it.
        players: Vec<String>,
        /// The reason that the last verifier gave.
        reason: String,
    },
    /// A checker was unavailable for too long.
    #[error("step {step}: {task} has waited {waited_seconds} s for its checker (local.checker_seconds): {reason}")]
    CheckerUnavailable {
        /// The step that cannot continue.
        step: u64,
        /// The task.
        task: String,
        /// How long it has waited, in seconds.
        waited_seconds: u64,
        /// The latest reason that a verifier gave.
        reason: String,
    },
    /// No result came back for too long.
    #[error("stalled: {0}")]
    Stalled(Box<Waiting>),
}

impl Error {
    pub(crate) fn io<'a>(
        operation: &'static str,
        path: &'a std::path::Path,
    ) -> impl FnOnce(std::io::Error) -> Error + 'a {
        move |reason| Error::Io { operation, path: path.to_owned(), reason }
    }
}

/// Returns a manifest with arbitrary values.
#[cfg(test)]
fn test_manifest() -> Manifest {
    Manifest {
        config: proto::Digest::of_bytes(b"config"),
        build: BuildId("test".to_owned()),
        verifiers: [("countdown".to_owned(), "1".to_owned())].into(),
        exams: [("countdown-3".to_owned(), proto::Digest::of_bytes(b"exam"))].into(),
        numerics: policy::Numerics {
            kernels: "k".to_owned(),
            device: policy::Device::Cpu,
            dtype: "d".to_owned(),
            pass_digest: None,
        },
        reproducible: true,
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
            variant: policy::Variant::default(),
            adapter: None,
        },
        batch: BatchConfig { num_tasks: 4, num_rollouts: 2, lag: 0, max_staleness: None },
        actor: ActorConfig {
            device: policy::Device::Cpu,
            behavior: proto::Behavior::Policy,
            temperature: 1.0,
            max_answer_tokens: 20,
        },
        domains: vec![DomainShare {
            name: "countdown".to_owned(),
            share: 1.0,
            levels: vec![LevelWeight { level: 1, weight: 1.0 }],
            file: None,
        }],
        self_play: None,
        learner: LearnerConfig {
            device: policy::Device::Cpu,
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.98,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            ema_decay: 0.9,
            window_examples: 64,
            reuse: 2.0,
            update_tokens: 64,
            max_goal_weight: 4.0,
            hindsight: true,
            executor_labels: true,
            shuffle_labels: false,
            num_shards: 2,
            policy_gradient: None,
            kl: None,
            distill: None,
            dpo: None,
        },
        schedule: ScheduleConfig { num_steps: Some(10), warmup_steps: 2, decay_from: None },
        language: None,
        exams: ExamsConfig { names: Vec::new(), every_steps: 0 },
    }
}

/// A domain for tests. A mutant appends a number to its parent's text, a proposal's prompt is its niche and difficulty, and
/// the last digit of a niche is its level.
#[cfg(test)]
struct TestSource(&'static str);

#[cfg(test)]
impl proto::ProblemSource for TestSource {
    fn name(&self) -> &'static str {
        self.0
    }

    fn ladder_levels(&self) -> &'static [proto::LadderLevel] {
        &[proto::LadderLevel { level: 1, description: "numbers" }]
    }

    fn level_of(&self, niche: proto::Niche) -> u32 {
        (niche.0 % 10) as u32
    }

    fn ladder(&self, _level: u32, _seed: u64, index: u64) -> proto::KeyedProblem {
        test_problem(self.0, &format!("ladder {index}"))
    }

    fn mutate(&self, parent: &proto::KeyedProblem, rng: &mut proto::CounterRng) -> Option<proto::KeyedProblem> {
        Some(test_problem(self.0, &format!("{} {}", parent.problem.text, rng.next_u64())))
    }

    fn propose_prompt(&self, niche: proto::Niche, difficulty: proto::Difficulty) -> Vec<proto::TokenId> {
        vec![niche.0 as proto::TokenId, difficulty as proto::TokenId]
    }

    fn max_proposal_tokens(&self, _niche: proto::Niche) -> u32 {
        7
    }

    fn describe_niche(&self, niche: proto::Niche) -> String {
        niche.to_string()
    }

    fn canonical_hash(&self, problem: &proto::Problem) -> proto::Digest {
        proto::Digest::of(problem)
    }

    fn is_exam(&self, _problem: &proto::Problem) -> bool {
        false
    }
}

#[cfg(test)]
fn test_problem(domain: &str, text: &str) -> proto::KeyedProblem {
    let problem = proto::Problem { domain: domain.to_owned(), text: text.to_owned() };
    proto::KeyedProblem { problem, key: Some(proto::ProblemKey { text: format!("key of {text}") }) }
}
