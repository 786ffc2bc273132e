use std::time::Duration;

use async_nats::datetime::parse_rfc3339;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::kv::{Operation, UpdateErrorKind};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::Info;
use futures_util::TryStreamExt as _;
use serde::Deserialize;

use super::Server;
use super::layout::{check_name, course_of};
use super::lease::{Holder, Identity, RUNS, lease_key, run_key};
use super::server::{code, now};
use crate::Error;

/// Who leads a run, or did last.
#[derive(Clone, Debug, PartialEq)]
pub struct Leader {
    /// For people: its machine, process and run directory. Absent where it has left in order.
    pub name: Option<String>,
    /// Whether its lease has not run out.
    pub lives: bool,
    /// How long ago it renewed its lease last, or left, by the server's clock.
    pub silent_for: Duration,
    /// How long ago it took the run, by its own clock; zero where it has left.
    pub leads_for: Duration,
    /// Steps that are done, where it has said so.
    pub step: Option<u64>,
    revision: u64,
}

/// What a stream takes up on a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamUse {
    /// The name of the stream.
    pub name: String,
    /// The course of a run that it is of.
    pub course: String,
    /// Its size on the disk.
    pub num_bytes: u64,
    /// How many messages it holds.
    pub num_messages: u64,
}

/// For how long a run is held that is removed.
const REMOVAL: Duration = Duration::from_secs(60);

#[derive(Deserialize)]
struct Stamp {
    /// When the server answered.
    ts: String,
}

impl Server {
    /// Returns who leads a run, or did last; `None` where the server knows of nobody.
    ///
    /// # Errors
    /// When the server is away for too long.
    pub async fn leader(&self, run: &str) -> Result<Option<Leader>, Error> {
        check_name(run)?;
        let mut patience = self.patience(format!("look for the learner of run {run:?}"));
        loop {
            let found = async {
                let Some(store) = self.runs_if_any().await? else { return Ok(None) };
                let stamp = match self.jetstream.request(format!("STREAM.INFO.KV_{RUNS}"), &()).await? {
                    Response::<Stamp>::Ok(Stamp { ts }) => parse_rfc3339(&ts)?,
                    Response::Err { error } => return Err(error.into()),
                };
                let Some(entry) = store.entry(lease_key(run)).await? else { return Ok(None) };
                // Both are the server's clock. What was renewed since then is of now.
                let silent_for = Duration::try_from(stamp - entry.created).unwrap_or(Duration::ZERO);
                // No learner writes what cannot be read; whoever has the run replaces it soon.
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
                    Some(Holder { holder, epoch, lease_seconds, step, .. }) => Leader {
                        name: Some(holder),
                        lives: silent_for.as_secs_f64() <= lease_seconds,
                        leads_for: now().saturating_sub(Duration::from_millis(epoch)),
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
    /// When the server is away for too long.
    pub async fn stream_uses(&self) -> Result<Vec<StreamUse>, Error> {
        let mut patience = self.patience("list the streams of runs".to_owned());
        loop {
            match self.jetstream.streams().try_collect::<Vec<_>>().await {
                Ok(streams) => {
                    let of_run = |info: Info| {
                        let course = course_of(&info.config.name)?.to_owned();
                        let (num_bytes, num_messages) = (info.state.bytes, info.state.messages);
                        Some(StreamUse { name: info.config.name, course, num_bytes, num_messages })
                    };
                    let mut uses: Vec<StreamUse> = streams.into_iter().filter_map(of_run).collect();
                    uses.sort_by(|one, other| one.name.cmp(&other.name));
                    return Ok(uses);
                }
                Err(error) => patience.wait_after(error).await?,
            }
        }
    }

    /// Removes streams of a run that does not live, and what is announced of it. Meanwhile no learner can take it.
    ///
    /// # Errors
    /// [`Error::Taken`] when it lives.
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
                // Whoever renews or takes the lease from now on changes its revision, and is seen.
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
