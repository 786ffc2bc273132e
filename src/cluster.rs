//! `learner`, `actor` and `verifier`: the roles as separate processes that communicate over a NATS server.
//!
//! Only the learner reads a config. It takes the lease of its run, and announces manifest and config on the server. Workers
//! check that they match the run's manifest, and join.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bus::nats::{Credentials, Identity, Leader, Lease, Server, Servers, Settings, StreamLimits, check_name};
use bus::{Faults, Faulty};
use learner::{Manifest, RunLock};
use policy::{Device, Numerics};
use proto::{Digest, Group, Role};
use rand::TryRng as _;
use rand::rngs::SysRng;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use verifier::Judge;

use crate::counting_bus::CountingBus;
use crate::endpoint::Listener;
use crate::fetch::{Source, files_of, serve};
use crate::files::write_whole;
use crate::manifest::{build_id, manifest_with};
use crate::metrics::WorkerMetrics;
use crate::needs::{Needs, expect_memory_to_play};
use crate::pretrained::Opened;
use crate::report::{clock, note, option, print, word};
use crate::run_config::{self, BusConfig, LocalConfig, RunConfig};
use crate::signals::stop_in_order;

/// A NATS server, and how a process says there who it is.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Place {
    /// NATS server, such as nats://127.0.0.1:4222; separate several with commas. Credentials precede the host:
    /// nats://USER:PASSWORD@HOST or nats://TOKEN@HOST.
    #[arg(long, value_name = "URL", value_parser = Given::read)]
    bus: Given,
    /// NKey file of this process, from `keys init`; the server knows the process by the name of this file.
    #[arg(long, value_name = "FILE")]
    nkey: Option<PathBuf>,
    /// Additional CA certificates (PEM) to trust for the server.
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
}

/// The parsed value of `--bus`, or the error. A clap error would quote the value, which may contain a password.
#[derive(Clone, Debug)]
struct Given(Result<Servers, String>);

/// Where a run's processes meet.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct BusArgs {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Run ID [default: for a learner, a digest of the manifest; for a worker, the only run with a learner].
    #[arg(long, value_name = "ID")]
    run: Option<String>,
}

/// What a worker is told about itself.
#[derive(Clone, Debug, clap::Args)]
struct Worker {
    /// Name of this process [default: the name of its --nkey file, else ROLE-HOST-PID].
    #[arg(long)]
    name: Option<String>,
    /// Serve Prometheus metrics at this address, such as 127.0.0.1:9101; port 0 picks a free port.
    #[arg(long, value_name = "ADDR")]
    metrics: Option<String>,
    /// Pretrained model that the run begins with, if it is elsewhere on this machine: a path, or a name from `autodidact model
    /// get`.
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
}

#[derive(clap::Args)]
pub(crate) struct ActorArgs {
    #[command(flatten)]
    bus_args: BusArgs,
    #[command(flatten)]
    worker: Worker,
    /// Device for the policy: cpu, candle-cpu, cuda or cuda:N [default: `actor.device` of the run].
    #[arg(long)]
    device: Option<Device>,
    /// CPU threads for rollouts; 0 uses all cores.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1024))]
    threads: u16,
    /// Sequences decoded in parallel.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    slots: u32,
}

#[derive(clap::Args)]
pub(crate) struct VerifierArgs {
    #[command(flatten)]
    bus_args: BusArgs,
    #[command(flatten)]
    worker: Worker,
}

/// A learner's announcement of its run to all workers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Announcement {
    manifest: Manifest,
    /// The name of the run's config, for people.
    #[serde(default)]
    pub(crate) config_name: String,
    /// The full config as TOML.
    config: String,
    pub(crate) is_over: bool,
    /// Completed steps when the learner left.
    #[serde(default)]
    pub(crate) num_steps: Option<u64>,
}

/// Maximum time to wait for a server or for a run to join.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long a worker that is done waits for threads that are still busy.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(1);

/// Interval at which a worker checks whether its run is over.
const LOOK_EVERY: Duration = Duration::from_secs(1);

