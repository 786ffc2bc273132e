//! Free-running runs: nobody waits for the slow, nothing old is trained on, and the journal gives the same weights again.

use std::collections::BTreeMap;

use learner::{GroupRecord, JournalReader, Record};
use proto::{Digest, ScoredGroup};
use serde_json::Value;

use crate::cluster::Cluster;
use crate::runs::{
    Folder, JournalRecord, NUM_STEPS, RESUME, SEGMENT, journal_records, policy_gradient_config, wait_until,
};

const MAX_STALENESS: u64 = 3;

const TRAIN: [&str; 5] = ["pg.toml", "--run-dir", "run", "--set", "learner.updates_per_step=4"];

const FREE_RUNNING: [&str; 4] = ["--set", "batch.lag=2", "--set", "batch.max_staleness=3"];

/// Checks that nothing was trained on that is older than it may be, and that the run comes out of its journal again.
fn check(folder: &Folder) -> Vec<BTreeMap<u64, u64>> {
    let mut reader = JournalReader::open(&folder.path("run/journal")).unwrap();
    let mut groups = BTreeMap::<Digest, ScoredGroup>::new();
    let mut ages = Vec::new();
    while let Some(record) = reader.next().unwrap() {
        match record.unwrap() {
            Record::Group(GroupRecord { scored, .. }) => drop(groups.insert(Digest::of(&scored), scored)),
            Record::Step(step) => {
                let mut of_step = BTreeMap::new();
                for digest in step.groups {
                    let scored = groups.remove(&digest).expect("a group is in the journal before its step, and once");
                    for version in scored.group.versions() {
                        let age = (step.step - 1).checked_sub(version).expect("of weights that were there");
                        assert!(age <= MAX_STALENESS, "step {}: {age} steps old", step.step);
                        *of_step.entry(age).or_default() += 1;
                    }
                }
                ages.push(of_step);
            }
            _ => {}
        }
    }
    let replayed = folder.call(&["replay", "run", "--json"]).success();
    let replayed: Value = serde_json::from_str(&replayed.stdout).unwrap();
    assert_eq!(replayed["num_steps"], ages.len());
    ages
}

#[test]
fn policy_gradients_in_one_process_survive_a_kill() {
    for kind in ["dr-grpo", "reinforce-plus-plus"] {
        let folder = Folder::holding(&policy_gradient_config(kind));
        let begun = folder.start(&[&["train"], &TRAIN[..], &FREE_RUNNING].concat());
        wait_until("step 15", || folder.last_step() >= 15);
        begun.kill();
        let before = folder.history();
        folder.call(&RESUME).success();
        let after = folder.history();
        assert_eq!(after.steps.len() as u64, NUM_STEPS);
        // The last row may have been on its way when the process was killed.
        assert!(after.steps.starts_with(&before.steps), "what the journal knew came out the same");
        let ages = check(&folder);
        assert!(ages.iter().any(|ages| ages.keys().any(|age| *age > 0)), "playing and training went on side by side");
    }
}

/// What was played for a step would come out differently: a step that the journal knows and cannot repeat is no step to go on
/// from.
#[test]
fn a_group_that_the_journal_has_lost_is_missed() {
    let folder = Folder::new();
    let train = ["train", "smoke", "--run-dir", "run", "--set", "local.checkpoint_every=1000"];
    let begun = folder.start(&[&train, &FREE_RUNNING[..]].concat());
    wait_until("step 5", || folder.last_step() >= 5);
    begun.kill();
    let group = journal_records(&std::fs::read(folder.path(SEGMENT)).unwrap());
    let group = group.iter().find(|record| record.kind == JournalRecord::GROUP).unwrap();
    folder.flip(SEGMENT, group.offset + JournalRecord::HEADER_BYTES);
    let refused = folder.call(&RESUME);
    let last = refused.stderr.lines().last().unwrap();
    assert!(!refused.status.success() && last.starts_with("error: "), "{refused:#?}");
    assert!(last.contains("the journal has the step and lacks some of its groups"), "{refused:#?}");
}

/// Policy gradients included. The slow one has played for weights that are long gone when it is heard of again; nobody has waited for it, and what it
/// had is played again.
#[test]
fn a_slow_actor_holds_nobody_up() {
    let cluster = Cluster { folder: Folder::holding(&policy_gradient_config("dr-grpo")), ..Cluster::new() };
    // What it has is its own until it answers.
    let mine = ["--set", "local.bus.ack_wait_seconds=600", "--set", "local.bus.reissue_seconds=600"];
    let endless = ["--set", "schedule.num_steps=1000000", "--set", "exams.names=[]"];
    let learner = cluster.start("learner", &[&TRAIN[..], &FREE_RUNNING, &mine, &endless].concat());
    let verifier = cluster.start("verifier", &[]);
    let quick = [(); 2].map(|()| cluster.start("actor", &[]));
    let slow = cluster.start("actor", &["--threads", "1", "--slots", "1"]);
    let folder = &cluster.folder;
    let num_stale = || {
        let rows = std::fs::read_to_string(folder.path("run/metrics.jsonl")).unwrap_or_default();
        let last = rows.lines().rev().find_map(|row| serde_json::from_str::<Value>(row).ok());
        last.and_then(|row| row["num_stale"].as_u64()).unwrap_or(0)
    };
    // A moment at which it has nothing proves nothing.
    for _ in 0..100 {
        if num_stale() > 0 {
            break;
        }
        slow.freeze();
        let frozen_at = folder.last_step();
        wait_until("the others to go on", || folder.last_step() > frozen_at + 2 * MAX_STALENESS);
        slow.thaw();
        let thawed_at = folder.last_step();
        wait_until("the slow one to be heard of", || folder.last_step() > thawed_at + 5);
    }
    assert!(num_stale() > 0, "the slow one was never too late");
    learner.interrupt();
    learner.end().success();
    for worker in quick.into_iter().chain([slow, verifier]) {
        worker.terminate();
        worker.end().success();
    }
    check(folder);
}
