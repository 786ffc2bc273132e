use std::fmt::Display;
use std::time::Duration;

use async_nats::jetstream::Context;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use async_nats::jetstream::context::ConsumerInfoErrorKind;
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use proto::{Digest, TaskId, TaskKind};

use super::answers::code;
use crate::Error;

/// Names of a run on the server: streams `autodidact_RUN_QUEUE`, subjects `autodidact.RUN.QUEUE...`.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    run: String,
}

/// A stream of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Queue {
    /// `task.BATCH.INDEX`, and `audit.BATCH.INDEX` for a task that one actor has played and another is to replay.
    Tasks,
    /// `group.ACTOR.BATCH.INDEX`.
    Groups,
    /// `scored.VERIFIER.BATCH.INDEX`.
    Scored,
    /// `key.BATCH.INDEX`: not a queue but a store; the last message of a subject is the key.
    Keys,
    /// `weights.DIGEST`, which holds the number of bytes, and `weights.DIGEST.PIECE`: also a store.
    Weights,
    /// `base.DIGEST`, which lists the files of the pretrained model, and `base.DIGEST.FILE.PIECE`: also a store. Runs from random
    /// weights have none.
    Base,
    /// `dead.WORKER.QUEUE`: messages that could not be read or judged, for people to look at.
    Dead,
}

/// Sizes, timeouts and replication that the streams of a run are configured for.
#[derive(Clone, Copy, Debug)]
pub struct StreamLimits {
    /// Most outstanding tasks, exams included.
    pub max_tasks: usize,
    /// Time without a report on a delivery after which it goes to another worker.
    pub ack_wait: Duration,
    /// Time without a renewal after which a learner has lost its run.
    pub lease: Duration,
    /// Number of servers that keep a copy of each stream.
    pub num_replicas: usize,
    /// Bytes of all weights that may be stored at a time, which the server reserves. 0 reserves nothing, and limits nothing.
    pub weights_bytes: u64,
    /// Bytes of the pretrained model's files, likewise. 0 if the run begins with none.
    pub base_bytes: u64,
}

/// A configuration on the server that differs from the requested one.
pub(super) struct Difference {
    pub(super) what: String,
    pub(super) wanted: String,
    pub(super) got: String,
}

/// The bucket of all runs on a server.
pub(super) const RUNS: &str = "autodidact_runs";

/// Capacity of a queue, as a multiple of the most outstanding tasks.
const SLACK: usize = 4;
/// How many messages that were set aside are kept; the oldest are dropped first.
const MAX_DEAD: i64 = 1000;
const MAX_DEAD_BYTES: i64 = 64 << 20;
/// How long the server recognises a repeated message id. A message that is retried for longer may be stored twice.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);

/// Checks that the name of a run or a worker can be part of a subject.
///
/// # Errors
/// When it is empty, long, or holds anything but letters, digits, `-` and `_`.
pub fn check_name(name: &str) -> Result<(), Error> {
    let is_token = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_');
    if (1..=MAX_NAME_BYTES).contains(&name.len()) && name.chars().all(is_token) {
        return Ok(());
    }
    let expected = format!("1 to {MAX_NAME_BYTES} letters, digits, - and _");
    Err(Error::Unfit { what: "name".to_owned(), expected, got: format!("{name:?}") })
}

const MAX_NAME_BYTES: usize = 64;

/// Returns the name of a batch, or of the evaluations of a step, in a subject.
pub(super) fn batch_token(kind: TaskKind, batch: u64) -> String {
    match kind {
        TaskKind::Train => format!("t{batch}"),
        TaskKind::Evaluate => format!("e{batch}"),
    }
}

/// Returns the name of the actor from the subject of a group.
pub(super) fn actor_of(subject: &str) -> &str {
    subject.split('.').nth(3).unwrap_or_default()
}

/// Returns the fingerprint of a run that a stream belongs to; `None` for any other stream.
pub(super) fn fingerprint_of(stream: &str) -> Option<&str> {
    let (fingerprint, token) = stream.strip_prefix("autodidact_")?.rsplit_once('_')?;
    Queue::ALL.iter().any(|queue| queue.token() == token).then_some(fingerprint)
}

impl Queue {
    const ALL: [Queue; 7] =
        [Queue::Tasks, Queue::Groups, Queue::Scored, Queue::Keys, Queue::Weights, Queue::Base, Queue::Dead];

