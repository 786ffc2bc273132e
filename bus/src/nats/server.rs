use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_nats::connection::State;
use async_nats::jetstream::context::{
    CreateStreamError, CreateStreamErrorKind, DeleteStreamError, DeleteStreamErrorKind, GetStreamError,
    GetStreamErrorKind, RequestErrorKind,
};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::{self, Context, ContextBuilder, ErrorCode};
use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event};
use tokio::time::Instant;

use super::Servers;
use super::layout::{Queue, check_name};
use super::lease::RUNS;
use crate::Error;

/// How a process uses a server; changes when things happen, never what.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where it is.
    pub servers: Servers,
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
/// The longest that one server is tried before the next.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const MAX_IN_FLIGHT: usize = 256;
const SUBSCRIPTION_CAPACITY: usize = 512;

impl Server {
    /// Connects, waiting for a server that is not there yet.
    ///
    /// # Errors
    /// When none answers within `settings.patience`, or it is too old, has no JetStream, or does not know this user.
    pub async fn connect(settings: Settings, name: &str) -> Result<Server, Error> {
        check_name(name)?;
        let Settings { servers, credentials, patience } = &settings;
        let seed = credentials.nkey.as_deref().map(read_seed).transpose()?;
        if seed.is_some() && servers.has_login() {
            return Err(Error::Unfit {
                what: format!("server {servers}"),
                expected: "a key of this process, or a user, password or token with the address".to_owned(),
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
            // Names are looked up without a limit of the client's.
            match tokio::time::timeout(CONNECT_LIMIT * servers.len() as u32, connect).await {
                Ok(Ok(client)) => break client,
                Ok(Err(error)) if is_refusal(error.kind()) && servers.len() == 1 => {
                    let has_said = seed.is_some() || servers.has_login();
                    let hint =
                        if has_said { "" } else { "; it asks for a key (--nkey), a user and password, or a token" };
                    return Err(Error::Denied { reason: format!("{servers}: {error}{hint}") });
                }
                Ok(Err(error)) => {
                    if is_refusal(error.kind()) {
                        heard.refuse(error.to_string());
                    }
                    patience.wait_after(error).await?;
                }
                Err(_) => patience.wait_after("no answer").await?,
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

    /// Fails where there is no JetStream, or none for this user. One that has no leader for the moment is there, and is waited for
    /// by who uses it.
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
                    // Another server of its cluster may have it, and not be there yet.
                    if self.client.server_info().cluster.is_some() && began.elapsed() < CONNECT_LIMIT {
                        tokio::time::sleep(RETRY_PAUSE).await;
                        continue;
                    }
                    "one without".to_owned()
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
                    reason: format!("for {seconds} s no server has accepted the credentials of this process: {said}"),
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

fn is_not_enabled(code: ErrorCode) -> bool {
    [ErrorCode::JETSTREAM_NOT_ENABLED, ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT].contains(&code)
}

/// Returns the code of what JetStream answered, from an error of the client.
pub(super) fn code(error: &(dyn std::error::Error + 'static)) -> Option<ErrorCode> {
    let answered = |cause: &(dyn std::error::Error + 'static)| {
        let kinds = [
            cause.downcast_ref().map(jetstream::Error::error_code),
            cause.downcast_ref().and_then(|error: &GetStreamError| match error.kind() {
                GetStreamErrorKind::JetStream(answer) => Some(answer.error_code()),
                _ => None,
            }),
            cause.downcast_ref().and_then(|error: &CreateStreamError| match error.kind() {
                CreateStreamErrorKind::JetStream(answer) => Some(answer.error_code()),
                _ => None,
            }),
            cause.downcast_ref().and_then(|error: &DeleteStreamError| match error.kind() {
                DeleteStreamErrorKind::JetStream(answer) => Some(answer.error_code()),
                _ => None,
            }),
        ];
        kinds.into_iter().flatten().next()
    };
    std::iter::successors(Some(error), |error| error.source()).find_map(answered)
}

/// Whether the server has too little room for something.
pub(super) fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let full = [
        ErrorCode::STORAGE_RESOURCES_EXCEEDED,
        ErrorCode::INSUFFICIENT_RESOURCES,
        ErrorCode::ACCOUNT_RESOURCES_EXCEEDED,
        ErrorCode::MEMORY_RESOURCES_EXCEEDED,
    ];
    code(error).is_some_and(|code| full.contains(&code))
}

/// Describes a failure for lack of storage: how much is needed, and which setting provides it.
pub(super) fn with_room(error: impl Into<async_nats::Error>, what: &str, num_bytes: u64) -> String {
    let error = error.into();
    match is_full(error.as_ref()) {
        false => error.to_string(),
        true => format!("{error}: {}", room(what, num_bytes)),
    }
}

pub(super) fn room(what: &str, num_bytes: u64) -> String {
    format!(
        "{what} needs {num_bytes} bytes of the server's store: raise max_file_store in the jetstream block of its config, or \
         remove runs from it (`autodidact runs`)"
    )
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
