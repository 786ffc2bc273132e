//! Problems that the run makes itself: measurements, the archive, and the queue of proposals to try.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use policy::{ClippedSurrogate, Sequence};
use proto::{
    BalanceKey, Choices, Difficulty, Digest, Example, KeyedProblem, LabelOrigin, LegalTokens, Niche, ProblemOrigin,
    ProblemSource, Request, ScoredGroup, TokenId,
};
use serde::{Deserialize, Serialize};

use crate::archive::Archive;
use crate::baseline::{Asked, Baselines};
use crate::curriculum::Curriculum;
use crate::minibatch::Minibatch;

/// The part of the state that makes problems.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct SelfPlay {
    pub(crate) curriculum: Curriculum,
    pub(crate) archive: Archive,
    pub(crate) seen: Seen,
    /// Admitted proposals that were not tried yet, by domain, oldest first.
    pending: BTreeMap<String, VecDeque<(KeyedProblem, StoredProposal)>>,
    /// Baselines for the rewards of proposals.
    baselines: Baselines,
}

/// A proposal in the queue. Once its problem is tried, its difficulty is known, and it trains the proposer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredProposal {
    /// The version that wrote it.
    pub(crate) policy_version: u64,
    asked: Asked,
    /// The actual niche of its problem.
    niche: Niche,
    tokens: Vec<TokenId>,
    /// Its choices when the prompt asks for its actual niche.
    choices: Choices,
    /// The legal tokens at each of them.
    legal: Vec<LegalTokens>,
    played: PlayedProposal,
}

/// The rollout as it was played, with its original prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct PlayedProposal {
    prompt: Vec<TokenId>,
    /// Position, legal tokens, log-probability under the behaviour policy.
    choices: Vec<(u32, LegalTokens, f32)>,
}

/// The newest problems that were posed or proposed, by the head of their canonical hash.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "VecDeque<u64>", into = "VecDeque<u64>")]
pub(crate) struct Seen {
    /// Oldest first.
    order: VecDeque<u64>,
    hashes: BTreeSet<u64>,
}

/// Maximum length of a domain's queue of proposals. The oldest are dropped, since they suit an older policy.
const MAX_PENDING: usize = 256;
const MAX_SEEN: usize = 1 << 17;
/// Clip range of importance ratios, below and above 1, as in DAPO (Yu et al. 2025).
const CLIP: (f32, f32) = (0.2, 0.28);

impl SelfPlay {
    /// Removes and returns the newest wanted proposal of the queue: it is nearest to the policy that it will train.
    pub(crate) fn next_proposal(
        &mut self,
        domain: &str,
        is_wanted: impl Fn(Niche) -> bool,
    ) -> Option<(KeyedProblem, StoredProposal)> {
        let pending = self.pending.get_mut(domain)?;
        let place = pending.iter().rposition(|(_, stored)| is_wanted(stored.niche))?;
        pending.remove(place)
    }

    /// Queues those proposals of a group that are new, and returns their number.
    pub(crate) fn take_proposals(&mut self, scored: &ScoredGroup, source: &dyn ProblemSource) -> u64 {
        let Request::Propose { niche, difficulty, .. } = scored.group.task.request else { return 0 };
        let asked = Asked { niche, difficulty };
        let pending = self.pending.entry(source.name().to_owned()).or_default();
        let mut num_new = 0;
        for proposal in &scored.proposals {
            if !self.seen.insert(&source.canonical_hash(&proposal.keyed.problem)) {
                continue;
            }
            num_new += 1;
            let legal = proposal.choices.iter().map(|(_, legal)| legal.tokens(&scored.example_sets));
            let rollout = &scored.group.rollouts[proposal.rollout as usize];
            let played = rollout
                .choices
                .iter()
                .zip(&rollout.logprobs)
                .map(|((position, legal), logprob)| (position as u32, legal.tokens(&scored.group.sets), *logprob));
            let stored = StoredProposal {
                policy_version: scored.group.task.policy_version,
                asked,
                niche: proposal.niche,
                tokens: rollout.tokens.clone(),
                played: PlayedProposal { prompt: scored.prompt.clone(), choices: played.collect() },
                choices: proposal.choices.clone(),
                legal: legal.collect(),
            };
            pending.push_back((proposal.keyed.clone(), stored));
        }
        let excess = pending.len().saturating_sub(MAX_PENDING);
        pending.drain(..excess);
        num_new
    }

