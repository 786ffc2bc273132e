//! What a Parquet file says about its own lengths, checked before anything is decoded: the reader allocates what a file claims to
//! need.

use anyhow::{Context as _, Result, bail, ensure};

/// Most elements of a schema, which the reader walks by recursion.
const MAX_SCHEMA_ELEMENTS: u64 = 2_000;
/// Most bytes of the name of an element, and of all names.
const MAX_NAME_BYTES: u64 = 256;
const MAX_NAMES_BYTES: u64 = 1 << 16;
/// Bytes of a decoded value beside those of its text, with its levels.
const VALUE_BYTES: u64 = 40;
/// Bytes of a value in a list beside those of its text and its name: the reader makes a struct with names of each element.
const ELEMENT_BYTES: u64 = 200;
/// Deepest nesting of what is skipped.
const MAX_DEPTH: u32 = 32;

/// Checks that a file ends with metadata whose schema is of a size that can be walked.
pub(super) fn expect_readable_footer(file: &[u8]) -> Result<()> {
    let tail = file.len().checked_sub(8).filter(|_| file.ends_with(b"PAR1"));
    let tail = tail.context("expected a Parquet file that ends with PAR1, got one that is cut off or damaged")?;
    let length = u32::from_le_bytes(file[tail..tail + 4].try_into().expect("four bytes")) as usize;
    let start = tail.checked_sub(length).filter(|start| *start >= 4);
    let start = start.with_context(|| {
        format!("expected metadata within the {} bytes of the file, got {length} bytes", file.len())
    })?;
    let mut thrift = Thrift { rest: &file[start..tail] };
    let schema = thrift.fields(0, &mut |thrift, field, kind| match (field, kind) {
        (SCHEMA, LIST) => expect_readable_schema(thrift).map(|()| true),
        (SCHEMA, _) => bail!("its schema is no list"),
        _ => Ok(false),
    });
    schema.context("the metadata of the Parquet file is damaged")?;
    Ok(())
}

/// Checks the number of elements of a schema, their names, and how many others each says to hold: the reader allocates room for these,
/// and copies names for every value.
fn expect_readable_schema(thrift: &mut Thrift<'_>) -> Result<()> {
    let (num_elements, kind) = thrift.list()?;
    ensure!(
        kind == STRUCT && num_elements <= MAX_SCHEMA_ELEMENTS,
        "expected a schema of up to {MAX_SCHEMA_ELEMENTS} elements, got {num_elements}"
    );
    let mut name_bytes = 0;
    for _ in 0..num_elements {
        thrift.fields(1, &mut |thrift, field, kind| match (field, kind) {
            (ELEMENT_NAME, BINARY) => {
                let length = thrift.varint()?;
                ensure!(length <= MAX_NAME_BYTES, "expected names of up to {MAX_NAME_BYTES} bytes, got {length}");
                name_bytes += length;
                thrift.take(usize::try_from(length)?).map(|_| true)
            }
            (ELEMENT_CHILDREN, I32) => {
                let number = thrift.integer()?;
                let is_possible = u64::try_from(number).is_ok_and(|number| number < num_elements);
                ensure!(is_possible, "expected up to {num_elements} elements within one, got {number}");
                Ok(true)
            }
            (ELEMENT_NAME | ELEMENT_CHILDREN, _) => bail!("an element of the schema has a field of another type"),
            _ => Ok(false),
        })?;
    }
    ensure!(
        name_bytes <= MAX_NAMES_BYTES,
        "expected a schema with names of up to {MAX_NAMES_BYTES} bytes in all, got {name_bytes}"
    );
    Ok(())
}

/// Fields of the metadata and of an element of its schema.
const SCHEMA: i64 = 2;
const ELEMENT_NAME: i64 = 4;
const ELEMENT_CHILDREN: i64 = 5;

/// What the pages of a column of a row group say that they hold.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Claims {
    pub(super) num_values: u64,
    /// How many of them may be indices into the dictionary.
    pub(super) num_indices: u64,
    /// Bytes that decoding them needs at one time: the dictionary, the largest page, and if its values are repeated all of them,
    /// since they may belong to one row. Texts of the dictionary are on top of that, as often as a row repeats them.
    pub(super) num_bytes: u64,
}

