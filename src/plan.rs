//! The plan of a run: resolves the arguments of `train` and `learner` before anything starts.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use learner::{Control, Manifest, Models, RunLock};

use crate::begun;
use crate::cluster::{BusArgs, LEASE_FILE};
use crate::display;
use crate::endpoint::Listener;
use crate::files::is_partial;
use crate::manifest::manifest;
use crate::needs::Needs;
use crate::report::{count, note, option, quoted_path};
use crate::run_config::{self, LocalConfig, RunConfig};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Preset (laptop, ladder, qwen3-0.6b, smoke, smollm2, smollm2-lora) or TOML file [default: laptop].
    config: Option<String>,
    /// Run directory [default: `runs/<config>-<seed>-<n>`].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Stop after M minutes of wall time [default: 10, unless the config sets a number of steps].
    #[arg(long, value_name = "M")]
    minutes: Option<f64>,
    /// Stop after N steps.
    #[arg(long, value_name = "N", conflicts_with = "minutes", value_parser = clap::value_parser!(u64).range(1..=MAX_TOML))]
    steps: Option<u64>,
    /// Seed of the run.
    #[arg(long, value_parser = clap::value_parser!(u64).range(..=MAX_TOML))]
    seed: Option<u64>,
    /// Override one config key; repeatable.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Resume the run in --run-dir.
    #[arg(long, requires = "run_dir", conflicts_with_all = ["config", "seed", "steps", "fork"])]
    resume: bool,
    /// Start a new run with the config of the run in --run-dir.
    #[arg(long, requires = "run_dir", conflicts_with = "config")]
    fork: bool,
    /// Serve Prometheus metrics at this address, such as 127.0.0.1:9100; port 0 picks a free port.
    #[arg(long, value_name = "ADDR")]
    pub(crate) metrics: Option<String>,
    /// Print the resolved config and exit.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print one JSON object at the end instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The largest number that a config holds.
const MAX_TOML: u64 = i64::MAX as u64;
/// Steps of a run with `AUTODIDACT_CI=1`: enough to exercise every part.
const CI_STEPS: u64 = 3;
const DEFAULT_MINUTES: f64 = 10.0;
/// The folder of runs whose directory the command line does not name.
const RUNS: &str = "runs";
/// The end of a run as the command line sets it: after a number of steps, or by the clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    steps: Option<u64>,
    minutes: Option<f64>,
    is_shortened: bool,
}

impl End {
    pub(crate) fn new(steps: Option<u64>, minutes: Option<f64>) -> End {
        End { steps, minutes, is_shortened: false }
    }

    /// Shortens a run without an explicit number of steps if `AUTODIDACT_CI=1`. The note on standard error names `what`.
    pub(crate) fn shorten_for_ci(&mut self, what: &str) {
        if std::env::var_os("AUTODIDACT_CI").is_some_and(|value| value == "1") && self.steps.is_none() {
            note(format_args!("AUTODIDACT_CI=1: {what} shortened to {CI_STEPS} steps"));
            *self = End { steps: Some(CI_STEPS), minutes: None, is_shortened: true };
        }
    }

    /// Returns the equivalent arguments of `train`.
    pub(crate) fn words(self) -> Vec<String> {
        let steps = self.steps.map(|steps| ["--steps".to_owned(), steps.to_string()]);
        let minutes = self.minutes.map(|minutes| ["--minutes".to_owned(), minutes.to_string()]);
        steps.into_iter().chain(minutes).flatten().collect()
    }

    fn validate(self) -> Result<()> {
        self.minutes.map_or(Ok(()), |minutes| run_config::check_minutes("--minutes", minutes))
    }
}

/// Resolves the config of a new run: a preset or a TOML file, with the command line's changes.
pub(crate) fn resolve(config: Option<&Path>, overrides: &[String], seed: Option<u64>, end: End) -> Result<RunConfig> {
    end.validate()?;
    expect_said_once(overrides, seed, end)?;
    let mut implied: Vec<String> = seed.map(|seed| format!("seed={seed}")).into_iter().collect();
    // If the command line sets steps or minutes, the other one's value in the preset or file is removed.
    if let Some(steps) = end.steps {
        implied.extend([format!("schedule.num_steps={steps}"), "local.minutes=".to_owned()]);
    }
    if let Some(minutes) = end.minutes {
        implied.extend(["schedule.num_steps=".to_owned(), format!("local.minutes={minutes:?}")]);
    }
    Ok(clocked(run_config::resolve(config, overrides, &implied)?))
}

