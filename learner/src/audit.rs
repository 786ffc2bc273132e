//! Audits: checks that actors return the groups that follow from their tasks.
//!
//! A group is a function of its task, so two honest actors play the same one, byte for byte. An audited task is done when two
//! actors agree on it; so is any task with differing groups. Actors that disagree with them are banned.

use std::collections::{BTreeMap, BTreeSet};

use proto::{Digest, TaskId, TaskKind, wire};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::journal::GroupRecord;

/// Which tasks are audited: a share of them, unpredictable without the secret. Changes which actors play a task again, never the
/// result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Audit {
    /// Share of the tasks of batches; 0 to 1.
    pub share: f64,
    /// Drawn for this process, independently of anything that actors know; they do know the run's seed.
    pub secret: [u8; 32],
}

/// The state of audits: actors, and tasks that are not done yet.
#[derive(Debug, Default)]
pub(crate) struct Audits {
    audit: Option<Audit>,
    /// Groups of tasks on which no two actors agree yet, one per actor, in order of arrival.
    undecided: BTreeMap<TaskId, Vec<GroupRecord>>,
    banned: BTreeSet<String>,
    trained: Trained,
    /// Tasks that two actors must agree on, drawn or not: an earlier process received differing groups.
    disputed: BTreeSet<TaskId>,
    num_audited: u64,
}

/// For every actor, the number of its groups that were trained on, and the first and last step that did so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Trained(BTreeMap<String, (u64, u64, u64)>);

/// The effect of another group of a task.
#[derive(Debug, PartialEq)]
pub(crate) enum AuditOutcome {
    /// None: its actor had already sent the same group.
    Known,
    /// Another actor must play the task too.
    Undecided,
    /// The task is done with this group. Groups of other actors that differ are mismatches.
    Agreed(Box<GroupRecord>, Vec<Mismatch>),
    /// An actor has sent two different groups for one task.
    Contradiction(Mismatch),
}

/// Evidence against an actor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    pub(crate) player: String,
    /// The group that it sent.
    pub(crate) said: Digest,
    /// The group that two others agree on, or that it had sent itself before.
    pub(crate) agreed: Digest,
}

impl Audits {
    pub(crate) fn new(
        audit: Option<Audit>,
        banned: BTreeSet<String>,
        trained: Trained,
        disputed: BTreeSet<TaskId>,
    ) -> Audits {
        Audits { audit, banned, trained, disputed, ..Audits::default() }
    }

    /// Whether actors are audited at all; otherwise they are trusted.
    pub(crate) fn is_on(&self) -> bool {
        self.audit.is_some()
    }

    pub(crate) fn banned(&self) -> &BTreeSet<String> {
        &self.banned
    }

    /// Returns the number of tasks on which two actors agreed in this process.
    pub(crate) fn num_audited(&self) -> u64 {
        self.num_audited
    }

    /// Returns the names of the actors that have played a task on which no two agree yet.
    pub(crate) fn players(&self, task: TaskId) -> Vec<String> {
        let groups = self.undecided.get(&task).into_iter().flatten();
        groups.map(|group| group.played_by.clone()).collect()
    }

    /// Reopens a task that was done with this group: a different one has arrived.
    pub(crate) fn dispute(&mut self, group: GroupRecord) {
        self.undecided.insert(group.task(), vec![group]);
    }

    /// Adds a group of a task that is not done.
    ///
    /// # Errors
    /// [`Error::Integrity`] when verifiers gave different verdicts on one group.
    pub(crate) fn hear(&mut self, group: GroupRecord) -> Result<AuditOutcome, Error> {
        let task = group.task();
        let is_audited = self.is_audited(task);
        let groups = self.undecided.entry(task).or_default();
        for before in groups.iter() {
            before.expect_same_verdicts(&group)?;
        }
        if let Some(before) = groups.iter().find(|before| before.played_by == group.played_by) {
            let [agreed, said] = [before, &group].map(GroupRecord::digest);
            let mismatch = Mismatch { player: group.played_by, said, agreed };
            return Ok(if said == agreed { AuditOutcome::Known } else { AuditOutcome::Contradiction(mismatch) });
        }
        groups.push(group);
        let Some(agreed) = agreed(groups, is_audited) else { return Ok(AuditOutcome::Undecided) };
        let mut groups = self.undecided.remove(&task).expect("it was just added to");
        self.num_audited += u64::from(groups.len() > 1);
        let agreed = groups.remove(agreed);
        if groups.is_empty() {
            return Ok(AuditOutcome::Agreed(Box::new(agreed), Vec::new()));
        }
        let digest = agreed.digest();
        let others =
            groups.into_iter().map(|group| (group.digest(), group.played_by)).filter(|(said, _)| *said != digest);
        let mismatches = others.map(|(said, player)| Mismatch { player, said, agreed: digest }).collect();
        Ok(AuditOutcome::Agreed(Box::new(agreed), mismatches))
    }

