use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::kv::{self, Store, UpdateErrorKind};
use async_nats::jetstream::stream;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::answers::{code, is_full, with_room};
use super::layout::{self, Difference, Layout, RUNS, StreamLimits, check_name};
use super::server::{RETRY_PAUSE, now};
use super::{Led, Nats, Server};
use crate::Error;

/// A learner's lease of a run: while the learner renews it, no other learner leads the run, and its announcement stays valid.
///
/// The holder is notified when it has lost the run because of a pause longer than the lease. An orderly exit gives the lease up
/// with [`Lease::release`]. If the holder is killed, the next learner waits until the lease expires.
pub struct Lease {
    term: u64,
    announcement: Arc<Mutex<Vec<u8>>>,
    /// Wakes the keeper early.
    changed: watch::Sender<Wish>,
    lost: watch::Receiver<Option<String>>,
    keeper: JoinHandle<()>,
    run: String,
}

/// Who wants to lead a run.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Its machine, process and run directory, for display. Two learners may have the same name.
    pub name: String,
    /// Drawn at random when the process starts: unique.
    pub id: String,
    /// The id of the run directory's previous learner, which is gone: its lease is taken over at once.
    pub before: Option<String>,
}

/// The leader of a run, as stored on the server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Holder {
    /// Its name, for display.
    pub(super) holder: String,
    #[serde(default)]
    id: String,
    /// The id of the previous learner of its run directory, which may not name this one yet.
    #[serde(default)]
    before: Option<String>,
    pub(super) term: u64,
    /// Time without a renewal after which the run is lost, in seconds.
    #[serde(default)]
    pub(super) lease_seconds: f64,
    /// Completed steps; absent until this learner has completed one.
    #[serde(default)]
    pub(super) step: Option<u64>,
}

impl Holder {
    pub(super) fn new(identity: &Identity, term: u64, lease: Duration) -> Holder {
        let Identity { name, id, before } = identity.clone();
        Holder { holder: name, id, before, term, lease_seconds: lease.as_secs_f64(), step: None }
    }

    /// Whether the holder belongs to the run directory that the learner with this identity has locked.
    fn is_of(&self, Identity { id, before, .. }: &Identity) -> bool {
        // A learner that was killed before it wrote its id into the run directory has only recorded its predecessor, here.
        self.id == *id
            || before.as_ref().is_some_and(|before| self.id == *before || self.before.as_ref() == Some(before))
    }
}

/// How many times a lease is renewed within its duration.
const RENEWALS: u32 = 4;
/// The longest wait for a server to release a lease: the learner has ten seconds to exit in all.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);
/// The longest wait if the run's streams are to be removed as well.
const END_LIMIT: Duration = Duration::from_secs(7);
/// The time after which workers know that a run is over: they check once a second.
const HEARD_AFTER: Duration = Duration::from_millis(1500);

pub(super) fn lease_key(run: &str) -> String {
    format!("{run}.lease")
}

pub(super) fn run_key(run: &str) -> String {
    format!("{run}.run")
}

impl Server {
    /// Takes the lease of a run and creates the streams of this fingerprint, empty. A run of the same name with another
    /// fingerprint has other streams, and shares nothing with workers of this one.
    ///
    /// # Errors
    /// [`Error::Taken`] when another learner holds the run.
    pub async fn lead(
        &self,
        run: &str,
        fingerprint: &str,
        identity: &Identity,
        terms: StreamLimits,
    ) -> Result<(Lease, Nats), Error> {
        check_name(run)?;
        check_name(fingerprint)?;
        self.expect_bucket(&terms).await?;
        let (held, revision) = self.take(run, identity, &terms).await?;
        let (term, num_steps) = (held.term, Arc::new(AtomicU64::new(0)));
        let layout = Layout::new(fingerprint);
        let (changed, wakes) = watch::channel(Wish::Announce);
        let (tell, lost) = watch::channel(None);
        let announcement = Arc::new(Mutex::new(Vec::new()));
        let keeper = Keeper {
            server: self.clone(),
            run: run.to_owned(),
            terms,
            layout: layout.clone(),
            held,
            num_steps: num_steps.clone(),
            revision,
            num_failures: 0,
            over_since: None,
            has_removed: false,
            announcement: announcement.clone(),
            tell,
        };
        let keeper = tokio::spawn(keeper.keep(wakes));
        let lease = Lease { term, announcement, changed, lost, keeper, run: run.to_owned() };
        // Once the lease is lost, the streams that are purged may belong to another learner.
        let made = tokio::select! {
            made = self.make_streams(&layout, &terms) => made,
            lost = lease.lost() => Err(lost),
        };
        match made {
            Ok(()) => {
                let led = Led { terms, num_steps };
                Ok((lease, Nats::new(self.clone(), fingerprint, "learner".to_owned(), terms.ack_wait, Some(led))))
            }
            Err(error) => {
                lease.release().await;
                Err(error)
            }
        }
    }

