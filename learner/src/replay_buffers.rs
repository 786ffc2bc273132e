use std::collections::{BTreeMap, BTreeSet, VecDeque};

use policy::Sequence;
use proto::{Choices, CounterRng, Digest, Example, LabelOrigin, Legal, LegalTokens, ProblemOrigin};
use serde::{Deserialize, Serialize};

use crate::Config;
use crate::config::DomainShare;
use crate::draw::draw;

/// An example of a domain, with the legal tokens at each of its choices.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Labelled {
    pub(crate) domain: String,
    pub(crate) example: Example,
    pub(crate) legal: Vec<LegalTokens>,
}

impl Labelled {
    /// Makes every token of the answer a choice among all tokens.
    pub(crate) fn without_constraint(mut self) -> Labelled {
        let len = self.example.answer.len();
        self.example.choices = Choices::new(len, (0..len).map(|position| (position, Legal::Any)));
        self.legal = vec![LegalTokens::Any; len];
        self
    }
}

/// The buffer that an example belongs to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct BufferKey {
    domain: String,
    role: Role,
    level: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Role {
    Solve,
    Propose,
}

/// A replay buffer for each domain, role and level, so that none displaces another.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ReplayBuffers {
    by_key: BTreeMap<BufferKey, ReplayBuffer>,
}

/// The newest examples of a buffer, first in first out. Duplicates are dropped, so that answers that the policy already gives
/// often do not displace the rest.
#[derive(Clone, Debug, Default, PartialEq)]
struct ReplayBuffer {
    examples: VecDeque<Stored>,
    /// Digests of prompt and answer of all examples.
    digests: BTreeSet<Digest>,
    /// Number of examples by goal, for weighting.
    goal_counts: BTreeMap<u64, u64>,
    /// Input tokens of all examples.
    num_tokens: u64,
}

/// An example in the form in which it is trained on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    example: Example,
    /// Digest of prompt and answer.
    digest: Digest,
    pub(crate) sequence: Sequence,
}

/// The result of adding an example to the buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Made {
    /// Its input tokens, even if the buffers held it already; 0 if the config does not list its level.
    pub(crate) num_tokens: u64,
    /// Whether the buffers did not hold it before.
    pub(crate) is_new: bool,
}

/// The buffers as checkpoints hold them.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Saved(Vec<(BufferKey, Vec<SavedExample>)>);

#[derive(Debug, Serialize, Deserialize)]
struct SavedExample {
    example: Example,
    /// Legal tokens at each of its choices.
    legal: Vec<LegalTokens>,
}

impl ReplayBuffers {
    /// Adds an example, unless it is present already or the config does not list its level. Drops the oldest examples of its
    /// buffer beyond the capacity.
    pub(crate) fn push(&mut self, labelled: Labelled, config: &Config) -> Made {
        let Labelled { domain, example, legal } = labelled;
        let role = if example.label_origin == LabelOrigin::Proposal { Role::Propose } else { Role::Solve };
        let key = BufferKey { domain, role, level: example.balance_key.level };
        let capacity = (config.learner.window_examples as f64 * key.level_share(config)).ceil() as usize;
        if capacity == 0 {
            return Made::default();
        }
        let stored = Stored::new(example, legal);
        let num_tokens = stored.sequence.tokens.len() as u64;
        Made { num_tokens, is_new: self.by_key.entry(key).or_default().push(stored, capacity) }
    }

    /// Draws examples with their weights until they have `num_tokens` input tokens together. Returns none if the buffers hold no
    /// example that the config trains on. The buffers' shares of the trained tokens follow the config; within a buffer, draws
    /// are uniform.
    pub(crate) fn sample(&self, config: &Config, num_tokens: u64, rng: &mut CounterRng) -> Vec<(&Stored, f64)> {
        let buffers: Vec<(&ReplayBuffer, f64)> = self
            .by_key
            .iter()
            .map(|(key, buffer)| (buffer, key.token_share(config) / buffer.mean_tokens()))
            .filter(|(_, rate)| *rate > 0.0)
            .collect();
        if buffers.is_empty() {
            return Vec::new();
        }
        let (mut drawn, mut num_drawn) = (Vec::new(), 0);
        while num_drawn < num_tokens {
            let (buffer, _) = draw(rng, &buffers, |(_, rate)| *rate);
            let stored = &buffer.examples[rng.below(buffer.examples.len() as u64) as usize];
            num_drawn += stored.sequence.tokens.len() as u64;
            drawn.push((stored, buffer.weight(stored.example.balance_key.goal, config.learner.max_goal_weight)));
        }
        drawn
    }

    pub(crate) fn save(&self) -> Saved {
        let save = |stored: &Stored| SavedExample {
            example: stored.example.clone(),
            legal: stored.sequence.chosen.iter().map(|chosen| chosen.legal.clone()).collect(),
        };
        let buffers = self.by_key.iter();
        Saved(buffers.map(|(key, buffer)| (key.clone(), buffer.examples.iter().map(save).collect())).collect())
    }

