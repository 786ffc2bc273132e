//! The actor: turns tasks into groups of rollouts. Tokens only: it never sees a key or an expected answer.
//!
//! [`run`] takes tasks from the bus and hands their rollouts to the threads of an [`Engine`], which play
//! many tasks at once and return each group when its last rollout ends. What a rollout says depends on its task, its
//! number and the weights, and on nothing else: not on slots, threads, or what is played beside it.

pub mod engine;

use std::collections::{BTreeSet, VecDeque};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use bus::{BEAT_EVERY, Bus, Delivery, run_blocking};
use language::Language;
use policy::{Backend, Device, Weights, read_weights};
use proto::{Digest, Group, Role, Task, TaskId, Version};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use engine::{Engine, GroupReceiver, LoadedVersion};

/// How an actor uses its machine. But for the device, it changes when rollouts come, never what they say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the policy plays.
    pub device: Device,
    /// Threads that play on the CPU; a device of candle has threads of its own.
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
    /// The device failed.
    #[error("thread {thread}: {source}")]
    Policy {
        /// Which thread it failed in.
        thread: String,
        /// How.
        source: policy::Error,
    },
    /// There is no such device.
    #[error(transparent)]
    Device(policy::Error),
    /// A thread panicked; what it was playing is lost.
    #[error("thread {thread} panicked: {text}")]
    Panicked {
        /// Which thread.
        thread: String,
        /// What it said.
        text: String,
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
pub async fn run(
    config: Config,
    language: Arc<dyn Language>,
    bus: Arc<dyn Bus>,
    shutdown: CancellationToken,
) -> Result<Summary, Error> {
    let backend = config.device.open().map_err(Error::Device)?;
    let (engine, groups) = Engine::start(config, language);
    let actor = Actor {
        bus,
        backend,
        engine,
        groups,
        max_rollouts: 2 * config.num_slots.max(1),
        held: Vec::new(),
        parked: Vec::new(),
        versions: VecDeque::new(),
        fetches: JoinSet::new(),
        fetching: BTreeSet::new(),
        announced: None,
        coming: None,
        newest: None,
        refused: None,
        summary: Summary::default(),
    };
    actor.run(shutdown).await
}

struct Actor {
    bus: Arc<dyn Bus>,
    backend: Backend,
    engine: Engine,
    groups: GroupReceiver,
    /// Rollouts that are taken on at a time: those in slots, and as many to follow. What others could play is left to them.
    max_rollouts: usize,
    /// Tasks that are being played, and then those whose weights are on the way.
    held: Vec<Delivery<Task>>,
    parked: Vec<Delivery<Task>>,
    versions: VecDeque<(Digest, Weights)>,
    fetches: JoinSet<(Digest, Result<Weights, Error>)>,
    fetching: BTreeSet<Digest>,
    /// Of a free-running run: the weights that were announced last, those of them that are on the way, and the newest that are
    /// here.
    announced: Option<Version>,
    coming: Option<Version>,
    newest: Option<LoadedVersion>,
    /// The weights that could not be had last, and when that was.
    refused: Option<(Digest, Instant)>,
    summary: Summary,
}

impl Actor {
    async fn run(mut self, shutdown: CancellationToken) -> Result<Summary, Error> {
        let bus = self.bus.clone();
        let mut beats = tokio::time::interval(BEAT_EVERY);
        // Kept over the turns of the loop: a wait that is begun anew each time may never end.
        let (mut next, mut versions) = (bus.next_task(), bus.next_version());
        loop {
            let has_room = self.num_rollouts() < self.max_rollouts;
            tokio::select! {
                () = shutdown.cancelled() => break,
                group = self.groups.recv() => {
                    let group = group.ok_or(Error::EngineStopped)??;
                    tokio::select! {
                        // Unpublished, it is handed back with the rest.
                        () = shutdown.cancelled() => break,
                        published = self.publish(group) => published?,
                    }
                }
                Some(fetched) = self.fetches.join_next() => {
                    let (digest, weights) = fetched.unwrap_or_else(|error| resume_unwind(error.into_panic()));
                    self.arrived(digest, weights).await?;
                }
                task = &mut next, if has_room => {
                    next = bus.next_task();
                    self.begin(task?).await?;
                }
                version = &mut versions => {
                    versions = bus.next_version();
                    self.announced = Some(version?);
                    self.play_newest();
                }
                _ = beats.tick() => {
                    let tasks = self.taken().map(|task| task.message.body.id).collect();
                    bus.beat(Role::Actor, tasks).await?;
                }
            }
        }
        drop((next, versions));
        for task in self.taken() {
            task.hand_back(Duration::ZERO).await?;
        }
        bus.leave().await;
        Ok(self.summary)
    }

    fn taken(&self) -> impl Iterator<Item = &Delivery<Task>> {
        self.held.iter().chain(&self.parked)
    }

    fn num_rollouts(&self) -> usize {
        self.taken().map(|task| task.message.body.num_rollouts as usize).sum()
    }

    async fn begin(&mut self, task: Delivery<Task>) -> Result<(), Error> {
        let body = &task.message.body;
        let digest = body.weights;
        let mut taken = self.held.iter_mut().chain(&mut self.parked);
        if let Some(taken) = taken.find(|taken| taken.message.body == *body) {
            // Its group is on the way. The same message again takes the place of the first: what is said of one is said of both.
            if taken.message.envelope == task.message.envelope {
                *taken = task;
                return Ok(());
            }
            return Ok(task.acknowledge().await?);
        }
        let own = self.weights(digest);
        let own = own.map(|weights| LoadedVersion { policy_version: body.policy_version, weights });
        let newer = self.newest.as_ref().filter(|newest| newest.policy_version > body.policy_version);
        if let Some(version) = newer.filter(|_| body.free_running).cloned().or(own) {
            self.engine.submit(body.clone(), version)?;
            self.held.push(task);
            return Ok(());
        }
        if self.refused.is_some_and(|(refused, when)| refused == digest && when.elapsed() < RETRY_PAUSE) {
            return Ok(task.hand_back(RETRY_PAUSE).await?);
        }
        self.fetch(digest);
        self.parked.push(task);
        Ok(())
    }

    /// Returns weights that are here.
    fn weights(&self, digest: Digest) -> Option<Weights> {
        self.versions.iter().find(|(known, _)| *known == digest).map(|(_, weights)| weights.clone())
    }

    fn fetch(&mut self, digest: Digest) {
        if self.fetching.insert(digest) {
            let (bus, backend) = (self.bus.clone(), self.backend.clone());
            self.fetches.spawn(async move { (digest, fetch(bus.as_ref(), digest, backend).await) });
        }
    }

    /// Has what is free-running played by the weights that were announced last, as soon as they are here. They are fetched one
    /// version at a time: where that takes longer than a step, those that were announced meanwhile are skipped, not these.
    fn play_newest(&mut self) {
        let Some(Version { policy_version, weights }) = self.announced else { return };
        if let Some(weights) = self.weights(weights) {
            self.play_from_now_on(LoadedVersion { policy_version, weights });
        } else if self.coming.is_none() {
            self.coming = self.announced;
            self.fetch(weights);
        }
    }

    fn play_from_now_on(&mut self, newest: LoadedVersion) {
        self.engine.announce(newest.clone());
        self.newest = Some(newest);
    }

    /// Plays the tasks that waited for a version; without it, they wait elsewhere.
    async fn arrived(&mut self, digest: Digest, weights: Result<Weights, Error>) -> Result<(), Error> {
        self.fetching.remove(&digest);
        let came = self.coming.take_if(|coming| coming.weights == digest);
        let waited = self.parked.extract_if(.., |task| task.message.body.weights == digest).collect::<Vec<_>>();
        match weights {
            Ok(weights) => {
                for task in &waited {
                    let policy_version = task.message.body.policy_version;
                    let version = LoadedVersion { policy_version, weights: weights.clone() };
                    self.engine.submit(task.message.body.clone(), version)?;
                }
                self.held.extend(waited);
                if let Some(Version { policy_version, .. }) = came {
                    self.play_from_now_on(LoadedVersion { policy_version, weights: weights.clone() });
                }
                self.versions.push_front((digest, weights));
                self.versions.truncate(KEPT_VERSIONS);
                // There may be newer ones by now.
                self.play_newest();
            }
            Err(
                error @ (Error::Bus(bus::Error::NoWeights { .. } | bus::Error::BadWeights { .. })
                | Error::Weights { .. }),
            ) => {
                // The learner stores them again, or announces others; until then what is there already is played.
                if !waited.is_empty() || self.refused.is_none_or(|(refused, _)| refused != digest) {
                    tracing::warn!("{} tasks wait: {error}", waited.len());
                }
                self.refused = Some((digest, Instant::now()));
                for task in waited {
                    task.hand_back(RETRY_PAUSE).await?;
                }
                if self.announced.is_some_and(|announced| announced.weights != digest) {
                    self.play_newest();
                }
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Sends a group on its way; only then is its task done.
    async fn publish(&mut self, group: Group) -> Result<(), Error> {
        let Some(index) = self.held.iter().position(|held| held.message.body == group.task) else { return Ok(()) };
        let num_tokens = group.rollouts.iter().map(|rollout| rollout.tokens.len() as u64).sum::<u64>();
        self.bus.publish_group(self.held[index].message.reply(group)).await?;
        let task = self.held.swap_remove(index);
        self.summary.num_groups += 1;
        self.summary.num_tokens += num_tokens;
        Ok(task.acknowledge().await?)
    }
}

async fn fetch(bus: &dyn Bus, digest: Digest, backend: Backend) -> Result<Weights, Error> {
    let bytes = bus.get_weights(digest).await?;
    // Large weights take a while, in which what is being played must be kept alive.
    run_blocking(move || load(digest, &bytes, &backend)).await
}

/// Reads weights, checks that they are the ones that were asked for, and places them where they are played.
///
/// # Errors
/// [`Error::Weights`]; [`Error::Device`] when the device has no room.
pub fn load(digest: Digest, bytes: &[u8], backend: &Backend) -> Result<Weights, Error> {
    let refuse = |reason: String| Error::Weights { expected: digest, reason };
    let (config, sets) = read_weights(bytes, &[""]).map_err(|error| refuse(error.to_string()))?;
    let got = sets[0].digest(&config);
    if got != digest {
        return Err(refuse(format!("the store holds {got:?} under this name")));
    }
    backend.load(&config, &sets[0]).map_err(Error::Device)
}
