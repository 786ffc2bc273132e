//! Wire bytes are a promise. To change them, bump `WIRE_VERSION`, which refuses what was sent before. Journals and checkpoints
//! hold some of the same types: where those change, so do their versions, which `learner/src/golden.rs` sees to.

use proto::{
    ActionMask, Aim, Behavior, Choice, Digest, Example, ExampleChoice, Group, KeyedProblem, LabelOrigin, Niche,
    Problem, ProblemKey, ProblemOrigin, Proposal, Request, Rollout, Sampling, ScoredGroup, SearchTrace, StopReason,
    Task, TaskId, TaskKind, Verdict, VersionSpan, wire,
};

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
    let mask: ActionMask = [110, 111, 112].into_iter().collect();
    let rollout = Rollout {
        tokens: vec![7, 111, 3, 114, 4],
        choices: vec![Choice { position: 1, mask: 0, logprob: -1.5 }],
        stop: StopReason::Complete,
        versions: vec![VersionSpan { first_token: 0, policy_version: 2 }],
        search: None,
    };
    ScoredGroup {
        group: Group { task, masks: vec![mask], rollouts: vec![rollout] },
        prompt: vec![120, 124, 4, 7, 3],
        niche: Niche(0x0002_0002),
        aim: Aim { level: 2, goal: 9 },
        verdicts: vec![Verdict::Correct],
        example_masks: vec![mask],
        examples: vec![Example {
            prompt: vec![120, 124, 4, 7, 3],
            answer: vec![7, 111, 3, 114, 4],
            choices: vec![ExampleChoice { position: 1, mask: 0 }],
            problem_origin: ProblemOrigin::Ladder,
            label_origin: LabelOrigin::Solved,
            aim: Aim { level: 2, goal: 9 },
        }],
        proposals: vec![Proposal {
            rollout: 0,
            keyed: KeyedProblem { problem, key: Some(ProblemKey { text: "7 - 3".to_owned() }) },
            niche: Niche(0x0002_0002),
            choices: vec![ExampleChoice { position: 1, mask: 0 }],
        }],
    }
}

#[test]
fn bytes_of_a_scored_group_are_fixed() {
    let bytes = wire::encode(&scored_group());
    assert_eq!(bytes.len(), 194);
    assert_eq!(Digest::of_bytes(&bytes).short(), "f03fe3c5b15b");
    assert_eq!(wire::decode::<ScoredGroup>(&bytes).unwrap(), scored_group());
}

/// The name of a group or a state outlives the version of the wire: journals know them by it.
#[test]
fn digests_are_fixed() {
    assert_eq!(Digest::of(&scored_group()).short(), "f03fe3c5b15b");
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
    assert_eq!(wire::decode::<ScoredGroup>(&newer).unwrap_err().to_string(), "wire version: expected 4, got 5");
}

/// Whatever points out of the message is found before anybody follows it.
#[test]
fn pointers_out_of_a_scored_group_are_refused() {
    assert_eq!(scored_group().check(), Ok(()));
    type Change = fn(&mut ScoredGroup);
    let changes: [(&str, Change); 22] = [
        ("of a size that tasks have", |scored| scored.group.task.num_rollouts = 5000),
        ("of a size that tasks have", |scored| scored.group.task.max_tokens = u32::MAX),
        ("as many rollouts", |scored| scored.group.rollouts.clear()),
        ("as many rollouts", |scored| scored.group.rollouts = vec![scored.group.rollouts[0].clone(); 2]),
        ("as many verdicts", |scored| scored.verdicts.push(Verdict::Correct)),
        ("of the vocabulary", |scored| scored.group.rollouts[0].tokens[0] = 256),
        ("the versions of every token", |scored| scored.group.rollouts[0].versions[0].first_token = 5),
        ("the versions of every token", |scored| {
            let again = scored.group.rollouts[0].versions[0];
            scored.group.rollouts[0].versions.push(again);
        }),
        ("the version that was asked for", |scored| scored.group.rollouts[0].versions[0].policy_version = 3),
        ("no search", |scored| {
            let trace = SearchTrace { policy_targets: Vec::new(), value_targets: Vec::new(), num_simulations: 1 };
            scored.group.rollouts[0].search = Some(trace);
        }),
        ("no masks but", |scored| {
            let again = scored.group.masks[0];
            scored.group.masks.push(again);
        }),
        ("no masks but", |scored| scored.group.rollouts[0].choices.clear()),
        ("a prompt", |scored| scored.prompt.clear()),
        ("no more tokens", |scored| scored.group.task.max_tokens = 4),
        ("logprobs", |scored| scored.group.rollouts[0].choices[0].logprob = f32::NAN),
        ("logprobs", |scored| scored.group.rollouts[0].choices[0].logprob = 0.5),
        ("choices of legal tokens, in order", |scored| scored.group.rollouts[0].choices[0].mask = 1),
        ("choices of legal tokens, in order", |scored| scored.group.rollouts[0].choices[0].position = 2),
        ("choices of legal tokens, in order", |scored| {
            let again = scored.group.rollouts[0].choices[0];
            scored.group.rollouts[0].choices.push(again);
        }),
        ("in every example", |scored| scored.examples[0].choices[0].position = 5),
        ("rollouts that are there", |scored| scored.proposals[0].rollout = 1),
        ("in every proposal", |scored| scored.proposals[0].choices[0].mask = 7),
    ];
    for (says, change) in changes {
        let mut scored = scored_group();
        change(&mut scored);
        let reason = scored.check().unwrap_err();
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
    assert_eq!(scored.check(), Ok(()));
    let rollout = &scored.group.rollouts[0];
    assert_eq!([0, 1, 3, 4].map(|position| rollout.version_at(position)), [2, 4, 4, 9]);
    assert!(scored.group.versions().eq([2, 4, 9]) && !scored.group.is_of_version(2));
    for versions in [&[][..], &[span(1, 2)], &[span(0, 1)], &[span(0, 4), span(1, 3)], &[span(0, 2), span(6, 3)]] {
        let reason = with(versions).check().unwrap_err();
        assert!(reason.contains("the versions of every token"), "{versions:?}: {reason}");
    }
}
