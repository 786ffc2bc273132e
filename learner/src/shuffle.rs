//! The control `learner.shuffle_labels`: as many examples, on labels that say nothing. Fewer of them repeat, so somewhat more is
//! trained on.

use std::collections::BTreeMap;

use proto::{CounterRng, Example, ExampleChoice, LabelOrigin, ProblemOrigin, Request, ScoredGroup, Token, Verdict};

use crate::window::Labelled;

/// Permutes verdicts among the rollouts of a batch, so that as many answers as were right are taken for right; and gives
/// every other example the prompt, with what it aims at, of another one of equal shape. Masks stay with their
/// answers. Where no other prompt is to be had the example is left out: it would keep its true label.
pub(crate) fn shuffled(groups: &[ScoredGroup], examples: Vec<Labelled>, rng: &mut CounterRng) -> Vec<Labelled> {
    let mut by_shape = BTreeMap::<_, BTreeMap<Vec<Token>, Vec<Labelled>>>::new();
    for labelled in examples.into_iter().filter(|it| it.example.label_origin != LabelOrigin::Solved) {
        let example = &labelled.example;
        let shape = (labelled.domain.clone(), example.label_origin, example.prompt.len(), example.answer.len());
        by_shape.entry(shape).or_default().entry(example.prompt.clone()).or_default().push(labelled);
    }
    let mut relabelled = Vec::new();
    for by_prompt in by_shape.into_values() {
        let mut by_prompt: Vec<Vec<Labelled>> = by_prompt.into_values().collect();
        rng.shuffle(&mut by_prompt);
        // Examples of one prompt stand together, so a shift by the longest such run moves each to another prompt.
        let shift = by_prompt.iter().map(Vec::len).max().unwrap_or(0);
        let mut examples: Vec<Labelled> = by_prompt.into_iter().flatten().collect();
        if 2 * shift > examples.len() {
            continue;
        }
        let mut labels: Vec<_> = examples.iter().map(|it| (it.example.prompt.clone(), it.example.aim)).collect();
        labels.rotate_left(shift);
        for (labelled, (prompt, aim)) in examples.iter_mut().zip(labels) {
            (labelled.example.prompt, labelled.example.aim) = (prompt, aim);
        }
        relabelled.extend(examples);
    }
    relabelled.extend(taken_for_right(groups, rng));
    relabelled
}

fn taken_for_right(groups: &[ScoredGroup], rng: &mut CounterRng) -> Vec<Labelled> {
    let answers = || {
        groups.iter().filter_map(|scored| match &scored.group.task.request {
            Request::Solve { problem, origin, .. } => Some((scored, &problem.domain, *origin)),
            Request::Propose { .. } => None,
        })
    };
    let mut is_right: Vec<bool> =
        answers().flat_map(|(scored, ..)| &scored.verdicts).map(|verdict| *verdict == Verdict::Correct).collect();
    rng.shuffle(&mut is_right);
    let mut is_right = is_right.into_iter();
    let mut examples = Vec::new();
    for (scored, domain, origin) in answers() {
        for (number, is_right) in (0..scored.group.rollouts.len()).zip(is_right.by_ref()) {
            examples.extend(is_right.then(|| posed(scored, number, domain, origin)).flatten());
        }
    }
    examples
}

/// Makes an example of a rollout as if it solved what was posed.
fn posed(scored: &ScoredGroup, number: usize, domain: &str, problem_origin: ProblemOrigin) -> Option<Labelled> {
    let rollout = &scored.group.rollouts[number];
    let choices = rollout.choices.iter().zip(0..);
    let example = Example {
        prompt: scored.prompt.clone(),
        answer: rollout.tokens.clone(),
        choices: choices.map(|(choice, mask)| ExampleChoice { position: choice.position, mask }).collect(),
        problem_origin,
        label_origin: LabelOrigin::Solved,
        aim: scored.aim,
    };
    let masks = rollout.choices.iter().map(|choice| scored.group.masks[usize::from(choice.mask)]).collect();
    (!example.choices.is_empty()).then(|| Labelled { domain: domain.to_owned(), example, masks })
}

