//! `train`: from random weights to a table of what was learned; all roles in one process, or the learner alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bus::{Bus, InProcess};
use domains::{Split, exam, exam_specs, vocabulary};
use learner::{
    Audit, BuildId, Control, Exam, Manifest, Observer, Outcome, RunLock, RunOptions, Summary, expect_begun_with,
};
use policy::Numerics;
use rand::TryRng as _;
use rand::rngs::SysRng;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::closing::Closing;
use crate::cluster::{LEASE_FILE, Led, Meeting};
use crate::counted::Counted;
use crate::curves;
use crate::display::{self, Display};
use crate::endpoint::Listener;
use crate::files::{partial, write_whole};
use crate::metrics::Metrics;
use crate::record::Recorder;
use crate::report::{count, print, quoted};
use crate::run_config::{self, RunConfig};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A preset (laptop, ladder, smoke) or a TOML file; `laptop` without it.
    config: Option<String>,
    /// Where the run lives; `runs/<config>-<seed>-<n>` without it.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Wall time after which the run ends; 10 without it, unless the config says how many steps.
    #[arg(long, value_name = "M")]
    minutes: Option<f64>,
    /// Steps after which the run ends.
    #[arg(long, value_name = "N", conflicts_with = "minutes", value_parser = clap::value_parser!(u64).range(1..=MAX_TOML))]
    steps: Option<u64>,
    /// Seed of the run.
    #[arg(long, value_parser = clap::value_parser!(u64).range(..=MAX_TOML))]
    seed: Option<u64>,
    /// Change one key of the config.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Go on where the run in --run-dir stopped.
    #[arg(long, requires = "run_dir", conflicts_with_all = ["config", "seed", "steps", "fork"])]
    resume: bool,
    /// Start a new run from the config of the run in --run-dir.
    #[arg(long, requires = "run_dir", conflicts_with = "config")]
    fork: bool,
    /// Serve the run to Prometheus at this address, such as 127.0.0.1:9100; port 0 takes a free one.
    #[arg(long, value_name = "ADDR")]
    metrics: Option<String>,
    /// Print what would run, and stop.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object at the end instead of text.
    #[arg(long)]
    json: bool,
}

/// The largest number that a config holds.
const MAX_TOML: u64 = i64::MAX as u64;
/// Steps that `AUTODIDACT_CI=1` stands for: enough to see every part at work.
const CI_STEPS: u64 = 3;
const DEFAULT_MINUTES: f64 = 10.0;
/// After how long without progress a person is told what is waited for.
const TELL_AFTER: Duration = Duration::from_secs(20);

/// Trains; `meeting` is where actors and verifiers come to, which are threads of this process without it.
pub(crate) fn start(args: &Args, meeting: Option<Meeting>) -> Result<()> {
    let plan = Plan::new(args, meeting)?;
    if args.dry_run {
        return print(&run_config::to_toml(&plan.config)?);
    }
    let listener = args.metrics.as_deref().map(Listener::bind).transpose()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (summary, cpu_time) = runtime.block_on(run_roles(&plan, listener))?;
    curves::write(&plan.run_dir.join("curves.svg"), &summary.evals)?;
    let closing = Closing { plan: &plan, summary: &summary, cpu_time };
    print(&if args.json { closing.json()?.to_string() } else { closing.text()? })
}

/// When a run ends, where the command line says so: after a number of steps, or by the clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    pub(crate) steps: Option<u64>,
    pub(crate) minutes: Option<f64>,
}

impl End {
    /// `AUTODIDACT_CI=1` shortens what has no number of steps of its own; `what` is said to be shortened.
    pub(crate) fn shorten_for_ci(&mut self, what: &str) {
        if std::env::var_os("AUTODIDACT_CI").is_some_and(|value| value == "1") && self.steps.is_none() {
            eprintln!("AUTODIDACT_CI=1: {what} shortened as --steps {CI_STEPS} does");
            *self = End { steps: Some(CI_STEPS), minutes: None };
        }
    }

