use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use proto::{Digest, Group, ProblemKey, ScoredGroup, Task, TaskId};
use tokio::sync::mpsc;

use crate::{Bus, Error};

/// Bounded queues in memory, for all roles in one process.
#[derive(Debug)]
pub struct InProcess {
    tasks: Queue<Task>,
    groups: Queue<Group>,
    scored: Queue<ScoredGroup>,
    keys: Mutex<BTreeMap<TaskId, ProblemKey>>,
    weights: Mutex<BTreeMap<Digest, Arc<[u8]>>>,
}

#[derive(Debug)]
struct Queue<T> {
    name: &'static str,
    sender: mpsc::Sender<T>,
    receiver: tokio::sync::Mutex<mpsc::Receiver<T>>,
}

impl InProcess {
    /// Makes queues that hold `capacity` messages each: at least as many as there are ever tasks outstanding, so that no
    /// role can wait for another in a circle.
    pub fn new(capacity: usize) -> InProcess {
        InProcess {
            tasks: Queue::new("tasks", capacity),
            groups: Queue::new("groups", capacity),
            scored: Queue::new("scored groups", capacity),
            keys: Mutex::default(),
            weights: Mutex::default(),
        }
    }
}

impl<T> Queue<T> {
    fn new(name: &'static str, capacity: usize) -> Queue<T> {
        let (sender, receiver) = mpsc::channel(capacity);
        Queue { name, sender, receiver: tokio::sync::Mutex::new(receiver) }
    }

    async fn push(&self, message: T) -> Result<(), Error> {
        self.sender.send(message).await.map_err(|_| Error::Closed { queue: self.name })
    }

    async fn pop(&self) -> Result<T, Error> {
        self.receiver.lock().await.recv().await.ok_or(Error::Closed { queue: self.name })
    }
}

#[async_trait]
impl Bus for InProcess {
    async fn publish_task(&self, task: Task) -> Result<(), Error> {
        self.tasks.push(task).await
    }

    async fn publish_group(&self, group: Group) -> Result<(), Error> {
        self.groups.push(group).await
    }

    async fn publish_scored(&self, scored: ScoredGroup) -> Result<(), Error> {
        self.scored.push(scored).await
    }

    async fn next_task(&self) -> Result<Task, Error> {
        self.tasks.pop().await
    }

    async fn next_group(&self) -> Result<Group, Error> {
        self.groups.pop().await
    }

    async fn next_scored(&self) -> Result<ScoredGroup, Error> {
        self.scored.pop().await
    }

    async fn put_key(&self, task: TaskId, key: ProblemKey) -> Result<(), Error> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner).insert(task, key);
        Ok(())
    }

    async fn get_key(&self, task: TaskId) -> Result<ProblemKey, Error> {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        keys.get(&task).cloned().ok_or(Error::NoKey { task })
    }

    async fn forget_keys(&self, first_kept_batch: u64) -> Result<(), Error> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner).retain(|task, _| task.batch >= first_kept_batch);
        Ok(())
    }

    async fn put_weights(&self, digest: Digest, bytes: Arc<[u8]>) -> Result<(), Error> {
        self.weights.lock().unwrap_or_else(PoisonError::into_inner).insert(digest, bytes);
        Ok(())
    }

    async fn get_weights(&self, digest: Digest) -> Result<Arc<[u8]>, Error> {
        let weights = self.weights.lock().unwrap_or_else(PoisonError::into_inner);
        weights.get(&digest).cloned().ok_or(Error::NoWeights { digest })
    }

    async fn retain_weights(&self, digests: &[Digest]) -> Result<(), Error> {
        self.weights.lock().unwrap_or_else(PoisonError::into_inner).retain(|digest, _| digests.contains(digest));
        Ok(())
    }
}
