use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::{KeyedProblem, LegalTokens, Niche, ProblemOrigin, Task, TokenId, TokenSet};

/// The tokens that were legal at a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Legal {
    /// The whole vocabulary.
    Any,
    /// The tokens of a set, by its index in a dictionary.
    Set(u32),
}

impl Legal {
    /// Looks up the legal tokens in the dictionary of a group that has been checked.
    pub fn tokens(self, sets: &[TokenSet]) -> LegalTokens {
        match self {
            Legal::Any => LegalTokens::Any,
            Legal::Set(set) => LegalTokens::Only(sets[set as usize].clone()),
        }
    }
}

/// Which tokens of an answer were chosen rather than forced, and which tokens were legal there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choices {
    /// Indices of the chosen tokens, ascending; absent if no token was forced.
    pub positions: Option<Vec<u32>>,
    /// The legal tokens at each choice.
    pub legal: Vec<Legal>,
}

impl Choices {
    /// Collects the choices of an answer of `num_tokens`, in order, as (position, legal tokens).
    pub fn new(num_tokens: usize, choices: impl IntoIterator<Item = (usize, Legal)>) -> Choices {
        let (positions, legal): (Vec<u32>, Vec<Legal>) =
            choices.into_iter().map(|(position, legal)| (position as u32, legal)).unzip();
        let is_forced_nowhere = positions.len() == num_tokens;
        Choices { positions: (!is_forced_nowhere).then_some(positions), legal }
    }

    /// Returns the number of chosen tokens.
    pub fn len(&self) -> usize {
        self.legal.len()
    }

    /// Whether no token was chosen.
    pub fn is_empty(&self) -> bool {
        self.legal.is_empty()
    }

    /// Lists the choices in order, as (position, legal tokens).
    pub fn iter(&self) -> impl Iterator<Item = (usize, Legal)> + Clone + '_ {
        let position = |index: usize| self.positions.as_ref().map_or(index, |positions| positions[index] as usize);
        self.legal.iter().enumerate().map(move |(index, legal)| (position(index), *legal))
    }

    /// Whether each choice has one position, positions are in order and in range, and every chosen token is legal by its set.
    fn are_of(&self, tokens: &[TokenId], sets: &[TokenSet]) -> bool {
        let are_in_form = match &self.positions {
            None => self.legal.len() == tokens.len(),
            Some(positions) => {
                positions.len() == self.legal.len()
                    && positions.len() < tokens.len()
                    && positions.is_sorted_by(|left, right| left < right)
            }
        };
        let is_legal = |(position, legal): (usize, Legal)| match (tokens.get(position), legal) {
            (None, _) => false,
            (Some(_), Legal::Any) => true,
            (Some(token), Legal::Set(set)) => sets.get(set as usize).is_some_and(|set| set.contains(*token)),
        };
        are_in_form && self.iter().all(is_legal)
    }
}

/// Sets of tokens in order of first use.
#[derive(Clone, Debug, Default)]
pub struct SetDictionary {
    sets: Vec<TokenSet>,
    index: HashMap<TokenSet, u32>,
}

impl SetDictionary {
    /// Returns a reference to the legal tokens, after adding their set to the dictionary if it is new.
    pub fn refer(&mut self, legal: LegalTokens) -> Legal {
        let LegalTokens::Only(set) = legal else { return Legal::Any };
        Legal::Set(*self.index.entry(set).or_insert_with_key(|set| {
            self.sets.push(set.clone());
            (self.sets.len() - 1) as u32
        }))
    }

    /// Returns the sets by index.
    pub fn into_sets(self) -> Vec<TokenSet> {
        self.sets
    }
}

/// Why a rollout ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopReason {
    /// The answer is complete by the grammar.
    Complete,
    /// The rollout reached the task's token limit.
    Length,
}

/// A span of tokens that one version drew: from `first_token` to the next span.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionSpan {
    /// First answer token of the span.
    pub first_token: u32,
    /// The step after which the weights were published.
    pub policy_version: u64,
}

/// The result of a tree search at a choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SearchTarget {
    /// The improved policy over the tokens that were visited.
    pub policy: Vec<(TokenId, f32)>,
    /// The value of the position for the side that makes the choice.
    pub value: f32,
    /// Number of simulations for the choice.
    pub num_simulations: u32,
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// The answer's tokens, forced ones included.
    pub tokens: Vec<TokenId>,
    /// The choices among them, legal by [`Group::sets`].
    pub choices: Choices,
    /// Log-probability of each choice under the behaviour policy, over the legal tokens and at its temperature (at 1 if it is 0).
    pub logprobs: Vec<f32>,
    /// The policy's value estimate before each choice; absent if not requested. Reserved: refused by [`Group::check`].
    pub values: Option<Vec<f32>>,
    /// The search result at each choice; absent if there was no search. Reserved: refused by [`Group::check`].
    pub search: Option<Vec<SearchTarget>>,
    /// Why it ended.
    pub stop: StopReason,
    /// The versions that drew the tokens, oldest first; one span unless weights changed midway.
    pub versions: Vec<VersionSpan>,
}

