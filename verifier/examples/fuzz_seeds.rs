//! Writes the fuzzer's seed messages in the current wire format and overwrites older ones:
//! `cargo run --example fuzz_seeds -- tests/fuzz/corpus/messages`.

use std::path::Path;

use domains::{Domain, registry};
use language::{Language as _, SymbolLanguage, random_answer, trace};
use proto::{
    Beat, Behavior, CounterRng, Difficulty, Digest, Envelope, Group, KeyedProblem, Message, ProblemKey, ProblemOrigin,
    Purpose, Refusal, RefusalCause, Request, Role, Rollout, Sampling, SetDictionary, StopReason, Task, TaskId,
    TaskKind, Version, VersionSpan, wire,
};

/// Writes, for each level of every ladder, a task that asks for answers and one that asks for a problem, a group for each, and
/// the scored group; then the messages that carry no task.
fn main() {
    let folder = std::env::args().nth(1).expect("expected the folder of the corpus as the only argument");
    let mut messages: Vec<(u8, Vec<u8>)> = Vec::new();
    for domain in registry().iter().filter(|domain| domain.symbols().is_some()) {
        for level in domain.ladder_levels() {
            let keyed = domain.ladder(level.level, 0, 0);
            for (request, key) in requests(domain.as_ref(), keyed) {
                let task = task(request);
                let group = play(&task);
                let scored = verifier::score(&SymbolLanguage, group.clone(), key.as_ref()).expect("an honest group");
                messages.push((0, in_envelope(task)));
                messages.push((1, in_envelope(group)));
                messages.push((2, in_envelope(scored)));
            }
        }
    }
    let id = TaskId { kind: TaskKind::Train, batch: 3, index: 4 };
    let beat = Beat { worker: "actor-1".to_owned(), role: Role::Actor, tasks: vec![id] };
    messages.push((3, wire::encode(&beat)));
    messages.push((4, wire::encode(&Version { policy_version: 7, weights: Digest::of_bytes(b"") })));
    messages.push((
        5,
        wire::encode(&Refusal { envelope: envelope(), task: id, cause: RefusalCause::Group, reason: "no".to_owned() }),
    ));
    messages.push((6, wire::encode(&ProblemKey { text: "123".to_owned() })));
    for (index, (kind, payload)) in messages.iter().enumerate() {
        let path = Path::new(&folder).join(format!("seed-{index:02}-{kind}"));
        std::fs::write(&path, [&[*kind], &payload[..]].concat()).expect("the folder takes files");
    }
}

fn requests(domain: &dyn Domain, keyed: KeyedProblem) -> [(Request, Option<ProblemKey>); 2] {
    let KeyedProblem { problem, key } = keyed;
    let niche = domain.niche(&problem, key.as_ref()).expect("a problem of the ladder");
    let propose = Request::Propose { domain: domain.name().to_owned(), niche, difficulty: Difficulty::Hard };
    let solve = Request::Solve { problem, origin: ProblemOrigin::Ladder, has_key: key.is_some() };
    [(solve, key), (propose, None)]
}

fn task(request: Request) -> Task {
    Task {
        id: TaskId { kind: TaskKind::Train, batch: 1, index: 2 },
        seed: 0,
        weights: Digest::of_bytes(b""),
        policy_version: 1,
        free_running: false,
        request,
        family: String::new(),
        num_rollouts: 2,
        sampling: Sampling { behavior: Behavior::Policy, temperature: 1.0 },
        max_tokens: Task::MAX_TOKENS,
    }
}

fn play(task: &Task) -> Group {
    let open = || SymbolLanguage.open(&task.request).expect("a request of its domain");
    let mut sets = SetDictionary::default();
    let rollout = |attempt: u32| {
        let mut rng = CounterRng::new(task.seed, Purpose::Rollout, 0, 0, u64::from(attempt));
        let tokens = random_answer(open(), &mut rng);
        let choices = trace(open(), &tokens, &mut sets).expect("a legal answer");
        Rollout {
            logprobs: vec![-0.5; choices.len()],
            tokens,
            choices,
            values: None,
            search: None,
            stop: StopReason::Complete,
            versions: vec![VersionSpan { first_token: 0, policy_version: task.policy_version }],
        }
    };
    let rollouts = (0..task.num_rollouts).map(rollout).collect();
    Group { task: task.clone(), sets: sets.into_sets(), rollouts }
}

fn in_envelope<T: serde::Serialize>(body: T) -> Vec<u8> {
    wire::encode(&Message { envelope: envelope(), body })
}

fn envelope() -> Envelope {
    Envelope { term: 1, ..Envelope::default() }
}
