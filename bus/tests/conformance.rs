//! Guarantees of every bus.

mod nats_server;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bus::nats::{Credentials, Identity, Lease, Server, Settings, StreamLimits};
use bus::{Bus, Delivery, Error, Faults, Faulty, InProcess, Keys as _, Queues as _};
use futures_util::TryStreamExt as _;
use nats_server::NatsServer;
use proto::{
    Behavior, Digest, Envelope, Group, Message, Problem, ProblemKey, ProblemOrigin, Request, Sampling, Task, TaskId,
    TaskKind, Version,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

const RUN: &str = "test";
const ACK_WAIT: Duration = Duration::from_secs(2);
const LEASE: Duration = Duration::from_secs(4);
/// Long enough for a message to arrive, if there is one.
const SOON: Duration = Duration::from_millis(500);
/// The longest wait for something that must arrive.
const LIMIT: Duration = Duration::from_secs(30);

/// A bus as a learner and as two workers see it.
struct Seen {
    name: &'static str,
    learner: Arc<dyn Bus>,
    workers: [Arc<dyn Bus>; 2],
    /// Kept for as long as the bus is used.
    _kept: Option<(Lease, NatsServer)>,
}

async fn buses() -> Vec<Seen> {
    let in_process = || -> Arc<dyn Bus> { Arc::new(InProcess::new()) };
    let one = |name, bus: Arc<dyn Bus>| Seen { name, learner: bus.clone(), workers: [bus.clone(), bus], _kept: None };
    let faultless = |bus| -> Arc<dyn Bus> { Arc::new(Faulty::new(bus, Faults::default())) };
    let plain = nats().await;
    let mut wrapped = nats().await;
    wrapped.name = "faulty NATS";
    wrapped.learner = faultless(wrapped.learner);
    wrapped.workers = wrapped.workers.map(faultless);
    vec![one("in-process", in_process()), one("faulty in-process", faultless(in_process())), plain, wrapped]
}

async fn nats() -> Seen {
    nats_with(terms()).await
}

async fn nats_with(terms: StreamLimits) -> Seen {
    let server = NatsServer::start();
    let (lease, learner) = connect(&server).await.lead(RUN, RUN, &learner("learner"), terms).await.unwrap();
    let worker = async |name| connect(&server).await.join(RUN, name, terms.ack_wait);
    let workers: [Arc<dyn Bus>; 2] = [Arc::new(worker("one").await), Arc::new(worker("two").await)];
    Seen { name: "NATS", learner: Arc::new(learner), workers, _kept: Some((lease, server)) }
}

async fn connect(server: &NatsServer) -> Server {
    connect_to(&server.url()).await.unwrap()
}

async fn connect_to(url: &str) -> Result<Server, Error> {
    let settings = Settings { servers: url.parse()?, patience: LIMIT, credentials: Credentials::default() };
    Server::connect(settings, "test").await
}

/// Returns another learner on each call, even for the same name.
fn learner(name: &str) -> Identity {
    static NUM_LEARNERS: AtomicUsize = AtomicUsize::new(0);
    let number = NUM_LEARNERS.fetch_add(1, Ordering::Relaxed);
    Identity { name: name.to_owned(), id: number.to_string(), before: None }
}

/// Returns the learner that resumes the run directory of another.
fn after(learner: &Identity) -> Identity {
    Identity { before: Some(learner.id.clone()), ..self::learner(&learner.name) }
}

fn terms() -> StreamLimits {
    StreamLimits { max_tasks: 64, ack_wait: ACK_WAIT, lease: LEASE, num_replicas: 1, weights_bytes: 0, base_bytes: 0 }
}

fn task(index: u32) -> Task {
    Task {
        id: TaskId { kind: TaskKind::Train, batch: 0, index },
        seed: 0,
        weights: Digest::of_bytes(b""),
        policy_version: 0,
        free_running: false,
        request: Request::Solve {
            problem: Problem { domain: "countdown".to_owned(), text: "2 1 -> 3".to_owned() },
            origin: ProblemOrigin::Ladder,
            has_key: false,
        },
        family: String::new(),
        num_rollouts: 1,
        sampling: Sampling { behavior: Behavior::Policy, temperature: 1.0 },
        max_tokens: 5,
    }
}

/// Returns the nth issue of a task.
fn issued(index: u32, issue: u32) -> Message<Task> {
    Message { envelope: Envelope { term: 1, issue, ..Envelope::default() }, body: task(index) }
}

async fn take(bus: &Arc<dyn Bus>) -> Delivery<Task> {
    timeout(LIMIT, bus.next_task()).await.expect("a task comes").unwrap()
}

async fn expect_none(bus: &Arc<dyn Bus>, wait: Duration) {
    let delivery = timeout(wait, bus.next_task()).await;
    assert!(delivery.is_err(), "expected no task, got {delivery:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_task_is_taken_by_one_of_many_workers() {
    for bus in buses().await {
        for index in 0..32 {
            bus.learner.publish_task(issued(index, 0)).await.unwrap();
        }
        let num_taken = Arc::new(AtomicUsize::new(0));
        let take_all = |bus: Arc<dyn Bus>| {
            let num_taken = num_taken.clone();
            async move {
                let mut taken = Vec::new();
                while num_taken.load(Ordering::Relaxed) < 32 {
                    let Ok(delivery) = timeout(SOON, bus.next_task()).await else { continue };
                    let delivery = delivery.unwrap();
                    delivery.acknowledge().await.unwrap();
                    taken.push(delivery.message.body.id.index);
                    num_taken.fetch_add(1, Ordering::Relaxed);
                }
                taken
            }
        };
        let [one, two] = bus.workers.clone().map(|worker| tokio::spawn(take_all(worker)));
        let mut taken = timeout(LIMIT, async { [one.await.unwrap(), two.await.unwrap()].concat() }).await.unwrap();
        expect_none(&bus.workers[0], SOON).await;
        taken.sort();
        assert_eq!(taken, (0..32).collect::<Vec<_>>(), "{}", bus.name);
    }
}

/// A reissued task is delivered again, even while the bus remembers the first issue: it must not drop it as a duplicate.
#[tokio::test(flavor = "multi_thread")]
async fn a_reissue_is_delivered() {
    for bus in buses().await {
        for issue in 0..2 {
            bus.learner.publish_task(issued(7, issue)).await.unwrap();
        }
        for issue in 0..2 {
            let delivery = take(&bus.workers[0]).await;
            delivery.acknowledge().await.unwrap();
            assert_eq!(delivery.message, issued(7, issue), "{}", bus.name);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_handed_back_is_delivered_to_another() {
    for bus in buses().await {
        bus.learner.publish_task(issued(1, 0)).await.unwrap();
        let [one, two] = &bus.workers;
        take(one).await.hand_back(Duration::from_millis(50)).await.unwrap();
        assert_eq!(take(two).await.message, issued(1, 0), "{}", bus.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_that_is_given_up_loses_nothing() {
    for bus in buses().await {
        let worker = &bus.workers[0];
        for index in 0..8 {
            expect_none(worker, Duration::from_millis(20)).await;
            bus.learner.publish_task(issued(index, 0)).await.unwrap();
            let delivery = match timeout(Duration::ZERO, worker.next_task()).await {
                Ok(delivery) => delivery.unwrap(),
                Err(_) => take(worker).await,
            };
            delivery.acknowledge().await.unwrap();
            assert_eq!(delivery.message, issued(index, 0), "{}", bus.name);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_goes_in_the_envelope_of_its_task() {
    for bus in buses().await {
        bus.learner.publish_task(issued(1, 3)).await.unwrap();
        let delivery = take(&bus.workers[0]).await;
        let group = Group { task: task(1), sets: Vec::new(), rollouts: Vec::new() };
        bus.workers[0].publish_group(delivery.message.reply(group.clone())).await.unwrap();
        let played = timeout(LIMIT, bus.workers[1].next_group()).await.unwrap().unwrap();
        let Envelope { term, issue, .. } = played.message.envelope;
        assert_eq!((term, issue, &played.message.body), (1, 3, &group), "{}", bus.name);
    }
}

/// Another actor plays an audit, and an actor cannot claim to be another.
#[tokio::test(flavor = "multi_thread")]
async fn an_audit_is_for_others_and_a_group_names_its_actor() {
    let bus = nats().await;
    let [one, two] = &bus.workers;
    let mut audit = issued(1, 1);
    audit.envelope.excluded_actors = vec!["one".to_owned()];
    bus.learner.publish_task(audit.clone()).await.unwrap();
    expect_none(one, SOON).await;
    // It requests nothing more; messages on their way to it go to another.
    one.leave().await;
    bus.learner.publish_task(issued(2, 0)).await.unwrap();
    let mut taken = BTreeSet::new();
    for _ in 0..2 {
        let delivery = take(two).await;
        delivery.acknowledge().await.unwrap();
        taken.insert(delivery.message.body.id.index);
    }
    assert_eq!(taken, BTreeSet::from([1, 2]));

    let mut lies = audit.reply(Group { task: task(1), sets: Vec::new(), rollouts: Vec::new() });
    lies.envelope.played_by = "two".to_owned();
    one.publish_group(lies).await.unwrap();
    let group = timeout(LIMIT, two.next_group()).await.unwrap().unwrap();
    assert_eq!(group.message.envelope.played_by, "one");
    assert!(group.set_aside().await);
    let (_, server) = bus._kept.as_ref().unwrap();
    let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let dead = jetstream.get_stream(format!("autodidact_{RUN}_dead")).await.unwrap();
    assert_eq!(dead.get_raw_message(1).await.unwrap().subject.as_str(), format!("autodidact.{RUN}.dead.two.group"));
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_are_kept_until_they_are_let_go() {
    for bus in buses().await {
        // The second is larger than a message may be.
        let weights: [Arc<[u8]>; 2] = [vec![7; 3].into(), (0..3_000_000_u32).map(|byte| byte as u8).collect()];
        let digests = weights.clone().map(|bytes| Digest::of_bytes(&bytes));
        for (digest, bytes) in digests.iter().zip(&weights) {
            bus.learner.put_weights(*digest, bytes.clone()).await.unwrap();
            bus.learner.put_weights(*digest, bytes.clone()).await.unwrap();
            assert!(bus.workers[0].get_weights(*digest).await.unwrap() == *bytes, "{}", bus.name);
        }
        bus.learner.retain_weights(&digests[1..]).await.unwrap();
        assert!(bus.workers[0].get_weights(digests[1]).await.unwrap() == weights[1], "{}", bus.name);
        let missing = bus.workers[0].get_weights(digests[0]).await.unwrap_err();
        assert!(missing.to_string().contains(&digests[0].short()), "{}: {missing}", bus.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_kept_until_their_batch_is_over() {
    for bus in buses().await {
        let id = |batch| TaskId { batch, ..task(3).id };
        for batch in [4, 5] {
            bus.learner.put_key(id(batch), ProblemKey { text: batch.to_string() }).await.unwrap();
        }
        bus.learner.forget_batch(TaskKind::Train, 4).await.unwrap();
        assert_eq!(bus.workers[0].get_key(id(5)).await.unwrap().text, "5", "{}", bus.name);
        let missing = bus.workers[0].get_key(id(4)).await.unwrap_err();
        assert!(missing.to_string().contains("batch: 4"), "{}: {missing}", bus.name);
    }
}

#[tokio::test]
async fn faults_are_what_was_asked_for() {
    const NUM_TASKS: u32 = 1000;
    let shares = [(0.1, 0.0, 0.0), (0.0, 0.1, 0.0), (0.0, 0.0, 0.1), (0.1, 0.2, 0.3)];
    for (drop, duplicate, reorder) in shares {
        let bus = Faulty::new(Arc::new(InProcess::new()), Faults { drop, duplicate, reorder, seed: 5 });
        for index in 0..NUM_TASKS {
            bus.publish_task(issued(index, 0)).await.unwrap();
        }
        let mut taken = Vec::new();
        while let Ok(delivery) = timeout(SOON, bus.next_task()).await {
            taken.push(delivery.unwrap().message.body.id.index);
        }
        let counts = bus.counts();
        for (share, count) in [(drop, counts.dropped), (duplicate, counts.duplicated), (reorder, counts.reordered)] {
            assert!((share * 1000.0 - count as f64).abs() < 50.0, "{share} of {NUM_TASKS}: {counts:?}");
        }
        assert_eq!(taken.len() as u64, u64::from(NUM_TASKS) - counts.dropped + counts.duplicated);
        let seen: BTreeSet<u32> = taken.iter().copied().collect();
        assert_eq!(seen.len() as u64, u64::from(NUM_TASKS) - counts.dropped, "nothing else is lost");
        assert_eq!(taken.is_sorted(), duplicate + reorder == 0.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_worker_held_goes_to_another_and_what_is_kept_does_not() {
    let bus = nats().await;
    let [one, two] = &bus.workers;
    bus.learner.publish_task(issued(1, 0)).await.unwrap();
    let held = take(one).await;
    expect_none(two, 2 * ACK_WAIT).await;
    drop(held);
    assert_eq!(take(two).await.message, issued(1, 0));
}

/// Tasks of a worker that leaves are redelivered at once, not after the server's acknowledgement timeout.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_on_the_way_to_a_worker_that_leaves_goes_to_another() {
    let bus = nats_with(StreamLimits { ack_wait: 10 * LIMIT, ..terms() }).await;
    let [one, two] = &bus.workers;
    for index in 0..8 {
        bus.learner.publish_task(issued(index, 0)).await.unwrap();
    }
    take(one).await.acknowledge().await.unwrap();
    take(one).await.hand_back(Duration::ZERO).await.unwrap();
    one.leave().await;
    let mut taken = BTreeSet::new();
    while taken.len() < 7 {
        let delivery = take(two).await;
        delivery.acknowledge().await.unwrap();
        taken.insert(delivery.message.body.id.index);
    }
}

/// A publisher that receives no confirmation publishes again.
#[tokio::test(flavor = "multi_thread")]
async fn an_issue_is_delivered_once_however_often_it_is_published() {
    let bus = nats().await;
    for _ in 0..3 {
        bus.learner.publish_task(issued(1, 0)).await.unwrap();
    }
    take(&bus.workers[0]).await.acknowledge().await.unwrap();
    bus.learner.publish_task(issued(1, 0)).await.unwrap();
    expect_none(&bus.workers[0], SOON).await;
}

/// Workers do not play tasks that are no longer needed.
#[tokio::test(flavor = "multi_thread")]
async fn the_tasks_of_a_sealed_batch_are_forgotten() {
    let bus = nats().await;
    let (mut audit, mut of_next) = (issued(1, 1), issued(2, 0));
    audit.envelope.excluded_actors = vec!["two".to_owned()];
    of_next.body.id.batch = 1;
    for message in [issued(1, 0), issued(2, 0), audit, of_next.clone()] {
        bus.learner.publish_task(message).await.unwrap();
    }
    bus.learner.forget_batch(TaskKind::Train, 0).await.unwrap();
    assert_eq!(take(&bus.workers[0]).await.message, of_next);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_set_aside() {
    let bus = nats().await;
    let (_, server) = bus._kept.as_ref().unwrap();
    let client = async_nats::connect(server.url()).await.unwrap();
    let subject = format!("autodidact.{RUN}.task.t0.1");
    let whole = proto::wire::encode(&issued(1, 0));
    let unreadable = [&b""[..], b"\xff\xff\xff", &whole[..whole.len() - 1], &[whole.clone(), vec![0]].concat()];
    for bytes in unreadable {
        client.publish(subject.clone(), bytes.to_vec().into()).await.unwrap();
    }
    client.flush().await.unwrap();
    bus.learner.publish_task(issued(2, 0)).await.unwrap();
    let delivery = take(&bus.workers[0]).await;
    delivery.acknowledge().await.unwrap();
    assert_eq!(delivery.message, issued(2, 0));
    expect_none(&bus.workers[0], 2 * ACK_WAIT).await;
    // They are in the dead-letter stream, for people to inspect.
    let jetstream = async_nats::jetstream::new(client);
    let dead = jetstream.get_stream(format!("autodidact_{RUN}_dead")).await.unwrap();
    for (index, bytes) in unreadable.into_iter().enumerate() {
        let found = dead.get_raw_message(index as u64 + 1).await.unwrap();
        assert_eq!(found.payload, bytes);
        assert!(found.subject.ends_with(".task"), "{}", found.subject);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_the_server_would_not_take_is_refused_with_both_sizes() {
    let bus = nats().await;
    let mut large = issued(1, 0);
    large.body.family = "x".repeat(2 << 20);
    let refused = bus.learner.publish_task(large).await.unwrap_err().to_string();
    assert!(refused.contains("a task has 2097") && refused.contains("up to 1048576"), "{refused}");
}

/// A server that comes back, intact or empty, is used again. Lost streams are recreated, and `restore` reports it.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_may_come_back_empty() {
    let mut bus = nats().await;
    let weights = Digest::of_bytes(b"weights");
    for (wipes, issue) in [(false, 0), (true, 2)] {
        bus.learner.publish_task(issued(1, issue)).await.unwrap();
        bus.learner.put_weights(weights, b"weights"[..].into()).await.unwrap();
        let (_, server) = bus._kept.as_mut().unwrap();
        server.kill();
        if wipes {
            server.wipe();
        }
        server.restart();
        // A waiting worker finds the streams again by itself.
        let worker = bus.workers[0].clone();
        let taken = tokio::spawn(async move { take(&worker).await });
        bus.learner.publish_task(issued(1, issue + 1)).await.unwrap();
        assert_eq!(bus.learner.restore().await.unwrap(), wipes);
        if wipes {
            let missing = timeout(LIMIT, bus.workers[1].get_weights(weights)).await.unwrap().unwrap_err();
            assert!(matches!(missing, Error::NoWeights { .. }), "{missing}");
            bus.learner.put_weights(weights, b"weights"[..].into()).await.unwrap();
        }
        taken.await.unwrap().acknowledge().await.unwrap();
        assert_eq!(*bus.workers[1].get_weights(weights).await.unwrap(), b"weights"[..]);
    }
}

/// Messages that are queued in a worker are neither lost nor delivered to another meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_its_turn_is_kept() {
    let bus = nats().await;
    let [one, two] = &bus.workers;
    // A task that arrives after its wait was cancelled.
    expect_none(one, Duration::from_millis(100)).await;
    bus.learner.publish_task(issued(1, 0)).await.unwrap();
    // Groups that arrive along with the requested one.
    for index in 0..4 {
        let group = Group { task: task(index), sets: Vec::new(), rollouts: Vec::new() };
        one.publish_group(issued(index, 0).reply(group)).await.unwrap();
    }
    let taken = timeout(LIMIT, one.next_group()).await.unwrap().unwrap();
    let expect_nothing = async {
        tokio::select! {
            task = two.next_task() => panic!("{task:?}"),
            group = two.next_group() => panic!("{group:?}"),
        }
    };
    assert!(timeout(2 * ACK_WAIT, expect_nothing).await.is_err());
    let mut groups = vec![taken];
    for _ in 0..3 {
        groups.push(timeout(LIMIT, one.next_group()).await.unwrap().unwrap());
    }
    let task = take(one).await;
    assert!(!task.is_redelivered && !groups.iter().any(|group| group.is_redelivered), "{task:?} {groups:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_has_one_learner_at_a_time() {
    let server = NatsServer::start();
    let lead = async |identity: &Identity| connect(&server).await.lead(RUN, RUN, identity, terms()).await;
    let (one, two) = (learner("first"), learner("second"));
    let (first, _) = lead(&one).await.unwrap();
    let refused = lead(&two).await.map(|_| ()).unwrap_err();
    assert!(matches!(&refused, Error::Taken { holder, .. } if holder == "first"), "{refused}");
    assert!(timeout(SOON, first.lost()).await.is_err(), "the other is unharmed");
    // The same learner, restarted: the run directory's lock proves that its earlier process is gone.
    let resumed = after(&one);
    let (again, _) = timeout(LEASE / 2, lead(&resumed)).await.expect("it need not wait").unwrap();
    assert!(again.term() > first.term());
    let lost = timeout(LIMIT, first.lost()).await.expect("the earlier one is told");
    assert!(matches!(lost, Error::Taken { .. }), "{lost}");
    // If killed before its id is in the run directory, the learner is recognised by the previous id.
    again.abandon();
    let (again, _) = timeout(LEASE / 2, lead(&after(&one))).await.expect("it need not wait").unwrap();
    let term = again.term();
    again.release().await;
    let (second, _) = timeout(LEASE / 2, lead(&two)).await.expect("what was let go need not be waited for").unwrap();
    assert!(second.term() > term);
}

/// Two machines with the same name and run directory path are distinct: neither takes the run of the other.
#[tokio::test(flavor = "multi_thread")]
async fn learners_that_are_called_the_same_are_told_apart() {
    let server = NatsServer::start();
    let lead = async || connect(&server).await.lead(RUN, RUN, &learner("host:1:/run"), terms()).await;
    let (first, _) = lead().await.unwrap();
    for _ in 0..2 {
        let refused = timeout(LIMIT, lead()).await.unwrap().map(|_| ()).unwrap_err();
        assert!(matches!(&refused, Error::Taken { holder, .. } if holder == "host:1:/run"), "{refused}");
    }
    assert!(timeout(SOON, first.lost()).await.is_err());
    timeout(LIMIT, first.release()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_that_is_gone_is_waited_for() {
    let server = NatsServer::start();
    let (first, _) = connect(&server).await.lead(RUN, RUN, &learner("first"), terms()).await.unwrap();
    let term = first.term();
    // Nothing renews the lease any more, and nothing has released it.
    first.abandon();
    let began = tokio::time::Instant::now();
    let (second, _) = connect(&server).await.lead(RUN, RUN, &learner("second"), terms()).await.unwrap();
    assert!(second.term() > term && began.elapsed() >= LEASE, "it may have lived");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_announced_is_found_also_after_a_loss() {
    let mut server = NatsServer::start();
    let worker = connect(&server).await;
    assert_eq!(worker.announced_runs().await.unwrap(), Vec::<String>::new());
    assert_eq!(worker.announcement(RUN).await.unwrap(), None);
    let (lease, _) = connect(&server).await.lead(RUN, RUN, &learner("learner"), terms()).await.unwrap();
    lease.announce(b"come all".to_vec());
    let found = async || {
        let mut looks = tokio::time::interval(Duration::from_millis(20));
        while worker.announcement(RUN).await.unwrap().as_deref() != Some(b"come all") {
            looks.tick().await;
        }
        assert_eq!(worker.announced_runs().await.unwrap(), [RUN]);
    };
    timeout(LIMIT, found()).await.unwrap();
    server.kill();
    server.wipe();
    server.restart();
    timeout(LIMIT, found()).await.unwrap();
    assert!(timeout(SOON, lease.lost()).await.is_err());
}

/// The server lets anyone redirect its replies to any subject, even to those that only a learner writes.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_learner_wrote_is_replaced() {
    let server = NatsServer::start();
    let hostile = async_nats::connect(server.url()).await.unwrap();
    let (lease, learner) = connect(&server).await.lead(RUN, RUN, &learner("learner"), terms()).await.unwrap();
    lease.announce(b"come all".to_vec());
    let worker = connect(&server).await;
    let found = async || while worker.announcement(RUN).await.unwrap().as_deref() != Some(b"come all") {};
    timeout(LIMIT, found()).await.unwrap();
    let id = TaskId { kind: TaskKind::Train, batch: 0, index: 0 };
    learner.put_key(id, ProblemKey { text: "1".to_owned() }).await.unwrap();
    for subject in ["$KV.autodidact_runs.r.lease", "$KV.autodidact_runs.r.run", "autodidact.r.key.t0.0"] {
        let subject = subject.replace(".r.", &format!(".{RUN}."));
        hostile.publish(subject, "{\"type\": \"an answer\"}".into()).await.unwrap();
    }
    hostile.flush().await.unwrap();
    let joined = worker.join(RUN, "one", terms().ack_wait);
    let missing = async || while !matches!(joined.get_key(id).await, Err(Error::NoKey { .. })) {};
    timeout(LIMIT, missing()).await.expect("what is no key is none");
    timeout(LIMIT, found()).await.expect("it is announced again");
    assert!(timeout(LEASE, lease.lost()).await.is_err(), "nobody has taken it over");
    timeout(LIMIT, lease.release()).await.unwrap();
}

/// Of a finished run only the messages that were set aside remain, for people to inspect.
#[tokio::test(flavor = "multi_thread")]
async fn the_streams_of_a_run_that_is_over_are_removed() {
    let server = NatsServer::start();
    let lead = async || connect(&server).await.lead(RUN, RUN, &learner("learner"), terms()).await.unwrap();
    let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let streams = async || jetstream.stream_names().try_collect::<BTreeSet<String>>().await.unwrap();
    let bucket = BTreeSet::from(["KV_autodidact_runs".to_owned()]);
    let (lease, _) = lead().await;
    assert_eq!(streams().await.len(), 7);
    lease.end().await;
    assert_eq!(streams().await, bucket);

    // The same run is resumed, and one message cannot be read.
    let (lease, _) = lead().await;
    let subject = format!("autodidact.{RUN}.task.t0.0");
    jetstream.publish(subject, "no task".into()).await.unwrap().await.unwrap();
    let worker: Arc<dyn Bus> = Arc::new(connect(&server).await.join(RUN, "one", terms().ack_wait));
    let dead = format!("autodidact_{RUN}_dead");
    let set_aside = async {
        while jetstream.get_stream(&dead).await.unwrap().cached_info().state.messages == 0 {
            expect_none(&worker, SOON).await;
        }
    };
    timeout(LIMIT, set_aside).await.unwrap();
    lease.end().await;
    assert_eq!(streams().await, BTreeSet::from([dead, bucket.first().unwrap().clone()]));
}

/// A learner that does not know yet that another has taken over its run cannot end the run.
#[tokio::test(flavor = "multi_thread")]
async fn a_learner_that_was_overtaken_removes_nothing() {
    let server = NatsServer::start();
    let lead = async |identity: &Identity| connect(&server).await.lead(RUN, RUN, identity, terms()).await.unwrap();
    let one = learner("learner");
    let two = after(&one);
    let (overtaken, _) = lead(&one).await;
    let (_lease, leads) = lead(&two).await;
    overtaken.announce(b"it is over".to_vec());
    overtaken.end().await;
    assert!(!leads.restore().await.unwrap(), "its streams are there");
    assert_eq!(connect(&server).await.announcement(RUN).await.unwrap(), None);

    // Nor does it take the run back after the other has left.
    let three = after(&two);
    let (overtaken, _) = lead(&three).await;
    let (again, _) = lead(&after(&three)).await;
    again.end().await;
    let lost = timeout(LIMIT, overtaken.lost()).await.unwrap();
    assert!(matches!(lost, Error::Taken { .. }), "{lost}");
}

/// Someone else created the bucket, with an expiry, but leases must not expire.
#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_forgets_is_refused() {
    let server = NatsServer::start();
    let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let bucket = "autodidact_runs".to_owned();
    let max_age = Duration::from_secs(60);
    let config = async_nats::jetstream::kv::Config { bucket, max_age, ..Default::default() };
    jetstream.create_key_value(config).await.unwrap();
    let refused =
        connect(&server).await.lead(RUN, RUN, &learner("learner"), terms()).await.map(|_| ()).unwrap_err().to_string();
    assert!(refused.starts_with("bus: bucket autodidact_runs: expected max_age 0 s, "), "{refused}");
    assert!(refused.contains("got max_age 60 s, "), "{refused}");
}

/// A server that reports an old version: it would silently ignore options that it does not know.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_server_is_refused() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut connection, _) = listener.accept().await.unwrap();
        let info = r#"INFO {"server_id":"old","server_name":"old","version":"2.11.9","go":"","host":"127.0.0.1","port":0,"headers":true,"max_payload":1048576,"proto":1,"jetstream":true}"#;
        connection.write_all(format!("{info}\r\n").as_bytes()).await.unwrap();
        let mut said = [0; 4096];
        while connection.read(&mut said).await.is_ok_and(|num_bytes| num_bytes > 0) {
            connection.write_all(b"PONG\r\n").await.unwrap();
        }
    });
    let refused = connect_to(&url).await.err().unwrap().to_string();
    assert_eq!(refused, format!("bus: server {url}: expected nats-server 2.12 or newer, got 2.11.9"));
}

/// Listeners receive the newest weights; announcements made before they listen are lost.
#[tokio::test(flavor = "multi_thread")]
async fn newer_weights_are_announced_to_whoever_listens() {
    let version = |policy_version| Version { policy_version, weights: Digest::of_bytes(b"") };
    for bus in buses().await {
        let [worker, _] = &bus.workers;
        let mut next = worker.next_version();
        // It may begin to listen after the first announcement.
        let heard = async {
            loop {
                bus.learner.announce(version(1)).await.unwrap();
                if let Ok(heard) = timeout(Duration::from_millis(50), &mut next).await {
                    return heard.unwrap();
                }
            }
        };
        assert_eq!(timeout(LIMIT, heard).await.unwrap(), version(1), "{}", bus.name);
        drop(next);
        for policy_version in 2..10 {
            bus.learner.announce(version(policy_version)).await.unwrap();
        }
        let newest = async { while worker.next_version().await.unwrap() != version(9) {} };
        timeout(LIMIT, newest).await.expect("the last is heard of");
    }
}