    /// Records the solve rate of a problem in the batch of a step.
    pub(crate) fn measure(&mut self, keyed: &KeyedProblem, niche: Niche, solve_rate: f64, step: u64) {
        self.curriculum.observe(&keyed.problem.domain, niche, solve_rate);
        self.archive.measure(keyed, niche, solve_rate, step);
    }

    /// Returns the advantage of a proposal over others with the same request, and updates their baselines. The reward is 1 -
    /// `solve_rate` if some but not all rollouts solve its problem, else 0. Half of it is for the requested niche, and half for
    /// the requested difficulty.
    ///
    /// Source: Zhao et al. 2025 (Absolute Zero), equation 4. Differs: the reward depends on the request.
    pub(crate) fn reward(
        &mut self,
        source: &dyn ProblemSource,
        proposal: &StoredProposal,
        difficulty: Difficulty,
        solve_rate: f64,
    ) -> f64 {
        let Asked { niche, difficulty: asked_difficulty } = proposal.asked;
        let is_learnable = solve_rate > 0.0 && solve_rate < 1.0;
        let share =
            [niche == proposal.niche, asked_difficulty == difficulty].map(|is_met| if is_met { 0.5 } else { 0.0 });
        let reward = if is_learnable { (1.0 - solve_rate) * (share[0] + share[1]) } else { 0.0 };
        self.baselines.advantage(source.name(), source.level_of(proposal.asked.niche), proposal.asked, reward)
    }

    pub(crate) fn num_pending(&self) -> usize {
        self.pending.values().map(VecDeque::len).sum()
    }
}

impl StoredProposal {
    /// Whether a proposal has the requested niche, and its problem's measured difficulty is the requested one.
    pub(crate) fn is_as_asked(&self, difficulty: Difficulty) -> bool {
        self.asked == Asked { niche: self.niche, difficulty }
    }

    /// Makes an example whose prompt asks for the proposal's actual niche and difficulty. Returns the legal tokens with it.
    pub(crate) fn into_example(
        self,
        source: &dyn ProblemSource,
        difficulty: Difficulty,
    ) -> (Example, Vec<LegalTokens>) {
        let example = Example {
            prompt: source.propose_prompt(self.niche, difficulty),
            answer: self.tokens,
            choices: self.choices,
            problem_origin: ProblemOrigin::Proposer,
            label_origin: LabelOrigin::Proposal,
            balance_key: BalanceKey { level: source.level_of(self.niche), goal: self.niche.0 },
        };
        (example, self.legal)
    }
}

/// Makes the losses of rewarded proposals: a mean over their tokens, times `weight`. Proposals without an advantage are left
/// out, but still count in the mean.
pub(crate) fn proposer_minibatch(rewarded: Vec<(StoredProposal, f64)>, weight: f64) -> Minibatch {
    let num_tokens: usize = rewarded.iter().map(|(stored, _)| stored.played.choices.len()).sum();
    let (sequences, losses) = rewarded
        .into_iter()
        .filter(|(stored, advantage)| *advantage != 0.0 && !stored.played.choices.is_empty())
        .map(|(StoredProposal { tokens, played, .. }, advantage)| {
            let choices = played.choices.iter().map(|(position, legal, _)| (*position as usize, legal.clone()));
            let loss = ClippedSurrogate {
                advantages: vec![advantage as f32; played.choices.len()],
                behavior_logprobs: played.choices.iter().map(|(_, _, logprob)| *logprob).collect(),
                proximal: vec![0.0; played.choices.len()],
                clip_low: CLIP.0,
                clip_high: CLIP.1,
                entropy_bonus: 0.0,
                weight: (weight / num_tokens as f64) as f32,
            };
            (Sequence::new(&played.prompt, &tokens, choices), loss.into())
        })
        .unzip();
    Minibatch { sequences, losses }
}

