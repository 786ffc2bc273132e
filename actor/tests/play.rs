//! Rollouts depend on their task and the weights, and on nothing else.

use std::sync::Arc;
use std::time::Duration;

use actor::engine::{Engine, LoadedVersion};
use actor::{Config, Error};
use bus::{Bus, InProcess};
use language::{Language as _, SymbolLanguage};
use policy::{Backend, Device, Division, ModelConfig, Params, Sequence, TrainingState, Variant, write_weights};
use proto::{
    Behavior, Difficulty, Digest, Envelope, Group, Message, Niche, Problem, ProblemOrigin, Request, Sampling,
    StopReason, Task, TaskId, TaskKind, Version,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

fn config() -> ModelConfig {
    ModelConfig {
        vocabulary_size: 256,
        max_positions: 32,
        d_model: 32,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        ff_dim: 32,
        variant: Variant::default(),
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

/// Plays tasks with alternating versions of the weights.
fn play(num_threads: usize, num_slots: usize, tasks: &[Task]) -> Vec<Group> {
    let versions = [weights(1), weights(2)];
    let (engine, mut groups) =
        Engine::start(Config { device: Device::Cpu, num_threads, num_slots }, Arc::new(SymbolLanguage));
    for (number, task) in tasks.iter().enumerate() {
        engine.submit(task.clone(), versions[number / 7 % 2].clone()).unwrap();
    }
    let mut played: Vec<Group> = tasks.iter().map(|_| groups.blocking_recv().unwrap().unwrap()).collect();
    played.sort_by_key(|group| group.task.id);
    played
}

#[test]
fn slots_threads_and_neighbours_change_nothing() {
    let texts = ["25 7 3 -> 82", "9 4 -> 36", "20 12 6 1 -> 50"];
    for behavior in [Behavior::Policy, Behavior::UniformLegal] {
        let tasks: Vec<Task> = (0..40).map(|index| task(index, texts[index as usize % 3], behavior, 20)).collect();
        let expected = play(1, 1, &tasks);
        for (num_threads, num_slots) in [(1, 7), (3, 5), (2, 512)] {
            assert_eq!(play(num_threads, num_slots, &tasks), expected, "{num_threads} threads, {num_slots} slots");
        }
        let distinct: std::collections::HashSet<_> =
            expected.iter().flat_map(|group| &group.rollouts).map(|rollout| &rollout.tokens).collect();
        assert!(distinct.len() > 50, "{} distinct answers", distinct.len());
    }
}

#[test]
fn problems_are_written_in_the_problem_language() {
    let niche = Niche(0x0003_0700);
    let request = Request::Propose { domain: "countdown".to_owned(), niche, difficulty: Difficulty::Hard };
    let tasks = [Task { request, ..task(0, "", Behavior::Policy, 4) }];
    let groups = play(1, 4, &tasks);
    assert_eq!(play(2, 64, &tasks), groups);
    for rollout in &groups[0].rollouts {
        assert_eq!((rollout.tokens.len(), rollout.stop), (4, StopReason::Complete));
        assert!(rollout.tokens[..3].is_sorted_by(|left, right| left >= right), "{:?}", rollout.tokens);
    }
}

#[test]
fn rollouts_stop_at_the_limit() {
    let groups = play(1, 4, &[task(0, "20 12 6 1 -> 50", Behavior::Policy, 7)]);
    for rollout in &groups[0].rollouts {
        assert_eq!((rollout.tokens.len(), rollout.stop), (7, StopReason::Length));
    }
}

#[test]
fn a_task_that_does_not_fit_is_a_fault_that_names_it() {
    let (engine, mut groups) =
        Engine::start(Config { device: Device::Cpu, num_threads: 1, num_slots: 2 }, Arc::new(SymbolLanguage));
    engine.submit(task(9, "20 12 6 1 -> 50", Behavior::Policy, 30), weights(1)).unwrap();
    let error = groups.blocking_recv().unwrap().unwrap_err();
    assert!(matches!(error, Error::Task { task, .. } if task.index == 9), "{error}");
    assert!(error.to_string().contains("model.max_positions = 32, got 7 + 30"), "{error}");
}

/// The vocabulary of the network is smaller than the one of problems. This is a bug, so the actor must not retry.
#[test]
fn a_thread_that_panics_is_a_fault_with_its_text() {
    let config = ModelConfig { vocabulary_size: 16, ..config() };
    let weights = Backend::Cpu.load(&config, &Params::init(&config, 1)).unwrap();
    let (engine, mut groups) =
        Engine::start(Config { device: Device::Cpu, num_threads: 2, num_slots: 12 }, Arc::new(SymbolLanguage));
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
        Config { device: Device::Cpu, num_threads: 1, num_slots: 8 },
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
    let config = config();
    let trainers = [1, 2].map(|seed| {
        let division = Division { num_shards: 1, num_threads: 1 };
        Backend::Cpu.trainer(&config, TrainingState::initial(&config, seed), division).unwrap()
    });
    let (engine, mut groups) =
        Engine::start(Config { device: Device::Cpu, num_threads: 2, num_slots: 16 }, Arc::new(SymbolLanguage));
    let pinned = task(0, "25 7 3 -> 82", Behavior::Policy, 20);
    let (mut version, mut num_switched) = (6, 0);
    for index in 0..10_000 {
        let free = Task { free_running: true, ..task(index, "25 7 3 -> 82", Behavior::Policy, 20) };
        engine.submit(free, weights(2)).unwrap();
        engine.submit(pinned.clone(), weights(2)).unwrap();
        for _ in 0..2 {
            engine.announce(LoadedVersion { policy_version: version, ..weights(version % 2 + 1) });
            version += 1;
            let group = groups.blocking_recv().unwrap().unwrap();
            if !group.task.free_running {
                assert!(group.is_of_version(5), "{group:?}");
                continue;
            }
            for rollout in &group.rollouts {
                num_switched += usize::from(rollout.versions.len() > 1);
                assert!(
                    rollout.versions[0].first_token == 0
                        && rollout.versions.is_sorted_by(|left, right| {
                            (left.first_token, left.policy_version) < (right.first_token, right.policy_version)
                        })
                );
                let prompt = SymbolLanguage.open(&group.task.request).unwrap().prompt().to_vec();
                let choices = rollout.choices.iter().map(|(position, legal)| (position, legal.tokens(&group.sets)));
                let sequence = Sequence::new(&prompt, &rollout.tokens, choices);
                let logprobs = trainers.each_ref().map(|trainer| trainer.logprobs(&[&sequence]).unwrap());
                for (number, (position, _)) in rollout.choices.iter().enumerate() {
                    let of_version = &logprobs[rollout.version_at(position) as usize % 2];
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
