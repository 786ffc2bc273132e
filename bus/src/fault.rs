use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use proto::{
    Beat, CounterRng, Digest, Group, Message, ProblemKey, Purpose, Refusal, Role, ScoredGroup, Task, TaskId, TaskKind,
    Version,
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{Bus, Delivery, Error, Keys, Presence, Queues, Receipt, WeightStore};

/// Rates of injected faults, each a fraction of the messages that are taken from a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Faults {
    /// Messages that are acknowledged and never delivered.
    pub drop: f64,
    /// Messages that are delivered twice.
    pub duplicate: f64,
    /// Messages that are delivered after later ones.
    pub reorder: f64,
    /// Seed that selects the affected messages; their order has an influence too.
    pub seed: u64,
}

/// Counts of injected faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts {
    /// Messages dropped.
    pub dropped: u64,
    /// Messages delivered twice.
    pub duplicated: u64,
    /// Messages delivered late.
    pub reordered: u64,
}

/// A bus that loses, repeats and delays what it delivers.
pub struct Faulty {
    bus: Arc<dyn Bus>,
    faults: Faults,
    dice: Mutex<Dice>,
    tasks: Late<Task>,
    groups: Late<Group>,
    scored: Late<ScoredGroup>,
}

struct Dice {
    rng: CounterRng,
    counts: FaultCounts,
}

/// Messages that are delivered later, with their due times.
type Late<T> = Mutex<Vec<(Instant, Delivery<T>)>>;

/// The longest delay of a message: long enough for others to overtake it.
const MAX_DELAY: Duration = Duration::from_millis(100);

type Next<'a, T> = Pin<Box<dyn Future<Output = Result<Delivery<T>, Error>> + Send + 'a>>;

enum Fate {
    Deliver,
    Drop,
    Duplicate,
    Delay(Duration),
}

impl Faulty {
    /// Wraps a bus.
    pub fn new(bus: Arc<dyn Bus>, faults: Faults) -> Faulty {
        let dice = Dice { rng: CounterRng::new(faults.seed, Purpose::Fault, 0, 0, 0), counts: FaultCounts::default() };
        Faulty {
            bus,
            faults,
            dice: Mutex::new(dice),
            tasks: Mutex::default(),
            groups: Mutex::default(),
            scored: Mutex::default(),
        }
    }

    /// Returns the counts of faults so far.
    pub fn counts(&self) -> FaultCounts {
        self.dice.lock().unwrap_or_else(PoisonError::into_inner).counts
    }

    fn draw(&self) -> Fate {
        let Dice { rng, counts } = &mut *self.dice.lock().unwrap_or_else(PoisonError::into_inner);
        let Faults { drop, duplicate, reorder, .. } = self.faults;
        let draw = rng.unit_f64();
        if draw < drop {
            counts.dropped += 1;
            Fate::Drop
        } else if draw < drop + duplicate {
            counts.duplicated += 1;
            Fate::Duplicate
        } else if draw < drop + duplicate + reorder {
            counts.reordered += 1;
            Fate::Delay(MAX_DELAY.mul_f64(rng.unit_f64()))
        } else {
            Fate::Deliver
        }
    }

    /// Takes the next message from the queue or from the delayed ones, whichever is due first.
    async fn next<'a, T: Clone + Send + Sync + 'static>(
        &'a self,
        late: &'a Late<T>,
        next: impl Fn() -> Next<'a, T> + Send + Sync,
    ) -> Result<Delivery<T>, Error> {
        loop {
            let due = late.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|(due, _)| *due).min();
            tokio::select! {
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    let mut late = late.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(index) = late.iter().position(|(at, _)| Some(*at) == due) {
                        return Ok(late.swap_remove(index).1);
                    }
                }
                delivery = next() => {
                    let delivery = delivery?;
                    let put_off = |delivery, delay| {
                        late.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now() + delay, delivery));
                    };
                    match self.draw() {
                        Fate::Deliver => return Ok(delivery),
                        Fate::Drop => delivery.acknowledge().await?,
                        Fate::Delay(delay) => put_off(delivery, delay),
                        Fate::Duplicate => {
                            let copy = Delivery { message: delivery.message.clone(), is_redelivered: false, receipt: Box::new(Copy) };
                            put_off(copy, MAX_DELAY);
                            return Ok(delivery);
                        }
                    }
                }
            }
        }
    }
}

