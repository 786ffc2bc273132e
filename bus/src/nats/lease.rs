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

use super::layout::{self, Difference, Layout, Terms, check_name};
use super::server::{RETRY_PAUSE, code, is_full, now, with_room};
use super::{Led, Nats, Server};
use crate::Error;

/// A learner's hold on a run: while it renews the lease, no other learner leads the run, and what it announces stands.
///
/// The holder is told when it has lost the run, by a pause that outlasted the lease. Let go when it is dropped in order, by
/// [`Lease::release`]; a holder that is killed is waited for.
pub struct Lease {
    epoch: u64,
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
    /// For people: its machine, process and run directory. Two learners may say the same.
    pub name: String,
    /// Drawn at random when the process starts: no other has it.
    pub id: String,
    /// What the last learner of the run directory was, which is gone: its lease is taken over at once.
    pub before: Option<String>,
}

/// Who leads a run, as it stands on the server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Holder {
    /// For people.
    pub(super) holder: String,
    #[serde(default)]
    id: String,
    /// The last learner of its run directory, which may not know yet of this one.
    #[serde(default)]
    before: Option<String>,
    pub(super) epoch: u64,
    /// After how long without a renewal the run is lost.
    #[serde(default)]
    pub(super) lease_seconds: f64,
    /// Steps that are done, as far as this learner did some.
    #[serde(default)]
    pub(super) step: Option<u64>,
}

impl Holder {
    pub(super) fn new(identity: &Identity, epoch: u64, lease: Duration) -> Holder {
        let Identity { name, id, before } = identity.clone();
        Holder { holder: name, id, before, epoch, lease_seconds: lease.as_secs_f64(), step: None }
    }

    /// Whether it is of a run directory whose lock somebody with this identity has.
    fn is_of(&self, Identity { id, before, .. }: &Identity) -> bool {
        // Killed before it could note in its run directory who it was, a learner has only noted here who was there before it.
        self.id == *id
            || before.as_ref().is_some_and(|before| self.id == *before || self.before.as_ref() == Some(before))
    }
}

/// The bucket of all runs on a server.
pub(super) const RUNS: &str = "autodidact_runs";
/// A lease is renewed this often while it lasts.
const RENEWALS: u32 = 4;
/// The longest wait for a server to hear that a learner leaves: it has ten seconds to end in all.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);
/// The longest wait where it is to remove the run's streams besides.
const END_LIMIT: Duration = Duration::from_secs(7);
/// After how long workers know that a run is over: they look once a second.
const HEARD_AFTER: Duration = Duration::from_millis(1500);

pub(super) fn lease_key(run: &str) -> String {
    format!("{run}.lease")
}

pub(super) fn run_key(run: &str) -> String {
    format!("{run}.run")
}

impl Server {
    /// Takes the lease of a run and makes the streams of its course, empty: a run that takes another course under its name
    /// has others, and shares nothing with workers of this one.
    ///
    /// # Errors
    /// [`Error::Taken`] when another learner has it.
    pub async fn lead(
        &self,
        run: &str,
        course: &str,
        identity: &Identity,
        terms: Terms,
    ) -> Result<(Lease, Nats), Error> {
        check_name(run)?;
        check_name(course)?;
        self.expect_bucket(&terms).await?;
        let (held, revision) = self.take(run, identity, &terms).await?;
        let (epoch, num_steps) = (held.epoch, Arc::new(AtomicU64::new(0)));
        let layout = Layout::new(course);
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
        let lease = Lease { epoch, announcement, changed, lost, keeper, run: run.to_owned() };
        // What is purged may be another's as soon as the lease is.
        let made = tokio::select! {
            made = self.make_streams(&layout, &terms) => made,
            lost = lease.lost() => Err(lost),
        };
        match made {
            Ok(()) => {
                let led = Led { terms, num_steps };
                Ok((lease, Nats::new(self.clone(), course, "learner".to_owned(), terms.ack_wait, Some(led))))
            }
            Err(error) => {
                lease.release().await;
                Err(error)
            }
        }
    }

