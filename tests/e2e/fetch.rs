//! Workers that lack the pretrained model of their run: they fetch it from the learner over the bus, once.

use std::process::Command;

use tokio::runtime::Runtime;

use crate::bad_input::refused;
use crate::cluster::{Cluster, Guarded};
use crate::nats_server::NatsServer;
use crate::pretrained_run::{TRAIN, trained, write_model, write_tiny};
use crate::runs::{Ended, Folder, HASTE, Process, wait_until};

/// Where the learner has the model: a place that every process looks for in its own folder, as if it had a machine to itself.
const PLACE: &str = "/proc/self/cwd/model";

/// A machine with a cache of its own, without the learner's model.
pub(crate) struct Elsewhere(Folder);

impl Elsewhere {
    pub(crate) fn new() -> Elsewhere {
        Elsewhere(Folder::new())
    }

    pub(crate) fn start(&self, cluster: &Cluster, role: &str, args: &[&str]) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_autodidact"));
        command.args([role, "--bus", &cluster.server.url()]).args(args);
        command.env("AUTODIDACT_CACHE", self.0.path("cache"));
        self.0.start_command(command)
    }

    /// Writes what a worker that was killed may have left of a file.
    fn left(&self, digest: &str, name: &str, bytes: &[u8]) {
        let folder = self.0.path(&format!("cache/models/by-digest/{digest}.part"));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(name), bytes).unwrap();
    }

    /// Lists what is in its cache of fetched models, in order.
    fn cached(&self) -> Vec<String> {
        let entries = self.0.path("cache/models/by-digest").read_dir().into_iter().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn start_learner(cluster: &Cluster, args: &[&str]) -> Process {
    write_tiny(&cluster.folder, PLACE);
    cluster.start("learner", &[&TRAIN[1..], &HASTE[..], args].concat())
}

pub(crate) fn has_joined(worker: &Process) -> bool {
    worker.printed_so_far().contains(": joined run ")
}

fn count(processes: &[&Process], says: &str) -> usize {
    processes.iter().map(|process| process.said_so_far().matches(says).count()).sum()
}

/// Kills a worker and the learner, too.
#[test]
fn workers_without_the_model_fetch_it_once() {
    let expected = trained(TRAIN, &[]);
    let cluster = Cluster::new();
    let learner = start_learner(&cluster, &["--set", "local.checkpoint_every=2"]);
    // Without a verifier the run waits.
    let machine = Elsewhere::new();
    let [killed, actor, verifier] = ["actor", "actor", "verifier"].map(|role| machine.start(&cluster, role, &[]));
    wait_until("the verifier to join", || has_joined(&verifier));
    verifier.freeze();
    wait_until("the actors to join", || [&killed, &actor].into_iter().all(has_joined));
    assert_eq!(count(&[&killed, &actor, &verifier], "fetched the pretrained model "), 1, "one for the machine");
    assert_eq!(count(&[&learner], "stored the pretrained model "), 1);
    let [digest, lock] = machine.cached().try_into().unwrap();
    assert_eq!(lock, format!("{digest}.LOCK"));

    // Workers were killed here while they fetched it: one has a part of it, the other something else. A third finds a damaged one.
    let tensors = std::fs::read(cluster.folder.path("model/model.safetensors")).unwrap();
    let others = [Elsewhere::new(), Elsewhere::new(), Elsewhere::new()];
    others[0].left(&digest, "model.safetensors", &tensors[..tensors.len() / 2]);
    others[1].left(&digest, "model.safetensors", &vec![7; tensors.len()]);
    others[1].left(&digest, "other.json", b"{}");
    std::fs::create_dir_all(others[2].0.path("cache/models/by-digest").join(&digest)).unwrap();
    // It has another model where the learner has this one.
    write_model(&others[2].0.path("model"), 1);
    let late: Vec<Process> = others.iter().map(|machine| machine.start(&cluster, "actor", &[])).collect();
    wait_until("the other machines' actors to join", || late.iter().all(has_joined));
    let says = |number: usize, text: &str| late[number].said_so_far().contains(text);
    assert!(!says(0, "starting over"), "{}", late[0].said_so_far());
    assert!(says(1, "the earlier part of the pretrained model is damaged, starting over"), "{}", late[1].said_so_far());
    assert!(says(2, "the pretrained model in the cache is damaged"), "{}", late[2].said_so_far());
    assert!(says(2, "/model: expected the pretrained model of run ") && says(2, "; it is left alone"));
    for machine in &others {
        assert_eq!(machine.cached(), [digest.clone(), lock.clone()]);
    }
    assert_eq!(count(&[&learner], "stored the pretrained model "), 1, "once for all of them");

    verifier.thaw();
    wait_until("step 3", || cluster.folder.last_step() >= 3);
    killed.kill();
    learner.kill();
    verifier.freeze();
    let stopped_at = cluster.folder.last_step();
    assert!(stopped_at < expected.steps.len() as u64, "the kill finds the process alive");
    let resumed = cluster.start("learner", &[&["--resume", "--run-dir", "run"], &HASTE[..]].concat());
    let last = Elsewhere::new();
    let last_actor = last.start(&cluster, "actor", &[]);
    wait_until("the last actor to join", || has_joined(&last_actor));
    verifier.thaw();
    let ended = resumed.end().success();
    assert!(!ended.stderr.contains("stored the pretrained model "), "the server still has it: {ended:#?}");
    cluster.folder.history().assert_steps_of(&expected);
    for worker in [actor, verifier, last_actor].into_iter().chain(late) {
        worker.end().success();
    }
}

/// Returns the stream of the pretrained model of the only run.
async fn stored_models(cluster: &Cluster) -> async_nats::jetstream::stream::Stream {
    let jetstream = async_nats::jetstream::new(async_nats::connect(cluster.server.url()).await.unwrap());
    let names: Vec<String> = futures_util::TryStreamExt::try_collect(jetstream.stream_names()).await.unwrap();
    jetstream.get_stream(names.iter().find(|name| name.ends_with("_base")).unwrap()).await.unwrap()
}

#[test]
fn a_model_that_cannot_be_fetched_is_one_clear_message() {
    let last_line = |ended: &Ended| ended.stderr.lines().last().unwrap_or_default().to_owned();
    let cluster = Cluster::new();
    let learner = start_learner(&cluster, &["--run", "mine"]);
    let run = Cluster::run_of(&learner);
    // A model that is named explicitly must be the right one.
    let machine = Elsewhere::new();
    write_model(&machine.0.path("mine"), 1);
    let ended = machine.start(&cluster, "actor", &["--base", "mine"]).end();
    let refusal = ended.refusal();
    assert!(refusal.contains("; --base says where its pretrained model is: "), "{ended:#?}");
    assert!(refusal.contains(": expected a model with digest "), "{ended:#?}");
    let actor = machine.start(&cluster, "actor", &[]);
    wait_until("the actor to join", || has_joined(&actor));

    // The second file is the weights. The server loses a piece of it: the learner stores it again.
    let weights = "autodidact.*.base.*.1.0";
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let stream = stored_models(&cluster).await;
        let piece = stream.get_last_raw_message_by_subject(weights).await.unwrap();
        assert!(stream.delete_message(piece.sequence).await.unwrap());
    });
    let later = Elsewhere::new();
    let late_actor = later.start(&cluster, "actor", &[]);
    wait_until("the actor that lacks a piece to join", || has_joined(&late_actor));
    // What is on the server is changed.
    runtime.block_on(async {
        let stream = stored_models(&cluster).await;
        let piece = stream.get_last_raw_message_by_subject(weights).await.unwrap();
        let mut bytes = piece.payload.to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        let jetstream = async_nats::jetstream::new(async_nats::connect(cluster.server.url()).await.unwrap());
        jetstream.publish(piece.subject.clone(), bytes.into()).await.unwrap().await.unwrap();
    });
    let other = Elsewhere::new();
    let ended = other.start(&cluster, "actor", &[]).end();
    let refusal = last_line(&ended);
    let says = format!("error: fetch the pretrained model of run {run} over the bus: ");
    assert!(refusal.starts_with(&says) && refusal.contains(": expected a model with digest "), "{ended:#?}");
    assert_eq!(other.cached().len(), 1, "the lock alone: {:?}", other.cached());
    // A disk without a place for it.
    std::fs::write(other.0.path("file"), "mine").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_autodidact"));
    command.args(["verifier", "--bus", &cluster.server.url()]).env("AUTODIDACT_CACHE", "file");
    let ended = other.0.start_command(command).end();
    assert!(ended.refusal().starts_with("create file/models/by-digest (AUTODIDACT_CACHE names another"), "{ended:#?}");

    // The learner lacks a file, and goes away.
    let cluster = Cluster::new();
    let learner = start_learner(&cluster, &["--run", "gone"]);
    wait_until("the learner to have read the model", || cluster.folder.journal_bytes() > 0);
    std::fs::remove_file(cluster.folder.path("model/config.json")).unwrap();
    let machine = Elsewhere::new();
    let waiting = machine.start(&cluster, "actor", &[]);
    let says = "waiting for the learner of run gone to send it (--base says where it lies)";
    wait_until("the actor to say what it waits for", || waiting.said_so_far().contains(says));
    let says = "model/config.json: expected a readable file of the pretrained model, got No such file";
    wait_until("the learner to say what it lacks", || learner.said_so_far().contains(says));
    learner.kill();
    let remove = || cluster.folder.call(&["runs", "--bus", &cluster.server.url(), "--remove", "gone"]);
    wait_until("the lease to run out", || remove().status.success());
    let ended = waiting.end();
    assert!(!ended.status.success(), "{ended:#?}");
    let says = "error: run gone was removed, and its pretrained model is not on this machine";
    assert_eq!(last_line(&ended), says, "{ended:#?}");
}

