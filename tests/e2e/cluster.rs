//! Learner, actors and verifiers as processes, connected by a NATS server: the same weights as one process.

use std::time::Duration;

use futures_util::TryStreamExt as _;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::time::Instant;

use crate::nats_server::NatsServer;
use crate::runs::{Folder, HASTE, History, NUM_STEPS, Process, get, metrics_address, reference, value, wait_until};

/// A server and a folder to run processes in.
pub(crate) struct Cluster {
    pub(crate) server: NatsServer,
    pub(crate) folder: Folder,
}

impl Cluster {
    pub(crate) fn new() -> Cluster {
        Cluster { server: NatsServer::start(), folder: Folder::new() }
    }

    pub(crate) fn start(&self, role: &str, args: &[&str]) -> Process {
        let url = self.server.url();
        self.folder.start(&[&[role, "--bus", &url], args].concat())
    }

    pub(crate) fn learner(&self, args: &[&str]) -> Process {
        self.start("learner", &[&["smoke", "--run-dir", "run"], args].concat())
    }

    /// Waits for a learner to print the name of its run and of the run's streams.
    pub(crate) fn run_of(learner: &Process) -> String {
        wait_until("the run's name", || learner.printed_so_far().contains(" --run "));
        let printed = learner.printed_so_far();
        let line = printed.lines().find(|line| line.contains("; actors and verifiers join with ")).unwrap();
        line.strip_prefix("run ").unwrap().split(';').next().unwrap().to_owned()
    }
}

/// A server whose processes have keys, with three actors and a verifier.
pub(crate) struct Guarded {
    pub(crate) folder: Folder,
    pub(crate) server: NatsServer,
}

impl Guarded {
    pub(crate) fn new() -> Guarded {
        let folder = Folder::new();
        folder.call(&["keys", "init", "keys", "--actors", "3", "--verifiers", "1"]).success();
        Guarded { server: NatsServer::with_keys(&folder.path("keys")), folder }
    }

    /// Starts a process with the key of this name.
    pub(crate) fn start(&self, name: &str, args: &[&str]) -> Process {
        let (role, nkey) = (name.split('-').next().unwrap(), format!("keys/{name}.nk"));
        let meets = ["--bus", &self.server.url(), "--nkey", &nkey, "--tls-ca", "keys/ca.pem"];
        self.folder.start(&[&[role], args, &meets[..]].concat())
    }

    pub(crate) fn learner(&self, args: &[&str]) -> Process {
        self.start("learner", &[&["--run-dir", "run"], &HASTE[..], args].concat())
    }
}

#[test]
fn one_of_each_gives_the_weights_of_one_process() {
    for lag in [0, 1] {
        let cluster = Cluster::new();
        let learner = cluster.learner(&["--json", "--set", &format!("batch.lag={lag}")]);
        let workers = ["actor", "verifier"].map(|role| cluster.start(role, &[]));
        let ended = learner.end().success();
        assert_eq!(ended.stderr, "", "nothing to warn of");
        let summary: Value = serde_json::from_str(&ended.stdout).unwrap();
        for key in ["outcome", "step", "weights_digest", "control", "evals", "totals"] {
            assert_eq!(summary[key], reference(lag).summary[key], "{key}");
        }
        cluster.folder.history().assert_steps_of(&reference(lag).history);
        assert_eq!(cluster.folder.history().exams, reference(lag).history.exams);
        for worker in workers {
            let ended = worker.end().success();
            assert!(ended.stdout.contains(" is over\n"), "a worker ends with its run: {ended:#?}");
        }
        let streams = async {
            let client = async_nats::connect(cluster.server.url()).await.unwrap();
            async_nats::jetstream::new(client).stream_names().try_collect::<Vec<String>>().await.unwrap()
        };
        assert_eq!(Runtime::new().unwrap().block_on(streams), ["KV_autodidact_runs"]);
    }
}

/// Workers with different settings; the actors start before the learner.
#[test]
fn many_workers_give_the_weights_of_one_process() {
    let cluster = Cluster::new();
    let actors = [["1", "7"], ["2", "16"], ["1", "512"]]
        .map(|[threads, slots]| cluster.start("actor", &["--threads", threads, "--slots", slots]));
    wait_until("an actor to say what it waits for", || {
        actors[0].said_so_far().contains("waiting for a learner to announce a run on nats://127.0.0.1:")
    });
    let learner = cluster.learner(&[]);
    let verifiers = ["first", "second"].map(|name| cluster.start("verifier", &["--name", name]));
    learner.end().success();
    cluster.folder.history().assert_steps_of(&reference(0).history);
    let verified = verifiers.map(|verifier| verifier.end().success().stdout);
    assert!(verified[0].starts_with("first: joined run "), "{verified:?}");
    for (actor, verified) in actors.into_iter().zip(verified.iter().cycle()) {
        let played = actor.end().success().stdout;
        assert!(
            !played.contains(": 0 groups") && !verified.contains(": 0 groups"),
            "all have a part: {played}{verified}"
        );
    }
}

