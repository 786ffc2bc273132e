//! NATS JetStream as a bus.
//!
//! A learner [leads](Server::lead) a run: it holds the run's lease, makes its streams and announces it. Workers
//! [join](Server::join) what is there. Nothing that matters lives on the server: a message is acknowledged when its effect is
//! safe elsewhere, and what a server loses is asked for again.

mod layout;
mod lease;
mod server;

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::{Acker, PublishMessage};
use async_nats::jetstream::object_store::{DeleteErrorKind, GetErrorKind, ObjectMetadata};
use async_nats::jetstream::stream::DirectGetErrorKind;
use async_nats::jetstream::{AckKind, Context};
use async_nats::{Client, StatusCode, Subject, Subscriber};
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use futures_util::StreamExt as _;
use proto::{Beat, Digest, Group, Message, ProblemKey, Role, ScoredGroup, Task, TaskId, TaskKind, wire};
use serde::de::DeserializeOwned;
use tokio::io::AsyncReadExt as _;
use tokio::time::Instant;

use crate::{Bus, Delivery, Error, Receipt};
use layout::{Layout, Queue};
pub use layout::{Terms, check_name};
pub use lease::Lease;
use server::RETRY_PAUSE;
pub use server::{Server, Settings};

/// A run on a server.
pub struct Nats {
    server: Server,
    layout: Layout,
    /// Names this process in subjects.
    worker: String,
    /// Names this life of it in message ids.
    life: u128,
    ack_wait: Duration,
    /// Set for the learner, which makes again what is lost.
    terms: Option<Terms>,
    /// Whether streams were found missing since the learner last asked.
    has_lost: AtomicBool,
    num_published: AtomicU64,
    /// Weights that this process stored, which it may remove.
    stored: Mutex<BTreeSet<Digest>>,
    beats: tokio::sync::Mutex<Option<Subscriber>>,
    tasks: Puller<Task>,
    groups: Puller<Group>,
    scored: Puller<ScoredGroup>,
}

/// Weights travel in pieces of this size.
const CHUNK_BYTES: usize = 512 << 10;

/// The longest wait for the next piece of weights.
const READ_LIMIT: Duration = Duration::from_secs(5);

/// How many messages a worker has on the way to it; they count as taken.
const PREFETCHED_TASKS: usize = 2;
const PREFETCHED_GROUPS: usize = 8;
const PREFETCHED_SCORED: usize = 128;

impl Server {
    /// Joins a course of a run as a worker of this name, which may hold only letters, digits, `-` and `_`.
    pub fn join(&self, course: &str, worker: &str, ack_wait: Duration) -> Nats {
        Nats::new(self.clone(), course, worker.to_owned(), ack_wait, None)
    }
}

impl Nats {
    fn new(server: Server, run: &str, worker: String, ack_wait: Duration, terms: Option<Terms>) -> Nats {
        Nats {
            layout: Layout::new(run),
            worker,
            life: server::now().as_nanos(),
            ack_wait,
            terms,
            has_lost: AtomicBool::new(false),
            num_published: AtomicU64::new(0),
            stored: Mutex::default(),
            beats: tokio::sync::Mutex::new(None),
            tasks: Puller::new(run, Queue::Tasks, PREFETCHED_TASKS),
            groups: Puller::new(run, Queue::Groups, PREFETCHED_GROUPS),
            scored: Puller::new(run, Queue::Scored, PREFETCHED_SCORED),
            server,
        }
    }

    fn jetstream(&self) -> &Context {
        &self.server.jetstream
    }