    async fn make_streams(&self, layout: &Layout, terms: &StreamLimits) -> Result<(), Error> {
        let mut patience = self.patience("create the streams of the run".to_owned());
        let difference = loop {
            let made = async {
                layout.make_anew(&self.jetstream, terms).await?;
                layout.difference(&self.jetstream, terms).await
            };
            match made.await {
                Ok(difference) => break difference,
                // Other streams than these take room as they fill.
                Err(error) if is_full(error.as_ref()) => {
                    // Those that were made reserve room that others may need.
                    if let Err(error) = layout.remove(&self.jetstream).await {
                        tracing::debug!(%error, "could not remove the streams of a run that the server has no room for");
                    }
                    return Err(Error::NoRoom {
                        server: self.settings.servers.to_string(),
                        reason: with_room(error, "a run", layout::reserved_by(terms)),
                    });
                }
                Err(error) => patience.wait_after(error).await?,
            }
        };
        match difference {
            None => Ok(()),
            Some(Difference { what, wanted, got }) => Err(Error::Unfit { what, expected: wanted, got }),
        }
    }

    /// Checks that the bucket of all runs, which somebody else may have created, meets the needs of leases and announcements.
    /// Only the number of replicas is raised if it is too low.
    async fn expect_bucket(&self, terms: &StreamLimits) -> Result<(), Error> {
        let mut patience = self.patience("check the bucket of all runs".to_owned());
        let config = loop {
            let found = async {
                let config = self.runs(terms.num_replicas).await?.stream.cached_info().config.clone();
                if config.num_replicas >= terms.num_replicas {
                    return Ok::<_, async_nats::Error>(config);
                }
                let more = stream::Config { num_replicas: terms.num_replicas, ..config };
                Ok(self.jetstream.update_stream(more).await?.config)
            };
            match found.await {
                Ok(config) => break config,
                Err(error) => patience.wait_after(error).await?,
            }
        };
        let describe = |config: &stream::Config| {
            let stream::Config { max_age, max_messages, max_bytes, max_message_size, allow_direct, .. } = config;
            format!(
                "max_age {} s, max_msgs {max_messages}, max_bytes {max_bytes}, max_msg_size {max_message_size} \
                 (0 or -1: no limit), allow_direct {allow_direct}",
                max_age.as_secs_f64()
            )
        };
        let no_limit =
            stream::Config { max_messages: -1, max_bytes: -1, max_message_size: -1, ..stream::Config::default() };
        let (expected, got) = (describe(&stream::Config { allow_direct: true, ..no_limit }), describe(&config));
        match expected == got {
            true => Ok(()),
            false => Err(Error::Unfit { what: format!("bucket {RUNS}"), expected, got }),
        }
    }

    async fn take(&self, run: &str, identity: &Identity, terms: &StreamLimits) -> Result<(Holder, u64), Error> {
        let mut patience = self.patience(format!("take the lease of run {run:?}"));
        // The revision of another learner's lease that was seen, after waiting for a renewal.
        let mut seen: Option<u64> = None;
        loop {
            let attempt = async {
                let store = self.runs(terms.num_replicas).await?;
                let found = store.entry(lease_key(run)).await?;
                let found = found.filter(|entry| entry.operation == kv::Operation::Put);
                let revision = found.as_ref().map_or(0, |entry| entry.revision);
                let other: Option<Holder> = found.and_then(|entry| serde_json::from_slice(&entry.value).ok());
                let is_anothers = other.as_ref().is_some_and(|other| !other.is_of(identity));
                if is_anothers && seen != Some(revision) {
                    return Ok::<_, async_nats::Error>(Err((other, revision)));
                }
                // Greater than every earlier term, even after the server's store was lost.
                let term = (now().as_millis() as u64).max(other.map_or(0, |other| other.term + 1));
                let held = Holder::new(identity, term, terms.lease);
                let value = serde_json::to_vec(&held)?.into();
                let revision = match revision {
                    0 => store.create(lease_key(run), value).await?,
                    revision => store.update(lease_key(run), value, revision).await?,
                };
                Ok(Ok((held, revision)))
            };
            match attempt.await {
                Ok(Ok(taken)) => return Ok(taken),
                Ok(Err((other, _))) if seen.is_some() => {
                    let holder = other.map_or_else(String::new, |other| other.holder);
                    return Err(Error::Taken { run: run.to_owned(), holder });
                }
                Ok(Err((other, revision))) => {
                    let holder = other.map_or_else(String::new, |other| other.holder);
                    let seconds = terms.lease.as_secs_f64();
                    tracing::warn!(
                        "run {run:?} has a learner ({holder}); waiting {seconds} s to see whether it is alive"
                    );
                    seen = Some(revision);
                    tokio::time::sleep(terms.lease).await;
                }
                Err(error) => patience.wait_after(error).await?,
            }
        }
    }