/// The unfinished tasks of an actor that is told to end go to another actor, without waiting for a timeout.
#[test]
fn a_worker_that_is_told_to_end_hands_back_what_it_has() {
    let cluster = Cluster::new();
    // No timeout sends anything again before the test would have failed.
    let waits = ["--set", "local.bus.ack_wait_seconds=1000.0", "--set", "local.bus.reissue_seconds=1000.0"];
    let learner = cluster.learner(&waits);
    let verifier = cluster.start("verifier", &[]);
    for steps in [5, 10, 15] {
        let actor = cluster.start("actor", &[]);
        wait_until("steps", || cluster.folder.last_step() >= steps);
        let told = Instant::now();
        actor.terminate();
        let ended = actor.end().success();
        assert!(told.elapsed() < Duration::from_secs(10));
        assert!(ended.stderr.contains("stopping: returning unfinished work"), "{ended:#?}");
    }
    let _actor = cluster.start("actor", &[]);
    wait_until("steps", || cluster.folder.last_step() >= 20);
    verifier.terminate();
    verifier.end().success();
    let _verifier = cluster.start("verifier", &[]);
    learner.end().success();
    cluster.folder.history().assert_steps_of(&reference(0).history);
}

#[test]
fn a_learner_that_stops_goes_on_by_the_command_that_it_prints() {
    let cluster = Cluster::new();
    let learner = cluster.learner(&["--run", "mine"]);
    let workers = ["actor", "verifier"].map(|role| cluster.start(role, &["--run", "mine"]));
    wait_until("step 5", || cluster.folder.last_step() >= 5);
    learner.interrupt();
    let ended = learner.end().success();
    assert!(cluster.folder.last_step() < NUM_STEPS, "{ended:#?}");
    let command = ended.printed("resume with: ");
    assert_eq!(command, format!("autodidact learner --bus {} --run mine --resume --run-dir run", cluster.server.url()));
    cluster.folder.call_printed(command).success();
    cluster.folder.history().assert_steps_of(&reference(0).history);
    for worker in workers {
        worker.end().success();
    }
}

#[test]
fn a_second_learner_is_refused_and_the_first_is_unharmed() {
    let cluster = Cluster::new();
    let first = cluster.learner(&HASTE);
    wait_until("the first to lead", || cluster.folder.path("run/config.toml").exists());
    let second = cluster.start("learner", &["smoke", "--run-dir", "other"]).end();
    let folder = cluster.folder.path("run").canonicalize().unwrap();
    let says = format!(":{}); a run can have only one learner at a time", folder.display());
    let refusal = second.stderr.lines().last().unwrap();
    assert!(!second.status.success() && refusal.starts_with("error: ") && refusal.ends_with(&says), "{second:#?}");
    assert!(!cluster.folder.path("other").exists(), "nothing is left of it");
    let same_folder = cluster.start("learner", &["--resume", "--run-dir", "run"]).end();
    assert!(same_folder.refusal().contains("expected no other learner in this run directory"), "{same_folder:#?}");
    let _workers = ["actor", "verifier"].map(|role| cluster.start(role, &[]));
    first.end().success();
    cluster.folder.history().assert_steps_of(&reference(0).history);
}

/// A learner that hung until another took its run finds that out before it does harm.
#[test]
fn a_learner_that_was_overtaken_ends() {
    let cluster = Cluster::new();
    let first = cluster.learner(&HASTE);
    let _workers = ["actor", "verifier"].map(|role| cluster.start(role, &[]));
    wait_until("step 3", || cluster.folder.last_step() >= 3);
    first.freeze();
    let second = cluster.start("learner", &[&["smoke", "--run-dir", "other"], &HASTE[..]].concat());
    wait_until("the second to lead", || cluster.folder.path("other/config.toml").exists());
    first.thaw();
    let overtaken = first.end();
    let refusal = overtaken.stderr.lines().last().unwrap();
    assert!(!overtaken.status.success() && refusal.starts_with("error: bus: run "), "{overtaken:#?}");
    assert!(refusal.ends_with("/other); a run can have only one learner at a time"), "{overtaken:#?}");
    second.end().success();
    History::read(&cluster.folder.path("other")).assert_steps_of(&reference(0).history);
}

