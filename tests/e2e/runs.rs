//! Runs of the binary in separate folders, and the files and output that they leave.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

/// Steps of the preset `smoke`.
pub(crate) const NUM_STEPS: u64 = 40;

/// The only segment that a run as short as `smoke` writes.
pub(crate) const SEGMENT: &str = "run/journal/00000000.log";

/// The longest wait for anything. A loaded machine needs far less; a wait this long is a hang.
const WAIT_LIMIT: Duration = Duration::from_secs(180);

/// Short timeouts for a run over NATS: what is lost is soon sent again.
pub(crate) const HASTE: [&str; 6] = [
    "--set",
    "local.bus.ack_wait_seconds=1.0",
    "--set",
    "local.bus.reissue_seconds=1.0",
    "--set",
    "local.bus.lease_seconds=2.0",
];

/// The bytes of files, by path from the folder that holds them.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// A temporary folder in which commands run. Its run directory is `run`.
pub(crate) struct Folder(TempDir);

/// A command that was started; it is killed when dropped.
pub(crate) struct Process {
    child: Child,
    stdout: File,
    stderr: File,
}

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// The contents of a run's `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct History {
    /// Weights digest and state digest of step 1, 2, ...
    pub(crate) steps: Vec<[String; 2]>,
    /// Step, name and right answers of every exam, in order of the file.
    pub(crate) exams: Vec<(u64, String, u64)>,
}

/// An undisturbed run.
pub(crate) struct Reference {
    pub(crate) history: History,
    /// The output of `--json`.
    pub(crate) summary: Value,
    /// All files in its folder, to start from without running it again.
    pub(crate) files: Files,
}

/// A record of a journal segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JournalRecord {
    pub(crate) offset: usize,
    pub(crate) kind: u8,
}

impl JournalRecord {
    pub(crate) const GROUP: u8 = 1;
    pub(crate) const STEP: u8 = 3;
    /// Length, type and hash.
    pub(crate) const HEADER_BYTES: usize = 4 + 1 + 32;
}

/// Returns the undisturbed run of `smoke` with a lag of 0 or 1, made once for all tests.
pub(crate) fn reference(lag: u64) -> &'static Reference {
    static REFERENCES: [OnceLock<Reference>; 2] = [OnceLock::new(), OnceLock::new()];
    REFERENCES[lag as usize].get_or_init(|| {
        let folder = Folder::new();
        let lag = format!("batch.lag={lag}");
        let ended = folder.call(&["train", "smoke", "--run-dir", "run", "--json", "--set", &lag]).success();
        let history = folder.history();
        assert_eq!(history.steps.len() as u64, NUM_STEPS);
        Reference { history, summary: serde_json::from_str(&ended.stdout).unwrap(), files: folder.files() }
    })
}

/// Returns the shipped config for a kind of policy gradients as `pg.toml`, based on `smoke` instead of `ladder`.
pub(crate) fn policy_gradient_config(kind: &str) -> Files {
    let path = format!("{}/deploy/configs/{kind}.toml", env!("CARGO_MANIFEST_DIR"));
    let shipped = std::fs::read_to_string(path).unwrap();
    assert!(shipped.contains("preset = \"ladder\""), "{shipped}");
    let config = shipped.replace("preset = \"ladder\"", "preset = \"smoke\"");
    Files::from([("pg.toml".to_owned(), config.into_bytes())])
}

