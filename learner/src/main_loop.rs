mod intake;
mod saving;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, Delivery};
use futures_util::{StreamExt as _, TryStreamExt as _};
use policy::{TrainingState, write_weights};
use proto::{
    Digest, Envelope, Message, Problem, ProblemKey, ProblemSource, ScoredGroup, Task, TaskId, TaskKind, Version,
};
use tokio::task::{JoinHandle, block_in_place};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::audit::{Audit, Audits};
use crate::checkpoint::Checkpoint;
use crate::event::{Event, Observer, StepEvent, sample};
use crate::journal::{EvalRecord, GroupRecord, Journal, Record, StepRecord};
use crate::ledger::Ledger;
use crate::plan::Plans;
use crate::point::{Known, Point};
use crate::received::Received;
use crate::run_dir::Recovered;
use crate::waiting::{Missing, Workers};
use crate::writer::Writer;
use crate::{Config, Control, Error, Fold, Manifest, RunLock, State, Totals};

pub use saving::KeepJournal;

/// How this process runs; changes when things happen, never what.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Where the run lives.
    pub run_dir: PathBuf,
    /// Whether an earlier process began the run.
    pub resume: bool,
    /// Threads that train.
    pub num_threads: usize,
    /// Wall time after which the clock ends the run, where the config does not.
    pub time_limit: Option<Duration>,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Checkpoints that are kept.
    pub keep_checkpoints: usize,
    /// How much of the journal is kept.
    pub keep_journal: KeepJournal,
    /// How long nothing may come back before the run ends with an error.
    pub stall_limit: Duration,
    /// How long nothing may come back before people are told, again and again.
    pub tell_after: Duration,
    /// Which life of the run's learner this is; grows from one to the next.
    pub epoch: u64,
    /// After how long a task that nobody was heard of is asked for again; `None` where nothing is lost.
    pub reissue_after: Option<Duration>,
    /// Which tasks two actors must agree on; `None` where all actors are trusted.
    pub audit: Option<Audit>,
    /// Names of the tokens, written beside the weights.
    pub tokenizer_json: String,
}

/// Problems of an exam that is sat during the run.
#[derive(Clone, Debug)]
pub struct Exam {
    /// Its name.
    pub name: String,
    /// Its problems.
    pub problems: Vec<Problem>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// At the end of its schedule.
    Finished,
    /// It was told to stop; it can go on.
    Interrupted,
}

/// What a run did.
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
    /// How often this process asked for a task again.
    pub num_reissued: u64,
    /// Groups that came more than once to this process; all alike, or the run had ended or was free-running.
    pub num_duplicates: u64,
    /// Tasks of which this process had two actors agree.
    pub num_audited: u64,
    /// Actors that are banned, also by earlier processes.
    pub banned: Vec<String>,
    /// What banned actors sent to this process.
    pub num_refused: u64,
    /// Groups of a free-running run that were older than `batch.max_staleness` allows.
    pub num_stale: u64,
}

/// Runs the learner until its schedule ends or `shutdown` is cancelled, from wherever the run directory left off.
///
/// Whoever has the lock keeps it for as long as others may take the run for his.
///
/// # Errors
/// Any [`Error`]; whatever was synced to the journal stays.
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
        // What was decided is said, as far as it is on the disk. What matters is what has ended the run.
        drop(learner.settle().await);
    }
    Ok(learner.summary(outcome?))
}

/// How often what came over a network is put on the disk: one sync for all of it.
const ROUND: Duration = Duration::from_millis(50);

/// How often the learner looks after what is out.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The longest time that it takes for that, in which nothing is received.
const LOOK_LIMIT: Duration = Duration::from_secs(5);

/// Tasks that are handed to the bus side by side.
const MAX_IN_FLIGHT: usize = 64;

