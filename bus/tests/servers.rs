//! Requirements on a server, its credentials, and the errors when it cannot be used.

mod nats_server;

use std::sync::Arc;
use std::time::Duration;

use bus::nats::{Credentials, Identity, Server, Settings, StreamLimits};
use bus::{Bus as _, Error, WeightStore as _};
use futures_util::TryStreamExt as _;
use nats_server::NatsServer;
use proto::{Digest, TaskKind};
use tokio::time::timeout;

/// Longer than any wait here: refusals are immediate.
const PATIENCE: Duration = Duration::from_secs(600);
const LIMIT: Duration = Duration::from_secs(30);
const JETSTREAM: &str = r#"jetstream { store_dir: "store" }"#;

async fn connect(url: &str) -> Result<Server, Error> {
    let settings = Settings { servers: url.parse()?, patience: PATIENCE, credentials: Credentials::default() };
    timeout(LIMIT, Server::connect(settings, "test")).await.expect("it ends at once")
}

async fn refusal(url: &str) -> String {
    connect(url).await.err().expect("it is refused").to_string()
}

fn terms(lease: Duration) -> StreamLimits {
    let ack_wait = Duration::from_secs(2);
    StreamLimits { max_tasks: 8, ack_wait, lease, num_replicas: 1, weights_bytes: 0, base_bytes: 0 }
}

