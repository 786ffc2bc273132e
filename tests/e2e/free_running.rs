//! Free-running runs: nobody waits for slow actors, nothing stale is trained on, and a replay gives the same weights.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use actor::engine::{Engine, LoadedVersion};
use language::{Language, Source, SymbolLanguage};
use learner::{Fold, GroupRecord, JournalReader, Plans, Record, References, State};
use policy::{Backend, TrainingState};
use proto::{Digest, ScoredGroup};
use serde_json::Value;

use crate::cluster::Cluster;
use crate::runs::{
    Folder, JournalRecord, NUM_STEPS, RESUME, SEGMENT, policy_gradient_config, wait_until, whole_records,
};

const MAX_STALENESS: u64 = 3;

const TRAIN: [&str; 3] = ["pg.toml", "--run-dir", "run"];

const FREE_RUNNING: [&str; 4] = ["--set", "batch.lag=2", "--set", "batch.max_staleness=3"];

/// The weights digests after each step of a run whose groups arrive in a fixed order.
const SCRIPTED_WEIGHTS: [&str; 8] = [
    "bedb51f58784",
    "26f2d5e91d08",
    "46dbe80669fb",
    "c8c047da04a5",
    "2640e0255894",
    "85b4f5592522",
    "dc609c8e4ccc",
    "66a6ed42fd08",
];

/// Counts of what a run has folded.
#[derive(Debug, Default)]
struct Folded {
    num_steps: u64,
    /// Steps that took groups of more than one batch.
    num_mixed: u64,
    /// Rollouts that switched to newer weights midway.
    num_switched: usize,
}

/// Checks that nothing older than the allowed staleness was trained on, and that the run can be replayed from its journal.
fn check(folder: &Folder) -> Folded {
    let mut reader = JournalReader::open(&folder.path("run/journal")).unwrap();
    let mut groups = BTreeMap::<Digest, ScoredGroup>::new();
    let mut folded = Folded::default();
    while let Some(record) = reader.next().unwrap() {
        match record.unwrap() {
            Record::Group(GroupRecord { scored, .. }) => drop(groups.insert(Digest::of(&scored), scored)),
            Record::Step(step) => {
                let mut batches = BTreeSet::new();
                for digest in step.groups {
                    let scored = groups.remove(&digest).expect("a group is in the journal before its step, and once");
                    for version in scored.group.versions() {
                        let age = (step.step - 1).checked_sub(version).expect("of weights that were there");
                        assert!(age <= MAX_STALENESS, "step {}: {age} steps old", step.step);
                    }
                    let rollouts = &scored.group.rollouts;
                    folded.num_switched += rollouts.iter().filter(|rollout| rollout.versions.len() > 1).count();
                    batches.insert(scored.group.task.id.batch);
                }
                folded.num_steps += 1;
                folded.num_mixed += u64::from(batches.len() > 1);
            }
            _ => {}
        }
    }
    let replayed = folder.call(&["replay", "run", "--json"]).success();
    let replayed: Value = serde_json::from_str(&replayed.stdout).unwrap();
    assert_eq!(replayed["num_steps"], folded.num_steps);
    folded
}

