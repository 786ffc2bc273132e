//! Problems that the run makes itself: what is measured, what is kept, and what waits to be tried.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use policy::{Objective, PolicyGradient, Sequence};
use proto::{
    ActionMask, Aim, Choice, Difficulty, Digest, Example, ExampleChoice, KeyedProblem, LabelOrigin, Niche,
    ProblemOrigin, ProblemSource, ScoredGroup, Token,
};
use serde::{Deserialize, Serialize};

use crate::archive::Archive;
use crate::curriculum::{Curriculum, learnability};
use crate::policy_gradient::Minibatch;

/// The part of the state that makes problems.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct SelfPlay {
    pub(crate) curriculum: Curriculum,
    pub(crate) archive: Archive,
    pub(crate) seen: Seen,
    /// Admitted proposals that nobody has tried, by domain, oldest first.
    pending: BTreeMap<String, VecDeque<(KeyedProblem, StoredProposal)>>,
    /// Running mean of the proposers' rewards, by domain.
    baselines: BTreeMap<String, f64>,
}

/// A proposal that waits for its problem to be tried: then it is known how hard it is, and it trains the proposer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredProposal {
    /// The version that wrote it.
    pub(crate) policy_version: u64,
    niche: Niche,
    tokens: Vec<Token>,
    /// The choices in it when it is asked for its niche.
    choices: Vec<ExampleChoice>,
    /// By [`ExampleChoice::mask`].
    masks: Vec<ActionMask>,
    played: PlayedProposal,
}

/// The rollout as it was played, for the prompt that was given then.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct PlayedProposal {
    prompt: Vec<Token>,
    /// Position, mask, log-probability under the behaviour policy.
    choices: Vec<(u16, ActionMask, f32)>,
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
/// What a reward leaves of the baseline before it (Liu et al. 2025, SPIRAL, role-conditioned advantage estimation).
const BASELINE_DECAY: f64 = 0.95;
/// Bounds of importance ratios, as in DAPO (Yu et al. 2025).
const CLIP: (f32, f32) = (0.2, 0.28);

