use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_nats::connection::State;
use async_nats::jetstream::{Context, ContextBuilder};
use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event};
use tokio::time::Instant;

use super::layout::{Queue, check_name};
use crate::Error;

/// How a process uses a server; changes when things happen, never what.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where it is, such as `nats://127.0.0.1:4222`; several are separated by commas.
    pub url: String,
    /// How long a server may be away.
    pub patience: Duration,
    /// How a process says who it is.
    pub credentials: Credentials,
}

/// How a process and a server know each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// A file that holds the seed of this user's nkey.
    pub nkey: Option<PathBuf>,
    /// A file of certificates, in PEM, that vouch for the server besides those of this machine.
    pub tls_ca: Option<PathBuf>,
}

/// What became of a connection so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerCounts {
    /// Connections after the first.
    pub num_reconnects: u64,
    /// Requests that the server did not permit.
    pub num_denied: u64,
    /// Times that messages came faster than they were taken.
    pub num_slow: u64,
    /// By queue: `task`, `group`, `scored`.
    pub queues: BTreeMap<&'static str, QueueCounts>,
}

/// What this process did with a queue, and what a learner saw in it last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounts {
    /// Bytes of messages that the server has, headers left out.
    pub num_bytes_published: u64,
    /// Messages that are done with.
    pub num_acknowledged: u64,
    /// Messages that went back, to be delivered again.
    pub num_handed_back: u64,
    /// Messages that could not be read or judged.
    pub num_set_aside: u64,
    /// Messages that nobody has taken yet.
    pub num_waiting: u64,
    /// Messages that somebody has taken and not answered yet.
    pub num_taken: u64,
}

/// A connection to a server that is new enough.
#[derive(Clone)]
pub struct Server {
    pub(super) client: Client,
    pub(super) jetstream: Context,
    pub(super) settings: Settings,
    heard: Arc<Heard>,
}

/// What is known of a server beside what it answers.
#[derive(Default)]
struct Heard {
    /// What it refused last for want of permission.
    denied: Mutex<Option<String>>,
    /// When it refused this user first and last since it was last here, and in what words.
    refused: Mutex<Option<(Instant, Instant, String)>>,
    /// When somebody was last told that it is waited for.
    told: Mutex<Option<Instant>>,
    num_connects: AtomicU64,
    num_denied: AtomicU64,
    num_slow: AtomicU64,
    queues: Mutex<BTreeMap<&'static str, QueueCounts>>,
}

/// The oldest server that has what is used here. Older ones drop what they do not know without a word.
const OLDEST_SERVER: (u32, u32) = (2, 12);
pub(super) const RETRY_PAUSE: Duration = Duration::from_millis(250);
/// For how long no server may know this user before it is taken for good: keys are given to servers one by one.
const REFUSED_LIMIT: Duration = Duration::from_secs(10);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
const MAX_IN_FLIGHT: usize = 256;
const SUBSCRIPTION_CAPACITY: usize = 512;

impl Server {
    /// Connects, waiting for a server that is not there yet.
    ///
    /// # Errors
    /// When none answers within `settings.patience`, or it is too old, or does not know this user.
    pub async fn connect(settings: Settings, name: &str) -> Result<Server, Error> {
        check_name(name)?;
        let seed = settings.credentials.nkey.as_deref().map(read_seed).transpose()?;
        if let Some(path) = &settings.credentials.tls_ca {
            read("certificates", path)?;
        }
        let heard = Arc::new(Heard::default());
        let mut patience = Patience::new(format!("connect to {}", settings.url), settings.patience, heard.clone());
        let client = loop {
            let options = options(name, seed.clone(), settings.credentials.tls_ca.clone(), heard.clone());
            let addresses: Vec<&str> = settings.url.split(',').map(str::trim).collect();
            let is_only_one = addresses.len() == 1;
            match options.connect(addresses).await {
                Ok(client) => break client,
                Err(error) if is_refusal(error.kind()) && is_only_one => {
                    return Err(Error::Denied { reason: format!("{}: {error}", settings.url) });
                }
                Err(error) => {
                    if is_refusal(error.kind()) {
                        heard.refuse(error.to_string());
                    }
                    patience.wait_after(error).await?;
                }
            }
        };
        let version = client.server_info().version;
        let mut parts = version.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
        let number = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        if number < OLDEST_SERVER {
            let (major, minor) = OLDEST_SERVER;
            return Err(Error::Unfit {
                what: format!("server {}", settings.url),
                expected: format!("nats-server {major}.{minor} or newer"),
                got: version,
            });
        }
        let jetstream = ContextBuilder::new()
            .timeout(REQUEST_TIMEOUT)
            .ack_timeout(REQUEST_TIMEOUT)
            .max_ack_inflight(MAX_IN_FLIGHT)
            .backpressure_on_inflight(true)
            .build(client.clone());
        Ok(Server { client, jetstream, settings, heard })
    }

    /// Sends what is still to be sent.
    pub async fn flush(&self) {
        drop(tokio::time::timeout(REQUEST_TIMEOUT, self.client.flush()).await);
    }

    /// Tells what became of the connection so far.
    pub fn counts(&self) -> ServerCounts {
        let Heard { num_connects, num_denied, num_slow, queues, .. } = self.heard.as_ref();
        let [num_connects, num_denied, num_slow] =
            [num_connects, num_denied, num_slow].map(|count| count.load(Ordering::Relaxed));
        let queues = queues.lock().unwrap_or_else(PoisonError::into_inner).clone();
        ServerCounts { num_reconnects: num_connects.saturating_sub(1), num_denied, num_slow, queues }
    }

    pub(super) fn count(&self, queue: Queue, count: impl FnOnce(&mut QueueCounts)) {
        count(self.heard.queues.lock().unwrap_or_else(PoisonError::into_inner).entry(queue.token()).or_default());
    }