    /// Returns the announcement of a run; `None` if it has none.
    ///
    /// # Errors
    /// When the server is unreachable for too long.
    pub async fn announcement(&self, run: &str) -> Result<Option<Vec<u8>>, Error> {
        check_name(run)?;
        let mut patience = self.patience(format!("look up run {run:?}"));
        loop {
            let found = async {
                let Some(store) = self.runs_if_any().await? else { return Ok(None) };
                Ok::<_, async_nats::Error>(store.get(run_key(run)).await?)
            };
            match found.await {
                Ok(found) => return Ok(found.map(|bytes| bytes.to_vec())),
                Err(error) => patience.wait_after(error).await?,
            }
        }
    }

    /// Lists the names of the announced runs, in order.
    ///
    /// # Errors
    /// When the server is unreachable for too long.
    pub async fn announced_runs(&self) -> Result<Vec<String>, Error> {
        use futures_util::TryStreamExt as _;
        let mut patience = self.patience("list the runs".to_owned());
        loop {
            let found = async {
                let Some(store) = self.runs_if_any().await? else { return Ok(Vec::new()) };
                // A consumer of the bucket would say the same, and could be made of any stream.
                let subjects = store.stream.info_with_subjects(format!("$KV.{RUNS}.{}", run_key("*"))).await?;
                Ok::<Vec<(String, usize)>, async_nats::Error>(subjects.try_collect().await?)
            };
            match found.await {
                Ok(subjects) => {
                    let name = |subject: &str| subject.split('.').nth(2).unwrap_or_default().to_owned();
                    let mut runs: Vec<String> = subjects.iter().map(|(subject, _)| name(subject)).collect();
                    runs.sort();
                    return Ok(runs);
                }
                Err(error) => patience.wait_after(error).await?,
            }
        }
    }

