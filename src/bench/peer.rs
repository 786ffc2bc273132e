use std::io::{BufRead, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::{Args, What};

/// PyTorch in a separate process.
pub(super) struct Peer {
    pub(super) version: String,
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    pub(super) fn start(args: &Args) -> Result<Peer> {
        let config = args.model();
        let numbers = [
            ("vocabulary-size", config.vocabulary_size),
            ("positions", args.positions),
            ("prompt", args.prompt()),
            ("d-model", config.d_model),
            ("num-layers", config.num_layers),
            ("num-heads", config.num_heads),
            ("ff-dim", config.ff_dim),
            ("batch", args.batch),
            ("threads", args.num_threads()),
        ];
        let mut process = Command::new(&args.python)
            .args(["-c", include_str!("../../tests/peers/torch_tiny.py")])
            .arg(if args.what == What::Train { "train" } else { "decode" })
            .args(numbers.iter().flat_map(|(name, number)| [format!("--{name}"), number.to_string()]))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| {
                format!("peer: expected a Python interpreter with PyTorch (--python), cannot start {}", args.python)
            })?;
        let input = process.stdin.take().context("the peer has a standard input")?;
        let output = BufReader::new(process.stdout.take().context("the peer has a standard output")?);
        let mut peer = Peer { version: String::new(), process, input, output };
        let hello = peer.read()?;
        if let Some(error) = hello.get("error").and_then(Value::as_str) {
            bail!("{error}; use --python to choose another interpreter");
        }
        peer.version = hello["version"].as_str().unwrap_or_default().to_owned();
        Ok(peer)
    }

    /// Measures every mode once. Returns tokens per second.
    pub(super) fn round(&mut self) -> Result<Vec<(String, f64)>> {
        writeln!(self.input).context("the peer exited early")?;
        serde_json::from_value(self.read()?).context("peer: expected modes and rates")
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("read from the peer")?;
        serde_json::from_str(&line).with_context(|| format!("peer: expected a line of JSON, got {line:?}"))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Closing its input also ends it, but only after the current round.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
