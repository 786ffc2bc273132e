//! Reading a journal: its intact records, in order, and its damage.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use proto::Digest;

use super::{
    Damage, FORMAT, HEADER_BYTES, LAST_RECORD_TYPE, OPENING, Place, Record, RecordError, record_hash, segment_path,
    version5,
};
use crate::{Error, Manifest};

const MAX_RECORD_BYTES: u64 = 1 << 30;
/// Maximum body length of a record that is found again after a damaged one.
const MAX_SOUGHT_BYTES: usize = 1 << 20;

/// Reads a journal, even while a run writes it.
#[derive(Debug)]
pub struct JournalReader {
    segments: Segments,
    next_segment: usize,
    file: Option<BufReader<File>>,
    offset: u64,
    last: Option<Place>,
    /// Whether it has read records of an older version: these can be inspected, but no run resumes from them.
    is_old: bool,
}

impl JournalReader {
    /// Opens a journal at its first record.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when a segment is missing.
    pub fn open(folder: &Path) -> Result<JournalReader, Error> {
        let segments = Segments::of(folder)?;
        Ok(JournalReader { segments, next_segment: 0, file: None, offset: 0, last: None, is_old: false })
    }

    /// Opens a journal after a record; `None` if it has no such record.
    ///
    /// # Errors
    /// As [`JournalReader::open`].
    pub fn open_behind(folder: &Path, record: Place) -> Result<Option<JournalReader>, Error> {
        let segments = Segments::of(folder)?;
        let Some(index) = record.segment.checked_sub(segments.first).map(|index| index as usize) else {
            return Ok(None);
        };
        let Some(path) = segments.paths.get(index) else { return Ok(None) };
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        let mut header_at = |start: u64| {
            let header = file.seek(SeekFrom::Start(start)).and_then(|_| read_header(&mut file));
            header.map_err(Error::io("read", path))
        };
        let is_it = header_at(record.start)?.is_some_and(|header| {
            header[5..] == *record.hash.as_bytes()
                && record.start + HEADER_BYTES as u64 + body_bytes(&header) == record.end
        });
        // The record may be damaged while later ones are intact.
        let is_known = is_it || next_record(path, record.start)? == Some(record.end);
        let size_bytes = file.metadata().map_err(Error::io("inspect", path))?.len();
        if !is_known || size_bytes < record.end {
            return Ok(None);
        }
        file.seek(SeekFrom::Start(record.end)).map_err(Error::io("read", path))?;
        let (file, offset, last) = (Some(BufReader::new(file)), record.end, Some(record));
        Ok(Some(JournalReader { segments, next_segment: index + 1, file, offset, last, is_old: false }))
    }

    /// Whether segments before the first one are gone.
    pub fn is_cut_off(&self) -> bool {
        self.segments.first > 0
    }

    /// Returns the last record that was read.
    pub(crate) fn last(&self) -> Option<Place> {
        self.last
    }

    /// Passes every remaining record, in order, to `visit`, and returns the unreadable ones.
    ///
    /// # Errors
    /// As [`JournalReader::next`].
    pub fn read(&mut self, mut visit: impl FnMut(Record)) -> Result<Damage, Error> {
        let mut damage = Damage::default();
        while let Some(record) = self.next()? {
            damage.unreadable.extend(damage.tail.take());
            match record {
                Ok(record) => visit(record),
                Err(error) => damage.tail = Some(error),
            }
        }
        let tail = damage.tail.take_if(|error| error.is_cut(&self.segments));
        damage.unreadable.extend(std::mem::replace(&mut damage.tail, tail));
        Ok(damage)
    }

