//! Transport of tasks, groups and weights between the roles.
//!
//! A single process uses [`InProcess`], a cluster uses [`nats`]. A bus may deliver late, out of order, more than once or, when
//! its store is lost, not at all. The training result depends on none of that. [`Faulty`] injects these faults on purpose.

mod fault;
mod in_process;
pub mod nats;

use std::fmt;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use proto::{Beat, Digest, Group, Message, ProblemKey, Refusal, Role, ScoredGroup, Task, TaskId, TaskKind, Version};
use tokio::task::JoinError;

pub use fault::{FaultCounts, Faults, Faulty};
pub use in_process::InProcess;

/// How often a worker sends a heartbeat.
pub const BEAT_EVERY: Duration = Duration::from_secs(2);

/// Runs slow work on a blocking thread, so that the runtime continues to renew leases, send heartbeats and serve its connection.
/// A panic of the work unwinds in the caller. If the runtime shuts down before the work starts, the future never completes.
pub async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await.map_err(JoinError::try_into_panic) {
        Ok(done) => done,
        Err(Ok(panic)) => resume_unwind(panic),
        Err(Err(_)) => std::future::pending().await,
    }
}

/// Carries messages between the roles.
///
/// A message taken from a queue belongs to the holder of its [`Delivery`]. If the delivery is dropped without being acknowledged
/// or handed back, the bus delivers the message again, to some worker.
#[async_trait]
pub trait Bus: Queues + Keys + WeightStore + Presence {
    /// Deletes the keys and the obsolete messages of a sealed batch or of finished evaluations.
    async fn forget_batch(&self, kind: TaskKind, batch: u64) -> Result<(), Error>;

    /// Recreates queues and stores that the bus has lost. Returns whether any was missing: messages, keys and weights may then be
    /// lost as well.
    async fn restore(&self) -> Result<bool, Error>;
}

/// The queues of tasks, played groups and scored groups.
#[async_trait]
pub trait Queues: Send + Sync + 'static {
    /// Sends a task to some actor. If actors have names, it skips those that the envelope excludes. Two issues of a task are two
    /// messages; a bus may deduplicate only copies of one issue.
    async fn publish_task(&self, task: Message<Task>) -> Result<(), Error>;

    /// Sends a played group to some verifier.
    async fn publish_group(&self, group: Message<Group>) -> Result<(), Error>;

    /// Sends a scored group to the learner.
    async fn publish_scored(&self, scored: Message<ScoredGroup>) -> Result<(), Error>;

    /// Waits for a task. No message is lost if the wait is cancelled.
    async fn next_task(&self) -> Result<Delivery<Task>, Error>;

    /// Waits for a played group, as [`Queues::next_task`] does. The bus fills in the name of the actor that played it.
    async fn next_group(&self) -> Result<Delivery<Group>, Error>;

    /// Waits for a scored group, as [`Queues::next_task`] does.
    async fn next_scored(&self) -> Result<Delivery<ScoredGroup>, Error>;

    /// Reports that a group has no verdicts; only current listeners receive it.
    async fn refuse(&self, refusal: Refusal) -> Result<(), Error>;

    /// Waits for a verifier's refusal.
    async fn next_refusal(&self) -> Result<Refusal, Error>;
}

/// Keys of problems, which verifiers alone may read.
#[async_trait]
pub trait Keys: Send + Sync + 'static {
    /// Stores the key of a task's problem; only verifiers may read it.
    async fn put_key(&self, task: TaskId, key: ProblemKey) -> Result<(), Error>;

    /// Fetches the key of a task's problem.
    async fn get_key(&self, task: TaskId) -> Result<ProblemKey, Error>;
}

/// A store of weights by digest, and announcements of the newest version.
#[async_trait]
pub trait WeightStore: Send + Sync + 'static {
    /// Stores weights under their digest.
    async fn put_weights(&self, digest: Digest, bytes: Arc<[u8]>) -> Result<(), Error>;

    /// Fetches weights.
    async fn get_weights(&self, digest: Digest) -> Result<Arc<[u8]>, Error>;

    /// Deletes all weights except these.
    async fn retain_weights(&self, digests: &[Digest]) -> Result<(), Error>;

    /// Announces the newest weights; only current listeners receive it.
    async fn announce(&self, version: Version) -> Result<(), Error>;

    /// Waits for an announcement of weights after the previous call; it may repeat the same version.
    async fn next_version(&self) -> Result<Version, Error>;
}