#[test]
fn what_cannot_meet_is_told_why() {
    let folder = Folder::new();
    let learner = ["learner", "smoke", "--run-dir", "run", "--set", "local.stall_seconds=1"];
    // Nothing listens on the port of a closed socket.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("nats://127.0.0.1:{port}");
    let alone = folder.call(&[&learner[..], &["--bus", &url]].concat());
    let refusal = alone.refusal();
    assert!(refusal.starts_with(&format!("bus: could not connect to {url} within 1 s: ")), "{refusal}");
    assert!(!folder.path("run").exists(), "nothing is left of it");
    let server = NatsServer::start();
    for (args, says) in [
        (&["learner", "smoke", "--run", "a.b"][..], "--run: bus: name: expected 1 to 64 letters, digits, - and _, got"),
        (&["actor", "--name", "a b"], "--name: bus: name: expected 1 to 64 letters, digits, - and _, got \"a b\""),
        (&["verifier", "--run", "a*"], "--run: bus: name: expected 1 to 64 letters, digits, - and _, got \"a*\""),
        (&["learner", "smoke", "--set", "local.bus.lease_seconds=0"], "lease_seconds: expected 0.1 to 86400, got 0"),
        (&["learner", "smoke", "--set", "local.bus.fault={drop=0.5,duplicate=0.5}"], "missing field `reorder`"),
    ] {
        let refused = folder.call(&[args, &["--bus", &server.url()]].concat());
        assert!(refused.refusal().contains(says), "{says}: {refused:#?}");
    }
    let runs = ["one", "two"]
        .map(|run| folder.start(&["learner", "smoke", "--bus", &server.url(), "--run", run, "--run-dir", run]));
    wait_until("two runs", || ["one", "two"].iter().all(|run| folder.path(run).join("config.toml").exists()));
    let refused = folder.call(&["actor", "--bus", &server.url()]);
    let says = format!("--run: expected one of the runs with a learner on {}: one (its learner, ", server.url());
    assert!(
        refused.refusal().starts_with(&says) && refused.refusal().contains("), two (its learner, "),
        "{refused:#?}"
    );
    drop(runs);
}

/// When nothing arrives, the log and `/readyz` name the outstanding tasks and who has them, and in the end the run ends.
#[test]
fn a_stall_names_what_is_waited_for() {
    let cluster = Cluster::new();
    let metrics = ["--metrics", "127.0.0.1:0", "--set", "local.stall_seconds=6"];
    let learner = cluster.learner(&[&metrics[..], &HASTE].concat());
    let verifier = cluster.start("verifier", &[]);
    let actor = cluster.start("actor", &[]);
    wait_until("step 3", || cluster.folder.last_step() >= 3);
    actor.freeze();
    let says =
        |text: &str| text.contains(" tasks are outstanding: ") && text.contains("; ") && text.contains(" 1 verifier ");
    wait_until("the learner to say what it waits for", || says(&learner.said_so_far()));
    let address = &metrics_address(&learner);
    let (status, body) = get(address, "/readyz");
    assert!(status == 503 && says(&body), "{status} {body}");
    let (_, body) = get(address, "/metrics");
    assert!(body.contains("autodidact_learner_waiting_seconds{kind="), "{body}");
    let ended = learner.end();
    let refusal = ended.stderr.lines().last().unwrap();
    assert!(
        !ended.status.success() && refusal.starts_with("error: stalled: no progress for 6 s at step "),
        "{ended:#?}"
    );
    assert!(refusal.contains(" 1 verifier ") && says(refusal), "{ended:#?}");
    // The run can be resumed: nothing is lost.
    let resumed = cluster.start("learner", &[&["--resume", "--run-dir", "run"], &HASTE[..]].concat());
    actor.thaw();
    resumed.end().success();
    cluster.folder.history().assert_steps_of(&reference(0).history);
    drop(verifier);
}