/// Reads the headers of all pages of a column chunk.
///
/// - `name_bytes`: of a column whose values are repeated, the bytes of its path.
pub(super) fn claims_of(chunk: &[u8], name_bytes: Option<u64>) -> Result<Claims> {
    let mut thrift = Thrift { rest: chunk };
    let (mut num_values, mut num_indices, mut largest, mut dictionary) = (0_u64, 0_u64, 0, None);
    while !thrift.rest.is_empty() {
        let page = Page::read(&mut thrift)?;
        thrift.take(page.num_stored).context("a page is longer than its column")?;
        match page.kind {
            DICTIONARY => {
                let earlier = dictionary.replace(page.num_bytes + VALUE_BYTES * page.num_values);
                ensure!(earlier.is_none(), "expected one dictionary in a column, got two");
            }
            DATA | DATA_V2 => {
                largest = largest.max(page.num_bytes);
                num_values += page.num_values;
                num_indices += if page.has_indices { page.num_values } else { 0 };
            }
            _ => {}
        }
    }
    let repeated = name_bytes.map_or(0, |name_bytes| (ELEMENT_BYTES + name_bytes).saturating_mul(num_values));
    Ok(Claims { num_values, num_indices, num_bytes: (dictionary.unwrap_or(0) + largest).saturating_add(repeated) })
}

/// Returns the length of the longest text of a decoded dictionary, in bytes. Each is behind its length.
pub(super) fn longest_text(mut dictionary: &[u8]) -> Result<u64> {
    let mut longest = 0;
    while let Some((length, rest)) = dictionary.split_first_chunk() {
        let length = u32::from_le_bytes(*length);
        let text = usize::try_from(length).ok().and_then(|length| rest.split_at_checked(length));
        dictionary = text.context("a text of a dictionary is longer than the dictionary")?.1;
        longest = longest.max(length.into());
    }
    Ok(longest)
}

/// Kinds of pages.
const DATA: i64 = 0;
const DICTIONARY: i64 = 2;
const DATA_V2: i64 = 3;

/// Encodings of values whose decoders allocate what the header of the page says. Others, such as `DELTA_BYTE_ARRAY`, allocate a count
/// that the body of the page holds.
const PLAIN: i64 = 0;
const PLAIN_DICTIONARY: i64 = 2;
const RLE: i64 = 3;
const RLE_DICTIONARY: i64 = 8;

/// The names of encodings, by number. The format defines no encoding 1.
const ENCODINGS: [&str; 10] = [
    "PLAIN",
    "1",
    "PLAIN_DICTIONARY",
    "RLE",
    "BIT_PACKED",
    "DELTA_BINARY_PACKED",
    "DELTA_LENGTH_BYTE_ARRAY",
    "DELTA_BYTE_ARRAY",
    "RLE_DICTIONARY",
    "BYTE_STREAM_SPLIT",
];

/// The header of a page.
struct Page {
    kind: i64,
    /// Bytes that it has when it is decompressed.
    num_bytes: u64,
    /// Bytes that it has in the file.
    num_stored: usize,
    num_values: u64,
    /// Whether its values are indices into the dictionary.
    has_indices: bool,
}

