//! `train`: from random weights to a table of what was learned; all roles in one process, or the learner alone.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bus::{Bus, InProcess};
use domains::{Split, exam, exam_specs};
use learner::{Audit, BuildId, Control, Exam, Manifest, Observer, Outcome, RunLock, RunOptions, Summary, families};
use policy::Numerics;
use rand::TryRng as _;
use rand::rngs::SysRng;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::closing::Closing;
use crate::cluster::{LEASE_FILE, Led, Meeting};
use crate::counted::{Counted, Duty};
use crate::curves;
use crate::display::{self, Display};
use crate::endpoint::Listener;
use crate::files::{is_partial, write_whole};
use crate::metrics::Metrics;
use crate::record::Recorder;
use crate::report::{count, note, option, print, quoted_path};
use crate::run_config::{self, LocalConfig, RunConfig};
use crate::signals::stop_in_order;
use crate::{begun, language};

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
    let shutdown = stop_in_order("writing a checkpoint")?;
    let mut plan = Plan::new(args, meeting)?;
    if args.dry_run {
        return print(&run_config::to_toml(&plan.config)?);
    }
    let listener = args.metrics.as_deref().map(Listener::bind).transpose()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let lock = plan.take_run_dir()?;
    let (summary, cpu_time, lock) = runtime.block_on(run_roles(&plan, lock, listener, shutdown))?;
    lock.expect_in_place()?;
    curves::write(&plan.run_dir.join("curves.svg"), &summary.evals)?;
    let closing = Closing { plan: &plan, summary: &summary, cpu_time };
    print(&if args.json { closing.json()?.to_string() } else { closing.text()? })
}

