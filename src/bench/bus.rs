//! Throughput of a NATS server on this machine: groups compared with a bare loop of its client library, weights compared
//! with a file copy, and how throughput scales with the number of actors.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use actor::engine::{Engine, LoadedVersion};
use anyhow::{Context as _, Result, bail, ensure};
use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{self, RetentionPolicy};
use bus::nats::{Credentials, Identity, Nats, Server, Settings, StreamLimits};
use bus::{Delivery, Queues as _, WeightStore as _};
use futures_util::{StreamExt as _, TryStreamExt as _};
use policy::{Backend, ModelConfig, Params};
use proto::{
    Behavior, Digest, Envelope, Group, Message, Problem, ProblemOrigin, Request, Sampling, Task, TaskId, TaskKind, wire,
};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::{Args, Report, Row, Spread};
use crate::language;
use crate::run_config::LocalConfig;
use crate::signals::stop_in_order;

/// Number of groups that are published concurrently, as by this many actors.
const PUBLISHERS: usize = 8;

/// Numbers of simulated actors.
const ACTORS: [usize; 4] = [1, 2, 4, 8];

/// Outstanding tasks of a simulated learner: two batches of the preset `laptop`.
const TASKS_OUT: u32 = 512;

/// A simulated actor plays as many groups of eight concurrently as 128 slots hold. A group takes as long as a network of
/// width 128 needs on one thread, at 14 tokens per answer and the 20.8 thousand per second of docs/performance.md.
const GROUPS_AT_A_TIME: usize = 16;
const GROUP_TIME: Duration = Duration::from_millis(86);

pub(super) fn measure(args: &Args) -> Result<Report> {
    // The server is a separate process with its own storage folder. Both must be removed when this process ends.
    let shutdown = stop_in_order("shutting down the nats-server")?;
    let runtime = tokio::runtime::Runtime::new()?;
    let measured = async {
        let process = ServerProcess::start(&args.server)?;
        let url = process.url().await?;
        let groups = groups(args, &url).await.context("groups")?;
        let weights = weights(args, &url).await.context("weights")?;
        let actors = actors(args, &url).await.context("actors")?;
        let rows = groups.into_iter().chain(weights).chain(actors).collect();
        Ok(Report { threads: LocalConfig::num_cores(), ..args.report(rows) })
    };
    runtime.block_on(async {
        tokio::select! {
            report = measured => report,
            () = shutdown.cancelled() => bail!("stopped before the measurement was complete"),
        }
    })
}

/// A nats-server that is killed when it is dropped.
struct ServerProcess {
    folder: TempDir,
    child: Child,
}

impl ServerProcess {
    fn start(program: &str) -> Result<ServerProcess> {
        let folder = tempfile::tempdir()?;
        let mut command = Command::new(program);
        command.args(["-js", "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir"]).arg(folder.path());
        command.arg("-sd").arg(folder.path().join("store")).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().with_context(|| format!("--server: start {program}"))?;
        Ok(ServerProcess { folder, child })
    }

