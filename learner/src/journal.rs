//! The truth of a run: append-only segments of records `[length | type | blake3 | zstd(postcard)]`.
//!
//! A record is whole or it is not there: a bad one at the end, which a crash left or the disk damaged, is dropped when the
//! journal is opened for appending; one whose hash does not fit before others is reported and passed over.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use proto::{Digest, ScoredGroup, TaskId};
use serde::{Deserialize, Serialize};

use crate::{Control, Error, Manifest, expect_in_place};

/// One entry of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Record {
    /// What the run depends on; the first record.
    Manifest(Manifest),
    /// A scored group, in order of arrival; of several for one task the last counts.
    Group(GroupRecord),
    /// An exam result.
    Eval(EvalRecord),
    /// A finished step.
    Step(StepRecord),
    /// The one decision of the clock.
    Control(Control),
    /// An actor that is believed nothing from here on.
    Ban(BanRecord),
    /// Another group has come of a task of a batch that is not sealed, by an actor that may be right: the one that is here is as
    /// if it had not come.
    Dispute(TaskId),
}

/// A group that came in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// The actor that played it; empty where actors have no names.
    pub played_by: String,
    /// The group, with its verdicts.
    pub scored: ScoredGroup,
}

impl GroupRecord {
    pub(crate) fn task(&self) -> TaskId {
        self.scored.group.task.id
    }

    /// Hashes what the actor said: groups with one digest are the same to the last byte.
    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.scored.group)
    }

    /// Checks that two copies of a group have the same verdicts.
    pub(crate) fn expect_same_verdicts(&self, other: &GroupRecord) -> Result<(), Error> {
        let [first, second] = [self, other].map(|group| Digest::of(&group.scored));
        if first == second || self.digest() != other.digest() {
            return Ok(());
        }
        let TaskId { batch, index, .. } = self.task();
        let [first, second] = [first.short(), second.short()];
        let reason = format!("task {index}: verdicts on one group differ: {first} came first, then {second}");
        Err(Error::Integrity { what: "group", step: batch, reason })
    }
}

/// An actor that is banned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BanRecord {
    /// Its name.
    pub player: String,
    /// Tasks of batches that are not sealed: its groups of them are as if they had not come.
    pub tasks: Vec<TaskId>,
}

/// An exam sat by the averaged weights of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Number of the state whose weights sat it.
    pub step: u64,
    /// Which exam.
    pub exam: String,
    /// Problems solved, greedily, in one attempt.
    pub num_correct: u64,
    /// Problems asked.
    pub num_problems: u64,
}

/// What a step made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Number of the state that the step made.
    pub step: u64,
    /// Digests of the groups that were folded, in index order.
    pub groups: Vec<Digest>,
    /// Hash of the weights.
    pub weights_digest: Digest,
    /// Hash of the state.
    pub state_digest: Digest,
    /// Wall time of the run so far; never part of a digest.
    pub elapsed_ms: u64,
}

/// A record that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RecordError {
    /// In which segment.
    pub segment: PathBuf,
    /// At which byte.
    pub offset: u64,
    /// Whether the journal ends inside the record; otherwise its bytes do not fit its hash or its length is wrong.
    pub truncated: bool,
    /// Whether its bytes are those that were written: a build with another format wrote them.
    pub foreign: bool,
}

/// What of a journal cannot be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Damage {
    /// A bad record that no other follows, and that [`Journal::open`] removes.
    pub tail: Option<RecordError>,
    /// The others.
    pub unreadable: Vec<RecordError>,
}

const HEADER_BYTES: usize = 4 + 1 + 32;
const MAX_RECORD_BYTES: u32 = 1 << 30;
const SEGMENT_BYTES: u64 = 64 << 20;
/// Longest record that is found again behind a damaged one.
const MAX_SOUGHT_BYTES: usize = 1 << 20;
const LAST_RECORD_TYPE: u8 = 6;

/// A journal open for appending.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    segment_index: u64,
    path: PathBuf,
    file: BufWriter<File>,
    size_bytes: u64,
}

