//! The journal, a run's source of truth: append-only segments of records `[length | type | blake3 | zstd(postcard)]`.
//!
//! Records are atomic. Opening the journal for appending drops a bad record at its end, left by a crash or disk damage. A record
//! whose hash does not match and that others follow is reported and skipped.

mod reader;
mod records;
mod version5;

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use proto::Digest;
use proto::wire::Format;
use serde::{Deserialize, Serialize};

use self::reader::{Segments, has_opening, list_segments};
use crate::Error;
use crate::run_lock::expect_in_place;

pub(crate) use self::reader::read_manifest;
pub use self::reader::{JournalReader, read_journal};
pub use self::records::{BanRecord, EvalRecord, GroupRecord, Known, Opening, Record, StepRecord};

/// The format of an uncompressed record body. Of older versions, 5 is read for inspection; others are refused.
pub(crate) const FORMAT: Format = Format { name: "journal", version: 6 };

/// A record that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RecordError {
    /// Path of the segment.
    pub segment: PathBuf,
    /// Byte offset in the segment.
    pub offset: u64,
    /// Whether the journal ends inside the record; otherwise its bytes do not match its hash or its length is wrong.
    pub truncated: bool,
    /// Whether its bytes are intact, but a build with another format wrote them.
    pub foreign: bool,
}

/// The position of a record; reading can continue at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Number of the segment.
    segment: u64,
    /// Byte offsets of the record's start and end.
    start: u64,
    end: u64,
    /// The record's hash: another journal has a different record there.
    hash: Digest,
}

impl Place {
    /// Returns the number of the segment.
    pub(crate) fn segment(&self) -> u64 {
        self.segment
    }

    #[cfg(test)]
    pub(crate) fn test() -> Place {
        Place { segment: 3, start: 100, end: 300, hash: Digest::of_bytes(b"record") }
    }
}

/// The records of a journal that cannot be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Damage {
    /// A bad record at the end, which [`Journal::open`] removes.
    pub tail: Option<RecordError>,
    /// All others.
    pub unreadable: Vec<RecordError>,
}

const HEADER_BYTES: usize = 4 + 1 + 32;
const SEGMENT_BYTES: u64 = 64 << 20;
const LAST_RECORD_TYPE: u8 = OPENING;
const OPENING: u8 = 7;

/// A journal open for appending.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    segment_index: u64,
    path: PathBuf,
    file: BufWriter<File>,
    size_bytes: u64,
    /// Position of the last record.
    last: Option<Place>,
    /// Whether the segment holds only its opening record.
    is_new: bool,
}

impl Journal {
    /// Creates a journal in an empty folder, or opens the existing one for appending after its last record. `damage` is the
    /// result of [`JournalReader::read`]. Also returns the number of bytes removed from its end.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when a segment is missing.
    pub fn open(folder: &Path, damage: &Damage, last: Option<Place>) -> Result<(Journal, u64), Error> {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let truncated_bytes = match &damage.tail {
            Some(RecordError { segment, offset, .. }) => cut(segment, *offset)?,
            None => 0,
        };
        let segments = Segments::of(folder)?;
        let segment_index = segments.first + (segments.paths.len() as u64).saturating_sub(1);
        let (path, file, size_bytes) = open_segment(folder, segment_index)?;
        let folder = folder.to_owned();
        Ok((Journal { folder, segment_index, path, file, size_bytes, last, is_new: false }, truncated_bytes))
    }

    /// Returns the path of the segment that is written.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the position of the last record, if there is one.
    pub(crate) fn last(&self) -> Option<Place> {
        self.last
    }

    /// Adds a record; it is durable after the next [`Journal::sync`].
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn append(&mut self, record: &Record) -> Result<(), Error> {
        let body =
            zstd::bulk::compress(&FORMAT.encode(record), 1).map_err(Error::io("compress a record for", &self.path))?;
        let hash = record_hash(record_type(record), &body);
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend((body.len() as u32).to_le_bytes());
        header.push(record_type(record));
        header.extend(hash);
        self.file
            .write_all(&header)
            .and_then(|()| self.file.write_all(&body))
            .map_err(Error::io("write", &self.path))?;
        let start = self.size_bytes;
        self.size_bytes += (header.len() + body.len()) as u64;
        let (segment, end, hash) = (self.segment_index, self.size_bytes, Digest::from_bytes(hash));
        self.last = Some(Place { segment, start, end, hash });
        self.is_new = false;
        Ok(())
    }

    /// Makes everything durable; starts a new segment when this one is full.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when the segment was moved or removed: records since the last success must not be taken
    /// as written.
    pub fn sync(&mut self) -> Result<(), Error> {
        self.write_out()?;
        if self.size_bytes >= SEGMENT_BYTES { self.begin_segment() } else { Ok(()) }
    }