impl Given {
    fn read(text: &str) -> Result<Given, std::convert::Infallible> {
        Ok(Given(text.parse().map_err(|error: bus::Error| error.to_string())))
    }
}

impl Place {
    /// Returns the servers.
    ///
    /// # Errors
    /// When `--bus` names no valid server.
    pub(crate) fn servers(&self) -> Result<&Servers> {
        self.bus.0.as_ref().map_err(|error| anyhow!("--bus: {error}"))
    }

    /// Connects to the server under this process name.
    pub(crate) async fn connect(&self, name: &str, patience: Duration) -> Result<Server> {
        let credentials = Credentials { nkey: self.nkey.clone(), tls_ca: self.tls_ca.clone() };
        let settings = Settings { servers: self.servers()?.clone(), patience, credentials };
        Ok(Server::connect(settings, name).await?)
    }

    /// Returns the server's name for the key of this process, if it has a key.
    pub(crate) fn name_of_key(&self) -> Result<Option<String>> {
        let Some(name) = self.nkey.as_ref().and_then(|path| path.file_stem()?.to_str()) else { return Ok(None) };
        check_name(name).context("--nkey")?;
        Ok(Some(name.to_owned()))
    }
}

pub(crate) fn run_actor(args: &ActorArgs) -> Result<()> {
    let num_threads = match args.threads {
        0 => LocalConfig::num_cores(),
        threads => threads.into(),
    };
    args.device.map_or(Ok(()), |device| device.open().map(drop).context("--device"))?;
    work(Role::Actor, &args.bus_args, &args.worker, async |config, bus, shutdown| {
        let device = args.device.unwrap_or(config.run.actor.device);
        ensure!(
            device.is_reproducible() || !config.run.is_reproducible(),
            "--device: expected cpu in a reproducible run, got {device}; to use {device}, start the learner with \
             --set actor.device={device}"
        );
        ensure!(
            device.is_reproducible() || config.local.audit_share().is_none(),
            "--device: expected cpu in a run with audits (local.bus.audit_share), got {device}, whose \
             rollouts are not reproducible"
        );
        if device == Device::Cpu {
            expect_memory_to_play(&config.run.model)?;
        }
        let backend = config.open(device).context("actor.device")?;
        let language = config.language();
        let config = actor::Config { backend, num_threads, num_slots: args.slots as usize };
        let summary = actor::run(config, language, bus, shutdown).await?;
        Ok(format!("{} groups generated, {} tokens", summary.num_groups, summary.num_tokens))
    })
}

pub(crate) fn run_verifier(args: &VerifierArgs) -> Result<()> {
    work(Role::Verifier, &args.bus_args, &args.worker, async |config, bus, shutdown| {
        let summary =
            verifier::run(Judge::new(config.language(), config.run.batch.num_rollouts), bus, shutdown).await?;
        Ok(format!("{} groups scored, {} answers", summary.num_groups, summary.num_verdicts))
    })
}

/// Joins a run and works for it until it is over or the process is told to stop. `play` returns a summary of its work.
fn work(
    role: Role,
    bus_args: &BusArgs,
    worker: &Worker,
    play: impl AsyncFnOnce(&RunConfig, Arc<dyn bus::Bus>, CancellationToken) -> Result<String>,
) -> Result<()> {
    bus_args.place.servers()?;
    bus_args.run.as_deref().map_or(Ok(()), check_name).context("--run")?;
    let shutdown = stop_in_order("returning unfinished work")?;
    let name = worker_name(role, worker, bus_args)?;
    let listener = worker.metrics.as_deref().map(Listener::bind).transpose()?;
    let metrics = Arc::new(WorkerMetrics::new(role)?);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        if let Some(listener) = listener {
            print(&format!("{name}: metrics: http://{}/metrics", listener.address))?;
            listener.serve(metrics.clone())?;
        }
        let joined = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            joined = Joined::join(bus_args, worker, &name) => joined?,
        };
        print(&format!("{name}: joined run {} on {}", joined.run, bus_args.place.servers()?))?;
        let _first = metrics.traffic.server.set(joined.server.clone());
        let bus = Arc::new(CountingBus::new(joined.bus.clone(), metrics.traffic.meters.clone()));
        let play = play(&joined.config, bus, shutdown.clone());
        tokio::pin!(play);
        let (done, ended) = tokio::select! {
            // The process was told to stop, or failed.
            done = &mut play => (done?, Ok(())),
            ended = joined.over() => {
                shutdown.cancel();
                (play.await?, ended)
            }
        };
        joined.server.flush().await;
        print(&format!("{name}: {done}"))?;
        ended
    });
    // A checker that never returns would keep its thread, and this process with it.
    runtime.shutdown_timeout(SHUTDOWN_LIMIT);
    ended
}