impl Journal {
    /// Starts a journal in an empty folder, or continues the one that is there, of which [`read_journal`] gave the damage. Says
    /// how many bytes were removed from its end.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when a segment is missing.
    pub fn open(folder: &Path, damage: &Damage) -> Result<(Journal, u64), Error> {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let truncated_bytes = match &damage.tail {
            Some(RecordError { segment, offset, .. }) => cut(segment, *offset)?,
            None => 0,
        };
        let segment_index = (segments(folder)?.len() as u64).saturating_sub(1);
        let (path, file, size_bytes) = open_segment(folder, segment_index)?;
        Ok((Journal { folder: folder.to_owned(), segment_index, path, file, size_bytes }, truncated_bytes))
    }

    /// Adds a record; it is durable after the next [`Journal::sync`].
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn append(&mut self, record: &Record) -> Result<(), Error> {
        let body =
            zstd::bulk::compress(&proto::wire::encode(record), 1).map_err(Error::io("compress for", &self.path))?;
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend((body.len() as u32).to_le_bytes());
        header.push(record_type(record));
        header.extend(record_hash(record_type(record), &body));
        self.file
            .write_all(&header)
            .and_then(|()| self.file.write_all(&body))
            .map_err(Error::io("append to", &self.path))?;
        self.size_bytes += (header.len() + body.len()) as u64;
        Ok(())
    }

    /// Checks that what is appended still goes to the file at its path.
    pub(crate) fn expect_in_place(&self) -> Result<(), Error> {
        expect_in_place(&self.path, self.file.get_ref())
    }

    /// Makes everything durable; starts a new segment when this one is full.
    ///
    /// # Errors
    /// [`Error::Io`]: nothing since the last success may be taken as written.
    pub fn sync(&mut self) -> Result<(), Error> {
        self.file.flush().map_err(Error::io("write", &self.path))?;
        self.file.get_ref().sync_data().map_err(Error::io("sync", &self.path))?;
        if self.size_bytes >= SEGMENT_BYTES {
            self.segment_index += 1;
            (self.path, self.file, self.size_bytes) = open_segment(&self.folder, self.segment_index)?;
        }
        Ok(())
    }
}

/// Shows every record of a journal, in order, to `visit`, and gives what cannot be read. Changes nothing.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] when a segment is missing.
pub fn read_journal(folder: &Path, mut visit: impl FnMut(Record)) -> Result<Damage, Error> {
    let mut damage = Damage::default();
    if !folder.exists() {
        return Ok(damage);
    }
    let mut reader = JournalReader::open(folder)?;
    while let Some(record) = reader.next()? {
        damage.unreadable.extend(damage.tail.take());
        match record {
            Ok(record) => visit(record),
            Err(error) => damage.tail = Some(error),
        }
    }
    let is_cut = |error: &mut RecordError| !error.foreign && Some(&error.segment) == reader.segments.last();
    let tail = damage.tail.take_if(is_cut);
    damage.unreadable.extend(std::mem::replace(&mut damage.tail, tail));
    Ok(damage)
}

/// Cuts a file to its first bytes; gives how many went.
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

/// Lists the segments of a journal, in order.
fn segments(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut segments = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let path = entry.map_err(Error::io("list", folder))?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            segments.push(path);
        }
    }
    segments.sort();
    for (index, path) in segments.iter().enumerate() {
        let expected = segment_path(folder, index as u64);
        if *path != expected {
            return Err(Error::File {
                path: folder.to_owned(),
                expected: format!("the segment {}", expected.display()),
                got: path.display().to_string(),
            });
        }
    }
    Ok(segments)
}

fn segment_path(folder: &Path, index: u64) -> PathBuf {
    folder.join(format!("{index:08}.log"))
}

/// Makes a folder's entries durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), Error> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io("sync", folder))
}

/// Reads a journal, also while a run writes it.
#[derive(Debug)]
pub struct JournalReader {
    segments: Vec<PathBuf>,
    next_segment: usize,
    file: Option<BufReader<File>>,
    offset: u64,
}

impl JournalReader {
    /// Opens a journal at its first record.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when a segment is missing.
    pub fn open(folder: &Path) -> Result<JournalReader, Error> {
        Ok(JournalReader { segments: segments(folder)?, next_segment: 0, file: None, offset: 0 })
    }