/// Hands back delayed messages.
async fn hand_back<T: Send + Sync>(late: &Late<T>) {
    let late = std::mem::take(&mut *late.lock().unwrap_or_else(PoisonError::into_inner));
    for (_, delivery) in late {
        drop(delivery.hand_back(Duration::ZERO).await);
    }
}

/// The receipt of a message's second delivery, which needs no acknowledgement.
struct Copy;

#[async_trait]
impl<T: Send + Sync> Receipt<T> for Copy {
    async fn acknowledge(&self) -> Result<(), Error> {
        Ok(())
    }

    async fn hand_back(&self, _message: &Message<T>, _pause: Duration) -> Result<(), Error> {
        Ok(())
    }

    /// Does nothing: the first delivery decides.
    async fn set_aside(&self) -> bool {
        true
    }
}

#[async_trait]
impl Queues for Faulty {
    async fn publish_task(&self, task: Message<Task>) -> Result<(), Error> {
        self.bus.publish_task(task).await
    }

    async fn publish_group(&self, group: Message<Group>) -> Result<(), Error> {
        self.bus.publish_group(group).await
    }

    async fn publish_scored(&self, scored: Message<ScoredGroup>) -> Result<(), Error> {
        self.bus.publish_scored(scored).await
    }

    async fn next_task(&self) -> Result<Delivery<Task>, Error> {
        self.next(&self.tasks, || self.bus.next_task()).await
    }

    async fn next_group(&self) -> Result<Delivery<Group>, Error> {
        self.next(&self.groups, || self.bus.next_group()).await
    }

    async fn next_scored(&self) -> Result<Delivery<ScoredGroup>, Error> {
        self.next(&self.scored, || self.bus.next_scored()).await
    }

    async fn refuse(&self, refusal: Refusal) -> Result<(), Error> {
        self.bus.refuse(refusal).await
    }

    async fn next_refusal(&self) -> Result<Refusal, Error> {
        self.bus.next_refusal().await
    }
}

#[async_trait]
impl Keys for Faulty {
    async fn put_key(&self, task: TaskId, key: ProblemKey) -> Result<(), Error> {
        self.bus.put_key(task, key).await
    }

    async fn get_key(&self, task: TaskId) -> Result<ProblemKey, Error> {
        self.bus.get_key(task).await
    }
}

#[async_trait]
impl WeightStore for Faulty {
    async fn put_weights(&self, digest: Digest, bytes: Arc<[u8]>) -> Result<(), Error> {
        self.bus.put_weights(digest, bytes).await
    }

    async fn get_weights(&self, digest: Digest) -> Result<Arc<[u8]>, Error> {
        self.bus.get_weights(digest).await
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
impl Presence for Faulty {
    async fn beat(&self, role: Role, tasks: Vec<TaskId>) -> Result<(), Error> {
        self.bus.beat(role, tasks).await
    }

    async fn next_beat(&self) -> Result<Beat, Error> {
        self.bus.next_beat().await
    }

    async fn leave(&self) {
        hand_back(&self.tasks).await;
        hand_back(&self.groups).await;
        hand_back(&self.scored).await;
        self.bus.leave().await;
    }
}

#[async_trait]
impl Bus for Faulty {
    async fn forget_batch(&self, kind: TaskKind, batch: u64) -> Result<(), Error> {
        self.bus.forget_batch(kind, batch).await
    }

    async fn restore(&self) -> Result<bool, Error> {
        self.bus.restore().await
    }
}
