//! What a Parquet file says about its own lengths, checked before anything is decoded: the reader allocates what a file claims to
//! need.

use anyhow::{Context as _, Result, bail, ensure};

/// Most elements of a schema, which the reader walks by recursion.
const MAX_SCHEMA_ELEMENTS: u64 = 2_000;
/// Bytes of a decoded value beside those of its text, with its levels.
const VALUE_BYTES: u64 = 40;
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
    let mut num_elements = 0;
    Thrift { rest: &file[start..tail] }
        .fields(0, &mut |thrift, field, kind| {
            if (field, kind) != (2, LIST) {
                return Ok(false);
            }
            // A copy: the list is skipped after that.
            num_elements = Thrift { rest: thrift.rest }.list()?.0;
            Ok(false)
        })
        .context("the metadata of the Parquet file is damaged")?;
    ensure!(
        num_elements <= MAX_SCHEMA_ELEMENTS,
        "expected a schema of up to {MAX_SCHEMA_ELEMENTS} elements, got {num_elements}"
    );
    Ok(())
}

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
pub(super) fn claims_of(chunk: &[u8], is_repeated: bool) -> Result<Claims> {
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
    let repeated = if is_repeated { VALUE_BYTES * num_values } else { 0 };
    Ok(Claims { num_values, num_indices, num_bytes: dictionary.unwrap_or(0) + largest + repeated })
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

/// Encodings of values whose decoders allocate what the header of the page says. Others, such as `DELTA_BYTE_ARRAY`, allocate what
/// the page says.
const PLAIN: i64 = 0;
const PLAIN_DICTIONARY: i64 = 2;
const RLE: i64 = 3;
const RLE_DICTIONARY: i64 = 8;

/// Names of all encodings; a number was never given a meaning.
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
                            (1, I32) => (&mut num_values, "number of values"),
                            (place, I32) if place == place_of_encoding => (&mut encoding, "encoding"),
                            _ => return Ok(false),
                        };
                        let earlier = known.replace(thrift.integer()?);
                        ensure!(earlier.is_none(), "a page gives its {name} twice");
                        Ok(true)
                    })?;
                    return Ok(true);
                }
                _ => return Ok(false),
            };
            let earlier = known.replace(thrift.integer()?);
            ensure!(earlier.is_none(), "a page gives its field {field} twice");
            Ok(true)
        })?;
        let kind = kind.context("a page has no kind")?;
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
            field = if step == 0 { self.integer()? } else { field.wrapping_add(step.into()) };
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
            8 => {
                let length = self.varint()?;
                self.take(usize::try_from(length)?)?;
            }
            LIST | 10 => {
                let (num_elements, kind) = self.list()?;
                for _ in 0..num_elements {
                    self.skip_element(kind, depth + 1)?;
                }
            }
            11 => {
                let num_entries = self.varint()?;
                let kinds = if num_entries > 0 { self.byte()? } else { 0 };
                for _ in 0..num_entries {
                    self.skip_element(kinds >> 4, depth + 1)?;
                    self.skip_element(kinds & 15, depth + 1)?;
                }
            }
            STRUCT => self.fields(depth + 1, &mut |_, _, _| Ok(false))?,
            13 => drop(self.take(16)?),
            other => bail!("expected a kind of field from 1 to 13, got {other}"),
        }
        Ok(())
    }

    /// Skips an element of a list or a map, where a boolean is a byte: so every element has one, and the loop an end.
    fn skip_element(&mut self, kind: u8, depth: u32) -> Result<()> {
        if matches!(kind, 1 | 2) { self.take(1).map(drop) } else { self.skip(kind, depth) }
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
        let claims = claims_of(&chunk, false).unwrap();
        assert_eq!((claims.num_values, claims.num_indices), (12, 7));
        assert_eq!(claims.num_bytes, 100 + 3 * VALUE_BYTES + 70);
        assert_eq!(claims_of(&chunk, true).unwrap().num_bytes, claims.num_bytes + 12 * VALUE_BYTES);
        let ends: Vec<usize> = (1..pages.len()).map(|count| pages[..count].concat().len()).collect();
        for length in 1..chunk.len() {
            let read = claims_of(&chunk[..length], false);
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
        let deep = vec![1 << 4 | STRUCT; 100];
        let endless = [vec![9 << 4 | LIST, 15 << 4 | 1], varint(1 << 60)].concat();
        let without_encoding =
            [integer(1, 0), integer(1, 5), integer(1, 0), vec![2 << 4 | STRUCT], integer(1, 1), vec![0, 0]].concat();
        for (header, says) in [
            (page(0, -1, b"", 1, 0), "no length, or one below 0"),
            (page(0, 1, b"", -1, 0), "no length, or one below 0"),
            ([integer(2, 5), vec![0]].concat(), "has no kind"),
            (twice, "a page gives its field 2 twice"),
            (deep, "nested up to 32 deep"),
            (endless, "expected 1 more bytes, got 0"),
            (vec![1 << 4 | 14], "expected a kind of field from 1 to 13, got 14"),
            ([vec![1 << 4 | I32], vec![255; 20]].concat(), "up to 10 bytes"),
            ([vec![9 << 4 | 8], varint(u64::MAX)].concat(), "expected 18446744073709551615 more bytes"),
            (without_encoding, "a page has no encoding"),
            (page(0, 1, b"", 1, 6), "got DELTA_LENGTH_BYTE_ARRAY"),
            (page(3, 1, b"", 1, 7), "got DELTA_BYTE_ARRAY"),
            (page(0, 1, b"", 1, -1), "got an unknown one"),
            ([page(2, 1 << 30, b"", 1, 0), page(2, 1, b"", 1, 0)].concat(), "expected one dictionary in a column"),
        ] {
            let error = claims_of(&header, false).unwrap_err();
            assert!(format!("{error:#}").contains(says), "{says}: {error:#}");
        }
    }

    #[test]
    fn footers_lie_within_their_file() {
        let file = |footer: &[u8], length: u32| [b"PAR1", footer, &length.to_le_bytes()[..], b"PAR1"].concat();
        let schema = |num_elements| [vec![2 << 4 | LIST, 15 << 4 | STRUCT], varint(num_elements), vec![0; 9]].concat();
        for (file, says) in [
            (b"PAR1".to_vec(), "ends with PAR1"),
            (file(b"abc", 3)[..10].to_vec(), "ends with PAR1"),
            (file(b"", u32::MAX), "expected metadata within the 12 bytes of the file, got 4294967295 bytes"),
            (file(b"", 1), "expected metadata within"),
            (file(b"\xff", 1), "is damaged"),
            (file(&schema(9)[..8], 8), "is damaged"),
            (file(&schema(1 << 40), schema(1 << 40).len() as u32), "is damaged"),
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
        assert_eq!(error.to_string(), "expected a schema of up to 2000 elements, got 2001");
    }
}
