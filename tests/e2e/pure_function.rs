//! A training run is a pure function of its config: threads, slots, crashes and the clock do not affect it.

use std::process::Command;

use proto::{CounterRng, Purpose};
use serde_json::Value;

use crate::runs::{
    Ended, Files, Folder, History, JournalRecord, NUM_STEPS, RESUME, SEGMENT, journal_records, metrics,
    policy_gradient_config, reference, wait_until,
};

/// `--minutes` of the clocked run: long enough for the clock to see steps before it decides. A full minute shows the same.
const MINUTES: &str = "0.2";

/// The least number of steps that are left after every kill, so that it finds the process alive.
const STEPS_AFTER_KILLS: u64 = 10;

/// The most iterations for which the killer spins before a kill: about the time of a step.
const MAX_SPINS: u64 = 1 << 21;

const SAME_AGAIN: &str = "reproduce the weights with: ";
const GO_ON: &str = "resume with: ";

#[test]
fn two_runs_agree() {
    agrees(0, &[]);
}

/// Any change to what is learned changes this digest: put the new one here, and describe the change in CHANGELOG.md.
#[test]
fn the_weights_are_those_that_they_were() {
    let digest = "bf377680d5aac3726c07c94d82c8b3c9f89c2f9e97129956735c9c75c72608eb";
    assert_eq!(reference(0).summary["weights_digest"], digest);
}

#[test]
fn threads_change_nothing() {
    agrees(0, &["--set", "local.threads=1"]);
    agrees(0, &["--set", "local.threads=2"]);
}

#[test]
fn slots_change_nothing() {
    agrees(0, &["--set", "local.slots=16"]);
    agrees(0, &["--set", "local.slots=512"]);
}

#[test]
fn threads_change_nothing_at_lag_1() {
    agrees(1, &["--set", "local.threads=1"]);
    agrees(1, &["--set", "local.threads=2"]);
    assert_ne!(reference(0).history.steps, reference(1).history.steps, "the lag is part of what is learned");
}

#[test]
fn ten_kills_change_nothing() {
    survives_kills(0, 10);
}

#[test]
fn kills_change_nothing_at_lag_1() {
    survives_kills(1, 4);
}

#[test]
fn ctrl_c_writes_a_checkpoint_and_says_how_to_go_on() {
    let folder = Folder::new();
    let process = folder.start(&["train", "smoke", "--run-dir", "run", "--set", "local.checkpoint_every=1000"]);
    wait_until("step 3", || folder.last_step() >= 3);
    process.interrupt();
    let ended = process.end().success();
    assert!(ended.stderr.starts_with("stopping: "), "{ended:#?}");
    let stopped_at = folder.last_step();
    assert!(stopped_at < NUM_STEPS, "{ended:#?}");
    assert_eq!(folder.checkpoints(), [stopped_at]);
    let command = ended.printed(GO_ON);
    assert_eq!(command, "autodidact train --resume --run-dir run");
    assert!(ended.stdout.contains(" of CPU time); resume with: "), "{ended:#?}");
    let cpu_before = cpu_seconds(&folder);
    let resumed = folder.call_printed(&format!("{command} --json")).success();
    folder.history().assert_steps_of(&reference(0).history);
    assert_eq!(folder.history().exams, reference(0).history.exams);
    let cpu = serde_json::from_str::<Value>(&resumed.stdout).unwrap()["cpu_s"].as_f64().unwrap();
    assert!(0.0 < cpu_before && cpu_before < cpu_seconds(&folder), "every process counts");
    assert!(cpu_seconds(&folder) <= cpu, "the end of the run counts");
}

#[test]
fn ci_shortens_a_run_and_says_so() {
    let folder = Folder::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_autodidact"));
    command.args(["train", "smoke", "--run-dir", "run"]).env("AUTODIDACT_CI", "1");
    let ended = folder.start_command(command).end().success();
    assert_eq!(ended.stderr, "AUTODIDACT_CI=1: this run is shortened to 3 steps\n");
    assert_eq!(folder.history().steps, reference(0).history.steps[..3]);
}