impl Folder {
    pub(crate) fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    /// Makes a folder that holds these files.
    pub(crate) fn holding(files: &Files) -> Folder {
        let folder = Folder::new();
        for (name, bytes) in files {
            let path = folder.0.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Starts `autodidact ARGS` in this folder.
    pub(crate) fn start(&self, args: &[&str]) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_autodidact"));
        command.args(args);
        self.start_command(command)
    }

    /// Starts a command in this folder, with the environment of an ordinary user.
    pub(crate) fn start_command(&self, mut command: Command) -> Process {
        // Files rather than pipes: nothing reads while the command runs, and it must never wait for a reader.
        let (stdout, stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        command.current_dir(self.0.path());
        if !command.get_envs().any(|(name, _)| name == "AUTODIDACT_CI") {
            command.env_remove("AUTODIDACT_CI");
        }
        for name in ["RUST_LOG", "NO_COLOR", "TERM"] {
            if !command.get_envs().any(|(set, _)| set == name) {
                command.env_remove(name);
            }
        }
        command.stdout(stdout.try_clone().unwrap()).stderr(stderr.try_clone().unwrap());
        Process { child: command.spawn().unwrap(), stdout, stderr }
    }

    /// Runs `autodidact ARGS` in this folder to its end.
    pub(crate) fn call(&self, args: &[&str]) -> Ended {
        self.start(args).end()
    }

    /// Resumes the run of this folder and waits for its end.
    pub(crate) fn resume(&self) -> Ended {
        self.call(&RESUME)
    }

    /// Runs a command that the program printed, as a shell reads it.
    pub(crate) fn call_printed(&self, printed: &str) -> Ended {
        let args = printed.strip_prefix("autodidact ").expect("a command of this program");
        let mut command = Command::new("sh");
        command.args(["-c", &format!("exec \"$0\" {args}"), env!("CARGO_BIN_EXE_autodidact")]);
        self.start_command(command).end()
    }

    pub(crate) fn history(&self) -> History {
        History::read(&self.path("run"))
    }

    /// Returns every file but the lock, which is empty.
    pub(crate) fn files(&self) -> Files {
        let mut files = Files::new();
        let mut folders = vec![self.0.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.file_name().unwrap() != "LOCK" {
                    let name = path.strip_prefix(self.0.path()).unwrap().to_str().unwrap().to_owned();
                    files.insert(name, std::fs::read(&path).unwrap());
                }
            }
        }
        files
    }

    /// Flips one bit of a file.
    pub(crate) fn flip(&self, name: &str, offset: usize) {
        let path = self.path(name);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[offset] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }

    /// Returns the number of the last step in `metrics.jsonl`, or 0 if there is none.
    pub(crate) fn last_step(&self) -> u64 {
        let bytes = std::fs::read(self.path("run/metrics.jsonl")).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let steps = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        steps.filter(|row| row.get("exam").is_none()).filter_map(|row| row["step"].as_u64()).max().unwrap_or(0)
    }

    pub(crate) fn journal_bytes(&self) -> u64 {
        std::fs::metadata(self.path(SEGMENT)).map_or(0, |metadata| metadata.len())
    }

    /// Lists the steps of the complete checkpoints, in order.
    pub(crate) fn checkpoints(&self) -> Vec<u64> {
        let Ok(entries) = std::fs::read_dir(self.path("run/checkpoints")) else { return Vec::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut steps: Vec<u64> = names.filter_map(|name| name.strip_prefix("step_")?.parse().ok()).collect();
        steps.sort();
        steps
    }
}

/// The arguments that resume a folder's run.
pub(crate) const RESUME: [&str; 4] = ["train", "--resume", "--run-dir", "run"];

impl Process {
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for the command to end.
    pub(crate) fn end(mut self) -> Ended {
        wait_until("a command to end", || !self.is_running());
        self.ended()
    }

    /// Kills the command with SIGKILL.
    pub(crate) fn kill(mut self) -> Ended {
        self.child.kill().unwrap();
        self.ended()
    }

    /// Returns what the command has printed so far.
    pub(crate) fn printed_so_far(&self) -> String {
        so_far(&self.stdout)
    }

    /// Returns what the command has written to standard error so far.
    pub(crate) fn said_so_far(&self) -> String {
        so_far(&self.stderr)
    }

    /// Sends SIGINT, as Ctrl-C does.
    pub(crate) fn interrupt(&self) {
        self.signal("-INT");
    }

    /// Sends SIGTERM, which asks a process to end.
    pub(crate) fn terminate(&self) {
        self.signal("-TERM");
    }

    /// Suspends the process, like a machine that hangs. Returns when each of its threads is stopped.
    pub(crate) fn freeze(&self) {
        self.signal("-STOP");
        let tasks = format!("/proc/{}/task", self.id());
        wait_until("every thread is stopped", || {
            let mut tasks = std::fs::read_dir(&tasks).unwrap();
            tasks.all(|task| {
                // A thread that ends meanwhile has no status.
                let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
                status.lines().find(|line| line.starts_with("State:")).is_none_or(|state| state.contains("stopped"))
            })
        });
    }

    /// Resumes a frozen process.
    pub(crate) fn thaw(&self) {
        self.signal("-CONT");
    }

    /// Sends SIGHUP, as a closing terminal does.
    pub(crate) fn hang_up(&self) {
        self.signal("-HUP");
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    fn signal(&self, name: &str) {
        signal(name, self.child.id());
    }

    fn ended(&mut self) -> Ended {
        let status = self.child.wait().unwrap();
        let read = |file: &mut File| {
            let mut text = String::new();
            file.rewind().unwrap();
            file.read_to_string(&mut text).unwrap();
            text
        };
        Ended { status, stdout: read(&mut self.stdout), stderr: read(&mut self.stderr) }
    }
}

/// Sends a signal, such as `-TERM`.
pub(crate) fn signal(name: &str, process: u32) {
    let sent = Command::new("kill").args([name, &process.to_string()]).status().unwrap();
    assert!(sent.success());
}

fn so_far(file: &File) -> String {
    // Reading at an offset does not move the position at which the command writes next.
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    String::from_utf8(bytes).unwrap()
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail when the command has ended, which is fine.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Ended {
    pub(crate) fn success(self) -> Ended {
        assert!(self.status.success(), "{self:#?}");
        self
    }

    /// Returns the one line on standard error, without the `error: ` with which it begins.
    pub(crate) fn refusal(&self) -> &str {
        assert!(self.status.code().is_some_and(|code| code != 0), "{self:#?}");
        let message = self.stderr.strip_prefix("error: ").and_then(|message| message.strip_suffix('\n'));
        let message = message.unwrap_or_else(|| panic!("expected a line that begins with `error: `, got {self:#?}"));
        assert!(!message.contains('\n'), "expected one line, got {self:#?}");
        message
    }

    /// Returns the text after `label` on its line of standard output.
    pub(crate) fn printed(&self, label: &str) -> &str {
        let found = self.stdout.lines().find_map(|line| line.split_once(label));
        found.unwrap_or_else(|| panic!("expected {label:?} in {self:#?}")).1
    }
}

impl History {
    pub(crate) fn read(run_dir: &Path) -> History {
        let text = std::fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
        let mut history = History { steps: Vec::new(), exams: Vec::new() };
        // A row that a kill has cut short does not count.
        let whole_rows = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        for line in whole_rows.lines() {
            let row: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line}"));
            let step = row["step"].as_u64().unwrap();
            let name = |key: &str| row[key].as_str().unwrap().to_owned();
            if row.get("exam").is_some() {
                history.exams.push((step, name("exam"), row["num_correct"].as_u64().unwrap()));
            } else {
                assert_eq!(step, history.steps.len() as u64 + 1, "every step has one row, in order:\n{text}");
                history.steps.push([name("weights_digest"), name("state_digest")]);
            }
        }
        history
    }

    /// Fails unless every step has the digests of another run, and names the first that differs.
    #[track_caller]
    pub(crate) fn assert_steps_of(&self, expected: &History) {
        let differs = self.steps.iter().zip(&expected.steps).position(|(got, expected)| got != expected);
        assert_eq!(differs.map(|index| index + 1), None, "the first step with other digests");
        assert_eq!(self.steps.len(), expected.steps.len(), "number of steps");
    }
}

/// Waits for a condition, checking it every millisecond.
///
/// # Panics
/// If the condition does not hold within [`WAIT_LIMIT`].
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = tokio::time::Instant::now();
    while !condition() {
        assert!(began.elapsed() < WAIT_LIMIT, "waited {WAIT_LIMIT:?} for {what}");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

/// Returns the records of an undamaged journal segment.
pub(crate) fn journal_records(segment: &[u8]) -> Vec<JournalRecord> {
    let (records, end) = whole_records(segment);
    assert_eq!(end, segment.len(), "an undamaged segment");
    records
}

/// Returns the records of a journal segment, `[length | type | blake3 | body]`, one after the other, and the offset at which
/// the last complete one ends.
pub(crate) fn whole_records(segment: &[u8]) -> (Vec<JournalRecord>, usize) {
    let mut records = Vec::new();
    let mut offset = 0;
    while offset + JournalRecord::HEADER_BYTES <= segment.len() {
        let body_bytes = u32::from_le_bytes(segment[offset..offset + 4].try_into().unwrap()) as usize;
        let end = offset + JournalRecord::HEADER_BYTES + body_bytes;
        if end > segment.len() {
            break;
        }
        records.push(JournalRecord { offset, kind: segment[offset + 4] });
        offset = end;
    }
    (records, offset)
}

/// Sends a GET request; returns the status and the body.
pub(crate) fn get(address: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// Reads the complete rows of `metrics.jsonl`.
pub(crate) fn metrics(run_dir: &Path) -> Vec<Value> {
    let bytes = std::fs::read(run_dir.join("metrics.jsonl")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Waits for the address of a process's metrics.
pub(crate) fn metrics_address(process: &Process) -> String {
    let address = || {
        process
            .printed_so_far()
            .split_once("metrics: http://")?
            .1
            .split_once('/')
            .map(|(address, _)| address.to_owned())
    };
    wait_until("an address", || address().is_some());
    address().unwrap()
}

/// Returns the value of a metric, whose name includes its labels.
pub(crate) fn value(text: &str, name: &str) -> f64 {
    let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("expected {name} in\n{text}")).parse().unwrap()
}
