use serde::{Deserialize, Serialize};

use crate::{ActionMask, KeyedProblem, MASK_BITS, Niche, ProblemOrigin, Task, Token};

/// A token that was chosen rather than forced.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// Index into [`Rollout::tokens`].
    pub position: u16,
    /// Index into [`Group::masks`].
    pub mask: u16,
    /// Log-probability under the behaviour policy, at its mask and temperature (at 1 where it is 0).
    pub logprob: f32,
}

/// Why a rollout ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopReason {
    /// The grammar says that the answer is complete.
    Complete,
    /// The task's token limit.
    Length,
}

/// From `first_token` on, tokens were drawn with this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionSpan {
    /// First answer token of the span.
    pub first_token: u16,
    /// The step after which the weights were published.
    pub policy_version: u64,
}

/// What a tree search leaves for training. `None` on the wire until an actor searches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SearchTrace {
    /// Per choice, the improved policy over the tokens that were visited.
    pub policy_targets: Vec<Vec<(Token, f32)>>,
    /// Per choice, the value estimate in [0, 1].
    pub value_targets: Vec<f32>,
    /// Simulations spent on the whole rollout.
    pub num_simulations: u64,
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// The answer's tokens, forced ones included.
    pub tokens: Vec<Token>,
    /// The choices among them, in order.
    pub choices: Vec<Choice>,
    /// Why it ended.
    pub stop: StopReason,
    /// Which versions drew the tokens, oldest first; one span unless weights changed midway.
    pub versions: Vec<VersionSpan>,
    /// What search found, where there was search.
    pub search: Option<SearchTrace>,
}

/// What an actor returns for a task: k rollouts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// The task that was played, whole: a group for another plan is recognised by it.
    pub task: Task,
    /// Dictionary of the action masks that occurred, in order of first use.
    pub masks: Vec<ActionMask>,
    /// The rollouts in order of attempt.
    pub rollouts: Vec<Rollout>,
}

impl Rollout {
    /// Names the version that drew the token at a position; its versions have been checked.
    pub fn version_at(&self, position: u16) -> u64 {
        let span = self.versions.iter().rfind(|span| span.first_token <= position);
        span.expect("the first span begins with the first token").policy_version
    }
}

/// What a checker says of an answer; a function of problem and answer alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Solves the problem; of a proposal: it is a problem worth asking.
    Correct,
    /// A legal answer that does not; of a proposal: it is not.
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

/// How an example came by its label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LabelOrigin {
    /// The rollout solved its problem.
    Solved,
    /// The rollout solves another problem exactly, and that problem is the prompt.
    Hindsight,
    /// A machine computed the answer, or the givens for an answer that the problem showed.
    Executor,
    /// Tree search found it.
    Search,
    /// The answer is a problem, and the prompt names the niche and the difficulty that it turned out to have.
    Proposal,
}

/// A chosen token of an example: index into [`Example::answer`] and into [`ScoredGroup::example_masks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExampleChoice {
    /// Index into the answer.
    pub position: u16,
    /// Index into the dictionary of masks.
    pub mask: u16,
}

/// What an answer is aimed at, by which examples are balanced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Aim {
    /// Level of the problem on its domain's ladder, 0 where there is none. Levels are trained on in the shares of the config.
    pub level: u32,
    /// Within the level, problems of one goal differ in their givens only. Rare goals weigh more.
    pub goal: u64,
}

/// What a learner trains on: a prompt and a verified answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// Prompt tokens.
    pub prompt: Vec<Token>,
    /// Answer tokens.
    pub answer: Vec<Token>,
    /// The answer tokens that carry loss.
    pub choices: Vec<ExampleChoice>,
    /// Who wrote the problem that the rollout answered.
    pub problem_origin: ProblemOrigin,
    /// How the label came about.
    pub label_origin: LabelOrigin,
    /// What the answer is aimed at.
    pub aim: Aim,
}

/// A problem that a rollout wrote and that was admitted: it parses, has a solution, and asks something.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    /// Which rollout wrote it.
    pub rollout: u32,
    /// The problem.
    pub keyed: KeyedProblem,
    /// The niche that it turned out to be of.
    pub niche: Niche,
    /// The choices in the rollout when it is asked for that niche; masks as in [`ScoredGroup::example_masks`].
    pub choices: Vec<ExampleChoice>,
}

/// A group with its verdicts and the examples made from it. All of it is a function of the task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoredGroup {
    /// What the actor played.
    pub group: Group,
    /// The prompt that was answered.
    pub prompt: Vec<Token>,
    /// The niche of the problem that was posed; of problems asked for: the niche that was named.
    pub niche: Niche,
    /// What answers to it aim at, as far as the problem alone tells.
    pub aim: Aim,
    /// One per rollout, in order.
    pub verdicts: Vec<Verdict>,
    /// Dictionary of the action masks of the examples.
    pub example_masks: Vec<ActionMask>,
    /// Training examples, in order of rollout; none of them is an exam problem.
    pub examples: Vec<Example>,
    /// Problems that the rollouts wrote, in order of rollout; none of them is an exam problem.
    pub proposals: Vec<Proposal>,
}

