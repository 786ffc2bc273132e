//! What processes send to a NATS server, what they report about it, and which of its runs they find.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::nats_server::NatsServer;
use crate::runs::{Folder, HASTE, NUM_STEPS, get, metrics_address, reference, wait_until};

/// Roles and commands that need a server, with their other arguments.
const USERS: [&[&str]; 4] = [&["learner", "smoke", "--run-dir", "run"], &["actor"], &["verifier"], &["runs"]];

/// A run that lasts for as long as a test looks at it.
const LONG: [&str; 4] = ["--set", "schedule.num_steps=100000", "--set", "exams.names=[]"];

/// Well under the time for which processes wait for an unreachable server.
const AT_ONCE: Duration = Duration::from_secs(60);

#[test]
fn a_password_is_used_and_never_shown() {
    let server = NatsServer::with_config(
        "jetstream { store_dir: \"store\" }\nauthorization { user: \"u\", password: \"s3cret,/\" }\n",
    );
    let (url, shown) = (server.url_of("u:s3cret%2C%2F"), server.url_of("***"));
    let folder = Folder::new();
    let metrics = ["--metrics", "127.0.0.1:0"];
    let start = |args: &[&str]| folder.start(&[args, &["--bus", &url]].concat());
    let learner = start(&[USERS[0], &metrics, &["--run", "mine"], &LONG].concat());
    let workers = [USERS[1], USERS[2]].map(|role| start(&[role, &metrics].concat()));
    wait_until("step 3", || folder.last_step() >= 3);
    let runs = folder.call(&["runs", "--json", "--bus", &url]).success();
    let served = get(&metrics_address(&learner), "/metrics").1 + &get(&metrics_address(&workers[0]), "/metrics").1;
    learner.interrupt();
    let learner = learner.end().success();
    let said = workers.map(|worker| {
        worker.terminate();
        worker.end().success()
    });
    assert!(said[0].stdout.contains(&format!(": joined run mine on {shown}")), "{said:#?}");
    assert!(learner.stdout.contains(&format!("join with --bus '{shown}' --run mine")), "{learner:#?}");
    let go_on = format!("autodidact learner --bus '{shown}' --run mine --resume --run-dir run");
    assert_eq!(learner.printed("resume with: "), go_on);
    // An address with wrong credentials, and one that is unreachable.
    let wrong = folder.call(&["actor", "--bus", &server.url_of("u:s3cret")]);
    assert!(wrong.refusal().starts_with(&format!("bus: not permitted: {shown}: ")), "{wrong:#?}");
    let away = "nats://u:s3cret@127.0.0.1:1";
    let away = folder.call(&["learner", "smoke", "--run-dir", "x", "--set", "local.stall_seconds=1", "--bus", away]);
    assert!(away.refusal().starts_with("bus: could not connect to nats://***@127.0.0.1:1 within 1 s"), "{away:#?}");
    let all = format!("{learner:?} {said:?} {runs:?} {wrong:?} {away:?} {served}");
    assert!(!all.contains("s3c"), "{all}");
    for (name, bytes) in folder.files() {
        // Weights may well hold three bytes of it.
        assert!(!bytes.windows(6).any(|part| part == b"s3cret"), "{name}");
    }
}

#[test]
fn what_is_mistyped_is_refused_at_once() {
    let folder = Folder::new();
    for user in USERS {
        for (url, says) in [
            ("http://u:s3cret@h", "--bus: bus: server: expected nats://HOST:PORT or tls://HOST:PORT, "),
            ("nats://h:99999", "--bus: bus: server: expected a port from 1 to 65535, got \"nats://h:99999\""),
            ("nats://h,", "--bus: bus: server 2: expected a host name or an IP address, got \"\""),
        ] {
            let began = Instant::now();
            let refused = folder.call(&[user, &["--bus", url]].concat());
            assert!(refused.refusal().starts_with(says) && !refused.stderr.contains("s3c"), "{refused:#?}");
            assert!(began.elapsed() < AT_ONCE);
        }
    }
    assert!(!folder.path("run").exists());
}

#[test]
fn a_server_without_jetstream_is_refused_at_once() {
    let folder = Folder::new();
    let server = NatsServer::with_config("");
    for user in USERS {
        let began = Instant::now();
        let refused = folder.call(&[user, &["--bus", &server.url()]].concat());
        let says = format!("bus: server {}: expected a nats-server with JetStream (", server.url());
        assert!(refused.refusal().starts_with(&says), "{refused:#?}");
        assert!(began.elapsed() < AT_ONCE);
    }
    assert!(!folder.path("run").exists());
}

