//! Devices that do not promise reproducible results: candle on the CPU, which runs what a GPU runs.

use std::path::Path;

use language::Source;
use learner::{Event, JournalReader, Models, Record, Summary};
use policy::Backend;
use serde_json::Value;

use crate::cluster::Cluster;
use crate::roles::{Roles, config};
use crate::runs::Folder;

fn run(run_dir: &Path, reproducible: bool) -> Summary {
    Roles { reproducible, ..Roles::default() }.run(run_dir, &mut |_| Ok(())).unwrap()
}

/// Numbers of the steps in a journal, in order.
fn journalled_steps(run_dir: &Path) -> Vec<u64> {
    let mut reader = JournalReader::open(&run_dir.join("journal")).unwrap();
    let records = std::iter::from_fn(|| reader.next().unwrap());
    records.filter_map(|record| if let Record::Step(step) = record.unwrap() { Some(step.step) } else { None }).collect()
}

/// After the loss of its last checkpoint a reproducible run folds its journal again, and gets the same result; a run that is
/// not reproducible plays these steps anew, and cannot be replayed.
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
        let replayed = learner::verify_journal(
            config(),
            &run_dir,
            (&Backend::Cpu, &Models::default()),
            Source::of_symbols(),
            1,
            u64::MAX,
            |_| {},
        );
        match replayed {
            Ok(report) => assert_eq!((reproducible, report.last_step), (true, 10)),
            Err(error) => assert!(
                !reproducible && error.to_string().contains("expected a run on reproducible devices"),
                "{error}"
            ),
        }
    }
}

/// The observer sees every step before a checkpoint takes the run past it, and a run whose observer fails ends where it is.
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
    let error = Roles::default().run(&run_dir, &mut |event| Ok(observe(event, 5)?)).unwrap_err();
    assert_eq!(error.to_string(), "no more room");
    assert!(!checkpoint(5).exists());
    Roles::default().run(&run_dir, &mut |event| Ok(observe(event, u64::MAX)?)).unwrap();
    // The journal has step 5, and the first process's checkpoint is of no step: all steps are folded again.
    assert_eq!(seen, (1..5).chain(1..=10).collect::<Vec<_>>());
}

/// Returns the right answers in the dev exam before and after, and the largest `logprob_mismatch` of any step.
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

/// In the mean of three seeds, the two are within 5 points of 200 problems. The log-probabilities of an actor in candle agree
/// with those of a learner in kernels.
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

/// Separate processes: one actor plays on the run's device, one on that of its command line. If a run promises its weights,
/// such a command line is refused.
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
    assert!(refused.contains("--device: expected cpu in a reproducible run, got candle-cpu"), "{refused}");
    let refused = cluster.start("actor", &["--device", "cuda:3"]).end().refusal().to_owned();
    assert!(
        refused.contains("--device: expected cpu, candle-cpu, or cuda in a build with `--features cuda`"),
        "{refused}"
    );
    learner.kill();
}
