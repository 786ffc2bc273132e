//! `bench`: measures how fast this machine trains, decodes and judges, compared with its arithmetic peak and, with `--peer`,
//! with other programs in the same minutes. Also measures a NATS server, compared with its client library and a file copy.

mod bus;
mod memory;
mod network;
mod peer;
mod pretrained;
mod rounds;
mod verify;

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use policy::Device;
use policy::cpu::kernels::instruction_set;
use serde::Serialize;

use self::network::{Decoding, Training};
use self::pretrained::{Answering, Learning};
use self::rounds::measure;
use crate::report::{bytes, count, percent, print, quoted, table};
use crate::run_config::LocalConfig;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure.
    what: What,
    /// Pretrained model to decode or train with: a name from `model get`, a GGUF file, or a folder of Hugging Face. It answers countdown
    /// problems after three worked examples.
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["d_model", "positions"])]
    model: Option<PathBuf>,
    /// Tokens of an answer of the pretrained model.
    #[arg(long, default_value_t = 64, requires = "model")]
    answer_tokens: usize,
    /// Model width; 4 layers below 256, otherwise 6; 4 heads; SwiGLU three times as wide.
    #[arg(long, default_value_t = 128)]
    d_model: usize,
    /// Sequences per training step, or decoded in parallel.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Sequence length; decoding starts from a prompt of one sixth of it.
    #[arg(long, default_value_t = 96)]
    positions: usize,
    /// Device for training or decoding: cpu, candle-cpu, cuda or cuda:N.
    #[arg(long, default_value_t = Device::Cpu)]
    device: Device,
    /// Threads of the cpu device; 0 uses all cores.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Number of measurements per figure; the output has medians.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Also measure other programs, alternating with autodidact: PyTorch; for a pretrained model transformers, for one answer llama.cpp,
    /// for `grpo` TRL.
    #[arg(long)]
    peer: bool,
    /// Python interpreter that has them.
    #[arg(long, default_value = "python3", value_name = "PROGRAM")]
    python: String,
    /// nats-server program that `bus` starts on a free port.
    #[arg(long, default_value = "nats-server", value_name = "PROGRAM")]
    server: String,
    /// Groups per timed measurement of `bus`.
    #[arg(long, default_value_t = 10_000)]
    groups: usize,
    /// Sizes of the weights that `bus` transfers, in MiB.
    #[arg(long, default_values_t = [5, 100, 540], value_delimiter = ',', value_name = "MIB")]
    weights: Vec<usize>,
    /// Seconds for which `bus` measures each number of simulated actors.
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Training steps: forward, backward, AdamW.
    Train,
    /// Batched decoding with a KV cache, including sampling.
    Decode,
    /// Steps of a pretrained model: 8 answers to each problem, and one update of all weights.
    Grpo,
    /// Checking answers.
    Verify,
    /// Transferring groups and weights over a NATS server on this machine.
    Bus,
}

/// The result of one bench.
#[derive(Serialize)]
struct Report {
    bench: &'static str,
    command: String,
    cpu: String,
    instruction_set: &'static str,
    threads: usize,
    /// Floating-point operations per second of multiply-adds in registers, on all threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_gflops: Option<Spread>,
    rows: Vec<Row>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peer_versions: Vec<String>,
    /// The most memory that this process has had.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_memory_bytes: Option<u64>,
}

