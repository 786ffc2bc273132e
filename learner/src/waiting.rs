use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use proto::{Beat, Role, TaskId, TaskKind};
use tokio::time::Instant;

/// A wait without progress: the outstanding tasks and the connected workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Time without progress.
    pub waited: Duration,
    /// The step that is blocked.
    pub step: u64,
    /// Number of outstanding tasks.
    pub num_missing: usize,
    /// Total number of tasks.
    pub num_tasks: usize,
    /// The first few outstanding tasks.
    pub first: Vec<Missing>,
    /// Number of connected actors: those heard from recently.
    pub num_actors: usize,
    /// Number of connected verifiers.
    pub num_verifiers: usize,
    /// Whether workers send heartbeats at all; threads of one process do not.
    pub hears_workers: bool,
}

/// An outstanding task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The task.
    pub task: TaskId,
    /// The worker that is known to have it.
    pub holder: Option<Holder>,
    /// Actors that have played it and disagree, or are too few to decide.
    pub played_by: Vec<String>,
    /// Number of its consecutive groups that no verifier could judge, and the reason for the last one.
    pub refused: Option<(usize, String)>,
    /// Why its checker is unavailable, if it is.
    pub unavailable: Option<String>,
}

/// A worker that has a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its name.
    pub worker: String,
    /// Its role.
    pub role: Role,
    /// Time since it was last heard from.
    pub silent: Duration,
}

/// Maximum number of tasks that are named.
const NUM_NAMED: usize = 3;

/// Time without a heartbeat after which a worker is not counted.
const LIVES_FOR: Duration = Duration::from_secs(10);

/// Time without a heartbeat after which a worker is forgotten.
const KNOWN_FOR: Duration = Duration::from_secs(600);

/// The last heartbeat of every worker, and when it arrived.
#[derive(Debug, Default)]
pub(crate) struct Workers(BTreeMap<String, (Instant, Beat)>);

impl Workers {
    pub(crate) fn heard(&mut self, beat: Beat, now: Instant) {
        self.0.retain(|_, (last, _)| now - *last < KNOWN_FOR);
        self.0.insert(beat.worker.clone(), (now, beat));
    }

    /// Returns the names of the connected workers: those heard from recently.
    pub(crate) fn living(&self, role: Role, now: Instant) -> impl Iterator<Item = &str> {
        let is_living = move |(last, beat): &&(Instant, Beat)| beat.role == role && now - *last < LIVES_FOR;
        self.0.values().filter(is_living).map(|(_, beat)| beat.worker.as_str())
    }

    /// Describes the missing tasks and the workers that have them.
    pub(crate) fn waiting(
        &self,
        step: u64,
        missing: Vec<Missing>,
        num_tasks: usize,
        hears_workers: bool,
        waited: Duration,
        now: Instant,
    ) -> Waiting {
        let holder = |task: TaskId| {
            let held = self.0.values().filter(|(_, beat)| beat.tasks.contains(&task));
            let (last, beat) = held.max_by_key(|(last, _)| *last)?;
            Some(Holder { worker: beat.worker.clone(), role: beat.role, silent: now - *last })
        };
        Waiting {
            waited,
            step,
            num_missing: missing.len(),
            num_tasks,
            first: missing
                .into_iter()
                .take(NUM_NAMED)
                .map(|missing| Missing { holder: holder(missing.task), ..missing })
                .collect(),
            num_actors: self.living(Role::Actor, now).count(),
            num_verifiers: self.living(Role::Verifier, now).count(),
            hears_workers,
        }
    }
}

/// Formats a task for people.
pub(crate) fn describe(TaskId { kind, batch, index }: TaskId) -> String {
    let kind = if kind == TaskKind::Train { "task" } else { "exam task" };
    format!("{kind} {index} of batch {batch}")
}