/// A worker's place in a run.
struct Joined {
    server: Server,
    run: String,
    announced: Announcement,
    /// The announced config, parsed.
    config: RunConfig,
    bus: Arc<dyn bus::Bus>,
}

impl Joined {
    /// Waits for the run, and checks that this build on this machine computes what the run needs.
    async fn join(bus_args: &BusArgs, worker: &Worker, name: &str) -> Result<Joined> {
        let server = bus_args.place.connect(name, PATIENCE).await?;
        let (run, announced) = find(&server, bus_args).await?;
        let base = match &worker.base {
            Some(base) => Some(base.clone()),
            None => base_of(&server, &run, &announced, name).await?,
        };
        let config = run_config::from_toml(&run, &announced.config, base.as_deref());
        let config = config.with_context(|| {
            let hint = if base.is_some() { "; --base says where its pretrained model is" } else { "" };
            format!("read the config of the run{hint}")
        })?;
        // On devices without bitwise reproducibility there are no numerics to compare.
        let numerics = match config.run.is_reproducible() {
            true => Numerics::measure(Device::Cpu)?,
            false => announced.manifest.numerics.clone(),
        };
        expect_fit(&run, &announced.manifest, &manifest_with(&config, numerics)?)?;
        let BusConfig { ack_wait_seconds, fault, .. } = config.local.bus;
        let bus = Arc::new(server.join(
            &run_fingerprint(&run, &announced.manifest),
            name,
            Duration::from_secs_f64(ack_wait_seconds),
        ));
        Ok(Joined { bus: with_faults(bus, fault), server, run, announced, config })
    }

    /// Waits until the run is over.
    async fn over(&self) -> Result<()> {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            // A missing or unreadable announcement was lost. The learner announces it again.
            let Ok(Some(now)) = read(&self.server, &self.run).await? else { continue };
            expect_fit(&self.run, &now.manifest, &self.announced.manifest)?;
            if now.is_over {
                return print(&format!("run {} is over", self.run));
            }
        }
    }
}

/// Returns where the pretrained model of a run lies on this machine: where the learner has it, in the cache, or there once it is
/// fetched. `None` if the run begins with none.
async fn base_of(server: &Server, run: &str, announced: &Announcement, name: &str) -> Result<Option<String>> {
    let Some((digest, place)) = run_config::base_of_toml(&announced.config) else { return Ok(None) };
    // A worker of another build is refused before it fetches anything.
    let own = Manifest { build: build_id(), ..announced.manifest.clone() };
    expect_fit(run, &announced.manifest, &own)?;
    if let Ok(found) = Opened::named(&place) {
        if found.digest == digest {
            return Ok(Some(place));
        }
        note(format_args!(
            "{place}: expected the pretrained model of run {run}, with digest {}, got one with digest {}; it is left alone",
            digest.short(),
            found.digest.short()
        ));
    }
    let bus = server.join(&run_fingerprint(run, &announced.manifest), name, PATIENCE);
    let learner_lives = async || -> Result<bool> {
        let lives = server.leader(run).await?.is_some_and(|leader| leader.lives);
        match read(server, run).await? {
            Ok(Some(now)) if now.is_over => bail!("run {run} is over, and its pretrained model is not on this machine"),
            // The learner announces it again, if there is one.
            Ok(None) if !lives => bail!("run {run} was removed, and its pretrained model is not on this machine"),
            _ => Ok(lives),
        }
    };
    let fetched = Source { bus: &bus, run, digest }.find_or_fetch(learner_lives).await?;
    let path = fetched.to_str().with_context(|| format!("{}: expected a path in UTF-8", fetched.display()))?;
    Ok(Some(path.to_owned()))
}

