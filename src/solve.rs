//! `solve`: answers one problem with a run.

use anyhow::{Context as _, Result};
use domains::{domain, keyed_from_json};
use proto::{KeyedProblem, TokenId, Verdict};

use crate::input::{json, strip_mark};
use crate::player::Player;
use crate::report::{print, word};
use crate::room::{expect_room, positions_needed};
use crate::subject::{self, Subject};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    subject: subject::Args,
    /// Problem as text ("3 7 25 -> 82") or JSON; see docs/formats.md.
    problem: String,
    /// Domain of a problem that does not name one.
    #[arg(long, default_value = "countdown")]
    domain: String,
    /// Answers to sample if the greedy answer is wrong.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    samples: u32,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let keyed = read_problem(&args.problem, &args.domain)?;
    let problem = &keyed.problem;
    let (domain, subject) = (domain(&problem.domain)?, Subject::named(&args.subject)?);
    let (language, step) = (subject.language.clone(), subject.step);
    expect_room(language.as_ref(), problem, subject.model.max_positions)?;
    let longest = positions_needed(language.as_ref(), std::slice::from_ref(&keyed))?;
    let player = Player::new(subject, longest, 0)?;
    let mut answers = player.answers(&keyed, 1, 0.0)?;
    answers.extend(player.answers(&keyed, args.samples, 1.0)?);
    let solved = answers.iter().position(|(_, verdict)| *verdict == Verdict::Correct);
    let render = |(answer, verdict): &(Vec<TokenId>, Verdict)| (language.show(&problem.domain, answer), word(verdict));
    if args.json {
        let (answer, verdict) = render(&answers[solved.unwrap_or(0)]);
        let found = serde_json::json!({
            "problem": domain.problem_to_json(problem)?,
            "step": step,
            "answer": answer,
            "verdict": verdict,
            // 0 for the most probable answer; null when none is right.
            "solved_by_sample": solved,
            "num_samples": args.samples,
        });
        return print(&found.to_string());
    }
    let step = step.map_or(String::new(), |step| format!("   (step {step})"));
    print(&format!("{}{step}", problem.text))?;
    let shown = solved.unwrap_or(0);
    for (tried, answer) in answers.iter().enumerate().filter(|(tried, _)| *tried == 0 || *tried == shown) {
        let how = if tried == 0 { "greedy answer".to_owned() } else { format!("sample {tried}") };
        let (answer, verdict) = render(answer);
        // A reply may have several lines, and more than a terminal should be sent.
        let answer: String = answer
            .chars()
            .map(|it| if it.is_control() { it.escape_default().to_string() } else { it.into() })
            .collect();
        print(&format!("{how}: {answer}   {verdict}"))?;
    }
    match solved {
        Some(_) => Ok(()),
        None => print(&format!("none of {} samples solves the problem", args.samples)),
    }
}

/// Reads a problem as JSON or as a person would type it.
fn read_problem(text: &str, domain_name: &str) -> Result<KeyedProblem> {
    let text = strip_mark(text);
    let unnamed = |json: &serde_json::Value| json.as_object().is_some_and(|fields| !fields.contains_key("domain"));
    Ok(match json(text) {
        Ok(json) if unnamed(&json) => domain(domain_name)?.keyed_from_json(&json)?,
        Ok(json) => keyed_from_json(&json)?,
        Err(error) if text.trim_ascii_start().starts_with('{') => {
            return Err(error).context("problem: expected a JSON object");
        }
        Err(_) => KeyedProblem { problem: domain(domain_name)?.problem_from_text(text)?, key: None },
    })
}
