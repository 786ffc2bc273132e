use std::collections::{BTreeMap, BTreeSet, VecDeque};

use policy::Sequence;
use proto::{CounterRng, Digest, Example, LabelOrigin, LegalTokens, ProblemOrigin};
use serde::{Deserialize, Serialize};

use crate::Config;
use crate::config::DomainShare;
use crate::plan::draw;

/// An example of a domain, with what was legal at each of its choices.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Labelled {
    pub(crate) domain: String,
    pub(crate) example: Example,
    pub(crate) legal: Vec<LegalTokens>,
}

/// What a window of examples teaches.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Stream {
    domain: String,
    role: Role,
    level: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Role {
    Solve,
    Propose,
}

/// A replay window for each domain, role and level, so that none crowds out another.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Windows {
    by_stream: BTreeMap<Stream, Window>,
}

/// The newest examples of a stream, first in first out; no two are alike, so that what the policy already answers well does not
/// crowd out the rest.
#[derive(Clone, Debug, Default, PartialEq)]
struct Window {
    examples: VecDeque<Stored>,
    /// Prompts and answers of all examples.
    digests: BTreeSet<Digest>,
    /// Examples by goal, for weighting.
    goal_counts: BTreeMap<u64, u64>,
    /// Input tokens of all examples.
    num_tokens: u64,
}

/// An example in the form in which it is trained on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    example: Example,
    /// Of prompt and answer.
    digest: Digest,
    pub(crate) sequence: Sequence,
}

/// What an example brought to the windows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Made {
    /// Its input tokens, also where the windows hold it already; 0 where the config does not ask for its level.
    pub(crate) num_tokens: u64,
    /// Whether the windows did not hold it.
    pub(crate) is_new: bool,
}

/// The windows as checkpoints hold them.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Saved(Vec<(Stream, Vec<SavedExample>)>);

#[derive(Debug, Serialize, Deserialize)]
struct SavedExample {
    example: Example,
    /// At each of its choices.
    legal: Vec<LegalTokens>,
}

impl Windows {
    /// Adds an example, unless it is there already or of a level that the config has not; drops the oldest ones of its
    /// stream that there is no room for.
    pub(crate) fn push(&mut self, labelled: Labelled, config: &Config) -> Made {
        let Labelled { domain, example, legal } = labelled;
        let role = if example.label_origin == LabelOrigin::Proposal { Role::Propose } else { Role::Solve };
        let stream = Stream { domain, role, level: example.aim.level };
        let capacity = (config.learner.window_examples as f64 * stream.level_share(config)).ceil() as usize;
        if capacity == 0 {
            return Made::default();
        }
        let stored = Stored::new(example, legal);
        let num_tokens = stored.sequence.tokens.len() as u64;
        Made { num_tokens, is_new: self.by_stream.entry(stream).or_default().push(stored, capacity) }
    }

    /// Draws examples with their weights until they have `num_tokens` input tokens together; none where the windows hold nothing
    /// that the config trains on. Streams come up so that their shares of the trained tokens are those of the config; within a
    /// stream all examples are alike.
    pub(crate) fn sample(&self, config: &Config, num_tokens: u64, rng: &mut CounterRng) -> Vec<(&Stored, f64)> {
        let windows: Vec<(&Window, f64)> = self
            .by_stream
            .iter()
            .map(|(stream, window)| (window, stream.token_share(config) / window.mean_tokens()))
            .filter(|(_, rate)| *rate > 0.0)
            .collect();
        if windows.is_empty() {
            return Vec::new();
        }
        let (mut drawn, mut num_drawn) = (Vec::new(), 0);
        while num_drawn < num_tokens {
            let (window, _) = draw(rng, &windows, |(_, rate)| *rate);
            let stored = &window.examples[rng.below(window.examples.len() as u64) as usize];
            num_drawn += stored.sequence.tokens.len() as u64;
            drawn.push((stored, window.weight(stored.example.aim.goal, config.learner.max_goal_weight)));
        }
        drawn
    }

