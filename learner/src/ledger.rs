use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::{Refusal, TaskId, TaskKind};
use tokio::time::Instant;

/// Which tasks are out, and since when: whatever the bus loses is asked for again from here.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    issued: BTreeMap<TaskId, Issued>,
    /// How long the tasks took that are in, by the batch or the exams that they were asked for with.
    took: BTreeMap<(TaskKind, u64), Vec<Duration>>,
    /// Groups of tasks that are out of which nothing could be made, one an issue.
    refused: BTreeMap<TaskId, Vec<Refusal>>,
    num_reissued: u64,
}

#[derive(Clone, Copy, Debug)]
struct Issued {
    /// How often it was asked for before.
    number: u32,
    /// Since when its next group is waited for.
    first: Instant,
    last: Instant,
    /// Kept for the number: an issue that had an earlier one's would be taken for its copy.
    is_done: bool,
}

/// The slowest share of what is asked for together, which is asked for again before it is overdue.
const SLOWEST: f64 = 0.02;

/// How many times as long as the rest they take by then.
const SLOWNESS: u32 = 2;

impl Ledger {
    /// Notes that a task is asked for; gives the number of the issue.
    pub(crate) fn issue(&mut self, task: TaskId, now: Instant) -> u32 {
        match self.issued.get_mut(&task) {
            Some(issued) => {
                issued.number += 1;
                if std::mem::take(&mut issued.is_done) {
                    issued.first = now;
                }
                issued.last = now;
                self.num_reissued += 1;
                issued.number
            }
            None => {
                self.issued.insert(task, Issued { number: 0, first: now, last: now, is_done: false });
                0
            }
        }
    }

    /// Tells whether the issue of this number is the last that is out of a task that is not done.
    pub(crate) fn is_last(&self, task: TaskId, issue: u32) -> bool {
        self.issued.get(&task).is_some_and(|issued| !issued.is_done && issued.number == issue)
    }

    /// Notes that nothing could be made of a group; gives all such of its task, where it is of the last issue that is out.
    pub(crate) fn refuse(&mut self, refusal: Refusal) -> Option<&[Refusal]> {
        let (task, issue) = (refusal.task, refusal.envelope.issue);
        let refused = self.refused(task);
        if !self.is_last(task, issue) || refused.last().is_some_and(|last| last.envelope.issue == issue) {
            return None;
        }
        self.refused.entry(task).or_default().push(refusal);
        Some(self.refused(task))
    }

    /// Gives the groups of a task that is out of which nothing could be made.
    pub(crate) fn refused(&self, task: TaskId) -> &[Refusal] {
        self.refused.get(&task).map_or(&[], Vec::as_slice)
    }

    /// Notes that a task is done, or that a group of it has come and another is needed: when it is asked for next, it begins anew.
    /// Tells whether it was out.
    pub(crate) fn close(&mut self, task: TaskId, now: Instant) -> bool {
        let Some(issued) = self.issued.get_mut(&task).filter(|issued| !issued.is_done) else { return false };
        issued.is_done = true;
        self.took.entry((task.kind, task.batch)).or_default().push(now - issued.first);
        self.refused.remove(&task);
        true
    }

    /// Forgets tasks that are not asked for any more.
    pub(crate) fn forget(&mut self, tasks: &[TaskId]) {
        for task in tasks {
            self.issued.remove(task);
            self.refused.remove(task);
        }
        let are_out: BTreeSet<(TaskKind, u64)> = self.issued.keys().map(|task| (task.kind, task.batch)).collect();
        self.took.retain(|batch, _| are_out.contains(batch));
    }

    /// Names every task that is out.
    pub(crate) fn open(&self) -> Vec<TaskId> {
        self.iter().map(|(task, _)| task).collect()
    }

    fn iter(&self) -> impl Iterator<Item = (TaskId, &Issued)> {
        self.issued.iter().filter(|(_, issued)| !issued.is_done).map(|(task, issued)| (*task, issued))
    }

    /// Names the tasks to ask for again: those that nobody was heard of for `limit`, and the slowest few of a batch when all
    /// others of it took less than half of what they have taken.
    pub(crate) fn due(&self, limit: Duration, now: Instant) -> Vec<TaskId> {
        let mut num_open = BTreeMap::<(TaskKind, u64), usize>::new();
        self.iter().for_each(|(task, _)| *num_open.entry((task.kind, task.batch)).or_default() += 1);
        // What is slow in a batch of which only the slowest few are out.
        let slow = num_open.iter().filter_map(|(batch, num_open)| {
            let took = self.took.get(batch)?;
            let num_slow = ((num_open + took.len()) as f64 * SLOWEST).ceil() as usize;
            (*num_open <= num_slow).then_some((*batch, *took.iter().max()? * SLOWNESS))
        });
        let slow: BTreeMap<(TaskKind, u64), Duration> = slow.collect();
        let is_due = |(task, issued): &(TaskId, &Issued)| {
            let is_slow = slow.get(&(task.kind, task.batch)).is_some_and(|slow| now - issued.first > *slow);
            is_slow && issued.first == issued.last || now - issued.last >= limit
        };
        self.iter().filter(is_due).map(|(task, _)| task).collect()
    }

