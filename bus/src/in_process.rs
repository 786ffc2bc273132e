use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use proto::{Beat, Digest, Group, Message, ProblemKey, Refusal, Role, ScoredGroup, Task, TaskId, TaskKind, Version};
use tokio::sync::{mpsc, watch};

use crate::{Bus, Delivery, Error, Keys, Presence, Queues, Receipt, WeightStore};

/// In-memory queues, for all roles in one process. The tasks that the learner requests bound their size.
#[derive(Debug)]
pub struct InProcess {
    tasks: Queue<Task>,
    groups: Queue<Group>,
    scored: Queue<ScoredGroup>,
    refusals: (mpsc::UnboundedSender<Refusal>, tokio::sync::Mutex<mpsc::UnboundedReceiver<Refusal>>),
    keys: Mutex<BTreeMap<TaskId, ProblemKey>>,
    weights: Mutex<BTreeMap<Digest, Arc<[u8]>>>,
    newest: watch::Sender<Option<Version>>,
    /// The receiver of the only actor.
    announced: tokio::sync::Mutex<watch::Receiver<Option<Version>>>,
}

#[derive(Debug)]
struct Queue<T> {
    name: &'static str,
    sender: mpsc::UnboundedSender<Message<T>>,
    receiver: tokio::sync::Mutex<mpsc::UnboundedReceiver<Message<T>>>,
}

impl InProcess {
    /// Creates empty queues.
    pub fn new() -> InProcess {
        let (newest, announced) = watch::channel(None);
        let (refuse, refused) = mpsc::unbounded_channel();
        InProcess {
            newest,
            announced: tokio::sync::Mutex::new(announced),
            tasks: Queue::new("tasks"),
            groups: Queue::new("groups"),
            scored: Queue::new("scored groups"),
            refusals: (refuse, tokio::sync::Mutex::new(refused)),
            keys: Mutex::default(),
            weights: Mutex::default(),
        }
    }
}

impl Default for InProcess {
    fn default() -> InProcess {
        InProcess::new()
    }
}

impl<T: Clone + Send + Sync + 'static> Queue<T> {
    fn new(name: &'static str) -> Queue<T> {
        let (sender, receiver) = mpsc::unbounded_channel();
        Queue { name, sender, receiver: tokio::sync::Mutex::new(receiver) }
    }

    fn push(&self, message: Message<T>) -> Result<(), Error> {
        self.sender.send(message).map_err(|_| Error::Closed { queue: self.name })
    }

    async fn pop(&self) -> Result<Delivery<T>, Error> {
        let message = self.receiver.lock().await.recv().await.ok_or(Error::Closed { queue: self.name })?;
        Ok(Delivery { message, is_redelivered: false, receipt: Box::new(Origin(self.sender.clone())) })
    }
}

/// The queue that a delivery comes from. Threads of one process end together, so no message is redelivered automatically.
struct Origin<T>(mpsc::UnboundedSender<Message<T>>);

#[async_trait]
impl<T: Clone + Send + Sync + 'static> Receipt<T> for Origin<T> {
    async fn acknowledge(&self) -> Result<(), Error> {
        Ok(())
    }

    async fn hand_back(&self, message: &Message<T>, pause: Duration) -> Result<(), Error> {
        let (sender, message) = (self.0.clone(), message.clone());
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            // If the queue is closed, there is no receiver.
            drop(sender.send(message));
        });
        Ok(())
    }

    async fn set_aside(&self) -> bool {
        false
    }
}

#[async_trait]
impl Queues for InProcess {
    async fn publish_task(&self, task: Message<Task>) -> Result<(), Error> {
        self.tasks.push(task)
    }

    async fn publish_group(&self, group: Message<Group>) -> Result<(), Error> {
        self.groups.push(group)
    }

    async fn publish_scored(&self, scored: Message<ScoredGroup>) -> Result<(), Error> {
        self.scored.push(scored)
    }

    async fn next_task(&self) -> Result<Delivery<Task>, Error> {
        self.tasks.pop().await
    }

    async fn next_group(&self) -> Result<Delivery<Group>, Error> {
        self.groups.pop().await
    }

    async fn next_scored(&self) -> Result<Delivery<ScoredGroup>, Error> {
        self.scored.pop().await
    }

    async fn refuse(&self, refusal: Refusal) -> Result<(), Error> {
        self.refusals.0.send(refusal).map_err(|_| Error::Closed { queue: "refusals" })
    }

    async fn next_refusal(&self) -> Result<Refusal, Error> {
        self.refusals.1.lock().await.recv().await.ok_or(Error::Closed { queue: "refusals" })
    }
}

#[async_trait]
impl Keys for InProcess {
    async fn put_key(&self, task: TaskId, key: ProblemKey) -> Result<(), Error> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner).insert(task, key);
        Ok(())
    }

    async fn get_key(&self, task: TaskId) -> Result<ProblemKey, Error> {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        keys.get(&task).cloned().ok_or(Error::NoKey { task })
    }
}

#[async_trait]
impl WeightStore for InProcess {
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

    async fn announce(&self, version: Version) -> Result<(), Error> {
        self.newest.send_replace(Some(version));
        Ok(())
    }

    async fn next_version(&self) -> Result<Version, Error> {
        let mut announced = self.announced.lock().await;
        loop {
            announced.changed().await.map_err(|_| Error::Closed { queue: "versions" })?;
            if let Some(version) = *announced.borrow_and_update() {
                return Ok(version);
            }
        }
    }
}

#[async_trait]
impl Presence for InProcess {
    async fn beat(&self, _role: Role, _tasks: Vec<TaskId>) -> Result<(), Error> {
        Ok(())
    }

    async fn next_beat(&self) -> Result<Beat, Error> {
        std::future::pending().await
    }

    async fn leave(&self) {}
}

#[async_trait]
impl Bus for InProcess {
    async fn forget_batch(&self, kind: TaskKind, batch: u64) -> Result<(), Error> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        keys.retain(|task, _| (task.kind, task.batch) != (kind, batch));
        Ok(())
    }

    async fn restore(&self) -> Result<bool, Error> {
        Ok(false)
    }
}