impl SelfPlay {
    /// Takes the newest proposal that waits and is wanted: it is nearest to the policy that it will train.
    pub(crate) fn next_proposal(
        &mut self,
        domain: &str,
        is_wanted: impl Fn(Niche) -> bool,
    ) -> Option<(KeyedProblem, StoredProposal)> {
        let pending = self.pending.get_mut(domain)?;
        let place = pending.iter().rposition(|(_, stored)| is_wanted(stored.niche))?;
        pending.remove(place)
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
            let rollout = &scored.group.rollouts[proposal.rollout as usize];
            let played =
                |choice: &Choice| (choice.position, scored.group.masks[usize::from(choice.mask)], choice.logprob);
            let stored = StoredProposal {
                policy_version: scored.group.task.policy_version,
                niche: proposal.niche,
                tokens: rollout.tokens.clone(),
                played: PlayedProposal {
                    prompt: scored.prompt.clone(),
                    choices: rollout.choices.iter().map(played).collect(),
                },
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

    /// Rewards a proposal by how much there is to learn from its problem; gives its advantage.
    ///
    /// Source: Zhao et al. 2025 (Absolute Zero), equation 4. Differs: the baseline is a running mean of the role.
    pub(crate) fn reward(&mut self, domain: &str, solve_rate: f64) -> f64 {
        let reward = if solve_rate > 0.0 { 1.0 - solve_rate } else { 0.0 };
        let baseline = self.baselines.entry(domain.to_owned()).or_default();
        let advantage = reward - *baseline;
        *baseline = BASELINE_DECAY * *baseline + (1.0 - BASELINE_DECAY) * reward;
        advantage
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
            aim: Aim { level: source.level_of(self.niche), goal: self.niche.0 },
        };
        (example, self.masks)
    }
}

/// Gives rewarded proposals their objectives: a mean over their tokens, times `weight`.
pub(crate) fn proposer_minibatch(rewarded: Vec<(StoredProposal, f64)>, weight: f64) -> Minibatch {
    let num_tokens: usize = rewarded.iter().map(|(stored, _)| stored.played.choices.len()).sum();
    let (sequences, objectives) = rewarded
        .into_iter()
        .filter(|(stored, _)| !stored.played.choices.is_empty())
        .map(|(StoredProposal { tokens, played, .. }, advantage)| {
            let choices = played.choices.iter().map(|(position, mask, _)| (usize::from(*position), *mask));
            let objective = PolicyGradient {
                advantage: advantage as f32,
                behavior_logprobs: played.choices.iter().map(|(_, _, logprob)| *logprob).collect(),
                proximal: vec![0.0; played.choices.len()],
                clip_low: CLIP.0,
                clip_high: CLIP.1,
                entropy_bonus: 0.0,
                weight: (weight / num_tokens as f64) as f32,
            };
            (Sequence::new(&played.prompt, &tokens, choices), Objective::PolicyGradient(objective))
        })
        .unzip();
    Minibatch { sequences, objectives }
}

impl Seen {
    /// Enters a problem; `false` when it is there already.
    pub(crate) fn insert(&mut self, canonical_hash: &Digest) -> bool {
        let head = canonical_hash.head();
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Rewards 0.75, 0 (nobody succeeds), 0 (everybody does); baselines 0, 0.0375, 0.035625.
    #[test]
    fn proposals_are_rewarded_for_what_there_is_to_learn() {
        let mut own = SelfPlay::default();
        let advantages = [0.25, 0.0, 1.0].map(|solve_rate| own.reward("d", solve_rate));
        for (advantage, expected) in advantages.into_iter().zip([0.75, -0.0375, -0.035_625]) {
            assert!((advantage - expected).abs() < 1e-12, "{advantages:?}");
        }
        assert_eq!(own.reward("other", 0.5), 0.5, "every domain has its own baseline");
    }

    #[test]
    fn proposals_train_as_they_were_played() {
        let mask: ActionMask = [4, 7].into_iter().collect();
        let stored = |num_choices: u16| StoredProposal {
            policy_version: 0,
            niche: Niche(1),
            tokens: vec![4, 7, 4],
            choices: Vec::new(),
            masks: Vec::new(),
            played: PlayedProposal {
                prompt: vec![1, 2],
                choices: (0..num_choices).map(|position| (position, mask, -0.5)).collect(),
            },
        };
        let minibatch = proposer_minibatch(vec![(stored(3), 0.75), (stored(0), 1.0), (stored(1), -0.25)], 0.1);
        assert_eq!(minibatch.sequences.len(), 2, "without a choice there is nothing to learn");
        assert_eq!(
            (&minibatch.sequences[0].tokens[..], minibatch.sequences[0].chosen[2].target),
            (&[1, 2, 4, 7][..], 4)
        );
        let Objective::PolicyGradient(objective) = &minibatch.objectives[1] else { panic!("{minibatch:?}") };
        assert_eq!((objective.advantage, &objective.behavior_logprobs[..]), (-0.25, &[-0.5][..]));
        assert_eq!(objective.weight, 0.025, "a mean over four tokens, times the weight");
    }

    #[test]
    fn what_was_seen_is_forgotten_oldest_first_and_survives_its_checkpoint() {
        let mut seen = Seen::default();
        let hash = |number: usize| Digest::of(&number);
        assert!(seen.insert(&hash(0)) && !seen.insert(&hash(0)));
        for number in 1..=MAX_SEEN {
            seen.insert(&hash(number));
        }
        assert!(seen.insert(&hash(0)), "the oldest is gone");
        assert!(!seen.insert(&hash(MAX_SEEN)));
        assert_eq!(Seen::from(VecDeque::from(seen.clone())), seen);
    }
}
