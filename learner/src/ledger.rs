use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::{Refusal, TaskId, TaskKind};
use tokio::time::Instant;

/// Outstanding tasks and when they were issued. Tasks that the bus loses are reissued from here.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    issued: BTreeMap<TaskId, Issued>,
    /// Durations of finished tasks, by the batch or the exams that they were issued with.
    took: BTreeMap<(TaskKind, u64), Vec<Duration>>,
    /// Groups of outstanding tasks that could not be judged, one per issue.
    refused: BTreeMap<TaskId, Vec<Refusal>>,
    /// Outstanding tasks whose checker is unavailable.
    unavailable: BTreeMap<TaskId, Unavailable>,
    num_reissued: u64,
}

/// A checker that does not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unavailable {
    /// When the wait for its verdicts on a task began.
    pub(crate) since: Instant,
    /// The last reported reason.
    pub(crate) reason: String,
}

#[derive(Clone, Copy, Debug)]
struct Issued {
    /// Number of the latest issue, from 0.
    number: u32,
    /// When the wait for its next group began.
    first: Instant,
    last: Instant,
    /// Done tasks are kept for the number: an issue with an earlier one's number would be treated as its copy.
    is_done: bool,
}

/// The slowest share of the tasks of a batch, which is reissued before it is overdue.
const SLOWEST: f64 = 0.02;

/// A slow task has taken this many times as long as the slowest of the others.
const SLOWNESS: u32 = 2;

impl Ledger {
    /// Records that a task is issued; returns the number of the issue.
    pub(crate) fn issue(&mut self, task: TaskId, now: Instant) -> u32 {
        self.unavailable.remove(&task);
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

    /// Whether this is the latest issue of an outstanding task.
    pub(crate) fn is_last(&self, task: TaskId, issue: u32) -> bool {
        self.issued.get(&task).is_some_and(|issued| !issued.is_done && issued.number == issue)
    }

    /// Records that a group could not be judged. Returns all such groups of its task if it answers the latest issue.
    pub(crate) fn refuse(&mut self, refusal: Refusal) -> Option<&[Refusal]> {
        let (task, issue) = (refusal.task, refusal.envelope.issue);
        self.unavailable.remove(&task);
        let refused = self.refused(task);
        if !self.is_last(task, issue) || refused.last().is_some_and(|last| last.envelope.issue == issue) {
            return None;
        }
        self.refused.entry(task).or_default().push(refusal);
        Some(self.refused(task))
    }

    /// Records that the checker of an outstanding task was unavailable for its latest issue. Returns whether this is the first task to
    /// wait.
    pub(crate) fn wait_for_checker(&mut self, task: TaskId, issue: u32, reason: String, now: Instant) -> bool {
        if !self.is_last(task, issue) {
            return false;
        }
        if let Some(issued) = self.issued.get_mut(&task) {
            // A verifier has its group.
            issued.last = now;
        }
        let is_first = self.unavailable.is_empty();
        let unavailable = self.unavailable.entry(task);
        unavailable.or_insert_with(|| Unavailable { since: now, reason: String::new() }).reason = reason;
        is_first
    }

    /// Records that the checker of a task has answered.
    pub(crate) fn checker_answered(&mut self, task: TaskId) {
        self.unavailable.remove(&task);
    }

    /// Returns what is known of the checker of a task if it is unavailable.
    pub(crate) fn unavailable(&self, task: TaskId) -> Option<&Unavailable> {
        self.unavailable.get(&task)
    }

    /// Returns the groups of an outstanding task that could not be judged.
    pub(crate) fn refused(&self, task: TaskId) -> &[Refusal] {
        self.refused.get(&task).map_or(&[], Vec::as_slice)
    }

    /// Closes a task that is done, or of which another group is needed after one has arrived: its next issue starts its time
    /// anew. Returns whether it was outstanding.
    pub(crate) fn close(&mut self, task: TaskId, now: Instant) -> bool {
        let Some(issued) = self.issued.get_mut(&task).filter(|issued| !issued.is_done) else { return false };
        issued.is_done = true;
        self.took.entry((task.kind, task.batch)).or_default().push(now - issued.first);
        self.refused.remove(&task);
        self.unavailable.remove(&task);
        true
    }

    /// Removes tasks that are no longer needed.
    pub(crate) fn forget(&mut self, tasks: &[TaskId]) {
        for task in tasks {
            self.issued.remove(task);
            self.refused.remove(task);
            self.unavailable.remove(task);
        }
        let are_out: BTreeSet<(TaskKind, u64)> = self.issued.keys().map(|task| (task.kind, task.batch)).collect();
        self.took.retain(|batch, _| are_out.contains(batch));
    }

    /// Lists the outstanding tasks.
    pub(crate) fn open(&self) -> Vec<TaskId> {
        self.iter().map(|(task, _)| task).collect()
    }

    fn iter(&self) -> impl Iterator<Item = (TaskId, &Issued)> {
        self.issued.iter().filter(|(_, issued)| !issued.is_done).map(|(task, issued)| (*task, issued))
    }

    /// Lists the tasks to reissue: those without a sign of progress for `limit`, and the slowest few of a batch once they have
    /// taken more than twice as long as any other task of it.
    pub(crate) fn due(&self, limit: Duration, now: Instant) -> Vec<TaskId> {
        let mut num_open = BTreeMap::<(TaskKind, u64), usize>::new();
        self.iter().for_each(|(task, _)| *num_open.entry((task.kind, task.batch)).or_default() += 1);
        // The duration that counts as slow, for batches of which only the slowest few are outstanding.
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

    /// Whether some task has been without a sign of progress for `limit`.
    pub(crate) fn is_overdue(&self, limit: Duration, now: Instant) -> bool {
        self.iter().any(|(_, issued)| now - issued.last >= limit)
    }

    /// Returns how often a task was reissued.
    pub(crate) fn num_reissued(&self) -> u64 {
        self.num_reissued
    }
}

#[cfg(test)]
mod tests {
    use proto::{Envelope, RefusalCause};

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
            let (cause, reason) = (RefusalCause::Group, "no sense".to_owned());
            let refusal = Refusal { envelope, task: task(1), cause, reason };
            ledger.refuse(refusal).map(<[Refusal]>::len)
        };
        assert_eq!(refuse(&mut ledger, 1), None, "nobody asked for that");
        assert_eq!((refuse(&mut ledger, 0), refuse(&mut ledger, 0)), (Some(1), None));
        ledger.issue(task(1), began + SECOND);
        assert_eq!((refuse(&mut ledger, 0), refuse(&mut ledger, 1)), (None, Some(2)));
        ledger.close(task(1), began + SECOND);
        assert_eq!((refuse(&mut ledger, 1), ledger.refused(task(1)).len()), (None, 0));
    }

