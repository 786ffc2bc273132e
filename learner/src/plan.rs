//! The tasks of a batch: each is a function of the state, the batch and the index.

use std::collections::BTreeMap;
use std::sync::Arc;

use proto::{
    CounterRng, Difficulty, Digest, KeyedProblem, Niche, ProblemKey, ProblemOrigin, ProblemSource, Purpose, Request,
    Sampling, Task, TaskId, TaskKind,
};
use serde::{Deserialize, Serialize};

use crate::Config;
use crate::config::{DomainShare, SelfPlayConfig};
use crate::draw::draw;
use crate::self_play::{SelfPlay, StoredProposal};
use crate::state::State;

/// A task with the information that is hidden from its actor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Planned {
    /// The task.
    pub task: Task,
    /// Its problem's key, if it has one.
    pub key: Option<ProblemKey>,
    /// The proposal that its problem comes from.
    pub(crate) proposal: Option<StoredProposal>,
}

/// Tasks that are planned and not folded yet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plans {
    /// Number of batches planned so far.
    num_batches: u64,
    tasks: BTreeMap<TaskId, Planned>,
}

impl Plans {
    /// Returns a task that is planned.
    pub fn get(&self, id: TaskId) -> Option<&Planned> {
        self.tasks.get(&id)
    }

    /// Returns all of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Planned> {
        self.tasks.values()
    }

    /// Returns those of a batch, in order of index.
    pub fn batch(&self, batch: u64) -> impl Iterator<Item = &Planned> {
        let id = |index| TaskId { kind: TaskKind::Train, batch, index };
        self.tasks.range(id(0)..=id(u32::MAX)).map(|(_, planned)| planned)
    }

    /// Whether a task is planned, or will be.
    pub(crate) fn may_hold(&self, id: TaskId) -> bool {
        id.batch >= self.num_batches || self.tasks.contains_key(&id)
    }

    /// Returns how many batches have been planned.
    pub(crate) fn num_batches(&self) -> u64 {
        self.num_batches
    }

    /// Adds the next batch.
    pub(crate) fn push_batch(&mut self, batch: Vec<Planned>) {
        self.num_batches += 1;
        self.tasks.extend(batch.into_iter().map(|planned| (planned.task.id, planned)));
    }

    pub(crate) fn remove(&mut self, id: TaskId) -> Option<Planned> {
        self.tasks.remove(&id)
    }
}

/// Plans a batch from a state. Removes the proposals that it poses from the state's queue.
pub(crate) fn plan_batch(
    config: &Config,
    sources: &[Arc<dyn ProblemSource>],
    state: &mut State,
    weights: Digest,
    batch: u64,
) -> Vec<Planned> {
    let mut plan_task = |index: u32| {
        let mut rng = CounterRng::new(config.seed, Purpose::Plan, batch, u64::from(index), 0);
        let domain = draw(&mut rng, &config.domains, |domain| domain.share);
        let source = sources.iter().find(|source| source.name() == domain.name);
        let planner = Planner {
            config,
            domain,
            level: draw(&mut rng, &domain.levels, |level| level.weight).level,
            source: source.expect("validated: every domain is known").as_ref(),
            number: batch * u64::from(config.batch.num_tasks) + u64::from(index),
            step: state.step,
            is_bootstrap: config.self_play.as_ref().is_none_or(|own| state.step < own.bootstrap_steps),
        };
        let asked = planner.ask(index, &mut state.self_play, &mut rng);
        let task = Task {
            id: TaskId { kind: TaskKind::Train, batch, index },
            seed: config.seed,
            weights,
            policy_version: state.step,
            free_running: config.is_free_running(),
            request: asked.request,
            family: asked.family,
            num_rollouts: config.batch.num_rollouts,
            sampling: Sampling { behavior: config.actor.behavior, temperature: config.actor.temperature },
            max_tokens: asked.max_tokens,
        };
        Planned { task, key: asked.key, proposal: asked.proposal }
    };
    (0..config.batch.num_tasks).map(&mut plan_task).collect()
}

/// The inputs for planning one task.
struct Planner<'a> {
    config: &'a Config,
    domain: &'a DomainShare,
    /// Level of the problem, whatever its source.
    level: u32,
    source: &'a dyn ProblemSource,
    /// Number of the task within the run.
    number: u64,
    /// Number of the state that plans it.
    step: u64,
    /// Whether problems to solve come from the ladder alone.
    is_bootstrap: bool,
}

