//! What comes in: which groups are believed, and whose.

use std::collections::BTreeSet;

use bus::Delivery;
use proto::{Envelope, Message, Refusal, Role, ScoredGroup, TaskId, TaskKind, Verdict};
use tokio::time::Instant;

use super::Learner;
use crate::Error;
use crate::audit::{Heard, Lie};
use crate::event::{Ban, Event};
use crate::journal::{BanRecord, EvalRecord, GroupRecord, Record};

/// How many groups of a task in turn may be of no use before the run ends and names it.
const MAX_TRIES: usize = 5;

impl Learner<'_> {
    /// Takes in what a verifier says.
    pub(super) fn accept(&mut self, delivery: Delivery<ScoredGroup>) -> Result<(), Error> {
        let Message { envelope, body } = &delivery.message;
        let id = body.group.task.id;
        let is_refused = self.audits.banned().contains(&envelope.played_by);
        match id.kind {
            _ if is_refused => {
                self.num_refused += 1;
                self.want_if_last(id, envelope);
            }
            TaskKind::Evaluate => self.accept_exam_answer(body)?,
            TaskKind::Train => self.accept_group(&delivery.message)?,
        }
        self.unsynced.push(delivery);
        Ok(())
    }

    /// Has a task played again whose group could not be judged. After a few tries of several actors, or of the only one, it is
    /// the task's fault.
    pub(super) fn refuse(&mut self, refusal: Refusal) -> Result<(), Error> {
        let Refusal { envelope, task, reason } = refusal.clone();
        if envelope.epoch != self.options.epoch {
            return Ok(());
        }
        if self.audits.banned().contains(&envelope.played_by) {
            // Whatever it sends, it is not the task's fault.
            self.want_if_last(task, &envelope);
            return Ok(());
        }
        let Some(refused) = self.ledger.refuse(refusal) else { return Ok(()) };
        let players: BTreeSet<&str> = refused.iter().map(|refusal| refusal.envelope.played_by.as_str()).collect();
        let mut others = self.workers.living(Role::Actor, Instant::now()).filter(|actor| !players.contains(actor));
        if refused.len() >= MAX_TRIES && (players.len() > 1 || others.next().is_none()) {
            let players = players.into_iter().map(str::to_owned).collect();
            return Err(Error::Unjudged { task, num_tries: refused.len(), players, reason });
        }
        tracing::warn!(
            actor = envelope.played_by,
            ?task,
            reason,
            "a group could not be judged; its task is played again"
        );
        self.wanted.insert(task);
        Ok(())
    }

    /// Has a task played again of which a banned actor has answered the last issue that is out.
    fn want_if_last(&mut self, task: TaskId, envelope: &Envelope) {
        if envelope.epoch == self.options.epoch && self.ledger.is_last(task, envelope.issue) {
            self.wanted.insert(task);
        }
    }

    fn accept_group(&mut self, Message { envelope, body: scored }: &Message<ScoredGroup>) -> Result<(), Error> {
        let id = scored.group.task.id;
        let Some(planned) = self.fold.planned().get(id) else { return Ok(()) };
        if scored.group.task.free_running && envelope.epoch != self.options.epoch {
            // Its versions may be numbers of other weights.
            return Ok(());
        }
        let disagrees = |reason: &str| {
            Err(Error::Integrity { what: "group", step: id.batch, reason: format!("task {}: {reason}", id.index) })
        };
        let is_planned = planned.task == scored.group.task;
        if !is_planned && envelope.epoch != self.options.epoch {
            // Played for an earlier life of the learner, which had planned otherwise.
            return Ok(());
        }
        let vocabulary_size = self.fold.config().model.vocabulary_size;
        let fault = match is_planned {
            true => scored.group.check(vocabulary_size).err(),
            false => Some("it was not played for this plan".to_owned()),
        };
        if let Some(reason) = fault {
            if !self.audits.is_on() {
                return disagrees(&reason);
            }
            // No honest actor does that.
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
            self.num_duplicates += 1;
            return Ok(());
        }
        if !self.audits.is_on() {
            let [first, second] = [known, said].map(|digest| digest.short());
            return disagrees(&format!("two copies differ: {first} came first, then {second}"));
        }
        if self.was_folded(id.batch) {
            return Ok(());
        }
        // A learner that goes on before it is decided has both played again.
        self.append(Record::Dispute(id));
        self.received.take(&[id]).into_iter().for_each(|(_, first)| self.audits.dispute(first));
        self.hear(group)
    }

    /// Takes in a group of a task that is not done, and does with its actor, and with others, what it calls for.
    fn hear(&mut self, group: GroupRecord) -> Result<(), Error> {
        let id = group.task();
        match self.audits.hear(group)? {
            Heard::Known => self.num_duplicates += 1,
            Heard::Undecided => {
                self.close(id);
                self.wanted.insert(id);
            }
            Heard::Contradiction(Lie { player, said, agreed }) => {
                self.ban(&player, id, format!("it said {}, then {}", agreed.short(), said.short()))?;
            }
            Heard::Agreed(group, lies) => {
                // First: what the journal has of a banned actor is taken back by the record that follows it.
                for Lie { player, said, agreed } in lies {
                    self.ban(&player, id, format!("it said {}, others agree on {}", said.short(), agreed.short()))?;
                }
                self.receive(*group)?;
            }
        }
        Ok(())
    }

    /// Keeps the group with which a task is done.
    fn receive(&mut self, group: GroupRecord) -> Result<(), Error> {
        let id = group.task();
        if self.audits.is_on() {
            // One actor's group could be judged, so others that could not be were no honest actor's.
            let refused = self.ledger.refused(id).iter().map(|refusal| refusal.envelope.played_by.clone());
            let refused: BTreeSet<String> = refused.filter(|player| *player != group.played_by).collect();
            for player in refused.difference(&self.audits.banned().clone()) {
                self.ban(player, id, "it could not be judged, another actor's could".to_owned())?;
            }
        }
        self.close(id);
        self.append(Record::Group(group.clone()));
        self.received.insert(group);
        Ok(())
    }

    /// Notes that the run got further: a task is done, or needs another actor to be.
    fn close(&mut self, task: TaskId) {
        let now = Instant::now();
        if self.ledger.close(task, now) {
            self.got_further = now;
        }
    }

    /// Believes an actor nothing any more: what it played of batches that are not sealed is played again.
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
        self.untold.push(Event::Ban(Box::new(ban)));
        done.into_iter().try_for_each(|group| self.receive(group))
    }

    /// Tells whether the journal knows a batch as folded; a process that goes on before that folds it again as it was.
    fn was_folded(&self, batch: u64) -> bool {
        self.expected_steps.contains_key(&(batch + 1))
    }

    fn accept_exam_answer(&mut self, scored: &ScoredGroup) -> Result<(), Error> {
        let id = scored.group.task.id;
        let Some(sitting) = self.sitting.as_mut().filter(|sitting| sitting.step == id.batch) else { return Ok(()) };
        if sitting.tasks.get(id.index as usize) != Some(&scored.group.task) {
            return Ok(());
        }
        let answer = &mut sitting.correct[id.index as usize];
        if answer.is_some() {
            self.num_duplicates += 1;
            return Ok(());
        }
        *answer = Some(scored.verdicts.first() == Some(&Verdict::Correct));
        let is_over = sitting.correct.iter().all(Option::is_some);
        self.close(id);
        if !is_over {
            return Ok(());
        }
        let Some(sitting) = self.sitting.take() else { return Ok(()) };
        self.ledger.forget(&sitting.tasks.iter().map(|task| task.id).collect::<Vec<_>>());
        let mut correct = sitting.correct.into_iter();
        for (exam, num_problems) in sitting.parts {
            let num_correct = correct.by_ref().take(num_problems).filter(|correct| *correct == Some(true)).count();
            let eval = EvalRecord {
                step: sitting.step,
                exam,
                num_correct: num_correct as u64,
                num_problems: num_problems as u64,
            };
            self.append(Record::Eval(eval.clone()));
            self.tell(Event::Eval(eval.clone()))?;
            self.evals.push(eval);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Duration;

    use bus::InProcess;
    use proto::{Problem, Task};

    use super::*;
    use crate::main_loop::{Exam, KeepJournal, RunOptions};
    use crate::test_run::{answer, config, sources};
    use crate::{Audit, Observer, RunLock, read_journal, test_manifest};

    const EPOCH: u64 = 7;

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
            epoch: EPOCH,
            reissue_after: None,
            audit,
            tokenizer_json: "{}".to_owned(),
        }
    }

    /// A learner that has asked for its first batch.
    async fn learner<'a>(run_dir: &Path, audit: Option<Audit>, observer: Observer<'a>) -> Learner<'a> {
        let problem = |text: &str| Problem { domain: "countdown".to_owned(), text: text.to_owned() };
        let exams = vec![Exam { name: "exam".to_owned(), problems: vec![problem("1"), problem("2")] }];
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

    async fn accept(learner: &mut Learner<'_>, epoch: u64, played_by: &str, body: ScoredGroup) -> Result<(), Error> {
        let envelope = Envelope { epoch, played_by: played_by.to_owned(), ..Envelope::default() };
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
                accept(&mut learner, EPOCH, "a", answer(&task, -1.0)).await.unwrap();
                assert_eq!((learner.received.len(), learner.num_duplicates), (1, num_duplicates));
            }
            assert_eq!(learner.unsynced.len(), 2, "the bus keeps them until they are on the disk");
            learner.sync().await.unwrap();
            assert!(learner.unsynced.is_empty());
            assert!(
                matches!(&records(folder.path())[..], [Record::Manifest(_), Record::Group(group)] if group.task() == task.id)
            );
            let error = accept(&mut learner, EPOCH, "a", answer(&task, -2.0)).await.unwrap_err().to_string();
            let says = "integrity: group of step 0: task 1: two copies differ: ";
            assert!(error.starts_with(says) && error.contains(" came first, then "), "{error}");
            let mut other_verdict = answer(&task, -1.0);
            other_verdict.verdicts[0] = Verdict::Incorrect;
            let error = accept(&mut learner, EPOCH, "a", other_verdict).await.unwrap_err().to_string();
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
            accept(&mut learner, EPOCH, "a", answer(&later, -1.0)).await.unwrap();
            let other = Task { seed: task.seed + 1, ..task.clone() };
            accept(&mut learner, EPOCH - 1, "a", answer(&other, -1.0)).await.unwrap();
            assert_eq!(learner.received.len(), 0, "both are passed over");
            let error = accept(&mut learner, EPOCH, "a", answer(&other, -1.0)).await.unwrap_err().to_string();
            assert_eq!(error, "integrity: group of step 0: task 0: it was not played for this plan");
            let mut broken = answer(&task, -1.0);
            broken.group.rollouts.pop();
            let error = accept(&mut learner, EPOCH, "a", broken).await.unwrap_err().to_string();
            assert!(error.contains("task 0: expected as many rollouts as were asked for"), "{error}");
            accept(&mut learner, EPOCH - 1, "a", answer(&task, -1.0)).await.unwrap();
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
            let refusal = |epoch, issue| {
                let envelope = Envelope { epoch, issue, played_by: "a".to_owned(), ..Envelope::default() };
                Refusal { envelope, task, reason: "no problem".to_owned() }
            };
            learner.refuse(refusal(EPOCH - 1, 0)).unwrap();
            assert!(learner.wanted.is_empty(), "an earlier life asked for it");
            for issue in 0..MAX_TRIES as u32 - 1 {
                for _ in 0..2 {
                    learner.refuse(refusal(EPOCH, issue)).unwrap();
                }
                assert_eq!(std::mem::take(&mut learner.wanted), BTreeSet::from([task]));
                learner.issue_again(vec![task]).await.unwrap();
            }
            let error = learner.refuse(refusal(EPOCH, MAX_TRIES as u32 - 1)).unwrap_err().to_string();
            let says = "task 2 of batch 0: 5 groups in turn could not be judged, played by a: no problem";
            assert_eq!(error, says);
        });
    }

    /// Whoever is told of a ban finds it on the disk.
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
            accept(&mut learner, EPOCH, "b", answer(&second, -1.0)).await.unwrap();
            accept(&mut learner, EPOCH, "a", answer(&first, -1.0)).await.unwrap();
            accept(&mut learner, EPOCH, "b", answer(&first, -2.0)).await.unwrap();
            assert_eq!((learner.received.len(), learner.wanted.len()), (1, 1), "the first one is disputed");
            accept(&mut learner, EPOCH, "c", answer(&first, -1.0)).await.unwrap();
            assert!(learner.received.contains(first.id) && !learner.received.contains(second.id));
            assert!(learner.wanted.contains(&second.id), "what b had played is played again");
            assert_eq!((learner.untold.len(), learner.known.bans.len()), (1, 1));
            learner.sync().await.unwrap();
            assert!(learner.untold.is_empty() && learner.unsynced.is_empty());
            accept(&mut learner, EPOCH, "b", answer(&second, -1.0)).await.unwrap();
            assert_eq!((learner.num_refused, learner.received.len()), (1, 1));
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
            let mut wrong = answer(&tasks[1], -1.0);
            wrong.verdicts[0] = Verdict::Incorrect;
            let other = Task { seed: 99, ..tasks[0].clone() };
            for body in [wrong.clone(), wrong, answer(&other, -1.0), answer(&tasks[0], -1.0), answer(&tasks[0], -1.0)] {
                accept(&mut learner, EPOCH, "a", body).await.unwrap();
            }
            assert!(learner.sitting.is_none());
            assert_eq!((learner.num_duplicates, learner.evals.len(), learner.known.evals.len()), (1, 1, 1));
        });
        let expected = EvalRecord { step: 0, exam: "exam".to_owned(), num_correct: 1, num_problems: 2 };
        assert_eq!(told, [expected]);
    }

    /// Whoever is told of a checkpoint may wait for a slow disk: what else the only thread of the runtime has to do goes on.
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
                        // What was sent before says nothing.
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
