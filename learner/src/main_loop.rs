mod asking;
mod exams;
mod intake;
mod open;
mod publishing;
mod saving;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, Delivery};
use policy::Backend;
use proto::{Digest, KeyedProblem, ProblemSource, ScoredGroup, TaskId, TaskKind};
use tokio::task::block_in_place;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::audit::{Audit, Audits};
use crate::event::{Event, Observer, StepEvent, sample};
use crate::journal::Known;
use crate::journal::{EvalRecord, GroupRecord, Record, StepRecord};
use crate::ledger::{Ledger, Unavailable};
use crate::point::Point;
use crate::received::Received;
use crate::waiting::{Missing, Workers, describe};
use crate::writer::Writer;
use crate::{Config, Control, Error, Fold, Manifest, Models, RunLock, Totals};

use self::exams::Sitting;
use self::publishing::Published;

pub use self::saving::KeepJournal;

/// Options of this process. They change when things happen, never what is computed.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The run directory.
    pub run_dir: PathBuf,
    /// Whether an earlier process began the run.
    pub resume: bool,
    /// Number of training threads.
    pub num_threads: usize,
    /// Wall time after which the clock ends the run, if the config does not fix the end.
    pub time_limit: Option<Duration>,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Number of checkpoints to keep.
    pub keep_checkpoints: usize,
    /// How much of the journal to keep.
    pub keep_journal: KeepJournal,
    /// Time without progress after which the run ends with an error.
    pub stall_limit: Duration,
    /// Time without progress after which `Event::Waiting` is reported, again and again.
    pub tell_after: Duration,
    /// How long a task may wait for a checker that is unavailable before the run ends.
    pub checker_limit: Duration,
    /// Fencing token of this learner process: larger than that of every process before it.
    pub term: u64,
    /// Time without a sign of progress after which a task is reissued; `None` if tasks cannot be lost.
    pub reissue_after: Option<Duration>,
    /// Which tasks two actors must agree on; `None` if all actors are trusted.
    pub audit: Option<Audit>,
    /// Content of `tokenizer.json`, written beside the weights.
    pub tokenizer_json: String,
    /// The learner's device, with the frozen weights there if the run trains an adapter.
    pub backend: Backend,
    /// The pretrained models of the run.
    pub models: Models,
}

/// An exam that is evaluated during the run.
#[derive(Clone, Debug)]
pub struct Exam {
    /// Its name.
    pub name: String,
    /// Its problems, with the keys that verifiers need to judge them.
    pub problems: Vec<KeyedProblem>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The run reached the end of its schedule.
    Finished,
    /// The run was told to stop; it can be resumed.
    Interrupted,
}

/// Summary of a run.
#[derive(Clone, Debug)]
pub struct Summary {
    /// How it ended.
    pub outcome: Outcome,
    /// Number of the last state.
    pub step: u64,
    /// Hash of its weights.
    pub weights_digest: Digest,
    /// Its schedule, once it is fixed.
    pub control: Option<Control>,
    /// Exam results, in order of step.
    pub evals: Vec<EvalRecord>,
    /// Counts over the run.
    pub totals: Totals,
    /// Wall time, earlier processes included.
    pub elapsed: Duration,
    /// Number of times this process reissued a task.
    pub num_reissued: u64,
    /// Groups that this process received more than once: identical copies, or the run had ended or was free-running.
    pub num_duplicates: u64,
    /// Number of tasks on which two actors agreed in this process.
    pub num_audited: u64,
    /// Banned actors, including those that earlier processes banned.
    pub banned: Vec<String>,
    /// Number of groups that banned actors sent to this process.
    pub num_refused: u64,
    /// Groups of a free-running run that were older than `batch.max_staleness` allows.
    pub num_stale: u64,
}

/// Runs the learner from the last state in the run directory until its schedule ends or `shutdown` is cancelled.
///
/// The caller keeps the lock for as long as others may assume that it owns the run.
///
/// # Errors
/// Any [`Error`]; records that were synced to the journal stay.
#[expect(clippy::too_many_arguments, reason = "the run as a function of its inputs")]
pub async fn run<'a>(
    config: Config,
    options: RunOptions,
    lock: &'a RunLock,
    manifest: Manifest,
    sources: Vec<Arc<dyn ProblemSource>>,
    exams: Vec<Exam>,
    bus: Arc<dyn Bus>,
    observer: Observer<'a>,
    shutdown: CancellationToken,
) -> Result<Summary, Error> {
    let mut learner = Learner::open(config, options, lock, manifest, sources, exams, bus, observer).await?;
    let outcome = learner.main_loop(&shutdown).await;
    if outcome.is_err() {
        // Report the decisions that reach the disk. Ignore an error here: the one that ended the run matters.
        drop(learner.settle().await);
    }
    Ok(learner.summary(outcome?))
}

