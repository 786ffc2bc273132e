//! Reading the state of a run from its directory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use policy::ModelConfig;
use proto::TaskId;

use crate::audit::Trained;
use crate::checkpoint::{Checkpoint, load_latest};
use crate::journal::{Damage, JournalReader, Known, Place, Record, StepRecord, read_manifest};
use crate::plan::Plans;
use crate::point::Point;
use crate::received::Received;
use crate::{Error, Manifest};

/// Reads the newest intact checkpoint of a run that matches its journal; `None` if there is none. Calls `refuse` with the reason
/// why each later one is not used.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] when a segment of the journal is missing.
pub fn load_newest(run_dir: &Path, refuse: impl FnMut(String)) -> Result<Option<(ModelConfig, Checkpoint)>, Error> {
    Ok(newest_known(run_dir, refuse)?.map(|(model, checkpoint, _)| (model, checkpoint)))
}

/// Checks that a checkpoint in the directory of a run matches the run's journal.
///
/// # Errors
/// [`Error::File`] when another run wrote it, or the journal was lost.
pub fn expect_known(run_dir: &Path, model: &ModelConfig, checkpoint: &Checkpoint) -> Result<(), Error> {
    match open_behind(run_dir, model, checkpoint)? {
        Some(_) => Ok(()),
        None => Err(Error::File {
            path: run_dir.join("journal"),
            expected: format!("the records of step {} before the checkpoint", checkpoint.state.step),
            got: "none: the checkpoint is from another run".to_owned(),
        }),
    }
}

/// Reads the newest checkpoint as [`load_newest`] does, and opens the journal after the records that it covers.
fn newest_known(
    run_dir: &Path,
    mut refuse: impl FnMut(String),
) -> Result<Option<(ModelConfig, Checkpoint, JournalReader)>, Error> {
    let mut newest = Some(u64::MAX);
    while let Some(limit) = newest {
        let loaded = load_latest(&run_dir.join("checkpoints"), limit, |error| refuse(error.to_string()))?;
        let Some((model, checkpoint)) = loaded else { break };
        if let Some(reader) = open_behind(run_dir, &model, &checkpoint)? {
            return Ok(Some((model, checkpoint, reader)));
        }
        let step = checkpoint.state.step;
        refuse(format!("its step {step} is not in the journal"));
        newest = step.checked_sub(1);
    }
    Ok(None)
}

/// Opens the journal of a run after the records that a checkpoint covers, or at its beginning if the checkpoint's point is
/// unreadable; `None` if the checkpoint does not match the journal, which is the source of truth.
fn open_behind(run_dir: &Path, model: &ModelConfig, checkpoint: &Checkpoint) -> Result<Option<JournalReader>, Error> {
    let journal = run_dir.join("journal");
    if read_manifest(&journal)?.is_none() {
        return Ok(None);
    }
    let whole = || Ok(Some(JournalReader::open(&journal)?).filter(|reader| !reader.is_cut_off()));
    match &checkpoint.point {
        Ok(Point { place: Some(place), .. }) => JournalReader::open_behind(&journal, *place),
        Ok(Point { place: None, .. }) => whole(),
        Err(error) => {
            tracing::warn!("{error}; reading the journal from its beginning instead");
            let (step, weights) = (checkpoint.state.step, checkpoint.training.weights.digest(model));
            let mut leads_there = step == 0;
            if let Some(mut reader) = whole()? {
                reader.read(|record| match record {
                    // The last one counts: a run that is not reproducible may have made the step more than once.
                    Record::Step(done) if done.step == step => leads_there = done.weights_digest == weights,
                    _ => {}
                })?;
            }
            if leads_there { whole() } else { Ok(None) }
        }
    }
}