    /// Returns the streams that a run has.
    fn of_run(terms: &StreamLimits) -> impl Iterator<Item = Queue> {
        let has_base = terms.base_bytes > 0;
        Queue::ALL.into_iter().filter(move |queue| *queue != Queue::Base || has_base)
    }

    pub(super) fn token(self) -> &'static str {
        match self {
            Queue::Tasks => "task",
            Queue::Groups => "group",
            Queue::Scored => "scored",
            Queue::Keys => "key",
            Queue::Weights => "weights",
            Queue::Base => "base",
            Queue::Dead => "dead",
        }
    }

    /// Returns the name of the queue's consumer.
    pub(super) fn consumer(self) -> &'static str {
        match self {
            Queue::Tasks => "actor",
            Queue::Groups => "verifier",
            Queue::Scored => "learner",
            Queue::Keys | Queue::Weights | Queue::Base | Queue::Dead => {
                unreachable!("stores are looked up, not consumed")
            }
        }
    }

    /// Whether messages are looked up by subject rather than taken.
    fn is_store(self) -> bool {
        matches!(self, Queue::Keys | Queue::Weights | Queue::Base)
    }
}

impl Layout {
    pub(super) fn new(run: &str) -> Layout {
        Layout { run: run.to_owned() }
    }

    pub(super) fn run(&self) -> &str {
        &self.run
    }

    pub(super) fn stream(&self, queue: Queue) -> String {
        format!("autodidact_{}_{}", self.run, queue.token())
    }

    pub(super) fn subject(&self, queue: Queue, rest: &str) -> String {
        format!("autodidact.{}.{}.{rest}", self.run, queue.token())
    }

    /// Returns the subject of a task that is played again for an audit.
    pub(super) fn audit(&self, rest: &str) -> String {
        format!("autodidact.{}.audit.{rest}", self.run)
    }

    pub(super) fn key(&self, TaskId { kind, batch, index }: TaskId) -> String {
        self.subject(Queue::Keys, &format!("{}.{index}", batch_token(kind, batch)))
    }

    /// Returns the subject of a worker's heartbeats; no stream stores them.
    pub(super) fn beat(&self, worker: &str) -> String {
        format!("autodidact.{}.beat.{worker}", self.run)
    }

    /// Returns the subject of a verifier's refusals; no stream stores them either.
    pub(super) fn refusal(&self, worker: &str) -> String {
        format!("autodidact.{}.refused.{worker}", self.run)
    }

    /// Returns the subject of the learner's announcements of new weights; no stream stores them either.
    pub(super) fn version(&self) -> String {
        format!("autodidact.{}.version", self.run)
    }

    /// Returns the subject of the message that holds the size of weights.
    pub(super) fn weights(&self, digest: Digest) -> String {
        self.subject(Queue::Weights, &digest.to_string())
    }

    /// Returns the subject of a piece of weights; `*` matches all pieces.
    pub(super) fn piece(&self, digest: Digest, piece: impl Display) -> String {
        self.subject(Queue::Weights, &format!("{digest}.{piece}"))
    }

    /// Returns the subject of the list of a pretrained model's files.
    pub(super) fn base(&self, digest: Digest) -> String {
        self.subject(Queue::Base, &digest.to_string())
    }

    /// Returns the subject of a piece of a pretrained model's file, both by number.
    pub(super) fn base_piece(&self, digest: Digest, file: usize, piece: u64) -> String {
        self.subject(Queue::Base, &format!("{digest}.{file}.{piece}"))
    }

    /// Returns the subject of a worker's requests for the pretrained model; no stream stores them.
    pub(super) fn wanted(&self, worker: &str) -> String {
        format!("autodidact.{}.wanted.{worker}", self.run)
    }