    /// Publishes until the server says that it has it. Tries share the message id, so that the server keeps one of them.
    async fn publish<T: serde::Serialize>(
        &self,
        what: &str,
        subject: String,
        id: String,
        message: &Message<T>,
    ) -> Result<(), Error> {
        let payload: bytes::Bytes = wire::encode(message).into();
        let limit_bytes = self.server.max_payload();
        if payload.len() > limit_bytes {
            return Err(Error::TooLarge { what: what.to_owned(), size_bytes: payload.len(), limit_bytes });
        }
        let mut patience = self.server.patience(format!("publish {what}"));
        loop {
            let message = PublishMessage::build().message_id(&id).payload(payload.clone());
            let sent = async { self.jetstream().send_publish(subject.clone(), message).await?.await };
            match sent.await {
                Ok(_) => return Ok(()),
                Err(error) => {
                    if error.kind() == PublishErrorKind::StreamNotFound {
                        self.make_what_is_missing().await;
                    }
                    patience.wait_after(error).await?;
                }
            }
        }
    }

    /// Names a message of this process. No other has the same name.
    fn message_id(&self) -> String {
        format!("{}.{:x}.{}", self.worker, self.life, self.num_published.fetch_add(1, Ordering::Relaxed))
    }

    /// Makes streams and consumers that are not there, where that is this process's to do.
    async fn make_what_is_missing(&self) {
        let Some(terms) = &self.terms else { return };
        let missing = || {
            tracing::warn!(run = self.layout.run(), "the server had lost a stream of this run; it is made again");
            self.has_lost.store(true, Ordering::Relaxed);
        };
        if let Err(error) = self.layout.make_missing(self.jetstream(), terms, missing).await {
            tracing::debug!(%error, "streams could not be made again");
        }
    }
}

#[async_trait]
impl Bus for Nats {
    async fn publish_task(&self, task: Message<Task>) -> Result<(), Error> {
        let TaskId { index, .. } = task.body.id;
        let batch = layout::batch_token(task.body.id.kind, task.body.id.batch);
        // An issue of a task is one message, whoever publishes it; another issue is another one.
        let id = format!("{batch}.{index}.{}.{}", task.envelope.epoch, task.envelope.issue);
        let subject = self.layout.subject(Queue::Tasks, &format!("{batch}.{index}"));
        self.publish("a task", subject, id, &task).await
    }

    async fn publish_group(&self, group: Message<Group>) -> Result<(), Error> {
        let subject = self.layout.subject(Queue::Groups, &self.reply_token(group.body.task.id));
        self.publish("a group", subject, self.message_id(), &group).await
    }

    async fn publish_scored(&self, scored: Message<ScoredGroup>) -> Result<(), Error> {
        let subject = self.layout.subject(Queue::Scored, &self.reply_token(scored.body.group.task.id));
        self.publish("a scored group", subject, self.message_id(), &scored).await
    }

    async fn next_task(&self) -> Result<Delivery<Task>, Error> {
        self.tasks.next(&self.server).await
    }

    async fn next_group(&self) -> Result<Delivery<Group>, Error> {
        self.groups.next(&self.server).await
    }

    async fn next_scored(&self) -> Result<Delivery<ScoredGroup>, Error> {
        self.scored.next(&self.server).await
    }

    async fn beat(&self, role: Role, tasks: Vec<TaskId>) -> Result<(), Error> {
        let payload = wire::encode(&(role, tasks));
        // Not waited for, and not repeated: the next one says more.
        if let Err(error) = self.server.client.publish(self.layout.beat(&self.worker), payload.into()).await {
            tracing::debug!(%error, "a sign of life was not heard");
        }
        Ok(())
    }

    async fn next_beat(&self) -> Result<Beat, Error> {
        let mut open = self.beats.lock().await;
        loop {
            let Some(beats) = open.as_mut() else {
                match self.server.client.subscribe(self.layout.beat("*")).await {
                    Ok(beats) => *open = Some(beats),
                    Err(_) => tokio::time::sleep(RETRY_PAUSE).await,
                }
                continue;
            };
            let Some(message) = beats.next().await else {
                *open = None;
                continue;
            };
            // Who it is stands in the subject, which the server guards.
            let worker = message.subject.rsplit('.').next().unwrap_or_default().to_owned();
            if let Ok((role, tasks)) = wire::decode(&message.payload) {
                return Ok(Beat { worker, role, tasks });
            }
        }
    }

