//! Reads the rows of a Parquet file as JSON.

use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bytes::Bytes;
use parquet::basic::{Compression, Type as PhysicalType};
use parquet::column::page::Page;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::reader::TreeBuilder;
use parquet::record::{Field, Row};
use parquet::schema::types::{SchemaDescriptor, Type};
use serde_json::{Map, Number, Value};

use super::bounds::{claims_of, expect_readable_footer, longest_text};
use crate::panics::caught;

/// What every Parquet file begins with.
const MAGIC: &[u8] = b"PAR1";
/// Most bytes of a row, as of a line of JSON.
const MAX_ROW_BYTES: usize = 1 << 20;
/// Most bytes of all rows.
const MAX_BYTES: usize = 1 << 30;
/// Bytes that a value counts for beside its text.
const VALUE_BYTES: usize = 64;
/// Bytes that a row or a struct counts for beside its values: a map allocates room for several.
const MAP_BYTES: usize = 640;
/// Most bytes that decoding a row group needs at one time.
const MAX_DECODED_BYTES: u64 = 1 << 30;
/// Floating-point numbers up to here are exact integers.
const MAX_EXACT: f64 = (1_u64 << 53) as f64;
/// Rows decoded at one time.
const NUM_BATCHED: usize = 256;

/// Whether these are the bytes of a Parquet file.
pub(crate) fn is_parquet(file: &[u8]) -> bool {
    file.starts_with(MAGIC)
}

/// Reads the rows of a file: the columns with these names, the others are ignored. Returns each row with its number, from 1.
///
/// # Errors
/// What is wrong with the file, a row, or a column of it. A file that claims to need more memory than there is reason for is refused.
pub(crate) fn records(file: Vec<u8>, columns: &[&str]) -> Result<Vec<(usize, Value)>> {
    // The reader panics on some damaged files.
    caught(|| read(Bytes::from(file), columns))
        .unwrap_or_else(|panic| Err(anyhow!("expected a Parquet file that can be read, got one that cannot: {panic}")))
}

fn read(file: Bytes, columns: &[&str]) -> Result<Vec<(usize, Value)>> {
    expect_readable_footer(&file)?;
    let reader = SerializedFileReader::new(file.clone()).context("read the metadata of the Parquet file")?;
    let root = reader.metadata().file_metadata().schema();
    let present = |field: &&Arc<Type>| columns.contains(&field.name());
    let fields: Vec<Arc<Type>> = root.get_fields().iter().filter(present).cloned().collect();
    if fields.is_empty() {
        let names: Vec<String> = root.get_fields().iter().take(20).map(|field| format!("{:?}", field.name())).collect();
        bail!("expected one of the columns {}, got {}", columns.join(", "), names.join(", "));
    }
    expect_bounded(&file, &reader, columns)?;
    let schema = Type::group_type_builder(root.name()).with_fields(fields).build()?;
    let schema = Arc::new(SchemaDescriptor::new(Arc::new(schema)));
    let mut budget = MAX_BYTES;
    let mut records = Vec::new();
    for index in 0..reader.num_row_groups() {
        let row_group = reader.get_row_group(index)?;
        let rows = TreeBuilder::new().with_batch_size(NUM_BATCHED).as_iter(schema.clone(), row_group.as_ref());
        for row in rows.with_context(|| format!("row {}", records.len() + 1))? {
            let number = records.len() + 1;
            let (record, num_bytes) =
                row.map_err(Into::into).and_then(record).with_context(|| format!("row {number}"))?;
            let left = budget.checked_sub(num_bytes);
            budget = left.with_context(|| format!("expected rows of up to {MAX_BYTES} bytes in all, got more"))?;
            records.push((number, record));
        }
    }
    Ok(records)
}

