//! Keys, certificates and permissions, on a real server: who may do what, and how a process learns that it may not.

use std::os::unix::fs::PermissionsExt as _;

use async_nats::{Client, ConnectOptions, Event};
use tokio::sync::watch;

use crate::cluster::Guarded;
use crate::nats_server::NatsServer;
use crate::runs::{Folder, reference, wait_until};

const INIT: [&str; 7] = ["keys", "init", "keys", "--actors", "2", "--verifiers", "1"];

/// Returns the arguments with which a process joins with its key.
fn key<'a>(url: &'a str, path: &'a str) -> [&'a str; 6] {
    ["--bus", url, "--nkey", path, "--tls-ca", "keys/ca.pem"]
}

#[test]
fn a_run_with_keys_gives_the_weights_of_one_process() {
    let folder = Folder::new();
    let made = folder.call(&INIT).success();
    assert!(made.stdout.starts_with("4 keys in keys, one per process."), "{made:#?}");
    for entry in std::fs::read_dir(folder.path("keys")).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
    }
    let server = NatsServer::with_keys(&folder.path("keys"));
    let url = server.url();
    let start = |role: &str, path: &str, more: &[&str]| folder.start(&[&[role], more, &key(&url, path)[..]].concat());
    let learner = start("learner", "keys/learner.nk", &["smoke", "--run-dir", "run"]);
    let workers = [("actor", "actor-0"), ("actor", "actor-1"), ("verifier", "verifier-0")]
        .map(|(role, name)| start(role, &format!("keys/{name}.nk"), &[]));
    let ended = learner.end().success();
    assert_eq!(ended.stderr, "", "nothing was denied");
    folder.history().assert_steps_of(&reference(0).history);
    for (worker, name) in workers.into_iter().zip(["actor-0", "actor-1", "verifier-0"]) {
        let ended = worker.end().success();
        assert!(!ended.stderr.contains("ermi"), "nothing was denied: {ended:#?}");
        assert!(ended.stdout.starts_with(&format!("{name}: joined run ")), "{ended:#?}");
    }
    // The learner's key is enough to list the run and to remove it.
    let runs = |more: &[&str]| folder.call(&[&["runs"], more, &key(&url, "keys/learner.nk")[..]].concat());
    let listed = runs(&[]).success().stdout;
    let line = listed.lines().find(|line| line.ends_with("none: the run is over")).unwrap();
    runs(&["--remove", line.split(' ').next().unwrap()]).success();
    assert_eq!(runs(&[]).success().stdout, "no runs\n");
}

#[test]
fn who_may_not_is_told_so() {
    let folder = Folder::new();
    folder.call(&INIT).success();
    let again = folder.call(&INIT);
    assert_eq!(again.refusal(), "keys: expected an empty or nonexistent directory, found files");
    let server = NatsServer::with_keys(&folder.path("keys"));
    let url = server.url();
    for (nkey, says) in [
        ("keys/absent.nk", "bus: keys/absent.nk: expected a file with an nkey seed, got "),
        ("keys/ca.pem", "bus: keys/ca.pem: expected the seed of a user nkey, which begins with SU, got "),
    ] {
        let refused = folder.call(&[&["actor", "--name", "actor-0"], &key(&url, nkey)[..]].concat());
        assert!(refused.refusal().starts_with(says), "{refused:#?}");
    }
    let unknown = folder.call(&[&["keys", "init", "others"], &INIT[3..]].concat()).success();
    assert!(unknown.stdout.contains("--nkey others/actor-0.nk"), "{unknown:#?}");
    let refused = folder.call(&[&["actor"], &key(&url, "others/actor-0.nk")[..]].concat());
    assert!(refused.refusal().starts_with(&format!("bus: not permitted: {url}: ")), "{refused:#?}");

    // A key under another name: messages under that name are not permitted, and the process ends at once.
    let learner =
        folder.start(&[&["learner", "smoke", "--run-dir", "run"], &key(&url, "keys/learner.nk")[..]].concat());
    wait_until("the learner to lead", || folder.path("run/config.toml").exists());
    let actor = folder.start(&[&["actor", "--name", "actor-1"], &key(&url, "keys/actor-0.nk")[..]].concat());
    let ended = actor.end();
    let refusal = ended.stderr.lines().last().unwrap();
    assert!(refusal.to_lowercase().contains("permissions violation for"), "{ended:#?}");
    assert!(refusal.contains("_INBOX_actor-1."), "the subject is named: {ended:#?}");
    // An actor cannot use a verifier's key.
    let actor = folder.start(&[&["actor"], &key(&url, "keys/verifier-0.nk")[..]].concat());
    let ended = actor.end();
    let refusal = ended.stderr.lines().last().unwrap();
    let denied = ["$JS.API.CONSUMER.MSG.NEXT.", ".weights.", ".version"];
    assert!(denied.iter().any(|subject| refusal.contains(subject)), "{ended:#?}");
    learner.terminate();
    learner.end().success();
}