    fn stream_config(&self, queue: Queue, terms: &StreamLimits) -> Config {
        let is_store = queue.is_store();
        let (discard, max_messages, max_bytes) = match queue {
            Queue::Weights => (DiscardPolicy::New, -1, reserved(terms.weights_bytes)),
            Queue::Base => (DiscardPolicy::New, -1, reserved(terms.base_bytes)),
            Queue::Dead => (DiscardPolicy::Old, MAX_DEAD, MAX_DEAD_BYTES),
            // A full queue refuses new messages; it never drops those that it has accepted.
            _ => (DiscardPolicy::New, (SLACK * terms.max_tasks) as i64, -1),
        };
        Config {
            name: self.stream(queue),
            subjects: match queue {
                Queue::Tasks => vec![self.subject(queue, ">"), self.audit(">")],
                _ => vec![self.subject(queue, ">")],
            },
            retention: match queue {
                Queue::Tasks | Queue::Groups | Queue::Scored => RetentionPolicy::WorkQueue,
                Queue::Keys | Queue::Weights | Queue::Base | Queue::Dead => RetentionPolicy::Limits,
            },
            discard,
            discard_new_per_subject: false,
            max_messages,
            max_messages_per_subject: if is_store { 1 } else { -1 },
            max_bytes,
            storage: StorageType::File,
            num_replicas: terms.num_replicas,
            duplicate_window: DUPLICATE_WINDOW,
            allow_direct: is_store,
            ..Config::default()
        }
    }

    /// Creates the streams of a run, or empties them: tasks of an earlier learner process are requested again.
    pub(super) async fn make_anew(&self, jetstream: &Context, terms: &StreamLimits) -> Result<(), async_nats::Error> {
        self.make_missing(jetstream, terms, || {}, |_, _, _| {}).await?;
        for queue in Queue::of_run(terms) {
            jetstream.update_stream(self.stream_config(queue, terms)).await?;
            let stream = jetstream.get_stream_no_info(self.stream(queue)).await?;
            // A run of this fingerprint always begins with the same model.
            if !matches!(queue, Queue::Base | Queue::Dead) {
                stream.purge().await?;
            }
            if let Some(config) = consumer_config(queue, terms) {
                stream.create_consumer(config).await?;
            }
        }
        Ok(())
    }

    /// Returns the first difference between the configuration on the server and the requested one: an old server drops settings
    /// that it does not know.
    pub(super) async fn difference(
        &self,
        jetstream: &Context,
        terms: &StreamLimits,
    ) -> Result<Option<Difference>, async_nats::Error> {
        for queue in Queue::of_run(terms) {
            let config = self.stream_config(queue, terms);
            let stream = jetstream.get_stream(&config.name).await?;
            let (mut wanted, mut got) = (stream_terms(&config), stream_terms(&stream.cached_info().config));
            if let Some(config) = consumer_config(queue, terms) {
                let consumer: PullConsumer = stream.get_consumer(queue.consumer()).await?;
                let made = &consumer.cached_info().config;
                wanted +=
                    &consumer_terms(config.ack_policy, config.ack_wait, config.max_deliver, config.max_ack_pending);
                got += &consumer_terms(made.ack_policy, made.ack_wait, made.max_deliver, made.max_ack_pending);
            }
            if wanted != got {
                return Ok(Some(Difference { what: format!("stream {}", config.name), wanted, got }));
            }
        }
        Ok(None)
    }

    /// Removes the streams of a run that is over. Messages that were set aside stay; returns the name of their stream and their
    /// number.
    pub(super) async fn remove(&self, jetstream: &Context) -> Result<Option<(String, u64)>, async_nats::Error> {
        let mut left = None;
        for queue in Queue::ALL {
            let name = self.stream(queue);
            let stream = match jetstream.get_stream(&name).await {
                Ok(stream) => stream,
                Err(error) if code(&error) == Some(ErrorCode::STREAM_NOT_FOUND) => continue,
                Err(error) => return Err(error.into()),
            };
            let num_messages = stream.cached_info().state.messages;
            if queue == Queue::Dead && num_messages > 0 {
                left = Some((name, num_messages));
                continue;
            }
            if matches!(queue, Queue::Weights | Queue::Base) {
                // Weights are large: purge them even if this user may not delete streams.
                stream.purge().await?;
            }
            jetstream.delete_stream(&name).await?;
        }
        Ok(left)
    }

