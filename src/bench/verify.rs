use anyhow::{Context as _, Result};
use domains::programs::Dialect;
use domains::{Programs, domain};
use language::random_answer;
use proto::{CounterRng, Problem, ProblemOrigin, Purpose, Request};
use tokio::time::Instant;

use super::{Args, Report, Row, Spread};
use crate::language;

/// Problems of one kind, each with answers to judge.
struct Checks {
    name: &'static str,
    judge: Box<dyn FnMut() -> Result<usize>>,
}

/// Problems per kind.
const PROBLEMS: u64 = 256;

/// Answers per problem, as many as a group has.
const ANSWERS: u64 = 16;

/// Checks that are timed together.
const CHECKS: usize = 1_000_000;

pub(super) fn measure(args: &Args) -> Result<Report> {
    let mut kinds = [
        programs("deduction", &[1, 4])?,
        programs("abduction", &[2, 5])?,
        programs("induction", &[3, 6])?,
        programs("programs mixed", &[1, 2, 3, 4, 5, 6])?,
        countdown()?,
    ];
    let mut rates = vec![Vec::new(); kinds.len()];
    for round in 0..=args.repeats {
        for (kind, rates) in kinds.iter_mut().zip(&mut rates) {
            let (start, mut num_checks) = (Instant::now(), 0);
            while num_checks < CHECKS {
                num_checks += (kind.judge)()?;
            }
            if round > 0 {
                rates.push(num_checks as f64 / start.elapsed().as_secs_f64());
            }
        }
    }
    let rows = kinds.iter().zip(rates).map(|(kind, rates)| Row {
        name: kind.name.to_owned(),
        unit: "checks",
        per_second: Spread::of(rates.into_iter()),
        gflops: None,
        share_of_peak: None,
        ratio: None,
    });
    Ok(Report { threads: 1, ..args.report(rows.collect()) })
}

/// Makes checks of programs of one and two operations: each problem is read once, then random legal answers are judged.
fn programs(name: &'static str, levels: &[u32]) -> Result<Checks> {
    let programs = Programs { dialect: Dialect::Full };
    let mut prepared = Vec::new();
    for index in 0..PROBLEMS {
        let drawn = programs.draw_ladder(levels[index as usize % levels.len()], 0, index);
        let mut answers = random_answers(&drawn.problem, index)?;
        answers.push(drawn.answer);
        prepared.push((programs.checker(&drawn.problem, drawn.key.as_ref())?, answers));
    }
    let judge = move || {
        let mut num_checks = 0;
        for (checker, answers) in &mut prepared {
            for answer in answers {
                std::hint::black_box(checker.judge(answer));
                num_checks += 1;
            }
        }
        Ok(num_checks)
    };
    Ok(Checks { name, judge: Box::new(judge) })
}

/// Makes checks of countdown with three and four numbers. Every check starts from the problem's text.
fn countdown() -> Result<Checks> {
    let countdown = domain("countdown")?;
    let mut prepared = Vec::new();
    for index in 0..PROBLEMS {
        let problem = countdown.ladder(2 + index as u32 % 2, 0, index).problem;
        let answers = random_answers(&problem, index)?;
        prepared.push((problem, answers));
    }
    let judge = move || {
        let mut num_checks = 0;
        for (problem, answers) in &prepared {
            for answer in answers {
                std::hint::black_box(countdown.judge(problem, None, answer)?);
                num_checks += 1;
            }
        }
        Ok(num_checks)
    };
    Ok(Checks { name: "countdown", judge: Box::new(judge) })
}

fn random_answers(problem: &Problem, index: u64) -> Result<Vec<String>> {
    let language = language();
    let request = Request::Solve { problem: problem.clone(), origin: ProblemOrigin::Ladder, has_key: false };
    let episode = language.open(&request)?;
    let answers = (0..ANSWERS).map(|attempt| {
        let mut rng = CounterRng::new(0, Purpose::Rollout, 0, index, attempt);
        let answer = random_answer(episode.fork(), &mut rng);
        language.text(&request, &answer)?.context("a random answer is complete")
    });
    answers.collect()
}