#[test]
fn replay_agrees_and_stops_where_it_is_told() {
    for lag in [0, 1] {
        let folder = Folder::holding(&reference(lag).files);
        assert_replayed(&folder.call(&["replay", "run"]), NUM_STEPS);
        assert_replayed(&folder.call(&["replay", "run", "--threads", "1", "--to", "7"]), 7);
        assert_eq!(folder.files(), reference(lag).files, "replay changes nothing");
    }
}

#[test]
fn replay_names_the_step_of_a_damaged_group() {
    for flipped in [4, 5, JournalRecord::HEADER_BYTES] {
        assert_replay_names(JournalRecord::GROUP, flipped);
    }
}

#[test]
fn replay_names_the_step_of_a_damaged_step() {
    for flipped in [4, 5, JournalRecord::HEADER_BYTES] {
        assert_replay_names(JournalRecord::STEP, flipped);
    }
}

/// A wrong length hides everything after it, and the steps before it must not be accepted as the whole run.
#[test]
fn replay_names_the_step_of_a_damaged_length() {
    for flipped in 0..4 {
        assert_replay_names(JournalRecord::GROUP, flipped);
    }
}

/// No record follows the last step, so none reveals that it is missing.
#[test]
fn replay_names_a_damaged_last_step() {
    let folder = Folder::holding(&reference(0).files);
    let records = journal_records(&reference(0).files[SEGMENT]);
    let last = records.iter().rfind(|record| record.kind == JournalRecord::STEP).unwrap();
    folder.flip(SEGMENT, last.offset + JournalRecord::HEADER_BYTES);
    assert_names_step(&folder.call(&["replay", "run"]), NUM_STEPS);
}

#[test]
fn the_printed_command_gives_the_weights_of_a_clocked_run() {
    let clocked = Folder::new();
    let ended = clocked.call(&["train", "smoke", "--run-dir", "run", "--minutes", MINUTES]).success();
    assert_gives_the_same(&clocked, &Folder::new(), ended.printed(SAME_AGAIN));
    let rates = learning_rates(&clocked);
    assert!(rates.iter().any(|rate| Some(rate) > rates.last()), "the learning rate has decayed: {rates:?}");
}

#[test]
fn a_clocked_run_that_was_killed_ends_as_the_clock_decided() {
    let clocked = Folder::new();
    let mut process =
        clocked.start(&["train", "smoke", "--run-dir", "run", "--minutes", "0.1", "--set", "local.checkpoint_every=3"]);
    let decays = || learning_rates(&clocked).windows(2).any(|pair| pair[1] < pair[0]);
    wait_until("the decay to begin", || !process.is_running() || decays());
    process.kill();
    let ended = clocked.resume().success();
    // In the same folder: a resumed run knows its config by its path.
    assert_gives_the_same(&clocked, &clocked, ended.printed(SAME_AGAIN));
}

/// A process that resumes with less time than the run has used may not end it before the end of the journal.
#[test]
fn a_shorter_limit_ends_no_step_that_the_journal_has_passed() {
    let clocked = Folder::new();
    let command = ["train", "smoke", "--run-dir", "run", "--minutes", "5", "--set", "local.checkpoint_every=20"];
    let mut process = clocked.start(&command);
    wait_until("steps past a checkpoint", || !process.is_running() || clocked.last_step() % 20 > 5);
    process.kill();
    let passed = clocked.last_step();
    let ended = clocked.call(&["train", "--resume", "--run-dir", "run", "--minutes", "0.001"]).success();
    assert!(clocked.last_step() > passed, "it ends after step {passed}");
    assert_gives_the_same(&clocked, &clocked, ended.printed(SAME_AGAIN));
}

#[test]
fn the_printed_command_keeps_what_was_set() {
    let run = Folder::new();
    std::fs::write(run.path("mine.toml"), "preset = \"smoke\"\n[learner]\nreuse = 1.5\n").unwrap();
    for (number, config) in ["smoke", "mine.toml"].into_iter().enumerate() {
        let run_dir = format!("run-{number}");
        let mut command = vec!["train", config, "--run-dir", &run_dir, "--steps", "4", "--seed", "3"];
        command.extend(["--set", "batch.lag=1", "--set", "exams.names=[\"countdown-3\"]"]);
        let printed = run.call(&command).success().printed(SAME_AGAIN).to_owned();
        // A path in the command is relative to this folder.
        let again = format!("{printed} --run-dir again-{number}");
        run.call_printed(&again).success();
        let digests = |name: &str| History::read(&run.path(name)).steps;
        assert_eq!(digests(&run_dir), digests(&format!("again-{number}")), "{again}");
    }
}

