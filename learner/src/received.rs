use std::collections::BTreeMap;

use proto::{Digest, TaskId};

use crate::journal::GroupRecord;

/// Groups that are in and not folded.
#[derive(Debug, Default)]
pub(crate) struct Received {
    groups: BTreeMap<TaskId, (Digest, GroupRecord)>,
    /// As they came.
    order: Vec<TaskId>,
}

impl Received {
    pub(crate) fn get(&self, id: TaskId) -> Option<&GroupRecord> {
        self.groups.get(&id).map(|(_, group)| group)
    }

    pub(crate) fn contains(&self, id: TaskId) -> bool {
        self.groups.contains_key(&id)
    }

    /// Gives all of them as they came.
    pub(crate) fn in_order(&self) -> impl Iterator<Item = &GroupRecord> {
        self.order.iter().map(|id| &self.groups[id].1)
    }

    pub(crate) fn len(&self) -> usize {
        self.order.len()
    }

    /// Adds a group, in the place of an earlier one of its task.
    pub(crate) fn insert(&mut self, group: GroupRecord) {
        let id = group.task();
        self.take(&[id]);
        self.groups.insert(id, (Digest::of(&group.scored), group));
        self.order.push(id);
    }

    /// Gives away the groups of tasks, as far as they are in, in this order.
    pub(crate) fn take(&mut self, ids: &[TaskId]) -> Vec<(Digest, GroupRecord)> {
        let taken: Vec<_> = ids.iter().filter_map(|id| self.groups.remove(id)).collect();
        if !taken.is_empty() {
            self.order.retain(|id| self.groups.contains_key(id));
        }
        taken
    }

    /// Finds the tasks whose groups have these digests; `None` where one is not in.
    pub(crate) fn named(&self, digests: &[Digest]) -> Option<Vec<TaskId>> {
        let ids: BTreeMap<Digest, TaskId> = self.groups.iter().map(|(id, (digest, _))| (*digest, *id)).collect();
        digests.iter().map(|digest| ids.get(digest).copied()).collect()
    }
}
