//! `verify`: answers in, verdicts out, one line for one line.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;

use anyhow::{Context as _, Result, anyhow, bail};
use domains::{domain, problem_from_json};
use serde_json::{Value, json};

use crate::report::print;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Lines such as `{"problem":{"domain":"countdown","numbers":[3,7],"target":4},"answer":"7 - 3 = 4"}`; standard
    /// input without it.
    file: Option<PathBuf>,
}

/// Far longer than any problem with an answer.
const MAX_LINE_BYTES: u64 = 1 << 20;

pub(crate) fn run(args: &Args) -> Result<()> {
    let input: Box<dyn Read> = match &args.file {
        Some(path) => Box::new(std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?),
        None => Box::new(std::io::stdin()),
    };
    let (mut num_lines, mut num_errors) = (0, 0);
    let (mut input, mut line) = (BufReader::new(input), Vec::new());
    loop {
        line.clear();
        let limit = MAX_LINE_BYTES + 1;
        let num_read = input.by_ref().take(limit).read_until(b'\n', &mut line).context("read a line")?;
        if num_read == 0 {
            break;
        }
        num_lines += 1;
        let verdict = match line.pop_if(|byte| *byte == b'\n') {
            None if num_read as u64 == limit => {
                input.skip_until(b'\n').context("read a line")?;
                Err(anyhow!("expected a line of up to {MAX_LINE_BYTES} bytes, got a longer one"))
            }
            _ => judge(&line),
        };
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
    Ok(serde_json::to_value(domain(&problem.domain)?.judge_text(&problem, answer)?)?)
}