    /// Reads the next record; `None` at the end.
    ///
    /// # Errors
    /// [`Error::Io`]; a record that cannot be read is no error of the reader.
    #[expect(clippy::should_implement_trait, reason = "the two kinds of failure do not fit an iterator's item")]
    pub fn next(&mut self) -> Result<Option<Result<Record, RecordError>>, Error> {
        loop {
            if self.file.is_none() {
                let Some(path) = self.segments.get(self.next_segment) else { return Ok(None) };
                self.file = Some(BufReader::new(File::open(path).map_err(Error::io("open", path))?));
                self.next_segment += 1;
                self.offset = 0;
            }
            let path = self.segments[self.next_segment - 1].clone();
            let file = self.file.as_mut().expect("a segment is open");
            let damaged = RecordError { segment: path.clone(), offset: self.offset, truncated: false, foreign: false };
            let mut header = [0; HEADER_BYTES];
            let header_bytes = read_up_to(file, &mut header).map_err(Error::io("read", &path))?;
            if header_bytes == 0 {
                self.file = None;
                continue;
            }
            let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
            let mut body = Vec::new();
            if header_bytes == HEADER_BYTES && length <= MAX_RECORD_BYTES {
                file.take(u64::from(length)).read_to_end(&mut body).map_err(Error::io("read", &path))?;
            }
            let is_whole = header_bytes == HEADER_BYTES && body.len() == length as usize;
            if is_whole && header[5..] == record_hash(header[4], &body) {
                self.offset += (HEADER_BYTES + body.len()) as u64;
                return Ok(Some(decode(&body).ok_or(RecordError { foreign: true, ..damaged })));
            }
            // The length may be what is wrong: what follows is found by its hash. So is the record itself, where its end was
            // written while it was read.
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
            let is_last_segment = self.next_segment == self.segments.len();
            return Ok(Some(Err(RecordError { truncated: !is_whole && is_last_segment, ..damaged })));
        }
    }
}

/// Finds the first whole record of a segment at or after `start`.
fn next_record(path: &Path, start: u64) -> Result<Option<u64>, Error> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let is_record = |at: &usize| {
        let Some((header, rest)) = bytes[*at..].split_at_checked(HEADER_BYTES) else { return false };
        let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        // Longer ones are not looked for: hashing what every four bytes could mean would take hours.
        let is_plausible = header[4] <= LAST_RECORD_TYPE && length <= MAX_SOUGHT_BYTES;
        is_plausible && rest.get(..length).is_some_and(|body| header[5..] == record_hash(header[4], body))
    };
    Ok((start as usize..bytes.len()).find(is_record).map(|at| at as u64))
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

fn decode(body: &[u8]) -> Option<Record> {
    let bytes = zstd::stream::decode_all(body).ok()?;
    proto::wire::decode(&bytes).ok()
}

fn record_hash(kind: u8, body: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[kind]);
    hasher.update(body);
    *hasher.finalize().as_bytes()
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(stop_at: u64) -> Record {
        Record::Control(Control { decay_from: 1, stop_at })
    }

    fn write(folder: &Path, records: std::ops::Range<u64>) {
        let (mut journal, _) = Journal::open(folder, &Damage::default()).unwrap();
        records.for_each(|stop_at| journal.append(&control(stop_at)).unwrap());
        journal.sync().unwrap();
    }

    fn read(folder: &Path) -> (Vec<Record>, u64, Vec<RecordError>) {
        let mut records = Vec::new();
        let damage = read_journal(folder, |record| records.push(record)).unwrap();
        let (_, truncated_bytes) = Journal::open(folder, &damage).unwrap();
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

    /// What a power failure leaves: the file is as long as it was to be, and its end was not written.
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

    /// What another build wrote is whole, and stays.
    #[test]
    fn a_record_of_another_format_is_not_cut() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 0..2);
        let path = folder.path().join("00000000.log");
        let body = zstd::bulk::compress(&[250; 9], 1).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.push(4);
        bytes.extend(record_hash(4, &body));
        bytes.extend(&body);
        std::fs::write(&path, &bytes).unwrap();
        let (records, truncated_bytes, unreadable) = read(folder.path());
        assert_eq!((records.len(), truncated_bytes), (2, 0));
        assert!(unreadable.len() == 1 && unreadable[0].foreign, "{unreadable:?}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn a_segment_that_is_gone_is_missed() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 0..3);
        std::fs::rename(folder.path().join("00000000.log"), folder.path().join("00000001.log")).unwrap();
        let error = Journal::open(folder.path(), &Damage::default()).unwrap_err().to_string();
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