/// Rejects a key that both an option and `--set` set, and settings that exclude each other.
fn expect_said_once(overrides: &[String], seed: Option<u64>, end: End) -> Result<()> {
    let steps = end.steps.filter(|_| !end.is_shortened);
    let options = [
        ("--seed", seed.map(|seed| seed.to_string()), "seed", None),
        ("--steps", steps.map(|steps| steps.to_string()), "schedule.num_steps", Some("local.minutes")),
        ("--minutes", end.minutes.map(|minutes| minutes.to_string()), "local.minutes", Some("schedule.num_steps")),
    ];
    for (option, value, key, excluded) in options {
        let Some(value) = value else { continue };
        let is_said = |assignment: &&String| {
            let removes = assignment.ends_with('=');
            run_config::sets(assignment, key)
                || excluded.is_some_and(|excluded| !removes && run_config::sets(assignment, excluded))
        };
        if let Some(said) = overrides.iter().find(is_said) {
            bail!("{option} {value} and --set {said}: expected one of them, got both");
        }
    }
    Ok(())
}

/// Resolves the config of a resumed run: its own config, with the changes that are allowed.
fn resumed(run_dir: &Path, end: End, overrides: &[String]) -> Result<RunConfig> {
    end.validate()?;
    expect_said_once(overrides, None, end)?;
    let mut config = run_config::of_run(run_dir, overrides)?;
    config.expect_file()?;
    config.name = begun::config_name(run_dir).unwrap_or(config.name);
    if let (Some(minutes), Some(steps)) = (end.minutes, config.run.schedule.num_steps) {
        bail!("--minutes: expected a run without a fixed number of steps, got {minutes} for a run of {steps} steps");
    }
    let minutes = end.minutes.or(config.local.minutes);
    Ok(clocked(RunConfig { local: LocalConfig { minutes, ..config.local }, ..config }))
}

/// Sets the default time limit if the config has neither a number of steps nor minutes.
fn clocked(mut config: RunConfig) -> RunConfig {
    if config.run.schedule.num_steps.is_none() {
        config.local.minutes.get_or_insert(DEFAULT_MINUTES);
    }
    config
}

/// A fully resolved run.
pub(crate) struct Plan {
    pub(crate) config: RunConfig,
    /// The pretrained models that the learner needs.
    pub(crate) models: Models,
    /// The arguments of `train` that reproduce the config, except the seed and the end of the schedule.
    origin: String,
    pub(crate) manifest: Manifest,
    pub(crate) needs: Needs,
    /// Empty until [`Plan::take_run_dir`] if the command line names none.
    pub(crate) run_dir: PathBuf,
    pub(crate) resume: bool,
    pub(crate) time_limit: Option<Duration>,
    pub(crate) quiet: bool,
    pub(crate) bus_args: Option<BusArgs>,
}

impl Plan {
    pub(crate) fn new(args: &Args, bus_args: Option<BusArgs>) -> Result<Plan> {
        let mut end = End::new(args.steps, args.minutes);
        let config = match &args.run_dir {
            Some(run_dir) if args.resume => resumed(run_dir, end, &args.overrides)?,
            Some(run_dir) if args.fork => {
                end.shorten_for_ci("this run is");
                resolve(Some(&run_config::path_in_run(run_dir)?), &args.overrides, args.seed, end)?
            }
            _ => {
                end.shorten_for_ci("this run is");
                resolve(args.config.as_deref().map(Path::new), &args.overrides, args.seed, end)?
            }
        };
        let run_dir = args.run_dir.clone().filter(|_| !args.fork).unwrap_or_default();
        if !args.resume && !args.dry_run {
            expect_free(&run_dir)?;
        }
        if bus_args.is_none() {
            config.run.actor.device.open().context("actor.device")?;
        }
        let needs = Needs::of(&config, bus_args.is_none())?;
        if !args.dry_run {
            needs.expect_room(if run_dir.as_os_str().is_empty() { Path::new(RUNS) } else { &run_dir })?;
        }
        Ok(Plan {
            manifest: manifest(&config)?,
            models: config.models()?,
            needs,
            origin: origin(args),
            time_limit: config.local.minutes.map(|minutes| Duration::from_secs_f64(60.0 * minutes)),
            config,
            run_dir,
            resume: args.resume,
            quiet: args.json,
            bus_args,
        })
    }

    /// Locks the run directory. Creates one if the command line names none.
    pub(crate) fn take_run_dir(&mut self) -> Result<RunLock> {
        if self.run_dir.as_os_str().is_empty() {
            self.run_dir = make_run_dir(&self.config)?;
        }
        let lock = RunLock::take(&self.run_dir)?;
        if !self.resume {
            // Meanwhile another process may have started and ended a run there.
            expect_free(&self.run_dir)?;
        }
        Ok(lock)
    }