/// The request of a task.
struct Asked {
    request: Request,
    family: String,
    max_tokens: u32,
    key: Option<ProblemKey>,
    proposal: Option<StoredProposal>,
}

/// Families of a domain besides the levels of its ladder, in a run that makes problems itself.
const OWN_FAMILIES: [&str; 3] = [PROPOSALS, OWN, ARCHIVE];
const PROPOSALS: &str = "proposals";
const OWN: &str = "own";
const ARCHIVE: &str = "archive";

/// Returns all families of tasks: domain and level, or domain and source.
pub fn families(config: &Config) -> Vec<String> {
    let own = if config.self_play.is_some() { &OWN_FAMILIES[..] } else { &[] };
    let of_domain = |domain: &DomainShare| {
        let levels = domain.levels.iter().map(|entry| format!("{}/{}", domain.name, entry.level));
        let own = own.iter().map(|source| format!("{} {source}", domain.name));
        levels.chain(own).collect::<Vec<_>>()
    };
    config.domains.iter().flat_map(of_domain).collect()
}

/// Sources of problems. One that has none to offer is replaced by the next in this order.
const SOURCES: [ProblemOrigin; 4] =
    [ProblemOrigin::Proposer, ProblemOrigin::Mutation, ProblemOrigin::Archive, ProblemOrigin::Ladder];

