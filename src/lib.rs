//! The command line of `autodidact`, which trains networks on problems that a machine can check.
//!
//! It is a library that `main.rs` calls: cargo compiles a library in parallel with its dependencies, but a program after them.

#![deny(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a macro that prints panics where nobody reads: use `report`"
)]

mod baselines;
mod begun;
mod bench;
mod bus_meters;
mod closing;
mod cluster;
mod counting_bus;
mod curves;
mod display;
mod endpoint;
mod eval;
mod export;
mod fetch;
mod files;
mod generate;
mod input;
mod inspect;
mod keys;
mod late;
mod machine;
mod manifest;
mod metrics;
mod model;
mod needs;
mod pairing;
mod panics;
mod parquet_file;
mod plan;
mod player;
mod pretrained;
mod problems;
mod record;
mod replay;
mod report;
mod room;
mod run_config;
mod runs;
mod signals;
mod solve;
mod study;
mod subject;
mod train;
mod verify;

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use clap::{Parser, Subcommand};
use language::{Language, SymbolLanguage};
use tracing_subscriber::EnvFilter;

#[derive(Parser)]
#[command(version, about = "Self-play reinforcement learning for reasoning, with machine-checked rewards.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a network from random weights or a pretrained model, with all roles in this process.
    Train(plan::Args),
    /// Run the learner; actors and verifiers connect over NATS.
    Learner(train::LearnerArgs),
    /// Run an actor: generate rollouts for a learner over NATS.
    Actor(cluster::ActorArgs),
    /// Run a verifier: score rollouts for a learner over NATS.
    Verifier(cluster::VerifierArgs),
    /// List the runs on a NATS server, or remove a run without a learner.
    Runs(runs::Args),
    /// Create keys and server config for a secured NATS server.
    Keys(keys::Args),
    /// Evaluate a run, a checkpoint or a pretrained model on an exam, and compare it.
    Eval(eval::Args),
    /// Run every arm of a study with every seed, and compare the arms with the control.
    Study(study::Args),
    /// Recompute a run from its journal and verify every digest.
    Replay(replay::Args),
    /// Show the contents of a run's journal, even while the run is in progress.
    Inspect(inspect::Args),
    /// Solve one problem with the policy of a run or a pretrained model.
    Solve(solve::Args),
    /// Write a run's weights for other programs, or its verified answers as training data.
    Export(export::Args),
    /// Check answers: read JSON lines, print one verdict per line.
    Verify(verify::Args),
    /// Generate problems of a ladder level, or rebuild an exam.
    Generate(generate::Args),
    /// Get a pretrained model.
    Model(model::Args),
    /// Benchmark training, decoding, verification or the NATS bus on this machine.
    Bench(bench::Args),
    /// List the domains with their levels and exams.
    Domains(generate::DomainsArgs),
    /// Print the full config that a preset or a file resolves to.
    Config(ConfigArgs),
}

#[derive(clap::Args)]
struct ConfigArgs {
    /// Preset (laptop, ladder, qwen3-0.6b, smoke, smollm2, smollm2-lora) or TOML file [default: laptop].
    config: Option<PathBuf>,
    /// Override one config key; repeatable.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

/// The default log filter for standard error. The NATS client is off: the bus reports connection events itself.
const DEFAULT_LOG: &str = "warn,async_nats=off";

/// Runs the command that the process's arguments name.
pub fn main() -> ExitCode {
    panics::end_the_process();
    let Cli { command } = Cli::parse();
    let result = log_to_standard_error().and_then(|()| run(command));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if report::has_no_reader(&error) => ExitCode::SUCCESS,
        Err(error) => {
            report::note(format_args!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Logs what `RUST_LOG` selects to standard error; an empty one counts as unset.
fn log_to_standard_error() -> Result<()> {
    let asked = std::env::var("RUST_LOG").unwrap_or_default();
    let directives = if asked.trim().is_empty() { DEFAULT_LOG } else { &asked };
    let filter = EnvFilter::try_new(directives).map_err(|error| {
        anyhow!("RUST_LOG: expected levels such as info or warn,learner=debug, got {asked:?}: {error}")
    })?;
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_plain = is_set("NO_COLOR") || std::env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && !is_plain)
        // Otherwise it would panic if standard error is a closed terminal.
        .log_internal_errors(false)
        .init();
    Ok(())
}

fn run(command: Command) -> Result<()> {
    signals::listen_as_process_1()?;
    match command {
        Command::Train(args) => train::start(&args, None),
        Command::Learner(args) => train::run_learner(args),
        Command::Actor(args) => cluster::run_actor(&args),
        Command::Verifier(args) => cluster::run_verifier(&args),
        Command::Runs(args) => runs::run(&args),
        Command::Keys(args) => keys::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Study(args) => study::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Solve(args) => solve::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Model(args) => model::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Domains(args) => generate::print_domains(&args),
        Command::Config(args) => run_config::resolve(args.config.as_deref(), &args.overrides, &[])
            .and_then(|config| report::print(&run_config::to_toml(&config)?)),
    }
}

/// Returns the language of networks from random weights.
fn language() -> Arc<dyn Language> {
    Arc::new(SymbolLanguage)
}