    /// Tells whether nobody was heard of some task for `limit`.
    pub(crate) fn is_overdue(&self, limit: Duration, now: Instant) -> bool {
        self.iter().any(|(_, issued)| now - issued.last >= limit)
    }

    /// How often a task was asked for again.
    pub(crate) fn num_reissued(&self) -> u64 {
        self.num_reissued
    }
}

#[cfg(test)]
mod tests {
    use proto::Envelope;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);
    const SECOND: Duration = Duration::from_secs(1);

    fn task(index: u32) -> TaskId {
        TaskId { kind: TaskKind::Train, batch: 0, index }
    }

    fn issued(num_tasks: u32, now: Instant) -> Ledger {
        let mut ledger = Ledger::default();
        for index in 0..num_tasks {
            assert_eq!(ledger.issue(task(index), now), 0);
        }
        ledger
    }

    #[test]
    fn what_is_not_heard_of_is_due_once_in_a_while() {
        let began = Instant::now();
        let mut ledger = issued(4, began);
        ledger.close(task(1), began + LIMIT / 2);
        assert_eq!(ledger.due(LIMIT, began + LIMIT - SECOND), []);
        assert_eq!(ledger.due(LIMIT, began + LIMIT), [task(0), task(2), task(3)]);
        assert_eq!(ledger.issue(task(2), began + LIMIT), 1);
        assert_eq!(ledger.due(LIMIT, began + LIMIT + SECOND), [task(0), task(3)]);
        assert_eq!(ledger.due(LIMIT, began + 2 * LIMIT), [task(0), task(2), task(3)]);
        assert_eq!(ledger.num_reissued(), 1);
    }

    #[test]
    fn no_two_issues_of_a_task_have_the_same_number() {
        let began = Instant::now();
        let mut ledger = issued(2, began);
        ledger.close(task(0), began + SECOND);
        assert_eq!(ledger.open(), [task(1)]);
        assert_eq!(ledger.issue(task(0), began + LIMIT), 1, "what came was of no use");
        assert_eq!(ledger.open(), [task(0), task(1)]);
        ledger.forget(&[task(0), task(1)]);
        assert_eq!(ledger.open(), []);
    }

    #[test]
    fn the_slowest_few_are_asked_for_again_once() {
        let began = Instant::now();
        let mut ledger = issued(100, began);
        for index in 0..97 {
            ledger.close(task(index), began + SECOND);
        }
        assert_eq!(ledger.due(LIMIT, began + 3 * SECOND), [], "three of a hundred are not the slowest two");
        ledger.close(task(97), began + SECOND);
        assert_eq!(ledger.due(LIMIT, began + 2 * SECOND), []);
        assert_eq!(ledger.due(LIMIT, began + 3 * SECOND), [task(98), task(99)]);
        assert!(!ledger.is_overdue(LIMIT, began + 3 * SECOND) && ledger.is_overdue(LIMIT, began + LIMIT));
        let of_next = TaskId { batch: 1, ..task(0) };
        ledger.issue(of_next, began + 3 * SECOND);
        assert_eq!(ledger.due(LIMIT, began + 3 * SECOND), [task(98), task(99)], "another batch is another matter");
        ledger.forget(&[of_next]);
        ledger.issue(task(98), began + 3 * SECOND);
        assert_eq!(ledger.due(LIMIT, began + 9 * SECOND), [task(99)]);
    }

    #[test]
    fn a_refusal_counts_once_an_issue_until_the_task_is_done() {
        let began = Instant::now();
        let mut ledger = issued(2, began);
        let refuse = |ledger: &mut Ledger, issue| {
            let envelope = Envelope { issue, ..Envelope::default() };
            let refusal = Refusal { envelope, task: task(1), reason: "no sense".to_owned() };
            ledger.refuse(refusal).map(<[Refusal]>::len)
        };
        assert_eq!(refuse(&mut ledger, 1), None, "nobody asked for that");
        assert_eq!((refuse(&mut ledger, 0), refuse(&mut ledger, 0)), (Some(1), None));
        ledger.issue(task(1), began + SECOND);
        assert_eq!((refuse(&mut ledger, 0), refuse(&mut ledger, 1)), (None, Some(2)));
        ledger.close(task(1), began + SECOND);
        assert_eq!((refuse(&mut ledger, 1), ledger.refused(task(1)).len()), (None, 0));
    }

    /// The bus takes two messages of one number for one.
    #[test]
    fn what_is_asked_for_after_it_was_done_begins_anew_and_has_another_number() {
        let began = Instant::now();
        let mut ledger = issued(2, began);
        ledger.close(task(1), began + SECOND);
        assert!(!ledger.is_last(task(1), 0), "it is done");
        assert_eq!(ledger.issue(task(1), began + SECOND), 1);
        assert_eq!((ledger.is_last(task(1), 0), ledger.is_last(task(1), 1)), (false, true));
        assert_eq!(ledger.due(LIMIT, began + LIMIT), [task(0)]);
    }
}
