//! Verified answers of a run's journal, in the formats that trainers of language models read.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Result, bail, ensure};
use domains::domain;
use language::Language as _;
use language::text::{ChatMessage, TextLanguage};
use learner::{Config, GroupRecord, Record};
use proto::{Digest, Problem, ScoredGroup, TaskKind, Verdict};
use serde::Serialize;

use crate::files::write_with;
use crate::inspect::read_journal;
use crate::report::note;

/// Which examples are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Examples {
    /// Right answers, and answers that are right for another problem if the run learned from those.
    Right,
    /// Pairs of a right and a wrong answer to one problem.
    Pairs,
}

/// A line of the file. `prompt`, `completion`, `chosen` and `rejected` are what TRL calls a conversational dataset.
#[derive(Serialize)]
#[serde(untagged)]
enum Row<'a> {
    Right {
        prompt: &'a [ChatMessage],
        completion: [ChatMessage; 1],
        domain: &'a str,
        problem: &'a str,
        /// `solved`, or `hindsight` if the answer was given to another problem.
        label: &'static str,
    },
    Pair {
        prompt: &'a [ChatMessage],
        chosen: [ChatMessage; 1],
        rejected: [ChatMessage; 1],
        domain: &'a str,
        problem: &'a str,
    },
}

/// Writes every distinct example of a run's journal to a new file, in the journal's order. Returns their number.
pub(super) fn write_examples(
    path: &Path,
    examples: Examples,
    run: &Path,
    config: &Config,
    language: &TextLanguage,
) -> Result<u64> {
    expect_new(path)?;
    write_with(path, |file| {
        let mut rows = Rows { examples, language, hindsight: config.learner.hindsight, seen: BTreeSet::new() };
        let (mut file, mut failed) = (BufWriter::new(file), None);
        let unreadable = read_journal(run, |record| {
            if let (Record::Group(GroupRecord { scored, .. }), None) = (record, &failed) {
                failed = rows.write(&scored, &mut file).err();
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        if !unreadable.is_empty() {
            note(format_args!(
                "{} records of the journal cannot be read; their answers are left out",
                unreadable.len()
            ));
        }
        if rows.seen.is_empty() {
            bail!("{}: expected {examples} in its journal, found none", run.display());
        }
        file.flush()?;
        Ok(rows.seen.len() as u64)
    })
}

/// Checks that there is nothing at a path.
pub(super) fn expect_new(path: &Path) -> Result<()> {
    ensure!(path.symlink_metadata().is_err(), "{}: expected a new file, found one", path.display());
    Ok(())
}

struct Rows<'a> {
    examples: Examples,
    language: &'a TextLanguage,
    hindsight: bool,
    /// Digests of what was written.
    seen: BTreeSet<Digest>,
}

/// A reply that ended by itself.
struct Reply {
    /// All of it.
    whole: String,
    /// The part that is judged.
    answer: String,
    is_right: bool,
}

impl Rows<'_> {
    fn write(&mut self, scored: &ScoredGroup, file: &mut impl Write) -> Result<()> {
        let task = &scored.group.task;
        let (TaskKind::Train, Some(problem)) = (task.id.kind, task.request.problem()) else { return Ok(()) };
        let mut replies = Vec::new();
        for (rollout, verdict) in scored.group.rollouts.iter().zip(&scored.verdicts) {
            if let Some(answer) = self.language.text(&task.request, &rollout.tokens)? {
                let whole = self.language.show(&problem.domain, &rollout.tokens);
                replies.push(Reply { whole, answer, is_right: *verdict == Verdict::Correct });
            }
        }
        match self.examples {
            Examples::Right => replies.iter().try_for_each(|reply| self.write_right(problem, reply, file)),
            Examples::Pairs => self.write_pairs(problem, &replies, file),
        }
    }

    fn write_right(&mut self, problem: &Problem, reply: &Reply, file: &mut impl Write) -> Result<()> {
        if reply.is_right {
            return self.write_example(problem, "solved", reply, file);
        }
        if !self.hindsight {
            return Ok(());
        }
        let domain = domain(&problem.domain)?;
        let solved = domain.hindsight(problem, &reply.answer)?;
        match solved.filter(|solved| solved != problem && !domain.is_exam(solved)) {
            Some(solved) => self.write_example(&solved, "hindsight", reply, file),
            None => Ok(()),
        }
    }

    fn write_example(
        &mut self,
        problem: &Problem,
        label: &'static str,
        reply: &Reply,
        file: &mut impl Write,
    ) -> Result<()> {
        if !self.seen.insert(Digest::of(&(problem, &reply.whole))) {
            return Ok(());
        }
        let prompt = self.language.messages(problem)?;
        let Problem { domain, text: problem } = problem;
        write_line(file, &Row::Right { prompt: &prompt, completion: [said(reply)], domain, problem, label })
    }

    /// Pairs the first right answer with the first wrong one, the second with the second, and so on.
    fn write_pairs(&mut self, problem: &Problem, replies: &[Reply], file: &mut impl Write) -> Result<()> {
        let (right, wrong): (Vec<&Reply>, Vec<&Reply>) = replies.iter().partition(|reply| reply.is_right);
        if right.is_empty() || wrong.is_empty() {
            return Ok(());
        }
        let prompt = self.language.messages(problem)?;
        let Problem { domain, text } = problem;
        for (right, wrong) in right.into_iter().zip(wrong) {
            if self.seen.insert(Digest::of(&(problem, &right.whole, &wrong.whole))) {
                let (chosen, rejected) = ([said(right)], [said(wrong)]);
                write_line(file, &Row::Pair { prompt: &prompt, chosen, rejected, domain, problem: text })?;
            }
        }
        Ok(())
    }
}

fn said(reply: &Reply) -> ChatMessage {
    ChatMessage { role: "assistant".to_owned(), content: reply.whole.clone() }
}

fn write_line(file: &mut impl Write, row: &Row<'_>) -> Result<()> {
    serde_json::to_writer(&mut *file, row)?;
    Ok(file.write_all(b"\n")?)
}

impl fmt::Display for Examples {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Examples::Right => "right answers",
            Examples::Pairs => "pairs of a right and a wrong answer",
        })
    }
}
