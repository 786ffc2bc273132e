//! How much of its journal a run keeps, and how much of it a resume reads.

use std::process::Command;

use serde_json::Value;

use crate::runs::{Ended, Folder, NUM_STEPS, RESUME, Reference, SEGMENT, reference};

const SINCE_CHECKPOINT: [&str; 2] = ["--set", "local.keep_journal=since-checkpoint"];

/// Returns a run of `smoke` that has removed the segments that its checkpoints, of steps 20, 30 and 40, have folded.
fn trimmed() -> Folder {
    let folder = Folder::new();
    folder.call(&[&["train", "smoke", "--run-dir", "run"], &SINCE_CHECKPOINT[..]].concat()).success();
    assert_eq!(folder.history(), reference(0).history, "it is the run that it was");
    assert_eq!(folder.checkpoints(), [20, 30, 40]);
    folder
}

fn segments(folder: &Folder) -> Vec<String> {
    let names = folder.files().into_keys().filter_map(|name| name.strip_prefix("run/journal/").map(str::to_owned));
    names.collect()
}

fn damage_checkpoint(folder: &Folder, step: u64) {
    folder.flip(&format!("run/checkpoints/step_{step:08}/model.safetensors"), 300);
}

fn resume(folder: &Folder) -> (Ended, Value) {
    let ended = folder.call(&[&RESUME[..], &["--json"]].concat()).success();
    let summary = serde_json::from_str(&ended.stdout).unwrap();
    (ended, summary)
}

#[test]
fn a_run_goes_on_from_every_checkpoint_that_it_keeps() {
    let Reference { summary, history, .. } = reference(0);
    let run = trimmed();
    assert_eq!(segments(&run), ["00000002.log", "00000003.log", "00000004.log"]);
    for num_damaged in 0..3 {
        let folder = Folder::holding(&run.files());
        (0..num_damaged).for_each(|index| damage_checkpoint(&folder, 40 - 10 * index));
        let (ended, again) = resume(&folder);
        assert_eq!(ended.stderr.lines().count() as u64, num_damaged, "{ended:#?}");
        assert_eq!(folder.history(), *history);
        for key in ["outcome", "step", "weights_digest", "control", "evals", "totals"] {
            assert_eq!(again[key], summary[key], "{key}, {num_damaged} damaged");
        }
        assert!(folder.files().contains_key("run/curves.svg"));
    }
    let folder = Folder::holding(&run.files());
    (0..3).for_each(|index| damage_checkpoint(&folder, 40 - 10 * index));
    let refused = folder.call(&RESUME);
    let says = "error: run/checkpoints: expected a checkpoint that matches the journal, whose first segments were removed, got \
                no usable checkpoint";
    assert!(!refused.status.success() && refused.stderr.trim_end().ends_with(says), "{refused:#?}");
}

#[test]
fn replay_begins_where_the_journal_does_and_says_so() {
    let folder = trimmed();
    let says = "the journal no longer has the first 20 steps: started from the checkpoint of step 20\nreplayed 20 steps from \
                320 groups: every weights digest and state digest matches the journal\n";
    assert_eq!(folder.call(&["replay", "run"]).success().stdout, says);
    let json = folder.call(&["replay", "run", "--to", "25", "--json"]).success().stdout;
    assert_eq!(json.trim_end(), "{\"first_step\":20,\"num_groups\":80,\"num_steps\":5}");
    let refused = folder.call(&["replay", "run", "--to", "20"]);
    let says = "--to: expected a step after 20, from which the journal of run can be replayed, got 20";
    assert_eq!(refused.refusal(), says);
    damage_checkpoint(&folder, 20);
    let later = folder.call(&["replay", "run"]).success().stdout;
    assert!(later.starts_with("the journal no longer has the first 30 steps: started from"), "{later}");
}

#[test]
fn inspect_says_which_steps_are_gone_and_what_they_left() {
    let folder = trimmed();
    let summary: Value = serde_json::from_str(&folder.call(&["inspect", "run", "--json"]).success().stdout).unwrap();
    assert_eq!((&summary["num_gone_steps"], &summary["num_groups"]), (&20.into(), &320.into()));
    assert_eq!(summary["evals"], reference(0).summary["evals"]);
    assert_eq!(summary["last_step"]["step"], NUM_STEPS);
    let text = folder.call(&["inspect", "run"]).success();
    assert_eq!(text.printed("removed       "), "steps 1 to 20 and their groups, which every kept checkpoint includes");
    assert!(folder.call(&["inspect", "run", "--step", "21"]).success().stdout.starts_with("step 21\n"));
    let refused = folder.call(&["inspect", "run", "--step", "20"]);
    assert_eq!(refused.refusal(), "--step: expected one of the steps 21 to 40 in the journal, got 20");
}

#[test]
fn one_checkpoint_alone_does_not_stand_for_a_journal() {
    let set = ["--set", "local.keep_checkpoints=1"];
    let refused = Folder::new().call(&[&["train", "smoke"], &SINCE_CHECKPOINT[..], &set].concat());
    let says = "--set local.keep_checkpoints: expected 2 or more with local.keep_journal = \"since-checkpoint\", so that one \
                damaged file does not end the run, got 1";
    assert_eq!(refused.refusal(), says);
}

/// Counts the bytes of the journal that a resume reads.
fn bytes_read(folder: &Folder) -> u64 {
    const CALLS: &str = "reads";
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", CALLS, "-e", "trace=read,pread64,readv"]);
    command.arg("-P").arg(folder.path(SEGMENT)).args(["-P", SEGMENT]);
    command.arg(env!("CARGO_BIN_EXE_autodidact")).args(RESUME);
    folder.start_command(command).end().success();
    let calls = std::fs::read_to_string(folder.path(CALLS)).unwrap();
    let results = calls.lines().filter_map(|call| call.rsplit_once(" = ")?.1.parse::<u64>().ok());
    results.sum()
}

/// Reads fill buffers of 8 KiB, so that some bytes beyond those needed are read.
#[test]
fn a_resume_reads_what_its_checkpoint_has_not_folded() {
    let whole = reference(0).files[SEGMENT].len() as u64;
    let read = |num_damaged: u64| {
        let folder = Folder::holding(&reference(0).files);
        (0..num_damaged).for_each(|index| damage_checkpoint(&folder, 40 - 10 * index));
        let read = bytes_read(&folder);
        folder.history().assert_steps_of(&reference(0).history);
        println!("{num_damaged} checkpoints damaged: {read} of {whole} bytes read");
        read
    };
    let [fresh, older, none] = [0, 1, 3].map(read);
    assert!(fresh <= 4 * 8_192, "{fresh} of {whole} bytes, for the manifest and where the checkpoint stands");
    assert!(older <= whole / 4 + 4 * 8_192, "{older} of {whole} bytes, for a quarter of the steps besides");
    assert!(none >= whole, "without a checkpoint all of it is needed: {none} of {whole} bytes");
}