/// When a key is removed from the server's file, its process ends with an error and the run goes on without it.
#[test]
fn a_key_that_is_taken_back_ends_its_process() {
    let cluster = Guarded::new();
    let folder = &cluster.folder;
    let learner = cluster.learner(&["smoke"]);
    let [out, stays] = ["actor-0", "actor-1"].map(|name| cluster.start(name, &[]));
    wait_until("both to join", || [&out, &stays].iter().all(|actor| actor.printed_so_far().contains(": joined run ")));
    let users = folder.path("keys/users.conf");
    let all = std::fs::read_to_string(&users).unwrap();
    let (before, from) = all.split_at(all.find("# actor-0: ").unwrap());
    let after = &from[from.find("# actor-1: ").unwrap()..];
    std::fs::write(&users, format!("{before}{after}")).unwrap();
    cluster.server.reload();
    let ended = out.end();
    let refusal = ended.stderr.lines().last().unwrap();
    let says = "error: bus: not permitted: no server accepted the credentials of this process for 10 s: ";
    assert!(refusal.starts_with(says), "{ended:#?}");
    let verifier = cluster.start("verifier-0", &[]);
    learner.end().success();
    folder.history().assert_steps_of(&reference(0).history);
    for worker in [stays, verifier] {
        worker.end().success();
    }
}

/// A server does not check whether a user may write to the subject that receives the answer. The entry that results is not from
/// our processes; the run does not accept it, and recovers.
#[test]
fn answers_that_are_sent_to_where_others_write_do_no_harm() {
    let cluster = Guarded::new();
    let folder = &cluster.folder;
    let learner = cluster.learner(&["smoke", "--run", "mine"]);
    let early = ["actor-1", "verifier-0"].map(|name| cluster.start(name, &[]));
    wait_until("step 2", || folder.last_step() >= 2);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let ask_for = |replies: &[&str]| {
        runtime.block_on(async {
            let user = User::connect(folder, &cluster.server.url(), "actor-0").await;
            for reply in replies {
                let subject = "$JS.API.STREAM.INFO.KV_autodidact_runs";
                user.client.publish_with_reply(subject, reply.to_string(), "".into()).await.unwrap();
            }
            assert!(user.may_subscribe("_INBOX_actor-0.x").await, "all of it has arrived");
        });
    };
    ask_for(&["$KV.autodidact_runs.mine.run", "$KV.autodidact_runs.mine.lease", "$KV.autodidact_runs.other.run"]);
    // A process that joins now finds the run.
    let late = cluster.start("actor-0", &[]);
    let ended = learner.end().success();
    assert_eq!(ended.stderr, "");
    folder.history().assert_steps_of(&reference(0).history);
    for worker in early.into_iter().chain([late]) {
        worker.end().success();
    }
}

/// A connection, and the server's denials on it.
struct User {
    client: Client,
    denied: watch::Receiver<Vec<String>>,
}

impl User {
    async fn connect(folder: &Folder, url: &str, name: &str) -> User {
        let seed = std::fs::read_to_string(folder.path(&format!("keys/{name}.nk"))).unwrap();
        let (heard, denied) = watch::channel(Vec::new());
        let options = ConnectOptions::with_nkey(seed.trim().to_owned())
            .add_root_certificates(folder.path("keys/ca.pem"))
            .custom_inbox_prefix(format!("_INBOX_{name}"))
            .event_callback(move |event| {
                let heard = heard.clone();
                async move {
                    if let Event::ServerError(error) = event {
                        heard.send_modify(|denied| denied.push(error.to_string()));
                    }
                }
            });
        User { client: options.connect(url).await.unwrap(), denied }
    }

    /// Whether the server permits a message to a subject. Whether it answers the message is another matter.
    async fn may_publish(&self, subject: &str) -> bool {
        let num_known = self.denied.borrow().len();
        self.client.publish(subject.to_owned(), "x".into()).await.unwrap();
        self.may(subject, num_known).await
    }

    async fn may_subscribe(&self, subject: &str) -> bool {
        let num_known = self.denied.borrow().len();
        let _subscriber = self.client.subscribe(subject.to_owned()).await.unwrap();
        self.may(subject, num_known).await
    }