/// Interval at which received groups are synced to the disk, with one sync for all of them.
const ROUND: Duration = Duration::from_millis(50);

/// Interval at which the learner checks outstanding tasks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Time limit of such a check: the learner receives nothing meanwhile.
const LOOK_LIMIT: Duration = Duration::from_secs(5);

struct Learner<'a> {
    options: RunOptions,
    lock: &'a RunLock,
    exams: Vec<Exam>,
    bus: Arc<dyn Bus>,
    observer: Observer<'a>,
    fold: Fold,
    manifest: Manifest,
    records: Records,
    recovery: Recovery,
    control: Option<Control>,
    received: Received,
    /// The exams in progress.
    sitting: Option<Sitting>,
    evals: Vec<EvalRecord>,
    elapsed_before: Duration,
    started: Instant,
    published: Published,
    ledger: Ledger,
    audits: Audits,
    /// Tasks to reissue in the next round: another copy is needed, or the received group is unusable.
    wanted: BTreeSet<TaskId>,
    workers: Workers,
    /// When the run last made progress.
    got_further: Instant,
    counts: Counts,
}

/// The journal, and the data that waits for its next sync.
struct Records {
    journal: Writer,
    /// Summary of the journal, up to its end.
    known: Known,
    /// Groups whose records are not on the disk yet: the bus keeps them until they are.
    unsynced: Vec<Delivery<ScoredGroup>>,
    /// Events to report once their records are on the disk.
    untold: Vec<Event>,
}

/// Progress of the run when this process began.
struct Recovery {
    /// The point in the journal from which this process began.
    begun_at: Point,
    /// Steps in the journal after the checkpoint. They are computed again and must come out the same.
    expected_steps: BTreeMap<u64, StepRecord>,
    last_checkpoint: Option<u64>,
    /// Whether an earlier process may have issued batches; cleared when the first batches are issued.
    resumes: bool,
}

/// Counts of this process, for its summary.
#[derive(Default)]
struct Counts {
    num_duplicates: u64,
    num_refused: u64,
    num_stale: u64,
}

impl<'a> Learner<'a> {
    /// Runs one iteration per step: publishes the weights, issues the planned tasks, waits for the batch, folds it.
    async fn main_loop(&mut self, shutdown: &CancellationToken) -> Result<Outcome, Error> {
        loop {
            let step = self.fold.state().step;
            let ends = self.control.is_some_and(|control| step >= control.stop_at);
            let asked = Instant::now();
            let sealed = tokio::select! {
                // The outstanding tasks are planned: a resumed process reissues them.
                () = shutdown.cancelled() => false,
                sealed = self.play_batch(step, ends) => { sealed?; true }
            };
            self.sync().await?;
            if !sealed {
                self.checkpoint().await?;
                return Ok(Outcome::Interrupted);
            }
            if ends {
                self.checkpoint().await?;
                return Ok(Outcome::Finished);
            }
            let folded = self.fold_step(step, asked.elapsed()).await?;
            self.forget(&folded).await?;
            self.decide_end().await?;
            if self.fold.state().step.is_multiple_of(self.options.checkpoint_every) {
                self.checkpoint().await?;
            }
        }
    }

    /// Issues the tasks of a step and its exams, and waits until all their groups are in.
    async fn play_batch(&mut self, step: u64, ends: bool) -> Result<(), Error> {
        self.publish_weights().await?;
        self.begin_sitting(step, ends).await?;
        if !ends {
            self.issue_batches().await?;
            self.refuse_stale();
        }
        let sits = self.sitting.is_some();
        self.collect(step, ends).await?;
        if sits {
            self.bus.forget_batch(TaskKind::Evaluate, step).await?;
        }
        Ok(())
    }

