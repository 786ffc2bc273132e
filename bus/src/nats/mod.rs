//! NATS JetStream as a bus.
//!
//! A learner [leads](Server::lead) a run: it holds the run's lease, creates its streams and announces it. Workers
//! [join](Server::join) a run. The server holds no essential state: a message is acknowledged when its effect is durable
//! elsewhere, and tasks that a server loses are requested again.

mod address;
mod answers;
mod layout;
mod lease;
mod models;
mod puller;
mod server;
mod survey;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::jetstream::Context;
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::DirectGetErrorKind;
use async_nats::{Client, Subscriber};
use async_trait::async_trait;
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use proto::{
    Beat, Digest, Group, Message, ProblemKey, Refusal, Role, ScoredGroup, Task, TaskId, TaskKind, Version, wire,
};
use serde::{Deserialize, Serialize};

use crate::{Bus, Delivery, Error, Keys, Presence, Queues, WeightStore, run_blocking};
pub use address::{Servers, is_host};
use answers::with_room;
use layout::{Layout, Queue};
pub use layout::{StreamLimits, check_name};
pub use lease::{Identity, Lease};
pub use models::{StoredFile, StoredModel};
use puller::{Held, Puller};
use server::RETRY_PAUSE;
pub use server::{Credentials, QueueCounts, Server, ServerCounts, Settings};
pub use survey::{Leader, StreamUse};

/// A run on a server.
pub struct Nats {
    server: Server,
    layout: Layout,
    /// Names this process in subjects.
    worker: String,
    /// Identifies this lifetime of the process in message ids.
    life: u128,
    /// Set for the learner, which recreates lost streams.
    led: Option<Led>,
    /// Whether streams were found missing since the learner last asked.
    has_lost: AtomicBool,
    num_published: AtomicU64,
    /// Weights that this process stored, which it may remove.
    stored: Mutex<BTreeSet<Digest>>,
    /// Batches whose removal failed and is to be retried.
    unforgotten: Mutex<Vec<(TaskKind, u64)>>,
    beats: tokio::sync::Mutex<Calls>,
    refusals: tokio::sync::Mutex<Calls>,
    versions: tokio::sync::Mutex<Calls>,
    /// Requests for the pretrained model.
    wanted: tokio::sync::Mutex<Calls>,
    tasks: Puller<Task>,
    groups: Puller<Group>,
    scored: Puller<ScoredGroup>,
}

/// A learner's state of its run.
struct Led {
    terms: StreamLimits,
    /// Completed steps, as shown in the lease.
    num_steps: Arc<AtomicU64>,
}

/// How long a worker leaves a task that it may not play to other workers.
const FOR_OTHERS_PAUSE: Duration = Duration::from_millis(75);

/// Time limit of a send whose result nobody needs.
const SAY_LIMIT: Duration = Duration::from_secs(1);

/// The largest accepted heartbeat: a worker holds few tasks.
const MAX_BEAT_BYTES: usize = 64 << 10;

/// Weights are sent in pieces of this size, several at a time.
const PIECE_BYTES: usize = 512 << 10;
const PIECES_IN_FLIGHT: usize = 8;

/// How many messages a worker prefetches; they count as taken. A task keeps an actor busy for long, so it leaves further tasks
/// to other actors.
const PREFETCHED_TASKS: usize = 1;
const PREFETCHED_GROUPS: usize = 8;
const PREFETCHED_SCORED: usize = 128;

/// Describes the weights that the pieces form. The hash covers the bytes. The digest that names the weights covers their
/// content; the actor checks it.
#[derive(Serialize, Deserialize)]
struct Whole {
    num_bytes: u64,
    piece_bytes: u64,
    hash: Digest,
}

impl Server {
    /// Joins the run with this fingerprint as a worker of this name, which may hold only letters, digits, `-` and `_`.
    pub fn join(&self, fingerprint: &str, worker: &str, ack_wait: Duration) -> Nats {
        Nats::new(self.clone(), fingerprint, worker.to_owned(), ack_wait, None)
    }
}

