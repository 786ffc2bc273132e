//! Rollouts depend on their task and the weights, and on nothing else.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actor::engine::{Engine, LoadedVersion};
use actor::{Config, Error};
use bus::{Bus, InProcess};
use language::{Episode, Language, Next, Room, SymbolLanguage};
use policy::{Backend, Division, ModelConfig, Params, Sequence, Trainer, TrainingState, Variant, write_weights};
use proto::{
    Behavior, Difficulty, Digest, Envelope, Group, Message, Niche, Problem, ProblemOrigin, Request, Rollout, Sampling,
    StopReason, Task, TaskId, TaskKind, TokenId, Verdict, Version,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

fn config() -> ModelConfig {
    ModelConfig {
        vocabulary_size: 256,
        max_positions: 80,
        d_model: 32,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        ff_dim: 32,
        variant: Variant::default(),
        adapter: None,
    }
}

/// Returns the weights of a seed, as version 5.
fn weights(seed: u64) -> LoadedVersion {
    let weights = Backend::Cpu.load(&config(), &Params::init(&config(), seed)).unwrap();
    LoadedVersion { policy_version: 5, weights }
}

fn task(index: u32, text: &str, behavior: Behavior, max_tokens: u32) -> Task {
    Task {
        id: TaskId { kind: TaskKind::Train, batch: 5, index },
        seed: 3,
        weights: Digest::of_bytes(b""),
        policy_version: 5,
        free_running: false,
        request: Request::Solve {
            problem: Problem { domain: "countdown".to_owned(), text: text.to_owned() },
            origin: ProblemOrigin::Ladder,
            has_key: false,
        },
        family: String::new(),
        num_rollouts: 6,
        sampling: Sampling { behavior, temperature: 1.0 },
        max_tokens,
    }
}

/// Prompts that begin alike: 30 tokens of every problem, 18 of the problems `2n` and `2n + 1`, 6 of the problem. An answer is over
/// after a multiple of 3, of three tokens or more; its fifth token is forced.
#[derive(Default)]
struct Alike {
    /// Held while tasks are submitted, so that all are there when the first one begins.
    gate: Mutex<()>,
}

#[derive(Clone)]
struct AlikeEpisode {
    prompt: Vec<TokenId>,
    answer: Vec<TokenId>,
}

impl Language for Alike {
    fn vocabulary_size(&self) -> usize {
        256
    }

    fn open(&self, request: &Request) -> Result<Box<dyn Episode>, language::Error> {
        drop(self.gate.lock().unwrap());
        let Request::Solve { problem, .. } = request else { unreachable!("problems are solved") };
        let number: TokenId = problem.text.parse().expect("the number of a problem");
        let of_pair = (0..18).map(|index| 100 + number / 2 + 7 * index);
        let prompt = (0..30).map(|index| index * 5 % 60).chain(of_pair).chain((0..6).map(|index| 60 + number + index));
        Ok(Box::new(AlikeEpisode { prompt: prompt.collect(), answer: Vec::new() }))
    }

    fn token_name(&self, _: TokenId) -> String {
        unreachable!("actors only open episodes")
    }

    fn propose_prompt(&self, _: &str, _: Niche, _: Difficulty) -> Result<Vec<TokenId>, language::Error> {
        unreachable!("actors only open episodes")
    }

    fn room(&self, _: &Problem) -> Result<Room, language::Error> {
        unreachable!("actors only open episodes")
    }

    fn proposal_room(&self, _: &str, _: Niche) -> Result<Room, language::Error> {
        unreachable!("actors only open episodes")
    }

    fn text(&self, _: &Request, _: &[TokenId]) -> Result<Option<String>, language::Error> {
        unreachable!("actors only open episodes")
    }

    fn spell(&self, _: &Problem, _: &str) -> Result<Option<Vec<TokenId>>, language::Error> {
        unreachable!("actors only open episodes")
    }

    fn show(&self, _: &str, _: &[TokenId]) -> String {
        unreachable!("actors only open episodes")
    }
}

impl Episode for AlikeEpisode {
    fn prompt(&self) -> &[TokenId] {
        &self.prompt
    }

    fn next(&self) -> Next {
        match self.answer.last() {
            Some(token) if self.answer.len() >= 3 && token.is_multiple_of(3) => Next::Done,
            _ if self.answer.len() == 4 => Next::Forced(7),
            _ => Next::Choice((40..60).collect()),
        }
    }

    fn push(&mut self, token: TokenId) -> bool {
        self.answer.push(token);
        true
    }

    fn fork(&self) -> Box<dyn Episode> {
        Box::new(self.clone())
    }

    fn state_hash(&self) -> Digest {
        Digest::of(&(&self.prompt, &self.answer))
    }

    fn check(&self) -> Option<Verdict> {
        None
    }
}

fn languages() -> [Arc<dyn Language>; 2] {
    [Arc::new(SymbolLanguage), Arc::new(Alike::default())]
}

/// Returns the index of the weights that [`play`] plays a task with.
fn weights_of(number: usize) -> usize {
    number / 7 % 2
}

/// Plays tasks with alternating versions of the weights.
fn play(num_threads: usize, num_slots: usize, language: &Arc<dyn Language>, tasks: &[Task]) -> Vec<Group> {
    let versions = [weights(1), weights(2)];
    let (engine, mut groups) =
        Engine::start(Config { backend: Backend::Cpu, num_threads, num_slots }, language.clone());
    for (number, task) in tasks.iter().enumerate() {
        engine.submit(task.clone(), versions[weights_of(number)].clone()).unwrap();
    }
    let mut played: Vec<Group> = tasks.iter().map(|_| groups.blocking_recv().unwrap().unwrap()).collect();
    played.sort_by_key(|group| group.task.id);
    played
}

/// Returns trainers of the weights that [`play`] plays with.
fn trainers() -> [Box<dyn Trainer>; 2] {
    [1, 2].map(|seed| {
        let division = Division { num_shards: 1, num_threads: 1 };
        Backend::Cpu.trainer(&config(), TrainingState::initial(&config(), seed), division).unwrap()
    })
}

/// Computes the log-probabilities of a rollout's choices as training does, which reads every sequence from its start.
fn score(trainer: &dyn Trainer, language: &dyn Language, group: &Group, rollout: &Rollout) -> Vec<f32> {
    let prompt = language.open(&group.task.request).unwrap().prompt().to_vec();
    let choices = rollout.choices.iter().map(|(position, legal)| (position, legal.tokens(&group.sets)));
    trainer.logprobs(&[&Sequence::new(&prompt, &rollout.tokens, choices)]).unwrap()
}

#[test]
fn slots_threads_and_neighbours_change_nothing() {
    let trainers = trainers();
    let texts = [["25 7 3 -> 82", "9 4 -> 36", "20 12 6 1 -> 50"], ["0", "1", "2"]];
    for (language, texts) in languages().iter().zip(texts) {
        for behavior in [Behavior::Policy, Behavior::UniformLegal] {
            let tasks: Vec<Task> = (0..40).map(|index| task(index, texts[index as usize % 3], behavior, 20)).collect();
            let expected = play(1, 1, language, &tasks);
            for (num_threads, num_slots) in [(1, 7), (3, 5), (2, 512)] {
                let played = play(num_threads, num_slots, language, &tasks);
                assert_eq!(played, expected, "{num_threads} threads, {num_slots} slots");
            }
            let rollouts = expected.iter().flat_map(|group| &group.rollouts);
            let distinct: HashSet<_> = rollouts.map(|rollout| &rollout.tokens).collect();
            assert!(distinct.len() > 50, "{} distinct answers", distinct.len());
            if behavior == Behavior::Policy {
                for (number, group) in expected.iter().enumerate() {
                    let trainer = trainers[weights_of(number)].as_ref();
                    for rollout in &group.rollouts {
                        assert_eq!(rollout.logprobs, score(trainer, language.as_ref(), group, rollout));
                    }
                }
            }
        }
    }
}

/// Tokens that prompts begin with are fed once, however few rollouts play at a time.
#[test]
fn what_prompts_share_is_fed_once() {
    let tasks: Vec<Task> =
        (0..4).map(|index| Task { num_rollouts: 8, ..task(index, &index.to_string(), Behavior::Policy, 3) }).collect();
    let language = Arc::new(Alike::default());
    let prompts: Vec<_> = tasks.iter().map(|task| language.open(&task.request).unwrap().prompt().to_vec()).collect();
    let prefixes: HashSet<&[TokenId]> =
        prompts.iter().flat_map(|prompt| (1..=prompt.len()).map(|len| &prompt[..len])).collect();
    assert_eq!(prefixes.len(), 30 + 2 * 18 + 4 * 6);
    // The last token of an answer is not fed.
    let in_answers = 4 * 8 * 2;
    // Rollouts of a group that begin after its first ones are fed the last token of their prompt again, once if they begin
    // together: answers are equally long, so that 5 slots are filled 7 times.
    for (num_slots, num_again) in [(1, 4 * 7), (5, 6), (31, 1), (32, 0)] {
        let config = Config { backend: Backend::Cpu, num_threads: 1, num_slots };
        let (engine, mut groups) = Engine::start(config, language.clone());
        let version = weights(1);
        let gate = language.gate.lock().unwrap();
        tasks.iter().for_each(|task| engine.submit(task.clone(), version.clone()).unwrap());
        drop(gate);
        for _ in &tasks {
            let group = groups.blocking_recv().unwrap().unwrap();
            assert!(group.rollouts.iter().all(|rollout| rollout.tokens.len() == 3), "{group:?}");
        }
        assert_eq!(engine.num_fed(), (prefixes.len() + in_answers + num_again) as u64, "{num_slots} slots");
    }
}

#[test]
fn problems_are_written_in_the_problem_language() {
    let niche = Niche(0x0003_0700);
    let request = Request::Propose { domain: "countdown".to_owned(), niche, difficulty: Difficulty::Hard };
    let tasks = [Task { request, ..task(0, "", Behavior::Policy, 4) }];
    let [language, _] = languages();
    let groups = play(1, 4, &language, &tasks);
    assert_eq!(play(2, 64, &language, &tasks), groups);
    for rollout in &groups[0].rollouts {
        assert_eq!((rollout.tokens.len(), rollout.stop), (4, StopReason::Complete));
        assert!(rollout.tokens[..3].is_sorted_by(|left, right| left >= right), "{:?}", rollout.tokens);
    }
}

#[test]
fn rollouts_stop_at_the_limit() {
    let groups = play(1, 4, &languages()[0], &[task(0, "20 12 6 1 -> 50", Behavior::Policy, 7)]);
    for rollout in &groups[0].rollouts {
        assert_eq!((rollout.tokens.len(), rollout.stop), (7, StopReason::Length));
    }
}

#[test]
fn a_task_that_does_not_fit_is_a_fault_that_names_it() {
    let (engine, mut groups) =
        Engine::start(Config { backend: Backend::Cpu, num_threads: 1, num_slots: 2 }, Arc::new(SymbolLanguage));
    engine.submit(task(9, "20 12 6 1 -> 50", Behavior::Policy, 74), weights(1)).unwrap();
    let error = groups.blocking_recv().unwrap().unwrap_err();
    assert!(matches!(error, Error::Task { task, .. } if task.index == 9), "{error}");
    assert!(error.to_string().contains("model.max_positions = 80, got 7 + 74"), "{error}");
}

/// The vocabulary of the network is smaller than the one of problems. This is a bug, so the actor must not retry.
#[test]
fn a_thread_that_panics_is_a_fault_with_its_text() {
    let config = ModelConfig { vocabulary_size: 16, ..config() };
    let weights = Backend::Cpu.load(&config, &Params::init(&config, 1)).unwrap();
    let (engine, mut groups) =
        Engine::start(Config { backend: Backend::Cpu, num_threads: 2, num_slots: 12 }, Arc::new(SymbolLanguage));
    engine
        .submit(task(9, "20 12 6 1 -> 50", Behavior::Policy, 20), LoadedVersion { policy_version: 5, weights })
        .unwrap();
    let error = groups.blocking_recv().unwrap().unwrap_err();
    assert!(matches!(&error, Error::Panicked { thread, .. } if thread.starts_with("actor-")), "{error}");
    assert!(error.to_string().contains("panicked: range start index"), "{error}");
}

/// The bytes stored under a version's digest are not its weights: the actor keeps its old weights until the next version.
#[tokio::test(flavor = "multi_thread")]
async fn newer_weights_that_are_refused_leave_the_old_ones() {
    let bus: Arc<dyn Bus> = Arc::new(InProcess::new());
    let store = async |config: &ModelConfig, seed, spoil: bool| {
        let params = Params::init(config, seed);
        let mut bytes = write_weights(config, &[("", &params)]);
        if spoil {
            *bytes.last_mut().unwrap() ^= 1;
        }
        let digest = params.digest(config);
        bus.put_weights(digest, bytes.into()).await.unwrap();
        digest
    };
    // Large, so that the actor is still reading them when the newest are announced.
    let large = ModelConfig { d_model: 256, num_layers: 4, ff_dim: 1024, ..config() };
    let [old, spoilt, newest] =
        [store(&config(), 1, false).await, store(&large, 2, true).await, store(&config(), 3, false).await];
    let shutdown = CancellationToken::new();
    let actor = tokio::spawn(actor::run(
        Config { backend: Backend::Cpu, num_threads: 1, num_slots: 8 },
        Arc::new(SymbolLanguage),
        bus.clone(),
        shutdown.clone(),
    ));
    let play = async |index| {
        let task = task(index, "20 12 6 1 -> 50", Behavior::Policy, 20);
        let body = Task { free_running: true, weights: old, ..task };
        bus.publish_task(Message { envelope: Envelope::default(), body }).await.unwrap();
        let group = bus.next_group().await.unwrap().message.body;
        let last = group.rollouts.iter().map(|rollout| rollout.versions.last().unwrap().policy_version);
        last.max().unwrap()
    };
    for index in 0..20 {
        bus.announce(Version { policy_version: 6, weights: spoilt }).await.unwrap();
        assert_eq!(play(index).await, 5);
    }
    bus.announce(Version { policy_version: 7, weights: newest }).await.unwrap();
    let mut index = 20;
    let mut last = 5;
    let begun = Instant::now();
    while last != 7 {
        assert_eq!(last, 5);
        assert!(begun.elapsed() < Duration::from_secs(60), "the newest weights are not played");
        last = play(index).await;
        index += 1;
    }
    shutdown.cancel();
    assert_eq!(actor.await.unwrap().unwrap().num_groups, u64::from(index));
}

/// Weights announced in the middle of a rollout draw its next tokens, as if they had read it from the start. Every token
/// names its version.
#[test]
fn newer_weights_take_over_what_is_free_running() {
    for (language, texts) in languages().iter().zip([["25 7 3 -> 82", "9 4 -> 36"], ["0", "1"]]) {
        expect_newer_weights_to_take_over(language, texts);
    }
}

fn expect_newer_weights_to_take_over(language: &Arc<dyn Language>, texts: [&str; 2]) {
    let (trainers, versions) = (trainers(), [weights(1), weights(2)]);
    let config = Config { backend: Backend::Cpu, num_threads: 2, num_slots: 16 };
    let (engine, mut groups) = Engine::start(config, language.clone());
    let (mut version, mut num_switched) = (5, 0);
    for round in 0..1_000 {
        for index in 0..20 {
            let task = task(20 * round + index, texts[index as usize % 2], Behavior::Policy, 20);
            engine.submit(Task { free_running: index % 10 != 9, ..task }, versions[1].clone()).unwrap();
        }
        for _ in 0..20 {
            version += 1;
            let newest = versions[(version % 2) as usize].clone();
            engine.announce(LoadedVersion { policy_version: version, ..newest });
            let group = groups.blocking_recv().unwrap().unwrap();
            if !group.task.free_running {
                assert!(group.is_of_version(5), "{group:?}");
            }
            for rollout in &group.rollouts {
                num_switched += usize::from(rollout.versions.len() > 1);
                assert!(
                    rollout.versions[0].first_token == 0
                        && rollout.versions.is_sorted_by(|left, right| {
                            (left.first_token, left.policy_version) < (right.first_token, right.policy_version)
                        })
                );
                let scores =
                    trainers.each_ref().map(|trainer| score(trainer.as_ref(), language.as_ref(), &group, rollout));
                for (number, (position, _)) in rollout.choices.iter().enumerate() {
                    let of_version = &scores[rollout.version_at(position) as usize % 2];
                    assert_eq!(rollout.logprobs[number], of_version[number], "token {position} of {rollout:?}");
                }
            }
        }
        if num_switched >= 20 {
            return;
        }
    }
    panic!("no weights took over a rollout: {num_switched} did");
}