    /// Gives the arguments of `train` that say the same.
    pub(crate) fn words(self) -> Vec<String> {
        let steps = self.steps.map(|steps| ["--steps".to_owned(), steps.to_string()]);
        let minutes = self.minutes.map(|minutes| ["--minutes".to_owned(), minutes.to_string()]);
        steps.into_iter().chain(minutes).flatten().collect()
    }

    fn validate(self) -> Result<()> {
        self.minutes.map_or(Ok(()), |minutes| run_config::check_minutes("--minutes", minutes))
    }
}

/// Resolves a new run: a preset or a TOML file, and what the command line changes.
pub(crate) fn resolve(config: Option<&Path>, overrides: &[String], seed: Option<u64>, end: End) -> Result<RunConfig> {
    end.validate()?;
    let mut overrides = overrides.to_vec();
    overrides.extend(seed.map(|seed| format!("seed={seed}")));
    overrides.extend(end.steps.map(|steps| format!("schedule.num_steps={steps}")));
    // Where the clock decides, a number of steps from the preset does not.
    overrides.extend(end.minutes.map(|_| "schedule.num_steps=".to_owned()));
    Ok(clocked(run_config::resolve(config, &overrides)?, end))
}

/// Resolves a run that goes on: its own config, and what may change.
fn resumed(run_dir: &Path, end: End, overrides: &[String]) -> Result<RunConfig> {
    end.validate()?;
    let config = run_config::of_run(run_dir, overrides)?;
    if let (Some(minutes), Some(steps)) = (end.minutes, config.run.schedule.num_steps) {
        bail!("--minutes: expected a run that ends by the clock, got {minutes} for one that ends with step {steps}");
    }
    Ok(clocked(config, end))
}

/// Sets the wall time of a run that the clock ends; one that ends with a step has none.
fn clocked(mut config: RunConfig, end: End) -> RunConfig {
    let minutes = end.minutes.or(config.local.minutes).unwrap_or(DEFAULT_MINUTES);
    config.local.minutes = config.run.schedule.num_steps.is_none().then_some(minutes);
    config
}

/// A run, decided.
pub(crate) struct Plan {
    pub(crate) config: RunConfig,
    /// What leads to the config again, as arguments of `train`: all but the seed and the end of the schedule.
    origin: Vec<String>,
    pub(crate) manifest: Manifest,
    pub(crate) run_dir: PathBuf,
    resume: bool,
    time_limit: Option<Duration>,
    quiet: bool,
    meeting: Option<Meeting>,
}

impl Plan {
    fn new(args: &Args, meeting: Option<Meeting>) -> Result<Plan> {
        let mut end = End { steps: args.steps, minutes: args.minutes };
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
        let run_dir = match &args.run_dir {
            Some(run_dir) if !args.fork => run_dir.clone(),
            _ => free_run_dir(&config),
        };
        if is_occupied(&run_dir) && !args.resume && !args.dry_run {
            let folder = quoted(&run_dir.display().to_string());
            let found = match run_dir.join("config.toml").exists() {
                true => format!("a run; `--resume --run-dir {folder}` goes on with it"),
                false => "files that are no run".to_owned(),
            };
            bail!("--run-dir {folder}: expected an empty or absent folder, found {found}");
        }
        Ok(Plan {
            manifest: manifest(&config)?,
            origin: origin(args),
            time_limit: config.local.minutes.map(|minutes| Duration::from_secs_f64(60.0 * minutes)),
            config,
            run_dir,
            resume: args.resume,
            quiet: args.json,
            meeting,
        })
    }

    /// Gives the command that runs the same config with this end.
    pub(crate) fn again(&self, control: Control) -> String {
        format!(
            "autodidact train {} --seed {} --steps {} --set schedule.decay_from={}",
            self.origin.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "),
            self.config.run.seed,
            control.stop_at,
            control.decay_from
        )
    }