/// An actor's answer to a task: k rollouts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// The complete task that was played. It identifies a group that belongs to another plan.
    pub task: Task,
    /// Dictionary of the sets among which tokens were chosen, in order of first use.
    pub sets: Vec<TokenSet>,
    /// The rollouts in order of attempt.
    pub rollouts: Vec<Rollout>,
}

impl Rollout {
    /// Returns the version that drew the token at a position. The rollout's versions must have been checked.
    pub fn version_at(&self, position: usize) -> u64 {
        let span = self.versions.iter().rfind(|span| span.first_token as usize <= position);
        span.expect("the first span begins with the first token").policy_version
    }
}

/// A checker's verdict on an answer; a function of problem and answer alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Solves the problem; for a proposal: a problem worth asking.
    Correct,
    /// A legal answer that does not solve the problem; for a proposal: not a problem worth asking.
    Incorrect,
    /// Not in the answer language.
    Malformed,
    /// Ran out of fuel.
    Timeout,
    /// Ran out of cells, depth or bytes.
    Resource,
    /// Asked for something forbidden.
    Violation,
}

/// The origin of an example's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LabelOrigin {
    /// The rollout solved its problem.
    Solved,
    /// The rollout solves another problem exactly, and the prompt is replaced by that problem.
    Hindsight,
    /// A machine computed the answer, or the givens for an answer that the problem showed.
    Executor,
    /// Tree search found it.
    Search,
    /// The answer is a problem, and the prompt names its actual niche and difficulty.
    Proposal,
}

/// The key by which training balances examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalanceKey {
    /// Level of the problem on its domain's ladder; 0 if it has none. Each level's share of training is set in the config.
    pub level: u32,
    /// Within the level, problems of one goal differ in their givens only. Rare goals weigh more.
    pub goal: u64,
}

/// A training example: a prompt and a verified answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// Prompt tokens.
    pub prompt: Vec<TokenId>,
    /// Answer tokens.
    pub answer: Vec<TokenId>,
    /// The answer tokens that carry loss, legal by [`ScoredGroup::example_sets`].
    pub choices: Choices,
    /// Who wrote the problem that the rollout answered.
    pub problem_origin: ProblemOrigin,
    /// The origin of the label.
    pub label_origin: LabelOrigin,
    /// The key by which training balances the example.
    pub balance_key: BalanceKey,
}

/// A problem that a rollout wrote and that was admitted: it parses, has a solution, and asks something.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    /// The index of the rollout that wrote it.
    pub rollout: u32,
    /// The problem.
    pub keyed: KeyedProblem,
    /// The niche that the problem actually has.
    pub niche: Niche,
    /// The rollout's choices under a prompt that asks for that niche, legal by [`ScoredGroup::example_sets`].
    pub choices: Choices,
}

/// A group with its verdicts and the examples made from it. All of it is a function of the task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoredGroup {
    /// The group that the actor played.
    pub group: Group,
    /// The prompt that was answered.
    pub prompt: Vec<TokenId>,
    /// The niche of the problem to solve; for a request for problems: the niche that it names.
    pub niche: Niche,
    /// The balance key of examples made from its answers, as far as the problem alone determines it.
    pub balance_key: BalanceKey,
    /// One per rollout, in order.
    pub verdicts: Vec<Verdict>,
    /// Dictionary of the sets of the examples and the proposals.
    pub example_sets: Vec<TokenSet>,
    /// Training examples, in order of rollout; none of them is an exam problem.
    pub examples: Vec<Example>,
    /// Problems that the rollouts wrote, in order of rollout; none of them is an exam problem.
    pub proposals: Vec<Proposal>,
}

impl Group {
    /// Lists the versions that drew its tokens, with repetitions.
    pub fn versions(&self) -> impl Iterator<Item = u64> {
        self.rollouts.iter().flat_map(|rollout| &rollout.versions).map(|span| span.policy_version)
    }

    /// Whether one version drew all of its tokens.
    pub fn is_of_version(&self, policy_version: u64) -> bool {
        let whole = [VersionSpan { first_token: 0, policy_version }];
        self.rollouts.iter().all(|rollout| rollout.versions == whole)
    }

