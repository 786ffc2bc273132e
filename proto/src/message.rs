use serde::{Deserialize, Serialize};

use crate::{Digest, TaskId};

/// Delivery metadata of a message. It is not part of the body: it is never digested, folded or compared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// Fencing token of the learner that asked for the task: each learner process of a run has a larger term than the one before.
    pub term: u64,
    /// How many times that process had issued the task before.
    pub issue: u32,
    /// Actors that may not play this copy of the task because they have played it already: the copy is an audit. Empty otherwise.
    pub excluded_actors: Vec<String>,
    /// The actor that played the group, as identified by the bus, not by the actor; empty if actors have no names.
    pub played_by: String,
}

/// A message on a bus: a body, which is a function of its task, in an envelope.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message<T> {
    /// Accompanies the task from the learner to actor and verifier, and back.
    pub envelope: Envelope,
    /// The content.
    pub body: T,
}

impl<T> Message<T> {
    /// Returns a reply to this message, in the same envelope.
    pub fn reply<U>(&self, body: U) -> Message<U> {
        Message { envelope: self.envelope.clone(), body }
    }
}

/// Identifies weights of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The step after which they were published.
    pub policy_version: u64,
    /// The digest under which they are stored.
    pub weights: Digest,
}

/// A worker's heartbeat. It is used only for reports to people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {
    /// The name of the worker.
    pub worker: String,
    /// The role of the worker.
    pub role: Role,
    /// The tasks that it has taken and not answered yet.
    pub tasks: Vec<TaskId>,
}

/// A verifier's notice that a group has no verdicts. If the notice is lost, the task is issued again some time later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The envelope of the group.
    pub envelope: Envelope,
    /// The task that the group answers.
    pub task: TaskId,
    /// Whether the group or the checker is at fault.
    pub cause: RefusalCause,
    /// A description of the fault.
    pub reason: String,
}

/// Why a group has no verdicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalCause {
    /// The group cannot be judged; it is set aside.
    Group,
    /// The checker did not answer; the group is judged later.
    CheckerUnavailable,
}

/// The role of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// It plays tasks.
    Actor,
    /// It judges groups.
    Verifier,
}
