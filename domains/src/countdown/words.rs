//! Countdown in words.

use proto::Problem;

use super::Countdown;
use super::stated::{Stated, text};
use crate::{Error, Ladder as _, Wording, reply_with};

/// Numbers, a target and a solution, from the smallest on. Problems of exams have a target from 10 on.
const EXAMPLES: [(&[u64], u64, &str); 3] =
    [(&[5, 3], 8, "5 + 3"), (&[9, 2, 1], 7, "9 - 2 * 1"), (&[6, 4, 2], 7, "6 / 2 + 4")];

impl Wording for Countdown {
    fn question(&self, problem: &Problem) -> Result<String, Error> {
        let Stated { numbers, target, bound } = self.stated(problem)?;
        let numbers: Vec<String> = numbers.iter().map(u64::to_string).collect();
        let (last, first) = numbers.split_last().expect("a problem has two numbers or more");
        let limit = bound.map_or(String::new(), |bound| format!(" up to {bound}"));
        Ok(format!(
            "Use the numbers {} and {last}, each exactly once, with + - * / and parentheses to make {target}. Every \
             intermediate result must be a positive integer{limit}. Reply with the expression only.",
            first.join(", ")
        ))
    }

    fn examples(&self) -> Vec<(Problem, String)> {
        let example = |(numbers, target, solution): (&[u64], u64, &str)| {
            let text = text(numbers, target, Some(99));
            (Problem { domain: self.name().to_owned(), text }, reply_with(solution))
        };
        EXAMPLES.into_iter().map(example).collect()
    }

    /// The characters of an expression, and as many as the numbers need with an operator between every two, spaces around it,
    /// and a pair of parentheses for each operator.
    fn answer_pattern(&self, problem: &Problem) -> Result<Option<String>, Error> {
        let numbers = self.stated(problem)?.numbers;
        let widest = numbers[0].to_string().len();
        let num_characters = numbers.len() * widest + (numbers.len() - 1) * (" + ".len() + "()".len());
        Ok(Some(format!("[0-9+\\-*/() ]{{1,{num_characters}}}")))
    }
}
