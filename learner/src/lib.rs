//! The learner: plans batches, folds what comes back, trains, and remembers everything in a journal.
//!
//! Start at [`main_loop`](run); the run as a function is [`Fold`].

mod archive;
mod audit;
mod baseline;
mod checkpoint;
mod config;
mod curriculum;
mod event;
mod fold;
#[cfg(test)]
mod golden;
mod journal;
mod ledger;
mod main_loop;
mod manifest;
mod plan;
mod point;
mod policy_gradient;
mod received;
mod replay;
mod run_dir;
mod self_play;
mod shuffle;
#[cfg(test)]
mod test_run;
mod waiting;
mod window;
mod writer;

use std::path::PathBuf;

pub use audit::Audit;
pub use checkpoint::{Checkpoint, load_checkpoint};
pub use config::{
    ActorConfig, BatchConfig, Config, Control, DomainShare, ExamsConfig, LearnerConfig, LevelWeight, ProblemShares,
    ProposerLoss, ScheduleConfig, SelfPlayConfig,
};
pub use event::{Ban, Event, Observer, Sample, StepEvent};
pub use fold::{Fold, SelfPlayReport, State, StepReport, Totals};
pub use journal::{
    BanRecord, Damage, EvalRecord, GroupRecord, Journal, JournalReader, Opening, Place, Record, RecordError,
    StepRecord, read_journal,
};
pub use main_loop::{Exam, KeepJournal, Outcome, RunOptions, Summary, run};
pub use manifest::{BuildId, Manifest};
pub use plan::{Planned, Plans, families};
pub use point::Known;
pub use policy_gradient::{PolicyGradientConfig, PolicyGradientKind, PolicyGradientReport};
pub use replay::{ReplayReport, replay};
pub use run_dir::{RunLock, expect_begun_with, expect_in_place, expect_known, load_newest};
pub use waiting::{Holder, Missing, Waiting};

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
        /// Which field changed, down to the key of a table.
        field: String,
        /// Its value in the run directory.
        was: String,
        /// Its value now.
        is: String,
    },
    /// A run that cannot be computed again.
    #[error(
        "replay: expected a run on devices whose results are the same twice (learner.device and actor.device = \"cpu\"), got another"
    )]
    NotReproducible,
    /// Training diverged.
    #[error("training diverged: expected a finite {what}, got {got}")]
    NotFinite {
        /// Which figure.
        what: &'static str,
        /// Its value.
        got: f64,
    },
    /// Whoever was told of an event could not take it in.
    #[error(transparent)]
    Observer(#[from] Box<dyn std::error::Error + Send + Sync>),
    /// Nothing can be made of any group of a task, whoever plays it.
    #[error("task {} of batch {}: {num_tries} groups in turn could not be judged, played by {}: {reason}", task.index, task.batch, players.join(" and "))]
    Unjudged {
        /// The task.
        task: proto::TaskId,
        /// How often it was asked for.
        num_tries: usize,
        /// Who played it.
        players: Vec<String>,
        /// What the last verifier said.
        reason: String,
    },
    /// Nothing came back for too long.
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

/// A manifest of nothing in particular.
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
        },
        schedule: ScheduleConfig { num_steps: Some(10), warmup_steps: 2, decay_from: None },
        exams: ExamsConfig { names: Vec::new(), every_steps: 0 },
    }
}

/// A domain whose problems are numbers: mutants follow their parents, proposals are what they say, and the last digit of a
/// niche is its level.
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
