//! All roles in this process, as in `train`; a test may replace one of them with its own.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, InProcess};
use domains::{Domain, Split, registry};
use language::{Source, SymbolLanguage};
use learner::{BuildId, Config, Exam, KeepJournal, Manifest, Models, Observer, RunOptions, Summary};
use policy::{Backend, Device, Numerics};
use tokio_util::sync::CancellationToken;
use verifier::Judge;

/// The settings in which a test's run differs from others.
pub(crate) struct Roles {
    pub(crate) reproducible: bool,
    /// The domains that the verifier judges with.
    pub(crate) domains: Vec<Arc<dyn Domain>>,
    pub(crate) stall_limit: Duration,
    pub(crate) checker_limit: Duration,
}

impl Default for Roles {
    fn default() -> Roles {
        let limit = Duration::from_secs(60);
        Roles { reproducible: true, domains: registry().to_vec(), stall_limit: limit, checker_limit: limit }
    }
}

/// The preset `smoke`: ten steps, an exam every five.
pub(crate) fn config() -> Config {
    let mut table: toml::Table = toml::from_str(include_str!("../../deploy/configs/smoke.toml")).unwrap();
    table.remove("local");
    let mut config: Config = table.try_into().unwrap();
    config.schedule.num_steps = Some(10);
    config.exams.names = vec!["countdown-3".to_owned()];
    config.exams.every_steps = 5;
    config
}

impl Roles {
    /// Runs until the run ends or cannot go on, with a checkpoint every five steps.
    pub(crate) fn run(self, run_dir: &Path, observer: Observer<'_>) -> Result<Summary, learner::Error> {
        let config = config();
        let options = RunOptions {
            run_dir: run_dir.to_owned(),
            resume: run_dir.join("journal").exists(),
            num_threads: 2,
            time_limit: None,
            checkpoint_every: 5,
            keep_checkpoints: 3,
            keep_journal: KeepJournal::All,
            stall_limit: self.stall_limit,
            tell_after: self.stall_limit / 2,
            checker_limit: self.checker_limit,
            term: 0,
            reissue_after: None,
            audit: None,
            tokenizer_json: "{}".to_owned(),
            backend: Backend::Cpu,
            models: Models::default(),
        };
        let manifest = Manifest {
            config: config.digest(),
            build: BuildId("test".to_owned()),
            verifiers: Default::default(),
            exams: Default::default(),
            numerics: Numerics::measure(Device::Cpu).unwrap(),
            reproducible: self.reproducible,
        };
        let lock = learner::RunLock::take(run_dir).unwrap();
        let problems = domains::exam("countdown-3").unwrap().split(Split::Dev)[..20].to_vec();
        let problems = problems.into_iter().map(|problem| proto::KeyedProblem { problem, key: None }).collect();
        let exams = vec![Exam { name: "countdown-3".to_owned(), problems }];
        let shutdown = CancellationToken::new();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let bus: Arc<dyn Bus> = Arc::new(InProcess::new());
            let actor = actor::Config { backend: Backend::Cpu, num_threads: 1, num_slots: 64 };
            tokio::spawn(actor::run(actor, Arc::new(SymbolLanguage), bus.clone(), shutdown.clone()));
            let (language, max_rollouts) = (Arc::new(SymbolLanguage), config.batch.num_rollouts);
            let judge = Judge { domains: self.domains, language, max_rollouts };
            tokio::spawn(verifier::run(judge, bus.clone(), shutdown.clone()));
            learner::run(config, options, &lock, manifest, Source::of_symbols(), exams, bus, observer, shutdown.clone())
                .await
        })
    }
}