/// At every step one group in four overtakes groups that have waited longer. The weights follow from that order, and are the
/// same on every machine: if they change, what runs learn has changed.
#[test]
fn the_weights_follow_from_the_order_of_arrivals() {
    let folder = Folder::holding(&policy_gradient_config("dr-grpo"));
    let printed = folder.call(&[&["config", "pg.toml"], &FREE_RUNNING[..]].concat()).success().stdout;
    let mut table: toml::Table = printed.parse().unwrap();
    table.remove("local").expect("what is no part of the run's identity");
    let config: learner::Config = table.try_into().unwrap();
    let language: Arc<dyn Language> = Arc::new(SymbolLanguage);
    let sources = Source::of_symbols();
    let num_tasks = config.batch.num_tasks as usize;
    let start = (State::initial(), TrainingState::initial(&config.model, config.seed));
    let references = References::default();
    let mut fold = Fold::new(config, sources, &Backend::Cpu, 1, start, Plans::default(), references).unwrap();
    let (engine, mut played) =
        Engine::start(actor::Config { backend: Backend::Cpu, num_threads: 1, num_slots: 64 }, language.clone());
    let (mut waiting, mut weights, mut num_mixed) = (Vec::<ScoredGroup>::new(), Vec::new(), 0);
    for policy_version in 0..SCRIPTED_WEIGHTS.len() as u64 {
        let current = Backend::Cpu.load(&fold.config().model, &fold.trainer().weights().unwrap()).unwrap();
        for task in fold.plan() {
            let planned = fold.planned().get(task).unwrap();
            let version = LoadedVersion { policy_version, weights: current.clone() };
            engine.submit(planned.task.clone(), version).unwrap();
            let group = played.blocking_recv().unwrap().unwrap();
            waiting.push(verifier::score(language.as_ref(), group, planned.key.as_ref()).unwrap());
        }
        let mut arrived = waiting.split_off(waiting.len() - num_tasks / 4);
        arrived.reverse();
        arrived.extend(waiting.drain(..num_tasks - arrived.len()));
        let batches: BTreeSet<u64> = arrived.iter().map(|scored| scored.group.task.id.batch).collect();
        num_mixed += u64::from(batches.len() > 1);
        weights.push(fold.fold(&arrived, None).unwrap().weights_digest.short());
    }
    assert!(num_mixed > 0);
    assert_eq!(weights, SCRIPTED_WEIGHTS);
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
        check(&folder);
    }
}

/// Playing a step again would give another result: if the journal shows that there was a step and cannot repeat it,
/// resuming fails instead of replacing the step.
#[test]
fn what_the_journal_has_lost_is_missed() {
    let folder = Folder::new();
    let train = ["train", "smoke", "--run-dir", "run", "--set", "local.checkpoint_every=1000"];
    let begun = folder.start(&[&train, &FREE_RUNNING[..]].concat());
    wait_until("step 10", || folder.last_step() >= 10);
    begun.kill();
    let whole = folder.files();
    for (kind, lacks) in [(JournalRecord::GROUP, "some groups"), (JournalRecord::STEP, "the record")] {
        let folder = Folder::holding(&whole);
        // A kill may have cut the last record short.
        let (records, _) = whole_records(&whole[SEGMENT]);
        let record = records.iter().filter(|record| record.kind == kind).nth(4).unwrap();
        folder.flip(SEGMENT, record.offset + JournalRecord::HEADER_BYTES);
        let refused = folder.call(&RESUME);
        let last = refused.stderr.lines().last().unwrap();
        assert!(!refused.status.success() && last.starts_with("error: "), "{refused:#?}");
        assert!(
            last.contains(&format!("the journal has later steps but lacks {lacks} of the next step")),
            "{refused:#?}"
        );
        let steps = |bytes: &[u8]| {
            let steps = whole_records(bytes).0.into_iter().filter(|record| record.kind == JournalRecord::STEP);
            steps.map(|record| record.offset).collect::<Vec<_>>()
        };
        assert_eq!(steps(&folder.files()[SEGMENT]), steps(&whole[SEGMENT]), "no step is made up");
    }
}

/// The actor has more work than the learner, so that every version finds it in the middle of rollouts.
#[test]
fn weights_take_over_in_the_middle_of_rollouts() {
    let cluster = Cluster::new();
    let much = ["--set", "batch.num_rollouts=64", "--set", "learner.reuse=0.01"];
    let steps = ["--steps", "24"];
    let learner = cluster.learner(&[&FREE_RUNNING[..], &much, &steps].concat());
    let actor = cluster.start("actor", &["--threads", "1", "--slots", "4"]);
    let workers = [actor, cluster.start("verifier", &[])];
    learner.end().success();
    for worker in workers {
        worker.end().success();
    }
    let folded = check(&cluster.folder);
    assert!(folded.num_switched > 0, "{folded:?}");
}

/// With policy gradients. When the slow actor answers, the weights that it has played for are long gone; nobody has waited for
/// it, and its tasks are played again.
#[test]
fn a_slow_actor_holds_nobody_up() {
    let cluster = Cluster { folder: Folder::holding(&policy_gradient_config("dr-grpo")), ..Cluster::new() };
    // Its tasks go to no other actor until it answers.
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
    // Freezing the slow actor while it has no task proves nothing.
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
    let folded = check(folder);
    assert!(folded.num_mixed > 0, "{folded:?}");
}
