use serde::{Deserialize, Serialize};

use crate::{Digest, TaskId};

/// What travels around a message and is no part of what it says: never digested, folded or compared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// Which life of the learner asked for the task; grows from one life to the next.
    pub epoch: u64,
    /// How often this life had asked for it before.
    pub issue: u32,
    /// Actors that may not play this copy of the task, for they have played it: the copy is an audit. Empty otherwise.
    pub not_by: Vec<String>,
    /// The actor that played the group, as the bus knows it, whatever the actor says; empty where actors have no names.
    pub played_by: String,
}

/// A message on a bus: a body, which is a function of its task, in an envelope.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message<T> {
    /// Goes with the task from the learner to actor and verifier, and back.
    pub envelope: Envelope,
    /// What is said.
    pub body: T,
}

impl<T> Message<T> {
    /// Puts what answers this message in the same envelope.
    pub fn reply<U>(&self, body: U) -> Message<U> {
        Message { envelope: self.envelope.clone(), body }
    }
}

/// Names weights of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The step after which they were published.
    pub policy_version: u64,
    /// What they are stored under.
    pub weights: Digest,
}

/// A worker's sign of life: nothing depends on it but what people are told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {
    /// Which worker.
    pub worker: String,
    /// What it is.
    pub role: Role,
    /// What it has taken and not answered yet.
    pub tasks: Vec<TaskId>,
}

/// A verifier's word that nothing can be made of a group. Where it is lost, its task is asked for again some time later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The group's.
    pub envelope: Envelope,
    /// Whose group it is.
    pub task: TaskId,
    /// What is wrong with it.
    pub reason: String,
}

/// What a worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// It plays.
    Actor,
    /// It judges.
    Verifier,
}