    #[test]
    fn a_task_waits_for_its_checker_until_it_answers() {
        let began = Instant::now();
        let mut ledger = issued(3, began);
        ledger.close(task(2), began);
        let wait = |ledger: &mut Ledger, index, issue, seconds, reason: &str| {
            ledger.wait_for_checker(task(index), issue, reason.to_owned(), began + seconds * SECOND)
        };
        assert!(wait(&mut ledger, 1, 0, 30, "no route") && !wait(&mut ledger, 0, 0, 40, "no route"));
        assert!(!wait(&mut ledger, 1, 0, 50, "refused") && !wait(&mut ledger, 2, 0, 50, "late"));
        assert_eq!(ledger.unavailable(task(2)), None, "it is done");
        let expected = Unavailable { since: began + 30 * SECOND, reason: "refused".to_owned() };
        assert_eq!(ledger.unavailable(task(1)), Some(&expected));
        assert_eq!(ledger.due(LIMIT, began + LIMIT), [], "verifiers have reported on them");
        assert!(ledger.refused(task(1)).is_empty(), "it is not the group's fault");
        ledger.checker_answered(task(1));
        assert_eq!(ledger.unavailable(task(1)), None);
        assert_eq!(ledger.issue(task(0), began + LIMIT), 1);
        assert!(!wait(&mut ledger, 0, 0, 70, "late"), "a group of an earlier issue");
        assert_eq!(ledger.unavailable(task(0)), None);
    }

    /// The bus treats two messages with the same number as one.
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
