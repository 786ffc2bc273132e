//! `verify`: answers in, verdicts out, one line for one line.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use domains::{domain, problem_from_json};
use serde_json::{Value, json};

use crate::report::print;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Lines such as `{"problem":{"domain":"countdown","numbers":[3,7],"target":4},"answer":"7 - 3 = 4"}`; standard
    /// input without it.
    file: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let input: Box<dyn Read> = match &args.file {
        Some(path) => Box::new(std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?),
        None => Box::new(std::io::stdin()),
    };
    let (mut num_lines, mut num_errors) = (0, 0);
    for line in BufReader::new(input).split(b'\n') {
        num_lines += 1;
        let verdict = judge(&line.context("read a line")?);
        num_errors += usize::from(verdict.is_err());
        let reply = verdict.unwrap_or_else(|error| json!({"line": num_lines, "error": format!("{error:#}")}));
        print(&reply.to_string())?;
    }
    if num_errors > 0 {
        bail!("{num_errors} of {num_lines} lines are no problem and answer; each has its error in its place");
    }
    Ok(())
}

fn judge(line: &[u8]) -> Result<Value> {
    let line = std::str::from_utf8(line).context("expected UTF-8")?;
    let entry: Value = serde_json::from_str(line).context("expected a JSON object with problem and answer")?;
    let problem = entry.get("problem").context("expected a field problem, found none")?;
    let answer =
        entry.get("answer").and_then(Value::as_str).context("expected a field answer with text, found none")?;
    let problem = problem_from_json(problem)?;
    let verdict = domain(&problem.domain)?.judge_text(&problem, answer)?;
    Ok(json!({"verdict": verdict}))
}
