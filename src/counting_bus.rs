//! A bus that counts its traffic.

use std::sync::Arc;

use async_trait::async_trait;
use bus::{Bus, Delivery, Error, Keys, Presence, Queues, WeightStore};
use proto::{Beat, Digest, Group, Message, ProblemKey, Refusal, Role, ScoredGroup, Task, TaskId, TaskKind, Version};
use tokio::time::Instant;

use crate::bus_meters::Meters;
use crate::report::word;

/// Wraps a bus and counts its traffic.
pub(crate) struct CountingBus {
    bus: Arc<dyn Bus>,
    meters: Arc<Meters>,
}

impl CountingBus {
    pub(crate) fn new(bus: Arc<dyn Bus>, meters: Arc<Meters>) -> CountingBus {
        CountingBus { bus, meters }
    }
}

#[async_trait]
impl Queues for CountingBus {
    async fn publish_task(&self, task: Message<Task>) -> Result<(), Error> {
        let reissued = if task.envelope.issue > 0 { "true" } else { "false" };
        let kind = word(&task.body.id.kind);
        self.meters.publish("task", self.bus.publish_task(task)).await?;
        self.meters.tasks_issued.with_label_values(&[kind.as_str(), reissued]).inc();
        Ok(())
    }

    async fn publish_group(&self, group: Message<Group>) -> Result<(), Error> {
        self.meters.played(&group.body);
        self.meters.publish("group", self.bus.publish_group(group)).await
    }

    async fn publish_scored(&self, scored: Message<ScoredGroup>) -> Result<(), Error> {
        self.meters.judged(&scored.body);
        self.meters.publish("scored", self.bus.publish_scored(scored)).await
    }

    async fn next_task(&self) -> Result<Delivery<Task>, Error> {
        let task = self.meters.took("task", self.bus.next_task().await)?;
        self.meters.playing.begin(task.message.body.id);
        Ok(task)
    }

    async fn next_group(&self) -> Result<Delivery<Group>, Error> {
        let group = self.meters.took("group", self.bus.next_group().await)?;
        self.meters.judging.begin(group.message.body.task.id);
        Ok(group)
    }

    async fn next_scored(&self) -> Result<Delivery<ScoredGroup>, Error> {
        self.meters.took("scored", self.bus.next_scored().await)
    }

    async fn refuse(&self, refusal: Refusal) -> Result<(), Error> {
        self.bus.refuse(refusal).await
    }

    async fn next_refusal(&self) -> Result<Refusal, Error> {
        self.bus.next_refusal().await
    }
}

#[async_trait]
impl Keys for CountingBus {
    async fn put_key(&self, task: TaskId, key: ProblemKey) -> Result<(), Error> {
        self.bus.put_key(task, key).await
    }

    async fn get_key(&self, task: TaskId) -> Result<ProblemKey, Error> {
        self.bus.get_key(task).await
    }
}

#[async_trait]
impl WeightStore for CountingBus {
    async fn put_weights(&self, digest: Digest, bytes: Arc<[u8]>) -> Result<(), Error> {
        let (began, num_bytes) = (Instant::now(), bytes.len());
        self.bus.put_weights(digest, bytes).await?;
        self.meters.moved("put", began, num_bytes);
        Ok(())
    }

    async fn get_weights(&self, digest: Digest) -> Result<Arc<[u8]>, Error> {
        let began = Instant::now();
        let fetched = self.bus.get_weights(digest).await;
        match &fetched {
            Ok(bytes) => self.meters.moved("get", began, bytes.len()),
            Err(Error::NoWeights { .. } | Error::BadWeights { .. }) => self.meters.weights_refused.inc(),
            Err(_) => {}
        }
        fetched
    }

    async fn retain_weights(&self, digests: &[Digest]) -> Result<(), Error> {
        self.bus.retain_weights(digests).await
    }

    async fn announce(&self, version: Version) -> Result<(), Error> {
        self.bus.announce(version).await
    }

    async fn next_version(&self) -> Result<Version, Error> {
        self.bus.next_version().await
    }
}

#[async_trait]
impl Presence for CountingBus {
    async fn beat(&self, role: Role, tasks: Vec<TaskId>) -> Result<(), Error> {
        self.bus.beat(role, tasks).await
    }

    async fn next_beat(&self) -> Result<Beat, Error> {
        self.bus.next_beat().await
    }

    async fn leave(&self) {
        self.bus.leave().await;
    }
}

#[async_trait]
impl Bus for CountingBus {
    async fn forget_batch(&self, kind: TaskKind, batch: u64) -> Result<(), Error> {
        self.bus.forget_batch(kind, batch).await
    }

    async fn restore(&self) -> Result<bool, Error> {
        self.bus.restore().await
    }
}
