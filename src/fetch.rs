//! Pretrained models for workers that lack them: the learner stores the files on the server when a worker asks, and the worker
//! keeps them in its cache.
//!
//! What arrives goes into a folder `DIGEST.part`, which a later call continues. It gets its name `DIGEST` once all of its bytes have
//! that digest, so a folder of that name is complete.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bus::nats::{Nats, StoredModel};
use bus::run_blocking;
use futures_util::StreamExt as _;
use policy::formats::Pretrained;
use proto::Digest;
use tokio::time::Instant;

use crate::machine::free_bytes;
use crate::model::known::cache;
use crate::model::meter::Meter;
use crate::pretrained::Opened;
use crate::report::{bytes, note};

/// The name on the bus of a model that is a single file.
const GGUF: &str = "model.gguf";

/// How often a worker asks for a model, and looks for another process that fetches it.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// Maximum time to wait for the server before the run is looked at again.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// Maximum time without a learner that could store a model.
const PATIENCE: Duration = Duration::from_secs(300);

/// Maximum time in which a learner stores a model.
const STORE_LIMIT: Duration = Duration::from_secs(3_600);

/// Most files of a model.
const MAX_FILES: usize = 1_024;

/// Returns the files of a model, with their names on the bus.
pub(crate) fn files_of(pretrained: &Pretrained) -> Result<Vec<(String, PathBuf)>> {
    let mut files = pretrained.files()?;
    if pretrained.gguf().is_some() {
        files[0].0 = GGUF.to_owned();
    }
    Ok(files)
}

/// Returns the size of files, in bytes.
pub(crate) fn size_of(files: &[(String, PathBuf)]) -> Result<u64> {
    let size = |path: &PathBuf| path.metadata().map(|metadata| metadata.len());
    files.iter().map(|(_, path)| size(path).with_context(|| format!("inspect {}", path.display()))).sum()
}

/// Stores a model on the server whenever a worker asks for it and the server lacks it. Never returns.
pub(crate) async fn serve(bus: Arc<Nats>, digest: Digest, files: Vec<(String, PathBuf)>) {
    let size = size_of(&files).unwrap_or_default();
    loop {
        if bus.next_wanted_model().await != digest {
            continue;
        }
        match bus.put_model(digest, &files).await {
            Ok(true) => note(format_args!(
                "stored the pretrained model {}, {}, on the server until the run is over: a worker lacks it",
                digest.short(),
                bytes(size)
            )),
            Ok(false) => {}
            Err(error) => tracing::warn!("could not store the pretrained model for a worker that lacks it: {error}"),
        }
    }
}

/// Where a worker fetches a model.
pub(crate) struct Source<'a> {
    pub(crate) bus: &'a Nats,
    pub(crate) run: &'a str,
    pub(crate) digest: Digest,
}

