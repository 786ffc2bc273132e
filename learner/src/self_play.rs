//! Problems that the run makes itself: what is measured, what is kept, and what waits to be tried.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proto::{
    ActionMask, Difficulty, Digest, Example, ExampleChoice, KeyedProblem, LabelOrigin, Niche, ProblemOrigin,
    ProblemSource, ScoredGroup, Token,
};
use serde::{Deserialize, Serialize};

use crate::archive::Archive;
use crate::curriculum::{Curriculum, learnability};

/// The part of the state that makes problems.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct SelfPlay {
    pub(crate) curriculum: Curriculum,
    pub(crate) archive: Archive,
    pub(crate) seen: Seen,
    /// Admitted proposals that nobody has tried, by domain, oldest first.
    pending: BTreeMap<String, VecDeque<(KeyedProblem, StoredProposal)>>,
}

/// A proposal that waits for its problem to be tried: then it is known how hard it is, and it trains the proposer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredProposal {
    niche: Niche,
    tokens: Vec<Token>,
    choices: Vec<ExampleChoice>,
    /// By [`ExampleChoice::mask`].
    masks: Vec<ActionMask>,
}

/// Problems that were posed or proposed, by the head of their canonical hash; the newest of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "VecDeque<u64>", into = "VecDeque<u64>")]
pub(crate) struct Seen {
    /// Oldest first.
    order: VecDeque<u64>,
    hashes: BTreeSet<u64>,
}

/// Proposals of a domain that wait at most; the oldest are given up, since they suit an older policy.
const MAX_PENDING: usize = 256;
const MAX_SEEN: usize = 1 << 17;

impl SelfPlay {
    /// Takes the oldest proposal that waits.
    pub(crate) fn next_proposal(&mut self, domain: &str) -> Option<(KeyedProblem, StoredProposal)> {
        self.pending.get_mut(domain)?.pop_front()
    }

    /// Queues the new ones among a group's proposals; gives their number.
    pub(crate) fn take_proposals(&mut self, scored: &ScoredGroup, source: &dyn ProblemSource) -> u64 {
        let pending = self.pending.entry(source.name().to_owned()).or_default();
        let mut num_new = 0;
        for proposal in &scored.proposals {
            if !self.seen.insert(&source.canonical_hash(&proposal.keyed.problem)) {
                continue;
            }
            num_new += 1;
            let masks = proposal.choices.iter().map(|choice| scored.example_masks[usize::from(choice.mask)]);
            let stored = StoredProposal {
                niche: proposal.niche,
                tokens: scored.group.rollouts[proposal.rollout as usize].tokens.clone(),
                masks: masks.collect(),
                choices: (0..)
                    .zip(&proposal.choices)
                    .map(|(mask, choice)| ExampleChoice { position: choice.position, mask })
                    .collect(),
            };
            pending.push_back((proposal.keyed.clone(), stored));
        }
        let excess = pending.len().saturating_sub(MAX_PENDING);
        pending.drain(..excess);
        num_new
    }

    /// Takes in how a problem fared.
    pub(crate) fn measure(&mut self, keyed: &KeyedProblem, niche: Niche, solve_rate: f64) {
        self.curriculum.observe(&keyed.problem.domain, niche, solve_rate);
        self.archive.keep(keyed, niche, learnability(solve_rate));
    }

    pub(crate) fn num_pending(&self) -> usize {
        self.pending.values().map(VecDeque::len).sum()
    }
}

impl StoredProposal {
    /// Makes an example that asks for what the proposal turned out to be, with its masks.
    pub(crate) fn into_example(self, source: &dyn ProblemSource, difficulty: Difficulty) -> (Example, Vec<ActionMask>) {
        let example = Example {
            prompt: source.propose_prompt(self.niche, difficulty),
            answer: self.tokens,
            choices: self.choices,
            problem_origin: ProblemOrigin::Proposer,
            label_origin: LabelOrigin::Proposal,
            goal: self.niche.0,
        };
        (example, self.masks)
    }
}

impl Seen {
    /// Enters a problem; `false` when it is there already.
    pub(crate) fn insert(&mut self, canonical_hash: &Digest) -> bool {
        let (head, _) = canonical_hash.as_bytes().split_first_chunk().expect("a digest has 32 bytes");
        let head = u64::from_le_bytes(*head);
        let is_new = self.hashes.insert(head);
        if is_new {
            self.order.push_back(head);
        }
        if self.order.len() > MAX_SEEN
            && let Some(oldest) = self.order.pop_front()
        {
            self.hashes.remove(&oldest);
        }
        is_new
    }
}

impl From<VecDeque<u64>> for Seen {
    fn from(order: VecDeque<u64>) -> Seen {
        Seen { hashes: order.iter().copied().collect(), order }
    }
}

impl From<Seen> for VecDeque<u64> {
    fn from(seen: Seen) -> VecDeque<u64> {
        seen.order
    }
}