    /// Returns the most bytes on the wire for a group of this size: every token is a choice with a set of its own.
    pub fn max_bytes(num_rollouts: u32, max_tokens: u32, vocabulary_size: usize) -> usize {
        let varint_bytes = |largest: usize| (usize::BITS - largest.leading_zeros()).div_ceil(7) as usize;
        let [num_rollouts, max_tokens] = [num_rollouts, max_tokens].map(|count| count as usize);
        let num_words = vocabulary_size.div_ceil(64);
        let position_bytes = varint_bytes(max_tokens);
        let legal_bytes = 1 + varint_bytes(num_rollouts * max_tokens);
        let set_bytes = varint_bytes(num_words) + 10 * num_words;
        // Includes the token and its log-probability (4 bytes).
        let per_token = varint_bytes(vocabulary_size) + position_bytes + legal_bytes + 4 + set_bytes;
        // The constants cover lengths and versions in each rollout and, once, the task with its problem.
        4_096 + num_rollouts * (64 + max_tokens * per_token)
    }

    /// Checks that the group has the size and form that its task asks for, that its tokens are in the vocabulary, and that its
    /// indices are in range. Code that reads a checked group need not check again, and its work is bounded.
    ///
    /// # Errors
    /// A description of the first violation.
    pub fn check(&self, vocabulary_size: usize) -> Result<(), String> {
        let Group { task, sets, rollouts } = self;
        let is_possible = task.num_rollouts <= Task::MAX_ROLLOUTS && task.max_tokens <= Task::MAX_TOKENS;
        expect(is_possible, "num_rollouts and max_tokens within the limits of a task")?;
        expect(rollouts.len() == task.num_rollouts as usize, "as many rollouts as the task requests")?;
        expect(sets.iter().all(|set| is_of_vocabulary(set, vocabulary_size)), "sets of tokens of the vocabulary")?;
        for Rollout { tokens, choices, logprobs, values, search, versions, .. } in rollouts {
            let is_span = |span: &VersionSpan| span.first_token as usize <= tokens.len();
            let are_in_order = versions.is_sorted_by(|left, right| {
                left.first_token < right.first_token && left.policy_version < right.policy_version
            });
            let begin = versions
                .first()
                .is_some_and(|span| span.first_token == 0 && span.policy_version >= task.policy_version);
            expect(
                begin && are_in_order && versions.iter().all(is_span),
                "policy versions that cover every token, in order",
            )?;
            let is_pinned = versions == &[VersionSpan { first_token: 0, policy_version: task.policy_version }];
            expect(is_pinned || task.free_running, "the policy version that the task names")?;
            expect(tokens.len() <= task.max_tokens as usize, "at most max_tokens tokens in every rollout")?;
            expect(tokens.iter().all(|token| (*token as usize) < vocabulary_size), "tokens of the vocabulary")?;
            expect(choices.are_of(tokens, sets), "choices of legal tokens, in order, in every rollout")?;
            let are_logprobs = logprobs.iter().all(|logprob| *logprob <= 0.0 && logprob.is_finite());
            expect(
                are_logprobs && logprobs.len() == choices.len(),
                "a finite log-probability of at most 0 for every choice",
            )?;
            expect(values.is_none(), "no values")?;
            expect(search.is_none(), "no search targets")?;
        }
        let num_choices = rollouts.iter().map(|rollout| rollout.choices.len()).sum();
        expect(sets.len() <= num_choices, "no more sets than choices")
    }
}

impl ScoredGroup {
    /// Checks the group, and the number of verdicts, prompts, tokens and indices in the data that was added to it.
    ///
    /// # Errors
    /// A description of the first violation.
    pub fn check(&self, vocabulary_size: usize) -> Result<(), String> {
        self.group.check(vocabulary_size)?;
        let (rollouts, sets) = (&self.group.rollouts, &self.example_sets);
        expect(self.verdicts.len() == rollouts.len(), "as many verdicts as rollouts")?;
        let are_known = |tokens: &[TokenId]| tokens.iter().all(|token| (*token as usize) < vocabulary_size);
        expect(!self.prompt.is_empty() && are_known(&self.prompt), "a prompt")?;
        expect(sets.iter().all(|set| is_of_vocabulary(set, vocabulary_size)), "sets of tokens of the vocabulary")?;
        for Example { prompt, answer, choices, .. } in &self.examples {
            expect(!prompt.is_empty() && are_known(prompt), "a prompt in every example")?;
            expect(are_known(answer) && choices.are_of(answer, sets), "choices of legal tokens in every example")?;
        }
        for Proposal { rollout, choices, .. } in &self.proposals {
            let rollout =
                rollouts.get(*rollout as usize).ok_or("expected every proposal to name an existing rollout")?;
            expect(choices.are_of(&rollout.tokens, sets), "choices of legal tokens in every proposal")?;
        }
        Ok(())
    }
}

fn expect(holds: bool, what: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(format!("expected {what}")) }
}

fn is_of_vocabulary(set: &TokenSet, vocabulary_size: usize) -> bool {
    set.last().is_some_and(|last| (last as usize) < vocabulary_size)
}