#[test]
fn threads_and_replay_change_nothing_with_policy_gradients() {
    let mut kinds = Vec::new();
    for kind in ["dr-grpo", "reinforce-plus-plus"] {
        let folder = Folder::holding(&policy_gradient_config(kind));
        for threads in ["1", "2"] {
            let local = format!("local.threads={threads}");
            // An entropy bonus, so that every part of the loss takes effect.
            let command = ["train", "pg.toml", "--run-dir", threads, "--steps", "5"];
            let bonus = "learner.policy_gradient.entropy_bonus=0.01";
            folder.call(&[&command[..], &["--set", &local, "--set", bonus]].concat()).success();
        }
        let [one, two] = ["1", "2"].map(|threads| History::read(&folder.path(threads)));
        one.assert_steps_of(&two);
        assert_replayed(&folder.call(&["replay", "1"]), 5);
        let trained: Vec<Value> = metrics(&folder.path("1")).iter().map(|row| row["policy_gradient"].clone()).collect();
        let num_rollouts = |report: &Value| report["num_rollouts"].as_u64().unwrap_or_default();
        assert!(trained.iter().any(|report| num_rollouts(report) > 0), "some rollouts have an advantage: {trained:?}");
        kinds.push(one.steps);
    }
    assert_ne!(kinds[0], kinds[1], "the kind is part of what is learned");
    assert_ne!(kinds[0][..], reference(0).history.steps[..5], "policy gradients are part of what is learned");
}

/// The kinds without a config of their own: each learns something of its own, whatever the number of threads.
#[test]
fn every_kind_of_policy_gradients_is_a_function_of_the_config() {
    let folder = Folder::holding(&policy_gradient_config("dr-grpo"));
    let run = |run_dir: &str, kind: &str, threads: &str| {
        let (kind, local) = (format!("learner.policy_gradient.kind={kind}"), format!("local.threads={threads}"));
        let command = ["train", "pg.toml", "--run-dir", run_dir, "--steps", "4", "--set", &kind, "--set", &local];
        folder.call(&command).success();
        History::read(&folder.path(run_dir))
    };
    let kinds = ["dr-grpo", "grpo", "dapo", "gspo", "rloo", "reinforce-plus-plus-baseline"];
    let histories = kinds.map(|kind| run(kind, kind, "2"));
    for (index, history) in histories.iter().enumerate() {
        assert!(histories[..index].iter().all(|other| other.steps != history.steps), "{}", kinds[index]);
    }
    run("again", "gspo", "1").assert_steps_of(&histories[3]);
    assert_replayed(&folder.call(&["replay", "dapo"]), 4);
}

/// Enough steps for the run to pose its own problems and to train on its own proposals.
#[test]
fn threads_and_replay_change_nothing_in_the_variants_of_self_play() {
    let mut variants = vec![reference(0).history.steps[..20].to_vec()];
    for changes in [
        &["self_play.proposer_loss=policy-gradient"][..],
        &["self_play=", "learner.shuffle_labels=true"],
        &["learner.hindsight=false"],
        &["actor.behavior=uniform-legal"],
        &["self_play="],
    ] {
        let folder = Folder::new();
        for threads in ["1", "2"] {
            let local = format!("local.threads={threads}");
            let mut command = vec!["train", "smoke", "--run-dir", threads, "--steps", "20", "--set", &local];
            command.extend(changes.iter().flat_map(|change| ["--set", change]));
            folder.call(&command).success();
        }
        let [one, two] = ["1", "2"].map(|threads| History::read(&folder.path(threads)));
        one.assert_steps_of(&two);
        assert_replayed(&folder.call(&["replay", "1"]), 20);
        assert!(!variants.contains(&one.steps), "{changes:?} is part of what is learned");
        variants.push(one.steps);
    }
}

