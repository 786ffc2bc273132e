use std::collections::BTreeMap;

use proto::{Digest, TaskId};

use crate::journal::GroupRecord;

/// Groups that have arrived and are not folded yet.
#[derive(Debug, Default)]
pub(crate) struct Received {
    groups: BTreeMap<TaskId, (Digest, GroupRecord)>,
    /// In order of arrival.
    order: Vec<TaskId>,
}

impl Received {
    pub(crate) fn get(&self, id: TaskId) -> Option<&GroupRecord> {
        self.groups.get(&id).map(|(_, group)| group)
    }

    pub(crate) fn contains(&self, id: TaskId) -> bool {
        self.groups.contains_key(&id)
    }

    /// Returns all of them in order of arrival.
    pub(crate) fn in_order(&self) -> impl Iterator<Item = &GroupRecord> {
        self.order.iter().map(|id| &self.groups[id].1)
    }

    pub(crate) fn len(&self) -> usize {
        self.order.len()
    }

    /// Adds a group, which replaces an earlier one of its task and becomes the last to arrive.
    pub(crate) fn insert(&mut self, group: GroupRecord) {
        let id = group.task();
        self.take(&[id]);
        self.groups.insert(id, (Digest::of(&group.scored), group));
        self.order.push(id);
    }

    /// Removes the groups of tasks and returns those that have arrived, in the order of `ids`.
    pub(crate) fn take(&mut self, ids: &[TaskId]) -> Vec<(Digest, GroupRecord)> {
        let taken: Vec<_> = ids.iter().filter_map(|id| self.groups.remove(id)).collect();
        if !taken.is_empty() {
            self.order.retain(|id| self.groups.contains_key(id));
        }
        taken
    }

    /// Returns the tasks whose groups have these digests; `None` if one has not arrived.
    pub(crate) fn named(&self, digests: &[Digest]) -> Option<Vec<TaskId>> {
        let ids: BTreeMap<Digest, TaskId> = self.groups.iter().map(|(id, (digest, _))| (*digest, *id)).collect();
        digests.iter().map(|digest| ids.get(digest).copied()).collect()
    }
}