    pub(crate) fn save(&self) -> Saved {
        let save = |stored: &Stored| SavedExample {
            example: stored.example.clone(),
            legal: stored.sequence.chosen.iter().map(|chosen| chosen.legal.clone()).collect(),
        };
        let windows = self.by_stream.iter();
        Saved(windows.map(|(stream, window)| (stream.clone(), window.examples.iter().map(save).collect())).collect())
    }

    pub(crate) fn load(saved: Saved) -> Windows {
        let load = |(stream, examples): (Stream, Vec<SavedExample>)| {
            let mut window = Window::default();
            for saved in examples {
                window.push(Stored::new(saved.example, saved.legal), usize::MAX);
            }
            (stream, window)
        };
        Windows { by_stream: saved.0.into_iter().map(load).collect() }
    }
}

impl Stream {
    /// Gives the weight of its trained tokens among all streams'.
    fn token_share(&self, config: &Config) -> f64 {
        let proposer_share = config.self_play.as_ref().map_or(0.0, |own| own.proposer_share);
        let of_role = if self.role == Role::Solve { 1.0 - proposer_share } else { proposer_share };
        self.domain(config).map_or(0.0, |domain| domain.share) * of_role * self.level_share(config)
    }

    /// Gives the level's share of its domain, 0 to 1.
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

impl Window {
    fn push(&mut self, stored: Stored, capacity: usize) -> bool {
        if !self.digests.insert(stored.digest) {
            return false;
        }
        *self.goal_counts.entry(stored.example.aim.goal).or_default() += 1;
        self.num_tokens += stored.sequence.tokens.len() as u64;
        self.examples.push_back(stored);
        while self.examples.len() > capacity {
            let oldest = self.examples.pop_front().expect("the window is not empty");
            self.digests.remove(&oldest.digest);
            self.num_tokens -= oldest.sequence.tokens.len() as u64;
            let count = self.goal_counts.get_mut(&oldest.example.aim.goal).expect("every goal is counted");
            *count -= 1;
            if *count == 0 {
                self.goal_counts.remove(&oldest.example.aim.goal);
            }
        }
        true
    }

    fn mean_tokens(&self) -> f64 {
        self.num_tokens as f64 / self.examples.len() as f64
    }

    /// How much an example counts: min(max_weight, sqrt(mean count of a goal / count of this goal)).
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
    use proto::{Aim, Choices, Legal, Purpose};

    use super::*;
    use crate::config::{LevelWeight, ProblemShares, ProposerLoss, SelfPlayConfig};

    /// Domains a and b, of which a has three times the share, with levels 1 and 2.
    fn config(window_examples: usize, weights: [f64; 2]) -> Config {
        let mut config = crate::test_config();
        let levels: Vec<LevelWeight> =
            (1..).zip(weights).map(|(level, weight)| LevelWeight { level, weight }).collect();
        let domain = |name: &str, share| DomainShare { name: name.to_owned(), share, levels: levels.clone() };
        config.domains = vec![domain("a", 3.0), domain("b", 1.0)];
        config.learner.window_examples = window_examples;
        config
    }

    /// Examples of different numbers differ in the end of their answers.
    fn labelled(domain: &str, num_prompt_tokens: usize, number: u32, aim: Aim, label_origin: LabelOrigin) -> Labelled {
        let example = Example {
            prompt: vec![1; num_prompt_tokens],
            answer: vec![3, 4, number],
            choices: Choices::new(3, [(1, Legal::Set(0))]),
            problem_origin: ProblemOrigin::Ladder,
            label_origin,
            aim,
        };
        Labelled { domain: domain.to_owned(), example, legal: vec![[4, 7].into_iter().collect()] }
    }

