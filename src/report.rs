//! Output for people: lines, tables, numbers.

use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use nix::errno::Errno;
use serde::Serialize;

/// Writes to standard output. If its reader is gone, the error is `NoReader`, on which `main` exits successfully.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let end = if text.ends_with('\n') { "" } else { "\n" };
    let written = write!(out, "{text}{end}").and_then(|()| out.flush());
    written.map_err(|error| match error.kind() {
        ErrorKind::BrokenPipe => NoReader.into(),
        // EIO comes from a failing disk and from a closed terminal. Only the terminal counts as a lost reader.
        _ if error.raw_os_error() == Some(Errno::EIO as i32) && is_device(&out) => NoReader.into(),
        _ => anyhow::Error::new(error).context("write to standard output"),
    })
}

fn is_device(out: &impl AsFd) -> bool {
    let file = out.as_fd().try_clone_to_owned().map(File::from);
    file.and_then(|file| file.metadata()).is_ok_and(|metadata| metadata.file_type().is_char_device())
}

/// The error when the reader of standard output has closed the pipe, or was a terminal that is closed.
#[derive(Debug)]
struct NoReader;

impl std::fmt::Display for NoReader {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("write to standard output: its reader has closed it")
    }
}

impl std::error::Error for NoReader {}

pub(crate) fn has_no_reader(error: &anyhow::Error) -> bool {
    error.is::<NoReader>()
}

/// Writes a line to standard error. Ignores errors: a closed terminal is no reason to stop.
pub(crate) fn note(line: std::fmt::Arguments<'_>) {
    // Write the whole line in one call: other processes write to the same place.
    drop(std::io::stderr().lock().write_all(format!("{line}\n").as_bytes()));
}

/// Standard output for as long as it has a reader. After the reader is gone, output is discarded and the work continues.
#[derive(Debug)]
pub(crate) struct Screen {
    quiet: bool,
}

impl Screen {
    /// Makes a screen. If `quiet`, it prints nothing.
    pub(crate) fn new(quiet: bool) -> Screen {
        Screen { quiet }
    }

    pub(crate) fn say(&mut self, text: &str) -> Result<()> {
        match if self.quiet { Ok(()) } else { print(text) } {
            Err(error) if has_no_reader(&error) => self.quiet = true,
            result => result?,
        }
        Ok(())
    }
}

/// Quotes a word for a shell.
pub(crate) fn quoted(word: &str) -> String {
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./=,:+".contains(letter);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Quotes a path for a shell, as an argument of this program.
pub(crate) fn quoted_path(path: &Path) -> String {
    quoted(&argument(path).display().to_string())
}

/// Returns a path as an argument that cannot be mistaken for an option.
pub(crate) fn argument(path: &Path) -> PathBuf {
    if path.as_os_str().as_encoded_bytes().starts_with(b"-") { Path::new(".").join(path) } else { path.to_owned() }
}

/// Returns an option with its value, quoted for a shell and this program.
pub(crate) fn option(name: &str, value: &str) -> String {
    let between = if value.starts_with('-') { '=' } else { ' ' };
    format!("{name}{between}{}", quoted(value))
}

/// Formats rows as columns: the first flush left, the others flush right.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let num_columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..num_columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// Formats a share: `63.4 %`.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Formats a duration: `1:04` or `2:03:59`.
pub(crate) fn clock(duration: std::time::Duration) -> String {
    let seconds = duration.as_secs();
    let (hours, minutes, seconds) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

/// Formats a count: `987`, `12.3k`, `4.56M`.
pub(crate) fn count(number: f64) -> String {
    match number {
        n if n < 1e3 => format!("{n:.0}"),
        n if n < 1e6 => format!("{:.1}k", n / 1e3),
        n => format!("{:.2}M", n / 1e6),
    }
}

/// Formats a size: `1.5 MiB`.
pub(crate) fn bytes(size: u64) -> String {
    format!("{:.1} MiB", size as f64 / f64::from(1 << 20))
}

/// Returns the total size of the files in a folder, in bytes.
pub(crate) fn folder_bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
}

/// Returns an enum variant's name as in files and tables: `uniform-legal`.
pub(crate) fn word(variant: &impl Serialize) -> String {
    let json = serde_json::to_value(variant).expect("a variant has a JSON form");
    json.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_numbers_for_people() {
        assert_eq!(percent(0.6342), "63.4 %");
        assert_eq!(clock(std::time::Duration::from_secs(3_725)), "1:02:05");
        assert_eq!((count(987.0), count(12_345.0), count(4_560_000.0)), ("987".into(), "12.3k".into(), "4.56M".into()));
        assert_eq!(
            (quoted("a/b=3e-4"), quoted("it's"), quoted("")),
            ("a/b=3e-4".into(), r"'it'\''s'".into(), "''".into())
        );
        let paths = ["-x", "a b", "x"].map(|path| quoted_path(Path::new(path)));
        assert_eq!(paths, ["./-x", "'a b'", "x"]);
        assert_eq!([option("--run", "-x"), option("--run", "a b")], ["--run=-x", "--run 'a b'"]);
        let rows = [vec!["a".into(), "1".into()], vec!["bb".into(), "22".into()]];
        assert_eq!(table(&rows), "a    1\nbb  22\n");
    }
}
