//! The positions that problems take in a language.

use anyhow::{Result, ensure};
use language::Language;
use proto::{KeyedProblem, Problem, ProblemOrigin, Request};

/// Returns the lengths of a problem's prompt and of its longest answer, in tokens.
pub(crate) fn positions(language: &dyn Language, problem: &Problem) -> Result<(usize, usize)> {
    let problem = problem.clone();
    let answer = language.room(&problem)?.answer;
    let request = Request::Solve { problem, origin: ProblemOrigin::Exam, has_key: false };
    Ok((language.open(&request)?.prompt().len(), answer))
}

/// Checks that a network has room for a problem with its longest answer.
pub(crate) fn expect_room(language: &dyn Language, problem: &Problem, max_positions: usize) -> Result<()> {
    let (prompt, answer) = positions(language, problem)?;
    let (needed, text) = (prompt + answer, &problem.text);
    ensure!(
        needed <= max_positions,
        "{text}: expected prompt and answer within model.max_positions = {max_positions}, got {needed}"
    );
    Ok(())
}

/// Returns the most positions that a prompt with its longest answer takes.
pub(crate) fn positions_needed<'a>(
    language: &dyn Language,
    problems: impl IntoIterator<Item = &'a KeyedProblem>,
) -> Result<usize> {
    let lengths = problems.into_iter().map(|keyed| positions(language, &keyed.problem));
    lengths
        .map(|length| length.map(|(prompt, answer)| prompt + answer))
        .try_fold(0, |most, needed| Ok(most.max(needed?)))
}