    pub(crate) fn load(saved: Saved) -> ReplayBuffers {
        let load = |(key, examples): (BufferKey, Vec<SavedExample>)| {
            let mut buffer = ReplayBuffer::default();
            for saved in examples {
                buffer.push(Stored::new(saved.example, saved.legal), usize::MAX);
            }
            (key, buffer)
        };
        ReplayBuffers { by_key: saved.0.into_iter().map(load).collect() }
    }
}

impl BufferKey {
    /// Returns the relative weight of its trained tokens among all keys.
    fn token_share(&self, config: &Config) -> f64 {
        let proposer_share = config.self_play.as_ref().map_or(0.0, |own| own.proposer_share);
        let of_role = if self.role == Role::Solve { 1.0 - proposer_share } else { proposer_share };
        self.domain(config).map_or(0.0, |domain| domain.share) * of_role * self.level_share(config)
    }

    /// Returns the level's share of its domain, 0 to 1.
    fn level_share(&self, config: &Config) -> f64 {
        let levels = self.domain(config).map_or(&[][..], |domain| &domain.levels);
        let own = levels.iter().filter(|entry| entry.level == self.level).map(|entry| entry.weight).sum::<f64>();
        let all = levels.iter().map(|entry| entry.weight).sum::<f64>();
        if own > 0.0 { own / all } else { 0.0 }
    }

    fn domain<'a>(&self, config: &'a Config) -> Option<&'a DomainShare> {
        config.domains.iter().find(|domain| domain.name == self.domain)
    }
}

impl ReplayBuffer {
    fn push(&mut self, stored: Stored, capacity: usize) -> bool {
        if !self.digests.insert(stored.digest) {
            return false;
        }
        *self.goal_counts.entry(stored.example.balance_key.goal).or_default() += 1;
        self.num_tokens += stored.sequence.tokens.len() as u64;
        self.examples.push_back(stored);
        while self.examples.len() > capacity {
            let oldest = self.examples.pop_front().expect("the buffer is not empty");
            self.digests.remove(&oldest.digest);
            self.num_tokens -= oldest.sequence.tokens.len() as u64;
            let count = self.goal_counts.get_mut(&oldest.example.balance_key.goal).expect("every goal is counted");
            *count -= 1;
            if *count == 0 {
                self.goal_counts.remove(&oldest.example.balance_key.goal);
            }
        }
        true
    }

    fn mean_tokens(&self) -> f64 {
        self.num_tokens as f64 / self.examples.len() as f64
    }

    /// Returns the weight of an example: min(max_weight, sqrt(mean count of a goal / count of this goal)).
    fn weight(&self, goal: u64, max_weight: f64) -> f64 {
        let mean = self.examples.len() as f64 / self.goal_counts.len() as f64;
        (mean / self.goal_counts[&goal] as f64).sqrt().min(max_weight)
    }
}

impl Stored {
    fn new(example: Example, legal: Vec<LegalTokens>) -> Stored {
        let choices = example.choices.iter().zip(legal).map(|((position, _), legal)| (position, legal));
        let sequence = Sequence::new(&example.prompt, &example.answer, choices);
        let digest = Digest::of(&(&example.prompt, &example.answer));
        Stored { sequence, digest, example }
    }

    pub(crate) fn origins(&self) -> (ProblemOrigin, LabelOrigin) {
        (self.example.problem_origin, self.example.label_origin)
    }
}

#[cfg(test)]
mod tests {
    use proto::{BalanceKey, Purpose};

    use super::*;
    use crate::config::{LevelWeight, ProblemShares, ProposerLoss, SelfPlayConfig};

    /// Returns a config with domains a and b, where a has three times the share, and levels 1 and 2.
    fn config(window_examples: usize, weights: [f64; 2]) -> Config {
        let mut config = crate::test_config();
        let levels: Vec<LevelWeight> =
            (1..).zip(weights).map(|(level, weight)| LevelWeight { level, weight }).collect();
        let domain =
            |name: &str, share| DomainShare { name: name.to_owned(), share, levels: levels.clone(), file: None };
        config.domains = vec![domain("a", 3.0), domain("b", 1.0)];
        config.learner.window_examples = window_examples;
        config
    }

    /// Returns an example whose answer ends with its number.
    fn labelled(
        domain: &str,
        num_prompt_tokens: usize,
        number: u32,
        balance_key: BalanceKey,
        label_origin: LabelOrigin,
    ) -> Labelled {
        let example = Example {
            prompt: vec![1; num_prompt_tokens],
            answer: vec![3, 4, number],
            choices: Choices::new(3, [(1, Legal::Set(0))]),
            problem_origin: ProblemOrigin::Ladder,
            label_origin,
            balance_key,
        };
        Labelled { domain: domain.to_owned(), example, legal: vec![[4, 7].into_iter().collect()] }
    }

