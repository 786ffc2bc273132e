//! Groups for tests of losses.

use proto::{
    BalanceKey, Behavior, Choices, Digest, Group, Legal, Niche, Problem, ProblemOrigin, Request, Rollout, Sampling,
    ScoredGroup, StopReason, Task, TaskId, TaskKind, Verdict,
};

pub(crate) const RIGHT: Verdict = Verdict::Correct;
pub(crate) const WRONG: Verdict = Verdict::Incorrect;

/// Returns a group of answers with these verdicts and numbers of choices.
pub(crate) fn group(answers: &[(Verdict, u32)]) -> ScoredGroup {
    let rollout = |(_, num_choices): &(Verdict, u32)| Rollout {
        tokens: (0..*num_choices).collect(),
        choices: Choices { positions: None, legal: vec![Legal::Set(0); *num_choices as usize] },
        logprobs: vec![-0.5; *num_choices as usize],
        values: None,
        search: None,
        stop: StopReason::Complete,
        versions: Vec::new(),
    };
    let task = Task {
        id: TaskId { kind: TaskKind::Train, batch: 0, index: 0 },
        seed: 0,
        weights: Digest::of_bytes(b""),
        policy_version: 0,
        free_running: false,
        request: Request::Solve {
            problem: Problem { domain: "countdown".to_owned(), text: String::new() },
            origin: ProblemOrigin::Ladder,
            has_key: false,
        },
        family: String::new(),
        num_rollouts: answers.len() as u32,
        sampling: Sampling { behavior: Behavior::Policy, temperature: 1.0 },
        max_tokens: 20,
    };
    let sets = vec![(0..20).collect()];
    ScoredGroup {
        group: Group { task, sets, rollouts: answers.iter().map(rollout).collect() },
        prompt: vec![9],
        niche: Niche(0),
        balance_key: BalanceKey { level: 1, goal: 0 },
        verdicts: answers.iter().map(|(verdict, _)| *verdict).collect(),
        example_sets: Vec::new(),
        examples: Vec::new(),
        proposals: Vec::new(),
    }
}
