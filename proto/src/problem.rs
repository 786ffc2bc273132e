use serde::{Deserialize, Serialize};

use crate::Digest;

/// The public part of a problem: text in a domain's problem language.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Problem {
    /// Name of the domain, as in the registry.
    pub domain: String,
    /// The problem in the domain's canonical spelling.
    pub text: String,
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LadderLevel {
    /// The level's number, as in [`ProblemSource::ladder`].
    pub level: u32,
    /// What problems of this level look like, in words.
    pub description: &'static str,
}

/// All that a learner knows of a domain.
pub trait ProblemSource: Send + Sync {
    /// Name in the registry.
    fn name(&self) -> &'static str;

    /// Lists the ladder's levels, easiest first.
    fn ladder_levels(&self) -> &'static [LadderLevel];

    /// Writes problem `index` of a level: a function of its arguments, never an exam problem.
    ///
    /// # Panics
    /// When the level is not one of [`ProblemSource::ladder_levels`].
    fn ladder(&self, level: u32, seed: u64, index: u64) -> Problem;

    /// Hashes what makes two problems the same problem.
    fn canonical_hash(&self, problem: &Problem) -> Digest;

    /// Tells whether a problem belongs to an exam, so that nothing may train on it.
    fn is_exam(&self, problem: &Problem) -> bool;
}
