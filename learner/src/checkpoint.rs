//! Checkpoints: a folder that is complete or does not exist.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use policy::{ModelConfig, Params, TrainingState, read_weights, write_weights};
use proto::Digest;
use proto::wire::Format;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::journal::{forget_before, sync_folder};
use crate::plan::Plans;
use crate::point::Point;
use crate::replay_buffers::{ReplayBuffers, Saved};
use crate::self_play::SelfPlay;
use crate::state::{State, Totals};
use crate::{Config, Control, Error};

/// The format of a checkpoint's files without tensors. A checkpoint of another version is not used.
const FORMAT: Format = Format { name: "checkpoint", version: 6 };

/// A state as read from disk, with the data to resume from it.
#[derive(Debug)]
pub struct Checkpoint {
    /// The state.
    pub state: State,
    /// Its weights, their average and the optimizer state.
    pub training: TrainingState,
    /// Tasks that are planned and not folded.
    pub planned: Plans,
    /// Weights that those tasks refer to, besides the state's own.
    pub versions: Vec<(Digest, Vec<u8>)>,
    /// The end of the run, if it was fixed by then.
    pub control: Option<Control>,
    /// The point from which the journal continues, or why its file is unreadable: the journal can be read from its beginning.
    pub(crate) point: Result<Point, Error>,
}

/// A state as it is written to disk, with the data to resume from it.
pub(crate) struct Snapshot<'a> {
    pub(crate) state: &'a State,
    pub(crate) training: &'a TrainingState,
    pub(crate) planned: &'a Plans,
    pub(crate) versions: Vec<(Digest, Vec<u8>)>,
    pub(crate) control: Option<Control>,
    pub(crate) point: &'a Point,
}

/// The part of a state that is not a tensor.
#[derive(Serialize, Deserialize)]
struct Rest {
    step: u64,
    num_updates: u64,
    totals: Totals,
    history: Digest,
    replay_buffers: Saved,
    self_play: SelfPlay,
    planned: Plans,
    versions: Vec<(Digest, Vec<u8>)>,
    control: Option<Control>,
}

const COMPLETE: &str = "COMPLETE";
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.postcard";
const POINT: &str = "journal.postcard";

/// Returns the name of a checkpoint; names sort in the order of steps.
fn name(step: u64) -> String {
    format!("step_{step:08}")
}

/// Writes a checkpoint under `folder`; a crash leaves the earlier ones intact.
pub(crate) fn save(
    folder: &Path,
    config: &Config,
    snapshot: Snapshot<'_>,
    tokenizer_json: &str,
) -> Result<PathBuf, Error> {
    let Snapshot { state, training, planned, versions, control, point } = snapshot;
    let rest = Rest {
        step: state.step,
        num_updates: training.num_updates,
        totals: state.totals.clone(),
        history: state.history,
        replay_buffers: state.replay_buffers.save(),
        self_play: state.self_play.clone(),
        planned: planned.clone(),
        versions,
        control,
    };
    let optimizer = [("first.", &training.first), ("second.", &training.second), ("ema.", &training.average)];
    let files = [
        (MODEL, write_weights(&config.model, &[("", &training.weights)])),
        (OPTIMIZER, write_weights(&config.model, &optimizer)),
        ("config.json", serde_json::to_vec_pretty(&config.model).expect("a config has a JSON form")),
        ("tokenizer.json", tokenizer_json.as_bytes().to_vec()),
        (STATE, FORMAT.encode(&rest)),
        (POINT, FORMAT.encode(point)),
    ];
    let name = name(state.step);
    let (partial, complete) = (folder.join(format!(".{name}.partial")), folder.join(name));
    if partial.exists() {
        std::fs::remove_dir_all(&partial).map_err(Error::io("remove", &partial))?;
    }
    std::fs::create_dir_all(&partial).map_err(Error::io("create", &partial))?;
    let mut digests = BTreeMap::new();
    for (name, bytes) in &files {
        write_durably(&partial.join(name), bytes)?;
        digests.insert(*name, Digest::of_bytes(bytes));
    }
    let digests = serde_json::to_vec_pretty(&digests).expect("digests have a JSON form");
    write_durably(&partial.join(COMPLETE), &digests)?;
    sync_folder(&partial)?;
    if complete.exists() {
        std::fs::remove_dir_all(&complete).map_err(Error::io("remove", &complete))?;
    }
    std::fs::rename(&partial, &complete).map_err(Error::io("rename", &complete))?;
    sync_folder(folder)?;
    Ok(complete)
}

/// Removes all but the last `keep` checkpoints up to `saved`, and those after it: they were refused, and the run resumed before
/// them.
pub(crate) fn prune(folder: &Path, saved: &Path, keep: usize) -> Result<(), Error> {
    let mut checkpoints = list_checkpoints(folder)?;
    let refused = checkpoints.split_off(checkpoints.partition_point(|path| path.as_path() <= saved));
    let old = checkpoints.len().saturating_sub(keep);
    for path in refused.iter().chain(&checkpoints[..old]) {
        std::fs::remove_dir_all(path).map_err(Error::io("remove", path))?;
    }
    Ok(())
}