    /// Gives the command that goes on with the run.
    pub(crate) fn go_on(&self) -> String {
        let run_dir = quoted(&self.run_dir.display().to_string());
        let minutes = self.config.local.minutes.map_or(String::new(), |minutes| format!(" --minutes {minutes}"));
        let command = match &self.meeting {
            None => "train".to_owned(),
            Some(meeting) => {
                let words: Vec<String> = meeting.words().iter().map(|word| quoted(word)).collect();
                format!("learner {}", words.join(" "))
            }
        };
        format!("autodidact {command} --resume --run-dir {run_dir}{minutes}")
    }

    fn display(&self, listener: Option<&Listener>) -> display::Settings {
        let config = &self.config.run;
        let mut opening = format!(
            "run directory: {}\n{} parameters, {} problems x {} answers a step, {} threads, config {}\n",
            self.run_dir.display(),
            count(config.model.num_parameters() as f64),
            config.batch.num_tasks,
            config.batch.num_rollouts,
            self.config.local.num_threads(),
            config.digest().short(),
        );
        if let Some(meeting) = &self.meeting {
            let (bus, run) = (meeting.bus(), meeting.run_id(&self.manifest));
            opening += &format!("run {run}; actors and verifiers join with --bus {} --run {run}\n", quoted(&bus));
        }
        if let Some(listener) = listener {
            opening += &format!("metrics: http://{}/metrics\n", listener.address);
        }
        display::Settings {
            opening,
            quiet: self.quiet,
            time_limit: self.time_limit,
            control: config.control(),
            warmup_steps: config.schedule.warmup_steps,
            bootstrap_steps: config.self_play.as_ref().map(|own| own.bootstrap_steps + config.batch.lag),
        }
    }
}

/// What the run depends on.
pub(crate) fn manifest(config: &RunConfig) -> Result<Manifest> {
    let exams: BTreeMap<_, _> = exam_specs()
        .into_iter()
        .map(|spec| Ok((spec.name.to_owned(), exam(spec.name)?.digest())))
        .collect::<Result<_>>()?;
    let verifiers = domains::registry().iter().map(|domain| (domain.name().to_owned(), "1".to_owned())).collect();
    let device = config.run.learner.device;
    Ok(Manifest {
        config: config.run.digest(),
        build: BuildId(env!("AUTODIDACT_BUILD_ID").to_owned()),
        verifiers,
        exams,
        numerics: Numerics::measure(device)?,
        reproducible: device.is_reproducible(),
    })
}

/// Names the config on a command line: preset or file, and what was set.
fn origin(args: &Args) -> Vec<String> {
    let config = match &args.run_dir {
        Some(run_dir) if args.resume || args.fork => run_dir.join("config.toml").display().to_string(),
        _ => args.config.clone().unwrap_or_else(|| run_config::DEFAULT_PRESET.to_owned()),
    };
    let overrides = args.overrides.iter().filter(|assignment| !assignment.starts_with("local."));
    std::iter::once(config).chain(overrides.flat_map(|assignment| ["--set".to_owned(), assignment.clone()])).collect()
}

/// Tells whether a folder holds more than what is left of a run that was killed before it was one.
fn is_occupied(run_dir: &Path) -> bool {
    let mut entries = run_dir.read_dir().into_iter().flatten().flatten();
    let [config, lease] = ["config.toml", LEASE_FILE].map(|name| partial(Path::new(name)));
    let may_be_left = [config, lease, RunLock::FILE_NAME.into(), LEASE_FILE.into()];
    entries.any(|entry| !may_be_left.contains(&entry.file_name()))
}

fn free_run_dir(config: &RunConfig) -> PathBuf {
    let name = |number: u32| PathBuf::from(format!("runs/{}-{}-{number}", config.name, config.run.seed));
    (1..).map(name).find(|path| !path.exists()).expect("some number is free")
}