    fn keep_every(&self) -> Duration {
        self.ack_wait / 3
    }

    async fn put_key(&self, task: TaskId, key: ProblemKey) -> Result<(), Error> {
        let payload: bytes::Bytes = wire::encode(&key).into();
        let mut patience = self.server.patience("store a key".to_owned());
        loop {
            let sent = async { self.jetstream().publish(self.layout.key(task), payload.clone()).await?.await };
            match sent.await {
                Ok(_) => return Ok(()),
                Err(error) => {
                    self.make_what_is_missing().await;
                    patience.wait_after(error).await?;
                }
            }
        }
    }

    async fn get_key(&self, task: TaskId) -> Result<ProblemKey, Error> {
        let mut patience = self.server.patience("fetch a key".to_owned());
        loop {
            let fetched = async {
                let stream = self.jetstream().get_stream_no_info(self.layout.stream(Queue::Keys)).await?;
                match stream.direct_get_last_for_subject(self.layout.key(task)).await {
                    Ok(message) => Ok::<_, async_nats::Error>(Some(message.payload)),
                    Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(None),
                    Err(error) => Err(error.into()),
                }
            };
            match fetched.await {
                Ok(Some(payload)) => {
                    let refuse = |error: proto::Error| Error::Unfit {
                        what: format!("key of task {task:?}"),
                        expected: "a key".to_owned(),
                        got: error.to_string(),
                    };
                    return wire::decode(&payload).map_err(refuse);
                }
                Ok(None) => return Err(Error::NoKey { task }),
                Err(error) => patience.wait_after(error).await?,
            }
        }
    }

    async fn forget_batch(&self, kind: TaskKind, batch: u64) -> Result<(), Error> {
        let batch = layout::batch_token(kind, batch);
        let purges = [
            (Queue::Tasks, format!("{batch}.>")),
            (Queue::Groups, format!("*.{batch}.>")),
            (Queue::Keys, format!("{batch}.>")),
        ];
        let purges = purges.map(|(queue, rest)| async move {
            let stream = self.jetstream().get_stream_no_info(self.layout.stream(queue)).await.ok()?;
            stream.purge().filter(self.layout.subject(queue, &rest)).await.ok()
        });
        // What could not be removed costs somebody work, and is in nobody's way.
        futures_util::future::join_all(purges).await;
        Ok(())
    }

    async fn put_weights(&self, digest: Digest, bytes: Arc<[u8]>) -> Result<(), Error> {
        let mut patience = self.server.patience(format!("store weights {}", digest.short()));
        loop {
            let stored = async {
                // Overwriting takes what is there away from those who are reading it.
                if self.fetch_weights(digest).await?.is_ok_and(|stored| stored == *bytes) {
                    return Ok(());
                }
                let store = self.jetstream().get_object_store(self.layout.weights()).await?;
                let chunk_size = Some(CHUNK_BYTES.min(self.server.max_payload()));
                let metadata = ObjectMetadata { name: digest.to_string(), chunk_size, ..ObjectMetadata::default() };
                store.put(metadata, &mut &*bytes).await?;
                Ok::<(), async_nats::Error>(())
            };
            match stored.await {
                Ok(()) => {
                    self.stored.lock().unwrap_or_else(PoisonError::into_inner).insert(digest);
                    return Ok(());
                }
                Err(error) => {
                    self.make_what_is_missing().await;
                    patience.wait_after(error).await?;
                }
            }
        }
    }

    async fn get_weights(&self, digest: Digest) -> Result<Arc<[u8]>, Error> {
        let mut patience = self.server.patience(format!("fetch weights {}", digest.short()));
        loop {
            match self.fetch_weights(digest).await {
                Ok(fetched) => return fetched.map(Into::into),
                Err(error) => patience.wait_after(error).await?,
            }
        }
    }

