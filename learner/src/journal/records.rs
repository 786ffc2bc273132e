use std::collections::BTreeSet;

use proto::{Digest, ScoredGroup, TaskId};
use serde::{Deserialize, Serialize};

use crate::{Control, Error, Manifest};

/// One entry of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[expect(clippy::large_enum_variant, reason = "most records are groups, the largest")]
pub enum Record {
    /// The manifest of the run; the first record.
    Manifest(Manifest),
    /// A scored group, in order of arrival; if a task has several, the last counts.
    Group(GroupRecord),
    /// An exam result.
    Eval(EvalRecord),
    /// A finished step.
    Step(StepRecord),
    /// The end of the run as the clock fixed it; decided once.
    Control(Control),
    /// A banned actor: its later results are ignored.
    Ban(BanRecord),
    /// A different group has arrived for a task of an unsealed batch, from an actor that may be right. The recorded group no
    /// longer counts.
    Dispute(TaskId),
    /// The first record of a segment that was begun at a checkpoint. It replaces the segments before it, which may be gone.
    Opening(Box<Opening>),
}

impl Record {
    /// Returns the manifest, if a journal may begin with this record.
    pub fn manifest(&self) -> Option<&Manifest> {
        match self {
            Record::Manifest(manifest) => Some(manifest),
            Record::Opening(opening) => Some(&opening.manifest),
            _ => None,
        }
    }
}

/// The summary that replaces the segments before one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Opening {
    /// The manifest of the run.
    pub manifest: Manifest,
    /// Summary of their records, except the groups.
    pub known: Known,
}

/// A received group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// The actor that played it; empty where actors have no names.
    pub played_by: String,
    /// The group, with its verdicts.
    pub scored: ScoredGroup,
    /// Its digest in the format version in which it was written, if that is an older one.
    #[serde(skip)]
    pub(crate) written_as: Option<Digest>,
}

impl GroupRecord {
    /// Creates the record of a group and the actor that played it.
    pub fn new(played_by: String, scored: ScoredGroup) -> GroupRecord {
        GroupRecord { played_by, scored, written_as: None }
    }

    /// Returns the digest by which a step names the group.
    pub fn name(&self) -> Digest {
        self.written_as.unwrap_or_else(|| Digest::of(&self.scored))
    }

    pub(crate) fn task(&self) -> TaskId {
        self.scored.group.task.id
    }

    /// Hashes the actor's output: groups with the same digest are identical byte for byte.
    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.scored.group)
    }

    /// Checks that two copies of a group have the same verdicts.
    pub(crate) fn expect_same_verdicts(&self, other: &GroupRecord) -> Result<(), Error> {
        let [first, second] = [self, other].map(|group| Digest::of(&group.scored));
        if first == second || self.digest() != other.digest() {
            return Ok(());
        }
        let TaskId { batch, index, .. } = self.task();
        let [first, second] = [first.short(), second.short()];
        let reason = format!("task {index}: verdicts on one group differ: {first} came first, then {second}");
        Err(Error::Integrity { what: "group", step: batch, reason })
    }
}

/// The ban of an actor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BanRecord {
    /// Its name.
    pub player: String,
    /// Tasks of unsealed batches for which its groups no longer count.
    pub tasks: Vec<TaskId>,
}

/// The result of an exam with the averaged weights of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Number of the state whose weights were evaluated.
    pub step: u64,
    /// Name of the exam.
    pub exam: String,
    /// Number of problems solved, greedily, in one attempt.
    pub num_correct: u64,
    /// Number of problems of the exam.
    pub num_problems: u64,
}

/// The result of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Number of the state that the step produced.
    pub step: u64,
    /// Digests of the groups that were folded, in index order.
    pub groups: Vec<Digest>,
    /// Hash of the weights.
    pub weights_digest: Digest,
    /// Hash of the state.
    pub state_digest: Digest,
    /// Wall time of the run so far; never part of a digest.
    pub elapsed_ms: u64,
}

/// Summary of a journal's records, except the groups.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// The last step; 0 before the first.
    pub step: u64,
    /// Wall time of the run at that step.
    pub elapsed_ms: u64,
    /// The end of the run, if the clock fixed it.
    pub control: Option<Control>,
    /// Exam results.
    pub evals: Vec<EvalRecord>,
    /// Bans of actors.
    pub bans: Vec<BanRecord>,
    /// Number of times an actor contradicted the group of a finished task.
    pub num_disputes: u64,
    /// Tasks on which actors disagree, without a decision yet.
    pub(crate) disputed: BTreeSet<TaskId>,
}

impl Known {
    /// Updates the summary with the next record.
    pub fn take(&mut self, record: &Record, is_reproducible: bool) {
        match record {
            Record::Manifest(_) | Record::Opening(_) => {}
            Record::Group(group) => drop(self.disputed.remove(&group.task())),
            Record::Eval(eval) => self.evals.push(eval.clone()),
            Record::Step(done) => {
                if !is_reproducible {
                    // Exam results from this step on belong to steps that are played again.
                    self.evals.retain(|eval| eval.step < done.step);
                }
                (self.step, self.elapsed_ms) = (done.step, done.elapsed_ms);
            }
            Record::Control(control) => self.control = Some(*control),
            Record::Ban(ban) => self.bans.push(ban.clone()),
            Record::Dispute(task) => {
                self.num_disputes += 1;
                self.disputed.insert(*task);
            }
        }
    }
}
