//! The pretrained model that a run begins with, for workers that do not have it.
//!
//! Nothing is stored until a worker asks. The learner then stores the files in pieces, as it stores weights, for as long as the run
//! lasts. The digest that names the model covers all of its bytes; the worker checks it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use proto::{Digest, wire};
use serde::{Deserialize, Serialize};

use super::layout::Queue;
use super::{Nats, PIECE_BYTES, PIECES_IN_FLIGHT};
use crate::{Error, run_blocking};

/// The files of a pretrained model, as they are stored in pieces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredModel {
    /// The files, in the order of their numbers.
    pub files: Vec<StoredFile>,
    /// The size of every piece but a file's last.
    pub piece_bytes: u64,
}

/// A file of a pretrained model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredFile {
    /// Its name within the model's folder.
    pub name: String,
    /// Its size.
    pub num_bytes: u64,
}

impl StoredModel {
    /// Returns the size of all files, or `None` if no number holds it.
    pub fn num_bytes(&self) -> Option<u64> {
        self.files.iter().try_fold(0u64, |sum, file| sum.checked_add(file.num_bytes))
    }

    fn num_pieces(&self) -> u64 {
        self.files.iter().map(|file| file.num_bytes.div_ceil(self.piece_bytes)).sum()
    }
}

impl Nats {
    /// Asks the learner to store a model. The request may be lost, and is to be repeated.
    pub async fn want_model(&self, digest: Digest) {
        self.call(self.layout.wanted(&self.worker), wire::encode(&digest)).await;
    }

    /// Waits for a worker that asks for a model. Requests that came meanwhile are answered by the same model, and dropped.
    pub async fn next_wanted_model(&self) -> Digest {
        use futures_util::FutureExt as _;
        let mut wanted = self.wanted.lock().await;
        loop {
            let mut message = wanted.next(&self.server.client, self.layout.wanted("*")).await;
            while let Some(newer) = wanted.next(&self.server.client, self.layout.wanted("*")).now_or_never() {
                message = newer;
            }
            if let Ok(digest) = wire::decode(&message.payload) {
                return digest;
            }
        }
    }

    /// Stores a model's files, each under its name, unless all of them are there. Returns whether they had to be stored.
    ///
    /// # Errors
    /// [`Error::Unfit`] when a file cannot be read; as all requests to a server.
    pub async fn put_model(&self, digest: Digest, files: &[(String, PathBuf)]) -> Result<bool, Error> {
        let piece_bytes = PIECE_BYTES.min(self.server.max_payload()) as u64;
        let mut opened = Vec::new();
        let mut model = StoredModel { files: Vec::new(), piece_bytes };
        for (name, path) in files {
            let open = || File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
            let (num_bytes, file) = open().map_err(|error| unreadable(path, &error))?;
            model.files.push(StoredFile { name: name.clone(), num_bytes });
            opened.push((Arc::new(file), path.as_path()));
        }
        let is_listed = self.model(digest).await?.as_ref() == Some(&model);
        if is_listed && self.num_stored().await? == model.num_pieces() + 1 {
            return Ok(false);
        }
        let what = || format!("store the pretrained model {}", digest.short());
        for (number, (file, path)) in opened.into_iter().enumerate() {
            let num_bytes = model.files[number].num_bytes;
            let pieces = (0..num_bytes.div_ceil(piece_bytes)).map(|piece| {
                let (file, subject) = (file.clone(), self.layout.base_piece(digest, number, piece));
                async move {
                    let offset = piece * piece_bytes;
                    let mut bytes = vec![0; piece_bytes.min(num_bytes - offset) as usize];
                    let read = run_blocking(move || file.read_exact_at(&mut bytes, offset).map(|()| bytes)).await;
                    let bytes = read.map_err(|error| unreadable(path, &error))?;
                    self.store(what(), subject, bytes.into()).await
                }
            });
            let stored = futures_util::stream::iter(pieces).buffer_unordered(PIECES_IN_FLIGHT);
            stored.try_collect::<()>().await?;
        }
        // Stored last, so that a reader of the list finds the pieces.
        self.store(what(), self.layout.base(digest), wire::encode(&model).into()).await?;
        Ok(true)
    }

    /// Returns the files of a model; `None` if it is not stored, or what is there is no list of files.
    ///
    /// # Errors
    /// When the server is unreachable for too long.
    pub async fn model(&self, digest: Digest) -> Result<Option<StoredModel>, Error> {
        let what = format!("look up the pretrained model {}", digest.short());
        let stored = self.look_up(what, Queue::Base, self.layout.base(digest)).await?;
        let model = stored.and_then(|stored| wire::decode::<StoredModel>(&stored).ok());
        Ok(model.filter(|model| model.piece_bytes > 0 && model.num_bytes().is_some()))
    }

    /// Returns the pieces of a file in order, from piece number `first` on. A piece is `None` if the server has lost it.
    pub fn pieces<'a>(
        &'a self,
        digest: Digest,
        model: &StoredModel,
        file: usize,
        first: u64,
    ) -> impl Stream<Item = Result<Option<bytes::Bytes>, Error>> + use<'a> {
        let num_pieces = model.files[file].num_bytes.div_ceil(model.piece_bytes);
        let what = move || format!("fetch the pretrained model {}", digest.short());
        let fetch = move |piece| self.look_up(what(), Queue::Base, self.layout.base_piece(digest, file, piece));
        futures_util::stream::iter((first..num_pieces).map(fetch)).buffered(PIECES_IN_FLIGHT)
    }

    /// Returns the number of messages in the stream of models.
    async fn num_stored(&self) -> Result<u64, Error> {
        let mut patience = self.server.patience("look at the stored pretrained model".to_owned());
        loop {
            match self.jetstream().get_stream(self.layout.stream(Queue::Base)).await {
                Ok(stream) => return Ok(stream.cached_info().state.messages),
                Err(error) => {
                    self.make_what_is_missing().await;
                    patience.wait_after(error).await?;
                }
            }
        }
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    Error::Unfit {
        what: path.display().to_string(),
        expected: "a readable file of the pretrained model".to_owned(),
        got: error.to_string(),
    }
}
