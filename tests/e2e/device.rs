//! Devices that do not promise the same results twice: candle's on the CPU, which is what a GPU runs.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, InProcess};
use domains::Split;
use language::{Source, SymbolLanguage};
use learner::{
    BuildId, Config, Event, Exam, JournalReader, KeepJournal, Manifest, Observer, Record, RunOptions, Summary,
};
use policy::{Device, Numerics};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::cluster::Cluster;
use crate::runs::Folder;

/// The preset `smoke`: ten steps, an exam every five.
fn config() -> Config {
    let mut table: toml::Table = toml::from_str(include_str!("../../deploy/configs/smoke.toml")).unwrap();
    table.remove("local");
    let mut config: Config = table.try_into().unwrap();
    config.schedule.num_steps = Some(10);
    config.exams.names = vec!["countdown-3".to_owned()];
    config.exams.every_steps = 5;
    config
}

/// Runs all roles in this process, with a checkpoint every five steps.
fn run(run_dir: &Path, reproducible: bool) -> Summary {
    observed(run_dir, reproducible, &mut |_| Ok(())).unwrap()
}

fn observed(run_dir: &Path, reproducible: bool, observer: Observer<'_>) -> Result<Summary, learner::Error> {
    let config = config();
    let options = RunOptions {
        run_dir: run_dir.to_owned(),
        resume: run_dir.join("journal").exists(),
        num_threads: 2,
        time_limit: None,
        checkpoint_every: 5,
        keep_checkpoints: 3,
        keep_journal: KeepJournal::All,
        stall_limit: Duration::from_secs(60),
        tell_after: Duration::from_secs(30),
        epoch: 0,
        reissue_after: None,
        audit: None,
        tokenizer_json: "{}".to_owned(),
    };
    let manifest = Manifest {
        config: config.digest(),
        build: BuildId("test".to_owned()),
        verifiers: Default::default(),
        exams: Default::default(),
        numerics: Numerics::measure(Device::Cpu).unwrap(),
        reproducible,
    };
    let lock = learner::RunLock::take(run_dir).unwrap();
    let problems = domains::exam("countdown-3").unwrap().split(Split::Dev)[..20].to_vec();
    let exams = vec![Exam { name: "countdown-3".to_owned(), problems }];
    let shutdown = CancellationToken::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let bus: Arc<dyn Bus> = Arc::new(InProcess::new());
        tokio::spawn(actor::run(
            actor::Config { device: Device::Cpu, num_threads: 1, num_slots: 64 },
            Arc::new(SymbolLanguage),
            bus.clone(),
            shutdown.clone(),
        ));
        tokio::spawn(verifier::run(config.batch.num_rollouts, Arc::new(SymbolLanguage), bus.clone(), shutdown.clone()));
        learner::run(config, options, &lock, manifest, Source::of_symbols(), exams, bus, observer, shutdown.clone())
            .await
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
        let once: Vec<u64> = (1..=10).collect();
        assert_eq!(journalled_steps(&run_dir), once);
        for num_lost in 1..=2 {
            std::fs::remove_dir_all(run_dir.join("checkpoints/step_00000010")).unwrap();
            let again = run(&run_dir, reproducible);
            assert_eq!((again.step, again.weights_digest), (10, first.weights_digest));
            let sat: Vec<u64> = again.evals.iter().map(|eval| eval.step).collect();
            assert_eq!(sat, [0, 5, 10], "every exam counts once");
            let anew = (6..=10).cycle().take(if reproducible { 0 } else { 5 * num_lost });
            let expected: Vec<u64> = once.iter().copied().chain(anew).collect();
            assert_eq!(journalled_steps(&run_dir), expected);
        }
        let replayed = learner::replay(config(), &run_dir, Source::of_symbols(), 1, u64::MAX, |_| {});
        match replayed {
            Ok(report) => assert_eq!((reproducible, report.last_step), (true, 10)),
            Err(error) => assert!(!reproducible && error.to_string().contains("results are the same twice"), "{error}"),
        }
    }
}

/// What is to be seen of a run is seen before a checkpoint takes the run past it, and a run that cannot show what it does ends
/// where it is.
#[test]
fn nothing_that_happens_is_passed_unseen() {
    let folder = Folder::new();
    let run_dir = folder.path("run");
    let checkpoint = |step: u64| run_dir.join(format!("checkpoints/step_{step:08}"));
    let mut seen = Vec::new();
    let mut observe = |event: Event, limit: u64| match event {
        Event::Step(event) if event.report.step == limit => Err("no more room"),
        Event::Step(event) => {
            assert!(!checkpoint(event.report.step).exists(), "a run that was killed now would pass this step");
            seen.push(event.report.step);
            Ok(())
        }
        _ => Ok(()),
    };
    let error = observed(&run_dir, true, &mut |event| Ok(observe(event, 5)?)).unwrap_err();
    assert_eq!(error.to_string(), "no more room");
    assert!(!checkpoint(5).exists());
    observed(&run_dir, true, &mut |event| Ok(observe(event, u64::MAX)?)).unwrap();
    // The journal has step 5 and the first process's checkpoint is of no step: all of it is folded again.
    assert_eq!(seen, (1..5).chain(1..=10).collect::<Vec<_>>());
}