/// Starts the roles, and follows what they do. Gives the CPU time of this process besides.
async fn run_roles(plan: &Plan, listener: Option<Listener>) -> Result<(Summary, Duration)> {
    let (config, local) = (&plan.config.run, &plan.config.local);
    let lock = RunLock::take(&plan.run_dir)?;
    // Before anybody hears of it: a refused config must change nothing.
    expect_begun_with(&plan.run_dir, &plan.manifest)?;
    let exams: Vec<Exam> = config
        .exams
        .names
        .iter()
        .map(|name| Ok(Exam { name: name.clone(), problems: plan.config.exam(name, Split::Dev)? }))
        .collect::<Result<_>>()?;
    let shutdown = CancellationToken::new();
    let metrics = Arc::new(Metrics::new(&plan.run_dir)?);
    let traffic = metrics.traffic();
    let mut others = match &plan.meeting {
        None => {
            let bus = Arc::new(Counted::new(Arc::new(InProcess::new()), traffic.meters.clone()));
            Others::here(bus, &plan.config, &shutdown)
        }
        Some(meeting) => {
            let exam_tasks: usize = exams.iter().map(|exam| exam.problems.len()).sum();
            let max_tasks = (config.batch.lag as usize + 1) * config.batch.num_tasks as usize + exam_tasks;
            match meeting.lead(&plan.run_dir, &plan.manifest, &plan.config, max_tasks).await {
                Ok(mut led) => {
                    led.bus = Arc::new(Counted::new(led.bus, traffic.meters.clone()));
                    let _first = traffic.server.set(led.server.clone());
                    Others::Elsewhere(Box::new(led))
                }
                Err(error) => {
                    if !plan.resume {
                        lock.discard();
                    }
                    return Err(error);
                }
            }
        }
    };
    if !plan.resume {
        // First: with it the folder is a run. The manifest is for people; the journal has it too.
        write_whole(&plan.run_dir.join("config.toml"), run_config::to_toml(&plan.config)?.as_bytes())?;
        write_whole(&plan.run_dir.join("manifest.json"), serde_json::to_string_pretty(&plan.manifest)?.as_bytes())?;
    }
    let options = RunOptions {
        run_dir: plan.run_dir.clone(),
        resume: plan.resume,
        num_threads: local.num_threads(),
        time_limit: plan.time_limit,
        checkpoint_every: local.checkpoint_every,
        keep_checkpoints: local.keep_checkpoints,
        stall_limit: local.stall_limit(),
        tell_after: TELL_AFTER.min(local.stall_limit() / 2),
        epoch: others.epoch(),
        reissue_after: plan.meeting.as_ref().map(|_| local.reissue_after()),
        audit: plan.meeting.as_ref().and_then(|_| local.audit_share()).map(draw_audit).transpose()?,
        tokenizer_json: tokenizer_json(),
    };
    let mut recorder = Recorder::open(&plan.run_dir)?;
    let display = Display::start(plan.display(listener.as_ref()))?;
    if let Some(listener) = listener {
        tokio::spawn(listener.serve(metrics.clone()));
    }
    let (config, manifest, bus) = (config.clone(), plan.manifest.clone(), others.bus());
    let stopped = shutdown.clone();
    let mut learner = tokio::spawn(async move {
        let observer: Observer<'_> = &mut |event| {
            recorder.record(&event)?;
            metrics.observe(&event);
            display.show(event);
            Ok(())
        };
        let sources = crate::sources();
        let summary = learner::run(config, options, &lock, manifest, sources, exams, bus, observer, stopped).await;
        (summary, recorder.cpu_time(), display, lock)
    });
    tokio::spawn(stop_on_signal(shutdown.clone(), "writing a checkpoint"));
    // The learner ends by itself; the others end only by failing, and their failure ends the run.
    let (ended, failure) = tokio::select! {
        ended = &mut learner => (Some(ended?), None),
        failure = others.failure() => (None, Some(failure)),
    };
    shutdown.cancel();
    // The lock is kept until others know that the learner has left.
    let (summary, cpu_time, display, _lock) = match ended {
        Some(ended) => ended,
        None => learner.await?,
    };
    match others {
        Others::Elsewhere(led) if failure.is_some() => led.give_up(),
        Others::Elsewhere(led) => {
            led.leave(summary.as_ref().is_ok_and(|summary| summary.outcome == Outcome::Finished)).await?;
        }
        Others::Here { .. } => {}
    }
    let shown = display.finish();
    match failure {
        Some(error) => Err(error),
        None => {
            let summary = summary?;
            shown?;
            Ok((summary, cpu_time?))
        }
    }
}

