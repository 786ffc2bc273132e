//! Countdown in words.

use proto::{Niche, Problem};

use super::Countdown;
use super::propose::Kind;
use super::stated::{Stated, text};
use crate::proposing::{drawn, expect_level};
use crate::{Error, Ladder as _, Proposing, Wording, reply_with};

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
            "Reply with an expression only. Every intermediate result must be a positive integer{limit}. With + - * / and \
             parentheses, and each number exactly once, make {target} from {} and {last}.",
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

    /// As many of the numbers as there are, repeated ones included, with an operator between every two. Parentheses may be in
    /// all places where they can be, and need not match.
    fn answer_pattern(&self, problem: &Problem) -> Result<Option<String>, Error> {
        let numbers: Vec<String> = self.stated(problem)?.numbers.iter().map(u64::to_string).collect();
        let num_operators = numbers.len() - 1;
        let number = format!("\\({{0,{num_operators}}}(?:{})\\){{0,{num_operators}}}", numbers.join("|"));
        Ok(Some(format!("{number}(?: [-+*/] {number}){{{num_operators}}}")))
    }

    fn proposing(&self) -> Option<&dyn Proposing> {
        Some(self)
    }
}

/// A proposal is the canonical text of a problem without its bound, with the numbers in any order.
impl Proposing for Countdown {
    fn request(&self, niche: Niche) -> Result<String, Error> {
        let (_, sample) = &drawn(self, niche, proposal)?[0];
        Ok(format!(
            "Reply with a problem only, such as {sample}: numbers up to {}, and a target that all of them make. Kind: {}.",
            Kind::of(niche).max_number(),
            self.describe_niche(niche)
        ))
    }

    fn examples(&self, niche: Niche) -> Result<Vec<(Niche, String)>, Error> {
        Ok(drawn(self, niche, proposal)?.split_off(1))
    }

    fn pattern(&self, niche: Niche) -> Result<String, Error> {
        expect_level(self, niche).map(|_| Kind::of(niche).pattern())
    }
}

fn proposal(problem: &Problem) -> &str {
    problem.text.split(" max ").next().unwrap_or_default()
}