impl Page {
    fn read(thrift: &mut Thrift<'_>) -> Result<Page> {
        let (mut kind, mut num_bytes, mut num_stored) = (None, None, None);
        let (mut num_values, mut encoding) = (None, None);
        thrift.fields(0, &mut |thrift, field, field_kind| {
            let known = match (field, field_kind) {
                (1, I32) => &mut kind,
                (2, I32) => &mut num_bytes,
                (3, I32) => &mut num_stored,
                // The header of a data page, a dictionary, or a data page of version 2: all begin with the number of values.
                (5 | 7 | 8, STRUCT) => {
                    let place_of_encoding = if field == 8 { 4 } else { 2 };
                    thrift.fields(1, &mut |thrift, field, kind| {
                        let (known, name) = match (field, kind) {
                            (1, _) => (&mut num_values, "number of values"),
                            (place, _) if place == place_of_encoding => (&mut encoding, "encoding"),
                            _ => return Ok(false),
                        };
                        ensure!(kind == I32, "a page gives its {name} in another type");
                        *known = Some(thrift.integer()?);
                        Ok(true)
                    })?;
                    return Ok(true);
                }
                (1..=3 | 5 | 7 | 8, _) => bail!("a page gives its field {field} in another type"),
                _ => return Ok(false),
            };
            *known = Some(thrift.integer()?);
            Ok(true)
        })?;
        let kind = kind.context("a page has no kind")?;
        ensure!((DATA..=DATA_V2).contains(&kind), "expected a page of kind {DATA} to {DATA_V2}, got {kind}");
        let count = |count: Option<i64>| {
            let count = count.filter(|count| (0..=i32::MAX.into()).contains(count));
            count.with_context(|| "a page has no length, or one below 0".to_owned())
        };
        let has_values = [DATA, DICTIONARY, DATA_V2].contains(&kind);
        let num_values = if has_values { count(num_values)? } else { 0 };
        let encoding = if has_values { encoding.context("a page has no encoding")? } else { PLAIN };
        ensure!(
            [PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY].contains(&encoding),
            "expected values encoded as PLAIN, RLE or indices into a dictionary, got {}: write the file with another encoding",
            usize::try_from(encoding).ok().and_then(|encoding| ENCODINGS.get(encoding)).unwrap_or(&"an unknown one")
        );
        Ok(Page {
            kind,
            num_bytes: count(num_bytes)? as u64,
            num_stored: count(num_stored)? as usize,
            num_values: num_values as u64,
            has_indices: [PLAIN_DICTIONARY, RLE_DICTIONARY].contains(&encoding),
        })
    }
}

/// Kinds of fields.
const I32: u8 = 5;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// The compact protocol of Thrift, of which a field is read or skipped.
///
/// Source: <https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md>
#[derive(Debug)]
struct Thrift<'a> {
    rest: &'a [u8],
}

/// Reads the value of a field, given its number and kind, and returns `true`; or reads nothing, and returns `false`.
type ReadField<'f, 'a> = dyn FnMut(&mut Thrift<'a>, i64, u8) -> Result<bool> + 'f;

impl<'a> Thrift<'a> {
    /// Reads a struct. Fields that `read` does not read are skipped.
    fn fields(&mut self, depth: u32, read: &mut ReadField<'_, 'a>) -> Result<()> {
        let mut field = 0_i64;
        loop {
            let head = self.byte()?;
            let (kind, step) = (head & 15, head >> 4);
            if kind == 0 {
                return Ok(());
            }
            let next = if step == 0 { self.integer()? } else { field + i64::from(step) };
            // As all writers do. So no field is there twice, and every reader takes the same number for it.
            ensure!(
                next > field && next <= i16::MAX.into(),
                "expected fields in the order of their numbers, got {next}"
            );
            field = next;
            if !read(self, field, kind)? {
                self.skip(kind, depth)?;
            }
        }
    }

    /// Reads the head of a list. Returns its number of elements and their kind.
    fn list(&mut self) -> Result<(u64, u8)> {
        let head = self.byte()?;
        let num_elements = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
        Ok((num_elements, head & 15))
    }

    fn skip(&mut self, kind: u8, depth: u32) -> Result<()> {
        ensure!(depth < MAX_DEPTH, "expected fields nested up to {MAX_DEPTH} deep, got deeper ones");
        match kind {
            // The kind of a boolean field is its value.
            1 | 2 => {}
            3 => drop(self.take(1)?),
            4..=6 => drop(self.varint()?),
            7 => drop(self.take(8)?),
            BINARY => {
                let length = self.varint()?;
                self.take(usize::try_from(length)?)?;
            }
            LIST | 10 => {
                let (num_elements, kind) = self.list()?;
                expect_plain(num_elements, &[kind])?;
                for _ in 0..num_elements {
                    self.skip(kind, depth + 1)?;
                }
            }
            11 => {
                let num_entries = self.varint()?;
                let kinds = if num_entries > 0 { self.byte()? } else { 0 };
                expect_plain(num_entries, &[kinds >> 4, kinds & 15])?;
                for _ in 0..num_entries {
                    self.skip(kinds >> 4, depth + 1)?;
                    self.skip(kinds & 15, depth + 1)?;
                }
            }
            STRUCT => self.fields(depth + 1, &mut |_, _, _| Ok(false))?,
            13 => drop(self.take(16)?),
            other => bail!("expected a kind of field from 1 to 13, got {other}"),
        }
        Ok(())
    }

    /// Reads an integer with a sign.
    fn integer(&mut self) -> Result<i64> {
        let folded = self.varint()?;
        Ok((folded >> 1) as i64 ^ -((folded & 1) as i64))
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Ok(value);
            }
        }
        bail!("expected an integer of up to 10 bytes, got a longer one")
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let taken = self.rest.split_at_checked(count);
        let (taken, rest) = taken.with_context(|| format!("expected {count} more bytes, got {}", self.rest.len()))?;
        self.rest = rest;
        Ok(taken)
    }
}

