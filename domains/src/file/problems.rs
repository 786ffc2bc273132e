//! The problems of a file.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use proto::{Digest, KeyedProblem, Verdict};
use serde_json::Value;

use super::check::Check;
use super::question::{Question, split};
use super::{File, record};
use crate::{Checker as _, Error, Ladder as _, Split};

/// Most problems of the dev set, as in other exams.
const MAX_DEV: usize = 200;
/// Most problems of the test set.
const MAX_TEST: usize = 1_000;
/// Rounds of the network that permutes problems.
const NUM_ROUNDS: u64 = 4;

/// The problems of a file: most to train on, a tenth for the exam `file`.
#[derive(Debug, Default)]
pub struct Problems {
    /// In order of the file, each with its place there.
    all: Vec<(usize, KeyedProblem)>,
    /// Indices of the problems to train on, ascending.
    train: Vec<usize>,
    /// Indices of the problems of the exam, in order of their hashes.
    dev: Vec<usize>,
    test: Vec<usize>,
}

impl Problems {
    /// Reads records with their places, such as line numbers.
    ///
    /// # Errors
    /// The first record that cannot be used, with its place: [`Error::Problem`] when it is no problem with an answer, or is the same
    /// as another one with another answer.
    pub fn read(records: impl IntoIterator<Item = (usize, Value)>) -> Result<Problems, (usize, Error)> {
        let mut problems = Problems::default();
        let mut known = BTreeMap::<Digest, usize>::new();
        for (place, json) in records {
            let refuse = |refusal| (place, File::refuse(refusal));
            let keyed = record::read(&json, true).map_err(refuse)?;
            match known.entry(File::default().canonical_hash(&keyed.problem)) {
                Entry::Vacant(vacant) => {
                    vacant.insert(problems.all.len());
                    problems.all.push((place, keyed));
                }
                Entry::Occupied(occupied) => {
                    let (earlier, other) = &problems.all[*occupied.get()];
                    if !has_same_answer(&keyed, other).map_err(|error| (place, error))? {
                        let expected = "one answer and one check for every problem".to_owned();
                        return Err(refuse((expected, format!("others than in {earlier}, which asks the same"))));
                    }
                }
            }
        }
        for (hash, index) in known {
            let (part, limit) = match split(&hash) {
                Some(Split::Dev) => (&mut problems.dev, MAX_DEV),
                Some(Split::Test) => (&mut problems.test, MAX_TEST),
                None => (&mut problems.train, usize::MAX),
            };
            // An exam of another domain may hold it out.
            if part.len() < limit && (limit < usize::MAX || !File::default().is_exam(&problems.all[index].1.problem)) {
                part.push(index);
            }
        }
        problems.train.sort_unstable();
        Ok(problems)
    }

    /// Returns the hash of all problems and their right answers in order, whatever the format of the file.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.all.iter().map(|(_, keyed)| keyed).collect::<Vec<_>>())
    }

    /// Returns all problems, in order of the file, each with its place there.
    pub fn all(&self) -> impl ExactSizeIterator<Item = (usize, &KeyedProblem)> {
        self.all.iter().map(|(place, keyed)| (*place, keyed))
    }

    /// Returns the problems to train on, in order of the file.
    pub fn train(&self) -> impl ExactSizeIterator<Item = &KeyedProblem> {
        self.train.iter().map(|index| &self.all[*index].1)
    }

    /// Returns a split of the exam `file`.
    pub fn exam(&self, split: Split) -> impl ExactSizeIterator<Item = &KeyedProblem> {
        let part = match split {
            Split::Dev => &self.dev,
            Split::Test => &self.test,
        };
        part.iter().map(|index| &self.all[*index].1)
    }

    /// Draws problem `index` of a seed: every problem once before any is drawn again.
    pub(super) fn draw(&self, seed: u64, index: u64) -> &KeyedProblem {
        let count = self.train.len() as u64;
        assert!(count > 0, "problems of a file: expected one to train on, got none");
        let place = permuted(index % count, count, &(seed, index / count));
        &self.all[self.train[place as usize]].1
    }
}