/// The content of a run directory. Reading it changes nothing.
pub(crate) struct Recovered {
    /// Absent if the run begins with its first step.
    pub(crate) checkpoint: Option<Checkpoint>,
    /// Summary of the journal, up to its end.
    pub(crate) known: Known,
    /// Groups that the checkpoint has not folded.
    pub(crate) received: Received,
    pub(crate) banned: BTreeSet<String>,
    /// Training counts of the batches that the checkpoint has folded.
    pub(crate) trained: Trained,
    /// Records of the steps after the checkpoint.
    pub(crate) steps: BTreeMap<u64, StepRecord>,
    /// Wall time of the run up to the checkpoint.
    pub(crate) elapsed_ms: u64,
    pub(crate) manifest: Option<Manifest>,
    pub(crate) damage: Damage,
    /// Position of the journal's last record.
    pub(crate) last: Option<Place>,
}

impl Recovered {
    /// Reads the newest intact checkpoint that matches the journal, which is the source of truth, and the journal after it.
    pub(crate) fn read(run_dir: &Path, is_reproducible: bool, refuse: impl FnMut(String)) -> Result<Recovered, Error> {
        let journal = run_dir.join("journal");
        let manifest = read_manifest(&journal)?;
        if let Some((_, checkpoint, reader)) = newest_known(run_dir, refuse)? {
            let beginning = Point::default();
            let (step, point) = (checkpoint.state.step, checkpoint.point.as_ref().unwrap_or(&beginning));
            let found = Recovered::after(step, &checkpoint.planned, point, reader, is_reproducible)?;
            return Ok(Recovered { checkpoint: Some(checkpoint), manifest, ..found });
        }
        let reader = JournalReader::open(&journal)?;
        if reader.is_cut_off() {
            return Err(Error::File {
                path: run_dir.join("checkpoints"),
                expected: "a checkpoint that matches the journal, whose first segments were removed".to_owned(),
                got: "no usable checkpoint".to_owned(),
            });
        }
        let found = Recovered::after(0, &Plans::default(), &Point::default(), reader, is_reproducible)?;
        Ok(Recovered { manifest, ..found })
    }

    /// Reads the journal from a point on, for a run that resumes from a step with these plans.
    fn after(
        step: u64,
        planned: &Plans,
        point: &Point,
        mut reader: JournalReader,
        is_reproducible: bool,
    ) -> Result<Recovered, Error> {
        let Point { mut known, mut trained, .. } = point.clone();
        let mut received = Received::default();
        let mut players = BTreeMap::<u64, BTreeMap<u32, String>>::new();
        let mut elapsed_ms = known.elapsed_ms;
        let mut steps = BTreeMap::new();
        let mut visit = |record: Record| {
            known.take(&record, is_reproducible);
            match record {
                Record::Step(done) if done.step <= step => {
                    let players = players.remove(&(done.step - 1)).unwrap_or_default();
                    players.values().for_each(|player| trained.note(player, done.step));
                    elapsed_ms = done.elapsed_ms;
                }
                Record::Step(done) => drop(steps.insert(done.step, done)),
                Record::Group(group) => {
                    let id = group.task();
                    players.entry(id.batch).or_default().insert(id.index, group.played_by.clone());
                    // If steps cannot be computed again, their groups are of no use: the run resumes from its checkpoint alone.
                    if is_reproducible && planned.may_hold(id) {
                        received.insert(group);
                    }
                }
                Record::Ban(ban) => {
                    let is_of_player =
                        |id: &TaskId| received.get(*id).is_some_and(|group| group.played_by == ban.player);
                    let taken_back: Vec<TaskId> = ban.tasks.into_iter().filter(is_of_player).collect();
                    received.take(&taken_back);
                }
                Record::Dispute(id) => drop(received.take(&[id])),
                Record::Manifest(_) | Record::Opening(_) | Record::Eval(_) | Record::Control(_) => {}
            }
        };
        point.received.iter().cloned().map(Record::Group).for_each(&mut visit);
        let damage = reader.read(visit)?;
        let banned = known.bans.iter().map(|ban| ban.player.clone()).collect();
        let last = reader.last();
        Ok(Recovered {
            checkpoint: None,
            known,
            received,
            banned,
            trained,
            steps,
            elapsed_ms,
            manifest: None,
            damage,
            last,
        })
    }
}