    /// Creates missing streams and consumers, and calls `missing` for each. Calls `look` for each queue that had its consumer,
    /// with the numbers of waiting and of taken messages.
    pub(super) async fn make_missing(
        &self,
        jetstream: &Context,
        terms: &StreamLimits,
        missing: impl Fn(),
        look: impl Fn(Queue, u64, u64),
    ) -> Result<(), async_nats::Error> {
        for queue in Queue::of_run(terms) {
            let wanted = self.stream_config(queue, terms);
            let stream = match jetstream.get_stream(&wanted.name).await {
                Ok(stream) => stream,
                Err(error) if code(&error) == Some(ErrorCode::STREAM_NOT_FOUND) => {
                    missing();
                    jetstream.create_stream(&wanted).await?
                }
                Err(error) => return Err(error.into()),
            };
            let Some(config) = consumer_config(queue, terms) else { continue };
            match stream.consumer_info(queue.consumer()).await {
                Ok(info) => look(queue, info.num_pending, info.num_ack_pending as u64),
                Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => {
                    missing();
                    stream.create_consumer(config).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Returns the limit of a stream of that many bytes in pieces: with what the server adds to every message. -1 is no limit.
fn reserved(num_bytes: u64) -> i64 {
    if num_bytes == 0 { -1 } else { (num_bytes + num_bytes / 64 + (64 << 10)) as i64 }
}

/// Returns the bytes that a run reserves on its servers.
pub(super) fn reserved_by(terms: &StreamLimits) -> u64 {
    let limits = [MAX_DEAD_BYTES, reserved(terms.weights_bytes), reserved(terms.base_bytes)];
    limits.iter().map(|limit| (*limit).max(0) as u64).sum::<u64>() * terms.num_replicas as u64
}

fn consumer_config(queue: Queue, terms: &StreamLimits) -> Option<pull::Config> {
    matches!(queue, Queue::Tasks | Queue::Groups | Queue::Scored).then(|| pull::Config {
        durable_name: Some(queue.consumer().to_owned()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: terms.ack_wait,
        // The learner counts the issues of a task; the server never gives up on a message.
        max_deliver: -1,
        max_ack_pending: (SLACK * terms.max_tasks) as i64,
        ..pull::Config::default()
    })
}

/// Describes the settings of a stream that are compared.
fn stream_terms(config: &Config) -> String {
    let Config { subjects, retention, discard, max_messages, max_messages_per_subject, .. } = config;
    let Config { max_bytes, duplicate_window, allow_direct, num_replicas, .. } = config;
    format!(
        "subjects {subjects:?}, retention {retention:?}, discard {discard:?}, max_msgs {max_messages}, \
         max_msgs_per_subject {max_messages_per_subject}, max_bytes {max_bytes}, duplicate_window {duplicate_window:?}, \
         allow_direct {allow_direct}, num_replicas {num_replicas}"
    )
}

/// Describes the settings of a stream's consumer that are compared.
fn consumer_terms(ack_policy: AckPolicy, ack_wait: Duration, max_deliver: i64, max_ack_pending: i64) -> String {
    format!(
        "; consumer: ack_policy {ack_policy:?}, ack_wait {ack_wait:?}, max_deliver {max_deliver}, \
         max_ack_pending {max_ack_pending}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every relevant setting that a server drops or changes is detected.
    #[test]
    fn what_a_server_made_otherwise_is_told_apart() {
        let seconds = Duration::from_secs;
        let terms = StreamLimits {
            max_tasks: 8,
            ack_wait: seconds(30),
            lease: seconds(10),
            num_replicas: 1,
            weights_bytes: 0,
            base_bytes: 0,
        };
        let layout = Layout::new("r");
        let changes: [fn(&mut Config); 9] = [
            |config| config.subjects.truncate(1),
            |config| config.retention = RetentionPolicy::Interest,
            |config| config.discard = DiscardPolicy::Old,
            |config| config.max_messages = -1,
            |config| config.max_messages_per_subject = 7,
            |config| config.max_bytes = 7,
            |config| config.duplicate_window = Duration::ZERO,
            |config| config.allow_direct = true,
            |config| config.num_replicas = 3,
        ];
        let wanted = layout.stream_config(Queue::Tasks, &terms);
        for (number, change) in changes.iter().enumerate() {
            let mut made = wanted.clone();
            change(&mut made);
            assert_ne!(stream_terms(&made), stream_terms(&wanted), "change {number}");
        }
        let consumer = |ack_wait, max_deliver, max_ack_pending| {
            consumer_terms(AckPolicy::Explicit, seconds(ack_wait), max_deliver, max_ack_pending)
        };
        let wanted = consumer(30, -1, 32);
        for made in [consumer(31, -1, 32), consumer(30, 5, 32), consumer(30, -1, 1)] {
            assert_ne!(made, wanted);
        }
    }
}