/// Weights that do not match their digest are refused, and the learner stores the right ones again.
#[test]
fn weights_that_were_changed_are_refused_and_come_again() {
    let cluster = Cluster::new();
    let learner = cluster.learner(&HASTE);
    let verifier = cluster.start("verifier", &[]);
    let run = Cluster::run_of(&learner);
    let [tasks, weights] = ["task", "weights"].map(|queue| format!("autodidact_{run}_{queue}"));
    let runtime = Runtime::new().unwrap();
    let jetstream = runtime
        .block_on(async { async_nats::jetstream::new(async_nats::connect(cluster.server.url()).await.unwrap()) });
    let num_tasks = async || {
        let mut stream = jetstream.get_stream(&tasks).await.ok()?;
        Some(stream.info().await.ok()?.state.messages)
    };
    // No actor is running yet: the first version, which is stored before its tasks, stays.
    wait_until("tasks", || runtime.block_on(num_tasks()).is_some_and(|count| count > 0));
    // An actor sees the changed weights before the learner restores them.
    learner.freeze();
    let digest = runtime.block_on(async {
        let stream = jetstream.get_stream(&weights).await.unwrap();
        let piece = stream.get_last_raw_message_by_subject(&format!("autodidact.{run}.weights.*.0")).await.unwrap();
        let mut bytes = piece.payload.to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        jetstream.publish(piece.subject.clone(), bytes.into()).await.unwrap().await.unwrap();
        piece.subject.split('.').nth(3).unwrap().to_owned()
    });
    let actor = cluster.start("actor", &["--metrics", "127.0.0.1:0"]);
    wait_until("the actor to refuse them", || actor.said_so_far().contains(&digest[..12]));
    let (_, body) = get(&metrics_address(&actor), "/metrics");
    assert!(value(&body, "autodidact_weights_refused_total") >= 1.0, "{body}");
    learner.thaw();
    learner.end().success();
    cluster.folder.history().assert_steps_of(&reference(0).history);
    for worker in [actor, verifier] {
        worker.end().success();
    }
}

#[test]
fn workers_end_when_they_are_told_also_without_a_server() {
    let mut cluster = Cluster::new();
    let learner = cluster.learner(&["--set", "schedule.num_steps=100000", "--set", "exams.names=[]"]);
    let workers = ["actor", "actor", "verifier"].map(|role| cluster.start(role, &[]));
    wait_until("step 10", || cluster.folder.last_step() >= 10);
    cluster.server.kill();
    // Long enough for all processes to be waiting for the server.
    std::thread::park_timeout(Duration::from_secs(2));
    let told = Instant::now();
    for process in workers.iter().chain([&learner]) {
        process.terminate();
    }
    for worker in workers {
        worker.end().success();
    }
    let ended = learner.end().success();
    assert!(told.elapsed() < Duration::from_secs(10), "{:?}", told.elapsed());
    assert!(ended.stdout.contains("; resume with: autodidact learner --bus "), "{ended:#?}");
}

/// A learner that may not resume a run does not disturb the run's workers.
#[test]
fn a_refused_learner_changes_nothing() {
    let cluster = Cluster::new();
    let learner = cluster.learner(&["--run", "mine"]);
    let workers = ["actor", "verifier"].map(|role| cluster.start(role, &[]));
    wait_until("step 5", || cluster.folder.last_step() >= 5);
    learner.interrupt();
    learner.end().success();
    let resume = ["--run", "mine", "--resume", "--run-dir", "run"];
    let other = [&resume[..], &["--set", "learner.learning_rate=0.1"]].concat();
    let refused = cluster.start("learner", &other).end();
    assert!(refused.refusal().starts_with("manifest: learner.learning_rate was 0.004, is 0.1; "), "{refused:#?}");
    cluster.start("learner", &resume).end().success();
    cluster.folder.history().assert_steps_of(&reference(0).history);
    for worker in workers {
        worker.end().success();
    }
}

/// Workers do not serve a run that has the same name but computes something else, even before they know.
#[test]
fn a_run_that_takes_another_course_is_not_served_by_workers_of_the_first() {
    let cluster = Cluster::new();
    let first = cluster.learner(&["--run", "mine"]);
    let workers = ["actor", "verifier"].map(|role| cluster.start(role, &["--run", "mine"]));
    wait_until("step 5", || cluster.folder.last_step() >= 5);
    first.interrupt();
    first.end().success();
    let _second = cluster.start("learner", &["smoke", "--run", "mine", "--run-dir", "other", "--seed", "5"]);
    for worker in workers {
        let ended = worker.end();
        assert!(!ended.status.success(), "{ended:#?}");
        let refusal = ended.stderr.lines().last().unwrap();
        assert!(refusal.starts_with("error: run mine: config: the run needs "), "{ended:#?}");
    }
    assert!(
        !cluster.folder.path("other/metrics.jsonl").exists()
            || History::read(&cluster.folder.path("other")).steps.is_empty()
    );
}