/// Removes the segments of a journal that no checkpoint needs.
pub(crate) fn forget_passed(journal: &Path, checkpoints: &Path) -> Result<(), Error> {
    let points = list_checkpoints(checkpoints)?.into_iter().map(|checkpoint| load_point(&checkpoint));
    // An unreadable checkpoint may need any segment.
    let needed = points.map(|point| point.ok()?.place.map(|place| place.segment())).min().flatten();
    needed.map_or(Ok(()), |needed| forget_before(journal, needed))
}

/// Lists checkpoints that look complete, oldest first.
pub(crate) fn list_checkpoints(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let path = entry.map_err(Error::io("list", folder))?.path();
        let named = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("step_"));
        if named && path.join(COMPLETE).exists() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Reads the newest intact checkpoint of at most step `newest`; `None` if there is none. Calls `refused` for each damaged one.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be listed.
pub(crate) fn load_latest(
    folder: &Path,
    newest: u64,
    mut refused: impl FnMut(&Error),
) -> Result<Option<(ModelConfig, Checkpoint)>, Error> {
    let last = folder.join(name(newest));
    for path in list_checkpoints(folder)?.into_iter().rev().filter(|path| *path <= last) {
        match load_checkpoint(&path) {
            Ok(loaded) => return Ok(Some(loaded)),
            Err(error) => refused(&error),
        }
    }
    Ok(None)
}

/// Reads a checkpoint and verifies every byte that cannot be recovered from elsewhere.
///
/// # Errors
/// [`Error::Io`], [`Error::File`] or [`Error::Policy`].
pub fn load_checkpoint(folder: &Path) -> Result<(ModelConfig, Checkpoint), Error> {
    let files = Files::open(folder)?;
    for name in files.digests.keys().filter(|name| ![MODEL, OPTIMIZER, STATE, POINT].contains(&name.as_str())) {
        files.read(name)?;
    }
    let (config, mut model) = read_weights(&files.read(MODEL)?, &[""])?;
    let (_, sets) = read_weights(&files.read(OPTIMIZER)?, &["first.", "second.", "ema."])?;
    let rest: Rest = files.decode(STATE)?;
    let point = files.decode(POINT);
    let [first, second, average]: [Params; 3] = sets.try_into().expect("one set for each prefix");
    let weights = model.remove(0);
    let training = TrainingState { weights, average, first, second, num_updates: rest.num_updates };
    let state = State {
        step: rest.step,
        totals: rest.totals,
        replay_buffers: ReplayBuffers::load(rest.replay_buffers),
        self_play: rest.self_play,
        history: rest.history,
    };
    let Rest { planned, versions, control, .. } = rest;
    Ok((config, Checkpoint { state, training, planned, versions, control, point }))
}

/// Reads only the point from which the journal continues after a checkpoint.
pub(crate) fn load_point(folder: &Path) -> Result<Point, Error> {
    Files::open(folder)?.decode(POINT)
}

/// The files of a checkpoint, each with its expected digest.
struct Files<'a> {
    folder: &'a Path,
    digests: BTreeMap<String, Digest>,
}

impl Files<'_> {
    fn open(folder: &Path) -> Result<Files<'_>, Error> {
        let path = folder.join(COMPLETE);
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        let digests = serde_json::from_slice(&bytes).map_err(|error| Error::File {
            path,
            expected: "the digests of the files".to_owned(),
            got: error.to_string(),
        })?;
        Ok(Files { folder, digests })
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, Error> {
        let refuse = |name, expected, got| Err(Error::File { path: self.folder.join(name), expected, got });
        let Some(digest) = self.digests.get(name) else {
            return refuse(COMPLETE, format!("a digest of {name}"), "none".to_owned());
        };
        let path = self.folder.join(name);
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        match Digest::of_bytes(&bytes) {
            got if got == *digest => Ok(bytes),
            got => refuse(name, format!("bytes with digest {}", digest.short()), got.short()),
        }
    }

    fn decode<T: DeserializeOwned>(&self, name: &str) -> Result<T, Error> {
        FORMAT.decode(&self.read(name)?).map_err(|error| {
            let (expected, got) = match error {
                proto::Error::Version { expected, got, .. } => {
                    (format!("a checkpoint of version {expected}"), format!("version {got}"))
                }
                error => ("a state that this build can read".to_owned(), error.to_string()),
            };
            Error::File { path: self.folder.join(name), expected, got }
        })
    }
}

fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(Error::io("write", path))
}

#[cfg(test)]
mod tests {
    use proto::Niche;

    use super::*;
    use crate::test_problem;
    use crate::test_run::{TestRun, config};

    fn point(run: &TestRun) -> Point {
        let folder = tempfile::tempdir().unwrap();
        run.write_journal(folder.path())
    }