impl Planner<'_> {
    fn ask(&self, index: u32, state: &mut SelfPlay, rng: &mut CounterRng) -> Asked {
        let Some(own) = &self.config.self_play else { return self.ladder(state) };
        let problems = if index < own.propose_tasks { self.problems(state, rng) } else { None };
        problems.or_else(|| self.own_problem(own, state, rng)).unwrap_or_else(|| self.ladder(state))
    }

    /// Asks for problems, once a niche was measured whose prompt leaves room for one. Hard and easy ones are equally likely, since
    /// there is nothing to learn from trivial ones and little from unsolved ones.
    fn problems(&self, state: &SelfPlay, rng: &mut CounterRng) -> Option<Asked> {
        let niche = state.curriculum.draw(&self.domain.name, |niche| self.is_wanted(niche), rng)?;
        let difficulty = if rng.below(2) == 0 { Difficulty::Hard } else { Difficulty::Easy };
        let max_tokens = self.source.max_proposal_tokens(niche);
        let needed = self.source.propose_prompt(niche, difficulty).len() + max_tokens as usize;
        (needed <= self.config.model.max_positions).then_some(Asked {
            request: Request::Propose { domain: self.domain.name.clone(), niche, difficulty },
            family: format!("{} {PROPOSALS}", self.domain.name),
            max_tokens,
            key: None,
            proposal: None,
        })
    }

    /// Poses a problem that the run made itself; `None` if the ladder was drawn or there is no such problem.
    fn own_problem(&self, own: &SelfPlayConfig, state: &mut SelfPlay, rng: &mut CounterRng) -> Option<Asked> {
        if self.is_bootstrap {
            return None;
        }
        let shares = [own.problems.proposer, own.problems.mutation, own.problems.archive, own.problems.ladder];
        let drawn = *draw(rng, &[0, 1, 2, 3], |place| shares[*place]);
        let is_wanted = |niche| self.is_wanted(niche);
        SOURCES[drawn..].iter().find_map(|origin| {
            let (keyed, proposal) = match origin {
                ProblemOrigin::Proposer => {
                    let (keyed, proposal) = state.next_proposal(&self.domain.name, is_wanted)?;
                    (keyed, Some(proposal))
                }
                ProblemOrigin::Mutation => {
                    let parent = state.archive.draw(&self.domain.name, is_wanted, rng)?;
                    let mut draws = CounterRng::new(self.config.seed, Purpose::Mutation, self.number, 0, 0);
                    let mutant = self.source.mutate(parent, &mut draws)?;
                    let is_new = state.seen.insert(&self.source.canonical_hash(&mutant.problem));
                    (is_new.then_some(mutant)?, None)
                }
                ProblemOrigin::Archive => {
                    (state.archive.draw_again(&self.domain.name, is_wanted, self.step, rng)?.clone(), None)
                }
                _ => return None,
            };
            let source = if *origin == ProblemOrigin::Proposer { OWN } else { ARCHIVE };
            Some(self.pose(keyed, *origin, format!("{} {source}", self.domain.name), proposal))
        })
    }

    fn ladder(&self, state: &mut SelfPlay) -> Asked {
        let level = self.level;
        let keyed = self.source.ladder(level, self.config.seed, self.number);
        if self.config.self_play.is_some() {
            state.seen.insert(&self.source.canonical_hash(&keyed.problem));
        }
        self.pose(keyed, ProblemOrigin::Ladder, format!("{}/{level}", self.domain.name), None)
    }

    fn is_wanted(&self, niche: Niche) -> bool {
        self.source.level_of(niche) == self.level
    }

    fn pose(
        &self,
        KeyedProblem { problem, key }: KeyedProblem,
        origin: ProblemOrigin,
        family: String,
        proposal: Option<StoredProposal>,
    ) -> Asked {
        Asked {
            request: Request::Solve { problem, origin, has_key: key.is_some() },
            family,
            max_tokens: self.config.actor.max_answer_tokens,
            key,
            proposal,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proto::{BalanceKey, Choices, Group, Proposal, Rollout, ScoredGroup, StopReason, Verdict};

    use super::*;
    use crate::config::{LevelWeight, ProblemShares, ProposerLoss};
    use crate::{TestSource, test_config, test_problem};

    fn config() -> Config {
        let mut config = test_config();
        let levels = vec![LevelWeight { level: 1, weight: 1.0 }];
        config.domains = [("a", 3.0), ("b", 1.0)]
            .map(|(name, share)| DomainShare { name: name.to_owned(), share, levels: levels.clone(), file: None })
            .to_vec();
        config.batch.num_tasks = 1_000;
        let proposer_loss = ProposerLoss::CrossEntropy;
        let problems = ProblemShares { proposer: 0.5, mutation: 0.3, archive: 0.1, ladder: 0.1 };
        config.self_play = Some(SelfPlayConfig {
            bootstrap_steps: 10,
            propose_tasks: 100,
            proposer_loss,
            proposer_share: 0.1,
            problems,
        });
        config
    }

    fn sources() -> Vec<Arc<dyn ProblemSource>> {
        vec![Arc::new(TestSource("a")), Arc::new(TestSource("b"))]
    }

    fn plan(config: &Config, state: &mut State) -> (Vec<Planned>, BTreeMap<(String, &'static str), usize>) {
        let step = state.step;
        let planned = plan_batch(config, &sources(), state, Digest::of_bytes(b""), step);
        let mut counts = BTreeMap::new();
        for planned in &planned {
            let kind = match &planned.task.request {
                Request::Propose { .. } => "propose",
                Request::Solve { origin: ProblemOrigin::Proposer, .. } => "proposer",
                Request::Solve { origin: ProblemOrigin::Mutation, .. } => "mutation",
                Request::Solve { origin: ProblemOrigin::Archive, .. } => "archive",
                Request::Solve { .. } => "ladder",
            };
            *counts.entry((planned.task.request.domain().to_owned(), kind)).or_default() += 1;
        }
        (planned, counts)
    }

    /// Queues `num_proposals` in each domain.
    fn fill(state: &mut State, num_proposals: u32) {
        for name in ["a", "b"] {
            state.self_play.measure(&test_problem(name, "kept"), Niche(1), 0.5, 0);
            let request = Request::Propose { domain: name.to_owned(), niche: Niche(1), difficulty: Difficulty::Hard };
            let (mut tasks, _) = plan(&test_config_of_one(name), &mut State::initial());
            let task = Task { request, ..tasks.remove(0).task };
            let rollout = |number| Rollout {
                tokens: vec![number],
                choices: Choices::new(1, []),
                logprobs: Vec::new(),
                values: None,
                search: None,
                stop: StopReason::Complete,
                versions: Vec::new(),
            };
            let proposal = |rollout| {
                let keyed = test_problem(name, &format!("proposal {rollout}"));
                Proposal { rollout, keyed, niche: Niche(1), choices: Choices::new(1, []) }
            };
            let scored = ScoredGroup {
                group: Group { task, sets: Vec::new(), rollouts: (0..num_proposals).map(rollout).collect() },
                prompt: Vec::new(),
                niche: Niche(1),
                balance_key: BalanceKey { level: 1, goal: 1 },
                verdicts: vec![Verdict::Correct; num_proposals as usize],
                example_sets: Vec::new(),
                examples: Vec::new(),
                proposals: (0..num_proposals).map(proposal).collect(),
            };
            assert_eq!(state.self_play.take_proposals(&scored, &TestSource(name)), u64::from(num_proposals));
            assert_eq!(state.self_play.take_proposals(&scored, &TestSource(name)), 0, "nothing is new twice");
        }
    }

    fn test_config_of_one(name: &str) -> Config {
        let mut config = config();
        config.domains.retain(|domain| domain.name == name);
        config.self_play = None;
        config.batch.num_tasks = 1;
        config
    }

    #[test]
    fn the_ladder_alone_until_the_bootstrap_is_over() {
        let config = config();
        let mut state = State::initial();
        let (planned, counts) = plan(&config, &mut state);
        assert!(counts.keys().all(|(_, kind)| *kind == "ladder"), "nothing was measured: {counts:?}");
        let of_a = counts[&("a".to_owned(), "ladder")];
        assert!(of_a.abs_diff(750) < 50, "{of_a}");
        assert!(planned.iter().all(|planned| planned.key.is_some()), "keys travel beside their tasks");
        fill(&mut state, 5);
        let (_, counts) = plan(&config, &mut state);
        let num_propose: usize = ["a", "b"].map(|name| counts[&(name.to_owned(), "propose")]).iter().sum();
        assert_eq!(num_propose, 100);
        assert!(counts.keys().all(|(_, kind)| ["propose", "ladder"].contains(kind)), "{counts:?}");
    }

    #[test]
    fn problems_come_from_their_sources_in_proportion_and_stand_in_for_one_another() {
        let config = config();
        let mut state = State::initial();
        state.step = 10;
        fill(&mut state, 200);
        let (planned, counts) = plan(&config, &mut state);
        let count = |kind| ["a", "b"].iter().filter_map(|name| counts.get(&((*name).to_owned(), kind))).sum::<usize>();
        // 900 tasks solve: b needs 112 proposals and has 200, a needs 338 and has 200; mutants fill the gap.
        assert!(count("proposer").abs_diff(312) < 30, "{counts:?}");
        assert!(count("mutation").abs_diff(270 + 138) < 50, "{counts:?}");
        assert!(count("archive").abs_diff(90) < 30 && count("ladder").abs_diff(90) < 30, "{counts:?}");
        for planned in &planned {
            let is_proposal = matches!(planned.task.request, Request::Solve { origin: ProblemOrigin::Proposer, .. });
            assert_eq!(planned.proposal.is_some(), is_proposal);
        }
        let (_, counts) = plan(&config, &mut state);
        assert_eq!(counts.get(&("a".to_owned(), "proposer")), None, "every proposal is posed once");
    }

    /// All problems that the run made have level 1, so tasks of level 2 use the ladder.
    #[test]
    fn own_problems_are_of_the_level_that_was_drawn() {
        let mut config = test_config_of_one("a");
        config.self_play = self::config().self_play;
        config.domains[0].levels =
            vec![(1, 1.0), (2, 3.0)].into_iter().map(|(level, weight)| LevelWeight { level, weight }).collect();
        config.batch.num_tasks = 400;
        let mut state = State::initial();
        state.step = 10;
        fill(&mut state, 200);
        let (planned, _) = plan(&config, &mut state);
        let count = |family: &str| planned.iter().filter(|planned| planned.task.family == family).count();
        let of_level_1 = [count("a/1"), count("a own"), count("a archive"), count("a proposals")];
        assert!(count("a/2").abs_diff(300) < 30, "{of_level_1:?}");
        assert!(of_level_1.iter().all(|count| *count > 0), "{of_level_1:?}");
    }

    #[test]
    fn weights_of_zero_are_never_drawn() {
        for index in 0..1_000 {
            let mut rng = CounterRng::new(0, Purpose::Plan, 0, index, 0);
            assert_eq!(*draw(&mut rng, &[0.0, 2.0, 0.0], |weight| *weight), 2.0);
        }
    }
}
