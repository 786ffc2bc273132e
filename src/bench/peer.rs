use std::io::{BufRead, BufReader, ErrorKind, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::Value;

/// A program in Python that runs the workload of a benchmark, one round for each line on its standard input. It answers with lines
/// of JSON: first its version, then modes and their rates.
pub(super) struct Program {
    /// What it measures; begins the names of its modes.
    pub(super) name: &'static str,
    pub(super) source: &'static str,
    pub(super) arguments: Vec<String>,
    /// The first line of its input, before those of the rounds.
    pub(super) input: Option<String>,
}

/// A program in a separate process.
pub(super) struct Peer {
    pub(super) version: String,
    name: &'static str,
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    pub(super) fn start(python: &str, program: &Program) -> Result<Peer> {
        let Program { name, source, arguments, input: first_line } = program;
        let mut process = Command::new(python)
            .args(["-c", source])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| {
                format!("peer: expected a Python interpreter with {name} (--python), cannot start {python}")
            })?;
        let input = process.stdin.take().context("the peer has a standard input")?;
        let output = BufReader::new(process.stdout.take().context("the peer has a standard output")?);
        let mut peer = Peer { version: String::new(), name, process, input, output };
        if let Some(line) = first_line {
            // A peer that cannot run says so, and reads nothing.
            drop(writeln!(peer.input, "{line}"));
        }
        let hello = peer.read()?;
        if let Some(error) = hello.get("error").and_then(Value::as_str) {
            bail!("{error}; use --python to choose another interpreter");
        }
        peer.version = format!("{name} {}", hello["version"].as_str().unwrap_or_default());
        Ok(peer)
    }

    /// Measures every mode once. Returns names and units per second.
    pub(super) fn round(&mut self) -> Result<Vec<(String, f64)>> {
        self.write("")?;
        let modes: Vec<(String, f64)> =
            serde_json::from_value(self.read()?).context("peer: expected modes and rates")?;
        Ok(modes.into_iter().map(|(mode, rate)| (format!("{} {mode}", self.name), rate)).collect())
    }

    fn write(&mut self, line: &str) -> Result<()> {
        match writeln!(self.input, "{line}") {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(self.gone()),
            written => written.context("write to the peer"),
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.output.read_line(&mut line).context("read from the peer")? == 0 {
            return Err(self.gone());
        }
        serde_json::from_str(&line).with_context(|| format!("peer: expected a line of JSON, got {line:?}"))
    }

    /// Describes the end of a peer that has closed its input or output.
    fn gone(&mut self) -> anyhow::Error {
        match self.process.wait() {
            Ok(status) => {
                anyhow!("the peer {} ended too early, with {status}; SIGKILL may mean that memory ran out", self.name)
            }
            Err(error) => anyhow!("the peer {} ended too early: {error}", self.name),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Closing its input also ends it, but only after the current round.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