impl Nats {
    fn new(server: Server, run: &str, worker: String, ack_wait: Duration, led: Option<Led>) -> Nats {
        let held = Held::start(&server.client, ack_wait);
        Nats {
            layout: Layout::new(run),
            life: server::now().as_nanos(),
            led,
            has_lost: AtomicBool::new(false),
            num_published: AtomicU64::new(0),
            stored: Mutex::default(),
            unforgotten: Mutex::default(),
            beats: tokio::sync::Mutex::default(),
            refusals: tokio::sync::Mutex::default(),
            versions: tokio::sync::Mutex::default(),
            wanted: tokio::sync::Mutex::default(),
            tasks: Puller::new(run, &worker, Queue::Tasks, PREFETCHED_TASKS, held.clone()),
            groups: Puller::new(run, &worker, Queue::Groups, PREFETCHED_GROUPS, held.clone()),
            scored: Puller::new(run, &worker, Queue::Scored, PREFETCHED_SCORED, held),
            worker,
            server,
        }
    }

    fn jetstream(&self) -> &Context {
        &self.server.jetstream
    }

    /// Publishes a message until the server confirms it. Attempts share the message id, so that the server keeps only one.
    async fn publish<T: Serialize>(
        &self,
        what: &str,
        queue: Queue,
        subject: String,
        id: String,
        message: &Message<T>,
    ) -> Result<(), Error> {
        let payload: bytes::Bytes = wire::encode(message).into();
        let mut patience = self.server.patience(format!("publish {what}"));
        loop {
            let message = PublishMessage::build().message_id(&id).payload(payload.clone());
            let sent = async { self.jetstream().send_publish(subject.clone(), message).await?.await };
            match sent.await {
                Ok(_) => {
                    self.server.count(queue, |counts| counts.num_bytes_published += payload.len() as u64);
                    return Ok(());
                }
                // The limit includes the headers.
                Err(error) if error.kind() == PublishErrorKind::MaxPayloadExceeded => {
                    let (size_bytes, limit_bytes) = (payload.len(), self.server.max_payload());
                    return Err(Error::TooLarge { what: what.to_owned(), size_bytes, limit_bytes });
                }
                Err(error) => {
                    if error.kind() == PublishErrorKind::StreamNotFound {
                        self.make_what_is_missing().await;
                    }
                    patience.wait_after(with_room(error, what, payload.len() as u64)).await?;
                }
            }
        }
    }

    /// Returns a globally unique id for a message of this process.
    fn message_id(&self) -> String {
        format!("{}.{:x}.{}", self.worker, self.life, self.num_published.fetch_add(1, Ordering::Relaxed))
    }

    /// Creates missing streams and consumers if this process leads the run.
    async fn make_what_is_missing(&self) {
        let Some(Led { terms, .. }) = &self.led else { return };
        let missing = || {
            tracing::warn!(run = self.layout.run(), "the server lost a stream of this run; recreating it");
            self.has_lost.store(true, Ordering::Relaxed);
        };
        let look = |queue: Queue, num_waiting: u64, num_taken: u64| {
            self.server.count(queue, |counts| (counts.num_waiting, counts.num_taken) = (num_waiting, num_taken));
        };
        if let Err(error) = self.layout.make_missing(self.jetstream(), terms, missing, look).await {
            tracing::debug!(%error, "could not recreate streams");
        }
    }
}

#[async_trait]
impl Queues for Nats {
    async fn publish_task(&self, task: Message<Task>) -> Result<(), Error> {
        let TaskId { index, .. } = task.body.id;
        let batch = layout::batch_token(task.body.id.kind, task.body.id.batch);
        // All publications of one issue of a task share an id; another issue has another id.
        let id = format!("{batch}.{index}.{}.{}", task.envelope.term, task.envelope.issue);
        let rest = format!("{batch}.{index}");
        let subject = match task.envelope.excluded_actors.is_empty() {
            true => self.layout.subject(Queue::Tasks, &rest),
            false => self.layout.audit(&rest),
        };
        self.publish("a task", Queue::Tasks, subject, id, &task).await
    }

    async fn publish_group(&self, group: Message<Group>) -> Result<(), Error> {
        let subject = self.layout.subject(Queue::Groups, &self.reply_token(group.body.task.id));
        self.publish("a group", Queue::Groups, subject, self.message_id(), &group).await
    }