/// Right answers in the dev exam before and after, and the largest `logprob_mismatch` of any step.
fn smoke(seed: u64, learner_device: &str, actor_device: &str) -> ([u64; 2], f64) {
    let folder = Folder::new();
    let devices = [format!("learner.device={learner_device}"), format!("actor.device={actor_device}")];
    let train = ["train", "smoke", "--run-dir", "run", "--json", "--seed", &seed.to_string()];
    let summary = folder.call(&[&train[..], &["--set", &devices[0], "--set", &devices[1]]].concat()).success();
    let summary: Value = serde_json::from_str(&summary.stdout).unwrap();
    let evals = summary["evals"].as_array().unwrap();
    let num_correct = |eval: &Value| eval["num_correct"].as_u64().unwrap();
    let rows = std::fs::read_to_string(folder.path("run/metrics.jsonl")).unwrap();
    let mismatches = rows.lines().filter_map(|row| {
        let row: Value = serde_json::from_str(row).unwrap();
        row["logprob_mismatch"].as_f64()
    });
    let largest = mismatches.reduce(f64::max).unwrap();
    ([num_correct(evals.first().unwrap()), num_correct(evals.last().unwrap())], largest)
}

/// In the mean of three seeds, within 5 points of 200 problems; and an actor in candle says of its tokens what a learner in kernels
/// computes.
#[test]
fn candle_learns_as_the_kernels_do() {
    let run = |device: &'static str| {
        let runs: Vec<_> =
            [0, 1, 2].map(|seed| std::thread::spawn(move || smoke(seed, device, device))).into_iter().collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect::<Vec<_>>()
    };
    let [kernels, candle] = ["cpu", "candle-cpu"].map(run);
    let sum = |runs: &[([u64; 2], f64)], exam: usize| runs.iter().map(|(correct, _)| correct[exam]).sum::<u64>();
    assert!(kernels.iter().all(|(_, mismatch)| *mismatch == 0.0), "{kernels:?}");
    assert!(candle.iter().all(|(_, mismatch)| *mismatch < 1e-4), "{candle:?}");
    assert!(sum(&candle, 1) > sum(&candle, 0), "nothing was learned: {candle:?}");
    assert!(sum(&candle, 1).abs_diff(sum(&kernels, 1)) <= 30, "{candle:?}, in kernels {kernels:?}");
    let (_, mismatch) = smoke(0, "cpu", "candle-cpu");
    assert!(mismatch > 0.0 && mismatch < 1e-4, "{mismatch}");
}

/// Processes: one plays where the run says, one where its command line does. Where a run promises its weights, such a command line
/// is refused.
#[test]
fn an_actor_plays_on_its_own_device() {
    let cluster = Cluster::new();
    let learner = cluster.learner(&["--steps", "10", "--set", "actor.device=candle-cpu"]);
    let few = ["--slots", "16"];
    let actors = [&few[..], &[&few[..], &["--device", "cpu", "--threads", "1"]].concat()]
        .map(|args| cluster.start("actor", args));
    let verifier = cluster.start("verifier", &[]);
    learner.end().success();
    for actor in actors {
        let played = actor.end().success().stdout;
        assert!(!played.contains(": 0 groups"), "both have a part: {played}");
    }
    verifier.end().success();
    let refused = cluster.folder.call(&["replay", "run"]).refusal().to_owned();
    assert!(refused.contains("learner.device and actor.device = \"cpu\""), "{refused}");

    let cluster = Cluster::new();
    let learner = cluster.learner(&["--set", "schedule.num_steps=1000000"]);
    Cluster::run_of(&learner);
    let refused = cluster.start("actor", &["--device", "candle-cpu"]).end().refusal().to_owned();
    assert!(
        refused.contains("--device: expected cpu in a run that promises the same weights again, got candle-cpu"),
        "{refused}"
    );
    let refused = cluster.start("actor", &["--device", "cuda:3"]).end().refusal().to_owned();
    assert!(
        refused.contains("--device: expected cpu, candle-cpu, or cuda in a build with `--features cuda`"),
        "{refused}"
    );
    learner.kill();
}
