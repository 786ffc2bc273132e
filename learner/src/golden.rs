//! File formats are stable: files of the current versions are read as before, and written with the same bytes.
//!
//! A change of their bytes needs a new version in `journal.rs` or `checkpoint.rs`, which refuses older files.
//! `AUTODIDACT_WRITE_GOLDEN=1 cargo test -p autodidact-learner golden` then writes the files again.

use std::path::PathBuf;

use policy::TrainingState;
use proto::{
    Behavior, Digest, Legal, Niche, Problem, ProblemKey, ProblemOrigin, Request, Sampling, ScoredGroup, Task, TaskId,
    TaskKind,
};

use crate::checkpoint::{Checkpoint, Snapshot, load_checkpoint, save};
use crate::journal::Known;
use crate::journal::{
    BanRecord, Damage, EvalRecord, Journal, Opening, Place, Record, StepRecord, read_journal, unpacked,
};
use crate::point::Point;
use crate::replay_buffers::Labelled;
use crate::test_run::{answer, by, config};
use crate::{Control, Planned, Plans, State, test_manifest, test_problem};

fn golden(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "golden", name].iter().collect()
}

fn is_writing() -> bool {
    std::env::var_os("AUTODIDACT_WRITE_GOLDEN").is_some()
}

fn scored() -> ScoredGroup {
    let problem = Problem { domain: "countdown".to_owned(), text: "7 3 -> 4".to_owned() };
    answer(
        &Task {
            id: TaskId { kind: TaskKind::Train, batch: 0, index: 3 },
            seed: 7,
            weights: Digest::of_bytes(b"weights"),
            policy_version: 0,
            free_running: false,
            request: Request::Solve { problem, origin: ProblemOrigin::Ladder, has_key: true },
            family: "countdown/1".to_owned(),
            num_rollouts: 2,
            sampling: Sampling { behavior: Behavior::Policy, temperature: 1.0 },
            max_tokens: 20,
        },
        -1.5,
    )
}

fn known() -> Known {
    Known {
        step: 1,
        elapsed_ms: 1_000,
        control: Some(Control { decay_from: 300, stop_at: 400 }),
        num_disputes: 1,
        disputed: [scored().group.task.id].into(),
        ..Known::default()
    }
}

/// One record of each kind.
fn records() -> Vec<Record> {
    let task = scored().group.task.id;
    let [weights_digest, state_digest] = [b"weights", b"a state"].map(|name| Digest::of_bytes(name));
    let groups = vec![Digest::of(&scored())];
    vec![
        Record::Manifest(test_manifest()),
        Record::Group(by("a", &scored())),
        Record::Eval(EvalRecord { step: 0, exam: "countdown-3".to_owned(), num_correct: 26, num_problems: 200 }),
        Record::Step(StepRecord { step: 1, groups, weights_digest, state_digest, elapsed_ms: 1_000 }),
        Record::Control(Control { decay_from: 300, stop_at: 400 }),
        Record::Ban(BanRecord { player: "b".to_owned(), tasks: vec![task] }),
        Record::Dispute(task),
        Record::Opening(Box::new(Opening { manifest: test_manifest(), known: known() })),
    ]
}

/// The compression library may change the packed bytes, so the test compares the unpacked ones.
#[test]
fn the_golden_journal() {
    let folder = tempfile::tempdir().unwrap();
    let (mut journal, _) = Journal::open(folder.path(), &Damage::default(), None).unwrap();
    records().iter().for_each(|record| journal.append(record).unwrap());
    journal.sync().unwrap();
    let written = std::fs::read(journal.path()).unwrap();
    if is_writing() {
        std::fs::write(golden("00000000.log"), &written).unwrap();
    }
    let expected = std::fs::read(golden("00000000.log")).unwrap();
    assert_eq!(unpacked(&written), unpacked(&expected));
    std::fs::write(journal.path(), expected).unwrap();
    let mut read = Vec::new();
    assert_eq!(read_journal(folder.path(), |record| read.push(record)).unwrap(), Damage::default());
    assert_eq!(read, records());
}

/// A journal of version 5 can be inspected, group by group, but no run can continue from it.
#[test]
fn the_golden_journal_of_version_5() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(golden("journal-5.log"), folder.path().join("00000000.log")).unwrap();
    let mut read = Vec::new();
    assert_eq!(read_journal(folder.path(), |record| read.push(record)).unwrap(), Damage::default());
    let (mut group, mut step) = (None, None);
    for (was, is) in read.iter().zip(records()) {
        match (was, is) {
            (Record::Group(was), Record::Group(is)) => {
                assert_eq!((&was.played_by, &was.scored), (&is.played_by, &is.scored));
                group = Some(was.name());
            }
            (Record::Step(was), Record::Step(is)) => {
                assert_eq!((was.step, was.weights_digest), (is.step, is.weights_digest));
                step = Some(was.groups[0]);
            }
            (was, is) => assert_eq!(*was, is),
        }
    }
    assert_eq!((read.len(), group), (records().len(), step));
    assert_ne!(group, Some(Digest::of(&scored())), "by the bytes of then");
    let error = crate::journal::read_manifest(folder.path()).unwrap_err().to_string();
    assert!(error.ends_with(
        ": expected a journal of version 6, got version 5, which `inspect` can read but a run cannot resume from"
    ));
}

/// `COMPLETE` has the digests of all files, weights included; two more files are stored in full. Nothing is trained, so the
/// files do not depend on the arithmetic.
#[test]
fn the_golden_checkpoint() {
    let config = config();
    let scored = scored();
    let mut state = State::initial();
    let (example, legal) = (scored.examples[0].clone(), vec![Legal::Set(0).tokens(&scored.example_sets)]);
    state.replay_buffers.push(Labelled { domain: "countdown".to_owned(), example, legal }, &config);
    state.self_play.measure(&test_problem("countdown", "kept"), Niche(1), 0.5, 0);
    let key = Some(ProblemKey { text: "7 - 3".to_owned() });
    let mut planned = Plans::default();
    planned.push_batch(vec![Planned { task: scored.group.task.clone(), key, proposal: None }]);
    let folder = tempfile::tempdir().unwrap();
    let place = Some(Place::test());
    let point = Point { place, known: known(), received: vec![by("a", &scored)], ..Point::default() };
    let versions = vec![(Digest::of_bytes(b"older"), vec![1, 2, 3])];
    let control = known().control;
    let training = TrainingState::initial(&config.model, config.seed);
    let snapshot = Snapshot {
        state: &state,
        training: &training,
        planned: &planned,
        versions: versions.clone(),
        control,
        point: &point,
    };
    let path = save(folder.path(), &config, snapshot, "{}").unwrap();
    for name in ["COMPLETE", "state.postcard", "journal.postcard"] {
        let written = std::fs::read(path.join(name)).unwrap();
        if is_writing() {
            std::fs::write(golden(name), &written).unwrap();
        }
        let expected = std::fs::read(golden(name)).unwrap();
        let differs = expected.iter().zip(&written).position(|(expected, got)| expected != got);
        assert_eq!(
            (differs, written.len()),
            (None, expected.len()),
            "{name}: the first byte that differs, and the size"
        );
    }
    let (model, read) = load_checkpoint(&path).unwrap();
    let Checkpoint { state: read_state, planned: read_planned, .. } = &read;
    assert!(model == config.model && *read_state == state && *read_planned == planned && read.training == training);
    assert_eq!((read.versions, read.control, read.point.unwrap()), (versions, control, point));
}
