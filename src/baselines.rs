//! What an exam gives away: scores that need no learning. They stand beside every score.

use anyhow::Result;
use domains::{domain, enumerate_answers, random_answer};
use proto::{CounterRng, Problem, Purpose, Verdict};

use crate::eval::Scores;

/// Plays uniformly random legal tokens, `num_samples` answers a problem.
pub(crate) fn uniform_legal(problems: &[Problem], num_samples: u32) -> Result<Scores> {
    let mut correct = Vec::with_capacity(problems.len());
    for (index, problem) in problems.iter().enumerate() {
        let domain = domain(&problem.domain)?;
        let mut num_correct = 0;
        for attempt in 0..num_samples {
            let mut rng = CounterRng::new(0, Purpose::Evaluation, 0, index as u64, u64::from(attempt));
            let answer = random_answer(domain.grammar(problem)?, &mut rng);
            num_correct += u32::from(domain.judge(problem, &answer)? == Verdict::Correct);
        }
        correct.push(num_correct);
    }
    Ok(Scores { num_samples, correct })
}

/// Tries answers in canonical order, up to `num_calls` calls of the checker a problem.
pub(crate) fn enumeration(problems: &[Problem], num_calls: u32) -> Result<Scores> {
    let mut correct = Vec::with_capacity(problems.len());
    for problem in problems {
        let domain = domain(&problem.domain)?;
        let mut is_solved = false;
        for answer in enumerate_answers(domain.grammar(problem)?).take(num_calls as usize) {
            is_solved = domain.judge(problem, &answer)? == Verdict::Correct;
            if is_solved {
                break;
            }
        }
        correct.push(u32::from(is_solved));
    }
    Ok(Scores { num_samples: 1, correct })
}