    /// Tells whether the server is there.
    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Tells how large a message may be, in bytes.
    pub fn max_payload(&self) -> usize {
        self.client.server_info().max_payload
    }

    pub(super) fn patience(&self, what: String) -> Patience {
        Patience::new(what, self.settings.patience, self.heard.clone())
    }

    /// Fails when the server has refused something for want of permission.
    pub(super) fn expect_permitted(&self) -> Result<(), Error> {
        self.heard.expect_permitted()
    }
}

impl Heard {
    fn expect_permitted(&self) -> Result<(), Error> {
        if let Some(reason) = self.denied.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            return Err(Error::Denied { reason });
        }
        match &*self.refused.lock().unwrap_or_else(PoisonError::into_inner) {
            Some((first, last, said)) if *last - *first >= REFUSED_LIMIT => {
                let seconds = REFUSED_LIMIT.as_secs();
                Err(Error::Denied {
                    reason: format!("for {seconds} s no server has known the key of this process: {said}"),
                })
            }
            _ => Ok(()),
        }
    }

    fn refuse(&self, said: String) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let first = refused.as_ref().map_or(now, |(first, ..)| *first);
        *refused = Some((first, now, said));
    }

    /// Takes in what the server, or the client, says of itself.
    fn hear(&self, event: Event) {
        let count = |count: &AtomicU64| _ = count.fetch_add(1, Ordering::Relaxed);
        let said = match &event {
            Event::ServerError(error) => error.to_string(),
            Event::ClientError(error) => error.to_string(),
            _ => String::new(),
        };
        let lower = said.to_lowercase();
        match &event {
            Event::Connected => {
                count(&self.num_connects);
                // One of several servers may not have heard of a key yet.
                *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = None;
            }
            Event::SlowConsumer(_) => count(&self.num_slow),
            _ => {}
        }
        if lower.contains("permissions violation") {
            count(&self.num_denied);
            *self.denied.lock().unwrap_or_else(PoisonError::into_inner) = Some(said);
            return;
        }
        if lower.contains("authorization violation") {
            self.refuse(said);
        }
        match event {
            Event::SlowConsumer(_) | Event::ServerError(_) | Event::ClientError(_) if self.may_tell() => {
                tracing::warn!("{event}");
            }
            event => tracing::info!("{event}"),
        }
    }

    /// Whether it is time to tell somebody that the server is waited for: many wait for the same.
    fn may_tell(&self) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = told.is_none_or(|told| told.elapsed() >= BETWEEN_WARNINGS);
        if is_due {
            *told = Some(Instant::now());
        }
        is_due
    }
}

fn is_refusal(kind: ConnectErrorKind) -> bool {
    matches!(kind, ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation)
}

fn read(what: &str, path: &Path) -> Result<String, Error> {
    let unfit = |got: std::io::Error| Error::Unfit {
        what: path.display().to_string(),
        expected: format!("a file of {what}"),
        got: got.to_string(),
    };
    std::fs::read_to_string(path).map_err(unfit)
}

fn read_seed(path: &Path) -> Result<String, Error> {
    let seed = read("an nkey's seed", path)?.trim().to_owned();
    let unfit = |got: nkeys::error::Error| Error::Unfit {
        what: path.display().to_string(),
        expected: "the seed of a user's nkey, which begins with SU".to_owned(),
        got: got.to_string(),
    };
    nkeys::KeyPair::from_seed(&seed).map_err(unfit)?;
    Ok(seed)
}

fn options(name: &str, seed: Option<String>, tls_ca: Option<PathBuf>, heard: Arc<Heard>) -> ConnectOptions {
    let options = seed.map_or_else(ConnectOptions::new, ConnectOptions::with_nkey);
    let options = match tls_ca {
        Some(path) => options.add_root_certificates(path).require_tls(true),
        None => options,
    };
    options
        .name(name)
        // Nobody else may read what is answered to this process.
        .custom_inbox_prefix(format!("_INBOX_{name}"))
        .connection_timeout(REQUEST_TIMEOUT)
        // Beats that nobody reads for a while take up this much, and no more.
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .reconnect_delay_callback(|_| RETRY_PAUSE)
        .event_callback(move |event| {
            let heard = heard.clone();
            async move { heard.hear(event) }
        })
}

/// How long something may go on failing.
pub(super) struct Patience {
    what: String,
    limit: Duration,
    began: Instant,
    heard: Arc<Heard>,
}

/// After this long a person who watches is told what is waited for.
const TOLD_AFTER: Duration = Duration::from_secs(2);
const BETWEEN_WARNINGS: Duration = Duration::from_secs(10);

impl Patience {
    fn new(what: String, limit: Duration, heard: Arc<Heard>) -> Patience {
        Patience { what, limit, began: Instant::now(), heard }
    }

    /// Waits a little after a failure.
    ///
    /// # Errors
    /// When it has gone on for too long, or can never succeed.
    pub(super) async fn wait_after(&mut self, reason: impl Display) -> Result<(), Error> {
        self.heard.expect_permitted()?;
        let waited = self.began.elapsed();
        if waited >= self.limit {
            let (what, seconds, reason) = (self.what.clone(), self.limit.as_secs(), reason.to_string());
            return Err(Error::Unreachable { what, seconds, reason });
        }
        if waited >= TOLD_AFTER && self.heard.may_tell() {
            tracing::warn!("waiting to {}: {reason}", self.what);
        }
        tokio::time::sleep(RETRY_PAUSE).await;
        Ok(())
    }
}

/// Tells one life of a process from another: epochs and message ids are made of it, and nothing that is learned.
#[expect(clippy::disallowed_methods, reason = "no result depends on it")]
pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}
