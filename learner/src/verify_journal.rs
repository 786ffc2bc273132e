use std::path::Path;
use std::sync::Arc;

use policy::formats::Pretrained;
use policy::{Backend, TrainingState};
use proto::{ProblemSource, ScoredGroup, TaskKind};

use crate::checkpoint::{Checkpoint, list_checkpoints, load_checkpoint};
use crate::journal::{JournalReader, Record, RecordError, read_manifest};
use crate::main_loop::expect_step;
use crate::received::Received;
use crate::state::initial_training;
use crate::{Config, Error, Fold, Manifest, Models, Plans, References, State};

/// The result of a replay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplayReport {
    /// The step after which it began: 0, or that of the oldest kept checkpoint if the journal before it is gone.
    pub first_step: u64,
    /// The last step whose digests match the journal, as those of all steps since the first do.
    pub last_step: u64,
    /// Number of groups that were folded.
    pub num_groups: u64,
    /// The manifest of the run.
    pub manifest: Manifest,
}

/// Computes a run again from its journal alone and compares the digests of every step up to `last_step`. If the first steps of
/// the journal are gone, begins at the oldest kept checkpoint instead.
///
/// Calls `each` with the number of every step that matches. `backend` is the learner's device, with the frozen weights there if the
/// run trains an adapter; `models` are the pretrained models of the run.
///
/// # Errors
/// [`Error::Integrity`] names the first step that differs, that lacks a group or that a damaged record may belong to;
/// [`Error::NotReproducible`] when the run is not reproducible; [`Error::File`] when the journal has no manifest, or lacks its
/// first steps and no checkpoint replaces them.
pub fn verify_journal(
    config: Config,
    run_dir: &Path,
    (backend, models): (&Backend, &Models),
    sources: Vec<Arc<dyn ProblemSource>>,
    num_threads: usize,
    last_step: u64,
    mut each: impl FnMut(u64),
) -> Result<ReplayReport, Error> {
    if !config.is_reproducible() {
        return Err(Error::NotReproducible);
    }
    let journal = run_dir.join("journal");
    drop(std::fs::read_dir(&journal).map_err(Error::io("list", &journal))?);
    let manifest = read_manifest(&journal)?.ok_or_else(|| Error::File {
        path: journal.clone(),
        expected: "a journal that begins with a manifest".to_owned(),
        got: "none".to_owned(),
    })?;
    if !manifest.reproducible {
        return Err(Error::NotReproducible);
    }
    let Start { state, training, planned, control, mut received, mut reader } =
        Start::find(&config, run_dir, models.base.as_deref())?;
    let mut control = config.control().or(control);
    let first_step = state.step;
    let references = References::load(&config, num_threads, models)?;
    let mut fold = Fold::new(config, sources, backend, num_threads, (state, training), planned, references)?;
    let mut num_groups = 0;
    let mut damaged = None;
    while fold.state().step < last_step {
        let Some(record) = reader.next()? else { break };
        match record {
            Ok(Record::Control(decided)) => control = Some(decided),
            Ok(Record::Group(group)) if group.task().kind == TaskKind::Train => {
                received.insert(group);
            }
            // A step that a resumed process folded again is in the journal only once.
            Ok(Record::Step(expected)) if first_step < expected.step && expected.step <= last_step => {
                expect_undamaged(&damaged)?;
                let batch = expected.step - 1;
                let ids = received.named(&expected.groups).filter(|_| fold.state().step == batch);
                let Some(ids) = ids else {
                    let reason = "the journal lacks some of its groups".to_owned();
                    return Err(Error::Integrity { what: "batch", step: batch, reason });
                };
                let groups: Vec<ScoredGroup> = received.take(&ids).into_iter().map(|(_, group)| group.scored).collect();
                fold.plan();
                let report = fold.fold(&groups, control)?;
                expect_step(&expected, report.weights_digest, report.state_digest)?;
                num_groups += groups.len() as u64;
                each(expected.step);
            }
            Ok(_) => {}
            // The journal of a killed run may end inside a record.
            Err(error) if error.truncated => {}
            Err(error) => drop(damaged.get_or_insert((fold.state().step, error))),
        }
    }
    expect_undamaged(&damaged)?;
    Ok(ReplayReport { first_step, last_step: fold.state().step, num_groups, manifest })
}