    /// Opens the bucket of all runs; `None` if no learner has ever used this server.
    pub(super) async fn runs_if_any(&self) -> Result<Option<Store>, async_nats::Error> {
        match self.jetstream.get_key_value(RUNS).await {
            Ok(store) => Ok(Some(store)),
            Err(error) if code(&error) == Some(ErrorCode::STREAM_NOT_FOUND) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn runs(&self, num_replicas: usize) -> Result<Store, async_nats::Error> {
        if let Ok(store) = self.jetstream.get_key_value(RUNS).await {
            return Ok(store);
        }
        let config = kv::Config { bucket: RUNS.to_owned(), history: 1, num_replicas, ..kv::Config::default() };
        Ok(self.jetstream.create_key_value(config).await?)
    }
}

impl Lease {
    /// Returns the term of this learner process: its fencing token.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// Announces the run to workers, and again if the server loses the announcement.
    pub fn announce(&self, announcement: Vec<u8>) {
        *self.announcement.lock().unwrap_or_else(PoisonError::into_inner) = announcement;
        self.changed.send_replace(Wish::Announce);
    }

    /// Waits until another learner has taken the run, and returns the error that reports it.
    pub async fn lost(&self) -> Error {
        let mut lost = self.lost.clone();
        match lost.wait_for(Option::is_some).await {
            Ok(holder) => Error::Taken { run: self.run.clone(), holder: holder.clone().unwrap_or_default() },
            Err(_) => Error::Closed { queue: "lease renewal" },
        }
    }

    /// Stops renewing the lease without releasing it, as if the process died or had lost the run.
    pub fn abandon(self) {
        self.keeper.abort();
    }

    /// Releases the run once the last announcement is stored: the next learner need not wait.
    pub async fn release(self) {
        self.leave(Wish::Release, RELEASE_LIMIT).await;
    }

    /// Releases a finished run and removes its streams once workers know that it is over. Messages that were set aside stay.
    pub async fn end(self) {
        self.leave(Wish::End, END_LIMIT).await;
    }

    async fn leave(mut self, wish: Wish, limit: Duration) {
        self.changed.send_replace(wish);
        if tokio::time::timeout(limit, &mut self.keeper).await.is_err() {
            self.keeper.abort();
            let what = if wish == Wish::End { "; its streams may remain on the server" } else { "" };
            tracing::warn!(
                "could not release run {} within {} s; its lease will expire{what}",
                self.run,
                limit.as_secs()
            );
        }
    }
}

/// The request that wakes a keeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    /// Publish the announcement.
    Announce,
    /// Release the lease.
    Release,
    /// Remove the run's streams and release the lease.
    End,
}

/// Renews a lease and its announcement.
struct Keeper {
    server: Server,
    run: String,
    terms: StreamLimits,
    layout: Layout,
    held: Holder,
    /// Completed steps.
    num_steps: Arc<AtomicU64>,
    revision: u64,
    /// How many times in a row the renewal failed.
    num_failures: u32,
    /// When the server first had the announcement that the run is over.
    over_since: Option<Instant>,
    /// Whether its streams have been removed, as far as they can be.
    has_removed: bool,
    announcement: Arc<Mutex<Vec<u8>>>,
    tell: watch::Sender<Option<String>>,
}

impl Keeper {
    async fn keep(mut self, mut wishes: watch::Receiver<Wish>) {
        let every = self.terms.lease / RENEWALS;
        loop {
            let wish = *wishes.borrow_and_update();
            let left = match self.renew().await {
                Ok(Some(holder)) => {
                    self.tell.send_replace(Some(holder));
                    return;
                }
                Ok(None) => self.leave(wish).await,
                Err(error) => Err(error),
            };
            match left {
                Ok(true) => return,
                Ok(false) => self.num_failures = 0,
                Err(error) => {
                    self.num_failures += 1;
                    match wish == Wish::Announce && self.num_failures == RENEWALS {
                        true => tracing::warn!(%error, run = self.run, "could not renew the lease in time"),
                        false => tracing::debug!(%error, "could not renew or release the lease"),
                    }
                }
            }
            let pause = if wish == Wish::Announce { every } else { RETRY_PAUSE.min(every) };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                changed = wishes.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Leaves the run if that is requested and due; returns whether it did. The lease must have just been renewed.
    async fn leave(&mut self, wish: Wish) -> Result<bool, async_nats::Error> {
        match wish {
            Wish::Announce => return Ok(false),
            Wish::End if self.over_since.get_or_insert_with(Instant::now).elapsed() < HEARD_AFTER => return Ok(false),
            Wish::End if !self.has_removed => self.remove_streams().await?,
            Wish::End | Wish::Release => {}
        }
        let store = self.server.runs(self.terms.num_replicas).await?;
        store.delete_expect_revision(lease_key(&self.run), Some(self.revision)).await?;
        Ok(true)
    }

    /// Removes the streams of the run, within the time in which no other learner can take it.
    async fn remove_streams(&mut self) -> Result<(), async_nats::Error> {
        let removed = tokio::time::timeout(self.terms.lease / 2, self.layout.remove(&self.server.jetstream)).await;
        let left = match (removed, self.server.expect_permitted()) {
            (Ok(Ok(left)), _) => left,
            (_, Err(denied)) => {
                tracing::warn!("could not remove the streams of finished run {}: {denied}", self.run);
                None
            }
            (Ok(Err(error)), Ok(())) => return Err(error),
            (Err(elapsed), Ok(())) => return Err(elapsed.into()),
        };
        if let Some((stream, num_messages)) = left {
            tracing::warn!("{num_messages} dead-lettered messages remain on the server, in stream {stream}");
        }
        self.has_removed = true;
        Ok(())
    }

    /// Renews the lease once. Returns the name of another learner if that one holds the run.
    async fn renew(&mut self) -> Result<Option<String>, async_nats::Error> {
        let store = self.server.runs(self.terms.num_replicas).await?;
        self.held.step = Some(self.num_steps.load(Ordering::Relaxed)).filter(|step| *step > 0);
        let value: bytes::Bytes = serde_json::to_vec(&self.held)?.into();
        match store.update(lease_key(&self.run), value.clone(), self.revision).await {
            Ok(revision) => self.revision = revision,
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {
                match store.entry(lease_key(&self.run)).await? {
                    // Another learner has held it since, and has released it.
                    Some(entry) if entry.operation != kv::Operation::Put => {
                        return Ok(Some("another learner, which has since released the run".to_owned()));
                    }
                    // The server has lost the lease.
                    None => self.revision = store.create(lease_key(&self.run), value).await?,
                    Some(entry) => match serde_json::from_slice::<Holder>(&entry.value) {
                        // An earlier renewal succeeded, but its answer was lost.
                        Ok(holder) if (&holder.id, holder.term) == (&self.held.id, self.held.term) => {
                            self.revision = entry.revision;
                        }
                        Ok(holder) => return Ok(Some(holder.holder)),
                        // No learner writes an unreadable lease.
                        Err(_) => self.revision = store.update(lease_key(&self.run), value, entry.revision).await?,
                    },
                }
            }
            Err(error) => return Err(error.into()),
        }
        let announcement = self.announcement.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // The stored announcement may be lost, or not written by a learner.
        if !announcement.is_empty() && store.get(run_key(&self.run)).await?.as_deref() != Some(&announcement[..]) {
            store.put(run_key(&self.run), announcement.into()).await?;
        }
        Ok(None)
    }
}