    /// Waits until the next step has its groups and the exams are over.
    async fn collect(&mut self, step: u64, ends: bool) -> Result<(), Error> {
        let bus = self.bus.clone();
        // Kept across iterations: a wait that restarts each time may never end.
        let (mut next, mut beats, mut refusals) = (bus.next_scored(), bus.next_beat(), bus.next_refusal());
        let began = Instant::now();
        let [mut looked, mut told] = [began; 2];
        self.got_further = looked;
        let mut rounds = tokio::time::interval(ROUND);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if self.sitting.is_none() && (ends || self.sealed(step)?.is_some()) {
                return Ok(());
            }
            tokio::select! {
                scored = &mut next => {
                    next = bus.next_scored();
                    self.accept(scored?)?;
                }
                beat = &mut beats => {
                    beats = bus.next_beat();
                    self.workers.heard(beat?, Instant::now());
                }
                refusal = &mut refusals => {
                    refusals = bus.next_refusal();
                    self.refuse(refusal?)?;
                }
                _ = rounds.tick() => {
                    self.expect_in_place()?;
                    let wanted = std::mem::take(&mut self.wanted).into_iter();
                    // At the end of the run only exams are outstanding.
                    let wanted = wanted.filter(|id| !ends || id.kind == TaskKind::Evaluate).collect();
                    // If the bus is too slow now, the tasks are handled the next time.
                    tokio::time::timeout(LOOK_LIMIT, self.issue_again(wanted)).await.unwrap_or(Ok(()))?;
                    if let Some(limit) = self.options.reissue_after {
                        self.sync().await?;
                        if looked.elapsed() >= LOOK_EVERY {
                            tokio::time::timeout(LOOK_LIMIT, self.look_after(limit)).await.unwrap_or(Ok(()))?;
                            looked = Instant::now();
                        }
                    }
                    let (waited, now) = (self.got_further.elapsed(), Instant::now());
                    self.expect_checkers(step, ends, began)?;
                    // Tasks that wait for a checker have their own limit.
                    let is_over = waited >= self.options.stall_limit && self.longest_unavailable(step, ends).is_none();
                    if is_over || waited.min(told.elapsed()) >= self.options.tell_after {
                        let num_tasks = match (ends, self.fold.config().is_free_running()) {
                            (true, _) => 0,
                            (false, false) => self.fold.config().batch.num_tasks as usize,
                            (false, true) => self.fold.planned().iter().count(),
                        };
                        let num_sat = self.sitting.as_ref().map_or(0, |sitting| sitting.tasks.len());
                        let hears_workers = self.options.reissue_after.is_some();
                        let num_tasks = num_tasks + num_sat;
                        let missing = self.missing(step, ends).map(|task| self.what_is_known_of(task)).collect();
                        let waiting = self.workers.waiting(step, missing, num_tasks, hears_workers, waited, now);
                        if is_over {
                            return Err(Error::Stalled(Box::new(waiting)));
                        }
                        self.tell(Event::Waiting(Box::new(waiting)))?;
                        told = now;
                    }
                }
            }
        }
    }

    /// Returns the task, of those that the step waits for, that has waited longest for an unavailable checker.
    fn longest_unavailable(&self, step: u64, ends: bool) -> Option<(TaskId, &Unavailable)> {
        let waiting = self.missing(step, ends).filter_map(|task| Some((task, self.ledger.unavailable(task)?)));
        waiting.min_by_key(|(_, unavailable)| unavailable.since)
    }

    /// Checks that no task has waited too long for its checker since the step began to wait.
    fn expect_checkers(&self, step: u64, ends: bool, began: Instant) -> Result<(), Error> {
        let Some((task, unavailable)) = self.longest_unavailable(step, ends) else { return Ok(()) };
        let waited = unavailable.since.max(began).elapsed();
        if waited < self.options.checker_limit {
            return Ok(());
        }
        let (task, reason) = (describe(task), unavailable.reason.clone());
        Err(Error::CheckerUnavailable { step, task, waited_seconds: waited.as_secs(), reason })
    }

    /// Returns the tasks whose groups the next step folds, in order; `None` while some groups are missing.
    fn sealed(&self, step: u64) -> Result<Option<Vec<TaskId>>, Error> {
        let config = &self.fold.config().batch;
        if config.max_staleness.is_none() {
            let batch = self.fold.planned().batch(step).map(|planned| planned.task.id);
            return Ok(batch.map(|id| self.received.contains(id).then_some(id)).collect());
        }
        // A group of a free-running run comes out differently when its task is played again.
        let lacks = |what: &str| {
            let reason =
                format!("the journal has later steps but lacks {what} of the next step; `--fork` starts a new run");
            Error::Integrity { what: "batch", step, reason }
        };
        match self.recovery.expected_steps.get(&(step + 1)) {
            Some(expected) => self.received.named(&expected.groups).ok_or_else(|| lacks("some groups")).map(Some),
            None if !self.recovery.expected_steps.is_empty() => Err(lacks("the record")),
            None => {
                let num_tasks = config.num_tasks as usize;
                let is_enough = self.received.len() >= num_tasks;
                Ok(is_enough.then(|| self.received.in_order().map(GroupRecord::task).take(num_tasks).collect()))
            }
        }
    }

    /// Drops groups that have become too old for the next step of a free-running run. Their tasks are reissued.
    fn refuse_stale(&mut self) {
        if !self.recovery.expected_steps.is_empty() {
            // Later steps of the journal fold them.
            return;
        }
        let stale: Vec<TaskId> =
            self.received.in_order().filter(|group| self.fold.is_stale(&group.scored)).map(GroupRecord::task).collect();
        self.received.take(&stale);
        self.note_stale(&stale);
    }

    fn note_stale(&mut self, stale: &[TaskId]) {
        self.counts.num_stale += stale.len() as u64;
        self.wanted.extend(stale);
    }

    /// Lists the tasks that the step waits for; in a free-running run, the step needs only some of them.
    fn missing(&self, step: u64, ends: bool) -> impl Iterator<Item = TaskId> {
        let unsat = self.sitting.iter().flat_map(|sitting| {
            sitting
                .tasks
                .iter()
                .zip(&sitting.correct)
                .filter(|(_, correct)| correct.is_none())
                .map(|((task, _), _)| task.id)
        });
        let is_free_running = self.fold.config().is_free_running();
        let planned = self.fold.planned().iter().map(|planned| planned.task.id);
        let unsealed =
            planned.filter(move |id| !ends && (id.batch == step || is_free_running) && !self.received.contains(*id));
        unsat.chain(unsealed)
    }

    fn what_is_known_of(&self, task: TaskId) -> Missing {
        let refused = self.ledger.refused(task);
        let refused = refused.last().map(|last| (refused.len(), last.reason.clone()));
        let unavailable = self.ledger.unavailable(task).map(|unavailable| unavailable.reason.clone());
        Missing { task, holder: None, played_by: self.audits.players(task), refused, unavailable }
    }

    /// Folds the sealed batch and returns its tasks.
    async fn fold_step(&mut self, step: u64, waited: Duration) -> Result<Vec<TaskId>, Error> {
        let ids = self.sealed(step)?.expect("it was waited for");
        let (digests, groups): (Vec<Digest>, Vec<GroupRecord>) = self.received.take(&ids).into_iter().unzip();
        groups.iter().for_each(|group| self.audits.train_on(group, step + 1));
        let groups: Vec<ScoredGroup> = groups.into_iter().map(|group| group.scored).collect();
        let began = Instant::now();
        let report = block_in_place(|| self.fold.fold(&groups, self.control))?;
        let trained = began.elapsed();
        let elapsed = self.elapsed();
        self.expect_in_place()?;
        match self.recovery.expected_steps.remove(&report.step) {
            Some(expected) => expect_step(&expected, report.weights_digest, report.state_digest)?,
            None => {
                self.append(Record::Step(StepRecord {
                    step: report.step,
                    groups: digests,
                    weights_digest: report.weights_digest,
                    state_digest: report.state_digest,
                    elapsed_ms: elapsed.as_millis() as u64,
                }));
                self.settle().await?;
            }
        }
        let totals = self.fold.state().totals.clone();
        let sample = sample(&groups);
        let (num_audited, num_stale) = (self.audits.num_audited(), self.counts.num_stale);
        let event = StepEvent { report, elapsed, waited, trained, totals, num_audited, num_stale, sample };
        self.tell(Event::Step(Box::new(event)))?;
        Ok(ids)
    }

    /// Forgets folded tasks, and removes batches without planned tasks from the bus.
    async fn forget(&mut self, folded: &[TaskId]) -> Result<(), Error> {
        self.ledger.forget(folded);
        let batches: BTreeSet<u64> = folded.iter().map(|id| id.batch).collect();
        for batch in batches {
            if self.fold.planned().batch(batch).next().is_none() {
                self.bus.forget_batch(TaskKind::Train, batch).await?;
            }
        }
        Ok(())
    }

    /// Checks that the run directory at its path is still the one that this run writes: a replacement is another run's. The
    /// journal checks its own files.
    fn expect_in_place(&self) -> Result<(), Error> {
        self.lock.expect_in_place()
    }

    fn elapsed(&self) -> Duration {
        self.elapsed_before + self.started.elapsed()
    }

    fn summary(self, outcome: Outcome) -> Summary {
        Summary {
            outcome,
            step: self.fold.state().step,
            weights_digest: self.fold.weights_digest(),
            control: self.control,
            elapsed: self.elapsed(),
            totals: self.fold.state().totals.clone(),
            evals: self.evals,
            num_reissued: self.ledger.num_reissued(),
            num_duplicates: self.counts.num_duplicates,
            num_audited: self.audits.num_audited(),
            banned: self.audits.banned().iter().cloned().collect(),
            num_refused: self.counts.num_refused,
            num_stale: self.counts.num_stale,
        }
    }
}

/// Checks a step that was computed again against its record.
pub(crate) fn expect_step(expected: &StepRecord, weights: Digest, state: Digest) -> Result<(), Error> {
    let pairs = [("weights digest", expected.weights_digest, weights), ("state digest", expected.state_digest, state)];
    match pairs.into_iter().find(|(_, expected, got)| expected != got) {
        None => Ok(()),
        Some((what, was, is)) => {
            let reason = format!("expected {was:?} from the journal, got {is:?} when recomputed");
            Err(Error::Integrity { what, step: expected.step, reason })
        }
    }
}
