//! Verdicts and examples of groups, and what a hostile actor cannot do.

use domains::{Next, domain, exam};
use proto::{
    ActionMask, Behavior, Choice, Digest, Group, LabelOrigin, Problem, ProblemOrigin, Rollout, Sampling, StopReason,
    Task, TaskId, TaskKind, Token, Verdict,
};
use verifier::score;

fn group(problem: &str, kind: TaskKind, answers: &[&[Token]]) -> Group {
    let rollouts = answers.iter().map(|answer| Rollout {
        tokens: answer.to_vec(),
        choices: vec![Choice { position: 60_000, mask: 9, logprob: f32::NAN }],
        stop: StopReason::Complete,
        versions: Vec::new(),
        search: None,
    });
    Group {
        task: Task {
            id: TaskId { kind, batch: 0, index: 0 },
            seed: 0,
            weights: Digest::of_bytes(b""),
            policy_version: 0,
            problem: Problem { domain: "countdown".to_owned(), text: problem.to_owned() },
            origin: ProblemOrigin::Ladder,
            family: String::new(),
            num_rollouts: answers.len() as u32,
            sampling: Sampling { behavior: Behavior::Policy, temperature: 1.0 },
            max_tokens: 20,
        },
        masks: Vec::new(),
        rollouts: rollouts.collect(),
    }
}

/// 112 is `*`, 110 is `+`, 114 is `=`.
const SOLVES_82: [Token; 10] = [25, 112, 3, 114, 75, 75, 110, 7, 114, 82];

#[test]
fn solved_and_missed_both_become_examples_of_what_they_solve() {
    let scored = score(group("25 7 3 -> 82", TaskKind::Solve, &[&SOLVES_82])).unwrap();
    assert_eq!(scored.verdicts, [Verdict::Correct]);
    assert_eq!(scored.examples[0].label_origin, LabelOrigin::Solved);
    let missed = score(group("25 7 3 -> 78", TaskKind::Solve, &[&SOLVES_82])).unwrap();
    assert_eq!(missed.verdicts, [Verdict::Incorrect]);
    assert_eq!(missed.examples[0].label_origin, LabelOrigin::Hindsight);
    assert_eq!(missed.examples[0].prompt, scored.prompt, "the prompt is the problem that was solved");
    assert_ne!(missed.prompt, scored.prompt);
}

/// Masks and positions of examples come from the grammar, never from the actor (whose are nonsense here).
#[test]
fn masks_are_derived_anew() {
    let scored = score(group("25 7 3 -> 82", TaskKind::Solve, &[&SOLVES_82])).unwrap();
    let problem = &scored.group.task.problem;
    let mut grammar = domain("countdown").unwrap().grammar(problem).unwrap();
    let mut expected: Vec<(usize, ActionMask)> = Vec::new();
    for (position, token) in SOLVES_82.iter().enumerate() {
        if let Next::Choice(mask) = grammar.next() {
            expected.push((position, mask));
        }
        assert!(grammar.push(*token));
    }
    let choices = scored.examples[0].choices.iter();
    let derived: Vec<_> =
        choices.map(|choice| (usize::from(choice.position), scored.example_masks[usize::from(choice.mask)])).collect();
    assert_eq!(derived, expected);
    assert!(!derived.is_empty());
}

#[test]
fn nothing_of_an_exam_becomes_an_example() {
    let sat = exam("countdown-3").unwrap();
    let domain = domain("countdown").unwrap();
    for problem in sat.test.iter().chain(&sat.dev).take(200) {
        let mut answers = domains::enumerate_answers(domain.grammar(problem).unwrap());
        let solution = answers.find(|answer| domain.judge(problem, answer).unwrap() == Verdict::Correct).unwrap();
        // Posed as itself, and reached by hindsight from another target.
        let other = problem.text.split("->").next().unwrap().to_owned() + "-> 1";
        for text in [&problem.text, &other] {
            assert!(score(group(text, TaskKind::Solve, &[&solution])).unwrap().examples.is_empty(), "{text}");
        }
    }
}

#[test]
fn evaluations_make_no_examples_and_nonsense_makes_no_panic() {
    assert!(score(group("25 7 3 -> 82", TaskKind::Evaluate, &[&SOLVES_82])).unwrap().examples.is_empty());
    let nonsense: [&[Token]; 4] = [&[], &[Token::MAX; 40], &[25, 112], &[25, 112, 3, 114, 76, 76, 110, 7, 114, 83]];
    let scored = score(group("25 7 3 -> 83", TaskKind::Solve, &nonsense)).unwrap();
    let expected = [Verdict::Incorrect, Verdict::Malformed, Verdict::Malformed, Verdict::Incorrect];
    assert_eq!(scored.verdicts, expected);
    assert!(scored.examples.is_empty());
    assert!(score(group("no problem", TaskKind::Solve, &[])).is_err());
}

/// The same bytes give the same verdict after ten thousand others.
#[test]
fn verdicts_do_not_depend_on_what_was_judged_before() {
    let first = score(group("25 7 3 -> 82", TaskKind::Solve, &[&SOLVES_82, &[25], &[]])).unwrap();
    for number in 0..10_000u32 {
        let target = 1 + number % 99;
        let scored = score(group(&format!("25 7 3 -> {target}"), TaskKind::Solve, &[&SOLVES_82])).unwrap();
        assert_eq!(scored.verdicts[0] == Verdict::Correct, target == 82);
    }
    let last = score(group("25 7 3 -> 82", TaskKind::Solve, &[&SOLVES_82, &[25], &[]])).unwrap();
    assert_eq!(
        (last.verdicts, last.examples, last.example_masks),
        (first.verdicts, first.examples, first.example_masks)
    );
}