    /// Records that a group was trained on.
    pub(crate) fn train_on(&mut self, group: &GroupRecord, step: u64) {
        self.trained.note(&group.played_by, step);
    }

    /// Returns the counts of groups that were trained on.
    pub(crate) fn trained(&self) -> &Trained {
        &self.trained
    }

    /// Returns how many groups of an actor were trained on, in which first and last step.
    pub(crate) fn trained_on(&self, player: &str) -> (u64, u64, u64) {
        self.trained.0.get(player).copied().unwrap_or_default()
    }

    /// Bans an actor and drops its groups of undecided tasks. Returns those of the tasks that stay undecided, and the groups that
    /// complete the others, now that nothing contradicts them.
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
        // A double in [0, 1) holds 53 bits.
        let draw = (hash.head() >> 11) as f64 / (1_u64 << 53) as f64;
        task.kind == TaskKind::Train && (draw < *share || self.disputed.contains(&task))
    }
}

impl Trained {
    pub(crate) fn note(&mut self, player: &str, step: u64) {
        let (num_groups, first, last) = self.0.entry(player.to_owned()).or_insert((0, step, step));
        (*num_groups, *first, *last) = (*num_groups + 1, step.min(*first), step.max(*last));
    }
}

/// Finds the first group on which two actors agree; a single group is enough if the task is not audited.
fn agreed(groups: &[GroupRecord], is_audited: bool) -> Option<usize> {
    if let ([_], false) = (groups, is_audited) {
        return Some(0);
    }
    let digests: Vec<Digest> = groups.iter().map(GroupRecord::digest).collect();
    (0..digests.len()).find(|index| digests[index + 1..].contains(&digests[*index]))
}

#[cfg(test)]
mod tests {
    use proto::{
        BalanceKey, Behavior, Choices, Group, Legal, Niche, Problem, ProblemOrigin, Request, Rollout, Sampling,
        ScoredGroup, StopReason, Task, Verdict,
    };

    use super::*;

    fn task(index: u32) -> TaskId {
        TaskId { kind: TaskKind::Train, batch: 3, index }
    }

    /// Returns a group with one log-probability.
    fn says(played_by: &str, index: u32, logprob: f32) -> GroupRecord {
        let problem = Problem { domain: "countdown".to_owned(), text: "2 1 -> 3".to_owned() };
        let task = Task {
            id: task(index),
            seed: 0,
            weights: Digest::of_bytes(b""),
            policy_version: 3,
            free_running: false,
            request: Request::Solve { problem, origin: ProblemOrigin::Ladder, has_key: false },
            family: String::new(),
            num_rollouts: 1,
            sampling: Sampling { behavior: Behavior::Policy, temperature: 1.0 },
            max_tokens: 5,
        };
        let rollout = Rollout {
            tokens: vec![2],
            choices: Choices::new(1, [(0, Legal::Set(0))]),
            logprobs: vec![logprob],
            values: None,
            search: None,
            stop: StopReason::Length,
            versions: Vec::new(),
        };
        let scored = ScoredGroup {
            group: Group { task, sets: vec![[1, 2].into_iter().collect()], rollouts: vec![rollout] },
            prompt: vec![120],
            niche: Niche(0),
            balance_key: BalanceKey { level: 1, goal: 3 },
            verdicts: vec![Verdict::Incorrect],
            example_sets: Vec::new(),
            examples: Vec::new(),
            proposals: Vec::new(),
        };
        GroupRecord::new(played_by.to_owned(), scored)
    }

    fn audits(share: f64) -> Audits {
        Audits::new(Some(Audit { share, secret: [7; 32] }), BTreeSet::new(), Trained::default(), BTreeSet::new())
    }

    fn mismatch(player: &str, said: f32, agreed: f32) -> Mismatch {
        let [said, agreed] = [said, agreed].map(|number| says("", 0, number).digest());
        Mismatch { player: player.to_owned(), said, agreed }
    }

    fn agreed(group: GroupRecord, mismatches: Vec<Mismatch>) -> AuditOutcome {
        AuditOutcome::Agreed(Box::new(group), mismatches)
    }

    #[test]
    fn two_actors_that_agree_are_enough_and_one_that_says_it_twice_is_not() {
        let mut audits = audits(1.0);
        assert_eq!(audits.hear(says("a", 0, -1.0)).unwrap(), AuditOutcome::Undecided);
        assert_eq!(audits.hear(says("a", 0, -1.0)).unwrap(), AuditOutcome::Known);
        assert_eq!(audits.players(task(0)), ["a"]);
        assert_eq!(audits.hear(says("b", 0, -1.0)).unwrap(), agreed(says("a", 0, -1.0), vec![]));
        assert_eq!((audits.players(task(0)), audits.num_audited()), (vec![], 1));
    }

