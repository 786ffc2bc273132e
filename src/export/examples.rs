//! Verified answers of a run's journal, in the formats that trainers of language models read.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::{Result, bail, ensure};
use domains::domain;
use language::Language as _;
use language::text::{ChatMessage, TextLanguage};
use learner::{Config, GroupRecord, Record};
use proto::{Digest, Problem, ScoredGroup, TaskKind, Verdict};
use serde::Serializer as _;

use crate::files::write_with;
use crate::inspect::read_journal;
use crate::parquet_file::{Cell, TableWriter};
use crate::report::note;

/// Which examples are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Examples {
    /// Right answers, and answers that are right for another problem if the run learned from those.
    Right,
    /// Pairs of a right and a wrong answer to one problem.
    Pairs,
}

/// A row of the file: its columns, by name. `prompt`, `completion`, `chosen` and `rejected` are what TRL calls a conversational
/// dataset.
type Row<'a> = &'a [(&'static str, Cell<'a>)];

/// The file, in the format that its name asks for.
enum Sink<'a> {
    /// JSON lines.
    Lines(BufWriter<&'a mut File>),
    /// Parquet. The first row says which columns there are.
    Table { file: &'a File, table: Option<TableWriter<&'a File>> },
}

impl<'a> Sink<'a> {
    fn new(path: &Path, file: &'a mut File) -> Sink<'a> {
        match path.extension().is_some_and(|extension| extension == "parquet") {
            true => Sink::Table { file, table: None },
            false => Sink::Lines(BufWriter::new(file)),
        }
    }

    fn write(&mut self, row: Row<'_>) -> Result<()> {
        match self {
            Sink::Lines(file) => {
                let mut line = serde_json::Serializer::new(&mut *file);
                line.collect_map(row.iter().copied())?;
                Ok(file.write_all(b"\n")?)
            }
            Sink::Table { table: Some(table), .. } => table.write(row),
            Sink::Table { file, table } => table.insert(TableWriter::new(*file, row)?).write(row),
        }
    }

    fn finish(self) -> Result<()> {
        match self {
            Sink::Lines(mut file) => Ok(file.flush()?),
            Sink::Table { table, .. } => table.map_or(Ok(()), TableWriter::finish),
        }
    }
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
        let (mut sink, mut failed) = (Sink::new(path, file), None);
        let unreadable = read_journal(run, |record| {
            if let (Record::Group(GroupRecord { scored, .. }), None) = (record, &failed) {
                failed = rows.write(&scored, &mut sink).err();
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
        sink.finish()?;
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
    fn write(&mut self, scored: &ScoredGroup, sink: &mut Sink<'_>) -> Result<()> {
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
            Examples::Right => replies.iter().try_for_each(|reply| self.write_right(problem, reply, sink)),
            Examples::Pairs => self.write_pairs(problem, &replies, sink),
        }
    }

    fn write_right(&mut self, problem: &Problem, reply: &Reply, sink: &mut Sink<'_>) -> Result<()> {
        if reply.is_right {
            return self.write_example(problem, "solved", reply, sink);
        }
        if !self.hindsight {
            return Ok(());
        }
        let domain = domain(&problem.domain)?;
        let solved = domain.hindsight(problem, &reply.answer)?;
        match solved.filter(|solved| solved != problem && !domain.is_exam(solved)) {
            Some(solved) => self.write_example(&solved, "hindsight", reply, sink),
            None => Ok(()),
        }
    }

    fn write_example(
        &mut self,
        problem: &Problem,
        label: &'static str,
        reply: &Reply,
        sink: &mut Sink<'_>,
    ) -> Result<()> {
        if !self.seen.insert(Digest::of(&(problem, &reply.whole))) {
            return Ok(());
        }
        let prompt = self.language.messages(problem)?;
        let Problem { domain, text: problem } = problem;
        sink.write(&[
            ("prompt", Cell::Messages(&prompt)),
            ("completion", Cell::Messages(&[said(reply)])),
            ("domain", Cell::Text(domain)),
            ("problem", Cell::Text(problem)),
            // `solved`, or `hindsight` if the answer was given to another problem.
            ("label", Cell::Text(label)),
        ])
    }

    /// Pairs the first right answer with the first wrong one, the second with the second, and so on.
    fn write_pairs(&mut self, problem: &Problem, replies: &[Reply], sink: &mut Sink<'_>) -> Result<()> {
        let (right, wrong): (Vec<&Reply>, Vec<&Reply>) = replies.iter().partition(|reply| reply.is_right);
        if right.is_empty() || wrong.is_empty() {
            return Ok(());
        }
        let prompt = self.language.messages(problem)?;
        let Problem { domain, text } = problem;
        for (right, wrong) in right.into_iter().zip(wrong) {
            if self.seen.insert(Digest::of(&(problem, &right.whole, &wrong.whole))) {
                sink.write(&[
                    ("prompt", Cell::Messages(&prompt)),
                    ("chosen", Cell::Messages(&[said(right)])),
                    ("rejected", Cell::Messages(&[said(wrong)])),
                    ("domain", Cell::Text(domain)),
                    ("problem", Cell::Text(text)),
                ])?;
            }
        }
        Ok(())
    }
}

fn said(reply: &Reply) -> ChatMessage {
    ChatMessage { role: "assistant".to_owned(), content: reply.whole.clone() }
}

impl fmt::Display for Examples {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Examples::Right => "right answers",
            Examples::Pairs => "pairs of a right and a wrong answer",
        })
    }
}