    async fn publish_scored(&self, scored: Message<ScoredGroup>) -> Result<(), Error> {
        let subject = self.layout.subject(Queue::Scored, &self.reply_token(scored.body.group.task.id));
        self.publish("a scored group", Queue::Scored, subject, self.message_id(), &scored).await
    }

    async fn next_task(&self) -> Result<Delivery<Task>, Error> {
        loop {
            let task = self.tasks.next(&self.server).await?;
            if !task.message.envelope.excluded_actors.contains(&self.worker) {
                return Ok(task);
            }
            task.hand_back(FOR_OTHERS_PAUSE).await?;
        }
    }

    async fn next_group(&self) -> Result<Delivery<Group>, Error> {
        self.groups.next(&self.server).await
    }

    async fn next_scored(&self) -> Result<Delivery<ScoredGroup>, Error> {
        self.scored.next(&self.server).await
    }

    async fn refuse(&self, refusal: Refusal) -> Result<(), Error> {
        self.call(self.layout.refusal(&self.worker), wire::encode(&refusal)).await;
        Ok(())
    }

    async fn next_refusal(&self) -> Result<Refusal, Error> {
        loop {
            let message = self.refusals.lock().await.next(&self.server.client, self.layout.refusal("*")).await;
            if let Ok(refusal) = wire::decode(&message.payload) {
                return Ok(refusal);
            }
        }
    }
}

#[async_trait]
impl Keys for Nats {
    async fn put_key(&self, task: TaskId, key: ProblemKey) -> Result<(), Error> {
        self.store("store a key".to_owned(), self.layout.key(task), wire::encode(&key).into()).await
    }

    async fn get_key(&self, task: TaskId) -> Result<ProblemKey, Error> {
        let stored = self.look_up("fetch a key".to_owned(), Queue::Keys, self.layout.key(task)).await?;
        // An unreadable key counts as missing: the learner did not write it, and stores the key again when it reissues the task.
        stored.and_then(|stored| wire::decode(&stored).ok()).ok_or(Error::NoKey { task })
    }
}

#[async_trait]
impl WeightStore for Nats {
    async fn put_weights(&self, digest: Digest, bytes: Arc<[u8]>) -> Result<(), Error> {
        let is_there = match self.get_weights(digest).await {
            Ok(stored) => {
                let bytes = bytes.clone();
                run_blocking(move || stored == bytes).await
            }
            Err(Error::NoWeights { .. } | Error::BadWeights { .. }) => false,
            Err(error) => return Err(error),
        };
        self.stored.lock().unwrap_or_else(PoisonError::into_inner).insert(digest);
        if is_there {
            return Ok(());
        }
        let what = || format!("store weights {}", digest.short());
        let piece_bytes = PIECE_BYTES.min(self.server.max_payload());
        let pieces = bytes.chunks(piece_bytes).enumerate().map(|(piece, part)| async move {
            let payload = bytes::Bytes::copy_from_slice(part);
            self.store(what(), self.layout.piece(digest, piece), payload).await
        });
        let pieces: Vec<_> = pieces.collect();
        futures_util::stream::iter(pieces).buffer_unordered(PIECES_IN_FLIGHT).try_collect::<()>().await?;
        let hashed = bytes.clone();
        let hash = run_blocking(move || Digest::of_bytes(&hashed)).await;
        // Stored last, so that a reader of this message finds the pieces.
        let whole = Whole { num_bytes: bytes.len() as u64, piece_bytes: piece_bytes as u64, hash };
        self.store(what(), self.layout.weights(digest), wire::encode(&whole).into()).await
    }