/// Finds a run to work for: the named run or the only one. It must have a learner and not be over.
async fn find(server: &Server, bus_args: &BusArgs) -> Result<(String, Announcement)> {
    let (began, servers) = (tokio::time::Instant::now(), bus_args.place.servers()?);
    let what = bus_args.run.as_ref().map_or("a run".to_owned(), |run| format!("run {run}"));
    let mut has_told = false;
    loop {
        let names = match &bus_args.run {
            Some(run) => vec![run.clone()],
            None => server.announced_runs().await?,
        };
        let (mut found, mut leaders, mut without) = (Vec::new(), Vec::new(), Vec::new());
        for run in names {
            let announced = match read(server, &run).await? {
                Ok(Some(announced)) if !announced.is_over => announced,
                Ok(_) => continue,
                Err(error) => {
                    match has_told {
                        true => tracing::debug!(%error, run, "run skipped"),
                        false => tracing::warn!(
                            "run {run} is skipped: expected an announcement by a learner of this build, got {error}"
                        ),
                    }
                    continue;
                }
            };
            match server.leader(&run).await? {
                Some(leader) if leader.lives => {
                    leaders.push(format!("{run} ({})", describe(&leader)));
                    found.push((run, announced));
                }
                leader => {
                    without.push(format!("run {run} has no learner{}", leader.map_or_else(String::new, last_seen)))
                }
            }
        }
        match found.len() {
            1 => return Ok(found.remove(0)),
            0 => {}
            _ => bail!("--run: expected one of the runs with a learner on {servers}: {}", leaders.join(", ")),
        }
        let without: String = without.iter().map(|run| format!("; {run}")).collect();
        if began.elapsed() >= PATIENCE {
            bail!("waited {} s for a learner to announce {what} on {servers}{without}", PATIENCE.as_secs());
        }
        if !has_told {
            note(format_args!("waiting for a learner to announce {what} on {servers}{without}"));
            has_told = true;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Describes a learner that is alive: since when and where.
pub(crate) fn describe(leader: &Leader) -> String {
    let Leader { name, leads_for, silent_for, .. } = leader;
    let name = name.as_deref().unwrap_or_default();
    format!(
        "its learner, {name}, has led it for {} and was last seen {:.1} s ago",
        clock(*leads_for),
        silent_for.as_secs_f64()
    )
}

/// Describes a learner that is gone: when it was seen last.
fn last_seen(Leader { name, silent_for, .. }: Leader) -> String {
    match name {
        Some(name) => format!(": {name} was last seen {} ago", clock(silent_for)),
        None => format!(": the last one left {} ago", clock(silent_for)),
    }
}

/// Reads the announcement of a run. An unreadable one comes from another build's learner or from an unauthorised process.
pub(crate) async fn read(server: &Server, run: &str) -> Result<Result<Option<Announcement>, serde_json::Error>> {
    let bytes = server.announcement(run).await?;
    Ok(bytes.map(|bytes| serde_json::from_slice(&bytes)).transpose())
}

/// Checks that a process's manifest matches the run's.
fn expect_fit(run: &str, needed: &Manifest, own: &Manifest) -> Result<()> {
    match needed.expect_same(own) {
        Err(learner::Error::Manifest { field, was, is }) => {
            bail!("run {run}: {field}: the run needs {was}, this process has {is}")
        }
        same => Ok(same?),
    }
}

/// Returns the run's id with the digest of its manifest. It names the run's streams, so that processes with another manifest
/// never see them.
fn run_fingerprint(run: &str, manifest: &Manifest) -> String {
    let digest = Digest::of(manifest).short();
    if run == digest { digest } else { format!("{run}-{digest}") }
}

fn with_faults(bus: Arc<dyn bus::Bus>, faults: Option<Faults>) -> Arc<dyn bus::Bus> {
    let Some(faults) = faults else { return bus };
    tracing::warn!(?faults, "local.bus.fault: messages are dropped, duplicated and delayed on purpose");
    Arc::new(Faulty::new(bus, faults))
}

/// A learner's place in its run.
pub(crate) struct Led {
    pub(crate) server: Server,
    lease: Lease,
    announcement: Announcement,
    pub(crate) bus: Arc<dyn bus::Bus>,
    /// Stores the pretrained model when a worker lacks it. Aborted on drop.
    _serving: JoinSet<()>,
}

impl BusArgs {
    /// Returns the run's id: `--run`, or the digest of the manifest.
    pub(crate) fn run_id(&self, manifest: &Manifest) -> String {
        self.run.clone().unwrap_or_else(|| Digest::of(manifest).short())
    }

    /// Returns the command-line arguments that reproduce these options.
    pub(crate) fn words(&self) -> String {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let options = [
            ("--bus", Some(self.bus())),
            ("--run", self.run.clone()),
            ("--nkey", path(&self.place.nkey)),
            ("--tls-ca", path(&self.place.tls_ca)),
        ];
        let given = options.into_iter().filter_map(|(name, value)| Some(option(name, &value?)));
        given.collect::<Vec<_>>().join(" ")
    }

    /// Returns the servers as text that may be shown to people.
    pub(crate) fn bus(&self) -> String {
        self.place.servers().map_or_else(|error| error.to_string(), Servers::to_string)
    }

    /// Takes the lease of the run as its learner, and announces the run.
    pub(crate) async fn lead(
        &self,
        run_dir: &Path,
        manifest: &Manifest,
        config: &RunConfig,
        max_tasks: usize,
        needs: Needs,
    ) -> Result<Led> {
        let run = self.run_id(manifest);
        check_name(&run).context("--run")?;
        let server = self.place.connect("learner", config.local.stall_limit()).await?;
        let (needed, taken) = (group_bytes(config), server.max_payload());
        if needed > taken {
            let num_rollouts = config.run.batch.num_rollouts;
            let (max_tokens, key) = max_tokens(config);
            bail!(
                "batch.num_rollouts, {key}: {num_rollouts} rollouts of {max_tokens} tokens may take {needed} \
                 bytes; {} accepts messages of up to {taken} (max_payload in its config)",
                self.bus()
            );
        }
        let BusConfig { ack_wait_seconds, lease_seconds, num_replicas, fault, .. } = config.local.bus;
        let terms = StreamLimits {
            max_tasks,
            ack_wait: Duration::from_secs_f64(ack_wait_seconds),
            lease: Duration::from_secs_f64(lease_seconds),
            num_replicas,
            weights_bytes: needs.weights_on_server,
            base_bytes: needs.base,
        };
        let identity = Identity { before: last_learner(run_dir), ..identity(&std::path::absolute(run_dir)?)? };
        let (lease, bus) = server.lead(&run, &run_fingerprint(&run, manifest), &identity, terms).await?;
        note_learner(run_dir, &identity.id)?;
        let (bus, mut serving) = (Arc::new(bus), JoinSet::new());
        if let (Some(base), Some(language)) = (&config.base, &config.run.language) {
            serving.spawn(serve(bus.clone(), language.base, files_of(&base.pretrained)?));
        }
        let (config_name, config) = (config.name.clone(), run_config::to_toml(config)?);
        let announcement =
            Announcement { manifest: manifest.clone(), config_name, config, is_over: false, num_steps: None };
        lease.announce(serde_json::to_vec(&announcement)?);
        Ok(Led { server, lease, announcement, bus: with_faults(bus, fault), _serving: serving })
    }
}

/// Returns the bytes for which a server must accept a group of a run.
fn group_bytes(config: &RunConfig) -> usize {
    let (num_rollouts, vocabulary_size) = (config.run.batch.num_rollouts, config.run.model.vocabulary_size);
    let (max_tokens, _) = max_tokens(config);
    match config.base {
        None => Group::max_bytes(num_rollouts, max_tokens, vocabulary_size),
        // Sets of legal tokens are large, and few: the answers of a group follow one pattern, so they share them. A group that has
        // more of them than an answer has tokens may be too large for the server. Its actor then ends, with the size.
        Some(_) => Group::max_bytes(num_rollouts, max_tokens, 1) + Group::max_bytes(1, max_tokens, vocabulary_size),
    }
}

/// Returns the most tokens of a rollout, and the key that says so.
fn max_tokens(config: &RunConfig) -> (u32, &'static str) {
    let proposes = config.run.self_play.as_ref().is_some_and(|own| own.propose_tasks > 0);
    match config.base {
        Some(_) if !proposes => (config.run.actor.max_answer_tokens, "actor.max_answer_tokens"),
        _ => (config.run.model.max_positions as u32, "model.max_positions"),
    }
}

impl Led {
    /// Returns the lease's term, which numbers the run's successive learner processes.
    pub(crate) fn term(&self) -> u64 {
        self.lease.term()
    }

    /// Waits until another learner has taken the run.
    pub(crate) async fn lost(&self) -> anyhow::Error {
        self.lease.lost().await.into()
    }

    /// Leaves a run that another learner has taken.
    pub(crate) fn give_up(self) {
        self.lease.abandon();
    }

    /// Releases the run. If it is over, workers are notified, and then its streams are removed.
    pub(crate) async fn leave(self, is_over: bool, num_steps: Option<u64>) -> Result<()> {
        let announcement = Announcement { is_over, num_steps, ..self.announcement };
        self.lease.announce(serde_json::to_vec(&announcement)?);
        match is_over {
            true => self.lease.end().await,
            false => self.lease.release().await,
        }
        self.server.flush().await;
        Ok(())
    }
}

/// Returns the identity of this process: a unique id, and for people the machine, process id and what it works at.
pub(crate) fn identity(at: &Path) -> Result<Identity> {
    let mut id = [0; 16];
    SysRng.try_fill_bytes(&mut id).context("generate a random id")?;
    let name = format!("{}:{}:{}", machine(), std::process::id(), at.display());
    Ok(Identity { name, id: format!("{:032x}", u128::from_le_bytes(id)), before: None })
}

/// The file in a run directory that names its last learner. A process that holds the lock knows that this learner is gone.
pub(crate) const LEASE_FILE: &str = "LEASE";

/// The content of [`LEASE_FILE`].
#[derive(Serialize, Deserialize)]
struct LastLearner {
    id: String,
    /// Inode of the lock file. A copy of a run directory has another inode, and so counts as another learner's.
    lock_inode: u64,
}

/// Returns the id of the last learner of a run directory that this process has locked, if known.
fn last_learner(run_dir: &Path) -> Option<String> {
    let text = std::fs::read(run_dir.join(LEASE_FILE)).ok()?;
    let LastLearner { id, lock_inode } = serde_json::from_slice(&text).ok()?;
    (lock_inode == lock_inode_of(run_dir).ok()?).then_some(id)
}

fn note_learner(run_dir: &Path, id: &str) -> Result<()> {
    let last = LastLearner { id: id.to_owned(), lock_inode: lock_inode_of(run_dir)? };
    write_whole(&run_dir.join(LEASE_FILE), &serde_json::to_vec(&last)?)
}

fn lock_inode_of(run_dir: &Path) -> Result<u64> {
    let path = run_dir.join(RunLock::FILE_NAME);
    Ok(std::fs::metadata(&path).with_context(|| format!("read metadata of {}", path.display()))?.ino())
}

/// Returns the worker's name in subjects: letters, digits, `-` and `_`.
fn worker_name(role: Role, worker: &Worker, bus_args: &BusArgs) -> Result<String> {
    if let Some(name) = worker.name.clone() {
        check_name(&name).context("--name")?;
        return Ok(name);
    }
    if let Some(name) = bus_args.place.name_of_key()? {
        return Ok(name);
    }
    let letters = machine();
    let letters = letters.chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' });
    Ok(format!("{}-{}-{}", word(&role), letters.take(32).collect::<String>(), std::process::id()))
}

fn machine() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "unnamed".to_owned())
}