    async fn make_streams(&self, layout: &Layout, terms: &Terms) -> Result<(), Error> {
        let mut patience = self.patience("make the streams of the run".to_owned());
        let difference = loop {
            let made = async {
                layout.make_anew(&self.jetstream, terms).await?;
                layout.difference(&self.jetstream, terms).await
            };
            match made.await {
                Ok(difference) => break difference,
                // The largest is of messages that were set aside; other streams take room as they fill.
                Err(error) if is_full(error.as_ref()) => {
                    return Err(Error::NoRoom {
                        server: self.settings.servers.to_string(),
                        reason: with_room(error, "a run", layout::MAX_DEAD_BYTES as u64 * terms.num_replicas as u64),
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

    /// Compares the bucket of all runs, which may be another's work, with what leases and announcements need. Only their copies
    /// are made more where they are too few.
    async fn expect_bucket(&self, terms: &Terms) -> Result<(), Error> {
        let mut patience = self.patience("look at the bucket of all runs".to_owned());
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
                "expiry after {} s, {max_messages} entries, {max_bytes} bytes, {max_message_size} an entry (-1: no limit), direct \
                 reads {allow_direct}",
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

    async fn take(&self, run: &str, identity: &Identity, terms: &Terms) -> Result<(Holder, u64), Error> {
        let mut patience = self.patience(format!("take the lease of run {run:?}"));
        // The lease of another that was seen, and that has been given its time to be renewed.
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
                // Greater than every earlier one, also over the loss of the server's store.
                let epoch = (now().as_millis() as u64).max(other.map_or(0, |other| other.epoch + 1));
                let held = Holder::new(identity, epoch, terms.lease);
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
                    tracing::warn!("run {run:?} has a learner ({holder}); waiting {seconds} s to see if it lives");
                    seen = Some(revision);
                    tokio::time::sleep(terms.lease).await;
                }
                Err(error) => patience.wait_after(error).await?,
            }
        }
    }

    /// Gives what was announced of a run; `None` where nothing was.
    ///
    /// # Errors
    /// When the server is away for too long.
    pub async fn announcement(&self, run: &str) -> Result<Option<Vec<u8>>, Error> {
        check_name(run)?;
        let mut patience = self.patience(format!("look for run {run:?}"));
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

    /// Names the runs that were announced, in order.
    ///
    /// # Errors
    /// When the server is away for too long.
    pub async fn announced_runs(&self) -> Result<Vec<String>, Error> {
        use futures_util::TryStreamExt as _;
        let mut patience = self.patience("look for runs".to_owned());
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

    /// Opens the bucket of all runs; without it no learner was ever here.
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
    /// Which life of the run's learner this is.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Says of the run what workers are to know; said again when the server loses it.
    pub fn announce(&self, announcement: Vec<u8>) {
        *self.announcement.lock().unwrap_or_else(PoisonError::into_inner) = announcement;
        self.changed.send_replace(Wish::Announce);
    }

    /// Waits until the run is another learner's.
    pub async fn lost(&self) -> Error {
        let mut lost = self.lost.clone();
        match lost.wait_for(Option::is_some).await {
            Ok(holder) => Error::Taken { run: self.run.clone(), holder: holder.clone().unwrap_or_default() },
            Err(_) => Error::Closed { queue: "the keeper of the lease" },
        }
    }

    /// Stops renewing it, as a process does that dies, or whose run is another's.
    pub fn abandon(self) {
        self.keeper.abort();
    }

    /// Lets go of the run, once what was announced last is heard: the next learner need not wait.
    pub async fn release(self) {
        self.leave(Wish::Release, RELEASE_LIMIT).await;
    }

    /// Lets go of a run that is over, and removes its streams once workers know; messages that were set aside stay.
    pub async fn end(self) {
        self.leave(Wish::End, END_LIMIT).await;
    }

    async fn leave(mut self, wish: Wish, limit: Duration) {
        self.changed.send_replace(wish);
        if tokio::time::timeout(limit, &mut self.keeper).await.is_err() {
            self.keeper.abort();
            let what = if wish == Wish::End { "its streams may stay on the server; its lease" } else { "its lease" };
            tracing::warn!("run {} could not be left in order within {} s: {what} runs out", self.run, limit.as_secs());
        }
    }
}

/// What a keeper is woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    /// To announce something.
    Announce,
    /// To let go.
    Release,
    /// To let go, and to remove what is left.
    End,
}

/// Renews a lease and what was announced with it.
struct Keeper {
    server: Server,
    run: String,
    terms: Terms,
    layout: Layout,
    held: Holder,
    /// Steps that are done.
    num_steps: Arc<AtomicU64>,
    revision: u64,
    /// How often in a row it could not be renewed.
    num_failures: u32,
    /// Since when it stands on the server that the run is over.
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
                        true => tracing::warn!(%error, run = self.run, "the lease could not be renewed in its time"),
                        false => tracing::debug!(%error, "the lease could not be renewed, or the run not be left"),
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

    /// Leaves the run, where that is wished for and the time has come; tells whether it was. The lease has just been renewed.
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

    /// Removes the streams of the run, for as long as nobody else can have it.
    async fn remove_streams(&mut self) -> Result<(), async_nats::Error> {
        let removed = tokio::time::timeout(self.terms.lease / 2, self.layout.remove(&self.server.jetstream)).await;
        let left = match (removed, self.server.expect_permitted()) {
            (Ok(Ok(left)), _) => left,
            (_, Err(denied)) => {
                tracing::warn!("the streams of run {}, which is over, stay on the server: {denied}", self.run);
                None
            }
            (Ok(Err(error)), Ok(())) => return Err(error),
            (Err(elapsed), Ok(())) => return Err(elapsed.into()),
        };
        if let Some((stream, num_messages)) = left {
            tracing::warn!("{num_messages} messages that were set aside stay on the server, in stream {stream}");
        }
        self.has_removed = true;
        Ok(())
    }

    /// Renews once; gives who else has the run.
    async fn renew(&mut self) -> Result<Option<String>, async_nats::Error> {
        let store = self.server.runs(self.terms.num_replicas).await?;
        self.held.step = Some(self.num_steps.load(Ordering::Relaxed)).filter(|step| *step > 0);
        let value: bytes::Bytes = serde_json::to_vec(&self.held)?.into();
        match store.update(lease_key(&self.run), value.clone(), self.revision).await {
            Ok(revision) => self.revision = revision,
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {
                match store.entry(lease_key(&self.run)).await? {
                    // Somebody has had it since, and has left.
                    Some(entry) if entry.operation != kv::Operation::Put => {
                        return Ok(Some("another, which has left by now".to_owned()));
                    }
                    // The server has lost it.
                    None => self.revision = store.create(lease_key(&self.run), value).await?,
                    Some(entry) => match serde_json::from_slice::<Holder>(&entry.value) {
                        // Renewed before, and not heard of.
                        Ok(holder) if (&holder.id, holder.epoch) == (&self.held.id, self.held.epoch) => {
                            self.revision = entry.revision;
                        }
                        Ok(holder) => return Ok(Some(holder.holder)),
                        // No learner writes that.
                        Err(_) => self.revision = store.update(lease_key(&self.run), value, entry.revision).await?,
                    },
                }
            }
            Err(error) => return Err(error.into()),
        }
        let announcement = self.announcement.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // It may be lost, or be something that no learner wrote.
        if !announcement.is_empty() && store.get(run_key(&self.run)).await?.as_deref() != Some(&announcement[..]) {
            store.put(run_key(&self.run), announcement.into()).await?;
        }
        Ok(None)
    }
}