    async fn get_weights(&self, digest: Digest) -> Result<Arc<[u8]>, Error> {
        let what = || format!("fetch weights {}", digest.short());
        let missing = Error::NoWeights { digest };
        let refuse = |reason| Error::BadWeights { digest, reason };
        let whole = self.look_up(what(), Queue::Weights, self.layout.weights(digest)).await?.ok_or(missing)?;
        let Whole { num_bytes, piece_bytes, hash } = wire::decode(&whole).map_err(|error| refuse(error.to_string()))?;
        let num_pieces = num_bytes.checked_div(piece_bytes).map_or(0, |_| num_bytes.div_ceil(piece_bytes));
        let fetch = |piece| async move {
            let stored = self.look_up(what(), Queue::Weights, self.layout.piece(digest, piece)).await?;
            stored.ok_or(Error::NoWeights { digest })
        };
        let mut pieces = futures_util::stream::iter((0..num_pieces).map(fetch)).buffered(PIECES_IN_FLIGHT).boxed();
        let mut bytes = Vec::new();
        while let Some(piece) = pieces.next().await {
            bytes.extend_from_slice(&piece?);
            if bytes.len() as u64 > num_bytes {
                break;
            }
        }
        drop(pieces);
        if bytes.len() as u64 != num_bytes {
            return Err(refuse(format!("expected {num_bytes} bytes, got {}", bytes.len())));
        }
        let (got, bytes) = run_blocking(move || (Digest::of_bytes(&bytes), Arc::from(bytes))).await;
        if got != hash {
            return Err(refuse(format!("expected bytes with hash {}, got {}", hash.short(), got.short())));
        }
        Ok(bytes)
    }

    async fn retain_weights(&self, digests: &[Digest]) -> Result<(), Error> {
        let stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for digest in stored.into_iter().filter(|digest| !digests.contains(digest)) {
            match self.remove_weights(digest).await {
                Ok(()) => drop(self.stored.lock().unwrap_or_else(PoisonError::into_inner).remove(&digest)),
                // The weights only take up space; the next version tries again.
                Err(error) => tracing::debug!(%error, "could not remove old weights"),
            }
        }
        Ok(())
    }

    async fn announce(&self, version: Version) -> Result<(), Error> {
        self.call(self.layout.version(), wire::encode(&version)).await;
        Ok(())
    }

    async fn next_version(&self) -> Result<Version, Error> {
        let mut calls = self.versions.lock().await;
        loop {
            let mut message = calls.next(&self.server.client, self.layout.version()).await;
            // Of several pending announcements, the last is the newest.
            while let Some(newer) = calls.next(&self.server.client, self.layout.version()).now_or_never() {
                message = newer;
            }
            if let Ok(version) = wire::decode(&message.payload) {
                return Ok(version);
            }
        }
    }
}

#[async_trait]
impl Presence for Nats {
    async fn beat(&self, role: Role, tasks: Vec<TaskId>) -> Result<(), Error> {
        self.call(self.layout.beat(&self.worker), wire::encode(&(role, tasks))).await;
        Ok(())
    }

    async fn next_beat(&self) -> Result<Beat, Error> {
        loop {
            let message = self.beats.lock().await.next(&self.server.client, self.layout.beat("*")).await;
            // The subject names the worker; the server enforces that.
            let worker = message.subject.rsplit('.').next().unwrap_or_default().to_owned();
            let is_beat = message.payload.len() <= MAX_BEAT_BYTES;
            if let Some((role, tasks)) = is_beat.then(|| wire::decode(&message.payload).ok()).flatten() {
                return Ok(Beat { worker, role, tasks });
            }
        }
    }

    async fn leave(&self) {
        self.tasks.hand_back().await;
        self.groups.hand_back().await;
        self.scored.hand_back().await;
    }
}

#[async_trait]
impl Bus for Nats {
    async fn forget_batch(&self, kind: TaskKind, batch: u64) -> Result<(), Error> {
        if let (Some(led), TaskKind::Train) = (&self.led, kind) {
            led.num_steps.fetch_max(batch + 1, Ordering::Relaxed);
        }
        let mut batches = std::mem::take(&mut *self.unforgotten.lock().unwrap_or_else(PoisonError::into_inner));
        batches.push((kind, batch));
        for (kind, batch) in batches {
            if let Err(error) = self.purge_batch(&layout::batch_token(kind, batch)).await {
                tracing::debug!(%error, "could not remove the messages of a finished batch");
                // It takes up room until the next one is forgotten.
                self.unforgotten.lock().unwrap_or_else(PoisonError::into_inner).push((kind, batch));
            }
        }
        Ok(())
    }