/// Checks that the row groups lie within the file, none upon another, and that their pages need bounded memory.
fn expect_bounded(file: &Bytes, reader: &SerializedFileReader<Bytes>, columns: &[&str]) -> Result<()> {
    let mut num_stored = 0;
    for (index, row_group) in reader.metadata().row_groups().iter().enumerate() {
        let mut num_bytes = 0_u64;
        let expect_few = |num_bytes: u64| {
            ensure!(
                num_bytes <= MAX_DECODED_BYTES,
                "row group {index}: expected pages that need up to {MAX_DECODED_BYTES} bytes at one time, got {num_bytes}: \
                 write the file with smaller row groups"
            );
            Ok(())
        };
        for (number, column) in row_group.columns().iter().enumerate() {
            let path = column.column_path();
            if !path.parts().first().is_some_and(|name| columns.contains(&name.as_str())) {
                continue;
            }
            let place = || format!("row group {index}, column {path}");
            let compression = column.compression();
            ensure!(
                matches!(compression, Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_)),
                "{}: expected no compression, SNAPPY or ZSTD, got {}",
                place(),
                compression.to_string().split('(').next().unwrap_or_default()
            );
            let start = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
            let range = usize::try_from(start).ok().zip(usize::try_from(column.compressed_size()).ok());
            let chunk = range.and_then(|(start, length)| file.get(start..start.checked_add(length)?));
            let chunk = chunk.with_context(|| format!("{}: expected a place within the file, got another", place()))?;
            num_stored += chunk.len();
            let is_repeated = column.column_descr().max_rep_level() > 0;
            let name_bytes = path.parts().iter().map(|name| name.len() as u64).sum();
            let claims = claims_of(chunk, is_repeated.then_some(name_bytes)).with_context(place)?;
            num_bytes += claims.num_bytes;
            expect_few(num_bytes)?;
            let num_rows = row_group.num_rows();
            ensure!(
                is_repeated || Ok(claims.num_values) == u64::try_from(num_rows),
                "{}: expected {num_rows} values, one in every row, got {}",
                place(),
                claims.num_values
            );
            if is_repeated && claims.num_indices > 0 {
                // A row may hold any text of the dictionary as often as there are values.
                let longest = longest_of(reader, (index, number)).with_context(place)?;
                num_bytes = num_bytes.saturating_add(longest.saturating_mul(claims.num_indices));
                expect_few(num_bytes)?;
            }
        }
    }
    ensure!(num_stored <= file.len(), "expected row groups apart from each other, got some that overlap");
    Ok(())
}

/// Returns the length of the longest text in the dictionary of a column, given the numbers of its row group and of it.
fn longest_of(reader: &SerializedFileReader<Bytes>, (row_group, column): (usize, usize)) -> Result<u64> {
    let row_group = reader.get_row_group(row_group)?;
    let described = row_group.metadata().column(column).column_descr();
    match described.physical_type() {
        PhysicalType::BYTE_ARRAY => match row_group.get_column_page_reader(column)?.get_next_page()? {
            Some(Page::DictionaryPage { buf, .. }) => longest_text(&buf),
            _ => bail!("expected the dictionary first, got another page"),
        },
        PhysicalType::FIXED_LEN_BYTE_ARRAY => Ok(u64::try_from(described.type_length())?),
        _ => Ok(0),
    }
}

/// Returns a row as JSON, without the fields that have no value, and the bytes that it counts for.
fn record(row: Row) -> Result<(Value, usize)> {
    let mut budget = MAX_ROW_BYTES - MAP_BYTES;
    let mut record = Map::new();
    for (name, field) in row.into_columns() {
        let value = json(field, &mut budget).with_context(|| name.clone())?;
        if !value.is_null() {
            ensure!(record.insert(name.clone(), value).is_none(), "expected one column {name}, got two");
        }
    }
    Ok((Value::Object(record), MAX_ROW_BYTES - budget))
}

/// Returns a value as JSON. Its size is taken off the budget.
fn json(field: Field, budget: &mut usize) -> Result<Value> {
    let own_bytes = match &field {
        Field::Str(text) => text.len(),
        Field::Bytes(bytes) => bytes.len(),
        Field::Group(_) => MAP_BYTES,
        _ => 0,
    };
    *budget = budget
        .checked_sub(VALUE_BYTES + own_bytes)
        .with_context(|| format!("expected a row of up to {MAX_ROW_BYTES} bytes, got a larger one"))?;
    let float = |value: f64| {
        Number::from_f64(value).map(Value::Number).with_context(|| format!("expected a number, got {value}"))
    };
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => value.into(),
        Field::Byte(value) => value.into(),
        Field::Short(value) => value.into(),
        Field::Int(value) => value.into(),
        Field::Long(value) => value.into(),
        Field::UByte(value) => value.into(),
        Field::UShort(value) => value.into(),
        Field::UInt(value) => value.into(),
        Field::ULong(value) => value.into(),
        // By its shortest decimal: 0.1 is not 0.10000000149011612.
        Field::Float(value) => float(value.to_string().parse()?)?,
        // An integer, too, where another row has none: so pandas writes these.
        Field::Double(value) if value.fract() == 0.0 && value.abs() <= MAX_EXACT => (value as i64).into(),
        Field::Double(value) => float(value)?,
        Field::Str(text) => text.into(),
        // Some writers do not say that a text is one.
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).context("expected UTF-8")?.into(),
        Field::Group(row) => {
            let mut fields = Map::new();
            for (name, field) in row.into_columns() {
                let value = json(field, budget).with_context(|| name.clone())?;
                *budget = budget.saturating_sub(name.len());
                fields.insert(name, value);
            }
            Value::Object(fields)
        }
        Field::ListInternal(list) => {
            // The elements cannot be moved out.
            let elements = list.elements().iter().map(|element| json(element.clone(), budget));
            Value::Array(elements.collect::<Result<_>>()?)
        }
        decimal @ Field::Decimal(_) => decimal.to_string().into(),
        Field::MapInternal(_) => bail!("expected text, a number, a list or a struct, got a map"),
        other => bail!("expected text, a number, a list or a struct, got {other}"),
    })
}