/// Has a share of the tasks audited, by a secret that is drawn now: the seed of a run stands in every task.
fn draw_audit(share: f64) -> Result<Audit> {
    let mut secret = [0; 32];
    SysRng.try_fill_bytes(&mut secret).context("ask the system for a secret")?;
    Ok(Audit { share, secret })
}

/// Who plays and judges.
enum Others {
    /// Threads of this process.
    Here { bus: Arc<dyn Bus>, roles: JoinSet<Result<()>> },
    /// Whoever comes.
    Elsewhere(Box<Led>),
}

impl Others {
    fn here(bus: Arc<dyn Bus>, config: &RunConfig, shutdown: &CancellationToken) -> Others {
        let RunConfig { run, local, .. } = config;
        let config = actor::Config { num_threads: local.num_threads(), num_slots: local.slots };
        let actor = actor::run(config, bus.clone(), shutdown.clone());
        let verifier = verifier::run(run.batch.num_rollouts, bus.clone(), shutdown.clone());
        let mut roles = JoinSet::new();
        roles.spawn(async { Ok(actor.await.map(drop)?) });
        roles.spawn(async { Ok(verifier.await.map(drop)?) });
        Others::Here { bus, roles }
    }

    fn bus(&self) -> Arc<dyn Bus> {
        match self {
            Others::Here { bus, .. } => bus.clone(),
            Others::Elsewhere(led) => led.bus.clone(),
        }
    }

    fn epoch(&self) -> u64 {
        match self {
            Others::Here { .. } => 0,
            Others::Elsewhere(led) => led.epoch(),
        }
    }

    /// Waits until the run cannot go on for what happens outside the learner.
    async fn failure(&mut self) -> anyhow::Error {
        let roles = match self {
            Others::Here { roles, .. } => roles,
            Others::Elsewhere(led) => return led.lost().await,
        };
        match roles.join_next().await {
            Some(Ok(Err(error))) => error,
            Some(Err(panic)) => panic.into(),
            Some(Ok(Ok(()))) | None => std::future::pending().await,
        }
    }
}

/// Ctrl-C or SIGTERM once stops at the next chance; twice quits.
pub(crate) async fn stop_on_signal(shutdown: CancellationToken, how: &str) {
    let mut terminate = match signal(SignalKind::terminate()) {
        Ok(terminate) => terminate,
        Err(error) => return tracing::warn!(%error, "signals cannot be heard"),
    };
    let mut told = async || {
        tokio::select! {
            interrupted = tokio::signal::ctrl_c() => interrupted.is_ok(),
            terminated = terminate.recv() => terminated.is_some(),
        }
    };
    if told().await {
        eprintln!("stopping: {how} (again quits at once)");
        shutdown.cancel();
    }
    if told().await {
        std::process::exit(130);
    }
}

fn tokenizer_json() -> String {
    let names: Vec<String> = (0..vocabulary::VOCABULARY_SIZE as proto::Token).map(vocabulary::token_name).collect();
    serde_json::json!({"type": "word-level", "tokens": names}).to_string()
}
