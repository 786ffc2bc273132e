use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{CounterRng, Digest, TokenId};

/// The public part of a problem: text in a domain's problem language.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Problem {
    /// Name of the domain in the registry.
    pub domain: String,
    /// The problem in the domain's canonical spelling.
    pub text: String,
}

/// The secret part of a problem, for verifiers only, as text in the domain's own form: a reference program, hidden inputs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProblemKey {
    /// The key.
    pub text: String,
}

/// A problem with its key, if it has one. Never part of a task.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KeyedProblem {
    /// The public part.
    pub problem: Problem,
    /// The key; `None` if checking needs none.
    pub key: Option<ProblemKey>,
}

/// A kind of problem within its domain, packed by the domain: problems compete and are measured per niche.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Niche(pub u64);

impl fmt::Display for Niche {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:x}", self.0)
    }
}

/// How hard a problem is for the current policy: measured from rollouts, never guessed from the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Difficulty {
    /// No rollout solves it.
    Unsolved,
    /// Fewer than half of the rollouts solve it.
    Hard,
    /// At least half of the rollouts solve it, but not all.
    Easy,
    /// All rollouts solve it.
    Trivial,
}

impl Difficulty {
    /// Classifies a solve rate.
    ///
    /// # Panics
    /// When `num_rollouts` is zero.
    ///
    /// ```
    /// use proto::Difficulty;
    /// let sorted = [0, 1, 2, 4].map(|num_correct| Difficulty::of(num_correct, 4));
    /// assert_eq!(sorted, [Difficulty::Unsolved, Difficulty::Hard, Difficulty::Easy, Difficulty::Trivial]);
    /// ```
    pub fn of(num_correct: u64, num_rollouts: u64) -> Difficulty {
        assert!(num_rollouts > 0, "difficulty: expected a rollout, got none");
        match num_correct {
            0 => Difficulty::Unsolved,
            all if all == num_rollouts => Difficulty::Trivial,
            some if 2 * some < num_rollouts => Difficulty::Hard,
            _ => Difficulty::Easy,
        }
    }
}

/// Who wrote a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemOrigin {
    /// The policy.
    Proposer,
    /// A changed copy of a problem in the archive.
    Mutation,
    /// The archive itself.
    Archive,
    /// The domain's generator of levels.
    Ladder,
    /// Uniformly random legal text.
    Random,
    /// A held-out evaluation set.
    Exam,
}

/// One rung of a domain's ladder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LadderLevel {
    /// The level's number, as in [`ProblemSource::ladder`].
    pub level: u32,
    /// What problems of this level look like, in words.
    pub description: &'static str,
}

/// The part of a domain that a learner uses.
pub trait ProblemSource: Send + Sync {
    /// Name in the registry.
    fn name(&self) -> &'static str;

    /// Lists the ladder's levels, easiest first.
    fn ladder_levels(&self) -> &'static [LadderLevel];

    /// Returns the level that holds the problems of a niche; 0 if no level does.
    fn level_of(&self, niche: Niche) -> u32;

    /// Generates problem `index` of a level. The result depends on the arguments alone and is never an exam problem.
    ///
    /// # Panics
    /// When the level is not one of [`ProblemSource::ladder_levels`].
    fn ladder(&self, level: u32, seed: u64, index: u64) -> KeyedProblem;

    /// Mutates a problem into another one that would be admitted as a proposal; `None` if the random draws yield none.
    fn mutate(&self, parent: &KeyedProblem, rng: &mut CounterRng) -> Option<KeyedProblem>;

    /// Writes the prompt that asks the policy for a problem of a niche and a difficulty.
    fn propose_prompt(&self, niche: Niche, difficulty: Difficulty) -> Vec<TokenId>;

    /// Returns the length in tokens of the longest problem that can answer [`ProblemSource::propose_prompt`].
    fn max_proposal_tokens(&self, niche: Niche) -> u32;

    /// Returns a human-readable description of a niche.
    fn describe_niche(&self, niche: Niche) -> String;

    /// Returns a hash that two problems share exactly if they count as the same problem.
    fn canonical_hash(&self, problem: &Problem) -> Digest;

    /// Whether a problem belongs to an exam, so that nothing may train on it.
    fn is_exam(&self, problem: &Problem) -> bool;
}
