//! Devices that do not promise the same results twice, as far as that can be seen without one.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, InProcess};
use learner::{BuildId, Config, JournalReader, Manifest, Record, RunOptions, Summary};
use policy::{DeviceKind, Numerics};
use proto::ProblemSource;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::runs::Folder;

/// The preset `smoke`, without exams, ten steps.
fn config() -> Config {
    let mut table: toml::Table = toml::from_str(include_str!("../../deploy/configs/smoke.toml")).unwrap();
    table.remove("local");
    let mut config: Config = table.try_into().unwrap();
    config.schedule.num_steps = Some(10);
    config.exams.names.clear();
    config
}

fn sources() -> Vec<Arc<dyn ProblemSource>> {
    domains::registry().iter().map(|domain| domain.clone() as Arc<dyn ProblemSource>).collect()
}

/// Runs all roles in this process, with a checkpoint every five steps.
fn run(run_dir: &Path, reproducible: bool) -> Summary {
    let config = config();
    let options = RunOptions {
        run_dir: run_dir.to_owned(),
        num_threads: 2,
        time_limit: None,
        checkpoint_every: 5,
        keep_checkpoints: 3,
        stall_limit: Duration::from_secs(60),
        tokenizer_json: "{}".to_owned(),
    };
    let manifest = Manifest {
        config: config.digest(),
        build: BuildId("test".to_owned()),
        verifiers: Default::default(),
        exams: Default::default(),
        numerics: Numerics::measure(DeviceKind::Cpu).unwrap(),
        reproducible,
    };
    let (events, _followed) = mpsc::unbounded_channel();
    let shutdown = CancellationToken::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let bus: Arc<dyn Bus> = Arc::new(InProcess::new(64));
        tokio::spawn(actor::run(actor::Config { num_threads: 1, num_slots: 64 }, bus.clone(), shutdown.clone()));
        tokio::spawn(verifier::run(bus.clone(), shutdown.clone()));
        learner::run(config, options, manifest, sources(), Vec::new(), bus, events, shutdown.clone()).await.unwrap()
    })
}

/// Numbers of the steps in a journal, in order.
fn journalled_steps(run_dir: &Path) -> Vec<u64> {
    let mut reader = JournalReader::open(&run_dir.join("journal")).unwrap();
    let records = std::iter::from_fn(|| reader.next().unwrap());
    records.filter_map(|record| if let Record::Step(step) = record.unwrap() { Some(step.step) } else { None }).collect()
}

/// After the loss of its last checkpoint a run folds again what its journal has, and gets the same; where that is not promised
/// it plays these steps anew, and cannot be replayed.
#[test]
fn a_run_that_is_not_reproducible_goes_on_from_its_checkpoint() {
    for reproducible in [true, false] {
        let folder = Folder::new();
        let run_dir = folder.path("run");
        let first = run(&run_dir, reproducible);
        assert_eq!(first.step, 10);
        std::fs::remove_dir_all(run_dir.join("checkpoints/step_00000010")).unwrap();
        let second = run(&run_dir, reproducible);
        assert_eq!((second.step, second.weights_digest), (10, first.weights_digest));
        let once: Vec<u64> = (1..=10).collect();
        let again: Vec<u64> = (1..=10).chain(6..=10).collect();
        assert_eq!(journalled_steps(&run_dir), if reproducible { once } else { again });
        let replayed = learner::replay(config(), &run_dir.join("journal"), sources(), 1, u64::MAX, |_| {});
        match replayed {
            Ok(report) => assert_eq!((reproducible, report.num_steps), (true, 10)),
            Err(error) => assert!(!reproducible && error.to_string().contains("results are the same twice"), "{error}"),
        }
    }
}
