//! Wire bytes are a promise. To change them, bump `WIRE_VERSION`, which refuses what was sent before. Journals and checkpoints
//! hold some of the same types: where those change, so do their versions, which `learner/src/golden.rs` sees to.

use proto::{
    BalanceKey, Behavior, Choices, Digest, Example, Group, KeyedProblem, LabelOrigin, Legal, Niche, Problem,
    ProblemKey, ProblemOrigin, Proposal, Request, Rollout, Sampling, ScoredGroup, SearchTarget, StopReason, Task,
    TaskId, TaskKind, TokenSet, Verdict, VersionSpan, wire,
};

const VOCABULARY_SIZE: usize = 256;

fn scored_group() -> ScoredGroup {
    let problem = Problem { domain: "countdown".to_owned(), text: "7 3 -> 4".to_owned() };
    let task = Task {
        id: TaskId { kind: TaskKind::Train, batch: 3, index: 700 },
        seed: 1 << 40,
        weights: Digest::of_bytes(b"weights"),
        policy_version: 2,
        free_running: false,
        request: Request::Solve { problem: problem.clone(), origin: ProblemOrigin::Ladder, has_key: true },
        family: "countdown/1".to_owned(),
        num_rollouts: 1,
        sampling: Sampling { behavior: Behavior::Policy, temperature: 1.0 },
        max_tokens: 20,
    };
    let set: TokenSet = [110, 111, 112].into_iter().collect();
    let choices = Choices { positions: Some(vec![1]), legal: vec![Legal::Set(0)] };
    let rollout = Rollout {
        tokens: vec![7, 111, 3, 114, 4],
        choices: choices.clone(),
        logprobs: vec![-1.5],
        values: None,
        search: None,
        stop: StopReason::Complete,
        versions: vec![VersionSpan { first_token: 0, policy_version: 2 }],
    };
    ScoredGroup {
        group: Group { task, sets: vec![set.clone()], rollouts: vec![rollout] },
        prompt: vec![120, 124, 4, 7, 3],
        niche: Niche(0x0002_0002),
        balance_key: BalanceKey { level: 2, goal: 9 },
        verdicts: vec![Verdict::Correct],
        example_sets: vec![set],
        examples: vec![Example {
            prompt: vec![120, 124, 4, 7, 3],
            answer: vec![7, 111, 3, 114, 4],
            choices: choices.clone(),
            problem_origin: ProblemOrigin::Ladder,
            label_origin: LabelOrigin::Solved,
            balance_key: BalanceKey { level: 2, goal: 9 },
        }],
        proposals: vec![Proposal {
            rollout: 0,
            keyed: KeyedProblem { problem, key: Some(ProblemKey { text: "7 - 3".to_owned() }) },
            niche: Niche(0x0002_0002),
            choices,
        }],
    }
}

#[test]
fn bytes_of_a_scored_group_are_fixed() {
    let bytes = wire::encode(&scored_group());
    assert_eq!(bytes.len(), 203);
    assert_eq!(Digest::of_bytes(&bytes).short(), "2b39cf3292e6");
    assert_eq!(wire::decode::<ScoredGroup>(&bytes).unwrap(), scored_group());
}

/// The name of a group or a state outlives the version of the wire: journals know them by it.
#[test]
fn digests_are_fixed() {
    assert_eq!(Digest::of(&scored_group()).short(), "41adc30117b8");
    assert_eq!(Digest::of(&7u64), Digest::of_bytes(&[4, 7]));
}