#[cfg(test)]
mod tests {
    use language::text::ChatMessage;
    use serde_json::json;

    use super::*;
    use crate::parquet_file::{Cell, TableWriter};

    const COLUMNS: [&str; 3] = ["prompt", "answer", "messages"];

    fn turn(content: &str) -> ChatMessage {
        ChatMessage { role: "user".to_owned(), content: content.to_owned() }
    }

    fn row<'a>(answer: &'a str, turns: &'a [ChatMessage]) -> [(&'static str, Cell<'a>); 3] {
        [("answer", Cell::Text(answer)), ("label", Cell::Text("solved")), ("messages", Cell::Messages(turns))]
    }

    /// Writes rows with an answer, messages, and a column that is ignored.
    fn written(num_rows: usize) -> Vec<u8> {
        let mut file = Vec::new();
        let mut table = TableWriter::new(&mut file, &row("", &[])).unwrap();
        for number in 0..num_rows {
            table.write(&row(&number.to_string(), &vec![turn("é"); number % 3])).unwrap();
        }
        table.finish().unwrap();
        file
    }

    #[test]
    fn rows_are_read_as_they_were_written() {
        let rows = records(written(2_500), &COLUMNS).unwrap();
        assert_eq!(rows.len(), 2_500);
        for (index, (number, row)) in rows.into_iter().enumerate() {
            let turns = vec![json!({"role": "user", "content": "é"}); index % 3];
            assert_eq!((number, row), (index + 1, json!({"answer": index.to_string(), "messages": turns})));
        }
        assert_eq!(records(written(0), &COLUMNS).unwrap(), []);
        let error = records(written(1), &["prompt"]).unwrap_err().to_string();
        assert_eq!(error, r#"expected one of the columns prompt, got "answer", "label", "messages""#);
    }

    #[test]
    fn a_row_has_up_to_a_mebibyte() {
        let longest = MAX_ROW_BYTES - MAP_BYTES - VALUE_BYTES;
        for (length, is_read) in [(longest, true), (longest + 1, false)] {
            let (mut file, text) = (Vec::new(), "a".repeat(length));
            let row = [("prompt", Cell::Text(&text))];
            let mut table = TableWriter::new(&mut file, &row).unwrap();
            table.write(&[("prompt", Cell::Text("short"))]).unwrap();
            table.write(&row).unwrap();
            table.finish().unwrap();
            let read = records(file, &COLUMNS);
            assert_eq!(read.is_ok(), is_read);
            if let Err(error) = read {
                assert_eq!(
                    format!("{error:#}"),
                    "row 2: prompt: expected a row of up to 1048576 bytes, got a larger one"
                );
            }
        }
    }

    /// The rows have an answer, and messages: their roles, which are "user", and what they say, "é".
    #[test]
    fn the_longest_text_of_a_dictionary_is_found() {
        let reader = SerializedFileReader::new(Bytes::from(written(9))).unwrap();
        let row_group = &reader.metadata().row_groups()[0];
        let paths: Vec<String> = row_group.columns().iter().map(|column| column.column_path().string()).collect();
        let of = |end: &str| longest_of(&reader, (0, paths.iter().position(|path| path.ends_with(end)).unwrap()));
        assert_eq!(["answer", "role", "content"].map(|end| of(end).unwrap()), [1, 4, 2], "{paths:?}");
    }

    /// Every change of one byte, and every length, gives rows or an error: no panic, and no memory without end.
    #[test]
    fn damaged_files_are_read_or_refused() {
        let file = written(4);
        let (mut num_read, mut num_refused) = (0, 0);
        let mut read = |file: Vec<u8>| match records(file, &COLUMNS) {
            Ok(_) => num_read += 1,
            Err(error) => num_refused += usize::from(!error.to_string().is_empty()),
        };
        for index in 0..file.len() {
            for change in [0x80, 0x01, 0xff] {
                let mut damaged = file.clone();
                damaged[index] ^= change;
                read(damaged);
            }
            read(file[..index].to_vec());
        }
        assert!(num_read > 100 && num_refused > 2 * file.len(), "{num_read} {num_refused}");
    }
}
