use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use proto::{Problem, ProblemOrigin, Request, ScoredGroup, TaskId, TokenId, Verdict};

use crate::journal::{EvalRecord, RecordError};
use crate::waiting::Waiting;
use crate::{Control, StepReport, Totals};

/// Whoever is told what happens, when it happens: a checkpoint is written when all before it has been taken in. A failure ends
/// the run as it is.
pub type Observer<'a> =
    &'a mut (dyn FnMut(Event) -> Result<(), Box<dyn std::error::Error + Send + Sync>> + Send + Sync);

/// Something to show.
#[derive(Clone, Debug)]
pub enum Event {
    /// A run goes on.
    Resumed {
        /// From which state.
        step: u64,
        /// The end of the run, where it is fixed.
        control: Option<Control>,
        /// Bytes of a bad record that were removed from the journal's end.
        truncated_bytes: u64,
        /// Records in the middle of the journal that could not be read.
        unreadable: Vec<RecordError>,
        /// Exams that are in the journal and will not be sat again.
        evals: Vec<EvalRecord>,
        /// Actors that are banned.
        banned: Vec<String>,
    },
    /// A checkpoint is broken, or of another course than the journal's; an earlier one is used.
    CheckpointRefused(String),
    /// A step is done.
    Step(Box<StepEvent>),
    /// An exam is over.
    Eval(EvalRecord),
    /// The clock fixed the end of the run.
    Control(Control),
    /// A checkpoint is about to be written: what was to be kept of the events before it must be on the disk.
    Saving,
    /// A checkpoint is written.
    Checkpoint(PathBuf),
    /// Nothing has come for a while.
    Waiting(Box<Waiting>),
    /// An actor is believed nothing from now on.
    Ban(Box<Ban>),
}

/// How an actor gave itself away, and what it had done by then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ban {
    /// The actor.
    pub player: String,
    /// Which task it was.
    pub task: TaskId,
    /// What it said of that, and what others said.
    pub reason: String,
    /// How many of its groups were trained on; that stays.
    pub num_trained: u64,
    /// The first and the last step that trained on them.
    pub steps: (u64, u64),
    /// How many of its groups were not, and are played again.
    pub num_again: usize,
}

impl fmt::Display for Ban {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ban { player, task: TaskId { batch, index, .. }, reason, num_trained, steps: (first, last), num_again } =
            self;
        write!(formatter, "{player} is banned: its group of task {index} of batch {batch}: {reason}; ")?;
        match num_trained {
            0 => write!(formatter, "none of its groups was trained on")?,
            _ => write!(formatter, "{num_trained} of its groups were trained on, in steps {first} to {last}")?,
        }
        write!(formatter, "; {num_again} are played again")
    }
}

/// A step, as it is shown.
#[derive(Clone, Debug)]
pub struct StepEvent {
    /// What it did.
    pub report: StepReport,
    /// Since the start of the run, earlier processes included.
    pub elapsed: Duration,
    /// How long the learner waited for the batch and for exams.
    pub waited: Duration,
    /// How long it trained.
    pub trained: Duration,
    /// Counts so far.
    pub totals: Totals,
    /// Tasks of which this process had two actors agree, so far.
    pub num_audited: u64,
    /// Groups of a free-running run that came too late, since this process began.
    pub num_stale: u64,
    /// A look into the batch.
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
    /// What it is worth.
    pub verdict: Verdict,
}

/// Picks a problem of the batch, one that the policy wrote if there is one, with a right answer if there is one.
pub(crate) fn sample(groups: &[ScoredGroup]) -> Option<Sample> {
    let posed = groups.iter().filter_map(|scored| match &scored.group.task.request {
        Request::Solve { problem, origin, .. } => Some((scored, problem, *origin)),
        Request::Propose { .. } => None,
    });
    // Origins are in this order: what the run made itself comes first.
    let (scored, problem, origin) = posed.min_by_key(|(_, _, origin)| *origin)?;
    let solved = scored.verdicts.iter().position(|verdict| *verdict == Verdict::Correct).unwrap_or(0);
    let answer = scored.group.rollouts.get(solved)?.tokens.clone();
    Some(Sample { problem: problem.clone(), origin, answer, verdict: scored.verdicts[solved] })
}
