use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use proto::{Problem, ProblemOrigin, Request, ScoredGroup, TaskId, TokenId, Verdict};

use crate::journal::{EvalRecord, RecordError};
use crate::waiting::Waiting;
use crate::{Control, StepReport, Totals};

/// A callback that receives events as they happen. A checkpoint is written after the callback has returned for all earlier
/// events. An error ends the run in its current state.
pub type Observer<'a> =
    &'a mut (dyn FnMut(Event) -> Result<(), Box<dyn std::error::Error + Send + Sync>> + Send + Sync);

/// An event of a run.
#[derive(Clone, Debug)]
pub enum Event {
    /// A run is resumed.
    Resumed {
        /// Number of the state from which it resumes.
        step: u64,
        /// The end of the run, if it is fixed.
        control: Option<Control>,
        /// Bytes of a bad record that were removed from the journal's end.
        truncated_bytes: u64,
        /// Records in the middle of the journal that could not be read.
        unreadable: Vec<RecordError>,
        /// Exam results in the journal; these exams are not repeated.
        evals: Vec<EvalRecord>,
        /// Banned actors.
        banned: Vec<String>,
    },
    /// A checkpoint is damaged or does not match the journal; an earlier one is used.
    CheckpointRefused(String),
    /// A step is done.
    Step(Box<StepEvent>),
    /// An exam is over.
    Eval(EvalRecord),
    /// The clock fixed the end of the run.
    Control(Control),
    /// A checkpoint is about to be written: the observer must make durable what it keeps of earlier events.
    Saving,
    /// A checkpoint is written.
    Checkpoint(PathBuf),
    /// The run has made no progress for a while.
    Waiting(Box<Waiting>),
    /// An actor is banned: its later results are ignored.
    Ban(Box<Ban>),
}

/// Why an actor is banned, and how its groups had been used by then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ban {
    /// The actor.
    pub player: String,
    /// The task that exposed it.
    pub task: TaskId,
    /// What was wrong with its group of that task.
    pub reason: String,
    /// Number of its groups that were trained on; this is not undone.
    pub num_trained: u64,
    /// The first and the last step that trained on them.
    pub steps: (u64, u64),
    /// Number of its groups that were not trained on, and are played again.
    pub num_again: usize,
}

impl fmt::Display for Ban {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ban { player, task: TaskId { batch, index, .. }, reason, num_trained, steps: (first, last), num_again } =
            self;
        write!(formatter, "{player} is banned for its group of task {index} of batch {batch}: {reason}; ")?;
        match num_trained {
            0 => write!(formatter, "none of its groups was trained on")?,
            _ => write!(formatter, "{num_trained} of its groups were trained on, in steps {first} to {last}")?,
        }
        write!(formatter, "; {num_again} will be played again")
    }
}

/// A finished step, for display.
#[derive(Clone, Debug)]
pub struct StepEvent {
    /// The report of the step.
    pub report: StepReport,
    /// Wall time since the start of the run, earlier processes included.
    pub elapsed: Duration,
    /// How long the learner waited for the batch and for exams.
    pub waited: Duration,
    /// How long it trained.
    pub trained: Duration,
    /// Totals so far.
    pub totals: Totals,
    /// Number of tasks on which two actors agreed in this process, so far.
    pub num_audited: u64,
    /// Number of groups of a free-running run that came too late, since this process began.
    pub num_stale: u64,
    /// A sample of the batch.
    pub sample: Option<Sample>,
}

/// A problem of a batch and an answer to it.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The problem.
    pub problem: Problem,
    /// Who wrote it.
    pub origin: ProblemOrigin,
    /// The answer.
    pub answer: Vec<TokenId>,
    /// The verdict on the answer.
    pub verdict: Verdict,
}

/// Picks a problem of the batch, preferably one that the policy wrote, with a correct answer if there is one.
pub(crate) fn sample(groups: &[ScoredGroup]) -> Option<Sample> {
    let posed = groups.iter().filter_map(|scored| match &scored.group.task.request {
        Request::Solve { problem, origin, .. } => Some((scored, problem, *origin)),
        Request::Propose { .. } => None,
    });
    // Origins sort in this order: problems that the run made itself come first.
    let (scored, problem, origin) = posed.min_by_key(|(_, _, origin)| *origin)?;
    let solved = scored.verdicts.iter().position(|verdict| *verdict == Verdict::Correct).unwrap_or(0);
    let answer = scored.group.rollouts.get(solved)?.tokens.clone();
    Some(Sample { problem: problem.clone(), origin, answer, verdict: scored.verdicts[solved] })
}
