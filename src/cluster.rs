//! `learner`, `actor` and `verifier`: the roles as processes of their own, with a NATS server between them.
//!
//! Only the learner reads a config. It takes the lease of its run, and announces manifest and config on the server; workers
//! compare what they are with what the run needs, and join.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bus::nats::{Credentials, Lease, Server, Settings, Terms, check_name};
use bus::{Bus, Faults, Faulty};
use learner::Manifest;
use proto::{Digest, Group, Role};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::counted::Counted;
use crate::endpoint::Listener;
use crate::metrics::WorkerMetrics;
use crate::report::{note, option, print, word};
use crate::run_config::{self, BusConfig, LocalConfig, RunConfig};
use crate::signals::stop_in_order;
use crate::train;

/// Where a run's processes meet.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Meeting {
    /// The NATS server, such as nats://127.0.0.1:4222; several with commas between them.
    #[arg(long, value_name = "URL")]
    pub(crate) bus: String,
    /// The run; without it a learner names it by what it depends on, and a worker joins the only one that goes on.
    #[arg(long, value_name = "ID")]
    run: Option<String>,
    /// The key of this process, as `keys init` makes it; its file's name is the name that the server knows.
    #[arg(long, value_name = "FILE")]
    nkey: Option<PathBuf>,
    /// Certificates that vouch for the server, besides those of this machine.
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
}

/// What a worker is told about itself.
#[derive(Clone, Debug, clap::Args)]
struct Worker {
    /// Names this process; its key's file does without it, or its machine and number.
    #[arg(long)]
    name: Option<String>,
    /// Serve this process to Prometheus at this address, such as 127.0.0.1:9101; port 0 takes a free one.
    #[arg(long, value_name = "ADDR")]
    metrics: Option<String>,
}

#[derive(clap::Args)]
pub(crate) struct LearnerArgs {
    #[command(flatten)]
    meeting: Meeting,
    #[command(flatten)]
    train: train::Args,
}

#[derive(clap::Args)]
pub(crate) struct ActorArgs {
    #[command(flatten)]
    meeting: Meeting,
    #[command(flatten)]
    worker: Worker,
    /// Threads that play; 0 for all cores.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1024))]
    threads: u16,
    /// Sequences decoded side by side.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    slots: u32,
}

#[derive(clap::Args)]
pub(crate) struct VerifierArgs {
    #[command(flatten)]
    meeting: Meeting,
    #[command(flatten)]
    worker: Worker,
}

/// What a learner says of its run to whoever comes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Announcement {
    manifest: Manifest,
    /// In full, as TOML.
    config: String,
    is_over: bool,
}

/// How long a server, or a run to join, may be waited for.
const PATIENCE: Duration = Duration::from_secs(300);

/// How often a worker looks whether its run is over.
const LOOK_EVERY: Duration = Duration::from_secs(1);

pub(crate) fn run_learner(args: LearnerArgs) -> Result<()> {
    train::start(&args.train, Some(args.meeting))
}

pub(crate) fn run_actor(args: &ActorArgs) -> Result<()> {
    let num_threads = match args.threads {
        0 => LocalConfig::num_cores(),
        threads => threads.into(),
    };
    let config = actor::Config { num_threads, num_slots: args.slots as usize };
    work(Role::Actor, &args.meeting, &args.worker, async |_, bus, shutdown| {
        let summary = actor::run(config, bus, shutdown).await?;
        Ok(format!("{} groups played, {} tokens", summary.num_groups, summary.num_tokens))
    })
}

pub(crate) fn run_verifier(args: &VerifierArgs) -> Result<()> {
    work(Role::Verifier, &args.meeting, &args.worker, async |config, bus, shutdown| {
        let summary = verifier::run(config.run.batch.num_rollouts, bus, shutdown).await?;
        Ok(format!("{} groups judged, {} answers", summary.num_groups, summary.num_verdicts))
    })
}

