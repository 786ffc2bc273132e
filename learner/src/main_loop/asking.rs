//! Issuing and reissuing tasks.

use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _};
use proto::{Envelope, Message, ProblemKey, Task, TaskId, TaskKind};
use tokio::task::block_in_place;
use tokio::time::Instant;

use super::Learner;
use crate::Error;

/// Maximum number of tasks that are published to the bus concurrently.
const MAX_IN_FLIGHT: usize = 64;

impl Learner<'_> {
    /// Plans every batch that may be planned now, and issues its tasks except those whose groups are in.
    pub(super) async fn issue_batches(&mut self) -> Result<(), Error> {
        let mut tasks = block_in_place(|| self.fold.plan());
        if std::mem::take(&mut self.recovery.resumes) {
            // Tasks planned before the checkpoint may have been lost with the process that issued them.
            tasks = self.fold.planned().iter().map(|planned| planned.task.id).collect();
        }
        let missing = tasks.into_iter().filter(|id| !self.received.contains(*id)).filter_map(|id| self.planned(id));
        let missing = missing.collect();
        self.issue(missing).await
    }

    /// Returns a task of a batch, with the key of its problem.
    pub(super) fn planned(&self, id: TaskId) -> Option<(Task, Option<ProblemKey>)> {
        let planned = self.fold.planned().get(id)?;
        Some((planned.task.clone(), planned.key.clone()))
    }

    /// Issues tasks, with the keys of their problems; concurrently, since the bus may be remote.
    pub(super) async fn issue(&mut self, tasks: Vec<(Task, Option<ProblemKey>)>) -> Result<(), Error> {
        let now = Instant::now();
        let term = self.options.term;
        let bus = self.bus.as_ref();
        let issues = tasks.into_iter().map(|(task, key)| {
            let (issue, excluded_actors) = (self.ledger.issue(task.id, now), self.audits.players(task.id));
            let envelope = Envelope { term, issue, excluded_actors, played_by: String::new() };
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

    /// Reissues those of the tasks that are not done.
    pub(super) async fn issue_again(&mut self, tasks: Vec<TaskId>) -> Result<(), Error> {
        let find = |id: &TaskId| match id.kind {
            TaskKind::Train if self.received.contains(*id) => None,
            TaskKind::Train => self.planned(*id),
            TaskKind::Evaluate => {
                let sitting = self.sitting.as_ref().filter(|sitting| sitting.step == id.batch)?;
                let index = id.index as usize;
                sitting.correct.get(index)?.is_none().then(|| sitting.tasks[index].clone())
            }
        };
        let tasks = tasks.iter().filter_map(find).collect();
        self.issue(tasks).await
    }

    /// Checks outstanding tasks: reissues those that the bus has lost and those without progress for too long.
    pub(super) async fn look_after(&mut self, limit: Duration) -> Result<(), Error> {
        // Repeated, because the announcement is not stored.
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
        tracing::info!(num_tasks = due.len(), first = ?due[0], "reissuing overdue tasks");
        if self.ledger.is_overdue(limit, now) {
            // Bad weights may be the cause: they are overwritten.
            self.put_weights();
        }
        self.issue_again(due).await
    }
}
