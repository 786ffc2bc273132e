use std::time::Duration;

use async_nats::datetime::parse_rfc3339;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::kv::{Operation, UpdateErrorKind};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::Info;
use futures_util::TryStreamExt as _;
use serde::Deserialize;

use super::Server;
use super::answers::code;
use super::layout::{RUNS, check_name, fingerprint_of};
use super::lease::{Holder, Identity, lease_key, run_key};
use super::server::now;
use crate::Error;

/// The current or last leader of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Leader {
    /// Its machine, process and run directory, for display. Absent if it has released the run.
    pub name: Option<String>,
    /// Whether its lease is still valid.
    pub lives: bool,
    /// Time since it last renewed its lease or released it, by the server's clock.
    pub silent_for: Duration,
    /// Time since it took the run, by its own clock; zero if it has released the run.
    pub leads_for: Duration,
    /// Completed steps, if it has reported any.
    pub step: Option<u64>,
    revision: u64,
}

/// The space that a stream takes up on a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamUse {
    /// The name of the stream.
    pub name: String,
    /// The fingerprint of the run that it belongs to.
    pub fingerprint: String,
    /// Its size on the disk.
    pub num_bytes: u64,
    /// How many messages it holds.
    pub num_messages: u64,
}

/// How long a run that is being removed is leased.
const REMOVAL: Duration = Duration::from_secs(60);

#[derive(Deserialize)]
struct Stamp {
    /// When the server answered.
    ts: String,
}

impl Server {
    /// Returns the current or last leader of a run; `None` if the server knows of none.
    ///
    /// # Errors
    /// When the server is unreachable for too long.
    pub async fn leader(&self, run: &str) -> Result<Option<Leader>, Error> {
        check_name(run)?;
        let mut patience = self.patience(format!("look up the learner of run {run:?}"));
        loop {
            let found = async {
                let Some(store) = self.runs_if_any().await? else { return Ok(None) };
                let stamp = match self.jetstream.request(format!("STREAM.INFO.KV_{RUNS}"), &()).await? {
                    Response::<Stamp>::Ok(Stamp { ts }) => parse_rfc3339(&ts)?,
                    Response::Err { error } => return Err(error.into()),
                };
                let Some(entry) = store.entry(lease_key(run)).await? else { return Ok(None) };
                // Both times are by the server's clock. A lease that was renewed after the stamp has an age of zero.
                let silent_for = Duration::try_from(stamp - entry.created).unwrap_or(Duration::ZERO);
                // No learner writes an unreadable entry; the learner that holds the run replaces it soon.
                let held =
                    (entry.operation == Operation::Put).then(|| serde_json::from_slice::<Holder>(&entry.value).ok());
                let leader = Leader {
                    name: None,
                    lives: false,
                    silent_for,
                    leads_for: Duration::ZERO,
                    step: None,
                    revision: entry.revision,
                };
                Ok::<_, async_nats::Error>(Some(match held.flatten() {
                    None => leader,
                    Some(Holder { holder, term, lease_seconds, step, .. }) => Leader {
                        name: Some(holder),
                        lives: silent_for.as_secs_f64() <= lease_seconds,
                        leads_for: now().saturating_sub(Duration::from_millis(term)),
                        step,
                        ..leader
                    },
                }))
            };
            match found.await {
                Ok(found) => return Ok(found),
                Err(error) => patience.wait_after(error).await?,
            }
        }
    }

    /// Lists the streams of all runs, in order of their names.
    ///
    /// # Errors
    /// When the server is unreachable for too long.
    pub async fn stream_uses(&self) -> Result<Vec<StreamUse>, Error> {
        let mut patience = self.patience("list the streams of all runs".to_owned());
        loop {
            match self.jetstream.streams().try_collect::<Vec<_>>().await {
                Ok(streams) => {
                    let of_run = |info: Info| {
                        let fingerprint = fingerprint_of(&info.config.name)?.to_owned();
                        let (num_bytes, num_messages) = (info.state.bytes, info.state.messages);
                        Some(StreamUse { name: info.config.name, fingerprint, num_bytes, num_messages })
                    };
                    let mut uses: Vec<StreamUse> = streams.into_iter().filter_map(of_run).collect();
                    uses.sort_by(|one, other| one.name.cmp(&other.name));
                    return Ok(uses);
                }
                Err(error) => patience.wait_after(error).await?,
            }
        }
    }

    /// Removes streams and the announcement of a run without a live learner. Meanwhile no learner can take the run.
    ///
    /// # Errors
    /// [`Error::Taken`] when the run has a live learner.
    pub async fn remove(&self, run: &str, streams: &[StreamUse], identity: &Identity) -> Result<(), Error> {
        let taken = |holder: Option<String>| Error::Taken { run: run.to_owned(), holder: holder.unwrap_or_default() };
        let found = self.leader(run).await?;
        if let Some(Leader { lives: true, name, .. }) = found {
            return Err(taken(name));
        }
        let mut patience = self.patience(format!("remove run {run:?}"));
        let held = Holder::new(identity, now().as_millis() as u64, REMOVAL);
        loop {
            let removed = async {
                let Some(store) = self.runs_if_any().await? else {
                    return self.delete(streams).await.map(|()| true);
                };
                let value: bytes::Bytes = serde_json::to_vec(&held)?.into();
                // A learner that renews or takes the lease from now on changes its revision, and is detected.
                match store.update(lease_key(run), value, found.as_ref().map_or(0, |leader| leader.revision)).await {
                    Ok(_) => {}
                    Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {
                        let entry = store.entry(lease_key(run)).await?;
                        let holder = entry.and_then(|entry| serde_json::from_slice::<Holder>(&entry.value).ok());
                        if holder.as_ref() != Some(&held) {
                            return Ok(false);
                        }
                    }
                    Err(error) => return Err(error.into()),
                }
                self.delete(streams).await?;
                for key in [run_key(run), lease_key(run)] {
                    store.stream.purge().filter(format!("$KV.{RUNS}.{key}")).await?;
                }
                Ok::<bool, async_nats::Error>(true)
            };
            match removed.await {
                Ok(true) => return Ok(()),
                Ok(false) => return Err(taken(self.leader(run).await?.and_then(|leader| leader.name))),
                Err(error) => patience.wait_after(error).await?,
            }
        }
    }

    async fn delete(&self, streams: &[StreamUse]) -> Result<(), async_nats::Error> {
        for StreamUse { name, .. } in streams {
            match self.jetstream.delete_stream(name).await {
                Ok(_) => {}
                Err(error) if code(&error) == Some(ErrorCode::STREAM_NOT_FOUND) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
