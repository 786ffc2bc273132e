use std::collections::{BTreeMap, VecDeque};

use policy::Sequence;
use proto::{ActionMask, Example, LabelOrigin, ProblemOrigin};
use serde::{Deserialize, Serialize};

/// The replay window: the newest examples, first in first out.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Window {
    examples: VecDeque<Stored>,
    /// Examples by goal, for weighting.
    goal_counts: BTreeMap<u64, u64>,
}

/// An example in the form in which it is trained on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) example: Example,
    pub(crate) masks: Vec<ActionMask>,
    pub(crate) sequence: Sequence,
}

/// An example as checkpoints hold it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Saved {
    example: Example,
    masks: Vec<ActionMask>,
}

impl Window {
    /// Adds an example; drops the oldest ones over `capacity`.
    pub(crate) fn push(&mut self, example: Example, dictionary: &[ActionMask], capacity: usize) {
        let masks: Vec<ActionMask> =
            example.choices.iter().map(|choice| dictionary[usize::from(choice.mask)]).collect();
        self.push_stored(Stored::new(example, masks));
        while self.examples.len() > capacity {
            let oldest = self.examples.pop_front().expect("the window is not empty");
            let count = self.goal_counts.get_mut(&oldest.example.goal).expect("every goal is counted");
            *count -= 1;
            if *count == 0 {
                self.goal_counts.remove(&oldest.example.goal);
            }
        }
    }

    fn push_stored(&mut self, stored: Stored) {
        *self.goal_counts.entry(stored.example.goal).or_default() += 1;
        self.examples.push_back(stored);
    }

    pub(crate) fn len(&self) -> usize {
        self.examples.len()
    }

    pub(crate) fn get(&self, index: usize) -> &Stored {
        &self.examples[index]
    }

    /// How much an example counts: min(max_weight, sqrt(mean count of a goal / count of this goal)).
    pub(crate) fn weight(&self, goal: u64, max_weight: f64) -> f64 {
        let mean = self.examples.len() as f64 / self.goal_counts.len() as f64;
        (mean / self.goal_counts[&goal] as f64).sqrt().min(max_weight)
    }

    pub(crate) fn save(&self) -> Vec<Saved> {
        let save = |stored: &Stored| Saved { example: stored.example.clone(), masks: stored.masks.clone() };
        self.examples.iter().map(save).collect()
    }

    pub(crate) fn load(saved: Vec<Saved>) -> Window {
        let mut window = Window::default();
        saved.into_iter().for_each(|saved| window.push_stored(Stored::new(saved.example, saved.masks)));
        window
    }
}

impl Stored {
    fn new(example: Example, masks: Vec<ActionMask>) -> Stored {
        let choices = example.choices.iter().zip(&masks).map(|(choice, mask)| (usize::from(choice.position), *mask));
        let sequence = Sequence::new(&example.prompt, &example.answer, choices);
        Stored { sequence, example, masks }
    }

    pub(crate) fn origins(&self) -> (ProblemOrigin, LabelOrigin) {
        (self.example.problem_origin, self.example.label_origin)
    }
}

#[cfg(test)]
mod tests {
    use proto::ExampleChoice;

    use super::*;

    fn example(goal: u64) -> Example {
        Example {
            prompt: vec![1, 2],
            answer: vec![3, 4, 5],
            choices: vec![ExampleChoice { position: 1, mask: 0 }],
            problem_origin: ProblemOrigin::Ladder,
            label_origin: LabelOrigin::Solved,
            goal,
        }
    }

    #[test]
    fn rare_goals_weigh_more_and_the_oldest_go_first() {
        let mask: ActionMask = [4, 7].into_iter().collect();
        let mut window = Window::default();
        for goal in [9, 1, 1, 1, 2] {
            window.push(example(goal), &[mask], 4);
        }
        assert_eq!(window.len(), 4);
        // Two goals in four examples: the mean count is 2.
        assert_eq!(window.weight(1, 4.0), (2.0f64 / 3.0).sqrt());
        assert_eq!(window.weight(2, 4.0), 2f64.sqrt());
        assert_eq!(window.weight(2, 1.0), 1.0);
        assert_eq!(Window::load(window.save()), window);
        let sequence = &window.get(0).sequence;
        assert_eq!(sequence.tokens, [1, 2, 3], "tokens after the last choice predict nothing");
        assert_eq!((sequence.chosen[0].row, sequence.chosen[0].target), (2, 4));
    }
}
