//! Audits: whether what actors say is what their tasks give.
//!
//! A group is a function of its task, so two honest actors play the same one, byte for byte. An audited task is done when two
//! actors agree on it; so is any task of which different groups have come in. Who says otherwise is banned.

use std::collections::{BTreeMap, BTreeSet};

use proto::{Digest, TaskId, TaskKind, wire};

use crate::Error;
use crate::journal::GroupRecord;

/// Which tasks are audited: a share of them, that nobody foresees who does not know the secret. Changes who plays again, never
/// what.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Audit {
    /// Share of the tasks of batches; 0 to 1.
    pub share: f64,
    /// Drawn for this process, from nothing that actors know; a run's seed they do know.
    pub secret: [u8; 32],
}

/// What is known of actors, and of tasks that are not done yet.
#[derive(Debug, Default)]
pub(crate) struct Audits {
    audit: Option<Audit>,
    /// Groups of tasks on which nobody has agreed yet, one of each actor, in order of arrival.
    undecided: BTreeMap<TaskId, Vec<GroupRecord>>,
    banned: BTreeSet<String>,
    trained: Trained,
    num_audited: u64,
}

/// What was trained on of every actor's groups: how many of them, in which first and last step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Trained(BTreeMap<String, (u64, u64, u64)>);

/// What another group of a task changes.
#[derive(Debug, PartialEq)]
pub(crate) enum Heard {
    /// Nothing: its actor had said the same.
    Known,
    /// Another actor must play the task too.
    Undecided,
    /// The task is done with this group. What others have said is not so.
    Agreed(Box<GroupRecord>, Vec<Lie>),
    /// An actor has said two things of one task.
    Contradiction(Lie),
}

/// What gives an actor away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lie {
    pub(crate) player: String,
    /// The group that it said.
    pub(crate) said: Digest,
    /// The group that two others agree on, or that it had said itself before.
    pub(crate) agreed: Digest,
}

impl Audits {
    pub(crate) fn new(audit: Option<Audit>, banned: BTreeSet<String>, trained: Trained) -> Audits {
        Audits { audit, banned, trained, ..Audits::default() }
    }

    /// Tells whether actors are audited at all, and so may be wrong.
    pub(crate) fn is_on(&self) -> bool {
        self.audit.is_some()
    }

    pub(crate) fn banned(&self) -> &BTreeSet<String> {
        &self.banned
    }

    /// How many tasks two actors agreed on in this process.
    pub(crate) fn num_audited(&self) -> u64 {
        self.num_audited
    }

    /// Names the actors that have played a task on which nobody has agreed yet.
    pub(crate) fn players(&self, task: TaskId) -> Vec<String> {
        let groups = self.undecided.get(&task).into_iter().flatten();
        groups.map(|group| group.played_by.clone()).collect()
    }

    /// Takes back that a task is done with a group: another one has come.
    pub(crate) fn dispute(&mut self, group: GroupRecord) {
        self.undecided.insert(group.task(), vec![group]);
    }

    /// Takes in a group of a task that is not done.
    ///
    /// # Errors
    /// [`Error::Integrity`] when verifiers said different things of one group.
    pub(crate) fn hear(&mut self, group: GroupRecord) -> Result<Heard, Error> {
        let task = group.task();
        let is_audited = self.is_audited(task);
        let groups = self.undecided.entry(task).or_default();
        for before in groups.iter() {
            before.expect_same_verdicts(&group)?;
        }
        if let Some(before) = groups.iter().find(|before| before.played_by == group.played_by) {
            let [agreed, said] = [before, &group].map(GroupRecord::digest);
            let lie = Lie { player: group.played_by, said, agreed };
            return Ok(if said == agreed { Heard::Known } else { Heard::Contradiction(lie) });
        }
        groups.push(group);
        let Some(agreed) = agreed(groups, is_audited) else { return Ok(Heard::Undecided) };
        let mut groups = self.undecided.remove(&task).expect("it was just added to");
        self.num_audited += u64::from(groups.len() > 1);
        let agreed = groups.remove(agreed);
        if groups.is_empty() {
            return Ok(Heard::Agreed(Box::new(agreed), Vec::new()));
        }
        let digest = agreed.digest();
        let others =
            groups.into_iter().map(|group| (group.digest(), group.played_by)).filter(|(said, _)| *said != digest);
        let lies = others.map(|(said, player)| Lie { player, said, agreed: digest }).collect();
        Ok(Heard::Agreed(Box::new(agreed), lies))
    }

    /// Notes that a group was trained on.
    pub(crate) fn train_on(&mut self, group: &GroupRecord, step: u64) {
        self.trained.note(&group.played_by, step);
    }

    /// Gives how many groups of an actor were trained on, in which first and last step.
    pub(crate) fn trained_on(&self, player: &str) -> (u64, u64, u64) {
        self.trained.0.get(player).copied().unwrap_or_default()
    }

    /// Takes an actor's word for nothing any more. Gives the undecided tasks of which it had played a group, and the groups with
    /// which others are done, now that nobody contradicts them.
    pub(crate) fn ban(&mut self, player: &str) -> (Vec<TaskId>, Vec<GroupRecord>) {
        self.banned.insert(player.to_owned());
        let (mut tasks, mut done) = (Vec::new(), Vec::new());
        for task in self.undecided.keys().copied().collect::<Vec<_>>() {
            let is_audited = self.is_audited(task);
            let groups = self.undecided.get_mut(&task).expect("it is one of the keys");
            let num_groups = groups.len();
            groups.retain(|group| group.played_by != player);
            if groups.len() == num_groups {
                continue;
            }
            match agreed(groups, is_audited) {
                None => tasks.push(task),
                Some(agreed) => {
                    done.push(groups.swap_remove(agreed));
                    self.undecided.remove(&task);
                }
            }
        }
        (tasks, done)
    }

    fn is_audited(&self, task: TaskId) -> bool {
        let Some(Audit { share, secret }) = &self.audit else { return false };
        let hash = Digest::from_bytes(*blake3::keyed_hash(secret, &wire::encode(&task)).as_bytes());
        // 53 bits are what a float of [0, 1) holds.
        let draw = (hash.head() >> 11) as f64 / (1_u64 << 53) as f64;
        task.kind == TaskKind::Train && draw < *share
    }
}

impl Trained {
    pub(crate) fn note(&mut self, player: &str, step: u64) {
        let (num_groups, first, last) = self.0.entry(player.to_owned()).or_insert((0, step, step));
        (*num_groups, *first, *last) = (*num_groups + 1, step.min(*first), step.max(*last));
    }
}

/// Finds the first group on which two actors agree; the only one will do where nothing asks for another.
fn agreed(groups: &[GroupRecord], is_audited: bool) -> Option<usize> {
    if let ([_], false) = (groups, is_audited) {
        return Some(0);
    }
    let digests: Vec<Digest> = groups.iter().map(GroupRecord::digest).collect();
    (0..digests.len()).find(|index| digests[index + 1..].contains(&digests[*index]))
}