/// Induction problems have keys, which the learner stores apart from their tasks: planned, queued and archived ones are
/// restored after a stop, at lag 1 too. So are the windows of several levels, with programs that were run.
#[test]
fn keys_survive_a_stop() {
    let config = "preset = \"smoke\"\ndomains = [{ name = \"programs-digits\", share = 1.0, levels = [\
                  { level = 2, weight = 1.0 }, { level = 3, weight = 1.0 }, { level = 6, weight = 1.0 }] }]\n\
                  model.max_positions = 72\nbatch.lag = 1\nself_play.bootstrap_steps = 2\nexams.names = []\n";
    let files = Files::from([("keys.toml".into(), config.as_bytes().to_vec())]);
    let train = ["train", "keys.toml", "--run-dir", "run", "--steps", "24", "--set", "local.checkpoint_every=1000"];
    let whole = Folder::holding(&files);
    whole.call(&train).success();
    let stopped = Folder::holding(&files);
    let process = stopped.start(&train);
    wait_until("step 8", || stopped.last_step() >= 8);
    process.interrupt();
    process.end().success();
    assert!(stopped.last_step() < 24);
    stopped.resume().success();
    assert_eq!(stopped.history().steps.len(), 24);
    stopped.history().assert_steps_of(&whole.history());
    assert_replayed(&stopped.call(&["replay", "run"]), 24);
    let tried =
        metrics(&whole.path("run")).into_iter().filter_map(|row| row["self_play"]["difficulties"].as_array().cloned());
    assert!(tried.flatten().filter_map(|count| count.as_u64()).sum::<u64>() > 0, "some problem was the policy's own");
}

/// A run that removes a setting of its preset can be resumed and forked without it.
#[test]
fn a_run_without_problems_of_its_own_goes_on_and_is_forked() {
    let train = ["train", "smoke", "--run-dir", "run", "--set", "self_play=", "--steps", "20"];
    let whole = Folder::new();
    whole.call(&train).success();
    let stopped = Folder::new();
    let process = stopped.start(&train);
    wait_until("step 5", || stopped.last_step() >= 5);
    process.interrupt();
    process.end().success();
    stopped.resume().success();
    assert_eq!(stopped.history(), whole.history());
    whole.call(&["train", "--fork", "--run-dir", "run"]).success();
    assert_eq!(History::read(&whole.path("runs/run-0-1")), whole.history());
}

/// A run learns from its own problems, from every source.
#[test]
fn the_run_makes_its_own_problems() {
    let origins = &reference(0).summary["totals"]["trained_by_origin"];
    for (problem, label) in [
        ("proposer", "proposal"),
        ("proposer", "hindsight"),
        ("mutation", "hindsight"),
        ("archive", "solved"),
        ("ladder", "hindsight"),
    ] {
        let found = origins.as_array().unwrap().iter().any(|cell| cell[0] == problem && cell[1] == label);
        assert!(found, "{problem}, {label}: {origins}");
    }
    let folder = Folder::holding(&reference(0).files);
    let rows = metrics(&folder.path("run"));
    let own: Vec<&Value> = rows.iter().map(|row| &row["self_play"]).filter(|own| own.is_object()).collect();
    assert_eq!(own.len() as u64, NUM_STEPS);
    let num_tried =
        |own: &&Value| own["difficulties"].as_array().unwrap().iter().filter_map(Value::as_u64).sum::<u64>();
    assert!(own.iter().map(num_tried).sum::<u64>() > 20, "{own:?}");
    assert!(own.last().unwrap()["num_niches"].as_u64().unwrap() > 20);
}

/// Runs `smoke` with these extra arguments and compares every digest with the undisturbed run's.
#[track_caller]
fn agrees(lag: u64, args: &[&str]) {
    let folder = Folder::new();
    let lag_key = format!("batch.lag={lag}");
    let mut command = vec!["train", "smoke", "--run-dir", "run", "--json", "--set", &lag_key];
    command.extend(args);
    let ended = folder.call(&command).success();
    assert_eq!(ended.stderr, "", "nothing to warn of");
    folder.history().assert_steps_of(&reference(lag).history);
    assert_eq!(folder.history().exams, reference(lag).history.exams);
    assert_same_summary(&ended, lag);
}

