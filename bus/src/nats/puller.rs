use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_nats::jetstream::{self, AckKind};
use async_nats::{Client, StatusCode, Subject, Subscriber};
use async_trait::async_trait;
use futures_util::StreamExt as _;
use proto::{Message, wire};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};

use super::layout::{self, Layout, Queue};
use super::server::RETRY_PAUSE;
use super::{SAY_LIMIT, Server};
use crate::{Delivery, Error, Receipt};

/// After this long without another message, all messages in flight have arrived.
const DRAIN_PAUSE: Duration = Duration::from_millis(100);
/// How long a request for messages stays open. If the server was lost meanwhile, the request is repeated after that.
const PULL_EXPIRES: Duration = Duration::from_secs(2);
const PULL_SLACK: Duration = Duration::from_secs(1);
/// How many times a message is reported as in progress within the server's wait for an acknowledgement.
const KEPT_PER_WAIT: u32 = 3;

/// Pulls messages from one queue, a few per request. The client's own message stream requests more while it is drained, so that
/// a process could never leave with no messages in flight.
pub(super) struct Puller<T> {
    asks: Asks,
    /// The subject for messages that cannot be read or judged.
    dead: String,
    prefetched: usize,
    held: Arc<Held>,
    open: tokio::sync::Mutex<Option<Open>>,
    messages: PhantomData<fn() -> T>,
}

/// The stream and queue that a puller requests messages from.
#[derive(Clone)]
struct Asks {
    stream: String,
    queue: Queue,
}

/// The requests of a puller. A separate tokio task receives the messages, so that messages that wait here are held as well.
struct Open {
    receiver: JoinHandle<()>,
    asked: mpsc::Sender<()>,
    /// Messages, and `None` when a request has ended.
    arrived: mpsc::UnboundedReceiver<Option<Arrived>>,
    is_asked: bool,
}

/// A message that has arrived, with its hold.
struct Arrived {
    message: async_nats::Message,
    hold: Hold,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.receiver.abort();
    }
}

impl<T: DeserializeOwned + Send + Sync + 'static> Puller<T> {
    pub(super) fn new(run: &str, worker: &str, queue: Queue, prefetched: usize, held: Arc<Held>) -> Puller<T> {
        let layout = Layout::new(run);
        let dead = layout.subject(Queue::Dead, &format!("{worker}.{}", queue.token()));
        Puller {
            asks: Asks { stream: layout.stream(queue), queue },
            dead,
            prefetched,
            held,
            open: tokio::sync::Mutex::new(None),
            messages: PhantomData,
        }
    }

    /// Waits for a message, for as long as it takes: a lost server or stream comes back.
    pub(super) async fn next(&self, server: &Server) -> Result<Delivery<T>, Error> {
        let mut open = self.open.lock().await;
        loop {
            server.expect_permitted()?;
            let open = open.get_or_insert_with(|| self.open(&server.client));
            if !open.is_asked {
                // Fails only if a request is on its way.
                let _is_on_its_way = open.asked.try_send(());
                open.is_asked = true;
            }
            let Some(arrived) = open.arrived.recv().await else {
                return Err(Error::Closed { queue: self.asks.queue.token() });
            };
            let Some(Arrived { message, hold }) = arrived else {
                open.is_asked = false;
                continue;
            };
            let message = jetstream::Message { message, context: server.jetstream.clone() };
            let is_redelivered = message.info().is_ok_and(|info| info.delivered > 1);
            let (server, dead, payload) = (server.clone(), self.dead.clone(), message.payload.clone());
            let receipt = Pulled { hold, server, queue: self.asks.queue, dead, payload };
            let subject = message.subject.as_str();
            match wire::decode::<Message<T>>(&message.payload) {
                Ok(mut message) => {
                    if self.asks.queue == Queue::Groups {
                        // Only the actor of that name may publish to this subject.
                        message.envelope.played_by = layout::actor_of(subject).to_owned();
                    }
                    return Ok(Delivery { message, is_redelivered, receipt: Box::new(receipt) });
                }
                Err(error) => {
                    if receipt.set_aside().await {
                        tracing::warn!(subject, %error, "unreadable message moved to the dead-letter stream");
                    }
                }
            }
        }
    }

    fn open(&self, client: &Client) -> Open {
        let (asked, asks) = mpsc::channel(1);
        let (arrive, arrived) = mpsc::unbounded_channel();
        let receive = receive(client.clone(), self.asks.clone(), self.prefetched, self.held.clone(), asks, arrive);
        Open { receiver: tokio::spawn(receive), asked, arrived, is_asked: false }
    }

    /// Hands back prefetched messages.
    pub(super) async fn hand_back(&self) {
        let Some(mut open) = self.open.lock().await.take() else { return };
        while let Ok(Some(arrived)) = tokio::time::timeout(DRAIN_PAUSE, open.arrived.recv()).await {
            if let Some(arrived) = arrived {
                // With a delay: otherwise the message would come straight back.
                arrived.hold.answer(AckKind::Nak(Some(2 * DRAIN_PAUSE))).await;
            }
        }
    }
}

