//! Checkpoints: a folder that is complete or does not exist.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use policy::{ModelConfig, Params, read_weights, write_weights};
use proto::Digest;
use serde::{Deserialize, Serialize};

use crate::fold::{State, Totals};
use crate::journal::sync_folder;
use crate::optimizer::AdamW;
use crate::plan::Plans;
use crate::self_play::SelfPlay;
use crate::window::{Saved, Windows};
use crate::{Config, Control, Error};

/// A state as read from disk, with what it needs to go on.
#[derive(Debug)]
pub struct Checkpoint {
    /// The state.
    pub state: State,
    /// Tasks that were planned and not folded.
    pub planned: Plans,
    /// Weights that those tasks name, besides the state's own.
    pub versions: Vec<(Digest, Vec<u8>)>,
    /// The end of the run, if it was fixed by then.
    pub control: Option<Control>,
}

/// The part of a state that is not a tensor.
#[derive(Serialize, Deserialize)]
struct Rest {
    step: u64,
    num_updates: u64,
    totals: Totals,
    history: Digest,
    windows: Saved,
    self_play: SelfPlay,
    planned: Plans,
    versions: Vec<(Digest, Vec<u8>)>,
    control: Option<Control>,
}

const COMPLETE: &str = "COMPLETE";

/// Names a checkpoint; names are in the order of steps.
fn name(step: u64) -> String {
    format!("step_{step:08}")
}

/// Writes a checkpoint under `folder`; a crash leaves the earlier ones alone.
pub(crate) fn save(
    folder: &Path,
    config: &Config,
    state: &State,
    planned: &Plans,
    versions: Vec<(Digest, Vec<u8>)>,
    control: Option<Control>,
    tokenizer_json: &str,
) -> Result<PathBuf, Error> {
    let rest = Rest {
        step: state.step,
        num_updates: state.adam.num_updates,
        totals: state.totals.clone(),
        history: state.history,
        windows: state.windows.save(),
        self_play: state.self_play.clone(),
        planned: planned.clone(),
        versions,
        control,
    };
    let optimizer = [("first.", &state.adam.first), ("second.", &state.adam.second), ("ema.", &state.ema)];
    let files = [
        ("model.safetensors", write_weights(&config.model, &[("", &state.params)])),
        ("optimizer.safetensors", write_weights(&config.model, &optimizer)),
        ("config.json", serde_json::to_vec_pretty(&config.model).expect("a config has a JSON form")),
        ("tokenizer.json", tokenizer_json.as_bytes().to_vec()),
        ("state.postcard", proto::wire::encode(&rest)),
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

/// Removes all but `keep` checkpoints up to `saved`, and those after it: the run went on from before them since they were
/// refused.
pub(crate) fn prune(folder: &Path, saved: &Path, keep: usize) -> Result<(), Error> {
    let mut checkpoints = list_checkpoints(folder)?;
    let refused = checkpoints.split_off(checkpoints.partition_point(|path| path.as_path() <= saved));
    let old = checkpoints.len().saturating_sub(keep);
    for path in refused.iter().chain(&checkpoints[..old]) {
        std::fs::remove_dir_all(path).map_err(Error::io("remove", path))?;
    }
    Ok(())
}

/// Lists complete-looking checkpoints, oldest first.
fn list_checkpoints(folder: &Path) -> Result<Vec<PathBuf>, Error> {
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

/// Reads the newest checkpoint that is whole, of step `newest` at most; `None` when there is none. `refused` hears of each
/// that is not.
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

/// Reads a checkpoint and checks every byte of it.
///
/// # Errors
/// [`Error::Io`], [`Error::File`] or [`Error::Policy`].
pub fn load_checkpoint(folder: &Path) -> Result<(ModelConfig, Checkpoint), Error> {
    let read = |name: &str| {
        let path = folder.join(name);
        std::fs::read(&path).map_err(Error::io("read", &path))
    };
    let refuse = |name: &str, expected: String, got: String| Error::File { path: folder.join(name), expected, got };
    let digests: BTreeMap<String, Digest> = serde_json::from_slice(&read(COMPLETE)?)
        .map_err(|error| refuse(COMPLETE, "the digests of the files".to_owned(), error.to_string()))?;
    let mut files = BTreeMap::new();
    for (name, expected) in &digests {
        let bytes = read(name)?;
        let got = Digest::of_bytes(&bytes);
        if got != *expected {
            return Err(refuse(name, format!("bytes with digest {}", expected.short()), got.short()));
        }
        files.insert(name.as_str(), bytes);
    }
    let file =
        |name: &str| files.get(name).ok_or_else(|| refuse(COMPLETE, format!("a digest of {name}"), "none".to_owned()));
    let (config, mut model) = read_weights(file("model.safetensors")?, &[""])?;
    let (_, sets) = read_weights(file("optimizer.safetensors")?, &["first.", "second.", "ema."])?;
    let rest: Rest = proto::wire::decode(file("state.postcard")?)
        .map_err(|error| refuse("state.postcard", "a state of this build".to_owned(), error.to_string()))?;
    let [first, second, ema]: [Params; 3] = sets.try_into().expect("one set for each prefix");
    let state = State {
        step: rest.step,
        params: model.remove(0),
        ema,
        totals: rest.totals,
        adam: AdamW { first, second, num_updates: rest.num_updates },
        windows: Windows::load(rest.windows),
        self_play: rest.self_play,
        history: rest.history,
    };
    Ok((config, Checkpoint { state, planned: rest.planned, versions: rest.versions, control: rest.control }))
}

fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(Error::io("write", path))
}
