//! Pretrained models for workers that lack them: the learner stores the files on the server when a worker asks, and the worker
//! keeps them in its cache.
//!
//! What arrives goes into a folder `DIGEST.part`, which a later call continues. It gets its name `DIGEST` once all of its bytes have
//! that digest, so a folder of that name is complete.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind::{InvalidData, IsADirectory, NotADirectory, NotFound, UnexpectedEof};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bus::nats::{Nats, StoredModel};
use bus::run_blocking;
use futures_util::StreamExt as _;
use policy::formats::{FormatError, Pretrained};
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
    let mut last_warning = None;
    loop {
        if bus.next_wanted_model().await != digest {
            continue;
        }
        let stored = bus.put_model(digest, &files).await;
        if stored.is_ok() {
            last_warning = None;
        }
        match stored {
            Ok(true) => note(format_args!(
                "stored the pretrained model {}, {}, on the server until the run is over: a worker lacks it",
                digest.short(),
                bytes(size)
            )),
            Ok(false) => {}
            Err(error) => {
                // A worker asks again every second.
                let warning = format!("could not store the pretrained model for a worker that lacks it: {error}");
                if last_warning.as_ref() != Some(&warning) {
                    tracing::warn!("{warning}");
                    last_warning = Some(warning);
                }
            }
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
        if self.damage_at(&place).await?.is_none() {
            return Ok(model_in(&place));
        }
        std::fs::create_dir_all(&folder).with_context(|| advised("create", &folder))?;
        let _lock = self.lock(&folder.join(format!("{}.LOCK", self.digest)), &learner_lives).await?;
        let Some(damage) = self.damage_at(&place).await? else { return Ok(model_in(&place)) };
        if place.exists() {
            note(format_args!("the pretrained model in the cache is damaged, fetching it again: {damage:#}"));
            std::fs::remove_dir_all(&place).with_context(|| advised("remove", &place))?;
        }
        let partial = folder.join(format!("{}.part", self.digest));
        loop {
            let is_resumed = partial.exists();
            self.receive(&partial, &learner_lives).await?;
            let Some(damage) = self.damage_at(&partial).await? else { break };
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

    /// Returns what is wrong with the model in a folder, if anything is.
    ///
    /// # Errors
    /// When the machine cannot read it: it may be whole.
    async fn damage_at(&self, place: &Path) -> Result<Option<anyhow::Error>> {
        let (place, digest) = (place.to_owned(), self.digest);
        run_blocking(move || match Opened::at(&model_in(&place)) {
            Ok(Opened { digest: got, .. }) => {
                let place = place.display();
                let damage =
                    || anyhow!("{place}: expected a model with digest {}, got {}", digest.short(), got.short());
                Ok((got != digest).then(damage))
            }
            Err(error) if is_of_machine(&error) => Err(error),
            Err(error) => Ok(Some(error)),
        })
        .await
    }

    /// Takes the lock, and waits as long as another process holds it. The file is never removed: a lock on a removed file excludes
    /// nobody.
    async fn lock(&self, path: &Path, learner_lives: &impl AsyncFn() -> Result<bool>) -> Result<File> {
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
            // Fails if the run is over. Until then the other process makes progress, or gives up and lets go of the lock.
            learner_lives().await?;
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
            if kept > 0 {
                meter.begin(num_received);
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

/// Whether a model could not be read for a reason that is not in its files, such as too many open files.
fn is_of_machine(error: &anyhow::Error) -> bool {
    let Some(FormatError::Io { got, .. }) = error.downcast_ref() else { return false };
    !matches!(got.kind(), NotFound | UnexpectedEof | InvalidData | IsADirectory | NotADirectory)
}

/// Describes an operation on the cache, and how to have another one.
fn advised(operation: &str, path: &Path) -> String {
    format!("{operation} {} (AUTODIDACT_CACHE names another folder for fetched models)", path.display())
}

#[cfg(test)]
mod tests {
    use bus::nats::StoredFile;

    use super::*;

    fn listed(names: &[&str]) -> Result<()> {
        let file = |name: &&str| StoredFile { name: (*name).to_owned(), num_bytes: 1 };
        expect_plain(&StoredModel { files: names.iter().map(file).collect(), piece_bytes: 1 })
    }

    #[test]
    fn a_model_has_files_of_one_folder() {
        listed(&["config.json", "chat_template.jinja", "model.safetensors", "model.gguf"]).unwrap();
        for name in
            ["../x.json", "/x.json", "a/b.json", "a\\b.json", "a\0.json", ".x.json", "..", "a.txt", "x.gguf", ""]
        {
            let error = listed(&["config.json", name]).unwrap_err().to_string();
            assert_eq!(error, format!("expected names of files of a model, got {name:?}"));
        }
        let error = listed(&["a.json", "b.json", "a.json"]).unwrap_err().to_string();
        assert_eq!(error, "expected every file once, got \"a.json\" twice");
        let many: Vec<String> = (0..MAX_FILES + 1).map(|number| format!("{number}.json")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        listed(&many[1..]).unwrap();
        for names in [&[][..], &many] {
            let error = listed(names).unwrap_err().to_string();
            assert_eq!(error, format!("expected 1 to 1024 files, got {}", names.len()));
        }
    }

    #[test]
    fn what_the_machine_cannot_read_is_not_damaged() {
        let error = |kind: std::io::ErrorKind| {
            let path = PathBuf::from("config.json");
            anyhow::Error::from(FormatError::Io { path, expected: "a readable file", got: kind.into() })
        };
        for kind in [NotFound, UnexpectedEof, InvalidData, IsADirectory] {
            assert!(!is_of_machine(&error(kind)), "{kind}");
        }
        // Too many open files, and a disk that fails, have kinds without a stable name.
        let too_many = std::io::Error::from_raw_os_error(24).kind();
        for kind in [too_many, std::io::ErrorKind::PermissionDenied, std::io::ErrorKind::Other] {
            assert!(is_of_machine(&error(kind)), "{kind}");
        }
        assert!(!is_of_machine(&anyhow!("another digest")));
    }
}
