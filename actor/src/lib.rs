//! The actor: turns tasks into groups of rollouts. It handles only tokens, never a key or an expected answer.
//!
//! [`run`] takes tasks from the bus and hands their rollouts to the threads of an [`Engine`], which play many tasks at once and
//! return each group when its last rollout ends. A rollout's content depends only on its task, its number and the weights: not on
//! slots, threads, or other rollouts.

pub mod engine;

use std::collections::{BTreeSet, VecDeque};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use bus::{BEAT_EVERY, Bus, Delivery, run_blocking};
use language::Language;
use policy::{Backend, Weights, read_weights};
use proto::{Digest, Group, Role, Task, TaskId, Version};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use engine::{Engine, GroupReceiver, LoadedVersion};

/// How an actor uses its machine. Except for the device, the settings change when rollouts finish, never their content.
#[derive(Clone, Debug)]
pub struct Config {
    /// The device that the policy plays on, with the frozen weights there if the run trains an adapter.
    pub backend: Backend,
    /// Threads that play on the CPU; a candle device has its own threads.
    pub num_threads: usize,
    /// Sequences in flight, over all threads.
    pub num_slots: usize,
}

/// Counts of an actor's work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Groups returned.
    pub num_groups: u64,
    /// Tokens in them.
    pub num_tokens: u64,
}

/// Errors of an actor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bus failed.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// The weights do not match their digest, or cannot be read.
    #[error("weights {expected:?}: {reason}")]
    Weights {
        /// The digest that the task names.
        expected: Digest,
        /// Why they are rejected.
        reason: String,
    },
    /// The task cannot be played.
    #[error("task {task:?}: {reason}")]
    Task {
        /// The task.
        task: TaskId,
        /// Why it cannot be played.
        reason: String,
    },
    /// The device failed.
    #[error("thread {thread}: {source}")]
    Policy {
        /// The thread in which it failed.
        thread: String,
        /// The cause.
        source: policy::Error,
    },
    /// The device cannot hold the weights, or not these weights.
    #[error(transparent)]
    Device(policy::Error),
    /// A thread panicked; the rollouts that it was playing are lost.
    #[error("thread {thread} panicked: {text}")]
    Panicked {
        /// The thread.
        thread: String,
        /// The panic message.
        text: String,
    },
    /// The threads are gone.
    #[error("the engine's threads ended unexpectedly")]
    EngineStopped,
}

/// How many bytes of weights are kept loaded for tasks to come, besides the newest version and those of the tasks at hand.
const KEPT_BYTES: usize = 64 << 20;

/// Delay before a task whose weights were unavailable is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Plays tasks from the bus until told to stop, then hands unfinished tasks back for other actors.
///
/// # Errors
/// Any [`Error`]: a failed task is a fault, never a rollout.
pub async fn run(
    config: Config,
    language: Arc<dyn Language>,
    bus: Arc<dyn Bus>,
    shutdown: CancellationToken,
) -> Result<Summary, Error> {
    let (engine, groups) = Engine::start(config.clone(), language);
    let actor = Actor {
        bus,
        max_rollouts: 2 * config.num_slots.max(1),
        backend: config.backend,
        engine,
        groups,
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
    /// Maximum number of rollouts held at a time: those in slots, and as many to follow. The rest is left to other actors.
    max_rollouts: usize,
    /// Tasks being played (`held`), and tasks whose weights are being fetched (`parked`).
    held: Vec<Delivery<Task>>,
    parked: Vec<Delivery<Task>>,
    versions: VecDeque<(Digest, Weights)>,
    fetches: JoinSet<(Digest, Result<Weights, Error>)>,
    fetching: BTreeSet<Digest>,
    /// In a free-running run: the version announced last, the announced version that is being fetched, and the newest loaded
    /// version.
    announced: Option<Version>,
    coming: Option<Version>,
    newest: Option<LoadedVersion>,
    /// The weights whose last fetch failed, and when.
    refused: Option<(Digest, Instant)>,
    summary: Summary,
}

impl Actor {
    async fn run(mut self, shutdown: CancellationToken) -> Result<Summary, Error> {
        let bus = self.bus.clone();
        let mut beats = tokio::time::interval(BEAT_EVERY);
        // Kept across iterations: a wait that restarts in each of them may never end.
        let (mut next, mut versions) = (bus.next_task(), bus.next_version());
        loop {
            let has_room = self.num_rollouts() < self.max_rollouts;
            tokio::select! {
                () = shutdown.cancelled() => break,
                group = self.groups.recv() => {
                    let group = group.ok_or(Error::EngineStopped)??;
                    tokio::select! {
                        // The task of an unpublished group is handed back with the rest.
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
            // Its group is in work. A redelivery of the same message replaces the first: acknowledging one acknowledges both.
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

    /// Returns weights that are loaded already.
    fn weights(&self, digest: Digest) -> Option<Weights> {
        self.versions.iter().find(|(known, _)| *known == digest).map(|(_, weights)| weights.clone())
    }

    fn fetch(&mut self, digest: Digest) {
        if self.fetching.insert(digest) {
            let (bus, backend) = (self.bus.clone(), self.backend.clone());
            self.fetches.spawn(async move { (digest, fetch(bus.as_ref(), digest, backend).await) });
        }
    }

    /// Switches free-running tasks to the weights announced last, once these are loaded. Fetches one version at a time: if that
    /// takes longer than a step, the versions announced meanwhile are skipped, not the one being fetched.
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

    /// Submits the tasks that waited for a version, or hands them back if it is unavailable.
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
                let needed: BTreeSet<Digest> = self.taken().map(|task| task.message.body.weights).collect();
                let mut num_bytes = 0;
                self.versions.retain(|(known, weights)| {
                    let is_newest = num_bytes == 0;
                    num_bytes += size_of::<f32>() * weights.config().num_parameters();
                    is_newest || num_bytes <= KEPT_BYTES || needed.contains(known)
                });
                // A newer version may be announced by now.
                self.play_newest();
            }
            Err(
                error @ (Error::Bus(bus::Error::NoWeights { .. } | bus::Error::BadWeights { .. })
                | Error::Weights { .. }),
            ) => {
                // The learner stores the weights again, or announces others. Until then the actor plays loaded versions.
                if !waited.is_empty() || self.refused.is_none_or(|(refused, _)| refused != digest) {
                    tracing::warn!("could not load weights; {} tasks handed back: {error}", waited.len());
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

    /// Publishes a group, and only then acknowledges its task.
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
    // Loading large weights takes a while, and heartbeats must continue meanwhile.
    run_blocking(move || load(digest, &bytes, &backend)).await
}

/// Reads weights, checks them against the requested digest, and places them on the device.
///
/// # Errors
/// [`Error::Weights`]; [`Error::Device`] when the device has no room.
pub fn load(digest: Digest, bytes: &[u8], backend: &Backend) -> Result<Weights, Error> {
    let refuse = |reason: String| Error::Weights { expected: digest, reason };
    let (config, sets) = read_weights(bytes, &[""]).map_err(|error| refuse(error.to_string()))?;
    let got = sets[0].digest(&config);
    if got != digest {
        return Err(refuse(format!("the store returned weights with digest {got:?}")));
    }
    backend.load(&config, &sets[0]).map_err(Error::Device)
}