    #[test]
    fn rare_goals_weigh_more_and_the_oldest_go_first() {
        let mut buffers = ReplayBuffers::default();
        // The capacity is eight examples, half of it for the level.
        let config = config(8, [1.0, 1.0]);
        for (number, goal) in [9, 1, 1, 1, 2].into_iter().enumerate() {
            let balance_key = BalanceKey { level: 1, goal };
            assert!(buffers.push(labelled("a", 2, number as u32, balance_key, LabelOrigin::Solved), &config).is_new);
        }
        let buffer = buffers.by_key.values().next().unwrap();
        assert_eq!((buffer.examples.len(), buffer.num_tokens), (4, 12));
        // Two goals in four examples: the mean count is 2.
        assert_eq!(buffer.weight(1, 4.0), (2.0f64 / 3.0).sqrt());
        assert_eq!(buffer.weight(2, 4.0), 2f64.sqrt());
        assert_eq!(buffer.weight(2, 1.0), 1.0);
        assert_eq!(ReplayBuffers::load(buffers.save()), buffers);
        let sequence = &buffer.examples[0].sequence;
        assert_eq!(sequence.tokens, [1, 1, 3], "tokens after the last choice predict nothing");
        assert_eq!((sequence.chosen[0].row, sequence.chosen[0].target), (2, 4));
    }

    #[test]
    fn no_example_is_held_twice_and_none_of_a_level_that_is_not_asked() {
        let mut buffers = ReplayBuffers::default();
        let config = config(4, [1.0, 1.0]);
        let mut push = |number, domain, level| {
            let balance_key = BalanceKey { level, goal: 1 };
            buffers.push(labelled(domain, 2, number, balance_key, LabelOrigin::Hindsight), &config).is_new
        };
        assert_eq!([push(0, "a", 1), push(0, "a", 1), push(0, "b", 1), push(1, "a", 1)], [true, false, true, true]);
        assert_eq!([push(2, "a", 1), push(1, "a", 1)], [true, false], "0 made room");
        assert!(push(0, "a", 1), "what is gone may come back");
        assert_eq!([push(0, "a", 0), push(0, "a", 3), push(0, "c", 1)], [false; 3]);
        let lengths = buffers.by_key.values().map(|buffer| (buffer.examples.len(), buffer.digests.len()));
        assert_eq!(lengths.collect::<Vec<_>>(), [(2, 2), (1, 1)]);
    }

    /// The trained shares follow the config, whatever the length and number of the examples.
    #[test]
    fn shares_are_of_trained_tokens() {
        let mut config = config(100, [1.0, 3.0]);
        let proposer_loss = ProposerLoss::CrossEntropy;
        let problems = ProblemShares { proposer: 1.0, mutation: 0.0, archive: 0.0, ladder: 0.0 };
        config.self_play =
            Some(SelfPlayConfig { bootstrap_steps: 0, propose_tasks: 1, proposer_loss, proposer_share: 0.2, problems });
        let mut buffers = ReplayBuffers::default();
        let mut push = |domain, num_prompt_tokens, number, level, label_origin| {
            let labelled = labelled(domain, num_prompt_tokens, number, BalanceKey { level, goal: 1 }, label_origin);
            assert!(buffers.push(labelled, &config).is_new);
        };
        for number in 0..5 {
            push("a", 4, number, 1, LabelOrigin::Solved);
            push("a", 2, number, 1, LabelOrigin::Proposal);
            push("b", 29, number, 2, LabelOrigin::Executor);
        }
        for number in 0..50 {
            push("a", 14, number, 2, LabelOrigin::Solved);
            push("b", 19, number, 1, LabelOrigin::Hindsight);
        }
        let mut rng = CounterRng::new(0, Purpose::Replay, 0, 0, 0);
        let mut num_tokens = BTreeMap::<usize, usize>::new();
        for (stored, _) in buffers.sample(&config, 800_000, &mut rng) {
            *num_tokens.entry(stored.sequence.tokens.len()).or_default() += stored.sequence.tokens.len();
        }
        let total: usize = num_tokens.values().sum();
        // a: 0.75 of the tokens, a fifth of it to propose, a quarter of each role at level 1. Shares without examples are divided
        // among the rest.
        let expected = [(5, 0.75 * 0.8 * 0.25), (15, 0.75 * 0.8 * 0.75), (3, 0.75 * 0.2 * 0.25)];
        let expected = [&expected[..], &[(20, 0.25 * 0.8 * 0.25), (30, 0.25 * 0.8 * 0.75)]].concat();
        let present: f64 = expected.iter().map(|(_, share)| share).sum();
        for (len, expected) in expected {
            let share = num_tokens[&len] as f64 / total as f64;
            assert!((share - expected / present).abs() < 0.02, "{len}: {share} {expected}");
        }
    }
}