/// Whether two problems that ask the same have the same answer: of the same check, and right for each other.
fn has_same_answer(left: &KeyedProblem, right: &KeyedProblem) -> Result<bool, Error> {
    let check = |keyed: &KeyedProblem| Question::read(&keyed.problem.text).and_then(|question| question.check());
    if check(left) != check(right) || left.key == right.key || check(left) == Some(Check::Regex) {
        return Ok(check(left) == check(right) && left.key == right.key);
    }
    let Some(answer) = &left.key else { return Ok(false) };
    let reply = format!("<answer>{}</answer>", answer.text);
    Ok(File::default().judge(&right.problem, right.key.as_ref(), &reply)?.verdict == Verdict::Correct)
}

/// Permutes the numbers below `count`: a Feistel network on as many bits as they have, applied until the number is below again.
///
/// Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", sections 4 and 5.
fn permuted(number: u64, count: u64, key: &(u64, u64)) -> u64 {
    let half_bits = (64 - count.saturating_sub(1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1 << half_bits) - 1;
    let mut value = number;
    loop {
        let (mut left, mut right) = (value >> half_bits, value & mask);
        for round in 0..NUM_ROUNDS {
            let mixed = Digest::of(&(key, round, right)).head() & mask;
            (left, right) = (right, left ^ mixed);
        }
        value = left << half_bits | right;
        if value < count {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;

    fn sums(count: u64) -> Problems {
        let record = |number: u64| json!({"prompt": format!("What is {number} + 1?"), "answer": number + 1});
        Problems::read((0..count).map(|number| (number as usize + 1, record(number)))).unwrap()
    }

    #[test]
    fn a_tenth_is_held_out_and_the_rest_drawn_once_a_round() {
        let problems = sums(1_000);
        let [dev, test] = [Split::Dev, Split::Test].map(|split| problems.exam(split).collect::<Vec<_>>());
        assert!(dev.len().abs_diff(50) < 20 && test.len().abs_diff(50) < 20, "{} {}", dev.len(), test.len());
        assert_eq!(problems.train().len() + dev.len() + test.len(), problems.all().len());
        let domain = File::default();
        assert!(dev.iter().chain(&test).all(|keyed| domain.is_exam(&keyed.problem) && keyed.key.is_some()));
        assert!(problems.train().all(|keyed| !domain.is_exam(&keyed.problem)));
        let count = problems.train().len() as u64;
        let round = |seed, round: u64| -> Vec<&KeyedProblem> {
            (round * count..(round + 1) * count).map(|index| problems.draw(seed, index)).collect()
        };
        for (seed, number) in [(0, 0), (0, 1), (1, 0)] {
            let distinct: BTreeSet<&str> =
                round(seed, number).iter().map(|keyed| keyed.problem.text.as_str()).collect();
            assert_eq!(distinct.len() as u64, count);
        }
        assert!(round(0, 0) != round(0, 1) && round(0, 0) != round(1, 0) && round(0, 0) == round(0, 0));
    }

    #[test]
    fn numbers_are_permuted() {
        for count in 1..70 {
            let permuted: BTreeSet<u64> = (0..count).map(|number| permuted(number, count, &(3, 4))).collect();
            assert_eq!(permuted, (0..count).collect());
        }
    }

    #[test]
    fn the_same_problem_has_one_answer() {
        let read = |records: &[Value]| Problems::read(records.iter().cloned().enumerate());
        let ask = |prompt: &str, answer: &str| json!({"prompt": prompt, "answer": answer});
        let problems = read(&[ask("1 + 1?", "2"), ask(" 1  +\n1? ", "2.0"), ask("1 + 2?", "3")]).unwrap();
        assert_eq!(problems.all().len(), 2);
        for other in [ask("1 + 1?", "3"), json!({"prompt": "1 + 1?", "answer": "2", "check": "exact"})] {
            let (place, error) = read(&[ask("1 + 1?", "2"), other]).unwrap_err();
            assert_eq!(place, 1);
            assert!(error.to_string().contains("got others than in 0, which asks the same"), "{error}");
        }
    }
}