    async fn restore(&self) -> Result<bool, Error> {
        if self.server.is_connected() {
            self.make_what_is_missing().await;
        }
        Ok(self.has_lost.swap(false, Ordering::Relaxed))
    }
}

impl Nats {
    /// Sends a message to current listeners. It is neither confirmed nor repeated: a later message makes up for a lost one.
    async fn call(&self, subject: String, payload: Vec<u8>) {
        // While the server is away, messages accumulate until the buffer is full.
        match tokio::time::timeout(SAY_LIMIT, self.server.client.publish(subject, payload.into())).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "could not send a message to current listeners"),
            Err(_) => tracing::debug!("could not send a message to current listeners: server unreachable"),
        }
    }

    /// Stores a message under a subject and retries until the server confirms it.
    async fn store(&self, what: String, subject: String, payload: bytes::Bytes) -> Result<(), Error> {
        let mut patience = self.server.patience(what);
        loop {
            let sent = async { self.jetstream().publish(subject.clone(), payload.clone()).await?.await };
            match sent.await {
                Ok(_) => return Ok(()),
                Err(error) => {
                    self.make_what_is_missing().await;
                    patience.wait_after(with_room(error, "the message", payload.len() as u64)).await?;
                }
            }
        }
    }

    /// Returns the last message stored under a subject.
    async fn look_up(&self, what: String, queue: Queue, subject: String) -> Result<Option<bytes::Bytes>, Error> {
        let mut patience = self.server.patience(what);
        loop {
            let fetched = async {
                let stream = self.jetstream().get_stream_no_info(self.layout.stream(queue)).await?;
                match stream.direct_get_last_for_subject(subject.clone()).await {
                    Ok(message) => Ok::<_, async_nats::Error>(Some(message.payload)),
                    Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(None),
                    Err(error) => Err(error.into()),
                }
            };
            match fetched.await {
                Ok(found) => return Ok(found),
                Err(error) => {
                    self.make_what_is_missing().await;
                    patience.wait_after(error).await?;
                }
            }
        }
    }

    async fn purge_batch(&self, batch: &str) -> Result<(), async_nats::Error> {
        let all = format!("{batch}.>");
        let purges = [
            (Queue::Tasks, self.layout.subject(Queue::Tasks, &all)),
            (Queue::Tasks, self.layout.audit(&all)),
            (Queue::Groups, self.layout.subject(Queue::Groups, &format!("*.{all}"))),
            (Queue::Keys, self.layout.subject(Queue::Keys, &all)),
        ];
        let purges = purges.map(|(queue, subject)| async move {
            let stream = self.jetstream().get_stream_no_info(self.layout.stream(queue)).await?;
            Ok::<_, async_nats::Error>(stream.purge().filter(subject).await?)
        });
        futures_util::future::try_join_all(purges).await.map(drop)
    }

    async fn remove_weights(&self, digest: Digest) -> Result<(), async_nats::Error> {
        let stream = self.jetstream().get_stream_no_info(self.layout.stream(Queue::Weights)).await?;
        stream.purge().filter(self.layout.weights(digest)).await?;
        stream.purge().filter(self.layout.piece(digest, "*")).await?;
        Ok(())
    }

    /// Returns the end of a reply's subject: the sender and the task.
    fn reply_token(&self, TaskId { kind, batch, index }: TaskId) -> String {
        format!("{}.{}.{index}", self.worker, layout::batch_token(kind, batch))
    }
}

/// A subscription to messages that no stream stores.
#[derive(Default)]
struct Calls(Option<Subscriber>);

impl Calls {
    async fn next(&mut self, client: &Client, subject: String) -> async_nats::Message {
        loop {
            let Some(calls) = self.0.as_mut() else {
                match client.subscribe(subject.clone()).await {
                    Ok(calls) => self.0 = Some(calls),
                    Err(_) => tokio::time::sleep(RETRY_PAUSE).await,
                }
                continue;
            };
            match calls.next().await {
                Some(message) => return message,
                None => self.0 = None,
            }
        }
    }
}