/// Checks that a run directory holds no run, or one that began with this manifest, according to its first record.
///
/// # Errors
/// [`Error::Manifest`] names the first field that differs.
pub fn expect_begun_with(run_dir: &Path, manifest: &Manifest) -> Result<(), Error> {
    match JournalReader::open(&run_dir.join("journal"))?.next()? {
        Some(Ok(first)) => first.manifest().map_or(Ok(()), |was| was.expect_same(manifest)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{BanRecord, GroupRecord, Journal};
    use crate::test_manifest;
    use crate::test_run::{TestRun, answer, by};
    use crate::{Control, Known};

    #[test]
    fn only_the_run_that_began_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let manifest = test_manifest();
        expect_begun_with(folder.path(), &manifest).unwrap();
        TestRun::new().write_journal(&folder.path().join("journal"));
        expect_begun_with(folder.path(), &manifest).unwrap();
        let other = Manifest { reproducible: false, ..manifest };
        let error = expect_begun_with(folder.path(), &other).unwrap_err().to_string();
        assert!(error.starts_with("manifest: reproducible was true, is false"), "{error}");
    }

    /// Returns a run of two steps and part of a batch, with every kind of record, and the index at which the second step ends.
    fn eventful() -> (TestRun, Vec<Record>, usize) {
        let mut run = TestRun::new();
        run.step();
        let groups = run.play();
        let ids: Vec<TaskId> = groups.iter().map(|scored| scored.group.task.id).collect();
        run.records.push(Record::Dispute(ids[0]));
        run.records.push(Record::Group(by("b", &groups[1])));
        run.records.push(Record::Ban(BanRecord { player: "b".to_owned(), tasks: vec![ids[1], ids[0]] }));
        run.step();
        let mut records = std::mem::take(&mut run.records);
        let end = records.len();
        let groups = run.play();
        records.push(Record::Control(Control { decay_from: 3, stop_at: 9 }));
        records.extend(groups[..3].iter().map(|scored| Record::Group(by("a", scored))));
        records.push(Record::Dispute(groups[0].group.task.id));
        records.push(Record::Group(by("c", &answer(&groups[1].group.task, -2.0))));
        records.push(Record::Ban(BanRecord { player: "a".to_owned(), tasks: vec![groups[2].group.task.id] }));
        (run, records, end)
    }

    fn recovered(folder: &Path, run: &TestRun, point: &Point) -> Recovered {
        let reader = match point.place {
            Some(place) => JournalReader::open_behind(folder, place).unwrap().expect("it is in the journal"),
            None => JournalReader::open(folder).unwrap(),
        };
        Recovered::after(run.fold.state().step, run.fold.planned(), point, reader, true).unwrap()
    }

    fn groups(found: &Recovered) -> Vec<GroupRecord> {
        found.received.in_order().cloned().collect()
    }

    /// A point replaces all earlier records, wherever it is taken.
    #[test]
    fn reading_from_a_point_finds_what_reading_everything_finds() {
        let (run, records, end) = eventful();
        let folder = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(folder.path(), &Damage::default(), None).unwrap();
        let mut points = vec![Point::default()];
        for record in &records {
            journal.append(record).unwrap();
            journal.sync().unwrap();
            let found = recovered(folder.path(), &run, &Point::default());
            let received = groups(&found);
            points.push(Point { place: found.last, known: found.known, trained: found.trained, received });
        }
        let all = recovered(folder.path(), &run, &Point::default());
        assert_eq!(groups(&all).iter().map(|group| group.played_by.as_str()).collect::<Vec<_>>(), ["c"]);
        assert!(all.banned.contains("a") && all.banned.contains("b") && all.known.disputed.len() == 1);
        assert_eq!((all.elapsed_ms, all.known.evals.len(), all.known.num_disputes), (2_000, 2, 2));
        // A checkpoint of the second step is no earlier than its record.
        for point in points.iter().take(1).chain(&points[end..]) {
            let found = recovered(folder.path(), &run, point);
            assert_eq!(groups(&found), groups(&all));
            assert_eq!(found.known, all.known);
            assert_eq!((&found.banned, &found.trained, &found.steps), (&all.banned, &all.trained, &all.steps));
            assert_eq!((found.elapsed_ms, found.last), (all.elapsed_ms, all.last));
        }
    }

    #[test]
    fn what_is_not_reproducible_goes_on_from_its_checkpoint_alone() {
        let (run, records, _) = eventful();
        let folder = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(folder.path(), &Damage::default(), None).unwrap();
        records.iter().for_each(|record| journal.append(record).unwrap());
        journal.sync().unwrap();
        let reader = JournalReader::open(folder.path()).unwrap();
        let found = Recovered::after(1, run.fold.planned(), &Point::default(), reader, false).unwrap();
        assert!(groups(&found).is_empty());
        let evals: Vec<u64> = found.known.evals.iter().map(|eval| eval.step).collect();
        assert_eq!(evals, [1, 2]);
        let mut known = found.known;
        let Some(Record::Step(step)) = records.iter().find(|record| matches!(record, Record::Step(_))).cloned() else {
            panic!("there is a step")
        };
        known.take(&Record::Step(step), false);
        assert!(known.evals.is_empty(), "step 1 is played anew, and its exams are sat anew");
    }

    fn read(run_dir: &Path) -> (Result<Recovered, Error>, Vec<String>) {
        let mut refused = Vec::new();
        (Recovered::read(run_dir, true, |reason| refused.push(reason)), refused)
    }

    fn begun_at(found: &Recovered) -> Option<u64> {
        found.checkpoint.as_ref().map(|checkpoint| checkpoint.state.step)
    }

    /// A journal without its first segment needs a checkpoint; any that is kept will do.
    #[test]
    fn a_run_without_its_first_segments_goes_on_from_every_kept_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let [journal, checkpoints] = ["journal", "checkpoints"].map(|name| folder.path().join(name));
        let mut run = TestRun::new();
        let (mut writer, _) = Journal::open(&journal, &Damage::default(), None).unwrap();
        let mut known = Known::default();
        for _ in 0..3 {
            run.step();
            for record in run.records.drain(..) {
                known.take(&record, true);
                writer.append(&record).unwrap();
            }
            writer.cut(crate::Opening { manifest: test_manifest(), known: known.clone() }).unwrap();
            let point = Point { place: writer.last(), known: known.clone(), ..Point::default() };
            run.write_checkpoint(&checkpoints, &point);
        }
        crate::checkpoint::prune(&checkpoints, &checkpoints.join("step_00000003"), 2).unwrap();
        crate::checkpoint::forget_passed(&journal, &checkpoints).unwrap();
        let left: Vec<bool> = (0..4).map(|index| journal.join(format!("{index:08}.log")).exists()).collect();
        assert_eq!(left, [false, false, true, true]);
        let (found, refused) = read(folder.path());
        let found = found.unwrap();
        assert_eq!((begun_at(&found), refused.len(), found.steps.len()), (Some(3), 0, 0));
        std::fs::write(checkpoints.join("step_00000003/state.postcard"), "damaged").unwrap();
        let (again, refused) = read(folder.path());
        let again = again.unwrap();
        assert_eq!((begun_at(&again), refused.len(), again.steps.len()), (Some(2), 1, 1));
        assert_eq!((again.known, again.manifest), (found.known, Some(test_manifest())));
        std::fs::remove_dir_all(&checkpoints).unwrap();
        let error = read(folder.path()).0.err().unwrap().to_string();
        let says = "checkpoints: expected a checkpoint that matches the journal, whose first segments were removed, got no \
                    usable checkpoint";
        assert!(error.ends_with(says), "{error}");
    }
}