/// Joins a run and works for it until it is over or the process is told to stop. `play` says what was done.
fn work(
    role: Role,
    meeting: &Meeting,
    worker: &Worker,
    play: impl AsyncFnOnce(&RunConfig, Arc<dyn Bus>, CancellationToken) -> Result<String>,
) -> Result<()> {
    let shutdown = stop_in_order("handing back what is unfinished")?;
    let name = worker_name(role, worker, meeting)?;
    let listener = worker.metrics.as_deref().map(Listener::bind).transpose()?;
    let metrics = Arc::new(WorkerMetrics::new(role)?);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        if let Some(listener) = listener {
            print(&format!("{name}: metrics: http://{}/metrics", listener.address))?;
            listener.serve(metrics.clone())?;
        }
        let joined = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            joined = Joined::join(meeting, &name) => joined?,
        };
        print(&format!("{name}: joined run {} on {}", joined.run, meeting.bus))?;
        let _first = metrics.traffic.server.set(joined.server.clone());
        let bus = Arc::new(Counted::new(joined.bus.clone(), metrics.traffic.meters.clone()));
        let play = play(&joined.config, bus, shutdown.clone());
        tokio::pin!(play);
        let (done, ended) = tokio::select! {
            // It was told to stop, or cannot go on.
            done = &mut play => (done?, Ok(())),
            ended = joined.over() => {
                shutdown.cancel();
                (play.await?, ended)
            }
        };
        joined.server.flush().await;
        print(&format!("{name}: {done}"))?;
        ended
    })
}

/// A worker's place in a run.
struct Joined {
    server: Server,
    run: String,
    announced: Announcement,
    /// What it announces, read.
    config: RunConfig,
    bus: Arc<dyn Bus>,
}

impl Joined {
    /// Waits for the run, and checks that this build on this machine computes what the run needs.
    async fn join(meeting: &Meeting, name: &str) -> Result<Joined> {
        let server = Server::connect(meeting.settings(PATIENCE), name).await?;
        let (run, announced) = find(&server, meeting).await?;
        let config = run_config::from_toml(&run, &announced.config).context("the config of the run")?;
        expect_fit(&run, &announced.manifest, &train::manifest(&config)?)?;
        let BusConfig { ack_wait_seconds, fault, .. } = config.local.bus;
        let bus =
            Arc::new(server.join(&course(&run, &announced.manifest), name, Duration::from_secs_f64(ack_wait_seconds)));
        Ok(Joined { bus: with_faults(bus, fault), server, run, announced, config })
    }

    /// Waits until the run is over.
    async fn over(&self) -> Result<()> {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            // What is not there was lost, and comes again.
            let Ok(Some(now)) = read(&self.server, &self.run).await? else { continue };
            expect_fit(&self.run, &now.manifest, &self.announced.manifest)?;
            if now.is_over {
                return print(&format!("run {} is over", self.run));
            }
        }
    }
}