impl Seen {
    /// Adds a problem. Returns `false` if it is present already.
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
    use crate::minibatch::Surrogate;

    const HARD: Difficulty = Difficulty::Hard;
    const EASY: Difficulty = Difficulty::Easy;

    /// Returns a proposal of three tokens that was asked for niche 1.
    fn stored(asked: Difficulty, niche: u64, num_choices: u32) -> StoredProposal {
        let legal: LegalTokens = [4, 7].into_iter().collect();
        StoredProposal {
            policy_version: 0,
            asked: Asked { niche: Niche(1), difficulty: asked },
            niche: Niche(niche),
            tokens: vec![4, 7, 4],
            choices: Choices::new(3, []),
            legal: Vec::new(),
            played: PlayedProposal {
                prompt: vec![1, 2],
                choices: (0..num_choices).map(|position| (position, legal.clone(), -0.5)).collect(),
            },
        }
    }

    #[test]
    fn proposals_are_rewarded_for_what_they_were_asked_to_be() {
        for (asked, niche, num_correct, reward) in [
            (HARD, 1, 2, 0.75),
            (EASY, 1, 4, 0.5),
            (EASY, 1, 7, 0.125),
            // Wrong niche; wrong difficulty, twice; both wrong.
            (HARD, 2, 2, 0.375),
            (HARD, 1, 4, 0.25),
            (EASY, 1, 2, 0.375),
            (EASY, 2, 2, 0.0),
            // None or all of the rollouts solve them.
            (HARD, 1, 0, 0.0),
            (EASY, 1, 8, 0.0),
        ] {
            let (difficulty, solve_rate) = (Difficulty::of(num_correct, 8), num_correct as f64 / 8.0);
            let proposal = stored(asked, niche, 3);
            // The baseline of the first reward is 0.
            let advantage = SelfPlay::default().reward(&crate::TestSource("d"), &proposal, difficulty, solve_rate);
            assert_eq!(advantage, reward, "asked {asked:?} of niche 1, is {difficulty:?} of niche {niche}");
            assert_eq!(proposal.is_as_asked(difficulty), reward == 1.0 - solve_rate && reward > 0.0);
        }
    }

    /// The baseline depends on the request, not on the actual niche and difficulty of a proposal.
    #[test]
    fn rewards_are_compared_with_those_of_what_was_asked_for() {
        let mut own = SelfPlay::default();
        let source = crate::TestSource("d");
        for _ in 0..200 {
            own.reward(&source, &stored(HARD, 1, 3), HARD, 0.25);
        }
        let missed = own.reward(&source, &stored(HARD, 2, 3), HARD, 0.25);
        assert!((missed - (0.375 - 0.75)).abs() < 1e-4, "{missed}");
        // Easy ones have had no reward yet: their baseline is the domain's mean after the reward above.
        let easy = own.reward(&source, &stored(EASY, 1, 3), EASY, 0.5);
        assert!((easy - (0.5 - (0.95 * 0.75 + 0.05 * 0.375))).abs() < 1e-4, "{easy}");
    }

    #[test]
    fn proposals_train_as_they_were_played() {
        let rewarded = [(3, 0.75), (0, 1.0), (1, -0.25), (2, 0.0)];
        let rewarded = rewarded.map(|(num_choices, advantage)| (stored(HARD, 1, num_choices), advantage)).to_vec();
        let minibatch = proposer_minibatch(rewarded, 0.12);
        assert_eq!(minibatch.sequences.len(), 2, "without a choice or an advantage there is nothing to learn");
        assert_eq!(
            (&minibatch.sequences[0].tokens[..], minibatch.sequences[0].chosen[2].target),
            (&[1, 2, 4, 7][..], 4)
        );
        let Surrogate::OfTokens(loss) = &minibatch.losses[1].surrogate else { panic!("{minibatch:?}") };
        assert_eq!((&loss.advantages[..], &loss.behavior_logprobs[..]), (&[-0.25][..], &[-0.5][..]));
        assert_eq!(loss.weight, 0.02, "a mean over six tokens, times the weight");
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