struct Learner<'a> {
    options: RunOptions,
    lock: &'a RunLock,
    exams: Vec<Exam>,
    bus: Arc<dyn Bus>,
    observer: Observer<'a>,
    fold: Fold,
    manifest: Manifest,
    journal: Writer,
    /// What the journal says, to its end.
    known: Known,
    /// What this process began with.
    begun_at: Point,
    control: Option<Control>,
    received: Received,
    /// Steps that the journal knows beyond the checkpoint: computed again, they must come out the same.
    expected_steps: BTreeMap<u64, StepRecord>,
    /// The exams that are being sat.
    sitting: Option<Sitting>,
    evals: Vec<EvalRecord>,
    elapsed_before: Duration,
    started: Instant,
    last_checkpoint: Option<u64>,
    /// Until the first batches are issued: whether an earlier process may have issued some.
    resumes: bool,
    /// Encoded weights that planned batches name.
    versions: BTreeMap<Digest, Arc<[u8]>>,
    ledger: Ledger,
    audits: Audits,
    /// Tasks that are to be asked for again in the next round: another copy is needed, or what came is of no use.
    wanted: BTreeSet<TaskId>,
    /// Groups whose records are not on the disk yet: the bus keeps them until they are.
    unsynced: Vec<Delivery<ScoredGroup>>,
    /// What is told when its record is on the disk.
    untold: Vec<Event>,
    /// What stores weights again that the bus may have lost.
    repair: Option<Repair>,
    workers: Workers,
    /// When the run last got further.
    got_further: Instant,
    num_duplicates: u64,
    num_refused: u64,
    num_stale: u64,
}

/// Work beside the main loop that ends with it.
struct Repair(JoinHandle<()>);

impl Drop for Repair {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Exams sat by one version.
struct Sitting {
    step: u64,
    weights: (Digest, Arc<[u8]>),
    tasks: Vec<Task>,
    /// Name and number of problems, in order of the tasks.
    parts: Vec<(String, usize)>,
    correct: Vec<Option<bool>>,
}

impl<'a> Learner<'a> {
    #[expect(clippy::too_many_arguments, reason = "as of `run`")]
    async fn open(
        config: Config,
        options: RunOptions,
        lock: &'a RunLock,
        manifest: Manifest,
        sources: Vec<Arc<dyn ProblemSource>>,
        exams: Vec<Exam>,
        bus: Arc<dyn Bus>,
        observer: Observer<'a>,
    ) -> Result<Learner<'a>, Error> {
        let is_reproducible = manifest.reproducible;
        let mut refusals = Vec::new();
        let recovered =
            block_in_place(|| Recovered::read(&options.run_dir, is_reproducible, |reason| refusals.push(reason)));
        let refusals = refusals.into_iter().map(Event::CheckpointRefused);
        refusals.into_iter().try_for_each(|refusal| block_in_place(|| observer(refusal)))?;
        let Recovered {
            checkpoint,
            known,
            received,
            banned,
            trained,
            mut steps,
            elapsed_ms,
            manifest: was,
            damage,
            last,
        } = recovered?;
        // Before anybody hears that the run goes on: a refused config must change nothing.
        if let Some(was) = &was {
            was.expect_same(&manifest)?;
        }
        let resumes = checkpoint.is_some();
        // One that has lost its place in the journal is written again.
        let last_checkpoint = checkpoint.as_ref().filter(|found| found.point.is_ok()).map(|found| found.state.step);
        let control = config.control().or(known.control);
        let (state, training, planned, versions, begun_at) = match checkpoint {
            Some(Checkpoint { state, training, planned, versions, point, .. }) => {
                (state, training, planned, versions, point.unwrap_or_default())
            }
            None => {
                let training = block_in_place(|| TrainingState::initial(&config.model, config.seed));
                (State::initial(), training, Plans::default(), Vec::new(), Point::default())
            }
        };
        let versions: BTreeMap<Digest, Arc<[u8]>> =
            versions.into_iter().map(|(digest, bytes)| (digest, bytes.into())).collect();
        for (digest, bytes) in &versions {
            bus.put_weights(*digest, bytes.clone()).await?;
        }
        let mut evals = known.evals.clone();
        if !is_reproducible {
            steps.clear();
            evals.retain(|eval| eval.step <= state.step);
        }
        let folder = options.run_dir.join("journal");
        let (journal, truncated_bytes) = block_in_place(|| Journal::open(&folder, &damage, last))?;
        if options.resume {
            let (step, unreadable, evals) = (state.step, damage.unreadable, evals.clone());
            let banned = banned.iter().cloned().collect();
            let resumed = Event::Resumed { step, control, truncated_bytes, unreadable, evals, banned };
            block_in_place(|| observer(resumed))?;
        }
        let audits = Audits::new(options.audit, banned, trained, known.disputed.clone());
        let fold = block_in_place(|| Fold::new(config, sources, options.num_threads, (state, training), planned))?;
        let mut learner = Learner {
            options,
            lock,
            exams,
            bus,
            observer,
            fold,
            manifest: manifest.clone(),
            journal: Writer::start(journal),
            known,
            begun_at,
            control,
            received,
            expected_steps: steps,
            sitting: None,
            evals,
            elapsed_before: Duration::from_millis(elapsed_ms),
            started: Instant::now(),
            last_checkpoint,
            resumes,
            versions,
            ledger: Ledger::default(),
            audits,
            wanted: BTreeSet::new(),
            unsynced: Vec::new(),
            untold: Vec::new(),
            repair: None,
            workers: Workers::default(),
            got_further: Instant::now(),
            num_duplicates: 0,
            num_refused: 0,
            num_stale: 0,
        };
        if was.is_none() {
            learner.append(Record::Manifest(manifest));
            learner.journal.sync().await?;
        }
        if let Some(last) = learner.fold.state().step.checked_sub(1) {
            // So the bus knows how far the run is, too.
            learner.bus.forget_batch(TaskKind::Train, last).await?;
        }
        Ok(learner)
    }