/// One measured rate.
#[derive(Serialize)]
struct Row {
    name: String,
    unit: &'static str,
    per_second: Spread,
    #[serde(skip_serializing_if = "Option::is_none")]
    gflops: Option<Spread>,
    #[serde(skip_serializing_if = "Option::is_none")]
    share_of_peak: Option<Spread>,
    /// Ratio to the reference rate, round by round.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<Spread>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(args.repeats > 0, "repeats: expected 1 or more, got 0");
    ensure!((1..=100_000).contains(&args.batch), "batch: expected 1 to 100000, got {}", args.batch);
    ensure!(args.positions >= 12, "positions: expected 12 or more, got {}", args.positions);
    ensure!(args.threads <= 1_024, "threads: expected 0 to 1024, got {}", args.threads);
    ensure!((1..=4_096).contains(&args.answer_tokens), "answer-tokens: expected 1 to 4096, got {}", args.answer_tokens);
    let has_peer = matches!(args.what, What::Train | What::Decode | What::Grpo);
    ensure!(!args.peer || has_peer, "--peer: expected train, decode or grpo, got verify or bus");
    let takes_model = matches!(args.what, What::Decode | What::Grpo);
    ensure!(args.model.is_none() || takes_model, "--model: expected decode or grpo, got another benchmark");
    let is_cpu = args.device == Device::Cpu;
    let takes_device = has_peer && args.model.is_none();
    ensure!(
        is_cpu || takes_device,
        "--device: expected cpu for verify, bus and a pretrained model, got {}",
        args.device
    );
    ensure!(is_cpu || !args.peer, "--peer: expected --device cpu, the only device for peers, got {}", args.device);
    ensure!((1..=1_000_000).contains(&args.groups), "groups: expected 1 to 1000000, got {}", args.groups);
    let are_sizes = args.weights.iter().all(|mib| (1..=4_096).contains(mib));
    ensure!(are_sizes, "weights: expected 1 to 4096 MiB each, got {:?}", args.weights);
    ensure!((0.0..=3_600.0).contains(&args.seconds), "seconds: expected 0 to 3600, got {}", args.seconds);
    let report = match args.what {
        What::Train => measure(args, &mut Training::new(args)?)?,
        What::Decode => match &args.model {
            Some(model) => measure(args, &mut Answering::new(args, model)?)?,
            None => measure(args, &mut Decoding::new(args)?)?,
        },
        What::Grpo => {
            let model = args.model.as_deref().context("grpo: expected --model MODEL, got none")?;
            measure(args, &mut Learning::new(args, model)?)?
        }
        What::Verify => verify::measure(args)?,
        What::Bus => bus::measure(args)?,
    };
    if args.json { print(&serde_json::to_string(&report)?) } else { print(&report.text()) }
}

impl Args {
    fn num_threads(&self) -> usize {
        if self.threads == 0 { LocalConfig::num_cores() } else { self.threads }
    }

    fn report(&self, rows: Vec<Row>) -> Report {
        let command = std::env::args().skip(1).map(|word| quoted(&word)).collect::<Vec<_>>().join(" ");
        Report {
            bench: match self.what {
                What::Train => "train",
                What::Decode => "decode",
                What::Grpo => "grpo",
                What::Verify => "verify",
                What::Bus => "bus",
            },
            command: format!("autodidact {command}"),
            cpu: cpu_model(),
            instruction_set: instruction_set().0,
            threads: self.num_threads(),
            peak_gflops: None,
            rows,
            peer_versions: Vec::new(),
            peak_memory_bytes: None,
        }
    }
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Spread {
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Spread { median: (low + high) / 2.0, min: sorted[0], max: sorted[sorted.len() - 1] }
    }

    fn show(self, write: impl Fn(f64) -> String) -> String {
        format!("{} ({} to {})", write(self.median), write(self.min), write(self.max))
    }
}

impl Report {
    fn text(&self) -> String {
        let mut text = format!("{}\n{}, {}, {} thread", self.command, self.cpu, self.instruction_set, self.threads);
        text += if self.threads == 1 { "\n" } else { "s\n" };
        if let Some(peak) = self.peak_gflops {
            text += &format!("multiply-add peak {} GF/s\n", peak.show(|value| format!("{value:.0}")));
        }
        if let Some(size) = self.peak_memory_bytes {
            text += &format!("peak memory {}\n", bytes(size));
        }
        if !self.peer_versions.is_empty() {
            let versions = self.peer_versions.join("; ");
            text += &format!("{versions}; ratios are autodidact over these, round by round\n");
        }
        text += "medians (min to max)\n\n";
        let rows = self.rows.iter().map(|row| {
            let mut cells = vec![row.name.clone(), format!("{} {}/s", row.per_second.show(rate), row.unit)];
            cells.extend(row.gflops.map(|value| format!("{} GF/s", value.show(|value| format!("{value:.0}")))));
            cells.extend(row.share_of_peak.map(|value| format!("{} of peak", value.show(percent))));
            cells.extend(row.ratio.map(|value| format!("{} x", value.show(|value| format!("{value:.2}")))));
            cells
        });
        text + &table(&rows.collect::<Vec<_>>())
    }
}

/// Formats a rate; small ones with decimals.
fn rate(number: f64) -> String {
    if number < 100.0 { format!("{number:.2}") } else { count(number) }
}

/// Returns the processor's name as Linux reports it, or the architecture on other systems.
fn cpu_model() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    match (field("model name"), field("cpu family"), field("model\t")) {
        (Some(name), Some(family), Some(model)) => format!("{name} (family {family}, model {model})"),
        (Some(name), ..) => name,
        _ => std::env::consts::ARCH.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0].into_iter()), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of([4.0, 1.0].into_iter()), Spread { median: 2.5, min: 1.0, max: 4.0 });
    }
}