/// When a run ends, where the command line says so: after a number of steps, or by the clock.
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

    /// `AUTODIDACT_CI=1` shortens what has no number of steps of its own; `what` is said to be shortened.
    pub(crate) fn shorten_for_ci(&mut self, what: &str) {
        if std::env::var_os("AUTODIDACT_CI").is_some_and(|value| value == "1") && self.steps.is_none() {
            note(format_args!("AUTODIDACT_CI=1: {what} shortened as --steps {CI_STEPS} does"));
            *self = End { steps: Some(CI_STEPS), minutes: None, is_shortened: true };
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
    expect_said_once(overrides, seed, end)?;
    let mut implied: Vec<String> = seed.map(|seed| format!("seed={seed}")).into_iter().collect();
    // Of steps and clock the command line names one; what the preset or file says of the other does not hold.
    if let Some(steps) = end.steps {
        implied.extend([format!("schedule.num_steps={steps}"), "local.minutes=".to_owned()]);
    }
    if let Some(minutes) = end.minutes {
        implied.extend(["schedule.num_steps=".to_owned(), format!("local.minutes={minutes:?}")]);
    }
    Ok(clocked(run_config::resolve(config, overrides, &implied)?))
}

/// Refuses a key that is said by an option and by `--set`, or by two that exclude each other.
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

/// Resolves a run that goes on: its own config, and what may change.
fn resumed(run_dir: &Path, end: End, overrides: &[String]) -> Result<RunConfig> {
    end.validate()?;
    expect_said_once(overrides, None, end)?;
    let mut config = run_config::of_run(run_dir, overrides)?;
    config.name = begun::config_name(run_dir).unwrap_or(config.name);
    if let (Some(minutes), Some(steps)) = (end.minutes, config.run.schedule.num_steps) {
        bail!("--minutes: expected a run that ends by the clock, got {minutes} for one that ends with step {steps}");
    }
    let minutes = end.minutes.or(config.local.minutes);
    Ok(clocked(RunConfig { local: LocalConfig { minutes, ..config.local }, ..config }))
}

/// Has the clock end what nothing else ends.
fn clocked(mut config: RunConfig) -> RunConfig {
    if config.run.schedule.num_steps.is_none() {
        config.local.minutes.get_or_insert(DEFAULT_MINUTES);
    }
    config
}

/// A run, decided.
pub(crate) struct Plan {
    pub(crate) config: RunConfig,
    /// What leads to the config again, as arguments of `train`: all but the seed and the end of the schedule.
    origin: String,
    pub(crate) manifest: Manifest,
    /// Empty until it is taken, where nobody named it.
    pub(crate) run_dir: PathBuf,
    resume: bool,
    time_limit: Option<Duration>,
    quiet: bool,
    meeting: Option<Meeting>,
}

impl Plan {
    fn new(args: &Args, meeting: Option<Meeting>) -> Result<Plan> {
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
        if meeting.is_none() {
            config.run.actor.device.open().context("actor.device")?;
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

    /// Takes the run directory, and makes one where nobody named it.
    fn take_run_dir(&mut self) -> Result<RunLock> {
        if self.run_dir.as_os_str().is_empty() {
            self.run_dir = make_run_dir(&self.config)?;
        }
        let lock = RunLock::take(&self.run_dir)?;
        if !self.resume {
            // Another process may have begun a run there meanwhile, and ended it.
            expect_free(&self.run_dir)?;
        }
        Ok(lock)
    }

    /// Gives the command that runs the same config with this end.
    pub(crate) fn again(&self, control: Control) -> String {
        format!(
            "autodidact train {} --seed {} --steps {} --set schedule.decay_from={}",
            self.origin, self.config.run.seed, control.stop_at, control.decay_from
        )
    }

    /// Gives the command that goes on with the run.
    pub(crate) fn go_on(&self) -> String {
        let run_dir = quoted_path(&self.run_dir);
        let minutes = self.config.local.minutes.map_or(String::new(), |minutes| format!(" --minutes {minutes}"));
        let command = match &self.meeting {
            None => "train".to_owned(),
            Some(meeting) => format!("learner {}", meeting.words()),
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
            let [bus, named] = [option("--bus", &bus), option("--run", &run)];
            opening += &format!("run {run}; actors and verifiers join with {bus} {named}\n");
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

/// What a run depends on whose learner is on this machine.
pub(crate) fn manifest(config: &RunConfig) -> Result<Manifest> {
    manifest_with(config, Numerics::measure(config.run.learner.device).context("learner.device")?)
}

/// What a run with this arithmetic depends on.
pub(crate) fn manifest_with(config: &RunConfig, numerics: Numerics) -> Result<Manifest> {
    let exams: BTreeMap<_, _> = exam_specs()
        .into_iter()
        .map(|spec| Ok((spec.name.to_owned(), exam(spec.name)?.digest())))
        .collect::<Result<_>>()?;
    let verifiers = domains::registry().iter().map(|domain| (domain.name().to_owned(), "1".to_owned())).collect();
    Ok(Manifest {
        config: config.run.digest(),
        build: BuildId(env!("AUTODIDACT_BUILD_ID").to_owned()),
        verifiers,
        exams,
        numerics,
        reproducible: config.run.is_reproducible(),
    })
}

/// Names the config on a command line: preset or file, and what was set.
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

/// Checks that a folder holds no more than what is left of a run that was killed before it was one.
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
        true => format!("a run; `--resume --run-dir {folder}` goes on with it"),
        false => "files that are no run".to_owned(),
    };
    bail!("--run-dir {folder}: expected an empty or absent folder, found {found}");
}

/// Makes a folder that no other process has made: the first number that is free.
fn make_run_dir(config: &RunConfig) -> Result<PathBuf> {
    let folder = Path::new("runs");
    let at = |path: &Path| format!("create {}; --run-dir names another place", path.display());
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

/// Finds who plays and judges. Before anybody hears of the run: a refused config must change nothing.
async fn meet(plan: &Plan, shutdown: &CancellationToken) -> Result<(Others, Arc<Metrics>, Vec<Exam>)> {
    begun::expect(&plan.run_dir, &plan.manifest, &plan.config)?;
    let config = &plan.config.run;
    let exam = |name: &String| Ok(Exam { name: name.clone(), problems: plan.config.exam(name, Split::Dev)? });
    let exams = config.exams.names.iter().map(exam).collect::<Result<Vec<Exam>>>()?;
    let duties = if plan.meeting.is_some() { &[Duty::Learn][..] } else { &Duty::ALL };
    let metrics = Arc::new(Metrics::new(&plan.run_dir, duties, plan.resume, &families(config))?);
    let traffic = metrics.traffic();
    let Some(meeting) = &plan.meeting else {
        let bus = Arc::new(Counted::new(Arc::new(InProcess::new()), traffic.meters.clone()));
        return Ok((Others::here(bus, &plan.config, shutdown), metrics, exams));
    };
    let exam_tasks: usize = exams.iter().map(|exam| exam.problems.len()).sum();
    let max_tasks = (config.batch.lag as usize + 1) * config.batch.num_tasks as usize + exam_tasks;
    let mut led = tokio::select! {
        led = meeting.lead(&plan.run_dir, &plan.manifest, &plan.config, max_tasks) => led?,
        () = shutdown.cancelled() => bail!("stopped before the run had its NATS server"),
    };
    led.bus = Arc::new(Counted::new(led.bus, traffic.meters.clone()));
    let _first = traffic.server.set(led.server.clone());
    Ok((Others::Elsewhere(Box::new(led)), metrics, exams))
}

/// Starts the roles, and follows what they do. Gives the CPU time of this process besides, and the lock back.
async fn run_roles(
    plan: &Plan,
    lock: RunLock,
    listener: Option<Listener>,
    shutdown: CancellationToken,
) -> Result<(Summary, Duration, RunLock)> {
    let (mut others, metrics, exams) = match meet(plan, &shutdown).await {
        Ok(met) => met,
        Err(error) => {
            if !plan.resume {
                lock.discard();
            }
            return Err(error);
        }
    };
    let (config, local) = (&plan.config.run, &plan.config.local);
    if !plan.resume {
        // First: with it the folder is a run. The manifest is for people; the journal has it too.
        write_whole(&plan.run_dir.join("config.toml"), run_config::to_toml(&plan.config)?.as_bytes())?;
        write_whole(&plan.run_dir.join("manifest.json"), begun::to_json(&plan.manifest, &plan.config)?.as_bytes())?;
    }
    let options = RunOptions {
        run_dir: plan.run_dir.clone(),
        resume: plan.resume,
        num_threads: local.num_threads(),
        time_limit: plan.time_limit,
        checkpoint_every: local.checkpoint_every,
        keep_checkpoints: local.keep_checkpoints,
        keep_journal: local.keep_journal,
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
        listener.serve(metrics.clone())?;
    }
    let (config, manifest, bus) = (config.clone(), plan.manifest.clone(), others.bus());
    let stopped = shutdown.clone();
    let mut learner = tokio::spawn(async move {
        let observer: Observer<'_> = &mut |event| {
            recorder.record(&event)?;
            metrics.observe(&event, recorder.last_step());
            display.show(event);
            Ok(())
        };
        let sources = crate::sources();
        let summary = learner::run(config, options, &lock, manifest, sources, exams, bus, observer, stopped).await;
        (summary, recorder.finish(), display, lock)
    });
    // The learner ends by itself; the others end only by failing, and their failure ends the run.
    let (ended, failure) = tokio::select! {
        ended = &mut learner => (Some(ended?), None),
        failure = others.failure() => (None, Some(failure)),
    };
    shutdown.cancel();
    // The lock is kept until others know that the learner has left.
    let (summary, cpu_time, display, lock) = match ended {
        Some(ended) => ended,
        None => learner.await?,
    };
    match others {
        Others::Elsewhere(led) if failure.is_some() => led.give_up(),
        Others::Elsewhere(led) => {
            let summary = summary.as_ref().ok();
            let is_over = summary.is_some_and(|summary| summary.outcome == Outcome::Finished);
            led.leave(is_over, summary.map(|summary| summary.step)).await?;
        }
        Others::Here { .. } => {}
    }
    let shown = display.finish();
    match failure {
        Some(error) => Err(error),
        None => {
            let summary = summary?;
            shown?;
            Ok((summary, cpu_time?, lock))
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
        let config =
            actor::Config { device: run.actor.device, num_threads: local.num_threads(), num_slots: local.slots };
        let actor = actor::run(config, language(), bus.clone(), shutdown.clone());
        let verifier = verifier::run(run.batch.num_rollouts, language(), bus.clone(), shutdown.clone());
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

fn tokenizer_json() -> String {
    let language = language();
    let ids = 0..language.vocabulary_size() as proto::TokenId;
    let names: Vec<String> = ids.map(|token| language.token_name(token)).collect();
    serde_json::json!({"type": "word-level", "tokens": names}).to_string()
}