    /// Reads the next record; `None` at the end.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for a journal of another version. An unreadable record is not an error of the reader.
    #[expect(clippy::should_implement_trait, reason = "the two kinds of failure do not fit an iterator's item")]
    pub fn next(&mut self) -> Result<Option<Result<Record, RecordError>>, Error> {
        loop {
            if self.file.is_none() {
                let Some(path) = self.segments.paths.get(self.next_segment) else { return Ok(None) };
                self.file = Some(BufReader::new(File::open(path).map_err(Error::io("open", path))?));
                self.next_segment += 1;
                self.offset = 0;
            }
            let index = self.next_segment - 1;
            let path = self.segments.paths[index].clone();
            let file = self.file.as_mut().expect("a segment is open");
            let damaged = RecordError { segment: path.clone(), offset: self.offset, truncated: false, foreign: false };
            let mut header = [0; HEADER_BYTES];
            let header_bytes = read_up_to(file, &mut header).map_err(Error::io("read", &path))?;
            if header_bytes == 0 {
                self.file = None;
                continue;
            }
            let length = body_bytes(&header);
            let mut body = Vec::new();
            if header_bytes == HEADER_BYTES && length <= MAX_RECORD_BYTES {
                file.take(length).read_to_end(&mut body).map_err(Error::io("read", &path))?;
            }
            let is_whole = header_bytes == HEADER_BYTES && body.len() as u64 == length;
            let hash = record_hash(header[4], &body);
            if is_whole && header[5..] == hash {
                let (segment, start) = (self.segments.first + index as u64, self.offset);
                self.offset += HEADER_BYTES as u64 + length;
                self.last = Some(Place { segment, start, end: self.offset, hash: Digest::from_bytes(hash) });
                let (version, record) = decode(&body);
                self.is_old |= version == version5::FORMAT.version;
                if record.is_none() && ![FORMAT, version5::FORMAT].map(|format| format.version).contains(&version) {
                    return Err(other_version(path, format!("version {version}")));
                }
                return Ok(Some(record.ok_or(RecordError { foreign: true, ..damaged })));
            }
            // The length may be wrong, so the next record is found by its hash. So is this record, if its end was written while
            // it was read.
            let start = damaged.offset + u64::from(is_whole);
            if let Some(next) = next_record(&path, start)? {
                self.offset = next;
                file.seek(SeekFrom::Start(next)).map_err(Error::io("read", &path))?;
                if next == damaged.offset {
                    continue;
                }
                return Ok(Some(Err(damaged)));
            }
            self.file = None;
            let is_last_segment = self.next_segment == self.segments.paths.len();
            return Ok(Some(Err(RecordError { truncated: !is_whole && is_last_segment, ..damaged })));
        }
    }
}

impl RecordError {
    /// Whether opening the journal for appending removes the record, if none follows it.
    fn is_cut(&self, segments: &Segments) -> bool {
        !self.foreign && Some(&self.segment) == segments.paths.last()
    }
}

/// Passes every record of a journal, in order, to `visit`, and returns the unreadable ones. Changes nothing.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] when a segment is missing or of another version.
pub fn read_journal(folder: &Path, visit: impl FnMut(Record)) -> Result<Damage, Error> {
    JournalReader::open(folder)?.read(visit)
}

/// Reads the manifest of a run from the first record of its journal; `None` if there is no record yet.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] when the first record is not a manifest or cannot be read.
pub(crate) fn read_manifest(folder: &Path) -> Result<Option<Manifest>, Error> {
    let mut reader = JournalReader::open(folder)?;
    let first = reader.next()?;
    let manifest = first.as_ref().and_then(|first| first.as_ref().ok()).and_then(Record::manifest);
    // The journal of a run that was killed at its start ends inside the first record.
    let is_cut = |error: &RecordError| error.is_cut(&reader.segments);
    let has_begun = match &first {
        None => false,
        Some(Ok(_)) => true,
        Some(Err(error)) => !is_cut(error) || reader.next()?.is_some(),
    };
    if manifest.is_none() && has_begun {
        return Err(Error::File {
            path: folder.to_owned(),
            expected: "a journal that begins with a readable manifest".to_owned(),
            got: "none".to_owned(),
        });
    }
    if reader.is_old {
        let got =
            format!("version {}, which `inspect` can read but a run cannot resume from", version5::FORMAT.version);
        return Err(other_version(folder.to_owned(), got));
    }
    Ok(manifest.cloned())
}

