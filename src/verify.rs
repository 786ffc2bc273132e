//! `verify`: reads answers and writes verdicts, one output line per input line.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use domains::{Judged, describe_json, domain, keyed_from_json};
use proto::KeyedProblem;
use serde_json::{Value, json};

use crate::input::JsonLines;
use crate::report::print;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// File of lines such as `{"problem":{"domain":"countdown","numbers":[3,7],"target":4},"answer":"7 - 3 = 4"}`, or `-`
    /// for standard input [default: -]. See docs/formats.md.
    file: Option<PathBuf>,
}

/// Maximum length of the error message about a line, which may be long.
const MAX_ERROR_CHARS: usize = 600;

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut lines = JsonLines::open(args.file.as_deref().unwrap_or(Path::new("-")))?;
    let (mut num_lines, mut num_errors) = (0, 0);
    while let Some((line, entry)) = lines.next()? {
        num_lines += 1;
        let reply = match entry.and_then(|entry| judge(&entry)) {
            Ok(judged) => serde_json::to_string(&judged)?,
            Err(error) => {
                num_errors += 1;
                let mut error = format!("{error:#}");
                if let Some((end, _)) = error.char_indices().nth(MAX_ERROR_CHARS) {
                    error.replace_range(end.., "...");
                }
                json!({"line": line, "error": error}).to_string()
            }
        };
        print(&reply)?;
    }
    if num_errors > 0 {
        bail!(
            "{num_errors} of {num_lines} lines are not a valid problem with an answer; the output has an error for each"
        );
    }
    Ok(())
}

/// The judgement of an answer, with the part of it that was judged if its checker looked for one.
#[derive(serde::Serialize)]
struct Reply {
    #[serde(flatten)]
    judged: Judged,
    #[serde(skip_serializing_if = "Option::is_none")]
    read: Option<String>,
}

fn judge(entry: &Value) -> Result<Reply> {
    let problem = entry.get("problem").context("expected a field `problem`, found none")?;
    let answer = entry.get("answer").context("expected a text field `answer`, found none")?;
    let refuse = || anyhow!("expected a text field `answer`, got {}", describe_json(answer));
    let answer = answer.as_str().ok_or_else(refuse)?;
    let KeyedProblem { problem, key } = keyed_from_json(problem)?;
    let domain = domain(&problem.domain)?;
    let judged = domain.judge(&problem, key.as_ref(), answer)?;
    Ok(Reply { judged, read: domain.answer_read(&problem, answer) })
}
