//! The control experiment `learner.shuffle_labels`: as many examples, with uninformative labels. Fewer of them repeat, so
//! somewhat more is trained on.

use std::collections::{BTreeMap, BTreeSet};

use proto::{CounterRng, Example, LabelOrigin, ProblemOrigin, Request, ScoredGroup, TokenId, Verdict};

use crate::replay_buffers::Labelled;

/// Permutes verdicts among the rollouts of a batch, which keeps the number of answers labelled correct. Every example that is
/// not `Solved` gets the prompt and the balance key of another of equal domain, level, label and lengths. Masks stay with
/// their answers. An example is left out if its answer is known to be correct for its new prompt.
pub(crate) fn shuffled(groups: &[ScoredGroup], examples: Vec<Labelled>, rng: &mut CounterRng) -> Vec<Labelled> {
    let mut by_shape = BTreeMap::<_, BTreeMap<Vec<TokenId>, Vec<Labelled>>>::new();
    for labelled in examples.into_iter().filter(|it| it.example.label_origin != LabelOrigin::Solved) {
        let Example { prompt, answer, label_origin, balance_key, .. } = &labelled.example;
        let shape = (labelled.domain.clone(), balance_key.level, *label_origin, prompt.len(), answer.len());
        by_shape.entry(shape).or_default().entry(answer.clone()).or_default().push(labelled);
    }
    let mut relabelled = Vec::new();
    for by_answer in by_shape.into_values() {
        let mut by_answer: Vec<Vec<Labelled>> = by_answer.into_values().collect();
        rng.shuffle(&mut by_answer);
        // Examples of one answer are adjacent. A program, for example, is correct for all inputs that it was run on. A shift by
        // the longest such run gives each example a prompt of another answer.
        let longest = by_answer.iter().map(Vec::len).max().unwrap_or(0);
        let mut examples: Vec<Labelled> = by_answer.into_iter().flatten().collect();
        let shift = longest % examples.len();
        let label = |it: &Labelled| (it.example.prompt.clone(), it.example.answer.clone());
        let right: BTreeSet<_> = examples.iter().map(label).collect();
        let mut labels: Vec<_> =
            examples.iter().map(|it| (it.example.prompt.clone(), it.example.balance_key)).collect();
        labels.rotate_left(shift);
        for (labelled, (prompt, balance_key)) in examples.iter_mut().zip(labels) {
            (labelled.example.prompt, labelled.example.balance_key) = (prompt, balance_key);
        }
        relabelled.extend(examples.into_iter().filter(|labelled| !right.contains(&label(labelled))));
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

/// Makes an example of a rollout as if it solved the posed problem.
fn posed(scored: &ScoredGroup, number: usize, domain: &str, problem_origin: ProblemOrigin) -> Option<Labelled> {
    let rollout = &scored.group.rollouts[number];
    let example = Example {
        prompt: scored.prompt.clone(),
        answer: rollout.tokens.clone(),
        choices: rollout.choices.clone(),
        problem_origin,
        label_origin: LabelOrigin::Solved,
        balance_key: scored.balance_key,
    };
    let legal = rollout.choices.iter().map(|(_, legal)| legal.tokens(&scored.group.sets)).collect();
    (!example.choices.is_empty()).then(|| Labelled { domain: domain.to_owned(), example, legal })
}

#[cfg(test)]
mod tests {
    use proto::{
        BalanceKey, Behavior, Choices, Digest, Group, Legal, Niche, Problem, Purpose, Rollout, Sampling, StopReason,
        Task, TaskId, TaskKind,
    };

    use super::*;

    fn group(index: u32, num_right: usize) -> ScoredGroup {
        let problem = Problem { domain: "d".to_owned(), text: index.to_string() };
        let rollout = |number| Rollout {
            tokens: vec![number, index],
            choices: Choices::new(2, [(0, Legal::Set(0))]),
            logprobs: vec![-1.0],
            values: None,
            search: None,
            stop: StopReason::Complete,
            versions: Vec::new(),
        };
        let task = Task {
            id: TaskId { kind: TaskKind::Train, batch: 0, index },
            seed: 0,
            weights: Digest::of_bytes(b""),
            policy_version: 0,
            free_running: false,
            request: Request::Solve { problem, origin: ProblemOrigin::Ladder, has_key: false },
            family: String::new(),
            num_rollouts: 10,
            sampling: Sampling { behavior: Behavior::Policy, temperature: 1.0 },
            max_tokens: 2,
        };
        let verdict = |number| if number < num_right { Verdict::Correct } else { Verdict::Incorrect };
        ScoredGroup {
            group: Group { task, sets: vec![[1, 2].into_iter().collect()], rollouts: (0..10).map(rollout).collect() },
            prompt: vec![200, index],
            niche: Niche(7),
            balance_key: BalanceKey { level: 1, goal: 7 },
            verdicts: (0..10).map(verdict).collect(),
            example_sets: Vec::new(),
            examples: Vec::new(),
            proposals: Vec::new(),
        }
    }

    fn labelled(prompt: &[TokenId], answer: &[TokenId], goal: u64, label_origin: LabelOrigin) -> Labelled {
        let example = Example {
            prompt: prompt.to_vec(),
            answer: answer.to_vec(),
            choices: Choices::new(answer.len(), []),
            problem_origin: ProblemOrigin::Ladder,
            label_origin,
            balance_key: BalanceKey { level: 1, goal },
        };
        Labelled { domain: "d".to_owned(), example, legal: Vec::new() }
    }

    #[test]
    fn as_many_answers_count_as_right_and_prompts_move_among_equals() {
        let groups: Vec<ScoredGroup> = (0..20).map(|index| group(index, usize::from(index == 0) * 10)).collect();
        let mut examples = vec![labelled(&[1], &[0, 0], 1, LabelOrigin::Solved); 10];
        for number in 0..50 {
            examples.push(labelled(&[number], &[number, 1], u64::from(number), LabelOrigin::Hindsight));
            // Two answers for every prompt, and five prompts for every answer.
            examples.push(labelled(&[number / 2, 0], &[number], u64::from(number / 2), LabelOrigin::Hindsight));
            examples.push(labelled(&[number, 0], &[number / 5], u64::from(number), LabelOrigin::Executor));
        }
        // Alone in its shape, two of one prompt, two of one answer: no example to exchange prompts with.
        examples.push(labelled(&[7, 7, 7], &[7], 7, LabelOrigin::Hindsight));
        examples.extend(vec![labelled(&[8], &[8], 8, LabelOrigin::Executor); 2]);
        examples.extend([8, 9].map(|number| labelled(&[number], &[8, 8, 8], 8, LabelOrigin::Executor)));
        let mut rng = CounterRng::new(0, Purpose::Shuffle, 0, 0, 0);
        let shuffled = shuffled(&groups, examples, &mut rng);
        let (right, moved): (Vec<_>, Vec<_>) =
            shuffled.iter().partition(|labelled| labelled.example.label_origin == LabelOrigin::Solved);
        assert_eq!(right.len(), 10);
        assert!(moved.len() > 140 && moved.len() <= 150, "{}", moved.len());
        // All correct answers were in one group; now they are in many, each with its original prompt.
        let prompts: BTreeSet<_> = right.iter().map(|labelled| &labelled.example.prompt).collect();
        assert!(prompts.len() > 4, "{prompts:?}");
        assert!(right.iter().all(|labelled| labelled.example.prompt[1] == labelled.example.answer[1]));
        for Labelled { example, .. } in moved {
            let (prompt, answer) = (example.prompt[0], example.answer[0]);
            let is_true = match (example.label_origin, example.answer.len()) {
                (LabelOrigin::Executor, _) => prompt / 5 == answer,
                (_, 2) => prompt == answer,
                _ => prompt == answer / 2,
            };
            assert!(!is_true, "no label stays true: {example:?}");
            assert_eq!(u64::from(prompt), example.balance_key.goal, "a prompt keeps its goal");
            assert_eq!(example.prompt.len() + example.answer.len(), 3, "shapes are kept");
        }
    }
}