    /// Waits until the server reports its port.
    async fn url(&self) -> Result<String> {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(30) {
            for entry in self.folder.path().read_dir()? {
                let path = entry?.path();
                let is_named = path.extension().is_some_and(|extension| extension == "ports");
                let text = if is_named { std::fs::read_to_string(path)? } else { String::new() };
                if let Some(url) = text.split('"').find(|word| word.starts_with("nats://")) {
                    return Ok(url.to_owned());
                }
            }
            sleep(Duration::from_millis(10)).await;
        }
        bail!("--server: expected a nats-server that reports its port within 30 s, got none")
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // Both calls fail if the server has already exited.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

async fn connect(url: &str) -> Result<Server> {
    let settings =
        Settings { servers: url.parse()?, patience: Duration::from_secs(60), credentials: Credentials::default() };
    Ok(Server::connect(settings, "bench").await?)
}

const RUN: &str = "bench";
const ACK_WAIT: Duration = Duration::from_secs(60);

async fn lead(url: &str) -> Result<Arc<Nats>> {
    let lease = Duration::from_secs(60);
    let terms = StreamLimits {
        max_tasks: 1 << 16,
        ack_wait: ACK_WAIT,
        lease,
        num_replicas: 1,
        weights_bytes: 0,
        base_bytes: 0,
    };
    // There is no other learner: each one resumes the lease of the previous one.
    let identity = Identity { name: "bench".to_owned(), id: "bench".to_owned(), before: None };
    let (lease, bus) = connect(url).await?.lead(RUN, RUN, &identity, terms).await?;
    // No other process takes the lease.
    lease.abandon();
    Ok(Arc::new(bus))
}

async fn join(url: &str, worker: &str) -> Result<Arc<Nats>> {
    Ok(Arc::new(connect(url).await?.join(RUN, worker, ACK_WAIT)))
}

fn task(batch: u64, index: u32) -> Task {
    Task {
        id: TaskId { kind: TaskKind::Train, batch, index },
        seed: 0,
        weights: Digest::of_bytes(b""),
        policy_version: 0,
        free_running: false,
        request: Request::Solve {
            problem: Problem { domain: "countdown".to_owned(), text: "50 25 7 3 -> 82".to_owned() },
            origin: ProblemOrigin::Ladder,
            has_key: false,
        },
        family: "countdown/2".to_owned(),
        num_rollouts: 8,
        sampling: Sampling { behavior: Behavior::UniformLegal, temperature: 1.0 },
        max_tokens: 40,
    }
}

/// Makes a group like those that actors send: eight legal answers.
async fn group() -> Result<Group> {
    let config = ModelConfig {
        vocabulary_size: 256,
        max_positions: 64,
        d_model: 32,
        num_layers: 1,
        num_heads: 2,
        num_kv_heads: 1,
        ff_dim: 32,
        variant: policy::Variant::default(),
        adapter: None,
    };
    let (engine, mut groups) =
        Engine::start(actor::Config { backend: Backend::Cpu, num_threads: 1, num_slots: 8 }, language());
    let weights = Backend::Cpu.load(&config, &Params::init(&config, 0))?;
    engine.submit(task(0, 0), LoadedVersion { policy_version: 0, weights })?;
    Ok(groups.recv().await.context("the engine stopped early")??)
}

fn envelope() -> Envelope {
    Envelope { term: 1, ..Envelope::default() }
}

/// Measures groups sent from eight actors to a verifier: through the client library alone, through it with message ids, by
/// which the server recognises a publisher's retry, and through the bus, which uses such ids.
async fn groups(args: &Args, url: &str) -> Result<Vec<Row>> {
    let (_learner, actor, verifier) = (lead(url).await?, join(url, "actor").await?, join(url, "verifier").await?);
    let message = Message { envelope: envelope(), body: group().await? };
    let payload: bytes::Bytes = wire::encode(&message).into();
    let mut bare = Bare::new(url).await?;
    let mut rates = [const { Vec::new() }; 3];
    for round in 0..=args.repeats {
        for (side, rates) in rates.iter_mut().enumerate() {
            let began = Instant::now();
            match side {
                0 => bare.carry(args.groups, &payload, None).await?,
                1 => bare.carry(args.groups, &payload, Some(round)).await?,
                _ => carry(args.groups, &actor, &verifier, &message).await?,
            }
            if round > 0 {
                rates.push(args.groups as f64 / began.elapsed().as_secs_f64());
            }
        }
    }
    let over_bare =
        |rates: &[f64], bare: &[f64]| Some(rates.iter().zip(bare).map(|(rate, bare)| rate / bare).collect());
    let [bare, named, ours] = rates;
    let (named_ratios, our_ratios) = (over_bare(&named, &bare), over_bare(&ours, &bare));
    let kib = format!("{:.1} KiB", payload.len() as f64 / 1024.0);
    Ok(vec![
        row(format!("groups of {kib} by the client library alone"), "groups", bare, None),
        row("the same with message ids".to_owned(), "groups", named, named_ratios),
        row(format!("groups of {kib} over the bus"), "groups", ours, our_ratios),
    ])
}

async fn carry(num_groups: usize, actor: &Arc<Nats>, verifier: &Arc<Nats>, message: &Message<Group>) -> Result<()> {
    let publish = async {
        let messages = (0..num_groups).map(|_| actor.publish_group(message.clone()));
        futures_util::stream::iter(messages).buffer_unordered(PUBLISHERS).try_collect::<()>().await
    };
    let take = async {
        for _ in 0..num_groups {
            verifier.next_group().await?.acknowledge().await?;
        }
        Ok(())
    };
    tokio::try_join!(publish, take)?;
    Ok(())
}

/// A separate work queue, and a loop over it that treats groups as opaque bytes.
struct Bare {
    jetstream: async_nats::jetstream::Context,
    /// Kept across rounds: messages requested by a dropped stream would reach no one.
    messages: pull::Stream,
}

impl Bare {
    const SUBJECT: &str = "bare";

    async fn new(url: &str) -> Result<Bare> {
        let (publisher, puller) = (async_nats::connect(url).await?, async_nats::connect(url).await?);
        let config = stream::Config {
            name: "bare".to_owned(),
            subjects: vec![Bare::SUBJECT.to_owned()],
            retention: RetentionPolicy::WorkQueue,
            ..stream::Config::default()
        };
        let stream = async_nats::jetstream::new(puller).create_stream(config).await?;
        let durable_name = Some("puller".to_owned());
        let consumer = pull::Config { durable_name, max_ack_pending: 1 << 16, ..pull::Config::default() };
        let messages = stream.create_consumer(consumer).await?.messages().await?;
        Ok(Bare { jetstream: async_nats::jetstream::new(publisher), messages })
    }

    /// Publishes and takes groups. With `round`, message ids are made of the round and the message number.
    async fn carry(&mut self, num_groups: usize, payload: &bytes::Bytes, round: Option<usize>) -> Result<()> {
        let Bare { jetstream, messages } = self;
        let publish = async {
            let messages = (0..num_groups).map(|number| {
                let message = PublishMessage::build().payload(payload.clone());
                let message = match round {
                    Some(round) => message.message_id(format!("actor.1.{round}.{number}")),
                    None => message,
                };
                let jetstream = &*jetstream;
                async move {
                    jetstream.send_publish(Bare::SUBJECT, message).await?.await?;
                    Ok::<_, anyhow::Error>(())
                }
            });
            futures_util::stream::iter(messages).buffer_unordered(PUBLISHERS).try_collect::<()>().await
        };
        let take = async {
            for _ in 0..num_groups {
                let message = messages.next().await.context("the stream of messages ended")?;
                message?.ack().await.map_err(|error| anyhow::anyhow!(error))?;
            }
            Ok(())
        };
        tokio::try_join!(publish, take)?;
        Ok(())
    }
}

/// Measures storing and fetching weights over the bus, compared with copying a file of that size on the same disk.
async fn weights(args: &Args, url: &str) -> Result<Vec<Row>> {
    let (learner, actor) = (lead(url).await?, join(url, "actor").await?);
    let folder = tempfile::tempdir()?;
    let mut rows = Vec::new();
    for mib in &args.weights {
        let bytes: Arc<[u8]> = some_bytes(*mib << 20);
        let source = folder.path().join("weights");
        std::fs::write(&source, &bytes)?;
        let digest = Digest::of_bytes(&bytes);
        let (mut puts, mut gets, mut copies) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..=args.repeats {
            let copied = timed(async { copy(&source, &folder.path().join("copy")) }).await?;
            let put = timed(async { Ok(learner.put_weights(digest, bytes.clone()).await?) }).await?;
            let got = timed(async {
                ensure!(actor.get_weights(digest).await? == bytes, "expected the stored weights, got other bytes");
                Ok(())
            })
            .await?;
            learner.retain_weights(&[]).await?;
            if round > 0 {
                puts.push(*mib as f64 / put);
                gets.push(*mib as f64 / got);
                copies.push(*mib as f64 / copied);
            }
        }
        let ratios = |rates: &[f64]| Some(rates.iter().zip(&copies).map(|(rate, copy)| rate / copy).collect());
        let (put_ratios, get_ratios) = (ratios(&puts), ratios(&gets));
        rows.push(row(format!("a file of {mib} MiB, copied"), "MiB", copies, None));
        rows.push(row(format!("weights of {mib} MiB to the bus"), "MiB", puts, put_ratios));
        rows.push(row(format!("weights of {mib} MiB from the bus"), "MiB", gets, get_ratios));
    }
    Ok(rows)
}

async fn timed(work: impl Future<Output = Result<()>>) -> Result<f64> {
    let began = Instant::now();
    work.await?;
    Ok(began.elapsed().as_secs_f64())
}

/// Copies bytes as a server writes them: read and written, without a sync to disk.
fn copy(source: &Path, target: &Path) -> Result<()> {
    std::fs::write(target, std::fs::read(source)?)?;
    Ok(())
}

/// Returns bytes that differ from piece to piece.
fn some_bytes(len: usize) -> Arc<[u8]> {
    (0..len).map(|place| (place.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// Measures the full loop: tasks to simulated actors, groups to a verifier, and scored groups to a learner, which issues a
/// new task for each.
async fn actors(args: &Args, url: &str) -> Result<Vec<Row>> {
    let group = group().await?;
    let scored = verifier::score(language().as_ref(), group.clone(), None)?;
    let mut rates = vec![Vec::new(); ACTORS.len()];
    let watched = Duration::from_secs_f64(args.seconds);
    for round in 0..args.repeats as u64 {
        for (number, rates) in ACTORS.into_iter().zip(&mut rates) {
            let learner = lead(url).await?;
            let verifier = join(url, "verifier").await?;
            let mut others = JoinSet::new();
            for index in 0..number {
                others.spawn(play(join(url, &format!("actor-{index}")).await?, group.clone()));
            }
            others.spawn({
                let scored = scored.clone();
                async move {
                    loop {
                        let group = verifier.next_group().await?;
                        let mut scored = scored.clone();
                        scored.group.task = group.message.body.task.clone();
                        verifier.publish_scored(group.message.reply(scored)).await?;
                        group.acknowledge().await?;
                    }
                }
            });
            // Message ids must differ between rounds and numbers of actors.
            let batch = 100 * round + number as u64;
            let issue = |index| learner.publish_task(Message { envelope: envelope(), body: task(batch, index) });
            futures_util::stream::iter((0..TASKS_OUT).map(issue)).buffer_unordered(64).try_collect::<()>().await?;
            let mut next = TASKS_OUT;
            let learn = async {
                let mut began = None;
                let mut count = 0;
                loop {
                    learner.next_scored().await?.acknowledge().await?;
                    issue(next).await?;
                    next += 1;
                    // Warm-up: the first groups arrive while some actors are still starting.
                    let since = *began.get_or_insert_with(|| Instant::now() + 2 * GROUP_TIME);
                    if Instant::now() >= since {
                        count += 1;
                        if since.elapsed() >= watched {
                            return Ok::<f64, anyhow::Error>(f64::from(count) / since.elapsed().as_secs_f64());
                        }
                    }
                }
            };
            rates.push(tokio::select! {
                rate = learn => rate?,
                Some(ended) = others.join_next() => {
                    ended??;
                    bail!("a worker stopped early")
                }
            });
        }
    }
    let alone = rates[0].clone();
    let row_of = |(number, rates): (usize, Vec<f64>)| {
        let ratios = rates.iter().zip(&alone).map(|(rate, alone)| rate / alone).collect();
        let name = format!("simulated actors: {number}");
        row(name, "groups", rates, Some(ratios))
    };
    Ok(ACTORS.into_iter().zip(rates).map(row_of).collect())
}

/// Takes tasks as an actor does, and spends an actor's time on each.
async fn play(bus: Arc<Nats>, group: Group) -> Result<()> {
    let mut playing = JoinSet::new();
    loop {
        tokio::select! {
            task = bus.next_task(), if playing.len() < GROUPS_AT_A_TIME => {
                let task: Delivery<Task> = task?;
                playing.spawn(async move {
                    sleep(GROUP_TIME).await;
                    task
                });
            }
            Some(played) = playing.join_next() => {
                let played = played?;
                let group = Group { task: played.message.body.clone(), ..group.clone() };
                bus.publish_group(played.message.reply(group)).await?;
                played.acknowledge().await?;
            }
        }
    }
}

fn row(name: String, unit: &'static str, rates: Vec<f64>, ratios: Option<Vec<f64>>) -> Row {
    let ratio = ratios.map(|ratios| Spread::of(ratios.into_iter()));
    Row { name, unit, per_second: Spread::of(rates.into_iter()), gflops: None, share_of_peak: None, ratio }
}
