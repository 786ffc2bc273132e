//! Writes rows of text and messages as a Parquet file.

use std::io::Write;
use std::sync::Arc;

use anyhow::{Result, ensure};
use language::text::ChatMessage;
use parquet::basic::{Compression, ConvertedType, LogicalType, Repetition, Type as PhysicalType};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedColumnWriter, SerializedFileWriter};
use parquet::schema::types::{Type, TypePtr};
use serde::Serialize;

/// Rows of a row group. `datasets` writes as many.
const GROUP_ROWS: usize = 1_000;

/// A value of a row.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Cell<'a> {
    Text(&'a str),
    Messages(&'a [ChatMessage]),
}

/// Writes a table whose rows have the same columns.
pub(crate) struct TableWriter<W: Write + Send> {
    file: SerializedFileWriter<W>,
    /// The leaves of the schema, in its order, with the values that are not written yet.
    leaves: Vec<Leaf>,
    num_waiting: usize,
}

/// A leaf of the schema: a text, or a part of messages.
#[derive(Default)]
struct Leaf {
    values: Vec<ByteArray>,
    /// For messages: 0 if there is none, else 1.
    definition_levels: Vec<i16>,
    /// For messages: 0 for the first one of a row, else 1.
    repetition_levels: Vec<i16>,
}

impl<W: Write + Send> TableWriter<W> {
    /// Begins a file with the columns of this row, which is not written.
    pub(crate) fn new(file: W, like: &[(&str, Cell<'_>)]) -> Result<TableWriter<W>> {
        let columns = like.iter().map(|(name, cell)| match cell {
            Cell::Text(_) => text(name),
            Cell::Messages(_) => messages(name),
        });
        let columns = columns.collect::<Result<_, ParquetError>>()?;
        let schema = Arc::new(Type::group_type_builder("schema").with_fields(columns).build()?);
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        let num_leaves = like.iter().map(|(_, cell)| if matches!(cell, Cell::Text(_)) { 1 } else { 2 }).sum();
        let leaves = std::iter::repeat_with(Leaf::default).take(num_leaves).collect();
        Ok(TableWriter { file: SerializedFileWriter::new(file, schema, Arc::new(properties))?, leaves, num_waiting: 0 })
    }

    /// Writes a row with the columns that the file began with.
    pub(crate) fn write(&mut self, row: &[(&str, Cell<'_>)]) -> Result<()> {
        let mut leaves = self.leaves.iter_mut();
        let mut next = || leaves.next().expect("rows have the columns of the first");
        for (_, cell) in row {
            match cell {
                Cell::Text(text) => next().values.push(ByteArray::from(*text)),
                Cell::Messages(turns) => {
                    next().push(turns.iter().map(|turn| turn.role.as_str()));
                    next().push(turns.iter().map(|turn| turn.content.as_str()));
                }
            }
        }
        self.num_waiting += 1;
        if self.num_waiting == GROUP_ROWS { self.write_group() } else { Ok(()) }
    }

    /// Writes what is waiting, and the end of the file.
    pub(crate) fn finish(mut self) -> Result<()> {
        if self.num_waiting > 0 {
            self.write_group()?;
        }
        self.file.close()?;
        Ok(())
    }

    fn write_group(&mut self) -> Result<()> {
        let mut group = self.file.next_row_group()?;
        for leaf in &mut self.leaves {
            let mut column: SerializedColumnWriter<'_> = group.next_column()?.expect("a column for every leaf");
            let Leaf { values, definition_levels, repetition_levels } = std::mem::take(leaf);
            // A text has no levels.
            let levels = |levels| Some(levels).filter(|levels: &&[i16]| !levels.is_empty());
            let (definition_levels, repetition_levels) =
                (levels(&definition_levels[..]), levels(&repetition_levels[..]));
            let column_writer = column.typed::<ByteArrayType>();
            let num_written = column_writer.write_batch(&values, definition_levels, repetition_levels)?;
            ensure!(num_written == values.len(), "expected {} values to be written, got {num_written}", values.len());
            column.close()?;
        }
        group.close()?;
        self.num_waiting = 0;
        Ok(())
    }
}

impl Leaf {
    /// Adds a part of the messages of a row.
    fn push<'a>(&mut self, parts: impl ExactSizeIterator<Item = &'a str>) {
        if parts.len() == 0 {
            self.definition_levels.push(0);
            self.repetition_levels.push(0);
        }
        for (index, part) in parts.enumerate() {
            self.values.push(ByteArray::from(part));
            self.definition_levels.push(1);
            self.repetition_levels.push(i16::from(index > 0));
        }
    }
}

fn text(name: &str) -> Result<TypePtr, ParquetError> {
    let column = Type::primitive_type_builder(name, PhysicalType::BYTE_ARRAY).with_repetition(Repetition::REQUIRED);
    let column = column.with_converted_type(ConvertedType::UTF8).with_logical_type(Some(LogicalType::String));
    column.build().map(Arc::new)
}

/// Returns a list of structs with role and content, in the three levels that the format prescribes.
fn messages(name: &str) -> Result<TypePtr, ParquetError> {
    let group =
        |name, repetition, fields| Type::group_type_builder(name).with_repetition(repetition).with_fields(fields);
    let message = group("element", Repetition::REQUIRED, vec![text("role")?, text("content")?]).build()?;
    let list = group("list", Repetition::REPEATED, vec![Arc::new(message)]).build()?;
    let column = group(name, Repetition::REQUIRED, vec![Arc::new(list)]);
    let column = column.with_converted_type(ConvertedType::LIST).with_logical_type(Some(LogicalType::List));
    column.build().map(Arc::new)
}
