//! NATS JetStream as a bus.
//!
//! A learner [leads](Server::lead) a run: it holds the run's lease, makes its streams and announces it. Workers
//! [join](Server::join) what is there. Nothing that matters lives on the server: a message is acknowledged when its effect is
//! safe elsewhere, and what a server loses is asked for again.

mod layout;
mod lease;
mod server;

use std::collections::BTreeSet;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::{Acker, PublishMessage};
use async_nats::jetstream::object_store::{GetErrorKind, ObjectMetadata};
use async_nats::jetstream::stream::DirectGetErrorKind;
use async_nats::jetstream::{AckKind, Context};
use async_trait::async_trait;
use futures_util::StreamExt as _;
use proto::{Digest, Group, Message, ProblemKey, ScoredGroup, Task, TaskId, TaskKind, wire};
use serde::de::DeserializeOwned;
use tokio::io::AsyncReadExt as _;

use crate::{Bus, Delivery, Error, Receipt};
use layout::{Layout, Queue};
pub use layout::{Terms, check_name};
pub use lease::Lease;
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
    tasks: Puller<Task>,
    groups: Puller<Group>,
    scored: Puller<ScoredGroup>,
}

/// Weights travel in pieces of this size.
const CHUNK_BYTES: usize = 512 << 10;

/// How many messages a worker has on the way to it; they count as taken.
const PREFETCHED_TASKS: usize = 2;
const PREFETCHED_GROUPS: usize = 8;
const PREFETCHED_SCORED: usize = 128;

impl Server {
    /// Joins a run as a worker of this name, which may hold only letters, digits, `-` and `_`.
    pub fn join(&self, run: &str, worker: &str, ack_wait: Duration) -> Nats {
        Nats::new(self.clone(), run, worker.to_owned(), ack_wait, None)
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
        match self.layout.make_missing(self.jetstream(), terms).await {
            Ok(false) => {}
            Ok(true) => {
                tracing::warn!(run = self.layout.run(), "the server had lost streams of this run; they are made again");
                self.has_lost.store(true, Ordering::Relaxed);
            }
            Err(error) => tracing::debug!(%error, "streams could not be made again"),
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
        let name = digest.to_string();
        loop {
            let stored = async {
                let store = self.jetstream().get_object_store(self.layout.weights()).await?;
                if store.info(&name).await.is_ok_and(|info| info.size == bytes.len()) {
                    return Ok::<(), async_nats::Error>(());
                }
                let chunk_size = Some(CHUNK_BYTES.min(self.server.max_payload()));
                let metadata = ObjectMetadata { name: name.clone(), chunk_size, ..ObjectMetadata::default() };
                store.put(metadata, &mut &*bytes).await?;
                Ok(())
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
            let fetched = async {
                let store = self.jetstream().get_object_store(self.layout.weights()).await?;
                let mut bytes = Vec::new();
                match store.get(digest.to_string()).await {
                    Ok(mut object) => {
                        object.read_to_end(&mut bytes).await?;
                        Ok::<_, async_nats::Error>(Some(bytes))
                    }
                    Err(error) if error.kind() == GetErrorKind::NotFound => Ok(None),
                    Err(error) => Err(error.into()),
                }
            };
            match fetched.await {
                Ok(Some(bytes)) => return Ok(bytes.into()),
                Ok(None) => return Err(Error::NoWeights { digest }),
                Err(error) => patience.wait_after(error).await?,
            }
        }
    }

    async fn retain_weights(&self, digests: &[Digest]) -> Result<(), Error> {
        let unwanted: Vec<Digest> = {
            let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
            let unwanted = stored.iter().filter(|digest| !digests.contains(digest)).copied().collect();
            stored.retain(|digest| digests.contains(digest));
            unwanted
        };
        let Ok(store) = self.jetstream().get_object_store(self.layout.weights()).await else { return Ok(()) };
        for digest in unwanted {
            // What cannot be removed takes up space, and is in nobody's way.
            drop(store.delete(digest.to_string()).await);
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
    /// Where what answers a task goes: who says it, and the task.
    fn reply_token(&self, TaskId { kind, batch, index }: TaskId) -> String {
        format!("{}.{}.{index}", self.worker, layout::batch_token(kind, batch))
    }
}

/// Takes messages from one queue.
struct Puller<T> {
    stream: String,
    queue: Queue,
    prefetched: usize,
    open: tokio::sync::Mutex<Option<pull::Stream>>,
    messages: PhantomData<fn() -> T>,
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
            let Some(messages) = open.as_mut() else {
                match self.open(&server.jetstream).await {
                    Ok(messages) => *open = Some(messages),
                    Err(error) => {
                        tracing::debug!(stream = self.stream, %error, "nothing to take from yet");
                        tokio::time::sleep(REOPEN_PAUSE).await;
                    }
                }
                continue;
            };
            match messages.next().await {
                Some(Ok(message)) => {
                    let (message, acker) = message.split();
                    match wire::decode(&message.payload) {
                        Ok(message) => return Ok(Delivery { message, receipt: Box::new(Ack(acker)) }),
                        Err(error) => {
                            let subject = message.subject.as_str();
                            tracing::warn!(subject, %error, "a message that cannot be read is thrown away");
                            drop(acker.ack_with(AckKind::Term).await);
                        }
                    }
                }
                Some(Err(error)) => {
                    tracing::debug!(stream = self.stream, %error, "taking messages anew");
                    *open = None;
                    tokio::time::sleep(REOPEN_PAUSE).await;
                }
                None => *open = None,
            }
        }
    }

    async fn open(&self, jetstream: &Context) -> Result<pull::Stream, async_nats::Error> {
        let consumer: async_nats::jetstream::consumer::PullConsumer =
            jetstream.get_consumer_from_stream(self.queue.consumer(), &self.stream).await?;
        let messages = consumer.stream().max_messages_per_batch(self.prefetched);
        Ok(messages.expires(PULL_EXPIRES).heartbeat(PULL_HEARTBEAT).messages().await?)
    }
}

const REOPEN_PAUSE: Duration = Duration::from_millis(250);
const PULL_EXPIRES: Duration = Duration::from_secs(5);
/// Two of them missed, and the server has forgotten that somebody waits.
const PULL_HEARTBEAT: Duration = Duration::from_secs(1);

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
