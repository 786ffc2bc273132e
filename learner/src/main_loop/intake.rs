//! Incoming groups: which groups are accepted, and from which actors.

use std::collections::BTreeSet;

use bus::Delivery;
use proto::{Envelope, Message, Refusal, RefusalCause, Role, ScoredGroup, TaskId, TaskKind};
use tokio::time::Instant;

use super::Learner;
use crate::Error;
use crate::audit::{AuditOutcome, Mismatch};
use crate::event::{Ban, Event};
use crate::journal::{BanRecord, GroupRecord, Record};

/// Number of consecutive groups of a task that cannot be judged before the run may end and name the task.
const MAX_TRIES: usize = 5;

impl Learner<'_> {
    /// Processes a scored group from a verifier.
    pub(super) fn accept(&mut self, delivery: Delivery<ScoredGroup>) -> Result<(), Error> {
        let Message { envelope, body } = &delivery.message;
        let id = body.group.task.id;
        self.ledger.checker_answered(id);
        let is_refused = self.audits.banned().contains(&envelope.played_by);
        match id.kind {
            _ if is_refused => {
                self.counts.num_refused += 1;
                self.want_if_last(id, envelope);
            }
            TaskKind::Evaluate => self.accept_exam_answer(body)?,
            TaskKind::Train => self.accept_group(&delivery.message)?,
        }
        self.records.unsynced.push(delivery);
        Ok(())
    }

    /// Reissues a task whose group could not be judged. After a few tries by several actors, or by the only one, the task is at
    /// fault and the run ends with an error.
    pub(super) fn refuse(&mut self, refusal: Refusal) -> Result<(), Error> {
        let Refusal { envelope, task, cause, reason } = refusal.clone();
        if envelope.term != self.options.term {
            return Ok(());
        }
        if self.audits.banned().contains(&envelope.played_by) {
            // A bad group from a banned actor is not the task's fault.
            self.want_if_last(task, &envelope);
            return Ok(());
        }
        if cause == RefusalCause::CheckerUnavailable {
            if self.ledger.wait_for_checker(task, envelope.issue, reason.clone(), Instant::now()) {
                tracing::warn!(?task, reason, "checker unavailable; the step is waiting for this task");
            }
            return Ok(());
        }
        let Some(refused) = self.ledger.refuse(refusal) else { return Ok(()) };
        let players: BTreeSet<&str> = refused.iter().map(|refusal| refusal.envelope.played_by.as_str()).collect();
        let mut others = self.workers.living(Role::Actor, Instant::now()).filter(|actor| !players.contains(actor));
        if refused.len() >= MAX_TRIES && (players.len() > 1 || others.next().is_none()) {
            let players = players.into_iter().map(str::to_owned).collect();
            return Err(Error::Unjudged { task, num_tries: refused.len(), players, reason });
        }
        tracing::warn!(actor = envelope.played_by, ?task, reason, "group could not be scored; reissuing its task");
        self.wanted.insert(task);
        Ok(())
    }

    /// Reissues a task whose latest issue a banned actor has answered.
    fn want_if_last(&mut self, task: TaskId, envelope: &Envelope) {
        if envelope.term == self.options.term && self.ledger.is_last(task, envelope.issue) {
            self.wanted.insert(task);
        }
    }

    fn accept_group(&mut self, Message { envelope, body: scored }: &Message<ScoredGroup>) -> Result<(), Error> {
        let id = scored.group.task.id;
        let Some(planned) = self.fold.planned().get(id) else { return Ok(()) };
        if scored.group.task.free_running && envelope.term != self.options.term {
            // Its version numbers may refer to other weights.
            return Ok(());
        }
        let disagrees = |reason: &str| {
            Err(Error::Integrity { what: "group", step: id.batch, reason: format!("task {}: {reason}", id.index) })
        };
        let is_planned = planned.task == scored.group.task;
        if !is_planned && envelope.term != self.options.term {
            // It was played for an earlier learner process, which had another plan.
            return Ok(());
        }
        let vocabulary_size = self.fold.config().model.vocabulary_size;
        let fault = match is_planned {
            true => scored.group.check(vocabulary_size).err(),
            false => Some("it does not match the planned task".to_owned()),
        };
        if let Some(reason) = fault {
            if !self.audits.is_on() {
                return disagrees(&reason);
            }
            // No honest actor sends such a group.
            self.wanted.insert(id);
            return self.ban(&envelope.played_by, id, reason);
        }
        if let Err(reason) = scored.check(vocabulary_size) {
            return disagrees(&reason);
        }
        let group = GroupRecord::new(envelope.played_by.clone(), scored.clone());
        let Some(first) = self.received.get(id) else {
            if self.fold.is_stale(scored) {
                self.note_stale(&[id]);
                return Ok(());
            }
            return self.hear(group);
        };
        first.expect_same_verdicts(&group)?;
        let [known, said] = [first, &group].map(GroupRecord::digest);
        // Copies of a free-running task were played by different weights.
        if known == said || scored.group.task.free_running {
            self.counts.num_duplicates += 1;
            return Ok(());
        }
        if !self.audits.is_on() {
            let [first, second] = [known, said].map(|digest| digest.short());
            return disagrees(&format!("two copies differ: {first} came first, then {second}"));
        }
        if self.was_folded(id.batch) {
            return Ok(());
        }
        // If the learner resumes before the dispute is decided, it has the task played again.
        self.append(Record::Dispute(id));
        self.received.take(&[id]).into_iter().for_each(|(_, first)| self.audits.dispute(first));
        self.hear(group)
    }

    /// Audits a group of a task that is not done, and accepts groups and bans actors accordingly.
    fn hear(&mut self, group: GroupRecord) -> Result<(), Error> {
        let id = group.task();
        match self.audits.hear(group)? {
            AuditOutcome::Known => self.counts.num_duplicates += 1,
            AuditOutcome::Undecided => {
                self.close(id);
                self.wanted.insert(id);
            }
            AuditOutcome::Contradiction(Mismatch { player, said, agreed }) => {
                self.ban(
                    &player,
                    id,
                    format!("it has digest {}, but an earlier copy has {}", said.short(), agreed.short()),
                )?;
            }
            AuditOutcome::Agreed(group, mismatches) => {
                // Bans come first: a ban record takes back the groups of the banned actor that precede it in the journal.
                for Mismatch { player, said, agreed } in mismatches {
                    self.ban(
                        &player,
                        id,
                        format!("it has digest {}, but others agree on {}", said.short(), agreed.short()),
                    )?;
                }
                self.receive(*group)?;
            }
        }
        Ok(())
    }

    /// Records the group that completes a task.
    fn receive(&mut self, group: GroupRecord) -> Result<(), Error> {
        let id = group.task();
        if self.audits.is_on() {
            // This group could be judged, so honest actors did not send the groups that could not be.
            let refused = self.ledger.refused(id).iter().map(|refusal| refusal.envelope.played_by.clone());
            let refused: BTreeSet<String> = refused.filter(|player| *player != group.played_by).collect();
            for player in refused.difference(&self.audits.banned().clone()) {
                self.ban(player, id, "it could not be scored, but another actor's could".to_owned())?;
            }
        }
        self.close(id);
        self.append(Record::Group(group.clone()));
        self.received.insert(group);
        Ok(())
    }

    /// Records progress: a task is done, or needs a group from another actor.
    pub(super) fn close(&mut self, task: TaskId) {
        let now = Instant::now();
        if self.ledger.close(task, now) {
            self.got_further = now;
        }
    }

    /// Bans an actor: ignores its later results, and reissues the tasks that it played for batches that are not sealed.
    fn ban(&mut self, player: &str, task: TaskId, reason: String) -> Result<(), Error> {
        let of_player = self.received.in_order().filter(|group| group.played_by == player).map(GroupRecord::task);
        let mut again: Vec<TaskId> = of_player.filter(|id| !self.was_folded(id.batch)).collect();
        self.received.take(&again);
        let (undecided, done) = self.audits.ban(player);
        again.extend(undecided);
        self.wanted.extend(&again);
        let taken_back = again.iter().copied().chain(done.iter().map(GroupRecord::task)).chain([task]);
        let record = BanRecord { player: player.to_owned(), tasks: taken_back.collect() };
        self.append(Record::Ban(record));
        let (num_trained, first, last) = self.audits.trained_on(player);
        let num_again = again.len();
        let ban = Ban { player: player.to_owned(), task, reason, num_trained, steps: (first, last), num_again };
        self.records.untold.push(Event::Ban(Box::new(ban)));
        done.into_iter().try_for_each(|group| self.receive(group))
    }

    /// Whether the journal records a batch as folded. A process that resumes before that step folds it again unchanged.
    fn was_folded(&self, batch: u64) -> bool {
        self.recovery.expected_steps.contains_key(&(batch + 1))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Duration;

    use bus::InProcess;
    use proto::{KeyedProblem, Problem, Task, Verdict};

    use super::*;
    use crate::journal::EvalRecord;
    use crate::main_loop::{Exam, KeepJournal, RunOptions};
    use crate::test_run::{answer, config, sources};
    use crate::{Audit, Models, Observer, RunLock, read_journal, test_manifest};

    const TERM: u64 = 7;

    fn options(run_dir: &Path, audit: Option<Audit>) -> RunOptions {
        RunOptions {
            run_dir: run_dir.to_owned(),
            resume: false,
            num_threads: 1,
            time_limit: None,
            checkpoint_every: 1,
            keep_checkpoints: 2,
            keep_journal: KeepJournal::All,
            stall_limit: Duration::from_secs(60),
            tell_after: Duration::from_secs(30),
            term: TERM,
            reissue_after: None,
            checker_limit: Duration::from_secs(300),
            audit,
            tokenizer_json: "{}".to_owned(),
            backend: policy::Backend::Cpu,
            models: Models::default(),
        }
    }

    /// Opens a learner that has issued its first batch.
    async fn learner<'a>(run_dir: &Path, audit: Option<Audit>, observer: Observer<'a>) -> Learner<'a> {
        let problem = |text: &str| Problem { domain: "countdown".to_owned(), text: text.to_owned() };
        let problems = ["1", "2"].map(|text| KeyedProblem { problem: problem(text), key: None }).to_vec();
        let exams = vec![Exam { name: "exam".to_owned(), problems }];
        let (options, bus) = (options(run_dir, audit), Arc::new(InProcess::new()));
        // Kept for as long as the test runs.
        let lock = Box::leak(Box::new(RunLock::take(run_dir).unwrap()));
        let learner = Learner::open(config(), options, lock, test_manifest(), sources(), exams, bus, observer);
        let mut learner = learner.await.unwrap();
        learner.issue_batches().await.unwrap();
        learner
    }

    fn block_on(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        runtime.unwrap().block_on(test);
    }

    async fn accept(learner: &mut Learner<'_>, term: u64, played_by: &str, body: ScoredGroup) -> Result<(), Error> {
        let envelope = Envelope { term, played_by: played_by.to_owned(), ..Envelope::default() };
        learner.bus.publish_scored(Message { envelope, body }).await.unwrap();
        let delivery = learner.bus.next_scored().await.unwrap();
        learner.accept(delivery)
    }

    fn task(learner: &Learner<'_>, index: usize) -> Task {
        learner.fold.planned().iter().nth(index).unwrap().task.clone()
    }

    fn records(run_dir: &Path) -> Vec<Record> {
        let mut records = Vec::new();
        read_journal(&run_dir.join("journal"), |record| records.push(record)).unwrap();
        records
    }

    #[test]
    fn a_group_is_kept_once_and_another_of_its_task_ends_the_run() {
        let folder = tempfile::tempdir().unwrap();
        block_on(async {
            let observer: Observer<'_> = &mut |_| Ok(());
            let mut learner = learner(folder.path(), None, observer).await;
            let task = task(&learner, 1);
            for num_duplicates in 0..2 {
                accept(&mut learner, TERM, "a", answer(&task, -1.0)).await.unwrap();
                assert_eq!((learner.received.len(), learner.counts.num_duplicates), (1, num_duplicates));
            }
            assert_eq!(learner.records.unsynced.len(), 2, "the bus keeps them until they are on the disk");
            learner.sync().await.unwrap();
            assert!(learner.records.unsynced.is_empty());
            assert!(
                matches!(&records(folder.path())[..], [Record::Manifest(_), Record::Group(group)] if group.task() == task.id)
            );
            let error = accept(&mut learner, TERM, "a", answer(&task, -2.0)).await.unwrap_err().to_string();
            let says = "integrity: group of step 0: task 1: two copies differ: ";
            assert!(error.starts_with(says) && error.contains(" came first, then "), "{error}");
            let mut other_verdict = answer(&task, -1.0);
            other_verdict.verdicts[0] = Verdict::Incorrect;
            let error = accept(&mut learner, TERM, "a", other_verdict).await.unwrap_err().to_string();
            assert!(error.contains("task 1: verdicts on one group differ"), "{error}");
        });
    }

    #[test]
    fn what_was_played_for_another_plan_is_this_learners_fault_or_an_earlier_ones() {
        let folder = tempfile::tempdir().unwrap();
        block_on(async {
            let observer: Observer<'_> = &mut |_| Ok(());
            let mut learner = learner(folder.path(), None, observer).await;
            let task = task(&learner, 0);
            let later = Task { id: TaskId { batch: 99, ..task.id }, ..task.clone() };
            accept(&mut learner, TERM, "a", answer(&later, -1.0)).await.unwrap();
            let other = Task { seed: task.seed + 1, ..task.clone() };
            accept(&mut learner, TERM - 1, "a", answer(&other, -1.0)).await.unwrap();
            assert_eq!(learner.received.len(), 0, "both are passed over");
            let error = accept(&mut learner, TERM, "a", answer(&other, -1.0)).await.unwrap_err().to_string();
            assert_eq!(error, "integrity: group of step 0: task 0: it does not match the planned task");
            let mut broken = answer(&task, -1.0);
            broken.group.rollouts.pop();
            let error = accept(&mut learner, TERM, "a", broken).await.unwrap_err().to_string();
            assert!(error.contains("task 0: expected as many rollouts as the task requests"), "{error}");
            accept(&mut learner, TERM - 1, "a", answer(&task, -1.0)).await.unwrap();
            assert_eq!(learner.received.len(), 1, "the same plan was played for an earlier life");
        });
    }

    #[test]
    fn a_task_of_which_nothing_can_be_made_is_played_a_few_times() {
        let folder = tempfile::tempdir().unwrap();
        block_on(async {
            let observer: Observer<'_> = &mut |_| Ok(());
            let mut learner = learner(folder.path(), None, observer).await;
            let task = task(&learner, 2).id;
            let refusal = |term, issue| {
                let envelope = Envelope { term, issue, played_by: "a".to_owned(), ..Envelope::default() };
                Refusal { envelope, task, cause: RefusalCause::Group, reason: "no problem".to_owned() }
            };
            learner.refuse(refusal(TERM - 1, 0)).unwrap();
            assert!(learner.wanted.is_empty(), "an earlier life asked for it");
            for issue in 0..MAX_TRIES as u32 - 1 {
                for _ in 0..2 {
                    learner.refuse(refusal(TERM, issue)).unwrap();
                }
                assert_eq!(std::mem::take(&mut learner.wanted), BTreeSet::from([task]));
                learner.issue_again(vec![task]).await.unwrap();
            }
            let error = learner.refuse(refusal(TERM, MAX_TRIES as u32 - 1)).unwrap_err().to_string();
            let says = "task 2 of batch 0: 5 consecutive groups could not be scored (actors a): no problem";
            assert_eq!(error, says);
        });
    }

    /// A ban is on the disk before the observer is told of it.
    #[test]
    fn a_ban_is_told_when_it_is_durable_and_what_a_banned_actor_sends_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().to_owned();
        let mut told = Vec::new();
        block_on(async {
            let observer: Observer<'_> = &mut |event| {
                if let Event::Ban(ban) = event {
                    let is_ban = |record: &Record| matches!(record, Record::Ban(record) if record.player == ban.player);
                    assert!(records(&run_dir).iter().any(is_ban), "{ban}");
                    told.push(ban.player);
                }
                Ok(())
            };
            let audit = Audit { share: 0.0, secret: [7; 32] };
            let mut learner = learner(folder.path(), Some(audit), observer).await;
            let [first, second] = [0, 1].map(|index| task(&learner, index));
            accept(&mut learner, TERM, "b", answer(&second, -1.0)).await.unwrap();
            accept(&mut learner, TERM, "a", answer(&first, -1.0)).await.unwrap();
            accept(&mut learner, TERM, "b", answer(&first, -2.0)).await.unwrap();
            assert_eq!((learner.received.len(), learner.wanted.len()), (1, 1), "the first one is disputed");
            accept(&mut learner, TERM, "c", answer(&first, -1.0)).await.unwrap();
            assert!(learner.received.contains(first.id) && !learner.received.contains(second.id));
            assert!(learner.wanted.contains(&second.id), "what b had played is played again");
            assert_eq!((learner.records.untold.len(), learner.records.known.bans.len()), (1, 1));
            learner.sync().await.unwrap();
            assert!(learner.records.untold.is_empty() && learner.records.unsynced.is_empty());
            accept(&mut learner, TERM, "b", answer(&second, -1.0)).await.unwrap();
            assert_eq!((learner.counts.num_refused, learner.received.len()), (1, 1));
        });
        assert_eq!(told, ["b"]);
    }

    #[test]
    fn an_exam_is_over_with_its_last_answer() {
        let folder = tempfile::tempdir().unwrap();
        let mut told = Vec::new();
        block_on(async {
            let observer: Observer<'_> = &mut |event| {
                told.extend(if let Event::Eval(eval) = event { Some(eval) } else { None });
                Ok(())
            };
            let mut learner = learner(folder.path(), None, observer).await;
            learner.begin_sitting(0, false).await.unwrap();
            let tasks = learner.sitting.as_ref().unwrap().tasks.clone();
            let tasks: Vec<Task> = tasks.into_iter().map(|(task, _)| task).collect();
            let mut wrong = answer(&tasks[1], -1.0);
            wrong.verdicts[0] = Verdict::Incorrect;
            let other = Task { seed: 99, ..tasks[0].clone() };
            for body in [wrong.clone(), wrong, answer(&other, -1.0), answer(&tasks[0], -1.0), answer(&tasks[0], -1.0)] {
                accept(&mut learner, TERM, "a", body).await.unwrap();
            }
            assert!(learner.sitting.is_none());
            assert_eq!(
                (learner.counts.num_duplicates, learner.evals.len(), learner.records.known.evals.len()),
                (1, 1, 1)
            );
        });
        let expected = EvalRecord { step: 0, exam: "exam".to_owned(), num_correct: 1, num_problems: 2 };
        assert_eq!(told, [expected]);
    }

    /// An observer may wait for a slow disk: the other tasks of a single-threaded runtime go on meanwhile.
    #[test]
    fn a_runtime_of_one_thread_goes_on_while_an_observer_waits() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().to_owned();
        block_on(async {
            let (ticks, ticked) = std::sync::mpsc::channel();
            let ticked = std::sync::Mutex::new(ticked);
            tokio::spawn(async move {
                while ticks.send(()).is_ok() {
                    tokio::task::yield_now().await;
                }
            });
            let saved = tokio::spawn(async move {
                let mut num_waits = 0;
                let observer: Observer<'_> = &mut |event| {
                    if matches!(event, Event::Saving | Event::Checkpoint(_)) {
                        // Ticks that were sent before prove nothing.
                        while ticked.lock().unwrap().try_recv().is_ok() {}
                        for _ in 0..3 {
                            ticked.lock().unwrap().recv_timeout(Duration::from_secs(60))?;
                        }
                        num_waits += 1;
                    }
                    Ok(())
                };
                let mut learner = learner(&run_dir, None, observer).await;
                let saved = learner.checkpoint().await;
                drop(learner);
                saved.map(|()| num_waits)
            });
            assert_eq!(saved.await.unwrap().unwrap(), 2, "the runtime ticks meanwhile");
        });
    }
}
