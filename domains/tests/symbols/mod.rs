//! Answers as a network that reads symbols writes them, in text.

use language::{Language as _, SymbolLanguage, enumerate_answers};
use proto::{CounterRng, Difficulty, Niche, Problem, ProblemOrigin, Request};

pub(crate) fn solve(problem: &Problem) -> Request {
    Request::Solve { problem: problem.clone(), origin: ProblemOrigin::Ladder, has_key: false }
}

pub(crate) fn propose(domain: &str, niche: Niche) -> Request {
    Request::Propose { domain: domain.to_owned(), niche, difficulty: Difficulty::Hard }
}

/// Plays uniformly random legal tokens to the end.
pub(crate) fn random(request: &Request, rng: &mut CounterRng) -> String {
    let answer = language::random_answer(SymbolLanguage.open(request).unwrap(), rng);
    SymbolLanguage.text(request, &answer).unwrap().expect("legal play ends in a complete answer")
}

/// Lists complete answers in canonical order.
pub(crate) fn enumerated(problem: &Problem) -> impl Iterator<Item = String> {
    let request = solve(problem);
    enumerate_answers(SymbolLanguage.open(&request).unwrap())
        .map(move |answer| SymbolLanguage.text(&request, &answer).unwrap().expect("enumerated answers are complete"))
}

/// Counts the tokens of a problem's prompt.
pub(crate) fn prompt_len(problem: &Problem) -> usize {
    SymbolLanguage.open(&solve(problem)).unwrap().prompt().len()
}
