//! `train`: trains a network and prints a table of scores; all roles in one process, or the learner alone.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bus::{Bus, InProcess};
use domains::Split;
use learner::{Audit, Exam, LanguageConfig, Observer, Outcome, RunLock, RunOptions, Summary, families};
use policy::Backend;
use rand::TryRng as _;
use rand::rngs::SysRng;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use verifier::Judge;

use crate::begun;
use crate::bus_meters::Duty;
use crate::closing::Closing;
use crate::cluster::{BusArgs, Led};
use crate::counting_bus::CountingBus;
use crate::curves;
use crate::display::Display;
use crate::endpoint::Listener;
use crate::files::write_whole;
use crate::metrics::Metrics;
use crate::plan::{Args, Plan};
use crate::record::Recorder;
use crate::report::print;
use crate::run_config::{self, RunConfig};
use crate::signals::stop_in_order;

/// Time without progress after which the display shows what the run waits for.
const TELL_AFTER: Duration = Duration::from_secs(20);

#[derive(clap::Args)]
pub(crate) struct LearnerArgs {
    #[command(flatten)]
    bus_args: BusArgs,
    #[command(flatten)]
    train: Args,
}

pub(crate) fn run_learner(args: LearnerArgs) -> Result<()> {
    args.bus_args.place.servers()?;
    start(&args.train, Some(args.bus_args))
}

/// How long a process that is done waits for threads that are still busy.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(1);

/// Trains. With `bus_args`, actors and verifiers connect through that server; otherwise they are threads of this process.
pub(crate) fn start(args: &Args, bus_args: Option<BusArgs>) -> Result<()> {
    let shutdown = stop_in_order("writing a checkpoint")?;
    let mut plan = Plan::new(args, bus_args)?;
    if args.dry_run {
        return print(&run_config::to_toml(&plan.config)?);
    }
    let listener = args.metrics.as_deref().map(Listener::bind).transpose()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let lock = plan.take_run_dir()?;
    let ended = runtime.block_on(run_roles(&plan, lock, listener, shutdown));
    // A checker that never returns would keep its thread, and this process with it.
    runtime.shutdown_timeout(SHUTDOWN_LIMIT);
    let (summary, cpu_time, lock) = ended?;
    lock.expect_in_place()?;
    curves::write(&plan.run_dir.join("curves.svg"), &summary.evals)?;
    let closing = Closing { plan: &plan, summary: &summary, cpu_time };
    print(&if args.json { closing.json()?.to_string() } else { closing.text()? })
}

/// Connects to or starts the other roles. Checks the config before the run is announced: a refused one must change nothing.
/// Returns the learner's device too.
async fn meet(plan: &Plan, shutdown: &CancellationToken) -> Result<(Others, Backend, Arc<Metrics>, Vec<Exam>)> {
    begun::expect(&plan.run_dir, &plan.manifest, &plan.config)?;
    let config = &plan.config.run;
    let exam = |name: &String| Ok(Exam { name: name.clone(), problems: plan.config.exam(name, Split::Dev)? });
    let exams = config.exams.names.iter().map(exam).collect::<Result<Vec<Exam>>>()?;
    let duties = if plan.bus_args.is_some() { &[Duty::Learn][..] } else { &Duty::ALL };
    let metrics = Arc::new(Metrics::new(&plan.run_dir, duties, plan.resume, &families(config))?);
    let traffic = metrics.traffic();
    let backend = plan.config.open(config.learner.device).context("learner.device")?;
    let Some(bus_args) = &plan.bus_args else {
        let bus = Arc::new(CountingBus::new(Arc::new(InProcess::new()), traffic.meters.clone()));
        // On the same device they share what is there.
        let same = (config.actor.device == config.learner.device).then(|| backend.clone());
        let of_actor = same.map_or_else(|| plan.config.open(config.actor.device).context("actor.device"), Ok)?;
        return Ok((Others::here(bus, &plan.config, of_actor, shutdown), backend, metrics, exams));
    };
    let exam_tasks: usize = exams.iter().map(|exam| exam.problems.len()).sum();
    let max_tasks = (config.batch.lag as usize + 1) * config.batch.num_tasks as usize + exam_tasks;
    let mut led = tokio::select! {
        led = bus_args.lead(&plan.run_dir, &plan.manifest, &plan.config, max_tasks, plan.needs) => led?,
        () = shutdown.cancelled() => bail!("stopped before the learner had connected to its NATS server"),
    };
    led.bus = Arc::new(CountingBus::new(led.bus, traffic.meters.clone()));
    let _first = traffic.server.set(led.server.clone());
    Ok((Others::Elsewhere(Box::new(led)), backend, metrics, exams))
}

