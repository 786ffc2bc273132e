//! Where a checkpoint stands in the journal, and what a run needs of the records before.

use std::collections::BTreeSet;
use std::path::Path;

use proto::TaskId;
use serde::{Deserialize, Serialize};

use crate::audit::Trained;
use crate::checkpoint::{list_checkpoints, load_point};
use crate::journal::{BanRecord, EvalRecord, GroupRecord, Place, Record, forget_before};
use crate::{Control, Error};

/// What the records of a journal say of its run, besides the groups.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// The last step; 0 before the first.
    pub step: u64,
    /// Wall time of the run at that step.
    pub elapsed_ms: u64,
    /// The end of the run, where the clock fixed it.
    pub control: Option<Control>,
    /// Exam results.
    pub evals: Vec<EvalRecord>,
    /// Actors that are banned.
    pub bans: Vec<BanRecord>,
    /// How often an actor said otherwise of a task that was done.
    pub num_disputes: u64,
    /// Tasks on which actors disagreed, and nobody has decided.
    pub(crate) disputed: BTreeSet<TaskId>,
}

/// A place in the journal, and all that a run needs of the records before it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Point {
    /// The record before; absent at the beginning of the journal.
    pub(crate) place: Option<Place>,
    pub(crate) known: Known,
    /// What was trained on.
    pub(crate) trained: Trained,
    /// Groups that are not folded, in order of arrival.
    pub(crate) received: Vec<GroupRecord>,
}

impl Known {
    /// Takes in the next record.
    pub fn take(&mut self, record: &Record, is_reproducible: bool) {
        match record {
            Record::Manifest(_) | Record::Opening(_) => {}
            Record::Group(group) => drop(self.disputed.remove(&group.task())),
            Record::Eval(eval) => self.evals.push(eval.clone()),
            Record::Step(done) => {
                if !is_reproducible {
                    // Exams from here on were of steps that are played anew.
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

/// Removes the segments of a journal that every checkpoint has passed.
pub(crate) fn forget_passed(journal: &Path, checkpoints: &Path) -> Result<(), Error> {
    let points = list_checkpoints(checkpoints)?.into_iter().map(|checkpoint| load_point(&checkpoint));
    // A checkpoint that cannot be read may need anything.
    let needed = points.map(|point| point.ok()?.place.map(|place| place.segment())).min().flatten();
    needed.map_or(Ok(()), |needed| forget_before(journal, needed))
}