impl Group {
    /// Names the versions that drew its tokens, some more than once.
    pub fn versions(&self) -> impl Iterator<Item = u64> {
        self.rollouts.iter().flat_map(|rollout| &rollout.versions).map(|span| span.policy_version)
    }

    /// Tells whether one version drew all of its tokens.
    pub fn is_of_version(&self, policy_version: u64) -> bool {
        let whole = [VersionSpan { first_token: 0, policy_version }];
        self.rollouts.iter().all(|rollout| rollout.versions == whole)
    }

    /// Most bytes on the wire of a group of this size: every token is chosen, each with a mask of its own.
    pub fn max_bytes(num_rollouts: u32, max_tokens: u32) -> usize {
        // A token, its choice with two indices and a log-probability, and its mask.
        let per_token = 3 + (3 + 3 + 4) + 10 * MASK_BITS / 64;
        // Beside them lengths and versions, and once the task with its problem.
        4_096 + num_rollouts as usize * (64 + max_tokens as usize * per_token)
    }

    /// Checks that the group has the size and the form of what its task asks for, and that everything in it that points
    /// somewhere points into it. Whoever reads it then need not, and is not kept busy for long.
    ///
    /// # Errors
    /// In words, the first thing that is not as it must be.
    pub fn check(&self) -> Result<(), String> {
        let Group { task, masks, rollouts } = self;
        let is_possible = task.num_rollouts <= Task::MAX_ROLLOUTS && task.max_tokens <= Task::MAX_TOKENS;
        expect(is_possible, "a task of a size that tasks have")?;
        expect(rollouts.len() == task.num_rollouts as usize, "as many rollouts as were asked for")?;
        for Rollout { tokens, choices, versions, search, .. } in rollouts {
            let is_span = |span: &VersionSpan| usize::from(span.first_token) <= tokens.len();
            let are_in_order = versions.is_sorted_by(|left, right| {
                left.first_token < right.first_token && left.policy_version < right.policy_version
            });
            let begin = versions
                .first()
                .is_some_and(|span| span.first_token == 0 && span.policy_version >= task.policy_version);
            expect(begin && are_in_order && versions.iter().all(is_span), "the versions of every token, in order")?;
            let is_pinned = versions == &[VersionSpan { first_token: 0, policy_version: task.policy_version }];
            expect(is_pinned || task.free_running, "the version that was asked for")?;
            expect(tokens.len() <= task.max_tokens as usize, "no more tokens than were asked for")?;
            expect(tokens.iter().all(|token| usize::from(*token) < MASK_BITS), "tokens of the vocabulary")?;
            expect(choices.iter().all(|choice| choice.logprob <= 0.0 && choice.logprob.is_finite()), "logprobs")?;
            let choices = choices.iter().map(|choice| (choice.position, choice.mask));
            expect(are_choices(tokens, choices, masks), "choices of legal tokens, in order, in every rollout")?;
            expect(search.is_none(), "no search where none is asked for")?;
        }
        let num_choices = rollouts.iter().map(|rollout| rollout.choices.len()).sum();
        expect(masks.len() <= num_choices, "no masks but those of choices")
    }
}

impl ScoredGroup {
    /// Checks the group, and that everything that was added to it points into the message.
    ///
    /// # Errors
    /// In words, the first thing that is not as it must be.
    pub fn check(&self) -> Result<(), String> {
        self.group.check()?;
        let rollouts = &self.group.rollouts;
        expect(self.verdicts.len() == rollouts.len(), "as many verdicts as rollouts")?;
        expect(!self.prompt.is_empty(), "a prompt")?;
        for Example { prompt, answer, choices, .. } in &self.examples {
            expect(!prompt.is_empty(), "a prompt in every example")?;
            let choices = choices.iter().map(|choice| (choice.position, choice.mask));
            expect(are_choices(answer, choices, &self.example_masks), "choices of legal tokens in every example")?;
        }
        for Proposal { rollout, choices, .. } in &self.proposals {
            let rollout = rollouts.get(*rollout as usize).ok_or("expected proposals of rollouts that are there")?;
            let choices = choices.iter().map(|choice| (choice.position, choice.mask));
            let holds = are_choices(&rollout.tokens, choices, &self.example_masks);
            expect(holds, "choices of legal tokens in every proposal")?;
        }
        Ok(())
    }
}

fn expect(holds: bool, what: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(format!("expected {what}")) }
}

/// Tells whether (position, mask) pairs are in order and name tokens that their masks hold.
fn are_choices(tokens: &[Token], choices: impl Iterator<Item = (u16, u16)> + Clone, masks: &[ActionMask]) -> bool {
    let is_legal = |(position, mask)| {
        let token = tokens.get(usize::from(position));
        let mask = masks.get(usize::from(mask));
        token.zip(mask).is_some_and(|(token, mask): (&Token, &ActionMask)| mask.contains(*token))
    };
    choices.clone().is_sorted_by(|left, right| left.0 < right.0) && choices.into_iter().all(is_legal)
}