/// Checks that elements that are skipped are no booleans, whose size readers do not agree on.
fn expect_plain(num_elements: u64, kinds: &[u8]) -> Result<()> {
    ensure!(
        num_elements == 0 || kinds.iter().all(|kind| *kind > 2),
        "expected no lists of booleans, got {num_elements}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn varint(mut value: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while value >= 128 {
            bytes.push(value as u8 | 128);
            value >>= 7;
        }
        bytes.push(value as u8);
        bytes
    }

    /// Returns an integer of a field so many steps behind the last one.
    fn integer(step: u8, value: i32) -> Vec<u8> {
        let folded = (value << 1) ^ (value >> 31);
        [vec![step << 4 | I32], varint(folded as u32 as u64)].concat()
    }

    /// Returns a page with the header of a kind.
    fn page(kind: i32, num_bytes: i32, stored: &[u8], num_values: i32, encoding: i32) -> Vec<u8> {
        let head = [integer(1, kind), integer(1, num_bytes), integer(1, stored.len() as i32)].concat();
        let (step, step_of_encoding) = match kind {
            0 => (2_u8, 1),
            2 => (4, 1),
            3 => (5, 3),
            _ => (3, 1),
        };
        // A list and a text, which are skipped.
        let skipped = [vec![1 << 4 | LIST, 2 << 4 | 8, 1, b'a', 0], vec![1 << 4 | 8, 2, b'b', b'c']].concat();
        let of_values = [integer(1, num_values), integer(step_of_encoding, encoding), skipped].concat();
        [head, vec![step << 4 | STRUCT], of_values, vec![0, 0], stored.to_vec()].concat()
    }

    #[test]
    fn pages_are_counted() {
        let pages = [
            page(2, 100, b"dict", 3, 0),
            page(0, 50, b"", 7, 8),
            page(1, 9, b"index", 0, 0),
            page(3, 70, b"data", 5, 0),
        ];
        let chunk = pages.concat();
        let claims = claims_of(&chunk, None).unwrap();
        assert_eq!((claims.num_values, claims.num_indices), (12, 7));
        assert_eq!(claims.num_bytes, 100 + 3 * VALUE_BYTES + 70);
        assert_eq!(claims_of(&chunk, Some(9)).unwrap().num_bytes, claims.num_bytes + 12 * (ELEMENT_BYTES + 9));
        let ends: Vec<usize> = (1..pages.len()).map(|count| pages[..count].concat().len()).collect();
        for length in 1..chunk.len() {
            let read = claims_of(&chunk[..length], None);
            assert_eq!(read.is_ok(), ends.contains(&length), "{length}: {read:?}");
        }
    }

    #[test]
    fn texts_of_a_dictionary_lie_within_it() {
        assert_eq!(longest_text(b"\x01\0\0\0a\x03\0\0\0bcd\0\0\0\0").unwrap(), 3);
        assert_eq!(longest_text(b"").unwrap(), 0);
        let error = longest_text(b"\x03\0\0\0bc").unwrap_err();
        assert_eq!(error.to_string(), "a text of a dictionary is longer than the dictionary");
    }

    #[test]
    fn headers_that_cannot_be_true_are_refused() {
        let twice = [integer(1, 0), integer(1, 5), vec![I32, 4], integer(0, 6)[1..].to_vec()].concat();
        let deep = vec![9 << 4 | STRUCT; 100];
        let endless = [vec![9 << 4 | LIST, 15 << 4 | 3], varint(1 << 60)].concat();
        let without_encoding =
            [integer(1, 0), integer(1, 5), integer(1, 0), vec![2 << 4 | STRUCT], integer(1, 1), vec![0, 0]].concat();
        for (header, says) in [
            (page(0, -1, b"", 1, 0), "no length, or one below 0"),
            (page(0, 1, b"", -1, 0), "no length, or one below 0"),
            ([integer(2, 5), vec![0]].concat(), "has no kind"),
            (twice, "expected fields in the order of their numbers, got 2"),
            (deep, "nested up to 32 deep"),
            (endless, "expected 1 more bytes, got 0"),
            (vec![9 << 4 | 14], "expected a kind of field from 1 to 13, got 14"),
            ([vec![1 << 4 | I32], vec![255; 20]].concat(), "up to 10 bytes"),
            ([vec![9 << 4 | 8], varint(u64::MAX)].concat(), "expected 18446744073709551615 more bytes"),
            (without_encoding, "a page has no encoding"),
            (page(4, 1, b"", 1, 0), "expected a page of kind 0 to 3, got 4"),
            ([integer(1, 0), vec![1 << 4 | 6, 2]].concat(), "a page gives its field 2 in another type"),
            ([vec![9 << 4 | LIST, 2 << 4 | 1, 1, 1]].concat(), "expected no lists of booleans, got 2"),
            (page(0, 1, b"", 1, 6), "got DELTA_LENGTH_BYTE_ARRAY"),
            (page(3, 1, b"", 1, 7), "got DELTA_BYTE_ARRAY"),
            (page(0, 1, b"", 1, -1), "got an unknown one"),
            ([page(2, 1 << 30, b"", 1, 0), page(2, 1, b"", 1, 0)].concat(), "expected one dictionary in a column"),
        ] {
            let error = claims_of(&header, None).unwrap_err();
            assert!(format!("{error:#}").contains(says), "{says}: {error:#}");
        }
    }

    #[test]
    fn footers_lie_within_their_file() {
        let file = |footer: &[u8], length: u32| [b"PAR1", footer, &length.to_le_bytes()[..], b"PAR1"].concat();
        let schema = |num_elements| [vec![2 << 4 | LIST, 15 << 4 | STRUCT], varint(num_elements), vec![0; 9]].concat();
        let element = |fields: &[u8]| [&[2 << 4 | LIST, 1 << 4 | STRUCT], fields, &[0, 0]].concat();
        let named =
            |length: u64| element(&[vec![4 << 4 | BINARY], varint(length), vec![b'a'; length as usize]].concat());
        let holding = |number: i32| element(&integer(5, number));
        for (file, says) in [
            (b"PAR1".to_vec(), "ends with PAR1"),
            (file(b"abc", 3)[..10].to_vec(), "ends with PAR1"),
            (file(b"", u32::MAX), "expected metadata within the 12 bytes of the file, got 4294967295 bytes"),
            (file(b"", 1), "expected metadata within"),
            (file(b"\xff", 1), "is damaged"),
            (file(&schema(9)[..8], 8), "is damaged"),
            (file(&schema(1 << 40), schema(1 << 40).len() as u32), "is damaged"),
            (file(&named(257), named(257).len() as u32), "expected names of up to 256 bytes, got 257"),
            (file(&holding(1), holding(1).len() as u32), "expected up to 1 elements within one, got 1"),
            (file(&holding(-1), holding(-1).len() as u32), "expected up to 1 elements within one, got -1"),
            (file(&[2 << 4 | 10, 1 << 4 | STRUCT, 0, 0], 4), "its schema is no list"),
        ] {
            let error = expect_readable_footer(&file).unwrap_err();
            assert!(format!("{error:#}").contains(says), "{says}: {error:#}");
        }
        let footer = |num_elements: u64| {
            [vec![2 << 4 | LIST, 15 << 4 | STRUCT], varint(num_elements), vec![0; num_elements as usize + 1]].concat()
        };
        let of = |num_elements| file(&footer(num_elements), footer(num_elements).len() as u32);
        expect_readable_footer(&of(MAX_SCHEMA_ELEMENTS)).unwrap();
        let error = expect_readable_footer(&of(MAX_SCHEMA_ELEMENTS + 1)).unwrap_err();
        assert!(format!("{error:#}").ends_with(": expected a schema of up to 2000 elements, got 2001"), "{error:#}");
        expect_readable_footer(&file(&named(256), named(256).len() as u32)).unwrap();
    }
}
