use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_nats::connection::State;
use async_nats::jetstream::context::RequestErrorKind;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::{Context, ContextBuilder};
use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event};
use tokio::time::Instant;

use super::Servers;
use super::answers::is_not_enabled;
use super::layout::{Queue, RUNS, check_name};
use crate::Error;

/// How a process uses a server. These settings affect timing, never results.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The addresses of the servers.
    pub servers: Servers,
    /// How long a server may be unavailable.
    pub patience: Duration,
    /// How a process authenticates.
    pub credentials: Credentials,
}

/// How a process and a server authenticate each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// A file that holds the seed of this user's nkey.
    pub nkey: Option<PathBuf>,
    /// A file of certificates, in PEM, that vouch for the server besides those of this machine.
    pub tls_ca: Option<PathBuf>,
}

/// Statistics of a connection so far.
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

/// This process's use of a queue, and the queue's state when a learner last looked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounts {
    /// Bytes of published messages that the server confirmed, without headers.
    pub num_bytes_published: u64,
    /// Messages that were acknowledged.
    pub num_acknowledged: u64,
    /// Messages that were handed back, to be delivered again.
    pub num_handed_back: u64,
    /// Messages that could not be read or judged.
    pub num_set_aside: u64,
    /// Messages that no worker has taken yet.
    pub num_waiting: u64,
    /// Messages that a worker has taken and not answered yet.
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

/// Events of a connection, beside the answers to requests.
#[derive(Default)]
struct Heard {
    /// The last permission error of the server.
    denied: Mutex<Option<String>>,
    /// Times of its first and last refusal of this user since the last connection, and the last message.
    refused: Mutex<Option<(Instant, Instant, String)>>,
    /// Time of the last warning.
    told: Mutex<Option<Instant>>,
    num_connects: AtomicU64,
    num_denied: AtomicU64,
    num_slow: AtomicU64,
    queues: Mutex<BTreeMap<&'static str, QueueCounts>>,
}

/// The oldest supported server version. Older servers silently drop settings that they do not know.
const OLDEST_SERVER: (u32, u32) = (2, 12);
pub(super) const RETRY_PAUSE: Duration = Duration::from_millis(250);
/// How long servers may refuse this user before the refusal counts as final: keys are added to servers one by one.
const REFUSED_LIMIT: Duration = Duration::from_secs(10);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest time that one server is tried before the next.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const MAX_IN_FLIGHT: usize = 256;
const SUBSCRIPTION_CAPACITY: usize = 512;