#[cfg(test)]
mod tests {
    use proto::{
        Aim, Behavior, Choice, Digest, Group, Niche, Problem, Purpose, Rollout, Sampling, StopReason, Task, TaskId,
        TaskKind,
    };

    use super::*;

    fn group(index: u32, num_right: usize) -> ScoredGroup {
        let problem = Problem { domain: "d".to_owned(), text: index.to_string() };
        let rollout = |number: u16| Rollout {
            tokens: vec![number, index as u16],
            choices: vec![Choice { position: 0, mask: 0, logprob: -1.0 }],
            stop: StopReason::Complete,
            versions: Vec::new(),
            search: None,
        };
        let task = Task {
            id: TaskId { kind: TaskKind::Train, batch: 0, index },
            seed: 0,
            weights: Digest::of_bytes(b""),
            policy_version: 0,
            request: Request::Solve { problem, origin: ProblemOrigin::Ladder, has_key: false },
            family: String::new(),
            num_rollouts: 10,
            sampling: Sampling { behavior: Behavior::Policy, temperature: 1.0 },
            max_tokens: 2,
        };
        let verdict = |number| if number < num_right { Verdict::Correct } else { Verdict::Incorrect };
        ScoredGroup {
            group: Group { task, masks: vec![[1, 2].into_iter().collect()], rollouts: (0..10).map(rollout).collect() },
            prompt: vec![200, index as u16],
            niche: Niche(7),
            aim: Aim { level: 1, goal: 7 },
            verdicts: (0..10).map(verdict).collect(),
            example_masks: Vec::new(),
            examples: Vec::new(),
            proposals: Vec::new(),
        }
    }

    fn labelled(prompt: &[u16], answer: &[u16], goal: u64, label_origin: LabelOrigin) -> Labelled {
        let example = Example {
            prompt: prompt.to_vec(),
            answer: answer.to_vec(),
            choices: Vec::new(),
            problem_origin: ProblemOrigin::Ladder,
            label_origin,
            aim: Aim { level: 1, goal },
        };
        Labelled { domain: "d".to_owned(), example, masks: Vec::new() }
    }

    #[test]
    fn as_many_answers_count_as_right_and_prompts_move_among_equals() {
        let groups: Vec<ScoredGroup> = (0..20).map(|index| group(index, usize::from(index == 0) * 10)).collect();
        let mut examples = vec![labelled(&[1], &[0, 0], 1, LabelOrigin::Solved); 10];
        for number in 0..50 {
            examples.push(labelled(&[number], &[number, 1], u64::from(number), LabelOrigin::Hindsight));
            examples.push(labelled(&[number / 2, 0], &[number], u64::from(number / 2), LabelOrigin::Hindsight));
        }
        // Alone in its shape, and two of one prompt: nobody to trade with.
        examples.push(labelled(&[7, 7, 7], &[7], 7, LabelOrigin::Hindsight));
        examples.extend(vec![labelled(&[8], &[8], 8, LabelOrigin::Executor); 2]);
        let mut rng = CounterRng::new(0, Purpose::Shuffle, 0, 0, 0);
        let shuffled = shuffled(&groups, examples, &mut rng);
        let (right, moved): (Vec<_>, Vec<_>) =
            shuffled.iter().partition(|labelled| labelled.example.label_origin == LabelOrigin::Solved);
        assert_eq!((right.len(), moved.len()), (10, 100));
        // All right answers were of one group; now they are of many, each under the prompt that it was given.
        let prompts: std::collections::BTreeSet<_> = right.iter().map(|labelled| &labelled.example.prompt).collect();
        assert!(prompts.len() > 4, "{prompts:?}");
        assert!(right.iter().all(|labelled| labelled.example.prompt[1] == labelled.example.answer[1]));
        for Labelled { example, .. } in moved {
            let own = if example.answer.len() == 2 { example.answer[0] } else { example.answer[0] / 2 };
            assert_ne!(example.prompt[0], own, "no label stays true");
            assert_eq!(u64::from(example.prompt[0]), example.aim.goal, "a prompt keeps its goal");
            assert_eq!(example.prompt.len() + example.answer.len(), 3, "shapes are kept");
        }
    }
}
