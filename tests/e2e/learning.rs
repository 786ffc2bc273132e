//! Compares what a run learns with what its control learns. Every run is a function of its config, so no test passes by luck.
//! All together take 19 s on two cores of an AMD EPYC (`cargo test --release --test e2e learning::`).
//!
//! Each of these faults was injected by hand and made its test fail: in `learning_by_examples_beats_shuffled_labels` the sign
//! of every gradient flipped (before the update) and hindsight off (`learner.hindsight=false`); in
//! `policy_gradients_raise_the_share_of_right_answers` the sign of every gradient flipped and advantages negated (in
//! `centred`); in `practice_does_not_run_dry` a step that draws by what is new to its windows (by the rows of such a run).

use serde_json::Value;

use crate::runs::{Folder, metrics, policy_gradient_config};

/// Only countdown with three numbers, posed by the ladder: 20,596 problems.
const NARROW: [&str; 12] = [
    "--set",
    "self_play=",
    "--set",
    "domains=[{name=\"countdown\",share=1.0,levels=[{level=2,weight=1.0}]}]",
    "--set",
    "batch.num_tasks=32",
    "--set",
    "batch.num_rollouts=16",
    "--set",
    "learner.update_tokens=1024",
    "--set",
    "learner.window_examples=20000",
];

/// Solves 60 of 200 dev problems more than at the start; shuffled labels gain 8, a run without hindsight 26.
#[test]
fn learning_by_examples_beats_shuffled_labels() {
    let folder = Folder::new();
    let gain = |name: &str, changes: &[&str]| {
        let start = ["train", "smoke", "--run-dir", name, "--steps", "60"];
        folder.call(&[&start, &NARROW[..], changes].concat()).success();
        let scores = exam_scores(&folder, name);
        scores.last().unwrap() - scores[0]
    };
    let (learned, control) = (gain("learned", &[]), gain("control", &["--set", "learner.shuffle_labels=true"]));
    assert!(learned - control > 35.0, "{learned} against {control} problems more than at the start");
}

/// From random weights, without an example: two numbers leave one choice, the operator. 62 of 100 sampled answers are right, up
/// from 40.
#[test]
fn policy_gradients_raise_the_share_of_right_answers() {
    let folder = Folder::holding(&policy_gradient_config("dr-grpo"));
    let problems = folder.call(&["generate", "--domain", "countdown", "--level", "1", "--count", "300", "--seed", "7"]);
    std::fs::write(folder.path("problems.jsonl"), problems.success().stdout).unwrap();
    let changes = [
        "--set",
        "learner.policy_gradient.cross_entropy=false",
        "--set",
        "domains=[{name=\"countdown\",share=1.0,levels=[{level=1,weight=1.0}]}]",
        "--set",
        "batch.num_tasks=64",
        "--set",
        "exams.names=[]",
        "--set",
        "self_play=",
    ];
    folder.call(&[&["train", "pg.toml", "--run-dir", "run", "--steps", "60"], &changes[..]].concat()).success();
    let eval = folder.call(&["eval", "run", "--problems", "problems.jsonl", "--json"]).success();
    let scores: Value = serde_json::from_str(&eval.stdout).unwrap();
    let sampled = |policy: &str| scores["scores"][policy]["sampled_pass_at_1"]["mean"].as_f64().unwrap();
    let (trained, untrained) = (sampled("trained"), sampled("untrained"));
    assert!(trained - untrained > 0.12, "{trained} against {untrained}");
}

/// Early on most examples of a step are new, later almost none. Every step does as many updates as its tokens call for, each of
/// the configured size, and practice does not make the policy worse.
#[test]
fn practice_does_not_run_dry() {
    let folder = Folder::new();
    let start = ["train", "smoke", "--run-dir", "run", "--steps", "150"];
    // No decay, which would hide the effect of the last steps.
    let schedule = ["--set", "schedule.decay_from=150", "--set", "exams.every_steps=10"];
    folder.call(&[&start, &NARROW[..], &schedule].concat()).success();
    let rows: Vec<Value> = metrics(&folder.path("run")).into_iter().filter(|row| row["loss"].is_f64()).collect();
    let count = |row: &Value, key: &str| row[key].as_u64().unwrap();
    let share_of_new = |row: &Value| count(row, "num_new_examples") as f64 / count(row, "num_examples") as f64;
    assert!(share_of_new(&rows[0]) > 0.5 && share_of_new(&rows[149]) < 0.2, "{} {}", rows[0], rows[149]);
    let (mut trained_before, mut num_updates) = (0, Vec::new());
    for row in &rows {
        let trained = count(row, "num_trained_tokens") - trained_before;
        trained_before += trained;
        num_updates.push(count(row, "num_updates"));
        let updates = count(row, "num_updates");
        // `learner.reuse` is 2.
        assert_eq!(updates, ((2 * count(row, "num_example_tokens")) as f64 / 1_024.0).round().max(1.0) as u64, "{row}");
        // Sequences are not split, so an update may have a few tokens more.
        assert!((1_024 * updates..1_060 * updates).contains(&trained), "{row}");
    }
    // Steps play similar amounts, so they practise as much: 9 to 12 updates each. By new examples alone they fall from 6 to 1.
    let (fewest, most) = (num_updates.iter().min().unwrap(), num_updates.iter().max().unwrap());
    assert!(2 * fewest > *most, "{num_updates:?}");
    let scores = exam_scores(&folder, "run");
    let means: Vec<f64> = scores.windows(5).map(|five| five.iter().sum::<f64>() / 1_000.0).collect();
    let (best, last) = (means.iter().copied().fold(0.0, f64::max), means.last().unwrap());
    let standard_error = (best * (1.0 - best) / 200.0).sqrt();
    assert!(best - last <= 2.0 * standard_error, "{scores:?}");
    assert!(best > 1.5 * means[0], "there was something to learn: {scores:?}");
}

/// Returns how many of the 200 dev problems of countdown-3 each examined version of a run solved.
fn exam_scores(folder: &Folder, run: &str) -> Vec<f64> {
    let rows = metrics(&folder.path(run));
    let sat = rows.iter().filter(|row| row["exam"].is_string());
    sat.map(|row| row["num_correct"].as_f64().unwrap()).collect()
}