/// The starting point of a replay.
struct Start {
    state: State,
    training: TrainingState,
    planned: Plans,
    control: Option<crate::Control>,
    received: Received,
    reader: JournalReader,
}

impl Start {
    /// Finds the first step that can be computed again.
    fn find(config: &Config, run_dir: &Path, base: Option<&Pretrained>) -> Result<Start, Error> {
        let journal = run_dir.join("journal");
        let reader = JournalReader::open(&journal)?;
        if !reader.is_cut_off() {
            return Ok(Start {
                state: State::initial(),
                training: initial_training(config, base)?,
                planned: Plans::default(),
                control: None,
                received: Received::default(),
                reader,
            });
        }
        let checkpoints = run_dir.join("checkpoints");
        let mut refused = "none".to_owned();
        for path in list_checkpoints(&checkpoints)? {
            let checkpoint = match load_checkpoint(&path) {
                Ok((_, checkpoint)) => checkpoint,
                Err(error) => {
                    refused = error.to_string();
                    continue;
                }
            };
            let Checkpoint { state, training, planned, point, .. } = checkpoint;
            let point = match point {
                Ok(point) => point,
                Err(error) => {
                    refused = error.to_string();
                    continue;
                }
            };
            let place = point.place.map(|place| JournalReader::open_behind(&journal, place)).transpose()?;
            let Some(reader) = place.flatten() else { continue };
            let mut received = Received::default();
            point.received.into_iter().for_each(|group| received.insert(group));
            return Ok(Start { state, training, planned, control: point.known.control, received, reader });
        }
        let expected = "a checkpoint that matches the journal, whose first segments were removed".to_owned();
        Err(Error::File { path: checkpoints, expected, got: refused })
    }
}