#[test]
fn keys_permit_workers_to_fetch_the_model() {
    let cluster = Guarded::new();
    write_tiny(&cluster.folder, PLACE);
    let learner = cluster.learner(&["tiny.toml"]);
    let machines = ["actor-0", "actor-1", "verifier-0"].map(|name| (name, Elsewhere::new()));
    let workers = machines.each_ref().map(|(name, machine)| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_autodidact"));
        command.args([name.split('-').next().unwrap(), "--bus", &cluster.server.url()]);
        let key = |file: &str| cluster.folder.path("keys").join(file);
        command.arg("--nkey").arg(key(&format!("{name}.nk"))).arg("--tls-ca").arg(key("ca.pem"));
        command.env("AUTODIDACT_CACHE", machine.0.path("cache"));
        machine.0.start_command(command)
    });
    learner.end().success();
    cluster.folder.history().assert_steps_of(&trained(TRAIN, &[]));
    for worker in workers {
        let ended = worker.end().success();
        assert!(ended.stderr.contains("fetched the pretrained model ") && !ended.stderr.contains("ermi"), "{ended:#?}");
    }
}

/// Room for the weights and the model is reserved when the learner starts, not found to be missing when a worker asks.
#[test]
fn a_server_without_room_for_the_model_is_refused() {
    // It has room for the messages that are set aside, and for little more.
    let server = NatsServer::with_config("jetstream { store_dir: \"store\", max_file_store: 67400000 }");
    let folder = Folder::new();
    write_tiny(&folder, PLACE);
    let url = server.url();
    let learner = [&["learner"], &TRAIN[1..], &["--bus", &url]].concat();
    refused(&folder, &learner, &["a run needs ", " bytes of the server's store: raise max_file_store"]);
    assert!(!folder.path("run").exists(), "nothing is left of it");
    let runs = folder.call(&["runs", "--bus", &url]).success();
    assert_eq!(runs.stdout, "no runs\n", "no stream is left of it");
}