/// Requests messages each time it is asked to, and forwards those that arrive. Ends when the asking side is closed.
async fn receive(
    client: Client,
    Asks { stream, queue }: Asks,
    prefetched: usize,
    held: Arc<Held>,
    mut asks: mpsc::Receiver<()>,
    arrive: mpsc::UnboundedSender<Option<Arrived>>,
) {
    let mut open: Option<(Subject, Subscriber)> = None;
    // Messages that the last request may still bring, and the time by which the server has ended it, reported or not.
    let (mut num_wanted, mut deadline) = (0, Instant::now());
    loop {
        let was_asked = num_wanted > 0;
        let done = tokio::select! {
            asked = asks.recv(), if !was_asked => match asked {
                None => return,
                Some(()) => {
                    (num_wanted, deadline) = (prefetched, Instant::now() + PULL_EXPIRES + PULL_SLACK);
                    ask(&client, &stream, queue, prefetched, &mut open).await
                }
            },
            message = next_message(&mut open) => match message {
                None => {
                    (open, num_wanted) = (None, 0);
                    Ok(())
                }
                Some(message) => match message.status {
                    None => {
                        num_wanted = num_wanted.saturating_sub(1);
                        let hold = Hold::begin(&held, message.reply.clone());
                        // Without a receiver, the message goes to another worker.
                        drop(arrive.send(Some(Arrived { message, hold })));
                        Ok(())
                    }
                    Some(status) => {
                        num_wanted = 0;
                        match status {
                            StatusCode::TIMEOUT | StatusCode::NOT_FOUND => Ok(()),
                            status => Err(format!("{status} {}", message.description.unwrap_or_default()).into()),
                        }
                    }
                },
            },
            () = tokio::time::sleep_until(deadline), if was_asked => {
                num_wanted = 0;
                Ok(())
            }
        };
        if let Err(error) = done {
            tracing::debug!(stream, %error, "could not pull messages; retrying");
            tokio::time::sleep(RETRY_PAUSE).await;
            num_wanted = 0;
            drop(arrive.send(None));
        } else if was_asked && num_wanted == 0 {
            drop(arrive.send(None));
        }
    }
}

async fn next_message(open: &mut Option<(Subject, Subscriber)>) -> Option<async_nats::Message> {
    match open {
        Some((_, messages)) => messages.next().await,
        None => std::future::pending().await,
    }
}

async fn ask(
    client: &Client,
    stream: &str,
    queue: Queue,
    prefetched: usize,
    open: &mut Option<(Subject, Subscriber)>,
) -> Result<(), async_nats::Error> {
    let (inbox, _) = match open {
        Some(open) => open,
        none => {
            let inbox = Subject::from(client.new_inbox());
            let messages = client.subscribe(inbox.clone()).await?;
            none.insert((inbox, messages))
        }
    };
    let request = serde_json::json!({"batch": prefetched, "expires": PULL_EXPIRES.as_nanos() as u64});
    let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{}", queue.consumer());
    Ok(client.publish_with_reply(subject, inbox.clone(), request.to_string().into()).await?)
}