/// Kills a run at random moments, from its first step to its thirtieth, and resumes it each time.
fn survives_kills(lag: u64, num_kills: u64) {
    let reference = reference(lag);
    let whole_journal = reference.files[SEGMENT].len() as u64;
    let folder = Folder::new();
    let lag_key = format!("batch.lag={lag}");
    let start = ["train", "smoke", "--run-dir", "run", "--set", "local.checkpoint_every=3", "--set", &lag_key];
    let steps_between = (NUM_STEPS - STEPS_AFTER_KILLS) / num_kills;
    for kill in 0..num_kills {
        let mut rng = CounterRng::new(0, Purpose::Shuffle, lag, kill, 0);
        let step = kill * steps_between + rng.below(steps_between);
        let mut process = if kill == 0 { folder.start(&start) } else { folder.start(&RESUME) };
        // The metrics grow when a step ends, the journal while its groups arrive.
        let due = |folder: &Folder| match kill % 2 {
            0 => folder.path("run/config.toml").exists() && folder.last_step() >= step,
            _ => folder.journal_bytes() * NUM_STEPS >= whole_journal * step,
        };
        wait_until("the moment of a kill", || !process.is_running() || due(&folder));
        for _ in 0..rng.below(MAX_SPINS) {
            std::hint::spin_loop();
        }
        let ended = process.kill();
        assert_eq!(ended.status.code(), None, "kill {kill} at step {step} came too late: {ended:#?}");
    }
    let mut command = RESUME.to_vec();
    command.push("--json");
    let ended = folder.call(&command).success();
    folder.history().assert_steps_of(&reference.history);
    assert_same_summary(&ended, lag);
    assert_replayed(&folder.call(&["replay", "run"]), NUM_STEPS);
}

/// Compares the `--json` summary of the whole run with the undisturbed run's.
#[track_caller]
fn assert_same_summary(ended: &Ended, lag: u64) {
    let got: Value = serde_json::from_str(&ended.stdout).unwrap();
    for key in ["outcome", "step", "weights_digest", "control", "evals", "totals"] {
        assert_eq!(got[key], reference(lag).summary[key], "{key}");
    }
}

#[track_caller]
fn assert_replayed(ended: &Ended, num_steps: u64) {
    assert!(ended.status.success(), "{ended:#?}");
    assert!(ended.stdout.starts_with(&format!("replayed {num_steps} steps ")), "{ended:#?}");
}

/// Flips a bit in byte `flipped` of the middle record of a kind in the journal, which belongs to step 21.
#[track_caller]
fn assert_replay_names(kind: u8, flipped: usize) {
    let folder = Folder::holding(&reference(0).files);
    let mut records = journal_records(&reference(0).files[SEGMENT]);
    records.retain(|record| record.kind == kind);
    folder.flip(SEGMENT, records[records.len() / 2].offset + flipped);
    assert_names_step(&folder.call(&["replay", "run"]), NUM_STEPS / 2 + 1);
}

/// The error names a step by the state that it makes or by the batch that it folds, which is one less.
#[track_caller]
fn assert_names_step(ended: &Ended, step: u64) {
    let names = |number: u64| ended.refusal().contains(&format!("of step {number}"));
    assert!(names(step) || names(step - 1), "expected step {step}, got {ended:#?}");
}

/// Runs a printed command and compares every digest.
#[track_caller]
fn assert_gives_the_same(run: &Folder, again: &Folder, printed: &str) {
    again.call_printed(printed).success();
    let found = std::fs::read_dir(again.path("runs")).unwrap().next().unwrap().unwrap().path();
    History::read(&found).assert_steps_of(&run.history());
}

fn learning_rates(folder: &Folder) -> Vec<f64> {
    metrics(&folder.path("run")).iter().filter_map(|row| row["learning_rate"].as_f64()).collect()
}

/// Returns the CPU time up to the last step.
fn cpu_seconds(folder: &Folder) -> f64 {
    metrics(&folder.path("run")).iter().rev().find_map(|row| row["cpu_s"].as_f64()).unwrap()
}
