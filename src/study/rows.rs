//! `study.csv`: one row for every run and exam, appended as results arrive.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use domains::Split;
use learner::expect_in_place;
use proto::Digest;
use serde::{Deserialize, Serialize};

use crate::report::{count, percent};

/// The header line, in the field order of [`Row`].
const COLUMNS: [&str; 15] = [
    "arm",
    "seed",
    "manifest",
    "steps",
    "trained_tokens",
    "cpu_seconds",
    "wall_seconds",
    "exam",
    "split",
    "num_problems",
    "pass_at_1_greedy",
    "pass_at_1_sampled",
    "pass_at_k",
    "k",
    "entropy_nats",
];

/// A run's scores on an exam, and the run's cost. Scores are shares from 0 to 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) arm: String,
    pub(crate) seed: u64,
    /// Digest of the run's manifest, and of its wall time if the clock ended it.
    pub(crate) manifest: Digest,
    pub(crate) steps: u64,
    pub(crate) trained_tokens: u64,
    /// User and system time of training.
    pub(crate) cpu_seconds: f64,
    pub(crate) wall_seconds: f64,
    pub(crate) exam: String,
    pub(crate) split: Split,
    pub(crate) num_problems: u64,
    pub(crate) pass_at_1_greedy: f64,
    pub(crate) pass_at_1_sampled: f64,
    pub(crate) pass_at_k: f64,
    pub(crate) k: u32,
    /// Mean over the last steps of training.
    pub(crate) entropy_nats: f64,
}

impl Row {
    /// Returns the row as text for people.
    pub(crate) fn text(&self) -> String {
        format!(
            "{}: pass@1 {} greedy, {} sampled, pass@{} {}  ({} steps, {} tokens, {:.1} s of CPU time)",
            self.exam,
            percent(self.pass_at_1_greedy),
            percent(self.pass_at_1_sampled),
            self.k,
            percent(self.pass_at_k),
            self.steps,
            count(self.trained_tokens as f64),
            self.cpu_seconds,
        )
    }
}

/// The file, open for appending, and locked against other studies.
pub(crate) struct Rows {
    path: PathBuf,
    file: File,
    has_header: bool,
    rows: Vec<Row>,
    /// Bytes of an incomplete last line when the file was opened.
    pub(crate) torn_bytes: u64,
}

impl Rows {
    /// Opens or creates the file. Removes a last line that a crash cut short.
    pub(crate) fn open(path: PathBuf) -> Result<Rows> {
        let at = || path.display().to_string();
        let file = File::options().create(true).append(true).open(&path).with_context(at)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                bail!("{}: expected no other study to write this file, found one", at())
            }
            Err(std::fs::TryLockError::Error(error)) => return Err(error).with_context(at),
        }
        let (rows, whole_bytes) = read(&path)?;
        let torn_bytes = file.metadata().with_context(at)?.len() - whole_bytes;
        if torn_bytes > 0 {
            file.set_len(whole_bytes).with_context(at)?;
        }
        Ok(Rows { path, file, has_header: whole_bytes > 0, rows, torn_bytes })
    }

    pub(crate) fn all(&self) -> &[Row] {
        &self.rows
    }

    /// Appends a row. It is on the disk when this returns.
    pub(crate) fn append(&mut self, row: Row) -> Result<()> {
        let mut writer = csv::WriterBuilder::new().has_headers(!self.has_header).from_writer(Vec::new());
        writer.serialize(&row)?;
        let line = writer.into_inner().map_err(|error| anyhow!("{error}"))?;
        expect_in_place(&self.path, &self.file)?;
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_all());
        written.with_context(|| format!("write {}", self.path.display()))?;
        self.has_header = true;
        self.rows.push(row);
        Ok(())
    }
}

/// Reads the complete rows. Returns their length in bytes too.
pub(crate) fn read(path: &Path) -> Result<(Vec<Row>, u64)> {
    let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let at = || format!("{}: expected a study's rows", path.display());
    let mut reader = csv::Reader::from_reader(&bytes[..end]);
    let header = reader.headers().with_context(at)?;
    ensure!(end == 0 || header.iter().eq(COLUMNS), "{}, got a header with other columns", at());
    let rows = reader.deserialize().collect::<Result<Vec<Row>, _>>();
    Ok((rows.with_context(at)?, end as u64))
}

#[cfg(test)]
pub(crate) fn row(arm: &str, seed: u64, pass_at_1_greedy: f64) -> Row {
    Row {
        arm: arm.to_owned(),
        seed,
        manifest: Digest::of_bytes(arm.as_bytes()),
        steps: 40,
        trained_tokens: 1_000,
        cpu_seconds: 2.5,
        wall_seconds: 1.5,
        exam: "countdown-3".to_owned(),
        split: Split::Test,
        num_problems: 1_000,
        pass_at_1_greedy,
        pass_at_1_sampled: 0.25,
        pass_at_k: 0.5,
        k: 8,
        entropy_nats: 1.25,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cut_keeps_the_whole_rows_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("study.csv");
        let expected: Vec<Row> = (0..3).map(|seed| row("a,\"b\"", seed, 0.1)).collect();
        let mut rows = Rows::open(path.clone()).unwrap();
        expected.iter().for_each(|row| rows.append(row.clone()).unwrap());
        drop(rows);
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes.starts_with(b"arm,seed,manifest,steps,trained_tokens,cpu_seconds,wall_seconds,exam,split,"));
        for cut in 0..=bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let num_whole = bytes[..cut].iter().filter(|byte| **byte == b'\n').count().saturating_sub(1);
            let mut rows = Rows::open(path.clone()).unwrap();
            assert_eq!(rows.all(), &expected[..num_whole], "cut at {cut}");
            rows.append(row("again", 7, 0.2)).unwrap();
            drop(rows);
            assert_eq!(read(&path).unwrap().0.last(), Some(&row("again", 7, 0.2)), "cut at {cut}");
        }
    }

    #[test]
    fn a_second_study_and_another_table_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("study.csv");
        let rows = Rows::open(path.clone()).unwrap();
        let refusal = Rows::open(path.clone()).err().unwrap().to_string();
        assert!(refusal.contains("expected no other study"), "{refusal}");
        drop(rows);
        for text in ["name,value\na,1\n", "my own notes\n"] {
            std::fs::write(&path, text).unwrap();
            let refusal = Rows::open(path.clone()).err().unwrap().to_string();
            assert!(refusal.contains("expected a study's rows"), "{refusal}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }
}