/// Heartbeats of workers.
#[async_trait]
pub trait Presence: Send + Sync + 'static {
    /// Sends a worker's heartbeat with the tasks that it has taken. The bus fills in its name.
    async fn beat(&self, role: Role, tasks: Vec<TaskId>) -> Result<(), Error>;

    /// Waits for a worker's heartbeat; never returns if all roles are in one process.
    async fn next_beat(&self) -> Result<Beat, Error>;

    /// Hands back messages that are in flight to this process, before it exits.
    async fn leave(&self);
}

/// A message taken from a queue. It is reserved for this process until it is answered or dropped.
pub struct Delivery<T> {
    /// The message.
    pub message: Message<T>,
    /// Whether the bus reports an earlier delivery of it.
    pub is_redelivered: bool,
    receipt: Box<dyn Receipt<T>>,
}

impl<T: Send + Sync> Delivery<T> {
    /// Acknowledges that the effect of the message is durable: it is not delivered again.
    ///
    /// # Errors
    /// When the bus is gone; then it may be delivered again.
    pub async fn acknowledge(&self) -> Result<(), Error> {
        self.receipt.acknowledge().await
    }

    /// Returns the message to the queue, to be delivered again to some worker after a pause.
    ///
    /// # Errors
    /// When the bus is gone; then it is delivered again once its acknowledgement is overdue.
    pub async fn hand_back(&self, pause: Duration) -> Result<(), Error> {
        self.receipt.hand_back(&self.message, pause).await
    }

    /// Sets the message aside for people to inspect, so that it is not delivered again. Returns `false`, without any effect, if
    /// all workers are in one process, so that none is suspect.
    pub async fn set_aside(&self) -> bool {
        self.receipt.set_aside().await
    }
}

impl<T: fmt::Debug> fmt::Debug for Delivery<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Delivery").field("message", &self.message).finish_non_exhaustive()
    }
}

/// Reports to a bus how a delivery ended.
#[async_trait]
trait Receipt<T>: Send + Sync {
    async fn acknowledge(&self) -> Result<(), Error>;
    async fn hand_back(&self, message: &Message<T>, pause: Duration) -> Result<(), Error>;
    async fn set_aside(&self) -> bool;
}

/// Errors of a bus.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The other end is closed.
    #[error("bus: {queue}: channel closed")]
    Closed {
        /// The name of the queue.
        queue: &'static str,
    },
    /// Nobody stored this key.
    #[error("bus: expected a key of task {task:?} in the store, found none")]
    NoKey {
        /// The task whose key was requested.
        task: TaskId,
    },
    /// Nobody stored these weights.
    #[error("bus: expected weights {digest:?} in the store, found none")]
    NoWeights {
        /// The digest that was requested.
        digest: Digest,
    },
    /// The data stored under the name of a version are not these weights.
    #[error("bus: weights {digest:?} rejected: {reason}")]
    BadWeights {
        /// The digest of the weights.
        digest: Digest,
        /// A description of the fault.
        reason: String,
    },
    /// The server did not complete an operation in time.
    #[error("bus: could not {what} within {seconds} s: {reason}")]
    Unreachable {
        /// The operation.
        what: String,
        /// How long it was tried.
        seconds: u64,
        /// The error of the last attempt.
        reason: String,
    },
    /// The server, or the result of a request to it, does not meet the requirements.
    #[error("bus: {what}: expected {expected}, got {got}")]
    Unfit {
        /// What does not meet them.
        what: String,
        /// What is needed.
        expected: String,
        /// What was found.
        got: String,
    },
    /// The server has too little room for a run.
    #[error("bus: server {server}: {reason}")]
    NoRoom {
        /// The server.
        server: String,
        /// The server's message, how much room is needed and how to make it.
        reason: String,
    },
    /// This user may not do that.
    #[error("bus: not permitted: {reason}")]
    Denied {
        /// The server's message, which names the subject.
        reason: String,
    },
    /// Another learner holds the run.
    #[error("bus: run {run:?} has a learner ({holder}); a run can have only one learner at a time")]
    Taken {
        /// The run.
        run: String,
        /// The learner that holds it.
        holder: String,
    },
    /// A message is larger than the server accepts.
    #[error(
        "bus: {what} has {size_bytes} bytes; the server accepts messages of up to {limit_bytes} bytes (max_payload)"
    )]
    TooLarge {
        /// The kind of message.
        what: String,
        /// Its size.
        size_bytes: usize,
        /// The server's limit.
        limit_bytes: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_of_blocking_work_unwinds_in_the_caller() {
        assert_eq!(run_blocking(|| 7).await, 7);
        let panic = tokio::spawn(run_blocking(|| panic!("out of order"))).await.unwrap_err().into_panic();
        assert_eq!(panic.downcast_ref(), Some(&"out of order"));
    }
}
