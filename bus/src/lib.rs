//! What carries tasks, groups and weights between the roles.
//!
//! One process uses [`InProcess`], a cluster [`nats`]. A bus may deliver late, out of order, more than once or, when its
//! store is lost, not at all: what is learned depends on none of that. [`Faulty`] does all of it on purpose.

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

/// How often a worker says that it lives.
pub const BEAT_EVERY: Duration = Duration::from_secs(2);

/// Runs work that takes a while on a blocking thread, so that the runtime goes on renewing leases, sending beats and serving its
/// connection. A panic of the work unwinds in the caller. If the runtime shuts down before the work starts, the future never completes.
pub async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await.map_err(JoinError::try_into_panic) {
        Ok(done) => done,
        Err(Ok(panic)) => resume_unwind(panic),
        Err(Err(_)) => std::future::pending().await,
    }
}

/// Carries messages between the roles.
///
/// What is taken from a queue belongs to who holds the [`Delivery`]. Let go of, and neither acknowledged nor handed back, it is
/// delivered again, to some worker.
#[async_trait]
pub trait Bus: Send + Sync + 'static {
    /// Hands a task to some actor, to none of those that its envelope excludes, where actors have names. Two issues of a task
    /// are two messages; a bus may drop copies of one issue only.
    async fn publish_task(&self, task: Message<Task>) -> Result<(), Error>;

    /// Hands a played group to some verifier.
    async fn publish_group(&self, group: Message<Group>) -> Result<(), Error>;

    /// Hands a scored group to the learner.
    async fn publish_scored(&self, scored: Message<ScoredGroup>) -> Result<(), Error>;

    /// Waits for a task. Loses nothing when the wait is given up.
    async fn next_task(&self) -> Result<Delivery<Task>, Error>;

    /// Waits for a played group, as [`Bus::next_task`] does. Who played it is the bus's to fill in.
    async fn next_group(&self) -> Result<Delivery<Group>, Error>;

    /// Waits for a scored group, as [`Bus::next_task`] does.
    async fn next_scored(&self) -> Result<Delivery<ScoredGroup>, Error>;

    /// Says that a worker lives, and what it has taken; nothing else is said of it. Its name is the bus's to fill in.
    async fn beat(&self, role: Role, tasks: Vec<TaskId>) -> Result<(), Error>;

    /// Waits for a worker's sign of life; where workers do not live apart, for ever.
    async fn next_beat(&self) -> Result<Beat, Error>;

    /// Says that a group cannot be judged; whoever does not listen misses it.
    async fn refuse(&self, refusal: Refusal) -> Result<(), Error>;

    /// Waits for such a word of a verifier; where workers do not live apart, for ever.
    async fn next_refusal(&self) -> Result<Refusal, Error>;

    /// Stores the key of a task's problem; only verifiers may read it.
    async fn put_key(&self, task: TaskId, key: ProblemKey) -> Result<(), Error>;

    /// Fetches the key of a task's problem.
    async fn get_key(&self, task: TaskId) -> Result<ProblemKey, Error>;

    /// Forgets a batch that is sealed, or evaluations that are over: keys, and messages that nobody needs any more.
    async fn forget_batch(&self, kind: TaskKind, batch: u64) -> Result<(), Error>;

    /// Stores weights under their digest.
    async fn put_weights(&self, digest: Digest, bytes: Arc<[u8]>) -> Result<(), Error>;

    /// Fetches weights.
    async fn get_weights(&self, digest: Digest) -> Result<Arc<[u8]>, Error>;

    /// Forgets all weights but these.
    async fn retain_weights(&self, digests: &[Digest]) -> Result<(), Error>;

    /// Says which weights are the newest; whoever does not listen misses it.
    async fn announce(&self, version: Version) -> Result<(), Error>;

    /// Waits until newer weights are announced than were when it was last called; perhaps the same again.
    async fn next_version(&self) -> Result<Version, Error>;

    /// Hands back what is on its way to this process, which ends.
    async fn leave(&self);

    /// Makes again what the bus has lost of its queues and stores; tells whether anything was missing, and with it perhaps
    /// messages, keys and weights.
    async fn restore(&self) -> Result<bool, Error>;
}