    /// Starts a new segment with an opening record that replaces the earlier segments, and makes everything durable. Starts none
    /// if the current segment holds only its opening.
    ///
    /// # Errors
    /// As [`Journal::sync`].
    pub fn cut(&mut self, opening: Opening) -> Result<(), Error> {
        self.write_out()?;
        if self.is_new {
            return Ok(());
        }
        self.begin_segment()?;
        self.append(&Record::Opening(Box::new(opening)))?;
        self.is_new = true;
        self.write_out()
    }

    /// Makes added records durable. The file at the path must be the open one and hold exactly what was written to it.
    fn write_out(&mut self) -> Result<(), Error> {
        expect_in_place(&self.path, self.file.get_ref())?;
        self.file.flush().map_err(Error::io("write", &self.path))?;
        let file = self.file.get_ref();
        let size_bytes = file.metadata().map_err(Error::io("inspect", &self.path))?.len();
        if size_bytes != self.size_bytes {
            let (path, expected) =
                (self.path.clone(), format!("{} bytes, as written by this process", self.size_bytes));
            return Err(Error::File {
                path,
                expected,
                got: format!("{size_bytes} bytes: another process changed the file"),
            });
        }
        file.sync_data().map_err(Error::io("sync", &self.path))
    }

    fn begin_segment(&mut self) -> Result<(), Error> {
        self.segment_index += 1;
        (self.path, self.file, self.size_bytes) = open_segment(&self.folder, self.segment_index)?;
        Ok(())
    }
}

/// Removes the segments before the last one, up to segment `needed`, that has an opening record.
pub(crate) fn forget_before(folder: &Path, needed: u64) -> Result<(), Error> {
    let segments = Segments::of(folder)?;
    let mut first = None;
    for (index, path) in (segments.first..=needed).zip(&segments.paths) {
        if has_opening(path)? {
            first = Some(index);
        }
    }
    let Some(first) = first else { return Ok(()) };
    let is_old = |(index, _): &(u64, PathBuf)| *index < first;
    let old: Vec<_> = list_segments(folder)?.into_iter().filter(is_old).collect();
    for (_, path) in &old {
        std::fs::remove_file(path).map_err(Error::io("remove", path))?;
    }
    if old.is_empty() { Ok(()) } else { sync_folder(folder) }
}

/// Truncates a file to `size_bytes`; returns the number of bytes removed.
fn cut(path: &Path, size_bytes: u64) -> Result<u64, Error> {
    let file = OpenOptions::new().write(true).open(path).map_err(Error::io("open", path))?;
    let size_before = file.metadata().map_err(Error::io("inspect", path))?.len();
    file.set_len(size_bytes).map_err(Error::io("truncate", path))?;
    file.sync_all().map_err(Error::io("sync", path))?;
    Ok(size_before - size_bytes)
}

fn open_segment(folder: &Path, index: u64) -> Result<(PathBuf, BufWriter<File>, u64), Error> {
    let path = segment_path(folder, index);
    let mut file = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io("open", &path))?;
    let size = file.seek(SeekFrom::End(0)).map_err(Error::io("open", &path))?;
    sync_folder(folder)?;
    Ok((path, BufWriter::new(file), size))
}

fn segment_path(folder: &Path, index: u64) -> PathBuf {
    folder.join(format!("{index:08}.log"))
}

/// Makes a folder's entries durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), Error> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io("sync", folder))
}

fn record_hash(kind: u8, body: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[kind]);
    hasher.update(body);
    *hasher.finalize().as_bytes()
}

/// Unpacks the bodies of an undamaged segment.
#[cfg(test)]
pub(crate) fn unpacked(mut segment: &[u8]) -> Vec<Vec<u8>> {
    let mut bodies = Vec::new();
    while let Some((header, rest)) = segment.split_at_checked(HEADER_BYTES) {
        let (body, rest) = rest.split_at(u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize);
        bodies.push(zstd::stream::decode_all(body).unwrap());
        segment = rest;
    }
    bodies
}

