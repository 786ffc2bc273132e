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
        let fault =
            if is_planned { scored.group.check().err() } else { Some("it was not played for this plan".to_owned()) };
        if let Some(reason) = fault {
            if !self.audits.is_on() {
                return disagrees(&reason);
            }
            // No honest actor does that.
            self.wanted.insert(id);
            return self.ban(&envelope.played_by, id, reason);
        }
        if let Err(reason) = scored.check() {
            return disagrees(&reason);
        }
        let group = GroupRecord { played_by: envelope.played_by.clone(), scored: scored.clone() };
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
        self.journal.append(&Record::Dispute(id))?;
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
        self.journal.append(&Record::Group(group.clone()))?;
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
        self.journal.append(&Record::Ban(record))?;
        self.journal.sync()?;
        let (num_trained, first, last) = self.audits.trained_on(player);
        let num_again = again.len();
        let ban = Ban { player: player.to_owned(), task, reason, num_trained, steps: (first, last), num_again };
        (self.observer)(Event::Ban(Box::new(ban)))?;
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
            self.journal.append(&Record::Eval(eval.clone()))?;
            (self.observer)(Event::Eval(eval.clone()))?;
            self.evals.push(eval);
        }
        Ok(())
    }
}