fn expect_undamaged(damaged: &Option<(u64, RecordError)>) -> Result<(), Error> {
    let Some((step, record)) = damaged else { return Ok(()) };
    let reason = format!("the record at byte {} of {} is damaged", record.offset, record.segment.display());
    Err(Error::Integrity { what: "journal", step: *step, reason })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{Damage, Journal, Opening};
    use crate::test_manifest;
    use crate::test_run::{TestRun, config, sources};

    fn run_of(num_steps: u64) -> TestRun {
        let mut run = TestRun::new();
        (0..num_steps).for_each(|_| run.step());
        run
    }

    fn replay_of(run_dir: &Path, last_step: u64) -> (Result<ReplayReport, Error>, Vec<u64>) {
        let mut agreed = Vec::new();
        let report =
            verify_journal(config(), run_dir, (&Backend::Cpu, &Models::default()), sources(), 1, last_step, |step| {
                agreed.push(step);
            });
        (report, agreed)
    }

    fn steps(run_dir: &Path, last_step: u64) -> (u64, u64, Vec<u64>) {
        let (report, agreed) = replay_of(run_dir, last_step);
        let ReplayReport { first_step, last_step, .. } = report.unwrap();
        (first_step, last_step, agreed)
    }

    fn refusal(run_dir: &Path) -> (String, Vec<u64>) {
        let (report, agreed) = replay_of(run_dir, u64::MAX);
        (report.unwrap_err().to_string(), agreed)
    }

    #[test]
    fn every_step_agrees_up_to_the_last() {
        let folder = tempfile::tempdir().unwrap();
        run_of(4).write_journal(&folder.path().join("journal"));
        assert_eq!(steps(folder.path(), u64::MAX), (0, 4, vec![1, 2, 3, 4]));
        assert_eq!(steps(folder.path(), 2), (0, 2, vec![1, 2]));
    }

    #[test]
    fn the_first_step_that_differs_is_named() {
        for is_weights in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            let mut run = run_of(3);
            for record in &mut run.records {
                if let Record::Step(step) = record
                    && step.step == 2
                {
                    let digest = if is_weights { &mut step.weights_digest } else { &mut step.state_digest };
                    *digest = proto::Digest::of_bytes(b"other");
                }
            }
            run.write_journal(&folder.path().join("journal"));
            let (error, agreed) = refusal(folder.path());
            let what = if is_weights { "weights digest" } else { "state digest" };
            assert!(error.starts_with(&format!("integrity: {what} of step 2: expected ")), "{error}");
            assert_eq!(agreed, [1]);
        }
    }

    #[test]
    fn a_group_that_is_missing_and_a_record_that_is_damaged_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = run_of(3);
        let group = run.records.iter().rposition(|record| matches!(record, Record::Group(_))).unwrap();
        run.records.remove(group);
        let journal = folder.path().join("journal");
        run.write_journal(&journal);
        assert_eq!(refusal(folder.path()).0, "integrity: batch of step 2: the journal lacks some of its groups");
        let segment = journal.join("00000000.log");
        let mut bytes = std::fs::read(&segment).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&segment, bytes).unwrap();
        let (error, _) = refusal(folder.path());
        assert!(error.contains("integrity: journal of step 1: the record at byte "), "{error}");
    }

    #[test]
    fn what_promised_nothing_or_is_not_there_is_not_replayed() {
        let folder = tempfile::tempdir().unwrap();
        assert!(refusal(folder.path()).0.starts_with("list "), "there is no folder");
        std::fs::create_dir(folder.path().join("journal")).unwrap();
        assert!(refusal(folder.path()).0.ends_with("expected a journal that begins with a manifest, got none"));
        let mut run = run_of(1);
        run.records[0] = Record::Manifest(Manifest { reproducible: false, ..test_manifest() });
        run.write_journal(&folder.path().join("journal"));
        assert!(refusal(folder.path()).0.contains("expected a run on reproducible devices"));
    }

    /// If the first steps of a journal are gone, the rest is replayed from the oldest intact checkpoint.
    #[test]
    fn the_oldest_checkpoint_stands_for_what_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let [journal, checkpoints] = ["journal", "checkpoints"].map(|name| folder.path().join(name));
        let mut run = run_of(2);
        let mut point = run.write_journal(&journal);
        let cut = |run: &mut TestRun, point: &crate::point::Point| {
            let (mut journal, _) = Journal::open(&journal, &Damage::default(), point.place).unwrap();
            journal.cut(Opening { manifest: test_manifest(), known: point.known.clone() }).unwrap();
            let point = crate::point::Point { place: journal.last(), ..point.clone() };
            run.write_checkpoint(&checkpoints, &point);
            run.records.clear();
            (0..2).for_each(|_| run.step());
            run.records.iter().for_each(|record| journal.append(record).unwrap());
            journal.sync().unwrap();
            crate::point::Point { place: journal.last(), ..point }
        };
        point = cut(&mut run, &point);
        cut(&mut run, &point);
        assert_eq!(steps(folder.path(), u64::MAX), (0, 6, vec![1, 2, 3, 4, 5, 6]), "nothing is gone yet");
        crate::checkpoint::forget_passed(&journal, &checkpoints).unwrap();
        assert_eq!(std::fs::read_dir(&journal).unwrap().count(), 2);
        assert_eq!(steps(folder.path(), u64::MAX), (2, 6, vec![3, 4, 5, 6]));
        assert_eq!(steps(folder.path(), 4), (2, 4, vec![3, 4]));
        std::fs::remove_file(checkpoints.join("step_00000002/model.safetensors")).unwrap();
        assert_eq!(steps(folder.path(), u64::MAX), (4, 6, vec![5, 6]));
        std::fs::remove_dir_all(&checkpoints).unwrap();
        let (error, _) = refusal(folder.path());
        assert!(
            error.ends_with(
                "expected a checkpoint that matches the journal, whose first segments were removed, got none"
            ),
            "{error}"
        );
    }
}