    async fn retain_weights(&self, digests: &[Digest]) -> Result<(), Error> {
        let stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for digest in stored.into_iter().filter(|digest| !digests.contains(digest)) {
            match self.remove_weights(digest).await {
                Ok(()) => drop(self.stored.lock().unwrap_or_else(PoisonError::into_inner).remove(&digest)),
                // It takes up space and is in nobody's way; the next version tries again.
                Err(error) => tracing::debug!(%error, "weights could not be removed"),
            }
        }
        Ok(())
    }

    async fn leave(&self) {
        self.tasks.hand_back(self.jetstream()).await;
        self.groups.hand_back(self.jetstream()).await;
        self.scored.hand_back(self.jetstream()).await;
    }

    async fn restore(&self) -> Result<bool, Error> {
        if self.server.is_connected() {
            self.make_what_is_missing().await;
        }
        Ok(self.has_lost.swap(false, Ordering::Relaxed))
    }
}

impl Nats {
    /// Reads weights once. What is wrong with them is the inner result, what is wrong with the server the outer one.
    async fn fetch_weights(&self, digest: Digest) -> Result<Result<Vec<u8>, Error>, async_nats::Error> {
        let store = self.jetstream().get_object_store(self.layout.weights()).await?;
        let mut object = match store.get(digest.to_string()).await {
            Ok(object) => object,
            Err(error) if error.kind() == GetErrorKind::NotFound => return Ok(Err(Error::NoWeights { digest })),
            Err(error) => return Err(error.into()),
        };
        let mut bytes = Vec::new();
        loop {
            // Pieces that are removed while they are read are waited for without end.
            match tokio::time::timeout(READ_LIMIT, object.read_buf(&mut bytes)).await? {
                Ok(0) => return Ok(Ok(bytes)),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::InvalidData => {
                    return Ok(Err(Error::BadWeights { digest, reason: error.to_string() }));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn remove_weights(&self, digest: Digest) -> Result<(), async_nats::Error> {
        let (name, bucket) = (digest.to_string(), self.layout.weights());
        let store = self.jetstream().get_object_store(&bucket).await?;
        match store.delete(&name).await {
            Err(error) if error.kind() != DeleteErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        // What is left is a note that it was there; nobody asks for it.
        let note = format!("$O.{bucket}.M.{}", URL_SAFE.encode(&name));
        self.jetstream().get_stream_no_info(format!("OBJ_{bucket}")).await?.purge().filter(note).await?;
        Ok(())
    }

    /// Where what answers a task goes: who says it, and the task.
    fn reply_token(&self, TaskId { kind, batch, index }: TaskId) -> String {
        format!("{}.{}.{index}", self.worker, layout::batch_token(kind, batch))
    }
}

/// Takes messages from one queue, a few a request. The client's own stream of messages asks for more while it is emptied, so
/// that nobody could leave it with nothing on the way.
struct Puller<T> {
    stream: String,
    queue: Queue,
    prefetched: usize,
    open: tokio::sync::Mutex<Option<Open>>,
    messages: PhantomData<fn() -> T>,
}

/// What a puller has asked for.
struct Open {
    inbox: Subject,
    messages: Subscriber,
    /// Messages that the last request may still bring.
    num_wanted: usize,
    /// When the server has ended that request, heard or not.
    deadline: Instant,
}

impl<T: DeserializeOwned + Send + Sync + 'static> Puller<T> {
    fn new(run: &str, queue: Queue, prefetched: usize) -> Puller<T> {
        let stream = Layout::new(run).stream(queue);
        Puller { stream, queue, prefetched, open: tokio::sync::Mutex::new(None), messages: PhantomData }
    }

    /// Waits for a message, for as long as it takes: a lost server or stream comes back.
    async fn next(&self, server: &Server) -> Result<Delivery<T>, Error> {
        let mut open = self.open.lock().await;
        loop {
            server.expect_permitted()?;
            let message = match self.next_message(&server.client, &mut open).await {
                Ok(Some(message)) => message,
                Ok(None) => continue,
                Err(error) => {
                    tracing::debug!(stream = self.stream, %error, "nothing to take from yet");
                    tokio::time::sleep(RETRY_PAUSE).await;
                    continue;
                }
            };
            let acker = Acker::new(server.jetstream.clone(), message.reply);
            match wire::decode(&message.payload) {
                Ok(message) => return Ok(Delivery { message, receipt: Box::new(Ack(acker)) }),
                Err(error) => {
                    let subject = message.subject.as_str();
                    tracing::warn!(subject, %error, "a message that cannot be read is thrown away");
                    drop(acker.ack_with(AckKind::Term).await);
                }
            }
        }
    }

    /// Takes a message, asking for some where nothing is on the way; `None` where a request is over.
    async fn next_message(
        &self,
        client: &Client,
        open: &mut Option<Open>,
    ) -> Result<Option<async_nats::Message>, async_nats::Error> {
        let opened = match &mut *open {
            Some(opened) => opened,
            none => {
                let inbox = Subject::from(client.new_inbox());
                let messages = client.subscribe(inbox.clone()).await?;
                none.insert(Open { inbox, messages, num_wanted: 0, deadline: Instant::now() })
            }
        };
        if opened.num_wanted == 0 {
            opened.num_wanted = self.prefetched;
            opened.deadline = Instant::now() + PULL_EXPIRES + PULL_SLACK;
            let request = serde_json::json!({"batch": self.prefetched, "expires": PULL_EXPIRES.as_nanos() as u64});
            let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", self.stream, self.queue.consumer());
            client.publish_with_reply(subject, opened.inbox.clone(), request.to_string().into()).await?;
        }
        let message = tokio::select! {
            message = opened.messages.next() => message,
            () = tokio::time::sleep_until(opened.deadline) => {
                opened.num_wanted = 0;
                return Ok(None);
            }
        };
        let Some(message) = message else {
            *open = None;
            return Ok(None);
        };
        let Some(status) = message.status else {
            opened.num_wanted = opened.num_wanted.saturating_sub(1);
            return Ok(Some(message));
        };
        opened.num_wanted = 0;
        match status {
            StatusCode::TIMEOUT | StatusCode::NOT_FOUND => Ok(None),
            status => Err(format!("{status} {}", message.description.unwrap_or_default()).into()),
        }
    }

    /// Hands back what the server has sent ahead.
    async fn hand_back(&self, jetstream: &Context) {
        let Some(mut open) = self.open.lock().await.take() else { return };
        while let Ok(Some(message)) = tokio::time::timeout(DRAIN_PAUSE, open.messages.next()).await {
            if message.status.is_none() {
                // Not at once: it would come straight back.
                let nak = AckKind::Nak(Some(2 * DRAIN_PAUSE));
                drop(Acker::new(jetstream.clone(), message.reply).ack_with(nak).await);
            }
        }
    }
}

/// After so long without one more, all that was on the way is here.
const DRAIN_PAUSE: Duration = Duration::from_millis(100);
/// How long a request for messages stands. A server that was lost in between is asked again after that.
const PULL_EXPIRES: Duration = Duration::from_secs(2);
const PULL_SLACK: Duration = Duration::from_secs(1);

/// What JetStream wants to hear of a message.
struct Ack(Acker);

#[async_trait]
impl<T: Send + Sync> Receipt<T> for Ack {
    async fn acknowledge(&self) -> Result<(), Error> {
        self.say(AckKind::Ack).await
    }

    async fn keep(&self) -> Result<(), Error> {
        self.say(AckKind::Progress).await
    }

    async fn hand_back(&self, _message: &Message<T>, pause: Duration) -> Result<(), Error> {
        self.say(AckKind::Nak(Some(pause))).await
    }
}

impl Ack {
    /// Not waited for: a word that is lost costs a delivery more.
    async fn say(&self, kind: AckKind) -> Result<(), Error> {
        if let Err(error) = self.0.ack_with(kind).await {
            tracing::debug!(%error, "the server did not hear of a delivery");
        }
        Ok(())
    }
}