    /// Returns the command that runs the same config again and ends it as `control` does.
    pub(crate) fn again(&self, control: Control) -> String {
        format!(
            "autodidact train {} --seed {} --steps {} --set schedule.decay_from={}",
            self.origin, self.config.run.seed, control.stop_at, control.decay_from
        )
    }

    /// Returns the command that resumes the run.
    pub(crate) fn go_on(&self) -> String {
        let run_dir = quoted_path(&self.run_dir);
        let minutes = self.config.local.minutes.map_or(String::new(), |minutes| format!(" --minutes {minutes}"));
        let command = match &self.bus_args {
            None => "train".to_owned(),
            Some(bus_args) => format!("learner {}", bus_args.words()),
        };
        format!("autodidact {command} --resume --run-dir {run_dir}{minutes}")
    }

    pub(crate) fn display(&self, listener: Option<&Listener>) -> Result<display::Settings> {
        let config = &self.config.run;
        let trained = match config.model.adapter {
            Some(_) => format!(", {} of them trained", count(config.model.num_trained() as f64)),
            None => String::new(),
        };
        let mut opening = format!(
            "run directory: {}\n{} parameters{trained}, {} problems x {} answers per step, {} threads, config {}\n",
            self.run_dir.display(),
            count(config.model.num_parameters() as f64),
            config.batch.num_tasks,
            config.batch.num_rollouts,
            self.config.local.num_threads(),
            config.digest().short(),
        );
        if self.config.base.is_some() {
            opening += &self.needs.lines(&self.run_dir, self.bus_args.is_some())?;
        }
        if let Some(bus_args) = &self.bus_args {
            let (bus, run) = (bus_args.bus(), bus_args.run_id(&self.manifest));
            let [bus, named] = [option("--bus", &bus), option("--run", &run)];
            opening += &format!("run {run}; actors and verifiers join with {bus} {named}\n");
        }
        if let Some(listener) = listener {
            opening += &format!("metrics: http://{}/metrics\n", listener.address);
        }
        Ok(display::Settings {
            opening,
            quiet: self.quiet,
            time_limit: self.time_limit,
            control: config.control(),
            warmup_steps: config.schedule.warmup_steps,
            bootstrap_steps: config.self_play.as_ref().map(|own| own.bootstrap_steps + config.batch.lag),
            language: self.config.language(),
        })
    }
}

/// Returns the arguments that select the config: preset or file, and the `--set` options.
fn origin(args: &Args) -> String {
    let config = match &args.run_dir {
        Some(run_dir) if args.resume || args.fork => run_dir.join("config.toml"),
        _ => args.config.as_deref().unwrap_or(run_config::DEFAULT_PRESET).into(),
    };
    let is_of_origin = |assignment: &&String| {
        let is_said_otherwise = |key: &&str| run_config::sets(assignment, key);
        !assignment.starts_with("local.")
            && !["seed", "schedule.num_steps", "schedule.decay_from"].iter().any(is_said_otherwise)
    };
    let overrides = args.overrides.iter().filter(is_of_origin).map(|assignment| option("--set", assignment));
    std::iter::once(quoted_path(&config)).chain(overrides).collect::<Vec<_>>().join(" ")
}

/// Checks that a folder is empty, except for files of a process that was killed before it had started a run there.
fn expect_free(run_dir: &Path) -> Result<()> {
    let mut entries = run_dir.read_dir().into_iter().flatten().flatten().map(|entry| entry.file_name());
    let left = [RunLock::FILE_NAME, LEASE_FILE];
    let is_left = |name: OsString| {
        left.iter().any(|left| name == *left)
            || ["config.toml", LEASE_FILE].iter().any(|whole| is_partial(&name, whole))
    };
    if entries.all(is_left) {
        return Ok(());
    }
    let folder = quoted_path(run_dir);
    let found = match run_dir.join("config.toml").exists() {
        true => format!("a run; resume it with `--resume --run-dir {folder}`"),
        false => "files that are not a run".to_owned(),
    };
    bail!("--run-dir {folder}: expected an empty or nonexistent directory, found {found}");
}

/// Creates a new run folder with the first free number. No other process can create the same one.
fn make_run_dir(config: &RunConfig) -> Result<PathBuf> {
    let folder = Path::new(RUNS);
    let at = |path: &Path| format!("create {}; use --run-dir to choose another directory", path.display());
    std::fs::create_dir_all(folder).with_context(|| at(folder))?;
    let mut number = 1;
    loop {
        let path = folder.join(format!("{}-{}-{number}", config.name, config.run.seed));
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
            made => return made.with_context(|| at(&path)).map(|()| path),
        }
    }
}
