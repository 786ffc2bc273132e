//! Baselines: the scores that an exam yields without any learning. Reports show them beside every score.

use anyhow::Result;
use domains::domain;
use language::{Episode, enumerate_answers, random_answer};
use proto::{CounterRng, KeyedProblem, Problem, ProblemOrigin, Purpose, Request, TokenId, Verdict};

use crate::language;
use crate::player::Scores;

/// Scores answers of uniformly random legal tokens, `num_samples` per problem.
pub(crate) fn uniform_legal(problems: &[KeyedProblem], num_samples: u32) -> Result<Scores> {
    let mut correct = Vec::with_capacity(problems.len());
    for (index, keyed) in problems.iter().enumerate() {
        let (episode, request) = open(&keyed.problem)?;
        let mut num_correct = 0;
        for attempt in 0..num_samples {
            let mut rng = CounterRng::new(0, Purpose::Evaluation, 0, index as u64, u64::from(attempt));
            let answer = random_answer(episode.fork(), &mut rng);
            num_correct += u32::from(is_correct(&request, keyed, &answer)?);
        }
        correct.push(num_correct);
    }
    Ok(Scores { num_samples, correct })
}

/// Scores blind enumeration: answers in canonical order, at most `num_calls` checker calls per problem.
pub(crate) fn enumeration(problems: &[KeyedProblem], num_calls: u32) -> Result<Scores> {
    let mut correct = Vec::with_capacity(problems.len());
    for keyed in problems {
        let (episode, request) = open(&keyed.problem)?;
        let mut is_solved = false;
        for answer in enumerate_answers(episode).take(num_calls as usize) {
            is_solved = is_correct(&request, keyed, &answer)?;
            if is_solved {
                break;
            }
        }
        correct.push(u32::from(is_solved));
    }
    Ok(Scores { num_samples: 1, correct })
}

fn open(problem: &Problem) -> Result<(Box<dyn Episode>, Request)> {
    let request = Request::Solve { problem: problem.clone(), origin: ProblemOrigin::Exam, has_key: false };
    Ok((language().open(&request)?, request))
}

fn is_correct(request: &Request, keyed: &KeyedProblem, answer: &[TokenId]) -> Result<bool> {
    let Some(text) = language().text(request, answer)? else { return Ok(false) };
    let KeyedProblem { problem, key } = keyed;
    Ok(domain(&problem.domain)?.judge(problem, key.as_ref(), &text)?.verdict == Verdict::Correct)
}