/// Finds a run to work for: the one that is named, or the only one that goes on.
async fn find(server: &Server, meeting: &Meeting) -> Result<(String, Announcement)> {
    let began = tokio::time::Instant::now();
    let mut has_told = false;
    loop {
        let names = match &meeting.run {
            Some(run) => vec![run.clone()],
            None => server.announced_runs().await?,
        };
        let mut found = Vec::new();
        for run in names {
            match read(server, &run).await? {
                Ok(Some(announced)) if !announced.is_over => found.push((run, announced)),
                Ok(_) => {}
                Err(error) if has_told => tracing::debug!(%error, run, "passed over"),
                Err(error) => tracing::warn!(
                    "run {run} is passed over: expected what a learner of this build announces, got {error}"
                ),
            }
        }
        let runs: Vec<&str> = found.iter().map(|(run, _)| run.as_str()).collect();
        match found.len() {
            1 => return Ok(found.remove(0)),
            0 => {}
            _ => bail!("--run: expected one of the runs on {}: {}", meeting.bus, runs.join(", ")),
        }
        let what = meeting.run.as_ref().map_or("a run".to_owned(), |run| format!("run {run}"));
        if began.elapsed() >= PATIENCE {
            bail!("waited {} s for a learner to announce {what} on {}", PATIENCE.as_secs(), meeting.bus);
        }
        if !has_told {
            note(format_args!("waiting for a learner to announce {what} on {}", meeting.bus));
            has_told = true;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Reads what is announced of a run. What cannot be read is of another build's learner, or of nobody who may announce.
async fn read(server: &Server, run: &str) -> Result<Result<Option<Announcement>, serde_json::Error>> {
    let bytes = server.announcement(run).await?;
    Ok(bytes.map(|bytes| serde_json::from_slice(&bytes)).transpose())
}

/// Checks that a process computes what a run needs.
fn expect_fit(run: &str, needed: &Manifest, own: &Manifest) -> Result<()> {
    match needed.expect_same(own) {
        Err(learner::Error::Manifest { field, was, is }) => {
            bail!("run {run}: {field}: the run needs {was}, this process has {is}")
        }
        same => Ok(same?),
    }
}

/// Names what a run computes: its streams, which processes that compute something else never see.
fn course(run: &str, manifest: &Manifest) -> String {
    let digest = Digest::of(manifest).short();
    if run == digest { digest } else { format!("{run}-{digest}") }
}

fn with_faults(bus: Arc<dyn Bus>, faults: Option<Faults>) -> Arc<dyn Bus> {
    let Some(faults) = faults else { return bus };
    tracing::warn!(?faults, "local.bus.fault: messages are lost, repeated and delayed on purpose");
    Arc::new(Faulty::new(bus, faults))
}

/// A learner's place in its run.
pub(crate) struct Led {
    pub(crate) server: Server,
    lease: Lease,
    announcement: Announcement,
    pub(crate) bus: Arc<dyn Bus>,
}

impl Meeting {
    /// Names the run: as it was told, or by what the run depends on.
    pub(crate) fn run_id(&self, manifest: &Manifest) -> String {
        self.run.clone().unwrap_or_else(|| Digest::of(manifest).short())
    }

    /// Gives the arguments that lead here again.
    pub(crate) fn words(&self) -> String {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let options = [
            ("--bus", Some(self.bus.clone())),
            ("--run", self.run.clone()),
            ("--nkey", path(&self.nkey)),
            ("--tls-ca", path(&self.tls_ca)),
        ];
        let given = options.into_iter().filter_map(|(name, value)| Some(option(name, &value?)));
        given.collect::<Vec<_>>().join(" ")
    }

    fn settings(&self, patience: Duration) -> Settings {
        let credentials = Credentials { nkey: self.nkey.clone(), tls_ca: self.tls_ca.clone() };
        Settings { url: self.bus.clone(), patience, credentials }
    }

    /// Takes the run for a learner, and announces it.
    pub(crate) async fn lead(
        &self,
        run_dir: &Path,
        manifest: &Manifest,
        config: &RunConfig,
        max_tasks: usize,
    ) -> Result<Led> {
        let run = self.run_id(manifest);
        check_name(&run).context("--run")?;
        let server = Server::connect(self.settings(config.local.stall_limit()), "learner").await?;
        let (num_rollouts, max_tokens) = (config.run.batch.num_rollouts, config.run.model.max_positions);
        let (needed, taken) = (Group::max_bytes(num_rollouts, max_tokens as u32), server.max_payload());
        if needed > taken {
            bail!(
                "batch.num_rollouts, model.max_positions: {num_rollouts} rollouts of {max_tokens} tokens may have {needed} \
                 bytes; {} takes messages of up to {taken} (max_payload)",
                self.bus
            );
        }
        let BusConfig { ack_wait_seconds, lease_seconds, num_replicas, fault, .. } = config.local.bus;
        let terms = Terms {
            max_tasks,
            ack_wait: Duration::from_secs_f64(ack_wait_seconds),
            lease: Duration::from_secs_f64(lease_seconds),
            num_replicas,
        };
        let holder = format!("{}:{}", machine(), std::path::absolute(run_dir)?.display());
        let (lease, bus) = server.lead(&run, &course(&run, manifest), &holder, terms).await?;
        let config = run_config::to_toml(config)?;
        let announcement = Announcement { manifest: manifest.clone(), config, is_over: false };
        lease.announce(serde_json::to_vec(&announcement)?);
        Ok(Led { server, lease, announcement, bus: with_faults(Arc::new(bus), fault) })
    }
}

impl Led {
    /// Which life of the run's learner this is.
    pub(crate) fn epoch(&self) -> u64 {
        self.lease.epoch()
    }

    /// Waits until the run is another learner's.
    pub(crate) async fn lost(&self) -> anyhow::Error {
        self.lease.lost().await.into()
    }

    /// Leaves a run that is another learner's.
    pub(crate) fn give_up(self) {
        self.lease.abandon();
    }

    /// Lets go of the run; when it is over, workers hear of it, and then its streams are removed.
    pub(crate) async fn leave(self, is_over: bool) -> Result<()> {
        let announcement = Announcement { is_over, ..self.announcement };
        self.lease.announce(serde_json::to_vec(&announcement)?);
        match is_over {
            true => self.lease.end().await,
            false => self.lease.release().await,
        }
        self.server.flush().await;
        Ok(())
    }
}

/// Names a worker in subjects: letters, digits, `-` and `_`.
fn worker_name(role: Role, worker: &Worker, meeting: &Meeting) -> Result<String> {
    let of_key = || meeting.nkey.as_ref()?.file_stem()?.to_str().map(str::to_owned);
    if let Some(name) = worker.name.clone().or_else(of_key) {
        check_name(&name).context(if worker.name.is_some() { "--name" } else { "--nkey" })?;
        return Ok(name);
    }
    let letters = machine();
    let letters = letters.chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' });
    Ok(format!("{}-{}-{}", word(&role), letters.take(32).collect::<String>(), std::process::id()))
}

fn machine() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "unnamed".to_owned())
}