impl fmt::Display for Waiting {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (missing, total) = (self.num_missing, self.num_tasks);
        write!(formatter, "no progress for {} s at step {}: ", self.waited.as_secs(), self.step)?;
        write!(formatter, "{missing} of {total} tasks are outstanding")?;
        for (index, Missing { task, holder, played_by, refused, unavailable }) in self.first.iter().enumerate() {
            write!(formatter, "{} {}", if index == 0 { ":" } else { "," }, describe(*task))?;
            if let Some(reason) = unavailable {
                write!(formatter, " (waiting: {reason})")?;
            }
            if let Some((num_refused, reason)) = refused {
                write!(formatter, " ({num_refused} of its groups could not be scored: {reason})")?;
            }
            match holder {
                Some(Holder { worker, silent, .. }) => {
                    write!(formatter, " ({worker} has it, last heard from {} s ago)", silent.as_secs())?;
                }
                None if !played_by.is_empty() => {
                    write!(formatter, " (played by {}; needs another actor)", played_by.join(" and "))?;
                }
                None if self.hears_workers => write!(formatter, " (no known worker has it)")?,
                None => {}
            }
        }
        if missing > self.first.len() {
            write!(formatter, ", ...")?;
        }
        if self.hears_workers {
            let plural = |number: usize, word: &str| format!("{number} {word}{}", if number == 1 { "" } else { "s" });
            let (actors, verifiers) = (plural(self.num_actors, "actor"), plural(self.num_verifiers, "verifier"));
            write!(formatter, "; {actors} and {verifiers} are connected")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(kind: TaskKind, index: u32) -> TaskId {
        TaskId { kind, batch: 7, index }
    }

    #[test]
    fn a_stall_names_tasks_and_who_has_them() {
        let began = Instant::now();
        let second = Duration::from_secs(1);
        let mut workers = Workers::default();
        let held = |worker: &str, role, tasks| Beat { worker: worker.to_owned(), role, tasks };
        workers.heard(held("gone", Role::Actor, vec![task(TaskKind::Train, 1)]), began);
        workers.heard(held("slow", Role::Verifier, vec![task(TaskKind::Train, 2)]), began + 25 * second);
        workers.heard(held("idle", Role::Actor, vec![]), began + 29 * second);
        let out = |task| Missing { task, holder: None, played_by: Vec::new(), refused: None, unavailable: None };
        let missing = (1..5).map(|index| out(task(TaskKind::Train, index))).collect();
        let now = began + 30 * second;
        let waiting = workers.waiting(7, missing, 16, true, 30 * second, now).to_string();
        let expected = "no progress for 30 s at step 7: 4 of 16 tasks are outstanding: task 1 of batch 7 (gone has it, \
                        last heard from 30 s ago), task 2 of batch 7 (slow has it, last heard from 5 s ago), task 3 of \
                        batch 7 (no known worker has it), ...; 1 actor and 1 verifier are connected";
        assert_eq!(waiting, expected);
        let played_by = vec!["gone".to_owned(), "idle".to_owned()];
        let missing = vec![Missing { played_by, ..out(task(TaskKind::Train, 3)) }];
        let waiting = workers.waiting(7, missing, 16, true, 30 * second, now).to_string();
        let expected = "no progress for 30 s at step 7: 1 of 16 tasks are outstanding: task 3 of batch 7 (played by gone and idle; \
                        needs another actor); 1 actor and 1 verifier are connected";
        assert_eq!(waiting, expected);
        let missing = vec![out(task(TaskKind::Evaluate, 9))];
        let waiting = Workers::default().waiting(7, missing, 1, false, 90 * second, now).to_string();
        assert_eq!(waiting, "no progress for 90 s at step 7: 1 of 1 tasks are outstanding: exam task 9 of batch 7");
        let refused = Some((2, "no sense".to_owned()));
        let missing = vec![Missing { refused, ..out(task(TaskKind::Train, 2)) }];
        let waiting = workers.waiting(7, missing, 16, true, 30 * second, now).to_string();
        let expected = "no progress for 30 s at step 7: 1 of 16 tasks are outstanding: task 2 of batch 7 (2 of its groups could not \
                        be scored: no sense) (slow has it, last heard from 5 s ago); 1 actor and 1 verifier are connected";
        assert_eq!(waiting, expected);
    }
}
