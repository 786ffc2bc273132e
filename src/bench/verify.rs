use anyhow::{Context as _, Result};
use domains::programs::Dialect;
use domains::{Domain, Programs, domain};
use language::random_answer;
use proto::{CounterRng, KeyedProblem, Problem, ProblemOrigin, Purpose, Request};
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

/// Makes checks of programs of one and two operations: random legal answers and a correct one to each problem.
fn programs(name: &'static str, levels: &[u32]) -> Result<Checks> {
    let programs = Programs { dialect: Dialect::Full };
    let groups = (0..PROBLEMS).map(|index| {
        let drawn = programs.draw_ladder(levels[index as usize % levels.len()], 0, index);
        let mut answers = random_answers(&drawn.problem, index)?;
        answers.push(drawn.answer);
        Ok((KeyedProblem { problem: drawn.problem, key: drawn.key }, answers))
    });
    checks(name, domain("programs")?.as_ref(), groups.collect::<Result<_>>()?)
}

/// Makes checks of countdown with three and four numbers.
fn countdown() -> Result<Checks> {
    let countdown = domain("countdown")?.as_ref();
    let groups = (0..PROBLEMS).map(|index| {
        let keyed = countdown.ladder(2 + index as u32 % 2, 0, index);
        let answers = random_answers(&keyed.problem, index)?;
        Ok((keyed, answers))
    });
    checks("countdown", countdown, groups.collect::<Result<_>>()?)
}

/// Makes checks of groups as the verifier makes them: every group starts from its problem's text.
fn checks(name: &'static str, domain: &'static dyn Domain, groups: Vec<(KeyedProblem, Vec<String>)>) -> Result<Checks> {
    let judge = move || {
        let mut num_checks = 0;
        for (KeyedProblem { problem, key }, answers) in &groups {
            let answers: Vec<&str> = answers.iter().map(String::as_str).collect();
            num_checks += std::hint::black_box(domain.verdicts(problem, key.as_ref(), &answers)?).len();
        }
        Ok(num_checks)
    };
    Ok(Checks { name, judge: Box::new(judge) })
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