    /// Whether the request after the first `num_known` denials was permitted. A subject may be denied to other requests.
    async fn may(&self, subject: &str, num_known: usize) -> bool {
        // Denials arrive in order, and before the answers to later requests: a subject that is always denied marks the end.
        let mut denied = self.denied.clone();
        let mark = format!("mark.{}", denied.borrow().len());
        self.client.publish(mark.clone(), "x".into()).await.unwrap();
        let names =
            |denied: &[String], subject: &str| denied.iter().any(|error| error.contains(&format!("\"{subject}\"")));
        let denied = denied.wait_for(|denied| names(denied, &mark)).await.unwrap();
        !names(&denied[num_known..], subject)
    }
}

/// The full table of permissions: the least that works.
#[test]
fn permissions_are_the_least_that_works() {
    let folder = Folder::new();
    folder.call(&INIT).success();
    let server = NatsServer::with_keys(&folder.path("keys"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let learner_only = [
        "autodidact.r.task.t0.0",
        "autodidact.r.audit.t0.0",
        "autodidact.r.key.t0.0",
        "autodidact.r.weights.d.0",
        "autodidact.r.base.d.0.0",
        "autodidact.r.version",
        "$KV.autodidact_runs.r.run",
        "$JS.API.STREAM.CREATE.autodidact_r_task",
        "$JS.API.STREAM.PURGE.autodidact_r_task",
        "$JS.API.STREAM.DELETE.autodidact_r_task",
        "$JS.API.CONSUMER.CREATE.autodidact_r_key",
        "$JS.API.CONSUMER.MSG.NEXT.autodidact_r_scored.learner",
        "$JS.ACK.autodidact_r_scored.learner.1.1.1.1.0",
    ];
    let nobody = [
        "$JS.API.STREAM.MSG.GET.autodidact_r_key",
        "autodidact.r.group.actor-9.t0.0",
        "autodidact.r.scored.verifier-9.t0.0",
        "autodidact.r.refused.verifier-9",
        "autodidact.r.wanted.verifier-9",
    ];
    let of_actor_0 = [
        "autodidact.r.group.actor-0.t0.0",
        "autodidact.r.beat.actor-0",
        "$JS.API.DIRECT.GET.autodidact_r_weights.autodidact.r.weights.d.0",
        "$JS.API.CONSUMER.MSG.NEXT.autodidact_r_task.actor",
        "$JS.ACK.autodidact_r_task.actor.1.1.1.1.0",
    ];
    let of_verifier_0 = [
        "autodidact.r.scored.verifier-0.t0.0",
        "autodidact.r.refused.verifier-0",
        "autodidact.r.beat.verifier-0",
        "$JS.API.DIRECT.GET.autodidact_r_key.autodidact.r.key.t0.0",
        "$JS.API.CONSUMER.MSG.NEXT.autodidact_r_group.verifier",
        "$JS.ACK.autodidact_r_group.verifier.1.1.1.1.0",
    ];
    let inboxes = ["_INBOX_learner.x", "_INBOX_actor-0.x", "_INBOX_actor-1.x", "_INBOX_verifier-0.x"];
    let all = || learner_only.iter().chain(&nobody).chain(&of_actor_0).chain(&of_verifier_0);
    runtime.block_on(async {
        let own: [(&str, &[&str]); 4] = [
            ("learner", &learner_only),
            ("actor-0", &of_actor_0),
            ("actor-1", &of_actor_0[2..]),
            ("verifier-0", &of_verifier_0),
        ];
        for (name, own) in own {
            let user = User::connect(&folder, &server.url(), name).await;
            for subject in all() {
                // The learner also reads what it has stored.
                let reads = name == "learner" && subject.contains(".DIRECT.GET.");
                let expected = own.contains(subject) || reads;
                assert_eq!(user.may_publish(subject).await, expected, "{name} publishes to {subject}");
            }
            for inbox in inboxes {
                let expected = inbox == format!("_INBOX_{name}.x");
                assert_eq!(user.may_subscribe(inbox).await, expected, "{name} listens to {inbox}");
            }
            let plays = name.starts_with("actor");
            assert_eq!(user.may_subscribe("autodidact.r.version").await, plays, "{name} hears of versions");
            let learns = name == "learner";
            for subject in ["autodidact.r.refused.*", "autodidact.r.wanted.*"] {
                assert_eq!(user.may_subscribe(subject).await, learns, "{name} listens to {subject}");
            }
            let base = "$JS.API.DIRECT.GET.autodidact_r_base.autodidact.r.base.d.0.0";
            assert!(user.may_publish(base).await, "{name} reads the pretrained model");
            let wanted = format!("autodidact.r.wanted.{name}");
            assert_eq!(user.may_publish(&wanted).await, !learns, "{name} asks for the pretrained model");
            assert!(!user.may_subscribe("autodidact.>").await, "{name} listens to everything");
        }
    });
}