    /// One turn a step: publish the version, ask for what it plans, wait for the batch, fold it.
    async fn main_loop(&mut self, shutdown: &CancellationToken) -> Result<Outcome, Error> {
        loop {
            let step = self.fold.state().step;
            let ends = self.control.is_some_and(|control| step >= control.stop_at);
            let asked = Instant::now();
            let sealed = tokio::select! {
                // What was asked for is planned, and asked for again by whoever goes on.
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

    /// Asks for the batch of a step and for exams, and waits until all of it is in.
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

    /// Stores the current version and forgets those that no task names.
    async fn publish_weights(&mut self) -> Result<(), Error> {
        let digest = self.fold.weights_digest();
        let (model, trainer) = (&self.fold.config().model, self.fold.trainer());
        let written = block_in_place(|| trainer.weights().map(|weights| write_weights(model, &[("", &weights)])));
        let bytes: Arc<[u8]> = written?.into();
        self.bus.put_weights(digest, bytes.clone()).await?;
        self.versions.insert(digest, bytes);
        self.announce().await?;
        let named: BTreeSet<Digest> = self.fold.planned().iter().map(|planned| planned.task.weights).collect();
        self.versions.retain(|version, _| *version == digest || named.contains(version));
        let needed: Vec<Digest> = self.versions.keys().copied().collect();
        Ok(self.bus.retain_weights(&needed).await?)
    }

    /// Tells those who play a free-running run that there are newer weights.
    async fn announce(&self) -> Result<(), Error> {
        if self.fold.config().is_free_running() {
            let version = Version { policy_version: self.fold.state().step, weights: self.fold.weights_digest() };
            self.bus.announce(version).await?;
        }
        Ok(())
    }

    /// Asks for the exams that are due and not in the journal yet.
    async fn begin_sitting(&mut self, step: u64, ends: bool) -> Result<(), Error> {
        let every = self.fold.config().exams.every_steps;
        let due = step == 0 || ends || (every > 0 && step.is_multiple_of(every));
        let done: BTreeSet<&str> =
            self.evals.iter().filter(|eval| eval.step == step).map(|eval| eval.exam.as_str()).collect();
        let open: Vec<&Exam> = self.exams.iter().filter(|exam| due && !done.contains(exam.name.as_str())).collect();
        if open.is_empty() {
            return Ok(());
        }
        let model = &self.fold.config().model;
        let weights: (Digest, Arc<[u8]>) = block_in_place(|| {
            let average = self.fold.trainer().average()?;
            Ok::<_, Error>((average.digest(model), write_weights(model, &[("", &average)]).into()))
        })?;
        let problems: Vec<Problem> = open.iter().flat_map(|exam| exam.problems.iter().cloned()).collect();
        let tasks = self.fold.exam_tasks(weights.0, &problems);
        let parts = open.iter().map(|exam| (exam.name.clone(), exam.problems.len())).collect();
        self.bus.put_weights(weights.0, weights.1.clone()).await?;
        let issued = tasks.iter().map(|task| (task.clone(), None)).collect();
        self.sitting = Some(Sitting { step, weights, correct: vec![None; tasks.len()], tasks, parts });
        self.issue(issued).await
    }

    /// Asks for every batch that may be planned now, except what is in already.
    async fn issue_batches(&mut self) -> Result<(), Error> {
        let mut tasks = block_in_place(|| self.fold.plan());
        if std::mem::take(&mut self.resumes) {
            // What was planned before the checkpoint may have been lost with the process that asked for it.
            tasks = self.fold.planned().iter().map(|planned| planned.task.id).collect();
        }
        let missing = tasks.into_iter().filter(|id| !self.received.contains(*id)).filter_map(|id| self.planned(id));
        let missing = missing.collect();
        self.issue(missing).await
    }

    /// Gives a task of a batch, with the key of its problem.
    fn planned(&self, id: TaskId) -> Option<(Task, Option<ProblemKey>)> {
        let planned = self.fold.planned().get(id)?;
        Some((planned.task.clone(), planned.key.clone()))
    }

    /// Asks for tasks, with the keys of their problems; side by side, for a bus may be far away.
    async fn issue(&mut self, tasks: Vec<(Task, Option<ProblemKey>)>) -> Result<(), Error> {
        let now = Instant::now();
        let epoch = self.options.epoch;
        let bus = self.bus.as_ref();
        let issues = tasks.into_iter().map(|(task, key)| {
            let (issue, not_by) = (self.ledger.issue(task.id, now), self.audits.players(task.id));
            let envelope = Envelope { epoch, issue, not_by, played_by: String::new() };
            async move {
                if let Some(key) = key {
                    bus.put_key(task.id, key).await?;
                }
                bus.publish_task(Message { envelope, body: task }).await
            }
        });
        let issues: Vec<_> = issues.collect();
        futures_util::stream::iter(issues).buffer_unordered(MAX_IN_FLIGHT).try_collect::<()>().await?;
        Ok(())
    }

    /// Asks again for tasks, as far as they are not done.
    async fn issue_again(&mut self, tasks: Vec<TaskId>) -> Result<(), Error> {
        let find = |id: &TaskId| match id.kind {
            TaskKind::Train if self.received.contains(*id) => None,
            TaskKind::Train => self.planned(*id),
            TaskKind::Evaluate => {
                let sitting = self.sitting.as_ref().filter(|sitting| sitting.step == id.batch)?;
                let index = id.index as usize;
                sitting.correct.get(index)?.is_none().then(|| (sitting.tasks[index].clone(), None))
            }
        };
        let tasks = tasks.iter().filter_map(find).collect();
        self.issue(tasks).await
    }

    /// Looks after what is out: what the bus has lost, and what nobody was heard of for too long, is asked for again.
    async fn look_after(&mut self, limit: Duration) -> Result<(), Error> {
        // Again and again: nobody keeps it.
        self.announce().await?;
        if self.bus.restore().await? {
            self.put_weights();
            return self.issue_again(self.ledger.open()).await;
        }
        let now = Instant::now();
        let due = self.ledger.due(limit, now);
        if due.is_empty() {
            return Ok(());
        }
        tracing::info!(num_tasks = due.len(), first = ?due[0], "asking again");
        if self.ledger.is_overdue(limit, now) {
            // The weights may be why: what is stored in their place is overwritten.
            self.put_weights();
        }
        self.issue_again(due).await
    }

    /// Stores all weights again that tasks name and the bus has not. Takes its time, beside everything else: they may be large.
    fn put_weights(&mut self) {
        if self.repair.as_ref().is_some_and(|repair| !repair.0.is_finished()) {
            return;
        }
        let sat = self.sitting.iter().map(|sitting| (&sitting.weights.0, &sitting.weights.1));
        let weights = self.versions.iter().chain(sat).map(|(digest, bytes)| (*digest, bytes.clone()));
        let (bus, weights) = (self.bus.clone(), weights.collect::<Vec<_>>());
        self.repair = Some(Repair(tokio::spawn(async move {
            for (digest, bytes) in weights {
                if let Err(error) = bus.put_weights(digest, bytes).await {
                    // It is tried again when tasks are overdue again.
                    tracing::warn!(%error, "weights could not be stored again");
                }
            }
        })));
    }

    /// Waits until the next step has its groups and the exams are over.
    async fn collect(&mut self, step: u64, ends: bool) -> Result<(), Error> {
        let bus = self.bus.clone();
        // Kept over the turns of the loop: a wait that is begun anew each time may never end.
        let (mut next, mut beats, mut refusals) = (bus.next_scored(), bus.next_beat(), bus.next_refusal());
        let [mut looked, mut told] = [Instant::now(); 2];
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
                    // In the end exams alone are waited for.
                    let wanted = wanted.filter(|id| !ends || id.kind == TaskKind::Evaluate).collect();
                    // What a bus is too slow for now is looked after the next time.
                    tokio::time::timeout(LOOK_LIMIT, self.issue_again(wanted)).await.unwrap_or(Ok(()))?;
                    if let Some(limit) = self.options.reissue_after {
                        self.sync().await?;
                        if looked.elapsed() >= LOOK_EVERY {
                            tokio::time::timeout(LOOK_LIMIT, self.look_after(limit)).await.unwrap_or(Ok(()))?;
                            looked = Instant::now();
                        }
                    }
                    let (waited, now) = (self.got_further.elapsed(), Instant::now());
                    let is_over = waited >= self.options.stall_limit;
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

    /// Names the groups that the next step folds, in order; `None` while they are not all in.
    fn sealed(&self, step: u64) -> Result<Option<Vec<TaskId>>, Error> {
        let config = &self.fold.config().batch;
        if config.max_staleness.is_none() {
            let batch = self.fold.planned().batch(step).map(|planned| planned.task.id);
            return Ok(batch.map(|id| self.received.contains(id).then_some(id)).collect());
        }
        // What was played for a step comes out differently when it is played again.
        let lacks = |what: &str| {
            let reason = format!("the journal goes further and lacks {what} of the next step; --fork starts a new run");
            Error::Integrity { what: "batch", step, reason }
        };
        match self.expected_steps.get(&(step + 1)) {
            Some(expected) => self.received.named(&expected.groups).ok_or_else(|| lacks("some groups")).map(Some),
            None if !self.expected_steps.is_empty() => Err(lacks("the record")),
            None => {
                let num_tasks = config.num_tasks as usize;
                let is_enough = self.received.len() >= num_tasks;
                Ok(is_enough.then(|| self.received.in_order().map(GroupRecord::task).take(num_tasks).collect()))
            }
        }
    }

    /// Gives up groups that have become too old for the next step of a free-running run.
    fn refuse_stale(&mut self) {
        if !self.expected_steps.is_empty() {
            // Later steps of the journal take them.
            return;
        }
        let stale: Vec<TaskId> =
            self.received.in_order().filter(|group| self.fold.is_stale(&group.scored)).map(GroupRecord::task).collect();
        self.received.take(&stale);
        self.note_stale(&stale);
    }

    fn note_stale(&mut self, stale: &[TaskId]) {
        self.num_stale += stale.len() as u64;
        self.wanted.extend(stale);
    }

    /// Names the tasks that the step waits for; in a free-running run, those of which it needs some.
    fn missing(&self, step: u64, ends: bool) -> impl Iterator<Item = TaskId> {
        let unsat = self.sitting.iter().flat_map(|sitting| {
            sitting.tasks.iter().zip(&sitting.correct).filter(|(_, correct)| correct.is_none()).map(|(task, _)| task.id)
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
        Missing { task, holder: None, played_by: self.audits.players(task), refused }
    }

    /// Folds what is sealed, and names it.
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
        match self.expected_steps.remove(&report.step) {
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
        let (num_audited, num_stale) = (self.audits.num_audited(), self.num_stale);
        let event = StepEvent { report, elapsed, waited, trained, totals, num_audited, num_stale, sample };
        self.tell(Event::Step(Box::new(event)))?;
        Ok(ids)
    }

    /// Forgets tasks that are folded, and on the bus the batches of which nothing is left.
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

    /// Checks that the run directory at its path is the one that the run writes: what takes its place is another's. The journal
    /// looks after its own files.
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
            num_duplicates: self.num_duplicates,
            num_audited: self.audits.num_audited(),
            banned: self.audits.banned().iter().cloned().collect(),
            num_refused: self.num_refused,
            num_stale: self.num_stale,
        }
    }
}

/// Checks a step that was computed again against its record.
pub(crate) fn expect_step(expected: &StepRecord, weights: Digest, state: Digest) -> Result<(), Error> {
    let pairs = [("weights digest", expected.weights_digest, weights), ("state digest", expected.state_digest, state)];
    match pairs.into_iter().find(|(_, expected, got)| expected != got) {
        None => Ok(()),
        Some((what, was, is)) => {
            let reason = format!("the journal says {was:?}, computing it again gives {is:?}");
            Err(Error::Integrity { what, step: expected.step, reason })
        }
    }
}
