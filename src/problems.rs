//! The problems of exams and of users' own files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use domains::{File, Problems, Split};
use language::Language;
use proto::{Digest, KeyedProblem};
use toml::{Table, Value};

use crate::input::{JsonLines, name_of_input};
use crate::parquet_file;
use crate::room::positions;

/// The name of the domain of a file's problems, and of their exam.
pub(crate) const NAME: &str = File::NAME;

/// What is wrong with a file whose problems are all held out.
pub(crate) const NOTHING_TO_TRAIN_ON: &str = "expected problems to train on, got none: about one in ten is held out for the exam `file`, and these are all of them";

/// A user's own file of problems.
#[derive(Clone, Debug)]
pub(crate) struct ProblemFile {
    pub(crate) problems: Arc<Problems>,
    /// Hash of the problems.
    pub(crate) digest: Digest,
    pub(crate) path: PathBuf,
    /// What a record is called: a line, or a row.
    place: &'static str,
}

impl ProblemFile {
    /// Reads a file of JSON lines, or a Parquet file.
    ///
    /// # Errors
    /// When the file cannot be read, or a record is not a problem with a right answer: the error names the first such line or row.
    pub(crate) fn open(path: &Path) -> Result<ProblemFile> {
        let Records { name, place, records } = Records::read(path, &File::FIELDS)?;
        let problems =
            Problems::read(records).map_err(|(number, error)| anyhow!("{name}, {place} {number}: {error}"))?;
        let digest = problems.digest();
        Ok(ProblemFile { problems: Arc::new(problems), digest, path: path.to_owned(), place })
    }

    /// Checks that the problems have this hash.
    pub(crate) fn expect(self, digest: Digest) -> Result<ProblemFile> {
        let (path, got) = (self.path.display(), self.digest);
        ensure!(got == digest, "{path}: expected problems with digest {}, got {}", digest.short(), got.short());
        Ok(self)
    }

    /// Checks that a network has room for every problem.
    pub(crate) fn expect_room(&self, language: &dyn Language, max_positions: usize) -> Result<()> {
        self.problems.all().try_for_each(|(number, keyed)| {
            let (prompt, answer) = positions(language, &keyed.problem)?;
            let needed = prompt + answer;
            ensure!(
                needed <= max_positions,
                "{}, {} {number} needs model.max_positions = {needed} (a prompt of {prompt} tokens, actor.max_answer_tokens = \
                 {answer}), got {max_positions}",
                self.path.display(),
                self.place
            );
            Ok(())
        })
    }

    /// Returns a split of the exam of the file.
    pub(crate) fn exam(&self, split: Split) -> Result<Vec<KeyedProblem>> {
        let problems: Vec<KeyedProblem> = self.problems.exam(split).cloned().collect();
        let name = if split == Split::Dev { "dev" } else { "test" };
        ensure!(
            !problems.is_empty(),
            "exam {NAME}: expected problems, got none: of the problems of {}, about one in twenty is held out for its {name} set, \
             and here none is",
            self.path.display()
        );
        Ok(problems)
    }
}

/// The records of a file: JSON lines, or the rows of a Parquet file.
pub(crate) struct Records {
    /// The file, or `standard input`.
    pub(crate) name: String,
    /// What a record is called: a line, or a row.
    pub(crate) place: &'static str,
    /// At least one, each with its number.
    pub(crate) records: Vec<(usize, serde_json::Value)>,
}

impl Records {
    /// Reads a file; `-` is standard input, which has JSON lines.
    ///
    /// - `columns`: those of a Parquet file that are read.
    ///
    /// # Errors
    /// When the file cannot be read, has no record, or one that is no JSON object.
    pub(crate) fn read(path: &Path, columns: &[&str]) -> Result<Records> {
        let name = name_of_input(path).display().to_string();
        let (place, records) = if path == Path::new("-") {
            ("line", all_of(JsonLines::open(path)?)?)
        } else {
            let reading = || format!("{name}: expected a file of problems, cannot read it");
            let bytes = std::fs::read(path).with_context(reading)?;
            let is_parquet = parquet_file::is_parquet(&bytes);
            ensure!(
                is_parquet || path.extension().is_none_or(|extension| extension != "parquet"),
                "{name}: expected a Parquet file, which begins with PAR1, got another"
            );
            match is_parquet {
                true => ("row", parquet_file::records(bytes, columns).with_context(|| name.clone())?),
                false => ("line", all_of(JsonLines::of(bytes, name.clone()))?),
            }
        };
        ensure!(!records.is_empty(), "{name}: expected problems, one JSON object per line or one in a row, found none");
        Ok(Records { name, place, records })
    }
}

fn all_of(mut lines: JsonLines) -> Result<Vec<(usize, serde_json::Value)>> {
    let mut records = Vec::new();
    while let Some((line, json)) = lines.next()? {
        records.push((line, json.with_context(|| format!("{}, line {line}", lines.name))?));
    }
    Ok(records)
}

/// Replaces the `path` of the domain `file` with `file`, the hash of its problems, and `local.file`. Returns the file, if one is named.
pub(crate) fn spell_out_file(config: &mut Table, local: &mut Table) -> Result<Option<ProblemFile>> {
    let mut found = None;
    for entry in config.get_mut("domains").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(entry) = entry.as_table_mut() else { continue };
        if entry.get("name").and_then(Value::as_str) == Some(NAME) {
            let level = Table::from_iter([("level".to_owned(), 1.into()), ("weight".to_owned(), 1.0.into())]);
            entry.entry("levels").or_insert_with(|| vec![Value::from(level)].into());
        }
        let Some(path) = entry.remove("path") else { continue };
        let path = path.as_str().with_context(|| format!("expected the path of a file, got {path}"))?;
        ensure!(found.is_none(), "expected path in one entry, got {path} in another");
        if let Some(place) = local.get("file") {
            bail!("expected the place of the file in path alone, got local.file = {place} too");
        }
        let file = ProblemFile::open(Path::new(path))?;
        local.insert("file".to_owned(), std::path::absolute(path)?.display().to_string().into());
        let digest = Value::from(file.digest.to_string());
        let expected = entry.entry("file").or_insert_with(|| digest.clone());
        ensure!(*expected == digest, "{path}: expected problems with digest {expected}, got {digest}");
        found = Some(file);
    }
    Ok(found)
}

/// Returns an exam's problems, with their keys if verifiers do not know them.
pub(crate) fn exam_of(
    run: &learner::Config,
    file: Option<&ProblemFile>,
    name: &str,
    split: Split,
) -> Result<Vec<KeyedProblem>> {
    if name == NAME {
        let file =
            file.with_context(|| format!("exam {name}: expected a run with problems of a file, got one without"))?;
        return file.exam(split);
    }
    exam_problems(name, split, run.domains.iter().map(|entry| entry.name.as_str()))
}

/// Returns the problems of a committed exam for a learner trained on these domains, which need no keys.
pub(crate) fn exam_problems<'a>(
    name: &str,
    split: Split,
    trained: impl IntoIterator<Item = &'a str>,
) -> Result<Vec<KeyedProblem>> {
    let problems = domains::exam_problems(name, split, trained)?;
    Ok(problems.into_iter().map(|problem| KeyedProblem { problem, key: None }).collect())
}
