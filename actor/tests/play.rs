//! Rollouts depend on their task and the weights, and on nothing else.

use std::sync::Arc;

use actor::engine::Engine;
use actor::{Config, Error};
use policy::{ModelConfig, PackedWeights, Params};
use proto::{
    Behavior, Difficulty, Digest, Group, Niche, Problem, ProblemOrigin, Request, Sampling, StopReason, Task, TaskId,
    TaskKind,
};

fn weights(seed: u64) -> Arc<PackedWeights> {
    let config = ModelConfig {
        vocabulary_size: 256,
        max_positions: 32,
        d_model: 32,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        ff_dim: 32,
    };
    Arc::new(PackedWeights::new(&config, &Params::init(&config, seed)).unwrap())
}

fn task(index: u32, text: &str, behavior: Behavior, max_tokens: u32) -> Task {
    Task {
        id: TaskId { kind: TaskKind::Train, batch: 5, index },
        seed: 3,
        weights: Digest::of_bytes(b""),
        policy_version: 5,
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
    let (engine, mut groups) = Engine::start(Config { num_threads, num_slots });
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
    let (engine, mut groups) = Engine::start(Config { num_threads: 1, num_slots: 2 });
    engine.submit(task(9, "20 12 6 1 -> 50", Behavior::Policy, 30), weights(1)).unwrap();
    let error = groups.blocking_recv().unwrap().unwrap_err();
    assert!(matches!(error, Error::Task { task, .. } if task.index == 9), "{error}");
    assert!(error.to_string().contains("model.max_positions = 32, got 7 + 30"), "{error}");
}