fn record_type(record: &Record) -> u8 {
    match record {
        Record::Manifest(_) => 0,
        Record::Group(_) => 1,
        Record::Eval(_) => 2,
        Record::Step(_) => 3,
        Record::Control(_) => 4,
        Record::Ban(_) => 5,
        Record::Dispute(_) => 6,
        Record::Opening(_) => OPENING,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Control;

    fn control(stop_at: u64) -> Record {
        Record::Control(Control { decay_from: 1, stop_at })
    }

    fn write(folder: &Path, records: std::ops::Range<u64>) {
        let (mut journal, _) = Journal::open(folder, &Damage::default(), None).unwrap();
        records.for_each(|stop_at| journal.append(&control(stop_at)).unwrap());
        journal.sync().unwrap();
    }

    fn read(folder: &Path) -> (Vec<Record>, u64, Vec<RecordError>) {
        let mut records = Vec::new();
        let damage = read_journal(folder, |record| records.push(record)).unwrap();
        let (_, truncated_bytes) = Journal::open(folder, &damage, None).unwrap();
        (records, truncated_bytes, damage.unreadable)
    }

    #[test]
    fn every_cut_keeps_the_whole_records_before_it() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 0..3);
        let path = folder.path().join("00000000.log");
        let bytes = std::fs::read(&path).unwrap();
        let record_bytes = bytes.len() / 3;
        for cut in 0..bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let (records, truncated_bytes, unreadable) = read(folder.path());
            assert_eq!(records.len(), cut / record_bytes);
            assert_eq!(truncated_bytes as usize, cut % record_bytes);
            assert!(unreadable.is_empty());
            write(folder.path(), 7..8);
            assert_eq!(read(folder.path()).0.last(), Some(&control(7)), "appending after recovery works");
        }
    }

    /// A power failure may leave a file of full length whose end was not written.
    #[test]
    fn a_tail_that_was_not_written_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 0..3);
        let path = folder.path().join("00000000.log");
        let mut bytes = std::fs::read(&path).unwrap();
        let record_bytes = bytes.len() / 3;
        bytes[2 * record_bytes + 20..].fill(0);
        std::fs::write(&path, &bytes).unwrap();
        let (records, truncated_bytes, unreadable) = read(folder.path());
        assert_eq!((records.len(), truncated_bytes as usize, unreadable.len()), (2, record_bytes, 0));
        write(folder.path(), 7..8);
        assert_eq!(read(folder.path()).0, [control(0), control(1), control(7)]);
    }

    /// Appends a record with this body.
    fn write_bytes(folder: &Path, unpacked: &[u8]) -> Vec<u8> {
        let path = folder.join("00000000.log");
        let body = zstd::bulk::compress(unpacked, 1).unwrap();
        let mut bytes = std::fs::read(&path).unwrap_or_default();
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.push(4);
        bytes.extend(record_hash(4, &body));
        bytes.extend(&body);
        std::fs::write(path, &bytes).unwrap();
        bytes
    }

    /// A record of another build is intact and is kept.
    #[test]
    fn a_record_of_another_format_is_not_cut() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 0..2);
        let bytes = write_bytes(folder.path(), &[FORMAT.version, 250, 250]);
        let (records, truncated_bytes, unreadable) = read(folder.path());
        assert_eq!((records.len(), truncated_bytes), (2, 0));
        assert!(unreadable.len() == 1 && unreadable[0].foreign, "{unreadable:?}");
        assert_eq!(std::fs::read(folder.path().join("00000000.log")).unwrap(), bytes);
    }

    #[test]
    fn a_journal_of_another_version_is_refused() {
        for version in [4, FORMAT.version + 1] {
            let folder = tempfile::tempdir().unwrap();
            write_bytes(folder.path(), &[version, 0]);
            let error = read_journal(folder.path(), |_| {}).unwrap_err().to_string();
            let says = format!("00000000.log: expected a journal of version 6, got version {version}");
            assert!(error.ends_with(&says), "{error}");
            assert_eq!(read_manifest(folder.path()).unwrap_err().to_string(), error);
        }
    }

    fn opening(step: u64) -> Opening {
        Opening { manifest: crate::test_manifest(), known: Known { step, ..Known::default() } }
    }

    /// Writes three segments; the last two begin with an opening record.
    fn write_segments(folder: &Path) -> Vec<Place> {
        let (mut journal, _) = Journal::open(folder, &Damage::default(), None).unwrap();
        let mut places = Vec::new();
        for segment in 0..3 {
            if segment > 0 {
                journal.cut(opening(segment)).unwrap();
                let path = journal.path().to_owned();
                journal.cut(opening(segment)).unwrap();
                assert_eq!(journal.path(), path, "a segment that holds nothing else is not cut again");
                places.push(journal.last().unwrap());
            }
            for index in 0..2 {
                journal.append(&control(10 * segment + index)).unwrap();
                places.push(journal.last().unwrap());
            }
        }
        journal.sync().unwrap();
        places
    }

    fn rest(folder: &Path, place: Place) -> Option<Vec<Record>> {
        let mut records = Vec::new();
        let mut reader = JournalReader::open_behind(folder, place).unwrap()?;
        reader.read(|record| records.push(record)).unwrap();
        Some(records)
    }

    #[test]
    fn what_follows_a_record_is_read_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let places = write_segments(folder.path());
        let mut all = Vec::new();
        read_journal(folder.path(), |record| all.push(record)).unwrap();
        assert_eq!(all.len(), places.len());
        for (index, place) in places.iter().enumerate() {
            assert_eq!(rest(folder.path(), *place).unwrap(), all[index + 1..]);
        }
        let (last, path) = (places[1], folder.path().join("00000000.log"));
        let bytes = std::fs::read(&path).unwrap();
        for flipped in [last.start as usize, last.start as usize + 9] {
            let mut broken = bytes.clone();
            broken[flipped] ^= 1;
            std::fs::write(&path, broken).unwrap();
            assert_eq!(rest(folder.path(), places[0]).unwrap(), all[2..], "the damaged one is passed over");
            assert_eq!(rest(folder.path(), last), None, "nothing tells it from a record of another journal");
        }
        let first = places[0];
        let mut broken = bytes.clone();
        broken[first.start as usize + 9] ^= 1;
        std::fs::write(&path, broken).unwrap();
        assert_eq!(rest(folder.path(), first).unwrap(), all[1..], "what comes after it is there");
        std::fs::write(&path, &bytes[..last.end as usize - 1]).unwrap();
        assert_eq!(rest(folder.path(), last), None, "it is cut short");
        let other = tempfile::tempdir().unwrap();
        write(other.path(), 5..9);
        assert_eq!(rest(other.path(), last), None, "another journal");
    }

    #[test]
    fn segments_are_forgotten_up_to_what_is_needed() {
        for (needed, first) in [(0, 0), (1, 1), (2, 2), (7, 2)] {
            let folder = tempfile::tempdir().unwrap();
            let places = write_segments(folder.path());
            forget_before(folder.path(), needed).unwrap();
            let left: Vec<u64> = list_segments(folder.path()).unwrap().into_iter().map(|(index, _)| index).collect();
            assert_eq!(left, (first..3).collect::<Vec<_>>());
            assert!(first == 0 || read_manifest(folder.path()).unwrap() == Some(crate::test_manifest()));
            assert!(rest(folder.path(), *places.last().unwrap()).is_some());
            let (mut journal, _) = Journal::open(folder.path(), &Damage::default(), None).unwrap();
            journal.append(&control(99)).unwrap();
            journal.sync().unwrap();
            assert!(rest(folder.path(), *places.last().unwrap()).unwrap() == [control(99)], "it goes on where it was");
        }
    }

    /// A segment begun because another was full has no opening. It is removed with those before it, in any order.
    #[test]
    fn what_an_interrupted_removal_leaves_is_not_read() {
        for left in [&[][..], &[0], &[1], &[0, 1]] {
            let folder = tempfile::tempdir().unwrap();
            write_segments(folder.path());
            let path = |index| segment_path(folder.path(), index);
            let whole = std::fs::read(path(0)).unwrap();
            std::fs::write(path(1), &whole).unwrap();
            (0..2).filter(|index| !left.contains(index)).for_each(|index| std::fs::remove_file(path(index)).unwrap());
            let mut reader = JournalReader::open(folder.path()).unwrap();
            let is_whole = left == [0, 1];
            assert_eq!(reader.is_cut_off(), !is_whole);
            let mut num_records = 0;
            reader.read(|_| num_records += 1).unwrap();
            assert_eq!(num_records, if is_whole { 7 } else { 3 }, "{left:?}");
            forget_before(folder.path(), 2).unwrap();
            assert_eq!(list_segments(folder.path()).unwrap().len(), 1);
        }
        let folder = tempfile::tempdir().unwrap();
        write_segments(folder.path());
        let path = |index| segment_path(folder.path(), index);
        std::fs::copy(path(0), path(2)).unwrap();
        std::fs::remove_file(path(1)).unwrap();
        let error = JournalReader::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("expected the segment") && error.contains("00000001.log, got"), "{error}");
    }

    #[test]
    fn a_segment_that_is_gone_is_missed() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 0..3);
        std::fs::rename(folder.path().join("00000000.log"), folder.path().join("00000001.log")).unwrap();
        let error = Journal::open(folder.path(), &Damage::default(), None).unwrap_err().to_string();
        assert!(error.contains("expected the segment") && error.contains("00000000.log"), "{error}");
    }

    #[test]
    fn a_flipped_byte_costs_one_record() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 0..3);
        let path = folder.path().join("00000000.log");
        let bytes = std::fs::read(&path).unwrap();
        let record_bytes = bytes.len() / 3;
        for flipped in record_bytes..2 * record_bytes {
            let mut broken = bytes.clone();
            broken[flipped] ^= 1;
            std::fs::write(&path, &broken).unwrap();
            let (records, truncated_bytes, unreadable) = read(folder.path());
            assert_eq!(records, [control(0), control(2)]);
            assert_eq!((truncated_bytes, unreadable.len()), (0, 1));
            assert_eq!(unreadable[0].offset as usize, record_bytes);
        }
    }
}