#[test]
fn no_cut_and_no_extra_byte_decodes() {
    let bytes = wire::encode(&scored_group());
    for len in 0..bytes.len() {
        assert!(wire::decode::<ScoredGroup>(&bytes[..len]).is_err(), "{len} bytes");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(wire::decode::<ScoredGroup>(&longer).unwrap_err().to_string().contains("1 bytes follow the value"));
    let newer = [&[wire::WIRE_VERSION + 1], &bytes[1..]].concat();
    assert_eq!(wire::decode::<ScoredGroup>(&newer).unwrap_err().to_string(), "wire version: expected 5, got 6");
}

/// Whatever points out of the message is found before anybody follows it.
#[test]
fn pointers_out_of_a_scored_group_are_refused() {
    assert_eq!(scored_group().check(VOCABULARY_SIZE), Ok(()));
    type Change = fn(&mut ScoredGroup);
    let changes: [(&str, Change); 32] = [
        ("within the limits of a task", |scored| scored.group.task.num_rollouts = 5000),
        ("within the limits of a task", |scored| scored.group.task.max_tokens = u32::MAX),
        ("as many rollouts", |scored| scored.group.rollouts.clear()),
        ("as many rollouts", |scored| scored.group.rollouts = vec![scored.group.rollouts[0].clone(); 2]),
        ("as many verdicts", |scored| scored.verdicts.push(Verdict::Correct)),
        ("tokens of the vocabulary", |scored| scored.group.rollouts[0].tokens[0] = 256),
        ("sets of tokens of the vocabulary", |scored| scored.group.sets[0].insert(256)),
        ("sets of tokens of the vocabulary", |scored| scored.example_sets.push(TokenSet::default())),
        ("policy versions that cover every token", |scored| scored.group.rollouts[0].versions[0].first_token = 5),
        ("policy versions that cover every token", |scored| {
            let again = scored.group.rollouts[0].versions[0];
            scored.group.rollouts[0].versions.push(again);
        }),
        ("the policy version that the task names", |scored| scored.group.rollouts[0].versions[0].policy_version = 3),
        ("no search", |scored| {
            let target = SearchTarget { policy: vec![(111, 1.0)], value: 0.5, num_simulations: 1 };
            scored.group.rollouts[0].search = Some(vec![target]);
        }),
        ("no values", |scored| scored.group.rollouts[0].values = Some(vec![0.5])),
        ("no more sets than choices", |scored| {
            let again = scored.group.sets[0].clone();
            scored.group.sets.push(again);
        }),
        ("no more sets than choices", |scored| {
            scored.group.rollouts[0].choices = Choices::new(5, []);
            scored.group.rollouts[0].logprobs.clear();
        }),
        ("a prompt", |scored| scored.prompt.clear()),
        ("a prompt", |scored| scored.prompt[0] = 256),
        ("a prompt in every example", |scored| scored.examples[0].prompt[0] = 256),
        ("at most max_tokens tokens", |scored| scored.group.task.max_tokens = 4),
        ("a finite log-probability of at most 0 for every choice", |scored| {
            scored.group.rollouts[0].logprobs[0] = f32::NAN
        }),
        ("a finite log-probability of at most 0 for every choice", |scored| scored.group.rollouts[0].logprobs[0] = 0.5),
        ("a finite log-probability of at most 0 for every choice", |scored| {
            scored.group.rollouts[0].logprobs.push(-0.5)
        }),
        ("choices of legal tokens, in order", |scored| scored.group.rollouts[0].choices.legal[0] = Legal::Set(1)),
        ("choices of legal tokens, in order", |scored| scored.group.rollouts[0].choices.positions = Some(vec![2])),
        ("choices of legal tokens, in order", |scored| scored.group.rollouts[0].choices.positions = None),
        ("choices of legal tokens, in order", |scored| {
            let choices = Choices { positions: Some(vec![1, 1]), legal: vec![Legal::Set(0); 2] };
            scored.group.rollouts[0].choices = choices;
        }),
        ("choices of legal tokens, in order", |scored| {
            // A second way to say that every token was chosen.
            let choices = Choices { positions: Some((0..5).collect()), legal: vec![Legal::Any; 5] };
            scored.group.rollouts[0].choices = choices;
        }),
        ("in every example", |scored| scored.examples[0].choices.positions = Some(vec![5])),
        ("in every example", |scored| scored.examples[0].answer[1] = 256),
        ("name an existing rollout", |scored| scored.proposals[0].rollout = 1),
        ("in every proposal", |scored| scored.proposals[0].choices.legal[0] = Legal::Set(7)),
        ("in every proposal", |scored| scored.proposals[0].choices.legal.clear()),
    ];
    for (says, change) in changes {
        let mut scored = scored_group();
        change(&mut scored);
        let reason = scored.check(VOCABULARY_SIZE).unwrap_err();
        assert!(reason.contains(says), "{says}: {reason}");
    }
}

#[test]
fn free_running_rollouts_may_have_several_versions() {
    let span = |first_token, policy_version| VersionSpan { first_token, policy_version };
    let with = |versions: &[VersionSpan]| {
        let mut scored = scored_group();
        scored.group.task.free_running = true;
        scored.group.rollouts[0].versions = versions.to_vec();
        scored
    };
    let scored = with(&[span(0, 2), span(1, 4), span(4, 9)]);
    assert_eq!(scored.check(VOCABULARY_SIZE), Ok(()));
    let rollout = &scored.group.rollouts[0];
    assert_eq!([0, 1, 3, 4].map(|position| rollout.version_at(position)), [2, 4, 4, 9]);
    assert!(scored.group.versions().eq([2, 4, 9]) && !scored.group.is_of_version(2));
    for versions in [&[][..], &[span(1, 2)], &[span(0, 1)], &[span(0, 4), span(1, 3)], &[span(0, 2), span(6, 3)]] {
        let reason = with(versions).check(VOCABULARY_SIZE).unwrap_err();
        assert!(reason.contains("policy versions that cover every token"), "{versions:?}: {reason}");
    }
}
