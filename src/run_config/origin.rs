//! Where the keys of a config were set, for errors that say so.

use std::path::PathBuf;

use anyhow::{Result, anyhow, ensure};
use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::tables::key_of;
use crate::input::stray_mark;

/// A TOML file.
pub(crate) struct TomlFile {
    pub(crate) path: PathBuf,
    pub(crate) text: String,
}

impl TomlFile {
    /// Parses the file directly into `T`, without a preset or overrides.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T> {
        // The parser would accept a second mark.
        ensure!(
            stray_mark(&self.text) != Some(0),
            "{}: expected at most one byte order mark (U+FEFF), got two",
            self.path.display()
        );
        toml::from_str(&self.text).map_err(|error| self.refusal(&error))
    }

    pub(super) fn parse(&self) -> Result<Table> {
        self.read()
    }

    fn refusal(&self, error: &toml::de::Error) -> anyhow::Error {
        let position = error.span().map_or(String::new(), |span| self.position(span.start));
        let mark = stray_mark(&self.text).map_or(String::new(), |offset| {
            format!("; a byte order mark (U+FEFF) is at{}", self.position(offset).trim_start_matches(','))
        });
        anyhow!("{}{position}: {}{mark}", self.path.display(), error.message())
    }

    /// Describes the position of a byte: `, line 3, column 1`.
    fn position(&self, offset: usize) -> String {
        let before = &self.text[..offset];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let (line, column) = (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1);
        format!(", line {line}, column {column}")
    }

    /// Returns the byte offset of a key in the file.
    fn offset_of(&self, key: &[String]) -> Option<usize> {
        let document = DeTable::parse(&self.text).ok()?;
        let (first, rest) = key.split_first()?;
        let (name, mut value) = document.get_ref().get_key_value(first.as_str())?;
        let mut offset = name.span().start;
        for part in rest {
            (offset, value) = match value.get_ref() {
                DeValue::Table(table) => {
                    let (name, value) = table.get_key_value(part.as_str())?;
                    (name.span().start, value)
                }
                DeValue::Array(array) => {
                    let value = array.get(part.parse::<usize>().ok()?)?;
                    (value.span().start, value)
                }
                _ => return None,
            };
        }
        Some(offset)
    }
}

/// The sources of a config's keys, as far as a person wrote them.
pub(super) struct Origin<'a> {
    pub(super) file: Option<TomlFile>,
    pub(super) overrides: &'a [String],
    pub(super) problems: Needed,
}

/// Whether the file of problems that a run trains on has to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needed {
    Yes,
    /// It is read if it is there.
    Perhaps,
    /// It is not looked for.
    No,
}

impl Origin<'_> {
    /// Returns a key's name with the place where it was set.
    pub(super) fn name(&self, key: &[String]) -> String {
        let dotted = key.join(".");
        if self.overrides.iter().any(|assignment| key_of(assignment) == dotted) {
            return format!("--set {dotted}");
        }
        let place = self.file.as_ref().and_then(|file| Some((file, file.offset_of(key)?)));
        place.map_or(dotted.clone(), |(file, offset)| {
            format!("{}{}: {dotted}", file.path.display(), file.position(offset))
        })
    }

    /// Deserializes a table; `prefix` is its path in the config.
    pub(super) fn read<T: DeserializeOwned>(&self, table: Table, prefix: &str) -> Result<T> {
        serde_path_to_error::deserialize(Value::Table(table)).map_err(
            |error: serde_path_to_error::Error<toml::de::Error>| {
                let mut key: Vec<String> = prefix.split_terminator('.').map(str::to_owned).collect();
                key.extend(error.path().iter().filter_map(|segment| match segment {
                    Segment::Map { key } => Some(key.clone()),
                    Segment::Seq { index } => Some(index.to_string()),
                    Segment::Enum { .. } | Segment::Unknown => None,
                }));
                anyhow!("{}: {}", self.name(&key), error.inner().message())
            },
        )
    }
}