    #[test]
    fn a_checkpoint_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = TestRun::new();
        (0..2).for_each(|_| run.step());
        run.fold.plan();
        let mut state = run.fold.state().clone();
        state.self_play.measure(&test_problem("countdown", "kept"), Niche(1), 0.5, 0);
        let point = point(&run);
        let versions = vec![(Digest::of_bytes(b"older"), vec![1, 2, 3])];
        let control = Some(Control { decay_from: 3, stop_at: 9 });
        let training = run.fold.trainer().export().unwrap();
        let snapshot = Snapshot {
            state: &state,
            training: &training,
            planned: run.fold.planned(),
            versions: versions.clone(),
            control,
            point: &point,
        };
        let path = save(folder.path(), &config(), snapshot, "{}").unwrap();
        let (model, checkpoint) = load_checkpoint(&path).unwrap();
        assert_eq!(model, config().model);
        assert!(checkpoint.state == state && checkpoint.planned == *run.fold.planned());
        assert!(checkpoint.training == *training && training.num_updates == 2);
        assert_eq!(
            (checkpoint.versions, checkpoint.control, checkpoint.point.unwrap()),
            (versions, control, point.clone())
        );
        assert_eq!(load_point(&path).unwrap(), point);
    }

    #[test]
    fn every_file_that_is_damaged_or_missing_is_named_and_the_checkpoint_before_used() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = TestRun::new();
        run.step();
        run.write_checkpoint(folder.path(), &point(&run));
        run.step();
        let newest = run.write_checkpoint(folder.path(), &point(&run));
        let names: Vec<_> = std::fs::read_dir(&newest).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 7);
        for name in &names {
            let path = newest.join(name);
            let whole = std::fs::read(&path).unwrap();
            for is_missing in [true, false] {
                if is_missing {
                    std::fs::remove_file(&path).unwrap();
                } else {
                    let mut bytes = whole.clone();
                    let middle = bytes.len() / 2;
                    bytes[middle] ^= 1;
                    std::fs::write(&path, bytes).unwrap();
                }
                let mut refused = Vec::new();
                let (_, used) =
                    load_latest(folder.path(), u64::MAX, |error| refused.push(error.to_string())).unwrap().unwrap();
                if name == POINT {
                    let error = used.point.unwrap_err().to_string();
                    assert!(used.state.step == 2 && error.contains("step_00000002/journal.postcard"), "{error}");
                    continue;
                }
                assert_eq!(used.state.step, 1, "{name:?}");
                // A folder without its `COMPLETE` file is not a checkpoint.
                let is_none = is_missing && name == COMPLETE;
                assert_eq!(refused.len(), usize::from(!is_none), "{name:?}");
                assert!(refused.iter().all(|error| error.contains("step_00000002/")), "{refused:?}");
            }
            std::fs::write(&path, whole).unwrap();
        }
        assert_eq!(load_latest(folder.path(), u64::MAX, |_| {}).unwrap().unwrap().1.state.step, 2);
        assert_eq!(load_latest(folder.path(), 1, |_| {}).unwrap().unwrap().1.state.step, 1);
        assert!(load_latest(folder.path(), 0, |_| {}).unwrap().is_none());
    }

    #[test]
    fn what_a_crash_left_is_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let run = TestRun::new();
        for name in [".step_00000000.partial", "step_00000000"] {
            std::fs::create_dir_all(folder.path().join(name)).unwrap();
            std::fs::write(folder.path().join(name).join("left"), "over").unwrap();
        }
        assert!(load_latest(folder.path(), u64::MAX, |_| {}).unwrap().is_none());
        let path = run.write_checkpoint(folder.path(), &point(&run));
        assert!(load_checkpoint(&path).is_ok() && !path.join("left").exists());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn old_checkpoints_and_refused_ones_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let steps =
            |steps: &[u64]| -> Vec<PathBuf> { steps.iter().map(|step| folder.path().join(name(*step))).collect() };
        for path in steps(&[1, 2, 3, 4, 9]) {
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join(COMPLETE), "{}").unwrap();
        }
        prune(folder.path(), &folder.path().join(name(4)), 2).unwrap();
        assert_eq!(list_checkpoints(folder.path()).unwrap(), steps(&[3, 4]));
        prune(folder.path(), &folder.path().join(name(4)), 9).unwrap();
        assert_eq!(list_checkpoints(folder.path()).unwrap(), steps(&[3, 4]));
        assert!(list_checkpoints(&folder.path().join("absent")).unwrap().is_empty());
    }

    #[test]
    fn a_checkpoint_of_another_version_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let run = TestRun::new();
        let path = run.write_checkpoint(folder.path(), &point(&run));
        let [state, complete] = [STATE, COMPLETE].map(|name| std::fs::read(path.join(name)).unwrap());
        let older = [&[4], &state[1..]].concat();
        let mut digests: BTreeMap<String, Digest> = serde_json::from_slice(&complete).unwrap();
        digests.insert(STATE.to_owned(), Digest::of_bytes(&older));
        std::fs::write(path.join(STATE), older).unwrap();
        std::fs::write(path.join(COMPLETE), serde_json::to_vec(&digests).unwrap()).unwrap();
        let error = load_checkpoint(&path).unwrap_err().to_string();
        assert!(error.ends_with("state.postcard: expected a checkpoint of version 6, got version 4"), "{error}");
    }
}