/// Starts the roles, and waits for the end. Returns the summary, the CPU time of the run, and the lock.
async fn run_roles(
    plan: &Plan,
    lock: RunLock,
    listener: Option<Listener>,
    shutdown: CancellationToken,
) -> Result<(Summary, Duration, RunLock)> {
    let (mut others, backend, metrics, exams) = match meet(plan, &shutdown).await {
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
        // The config comes first: it makes the folder a run. The manifest is for people; the journal has it too.
        write_whole(&plan.run_dir.join("config.toml"), run_config::to_toml(&plan.config)?.as_bytes())?;
        write_whole(&plan.run_dir.join("manifest.json"), begun::to_json(&plan.manifest, &plan.config)?.as_bytes())?;
    } else {
        run_config::keep_places(&plan.run_dir, local)?;
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
        checker_limit: Duration::from_secs(local.checker_seconds),
        tell_after: TELL_AFTER.min(local.stall_limit() / 2),
        term: others.term(),
        reissue_after: plan.bus_args.as_ref().map(|_| local.reissue_after()),
        audit: plan.bus_args.as_ref().and_then(|_| local.audit_share()).map(draw_audit).transpose()?,
        tokenizer_json: tokenizer_json(&plan.config),
        backend,
        models: plan.models.clone(),
    };
    let mut recorder = Recorder::open(&plan.run_dir)?;
    let display = Display::start(plan.display(listener.as_ref())?)?;
    if let Some(listener) = listener {
        listener.serve(metrics.clone())?;
    }
    let (config, manifest, bus) = (config.clone(), plan.manifest.clone(), others.bus());
    let sources = plan.config.sources();
    let stopped = shutdown.clone();
    let mut learner = tokio::spawn(async move {
        let observer: Observer<'_> = &mut |event| {
            recorder.record(&event)?;
            metrics.observe(&event, recorder.last_step());
            display.show(event);
            Ok(())
        };
        let summary = learner::run(config, options, &lock, manifest, sources, exams, bus, observer, stopped).await;
        (summary, recorder.finish(), display, lock)
    });
    // Only the learner ends normally. The others end only by failing, and their failure ends the run.
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

/// Returns an audit of a share of the tasks, with a fresh random secret: the run's seed is known, as every task contains it.
fn draw_audit(share: f64) -> Result<Audit> {
    let mut secret = [0; 32];
    SysRng.try_fill_bytes(&mut secret).context("generate a random secret")?;
    Ok(Audit { share, secret })
}

/// The roles other than the learner.
enum Others {
    /// Threads of this process.
    Here { bus: Arc<dyn Bus>, roles: JoinSet<Result<()>> },
    /// Processes that join over a NATS server.
    Elsewhere(Box<Led>),
}

impl Others {
    fn here(bus: Arc<dyn Bus>, config: &RunConfig, backend: Backend, shutdown: &CancellationToken) -> Others {
        let (RunConfig { run, local, .. }, language) = (config, config.language());
        let config = actor::Config { backend, num_threads: local.num_threads(), num_slots: local.slots };
        let actor = actor::run(config, language.clone(), bus.clone(), shutdown.clone());
        let verifier = verifier::run(Judge::new(language, run.batch.num_rollouts), bus.clone(), shutdown.clone());
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

    fn term(&self) -> u64 {
        match self {
            Others::Here { .. } => 0,
            Others::Elsewhere(led) => led.term(),
        }
    }

    /// Waits until a failure outside the learner ends the run, and returns it.
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

/// Describes the tokenizer of a run: the names of all symbols, or whose tokenizer it is.
fn tokenizer_json(config: &RunConfig) -> String {
    if let Some(LanguageConfig { base, .. }) = config.run.language {
        return serde_json::json!({"type": "of-the-base-model", "base": base}).to_string();
    }
    let language = crate::language();
    let ids = 0..language.vocabulary_size() as proto::TokenId;
    let names: Vec<String> = ids.map(|token| language.token_name(token)).collect();
    serde_json::json!({"type": "word-level", "tokens": names}).to_string()
}
