//! What carries tasks, groups and weights between the roles.
//!
//! One process uses [`InProcess`]; every message that crosses it could cross a network. A bus may deliver late, out of
//! order and more than once: what is learned depends on none of that.

mod in_process;

use std::sync::Arc;

use async_trait::async_trait;
use proto::{Digest, Group, ProblemKey, ScoredGroup, Task, TaskId};

pub use in_process::InProcess;

/// Carries messages between the roles.
#[async_trait]
pub trait Bus: Send + Sync + 'static {
    /// Hands a task to some actor.
    async fn publish_task(&self, task: Task) -> Result<(), Error>;

    /// Hands a played group to some verifier.
    async fn publish_group(&self, group: Group) -> Result<(), Error>;

    /// Hands a scored group to the learner.
    async fn publish_scored(&self, scored: ScoredGroup) -> Result<(), Error>;

    /// Waits for a task.
    async fn next_task(&self) -> Result<Task, Error>;

    /// Waits for a played group.
    async fn next_group(&self) -> Result<Group, Error>;

    /// Waits for a scored group.
    async fn next_scored(&self) -> Result<ScoredGroup, Error>;

    /// Stores the key of a task's problem; only verifiers may read it.
    async fn put_key(&self, task: TaskId, key: ProblemKey) -> Result<(), Error>;

    /// Fetches the key of a task's problem.
    async fn get_key(&self, task: TaskId) -> Result<ProblemKey, Error>;

    /// Forgets the keys of all batches before one.
    async fn forget_keys(&self, first_kept_batch: u64) -> Result<(), Error>;

    /// Stores weights under their digest.
    async fn put_weights(&self, digest: Digest, bytes: Arc<[u8]>) -> Result<(), Error>;

    /// Fetches weights.
    async fn get_weights(&self, digest: Digest) -> Result<Arc<[u8]>, Error>;

    /// Forgets all weights but these.
    async fn retain_weights(&self, digests: &[Digest]) -> Result<(), Error>;
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
}