/// The segments of a journal, in order.
#[derive(Debug, Default)]
pub(super) struct Segments {
    /// Number of the first segment.
    pub(super) first: u64,
    pub(super) paths: Vec<PathBuf>,
}

impl Segments {
    /// Finds the segments of a journal. Those before a later opening record may be gone. If their removal was interrupted, the
    /// ones that are left are not read.
    pub(super) fn of(folder: &Path) -> Result<Segments, Error> {
        let mut found = list_segments(folder)?;
        let begins = found.windows(2).rposition(|pair| pair[1].0 != pair[0].0 + 1).map_or(0, |gap| gap + 1);
        let mut missing = found.get(begins).map(|(index, _)| *index).filter(|index| *index > 0);
        found.drain(..begins);
        while let (Some(index), Some((_, path))) = (missing, found.first()) {
            if has_opening(path)? {
                missing = None;
            } else if found.len() > 1 {
                found.remove(0);
            } else {
                return Err(Error::File {
                    path: folder.to_owned(),
                    expected: format!("the segment {}", segment_path(folder, index - 1).display()),
                    got: segment_path(folder, index).display().to_string(),
                });
            }
        }
        let first = found.first().map_or(0, |(index, _)| *index);
        Ok(Segments { first, paths: found.into_iter().map(|(_, path)| path).collect() })
    }
}

/// Lists the existing segments, in order.
pub(super) fn list_segments(folder: &Path) -> Result<Vec<(u64, PathBuf)>, Error> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let path = entry.map_err(Error::io("list", folder))?.path();
        let index = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
        found.extend(index.filter(|index| segment_path(folder, *index) == path).map(|index| (index, path)));
    }
    found.sort();
    Ok(found)
}

/// Whether a segment begins with an opening record.
pub(super) fn has_opening(path: &Path) -> Result<bool, Error> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let header = read_header(&mut file).map_err(Error::io("read", path))?;
    Ok(header.is_some_and(|header| header[4] == OPENING))
}

/// Finds the first whole record of a segment at or after `start`.
fn next_record(path: &Path, start: u64) -> Result<Option<u64>, Error> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let is_record = |at: &usize| {
        let Some((header, rest)) = bytes[*at..].split_at_checked(HEADER_BYTES) else { return false };
        let length = body_bytes(header) as usize;
        // Longer records are not sought: hashing as much as any four bytes might mean as a length would take hours.
        let is_plausible = header[4] <= LAST_RECORD_TYPE && length <= MAX_SOUGHT_BYTES;
        is_plausible && rest.get(..length).is_some_and(|body| header[5..] == record_hash(header[4], body))
    };
    Ok((start as usize..bytes.len()).find(is_record).map(|at| at as u64))
}

fn body_bytes(header: &[u8]) -> u64 {
    u32::from_le_bytes([header[0], header[1], header[2], header[3]]).into()
}

/// Reads the header of a record; `None` if there are fewer bytes.
fn read_header(file: &mut impl Read) -> std::io::Result<Option<[u8; HEADER_BYTES]>> {
    let mut header = [0; HEADER_BYTES];
    Ok((read_up_to(file, &mut header)? == HEADER_BYTES).then_some(header))
}

fn read_up_to(file: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Decodes a record; also returns its version. The record is `None` if this build cannot decode it.
fn decode(body: &[u8]) -> (u8, Option<Record>) {
    let Ok(bytes) = zstd::stream::decode_all(body) else { return (FORMAT.version, None) };
    match FORMAT.decode(&bytes) {
        Err(proto::Error::Version { got, .. }) if got == version5::FORMAT.version => {
            (got, version5::FORMAT.decode::<version5::Record>(&bytes).ok().map(Record::from))
        }
        Err(proto::Error::Version { got, .. }) => (got, None),
        decoded => (FORMAT.version, decoded.ok()),
    }
}

fn other_version(path: PathBuf, got: String) -> Error {
    Error::File { path, expected: format!("a journal of version {}", FORMAT.version), got }
}
