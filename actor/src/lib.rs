//! The actor: turns tasks into groups of rollouts. Tokens only: it never sees a key or an expected answer.
//!
//! [`run`] takes tasks from the bus and hands their rollouts to the threads of an [`Engine`], which play
//! many tasks at once and return each group when its last rollout ends. What a rollout says depends on its task, its
//! number and the weights, and on nothing else: not on slots, threads, or what is played beside it.

pub mod engine;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, Delivery};
use policy::{PackedWeights, read_weights};
use proto::{Digest, Group, Task, TaskId};
use tokio_util::sync::CancellationToken;

use engine::{Engine, GroupReceiver};

/// How an actor uses its machine; changes when rollouts come, never what they say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Threads that play.
    pub num_threads: usize,
    /// Sequences in flight, over all threads.
    pub num_slots: usize,
}

/// What an actor did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Groups returned.
    pub num_groups: u64,
    /// Tokens in them.
    pub num_tokens: u64,
}

/// What can go wrong in an actor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bus failed.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// The weights are not what their digest says, or are no weights at all.
    #[error("weights {expected:?}: {reason}")]
    Weights {
        /// The digest that the task names.
        expected: Digest,
        /// What is wrong.
        reason: String,
    },
    /// The task cannot be played.
    #[error("task {task:?}: {reason}")]
    Task {
        /// Which task.
        task: TaskId,
        /// Why not.
        reason: String,
    },
    /// The threads are gone.
    #[error("the engine's threads ended early")]
    EngineStopped,
}

/// How many versions are kept unpacked: the one that is played, the next, and an exam's.
const KEPT_VERSIONS: usize = 4;

/// After how long a task is tried again whose weights could not be had.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Plays tasks from the bus until told to stop; what is unfinished then goes to others.
///
/// # Errors
/// Any [`Error`]: a task that fails is a fault, never a rollout.
pub async fn run(config: Config, bus: Arc<dyn Bus>, shutdown: CancellationToken) -> Result<Summary, Error> {
    let (engine, groups) = Engine::start(config);
    let actor = Actor {
        bus,
        engine,
        groups,
        max_rollouts: 2 * config.num_slots.max(1),
        held: Vec::new(),
        versions: VecDeque::new(),
        summary: Summary::default(),
    };
    actor.run(shutdown).await
}

struct Actor {
    bus: Arc<dyn Bus>,
    engine: Engine,
    groups: GroupReceiver,
    /// Rollouts that are taken on at a time: those in slots, and as many to follow. What others could play is left to them.
    max_rollouts: usize,
    /// Tasks that are being played.
    held: Vec<Delivery<Task>>,
    versions: VecDeque<(Digest, Arc<PackedWeights>)>,
    summary: Summary,
}

impl Actor {
    async fn run(mut self, shutdown: CancellationToken) -> Result<Summary, Error> {
        let bus = self.bus.clone();
        let mut keep = tokio::time::interval(bus.keep_every());
        loop {
            let has_room = self.num_rollouts() < self.max_rollouts;
            tokio::select! {
                () = shutdown.cancelled() => break,
                group = self.groups.recv() => self.publish(group.ok_or(Error::EngineStopped)??).await?,
                task = bus.next_task(), if has_room => self.begin(task?).await?,
                _ = keep.tick() => self.keep().await?,
            }
        }
        for task in &self.held {
            task.hand_back(Duration::ZERO).await?;
        }
        Ok(self.summary)
    }

    fn num_rollouts(&self) -> usize {
        self.held.iter().map(|task| task.message.body.num_rollouts as usize).sum()
    }

    async fn begin(&mut self, task: Delivery<Task>) -> Result<(), Error> {
        let body = &task.message.body;
        if self.held.iter().any(|held| held.message.body == *body) {
            // Its group is on the way.
            return Ok(task.acknowledge().await?);
        }
        match self.weights(body.weights).await {
            Ok(weights) => {
                self.engine.submit(body.clone(), weights)?;
                self.held.push(task);
            }
            Err(error @ (Error::Bus(bus::Error::NoWeights { .. }) | Error::Weights { .. })) => {
                tracing::warn!(%error, "a task waits");
                task.hand_back(RETRY_PAUSE).await?;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Sends a group on its way; only then is its task done.
    async fn publish(&mut self, group: Group) -> Result<(), Error> {
        let Some(index) = self.held.iter().position(|held| held.message.body == group.task) else { return Ok(()) };
        let task = self.held.swap_remove(index);
        self.summary.num_groups += 1;
        self.summary.num_tokens += group.rollouts.iter().map(|rollout| rollout.tokens.len() as u64).sum::<u64>();
        self.bus.publish_group(task.message.reply(group)).await?;
        Ok(task.acknowledge().await?)
    }

    /// Says of every task that it is still being played.
    async fn keep(&self) -> Result<(), Error> {
        for task in &self.held {
            task.keep().await?;
        }
        Ok(())
    }

    async fn weights(&mut self, digest: Digest) -> Result<Arc<PackedWeights>, Error> {
        if let Some((_, weights)) = self.versions.iter().find(|(known, _)| *known == digest) {
            return Ok(weights.clone());
        }
        let bytes = self.bus.get_weights(digest).await?;
        let weights = Arc::new(unpack(digest, &bytes)?);
        self.versions.push_front((digest, weights.clone()));
        self.versions.truncate(KEPT_VERSIONS);
        Ok(weights)
    }
}

/// Reads and packs weights, and checks that they are the ones that were asked for.
///
/// # Errors
/// [`Error::Weights`].
pub fn unpack(digest: Digest, bytes: &[u8]) -> Result<PackedWeights, Error> {
    let refuse = |reason: String| Error::Weights { expected: digest, reason };
    let (config, sets) = read_weights(bytes, &[""]).map_err(|error| refuse(error.to_string()))?;
    let got = sets[0].digest(&config);
    if got != digest {
        return Err(refuse(format!("the store holds {got:?} under this name")));
    }
    PackedWeights::new(&config, &sets[0]).map_err(|error| refuse(error.to_string()))
}