/// The messages that this process has taken. Until a message is answered or dropped, the server is told that it is in progress,
/// whether it is being processed or waiting.
pub(super) struct Held {
    client: Client,
    messages: Mutex<BTreeMap<u64, Subject>>,
    num_messages: AtomicU64,
    /// Locked while reporting on a message, so that no progress report follows its answer.
    saying: tokio::sync::Mutex<()>,
}

/// Reserves a message for this process.
struct Hold {
    held: Arc<Held>,
    number: u64,
    /// The subject for reports to the server.
    reply: Option<Subject>,
}

impl Held {
    /// Starts reporting held messages as in progress, for as long as the result is in use.
    pub(super) fn start(client: &Client, ack_wait: Duration) -> Arc<Held> {
        let held = Arc::new(Held {
            client: client.clone(),
            messages: Mutex::default(),
            num_messages: AtomicU64::new(0),
            saying: tokio::sync::Mutex::default(),
        });
        tokio::spawn(keep(Arc::downgrade(&held), ack_wait / KEPT_PER_WAIT));
        held
    }

    fn messages(&self) -> MutexGuard<'_, BTreeMap<u64, Subject>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the server that everything held is still being worked on.
    async fn keep(&self) {
        let numbers: Vec<u64> = self.messages().keys().copied().collect();
        for number in numbers {
            let _saying = self.saying.lock().await;
            let Some(reply) = self.messages().get(&number).cloned() else { continue };
            if !say(&self.client, reply, AckKind::Progress).await {
                return;
            }
        }
    }
}

impl Hold {
    fn begin(held: &Arc<Held>, reply: Option<Subject>) -> Hold {
        let number = held.num_messages.fetch_add(1, Ordering::Relaxed);
        held.messages().extend(reply.clone().map(|reply| (number, reply)));
        Hold { held: held.clone(), number, reply }
    }

    /// Acknowledges, returns or rejects the message, and stops keeping it alive.
    async fn answer(&self, kind: AckKind) {
        let _saying = self.held.saying.lock().await;
        self.held.messages().remove(&self.number);
        if let Some(reply) = self.reply.clone() {
            say(&self.held.client, reply, kind).await;
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.held.messages().remove(&self.number);
    }
}

async fn keep(held: Weak<Held>, every: Duration) {
    let mut rounds = tokio::time::interval(every);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        rounds.tick().await;
        let Some(held) = held.upgrade() else { return };
        held.keep().await;
    }
}

/// Sends an acknowledgement of a message and returns whether it was handed to the client. No answer is awaited: a lost one costs
/// a redelivery.
async fn say(client: &Client, reply: Subject, kind: AckKind) -> bool {
    match tokio::time::timeout(SAY_LIMIT, client.publish(reply, kind.into())).await {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => tracing::debug!(%error, "could not acknowledge a delivery"),
        Err(_) => tracing::debug!("could not acknowledge a delivery: server unreachable"),
    }
    false
}

/// A message of JetStream, which expects an acknowledgement.
struct Pulled {
    hold: Hold,
    server: Server,
    queue: Queue,
    /// The subject for a message that is set aside.
    dead: String,
    payload: bytes::Bytes,
}

#[async_trait]
impl<T: Send + Sync> Receipt<T> for Pulled {
    async fn acknowledge(&self) -> Result<(), Error> {
        self.server.count(self.queue, |counts| counts.num_acknowledged += 1);
        self.hold.answer(AckKind::Ack).await;
        Ok(())
    }

    async fn hand_back(&self, _message: &Message<T>, pause: Duration) -> Result<(), Error> {
        self.server.count(self.queue, |counts| counts.num_handed_back += 1);
        self.hold.answer(AckKind::Nak(Some(pause))).await;
        Ok(())
    }

    async fn set_aside(&self) -> bool {
        Pulled::set_aside(self).await;
        true
    }
}

impl Pulled {
    /// Sets the message aside and returns whether that succeeded. If not, the message is delivered again.
    async fn set_aside(&self) -> bool {
        let kept = async { self.server.jetstream.publish(self.dead.clone(), self.payload.clone()).await?.await };
        let is_kept = kept.await.is_ok();
        if is_kept {
            self.server.count(self.queue, |counts| counts.num_set_aside += 1);
            self.hold.answer(AckKind::Term).await;
        }
        is_kept
    }
}