/// A message that was taken from a queue, and is kept for this process until it is answered or dropped.
pub struct Delivery<T> {
    /// What it says.
    pub message: Message<T>,
    /// Whether the bus says that it was delivered before.
    pub is_redelivered: bool,
    receipt: Box<dyn Receipt<T>>,
}

impl<T: Send + Sync> Delivery<T> {
    /// Says that its effect is safe: it is not delivered again.
    ///
    /// # Errors
    /// When the bus is gone; then it may be delivered again.
    pub async fn acknowledge(&self) -> Result<(), Error> {
        self.receipt.acknowledge().await
    }

    /// Has it delivered again, to some worker, after a pause.
    ///
    /// # Errors
    /// When the bus is gone; then it is delivered again when the bus has not heard of it for long enough.
    pub async fn hand_back(&self, pause: Duration) -> Result<(), Error> {
        self.receipt.hand_back(&self.message, pause).await
    }

    /// Has it kept for people to look at, and not delivered again; `false`, and nothing is done, where all workers are of one
    /// process, and nobody is to be suspected.
    pub async fn set_aside(&self) -> bool {
        self.receipt.set_aside().await
    }
}

impl<T: fmt::Debug> fmt::Debug for Delivery<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Delivery").field("message", &self.message).finish_non_exhaustive()
    }
}

/// Where a bus hears what became of a delivery.
#[async_trait]
trait Receipt<T>: Send + Sync {
    async fn acknowledge(&self) -> Result<(), Error>;
    async fn hand_back(&self, message: &Message<T>, pause: Duration) -> Result<(), Error>;
    async fn set_aside(&self) -> bool;
}

/// What can go wrong on a bus.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The other side is gone.
    #[error("bus: {queue} is closed")]
    Closed {
        /// Which queue.
        queue: &'static str,
    },
    /// Nobody stored this key.
    #[error("bus: expected a key of task {task:?} in the store, found none")]
    NoKey {
        /// Whose key was asked for.
        task: TaskId,
    },
    /// Nobody stored these weights.
    #[error("bus: expected weights {digest:?} in the store, found none")]
    NoWeights {
        /// What was asked for.
        digest: Digest,
    },
    /// What is stored under a version's name is something else.
    #[error("bus: weights {digest:?} are refused: {reason}")]
    BadWeights {
        /// Which version.
        digest: Digest,
        /// What is wrong.
        reason: String,
    },
    /// The server did not do it for too long.
    #[error("bus: could not {what} within {seconds} s: {reason}")]
    Unreachable {
        /// What was tried.
        what: String,
        /// For how long.
        seconds: u64,
        /// What the last try ended with.
        reason: String,
    },
    /// The server, or what it made of a request, is not what is needed.
    #[error("bus: {what}: expected {expected}, got {got}")]
    Unfit {
        /// Of what.
        what: String,
        /// What is needed.
        expected: String,
        /// What there is.
        got: String,
    },
    /// The server has too little room for a run.
    #[error("bus: server {server}: {reason}")]
    NoRoom {
        /// Which server.
        server: String,
        /// What it said, how much is needed and what makes room.
        reason: String,
    },
    /// This user may not do that.
    #[error("bus: not permitted: {reason}")]
    Denied {
        /// What the server said, which names the subject.
        reason: String,
    },
    /// Another learner has the run.
    #[error("bus: run {run:?} has a learner ({holder}); one run has one learner at a time")]
    Taken {
        /// The run.
        run: String,
        /// Who it is.
        holder: String,
    },
    /// A message is larger than the server takes.
    #[error("bus: {what} has {size_bytes} bytes, the server takes messages of up to {limit_bytes} (max_payload)")]
    TooLarge {
        /// What it is.
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