impl Source<'_> {
    /// Returns the place of the model in the cache, and fetches it if it is not there. One process of a machine at a time does so.
    ///
    /// - `learner_lives`: whether the run has a learner; fails if the run is over.
    ///
    /// # Errors
    /// When the run, the disk or what arrives is not as expected. There is then no new folder of the model's name, and a part of
    /// the model is kept if a later call can continue it.
    pub(crate) async fn find_or_fetch(&self, learner_lives: impl AsyncFn() -> Result<bool>) -> Result<PathBuf> {
        let folder = cache()?.join("models").join("by-digest");
        let place = folder.join(self.digest.to_string());
        if self.is_at(&place).await.is_ok() {
            return Ok(model_in(&place));
        }
        std::fs::create_dir_all(&folder).with_context(|| advised("create", &folder))?;
        let _lock = self.lock(&folder.join(format!("{}.LOCK", self.digest))).await?;
        let found = self.is_at(&place).await;
        if found.is_ok() {
            return Ok(model_in(&place));
        }
        if let (Err(damage), true) = (found, place.exists()) {
            note(format_args!("the pretrained model in the cache is damaged, fetching it again: {damage:#}"));
            std::fs::remove_dir_all(&place).with_context(|| advised("remove", &place))?;
        }
        let partial = folder.join(format!("{}.part", self.digest));
        loop {
            let is_resumed = partial.exists();
            self.receive(&partial, &learner_lives).await?;
            let Err(damage) = self.is_at(&partial).await else { break };
            std::fs::remove_dir_all(&partial).with_context(|| advised("remove", &partial))?;
            if !is_resumed {
                return Err(damage.context(format!("fetch the pretrained model of run {} over the bus", self.run)));
            }
            note(format_args!("the earlier part of the pretrained model is damaged, starting over"));
        }
        std::fs::rename(&partial, &place).with_context(|| advised("create", &place))?;
        File::open(&folder).and_then(|folder| folder.sync_all()).with_context(|| advised("write", &folder))?;
        note(format_args!("fetched the pretrained model {} into {}", self.digest.short(), place.display()));
        Ok(model_in(&place))
    }

    /// Checks that the model lies in a folder, whole.
    async fn is_at(&self, place: &Path) -> Result<()> {
        let (place, digest) = (place.to_owned(), self.digest);
        run_blocking(move || {
            let got = Opened::at(&model_in(&place))?.digest;
            let place = place.display();
            ensure!(got == digest, "{place}: expected a model with digest {}, got {}", digest.short(), got.short());
            Ok(())
        })
        .await
    }

    /// Takes the lock, and waits as long as another process holds it. The file is never removed: a lock on a removed file excludes
    /// nobody.
    async fn lock(&self, path: &Path) -> Result<File> {
        let open = OpenOptions::new().create(true).truncate(false).write(true).open(path);
        let file = open.with_context(|| advised("open", path))?;
        let mut has_told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(error).with_context(|| advised("lock", path)),
                Err(TryLockError::WouldBlock) if !has_told => {
                    note(format_args!("waiting for another process that fetches the pretrained model"));
                    has_told = true;
                }
                Err(TryLockError::WouldBlock) => {}
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    /// Makes the files in a folder those of the model: with what is there, and what the server sends from there on.
    async fn receive(&self, folder: &Path, learner_lives: &impl AsyncFn() -> Result<bool>) -> Result<()> {
        std::fs::create_dir_all(folder).with_context(|| advised("create", folder))?;
        let began = Instant::now();
        loop {
            let model = self.listed(learner_lives).await?;
            if self.receive_files(folder, &model).await? {
                return Ok(());
            }
            // The server lost a piece. The learner stores it again.
            ensure!(
                began.elapsed() < STORE_LIMIT,
                "run {}: expected the pretrained model on the server, which loses parts of it",
                self.run
            );
            self.bus.want_model(self.digest).await;
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    /// Waits until the model is on the server, and checks what its list of files says.
    async fn listed(&self, learner_lives: &impl AsyncFn() -> Result<bool>) -> Result<StoredModel> {
        let Source { bus, run, digest } = *self;
        let (began, mut last_alive, mut has_told) = (Instant::now(), Instant::now(), false);
        loop {
            // The streams of a run that was removed do not answer.
            let found = tokio::time::timeout(ANSWER_LIMIT, bus.model(digest)).await.unwrap_or(Ok(None))?;
            if let Some(model) = found {
                expect_plain(&model).with_context(|| format!("run {run}: the pretrained model on the server"))?;
                return Ok(model);
            }
            if learner_lives().await? {
                last_alive = Instant::now();
            }
            for (since, limit, what) in [(last_alive, PATIENCE, "has no learner"), (began, STORE_LIMIT, "stored none")]
            {
                if since.elapsed() >= limit {
                    let digest = digest.short();
                    bail!("waited {} s for the pretrained model {digest} of run {run}, which {what}", limit.as_secs());
                }
            }
            if !has_told {
                note(format_args!(
                    "the pretrained model {} is not on this machine: waiting for the learner of run {run} to send it \
                     (--base says where it lies)",
                    digest.short()
                ));
                has_told = true;
            }
            bus.want_model(digest).await;
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    /// Returns whether the server had all pieces.
    async fn receive_files(&self, folder: &Path, model: &StoredModel) -> Result<bool> {
        let size = model.num_bytes().unwrap_or(u64::MAX);
        let paths = model.files.iter().map(|file| folder.join(&file.name)).collect::<Vec<_>>();
        let have = |path: &PathBuf| path.metadata().map_or(0, |metadata| metadata.len());
        let (needed, free) = (size.saturating_sub(paths.iter().map(have).sum()), free_bytes(folder)?);
        ensure!(
            needed <= free,
            "{}: expected {} of free space for the pretrained model, got {}; make room there, or set AUTODIDACT_CACHE to a \
             folder with room",
            folder.display(),
            bytes(needed),
            bytes(free)
        );
        let mut meter = Meter::new(format!("pretrained model {}", self.digest.short()), size);
        meter.note(format_args!(
            "fetching the pretrained model {} of run {} over the bus, {}",
            self.digest.short(),
            self.run,
            bytes(size)
        ));
        let mut num_received = 0;
        for (number, (file, path)) in model.files.iter().zip(&paths).enumerate() {
            let write = || advised("write", path);
            let open = OpenOptions::new().create(true).append(true).open(path);
            let mut out = open.with_context(|| advised("open", path))?;
            let first = match have(path) {
                had if had > file.num_bytes => 0,
                had if had == file.num_bytes => had.div_ceil(model.piece_bytes),
                had => had / model.piece_bytes,
            };
            let kept = (first * model.piece_bytes).min(file.num_bytes);
            out.set_len(kept).with_context(write)?;
            num_received += kept;
            if number == 0 {
                meter.begin(kept);
            }
            let mut pieces = pin!(self.bus.pieces(self.digest, model, number, first));
            let mut offset = kept;
            while let Some(piece) = pieces.next().await {
                let Some(piece) = piece? else {
                    meter.clear();
                    return Ok(false);
                };
                let (expected, got) = (model.piece_bytes.min(file.num_bytes - offset), piece.len() as u64);
                let name = &file.name;
                ensure!(
                    got == expected,
                    "run {}: {name} of the pretrained model on the server: expected a piece of {expected} bytes, got {got}",
                    self.run
                );
                out.write_all(&piece).with_context(write)?;
                offset += got;
                num_received += got;
                meter.set(num_received);
            }
            run_blocking(move || out.sync_all()).await.with_context(write)?;
        }
        meter.clear();
        Ok(true)
    }
}

/// Checks that a list of files names a few that lie in one folder.
fn expect_plain(model: &StoredModel) -> Result<()> {
    let (num_files, mut names) = (model.files.len(), Vec::new());
    ensure!((1..=MAX_FILES).contains(&num_files), "expected 1 to {MAX_FILES} files, got {num_files}");
    for file in &model.files {
        let name = file.name.as_str();
        let is_plain = !name.starts_with('.') && !name.contains(['/', '\\', '\0']);
        let is_part = [".json", ".jinja", ".safetensors"].iter().any(|end| name.ends_with(end)) || name == GGUF;
        ensure!(is_plain && is_part, "expected names of files of a model, got {name:?}");
        ensure!(!names.contains(&name), "expected every file once, got {name:?} twice");
        names.push(name);
    }
    Ok(())
}

/// Returns what is opened as the model of a folder in the cache.
fn model_in(place: &Path) -> PathBuf {
    let file = place.join(GGUF);
    if file.exists() { file } else { place.to_owned() }
}

/// Describes an operation on the cache, and how to have another one.
fn advised(operation: &str, path: &Path) -> String {
    format!("{operation} {} (AUTODIDACT_CACHE names another folder for fetched models)", path.display())
}