impl Server {
    /// Connects to a server and waits for it if it is not up yet.
    ///
    /// # Errors
    /// When no server answers within `settings.patience`, or it is too old, has no JetStream, or refuses this user.
    pub async fn connect(settings: Settings, name: &str) -> Result<Server, Error> {
        check_name(name)?;
        let Settings { servers, credentials, patience } = &settings;
        let seed = credentials.nkey.as_deref().map(read_seed).transpose()?;
        if seed.is_some() && servers.has_login() {
            return Err(Error::Unfit {
                what: format!("server {servers}"),
                expected: "either an nkey (--nkey) or credentials in the address".to_owned(),
                got: "both".to_owned(),
            });
        }
        if let Some(path) = &credentials.tls_ca {
            read("certificates", path)?;
        }
        let heard = Arc::new(Heard::default());
        let mut patience = Patience::new(format!("connect to {servers}"), *patience, heard.clone());
        let client = loop {
            let options = options(name, seed.clone(), credentials.tls_ca.clone(), heard.clone());
            let connect = servers.log_in(options).connect(servers.addresses());
            // The client sets no time limit on name lookup.
            match tokio::time::timeout(CONNECT_LIMIT * servers.len() as u32, connect).await {
                Ok(Ok(client)) => break client,
                Ok(Err(error)) if is_refusal(error.kind()) && servers.len() == 1 => {
                    let has_said = seed.is_some() || servers.has_login();
                    let hint =
                        if has_said { "" } else { "; it requires an nkey (--nkey), a user and password, or a token" };
                    return Err(Error::Denied { reason: format!("{servers}: {error}{hint}") });
                }
                Ok(Err(error)) => {
                    if is_refusal(error.kind()) {
                        heard.refuse(error.to_string());
                    }
                    patience.wait_after(error).await?;
                }
                Err(_) => patience.wait_after("no response").await?,
            }
        };
        let version = client.server_info().version;
        let mut parts = version.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
        let number = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        if number < OLDEST_SERVER {
            let (major, minor) = OLDEST_SERVER;
            return Err(Error::Unfit {
                what: format!("server {servers}"),
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
        let server = Server { client, jetstream, settings, heard };
        server.expect_jetstream().await?;
        Ok(server)
    }

    /// Fails if the server has no JetStream, or none for this user. A JetStream that has no leader for the moment passes: callers
    /// wait for it.
    async fn expect_jetstream(&self) -> Result<(), Error> {
        let began = Instant::now();
        loop {
            let got = match self.jetstream.request(format!("STREAM.INFO.KV_{RUNS}"), &()).await {
                Ok(Response::<serde_json::Value>::Err { error }) if is_not_enabled(error.error_code()) => {
                    error.to_string()
                }
                Err(error)
                    if error.kind() == RequestErrorKind::NoResponders && !self.client.server_info().jetstream =>
                {
                    // Another server of its cluster may have it, and not be up yet.
                    if self.client.server_info().cluster.is_some() && began.elapsed() < CONNECT_LIMIT {
                        tokio::time::sleep(RETRY_PAUSE).await;
                        continue;
                    }
                    "one without JetStream".to_owned()
                }
                _ => return Ok(()),
            };
            return Err(Error::Unfit {
                what: format!("server {}", self.settings.servers),
                expected: "a nats-server with JetStream (`nats-server -js`, or a jetstream block in its config)"
                    .to_owned(),
                got,
            });
        }
    }

    /// Sends all buffered messages.
    pub async fn flush(&self) {
        drop(tokio::time::timeout(REQUEST_TIMEOUT, self.client.flush()).await);
    }

    /// Returns the statistics of the connection so far.
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

    /// Whether the connection to the server is up.
    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Returns the size limit of a message, in bytes.
    pub fn max_payload(&self) -> usize {
        self.client.server_info().max_payload
    }

    pub(super) fn patience(&self, what: String) -> Patience {
        Patience::new(what, self.settings.patience, self.heard.clone())
    }

    /// Fails if the server has denied this user permission, or has refused its credentials for too long.
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
                    reason: format!("no server accepted the credentials of this process for {seconds} s: {said}"),
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

    /// Records and logs an event of the server or the client.
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
                // One of several servers may not know a key yet.
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

    /// Whether a warning is due: many callers wait for the same server.
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
        expected: format!("a file with {what}"),
        got: got.to_string(),
    };
    std::fs::read_to_string(path).map_err(unfit)
}

fn read_seed(path: &Path) -> Result<String, Error> {
    let seed = read("an nkey seed", path)?.trim().to_owned();
    let unfit = |got: nkeys::error::Error| Error::Unfit {
        what: path.display().to_string(),
        expected: "the seed of a user nkey, which begins with SU".to_owned(),
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
        // No other user may read the replies to this process.
        .custom_inbox_prefix(format!("_INBOX_{name}"))
        .connection_timeout(REQUEST_TIMEOUT)
        // Limits the memory of heartbeats that nobody reads for a while.
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .reconnect_delay_callback(|_| RETRY_PAUSE)
        .event_callback(move |event| {
            let heard = heard.clone();
            async move { heard.hear(event) }
        })
}

/// A time limit on an operation that keeps failing.
pub(super) struct Patience {
    what: String,
    limit: Duration,
    began: Instant,
    heard: Arc<Heard>,
}

/// A failing operation logs a warning after this long.
const TOLD_AFTER: Duration = Duration::from_secs(2);
const BETWEEN_WARNINGS: Duration = Duration::from_secs(10);

impl Patience {
    fn new(what: String, limit: Duration, heard: Arc<Heard>) -> Patience {
        Patience { what, limit, began: Instant::now(), heard }
    }

    /// Waits a little after a failure.
    ///
    /// # Errors
    /// When the operation has failed for too long, or can never succeed.
    pub(super) async fn wait_after(&mut self, reason: impl Display) -> Result<(), Error> {
        self.heard.expect_permitted()?;
        let waited = self.began.elapsed();
        if waited >= self.limit {
            let (what, seconds, reason) = (self.what.clone(), self.limit.as_secs(), reason.to_string());
            return Err(Error::Unreachable { what, seconds, reason });
        }
        if waited >= TOLD_AFTER && self.heard.may_tell() {
            tracing::warn!("still trying to {}: {reason}", self.what);
        }
        tokio::time::sleep(RETRY_PAUSE).await;
        Ok(())
    }
}

/// Returns the time since the Unix epoch. Terms and message ids use it to tell processes apart; no training result depends on it.
#[expect(clippy::disallowed_methods, reason = "no result depends on it")]
pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}