    #[test]
    fn rare_goals_weigh_more_and_the_oldest_go_first() {
        let mut windows = Windows::default();
        // A window of eight examples, half of it for the level.
        let config = config(8, [1.0, 1.0]);
        for (number, goal) in [9, 1, 1, 1, 2].into_iter().enumerate() {
            let aim = Aim { level: 1, goal };
            assert!(windows.push(labelled("a", 2, number as u32, aim, LabelOrigin::Solved), &config).is_new);
        }
        let window = windows.by_stream.values().next().unwrap();
        assert_eq!((window.examples.len(), window.num_tokens), (4, 12));
        // Two goals in four examples: the mean count is 2.
        assert_eq!(window.weight(1, 4.0), (2.0f64 / 3.0).sqrt());
        assert_eq!(window.weight(2, 4.0), 2f64.sqrt());
        assert_eq!(window.weight(2, 1.0), 1.0);
        assert_eq!(Windows::load(windows.save()), windows);
        let sequence = &window.examples[0].sequence;
        assert_eq!(sequence.tokens, [1, 1, 3], "tokens after the last choice predict nothing");
        assert_eq!((sequence.chosen[0].row, sequence.chosen[0].target), (2, 4));
    }

    #[test]
    fn no_example_is_held_twice_and_none_of_a_level_that_is_not_asked() {
        let mut windows = Windows::default();
        let config = config(4, [1.0, 1.0]);
        let mut push = |number, domain, level| {
            let aim = Aim { level, goal: 1 };
            windows.push(labelled(domain, 2, number, aim, LabelOrigin::Hindsight), &config).is_new
        };
        assert_eq!([push(0, "a", 1), push(0, "a", 1), push(0, "b", 1), push(1, "a", 1)], [true, false, true, true]);
        assert_eq!([push(2, "a", 1), push(1, "a", 1)], [true, false], "0 made room");
        assert!(push(0, "a", 1), "what is gone may come back");
        assert_eq!([push(0, "a", 0), push(0, "a", 3), push(0, "c", 1)], [false; 3]);
        let lengths = windows.by_stream.values().map(|window| (window.examples.len(), window.digests.len()));
        assert_eq!(lengths.collect::<Vec<_>>(), [(2, 2), (1, 1)]);
    }

    /// Long and short, many and few: what is trained follows the config all the same.
    #[test]
    fn shares_are_of_trained_tokens() {
        let mut config = config(100, [1.0, 3.0]);
        let proposer_loss = ProposerLoss::CrossEntropy;
        let problems = ProblemShares { proposer: 1.0, mutation: 0.0, archive: 0.0, ladder: 0.0 };
        config.self_play =
            Some(SelfPlayConfig { bootstrap_steps: 0, propose_tasks: 1, proposer_loss, proposer_share: 0.2, problems });
        let mut windows = Windows::default();
        let mut push = |domain, num_prompt_tokens, number, level, label_origin| {
            let labelled = labelled(domain, num_prompt_tokens, number, Aim { level, goal: 1 }, label_origin);
            assert!(windows.push(labelled, &config).is_new);
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
        for (stored, _) in windows.sample(&config, 800_000, &mut rng) {
            *num_tokens.entry(stored.sequence.tokens.len()).or_default() += stored.sequence.tokens.len();
        }
        let total: usize = num_tokens.values().sum();
        // a: 0.75 of the tokens, a fifth of it to propose, a quarter of either of level 1. What has no examples is shared out.
        let expected = [(5, 0.75 * 0.8 * 0.25), (15, 0.75 * 0.8 * 0.75), (3, 0.75 * 0.2 * 0.25)];
        let expected = [&expected[..], &[(20, 0.25 * 0.8 * 0.25), (30, 0.25 * 0.8 * 0.75)]].concat();
        let present: f64 = expected.iter().map(|(_, share)| share).sum();
        for (len, expected) in expected {
            let share = num_tokens[&len] as f64 / total as f64;
            assert!((share - expected / present).abs() < 0.02, "{len}: {share} {expected}");
        }
    }
}