/// A run whose learner was killed can be removed but not joined; one with a running learner can be joined but not removed.
#[test]
fn a_run_without_a_learner_is_not_joined_and_can_be_removed() {
    let cluster = Cluster::new();
    let url = cluster.server.url();
    let runs = || -> Vec<Value> {
        let ended = cluster.folder.call(&["runs", "--json", "--bus", &url]).success();
        let mut listed: Value = serde_json::from_str(&ended.stdout).unwrap();
        serde_json::from_value(listed["runs"].take()).unwrap()
    };
    assert_eq!(cluster.folder.call(&["runs", "--bus", &url]).success().stdout, "no runs\n");
    let learn = |run: &str| {
        let lease = ["--set", "local.bus.lease_seconds=1.0"];
        cluster.start("learner", &[&["smoke", "--run", run, "--run-dir", run], &lease[..], &LONG].concat())
    };
    let dead = learn("dead");
    wait_until("the first run", || runs().iter().any(|run| run["config"] == "smoke"));
    dead.kill();
    wait_until("its lease to run out", || !runs()[0]["lives"].as_bool().unwrap());
    let actor = cluster.start("actor", &[]);
    let says = "; run dead has no learner: ";
    wait_until("the actor to say what it waits for", || actor.said_so_far().contains(says));
    let alive = learn("alive");
    wait_until("the actor to join", || actor.printed_so_far().contains(": joined run alive on "));
    let _verifier = cluster.start("verifier", &["--run", "alive"]);

    wait_until("a step", || runs()[0]["step"].as_u64().is_some_and(|step| step > 0));
    let listed = runs();
    assert_eq!(listed.iter().map(|run| &run["id"]).collect::<Vec<_>>(), ["alive", "dead"]);
    assert_eq!(listed.iter().map(|run| run["lives"].as_bool().unwrap()).collect::<Vec<_>>(), [true, false]);
    let folder = cluster.folder.path("alive").canonicalize().unwrap();
    assert!(listed[0]["learner"].as_str().unwrap().ends_with(&format!(":{}", folder.display())), "{listed:?}");
    assert!(listed[1]["last_alive_seconds_ago"].as_f64().unwrap() > 1.0 && listed[1]["num_bytes"].as_u64() > Some(0));
    assert_eq!(listed[1]["streams"].as_array().unwrap().len(), 6, "{listed:?}");
    let table = cluster.folder.call(&["runs", "--bus", &url]).success().stdout;
    assert!(table.starts_with("run ") && table.contains("\nalive ") && table.contains(" none: "), "{table}");

    let remove = |id: &str| cluster.folder.call(&["runs", "--bus", &url, "--remove", id]);
    let refused = remove("alive");
    let says = "--remove: expected a run without a learner, got alive: its learner, ";
    assert!(
        refused.refusal().starts_with(says) && refused.refusal().contains("/alive, has led it for "),
        "{refused:#?}"
    );
    let refused = remove("nothing");
    assert!(refused.refusal().ends_with(", which has alive, dead, got \"nothing\""), "{refused:#?}");
    assert!(remove("dead").success().stdout.starts_with("removed run dead: "));
    assert_eq!(runs().iter().map(|run| run["id"].clone()).collect::<Vec<_>>(), ["alive"]);
    for process in [alive, actor] {
        process.terminate();
        process.end().success();
    }
}

/// A learner that was killed resumes at once in its own run directory. In a copy of that directory it is another learner, and
/// is told that the run has a learner.
#[test]
fn a_learner_that_was_killed_has_its_run_back_at_once() {
    let cluster = Cluster::new();
    // Another learner would wait for this lease for longer than the test runs.
    let lease = ["--set", "local.bus.lease_seconds=10000.0"];
    let killed = cluster.learner(&[&["--run", "mine"], &HASTE[..4], &lease].concat());
    let _workers = ["actor", "verifier"].map(|role| cluster.start(role, &[]));
    wait_until("step 3", || cluster.folder.last_step() >= 3);
    killed.kill();
    let copied = std::process::Command::new("cp")
        .args(["-r", "run", "copy"])
        .current_dir(cluster.folder.path("."))
        .status()
        .unwrap();
    assert!(copied.success());
    let resume = |run_dir: &str| cluster.start("learner", &["--run", "mine", "--resume", "--run-dir", run_dir]);
    let copy = resume("copy");
    wait_until("the copy to hear of the learner", || copy.said_so_far().contains("has a learner ("));
    resume("run").end().success();
    cluster.folder.history().assert_steps_of(&reference(0).history);
    let listed = cluster.folder.call(&["runs", "--json", "--bus", &cluster.server.url()]).success();
    let listed: Value = serde_json::from_str(&listed.stdout).unwrap();
    let run = listed["runs"].as_array().unwrap().iter().find(|run| run["id"] == "mine").unwrap();
    assert_eq!((&run["step"], &run["config"], &run["is_over"]), (&NUM_STEPS.into(), &"smoke".into(), &true.into()));
}
