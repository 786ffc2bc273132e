//! The actor: turns tasks into groups of rollouts. Tokens only: it never sees a key or an expected answer.
//!
//! [`run`] takes tasks from the bus and hands their rollouts to the threads of an [`Engine`], which play
//! many tasks at once and return each group when its last rollout ends. What a rollout says depends on its task, its
//! number and the weights, and on nothing else: not on slots, threads, or what is played beside it.

pub mod engine;

use std::collections::VecDeque;
use std::sync::Arc;

use bus::Bus;
use policy::{PackedWeights, read_weights};
use proto::{Digest, TaskId};
use tokio_util::sync::CancellationToken;

use engine::Engine;

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

/// Plays tasks from the bus until told to stop.
///
/// # Errors
/// Any [`Error`]: a task that fails is a fault, never a rollout.
pub async fn run(config: Config, bus: Arc<dyn Bus>, shutdown: CancellationToken) -> Result<Summary, Error> {
    let (engine, mut groups) = Engine::start(config);
    let mut versions: VecDeque<(Digest, Arc<PackedWeights>)> = VecDeque::new();
    let mut summary = Summary::default();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(summary),
            group = groups.recv() => {
                let group = group.ok_or(Error::EngineStopped)??;
                summary.num_groups += 1;
                summary.num_tokens += group.rollouts.iter().map(|rollout| rollout.tokens.len() as u64).sum::<u64>();
                bus.publish_group(group).await?;
            }
            task = bus.next_task() => {
                let task = task?;
                let weights = weights_of(bus.as_ref(), task.weights, &mut versions).await?;
                engine.submit(task, weights)?;
            }
        }
    }
}

async fn weights_of(
    bus: &dyn Bus,
    digest: Digest,
    versions: &mut VecDeque<(Digest, Arc<PackedWeights>)>,
) -> Result<Arc<PackedWeights>, Error> {
    if let Some((_, weights)) = versions.iter().find(|(known, _)| *known == digest) {
        return Ok(weights.clone());
    }
    let bytes = bus.get_weights(digest).await?;
    let weights = Arc::new(unpack(digest, &bytes)?);
    versions.push_front((digest, weights.clone()));
    versions.truncate(KEPT_VERSIONS);
    Ok(weights)
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