    #[test]
    fn a_third_decides() {
        for (last, liar) in [(-1.0, "b"), (-2.0, "a")] {
            let mut audits = audits(1.0);
            assert_eq!(audits.hear(says("a", 0, -1.0)).unwrap(), AuditOutcome::Undecided);
            assert_eq!(audits.hear(says("b", 0, -2.0)).unwrap(), AuditOutcome::Undecided);
            let honest = if liar == "b" { "a" } else { "b" };
            let expected = agreed(says(honest, 0, last), vec![mismatch(liar, -3.0 - last, last)]);
            assert_eq!(audits.hear(says("c", 0, last)).unwrap(), expected);
        }
    }

    #[test]
    fn actors_are_asked_until_two_agree() {
        let mut audits = audits(1.0);
        for (player, number) in [("a", -1.0), ("b", -2.0), ("c", -3.0)] {
            assert_eq!(audits.hear(says(player, 0, number)).unwrap(), AuditOutcome::Undecided);
        }
        assert_eq!(audits.players(task(0)), ["a", "b", "c"]);
        let mismatches = vec![mismatch("a", -1.0, -2.0), mismatch("c", -3.0, -2.0)];
        assert_eq!(audits.hear(says("d", 0, -2.0)).unwrap(), agreed(says("b", 0, -2.0), mismatches));
    }

    #[test]
    fn an_actor_that_says_two_things_gives_itself_away() {
        let mut audits = audits(1.0);
        audits.hear(says("a", 0, -1.0)).unwrap();
        audits.hear(says("b", 0, -2.0)).unwrap();
        assert_eq!(audits.hear(says("a", 0, -2.0)).unwrap(), AuditOutcome::Contradiction(mismatch("a", -2.0, -1.0)));
        assert_eq!(audits.ban("a"), (vec![task(0)], vec![]));
        assert_eq!(audits.players(task(0)), ["b"], "what it said counts for nothing");
        assert_eq!(audits.hear(says("c", 0, -2.0)).unwrap(), agreed(says("b", 0, -2.0), vec![]));
    }

    #[test]
    fn what_is_not_audited_is_done_until_somebody_says_otherwise() {
        let mut audits = audits(0.0);
        for index in 0..2 {
            assert_eq!(audits.hear(says("a", index, -1.0)).unwrap(), agreed(says("a", index, -1.0), vec![]));
            audits.dispute(says("a", index, -1.0));
            assert_eq!(audits.hear(says("b", index, -2.0)).unwrap(), AuditOutcome::Undecided);
        }
        assert_eq!(
            audits.hear(says("c", 0, -1.0)).unwrap(),
            agreed(says("a", 0, -1.0), vec![mismatch("b", -2.0, -1.0)])
        );
        assert_eq!(audits.ban("b"), (vec![], vec![says("a", 1, -1.0)]), "nobody contradicts the other one any more");
        assert!(audits.banned().contains("b") && audits.num_audited() == 1);
    }

    #[test]
    fn an_audited_task_needs_another_actor_in_the_place_of_a_banned_one() {
        let mut audits = audits(1.0);
        for player in ["a", "b"] {
            audits.hear(says(player, 0, if player == "a" { -1.0 } else { -2.0 })).unwrap();
        }
        assert_eq!(audits.ban("b"), (vec![task(0)], vec![]));
        assert_eq!(audits.ban("a"), (vec![task(0)], vec![]));
        assert_eq!(audits.hear(says("c", 0, -1.0)).unwrap(), AuditOutcome::Undecided);
    }

    /// Equal numbers are not always equal bytes.
    #[test]
    fn groups_are_compared_byte_for_byte() {
        let mut audits = audits(1.0);
        assert_eq!(audits.hear(says("a", 0, 0.0)).unwrap(), AuditOutcome::Undecided);
        assert_eq!(audits.hear(says("b", 0, -0.0)).unwrap(), AuditOutcome::Undecided);
        let mut other_verdict = says("c", 0, 0.0);
        other_verdict.scored.verdicts[0] = Verdict::Correct;
        let error = audits.hear(other_verdict).unwrap_err().to_string();
        assert!(error.contains("verdicts on one group differ"), "{error}");
    }

    #[test]
    fn a_share_is_audited_and_the_secret_says_which() {
        let audited = |share, secret| {
            let audits =
                Audits::new(Some(Audit { share, secret }), BTreeSet::new(), Trained::default(), BTreeSet::new());
            (0..10_000).filter(|index| audits.is_audited(task(*index))).collect::<BTreeSet<u32>>()
        };
        assert_eq!((audited(0.0, [7; 32]).len(), audited(1.0, [7; 32]).len()), (0, 10_000));
        let [one, other] = [[7; 32], [8; 32]].map(|secret| audited(0.2, secret));
        // Within five standard deviations.
        assert!(one.len().abs_diff(2_000) < 200 && other.len().abs_diff(2_000) < 200);
        assert!(one.intersection(&other).count().abs_diff(400) < 100, "one does not tell the other");
        assert!(!audits(1.0).is_audited(TaskId { kind: TaskKind::Evaluate, ..task(0) }));
    }
}