fn learner(id: &str) -> Identity {
    Identity { name: format!("host:{id}:/run"), id: id.to_owned(), before: None }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_and_password_or_a_token_are_used_and_not_shown() {
    for (config, login, wrong) in [
        (r#"authorization { user: "u@1", password: "s3cret,/:%" }"#, "u%401:s3cret%2C%2F%3A%25", "u%401:s3crets"),
        (r#"authorization { token: "s3cret,+" }"#, "s3cret%2C+", "s3crets"),
    ] {
        let mut server = NatsServer::with_config(&format!("{JETSTREAM}\n{config}"));
        let connected = connect(&server.url_of(login)).await.unwrap();
        assert_eq!(connected.announced_runs().await.unwrap(), Vec::<String>::new());
        let shown = server.url_of("***");
        // Also if one of the servers is down.
        let away = format!("nats://{login}@127.0.0.1:1");
        connect(&format!("{away},{}", server.url_of(login))).await.unwrap();
        connect(&format!("{},{away}", server.url_of(login))).await.unwrap();
        let refused = refusal(&server.url_of(wrong)).await;
        assert!(refused.starts_with(&format!("bus: not permitted: {shown}: authorization violation")), "{refused}");
        let refused = refusal(&server.url()).await;
        let says = "authorization violation; it requires an nkey (--nkey), a user and password, or a token";
        assert!(refused.ends_with(says), "{refused}");
        // The connection comes back as the same user.
        server.kill();
        server.restart();
        assert_eq!(timeout(LIMIT, connected.announced_runs()).await.unwrap().unwrap(), Vec::<String>::new());
        let settings = Settings {
            servers: away.parse().unwrap(),
            patience: Duration::from_millis(1),
            credentials: Credentials::default(),
        };
        let unreachable = Server::connect(settings.clone(), "test").await.err().unwrap().to_string();
        assert!(
            unreachable.starts_with("bus: could not connect to nats://***@127.0.0.1:1 within 0 s"),
            "{unreachable}"
        );
        assert!(!format!("{settings:?} {unreachable} {refused}").contains("s3c"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_and_a_password_are_not_both_used() {
    let key = nkeys::KeyPair::new_user().seed().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("actor.nk");
    std::fs::write(&path, key).unwrap();
    let credentials = Credentials { nkey: Some(path), tls_ca: None };
    let settings =
        Settings { servers: "nats://u:s3cret@127.0.0.1:1".parse().unwrap(), patience: PATIENCE, credentials };
    let refused = Server::connect(settings, "test").await.err().unwrap().to_string();
    assert!(
        refused.starts_with("bus: server nats://***@127.0.0.1:1: expected either an nkey (--nkey) or "),
        "{refused}"
    );
    assert!(refused.ends_with(", got both"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_jetstream_is_refused_at_once() {
    let without = NatsServer::with_config("");
    let refused = refusal(&without.url()).await;
    let url = without.url();
    assert!(refused.starts_with(&format!("bus: server {url}: expected a nats-server with JetStream (")), "{refused}");
    // The server has JetStream, but not for this user's account.
    let accounts = "accounts { A { users: [{user: a, password: b}] }, SYS { users: [{user: s, password: s}] } }";
    let server = NatsServer::with_config(&format!("{JETSTREAM}\n{accounts}\nsystem_account: SYS"));
    let refused = refusal(&server.url_of("a:b")).await;
    assert!(refused.contains(": expected a nats-server with JetStream ("), "{refused}");
}

/// The error states how much storage is needed, and which setting to change.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_too_little_room_is_refused_with_what_is_needed() {
    let server = NatsServer::with_config(r#"jetstream { store_dir: "store", max_file_store: 32MB }"#);
    let connected = connect(&server.url()).await.unwrap();
    let learner = learner("1");
    let lead = connected.lead("run", "run", &learner, terms(PATIENCE));
    let refused = timeout(LIMIT, lead).await.expect("it ends at once").map(|_| ()).unwrap_err().to_string();
    let says =
        "a run needs 67108864 bytes of the server's store: raise max_file_store in the jetstream block of its config";
    assert!(refused.starts_with(&format!("bus: server {}: ", server.url())) && refused.contains(says), "{refused}");
}

/// The same if the store fills up later: this may be temporary, so the call waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_full_says_what_is_needed() {
    const NUM_BYTES: usize = 80 << 20;
    let server = NatsServer::with_config(r#"jetstream { store_dir: "store", max_file_store: 70MB }"#);
    let settings = Settings {
        servers: server.url().parse().unwrap(),
        patience: Duration::from_secs(1),
        credentials: Credentials::default(),
    };
    let connected = Server::connect(settings, "test").await.unwrap();
    let (_lease, bus) = connected.lead("run", "run", &learner("1"), terms(PATIENCE)).await.unwrap();
    let weights: Arc<[u8]> = (0..NUM_BYTES as u64).map(|byte| (byte.wrapping_mul(0x9E37_79B9) >> 13) as u8).collect();
    let put = bus.put_weights(Digest::of_bytes(&weights), weights);
    let refused = timeout(LIMIT, put).await.unwrap().unwrap_err().to_string();
    assert!(refused.contains("needs 524288 bytes of the server's store: raise max_file_store"), "{refused}");
}

/// A worker asks for the files of a model, and the learner stores them once; again if the server has lost a part.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_stored_once_in_pieces() {
    let server = NatsServer::start();
    let terms = StreamLimits { base_bytes: 2_000_000, ..terms(PATIENCE) };
    let connected = connect(&server.url()).await.unwrap();
    let (_lease, learner) = connected.lead("run", "run", &learner("1"), terms).await.unwrap();
    let worker = connect(&server.url()).await.unwrap().join("run", "actor", PATIENCE);
    let folder = tempfile::tempdir().unwrap();
    let contents: [Vec<u8>; 3] = [(0..1_200_000u32).map(|byte| (byte % 251) as u8).collect(), vec![], vec![7; 10]];
    let mut files = Vec::new();
    for (name, bytes) in ["a", "b", "c"].into_iter().zip(&contents) {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        files.push((format!("{name}.json"), path));
    }
    let digest = Digest::of_bytes(b"the model");
    assert_eq!(worker.model(digest).await.unwrap(), None);
    let ask = async {
        loop {
            worker.want_model(digest).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let wanted = tokio::select! {
        wanted = timeout(LIMIT, learner.next_wanted_model()) => wanted.unwrap(),
        () = ask => unreachable!(),
    };
    assert_eq!(wanted, digest);
    let received = async || {
        let model = worker.model(digest).await.unwrap().unwrap();
        let names: Vec<&str> = model.files.iter().map(|file| file.name.as_str()).collect();
        assert_eq!((names, model.num_bytes()), (vec!["a.json", "b.json", "c.json"], Some(1_200_010)));
        let mut received = Vec::new();
        for file in 0..model.files.len() {
            let pieces: Result<Vec<_>, Error> = worker.pieces(digest, &model, file, 0).try_collect().await;
            let pieces: Option<Vec<_>> = pieces.unwrap().into_iter().collect();
            received.push(pieces?.concat());
        }
        Some(received)
    };
    assert!(learner.put_model(digest, &files).await.unwrap(), "it is stored");
    assert!(received().await.unwrap() == contents);
    assert!(!learner.put_model(digest, &files).await.unwrap(), "it is there");
    let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let stream = jetstream.get_stream("autodidact_run_base").await.unwrap();
    stream.purge().filter(format!("autodidact.run.base.{digest}.0.1")).await.unwrap();
    assert!(received().await.is_none(), "a piece is lost");
    assert!(learner.put_model(digest, &files).await.unwrap(), "it is stored again");
    assert!(received().await.unwrap() == contents);
    std::fs::remove_file(&files[0].1).unwrap();
    let refused = learner.put_model(digest, &files).await.unwrap_err().to_string();
    assert!(refused.contains("a: expected a readable file of the pretrained model, got No such file"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leads_a_run_is_told_and_a_run_that_does_not_live_is_removed() {
    const LEASE: Duration = Duration::from_secs(1);
    let server = NatsServer::start();
    let user = connect(&server.url()).await.unwrap();
    assert_eq!(user.leader("run").await.unwrap(), None);
    let (lease, bus) =
        connect(&server.url()).await.unwrap().lead("run", "run-1", &learner("1"), terms(LEASE)).await.unwrap();
    lease.announce(b"come all".to_vec());
    let leader = async || user.leader("run").await.unwrap().unwrap();
    let wait_for = async |is_so: fn(&bus::nats::Leader) -> bool| {
        let look = async { while !is_so(&leader().await) {} };
        timeout(LIMIT, look).await.expect("it comes true");
    };
    bus.forget_batch(TaskKind::Train, 6).await.unwrap();
    wait_for(|leader| leader.lives && leader.step == Some(7)).await;
    let seen = leader().await;
    assert_eq!(seen.name.as_deref(), Some("host:1:/run"));
    assert!(seen.silent_for <= LEASE && seen.leads_for < LIMIT, "{seen:?}");
    let announced = async || user.announced_runs().await.unwrap();
    let look = async { while announced().await.is_empty() {} };
    timeout(LIMIT, look).await.unwrap();
    let uses = async || user.stream_uses().await.unwrap();
    let found = uses().await;
    let names: Vec<&str> = found.iter().map(|stream| stream.name.as_str()).collect();
    let queues = ["dead", "group", "key", "scored", "task", "weights"];
    assert_eq!(names, queues.map(|queue| format!("autodidact_run-1_{queue}")));
    assert!(found.iter().all(|stream| stream.fingerprint == "run-1"));

    let refused = user.remove("run", &found, &learner("2")).await.unwrap_err();
    assert!(matches!(&refused, Error::Taken { holder, .. } if holder == "host:1:/run"), "{refused}");
    assert_eq!(uses().await.len(), found.len(), "nothing is removed");
    lease.abandon();
    wait_for(|leader| !leader.lives).await;
    let seen = leader().await;
    assert!(seen.name.is_some() && seen.silent_for > LEASE, "{seen:?}");
    user.remove("run", &found, &learner("2")).await.unwrap();
    assert_eq!((uses().await.len(), announced().await, user.leader("run").await.unwrap()), (0, vec![], None));

    // A learner that released its lease does not prevent removal, and a removed run can start anew.
    let (lease, _bus) =
        connect(&server.url()).await.unwrap().lead("run", "run-1", &learner("1"), terms(LEASE)).await.unwrap();
    lease.release().await;
    assert!(!leader().await.lives && leader().await.name.is_none());
    user.remove("run", &uses().await, &learner("2")).await.unwrap();
    assert_eq!(uses().await, []);
}
