//! A learner that dies, or whose disk fails, at chosen points; a network that is cut; a queue that is full: the final weights
//! are the same.
//!
//! The learner runs under strace, which makes a system call fail, or sends a signal as it begins: SIGKILL takes effect before
//! the call is made, SIGSTOP when the call has returned and before the learner sees its result.

use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use async_nats::jetstream::stream::State;
use tokio::runtime::Runtime;

use crate::cluster::Cluster;
use crate::runs::{
    Ended, Folder, HASTE, JournalRecord, NUM_STEPS, Process, SEGMENT, journal_records, reference, wait_until,
};

/// The output file of strace, in the folder in which the learner runs.
const CALLS: &str = "calls";

const RESUME: [&str; 3] = ["--resume", "--run-dir", "run"];

/// Without exams every message that comes back is a group, and every group that arrives for the first time is a record.
const WITHOUT_EXAMS: [&str; 2] = ["--set", "exams.names=[]"];

/// Number of tasks of the first batch of `smoke` and of the exam before it.
const NUM_FIRST_TASKS: u64 = 16 + 200;

/// How long the network is cut: several times the lease and the waits of [`HASTE`].
const PARTITION_SECONDS: u64 = 10;

impl Cluster {
    /// Starts a learner under strace, which injects a fault into calls on a file.
    fn traced_learner(&self, file: &str, fault: &str, args: &[&str]) -> Process {
        let calls = self.folder.path(CALLS);
        if calls.exists() {
            std::fs::remove_file(&calls).unwrap();
        }
        let mut command = Command::new("strace");
        // strace is a grandchild (-D), so that the learner is the process that is killed and whose end is seen.
        command.args(["-D", "-f", "-qq", "-o", CALLS]);
        command.args(["-e", "trace=write,fsync,fdatasync,/^rename,/^unlink", "-e", &format!("inject={fault}")]);
        // A call names a file by its descriptor, which has a full path, or by the path that the learner was given.
        command.arg("-P").arg(self.folder.path(file)).args(["-P", file]);
        command.args([env!("CARGO_BIN_EXE_autodidact"), "learner", "--bus", &self.server.url()]).args(args);
        // strace counts calls per thread: with few threads each reaches a count of a few.
        command.env("TOKIO_WORKER_THREADS", "2");
        self.folder.start_command(command)
    }

    fn workers(&self) -> [Process; 2] {
        ["actor", "verifier"].map(|role| self.start(role, &[]))
    }

    /// Resumes the run to its end, which must equal that of an undisturbed one.
    fn ends_as_undisturbed(&self, workers: [Process; 2]) {
        self.start("learner", &RESUME).end().success();
        self.has_ended_as_undisturbed(workers);
    }

    fn has_ended_as_undisturbed(&self, workers: [Process; 2]) {
        self.folder.history().assert_steps_of(&reference(0).history);
        for worker in workers {
            worker.end().success();
        }
        assert!(self.folder.call(&["replay", "run"]).success().stdout.starts_with("replayed 40 steps "));
    }

    fn stream(&self, run: &str, queue: &str) -> State {
        let url = self.server.url();
        let name = format!("autodidact_{run}_{queue}");
        Runtime::new().unwrap().block_on(async {
            let jetstream = async_nats::jetstream::new(async_nats::connect(url).await.unwrap());
            let stream = jetstream.get_stream(&name).await.unwrap();
            stream.cached_info().state.clone()
        })
    }

    /// Counts the groups that the learner has acknowledged, which the server forgets.
    fn num_acknowledged(&self, run: &str) -> usize {
        let State { last_sequence, messages, .. } = self.stream(run, "scored");
        (last_sequence - messages) as usize
    }
}

/// Returns the output of strace: `PID NAME(...) = RESULT`, or `PID --- SIGNAL ---`.
fn calls(folder: &Folder) -> String {
    std::fs::read_to_string(folder.path(CALLS)).unwrap_or_default()
}

fn was_killed(ended: &Ended, folder: &Folder) {
    assert_eq!(ended.status.code(), None, "{ended:#?}");
    // By then strace has written everything that it has seen.
    wait_until("strace to hear of it", || calls(folder).contains("+++ killed by SIGKILL +++"));
}

/// Truncates the journal to the synced bytes, as a power failure may, and counts the groups in it.
fn lose_what_was_not_synced(folder: &Folder, bytes_before: u64) -> usize {
    let (mut written, mut synced) = (bytes_before, bytes_before);
    for call in calls(folder).lines() {
        let Some((name, result)) = call.rsplit_once(" = ") else { continue };
        let Ok(result) = result.parse::<u64>() else { continue };
        if name.contains("write") {
            written += result;
        } else if name.contains("fdatasync") {
            synced = written;
        }
    }
    assert_eq!(written, folder.journal_bytes(), "every write is known: {}", calls(folder));
    OpenOptions::new().write(true).open(folder.path(SEGMENT)).unwrap().set_len(synced).unwrap();
    num_groups(folder)
}

fn records(folder: &Folder) -> Vec<JournalRecord> {
    journal_records(&std::fs::read(folder.path(SEGMENT)).unwrap())
}

fn num_groups(folder: &Folder) -> usize {
    records(folder).iter().filter(|record| record.kind == JournalRecord::GROUP).count()
}

/// The first kill comes before anything is in the journal, the others at the nth sync of a thread of the learner.
#[test]
fn a_learner_killed_before_a_sync_goes_on_with_the_same_weights() {
    let cluster = Cluster::new();
    let workers = cluster.workers();
    for (life, call) in [1, 1, 4, 7].into_iter().enumerate() {
        let bytes_before = cluster.folder.journal_bytes();
        let args = if life == 0 { &["smoke", "--run-dir", "run"][..] } else { &RESUME };
        let fault = format!("fdatasync:signal=KILL:when={call}");
        let ended = cluster.traced_learner(SEGMENT, &fault, args).end();
        was_killed(&ended, &cluster.folder);
        lose_what_was_not_synced(&cluster.folder, bytes_before);
    }
    cluster.ends_as_undisturbed(workers);
}

/// Kills before a row is written, or before rows are synced for a checkpoint: no row is lost, none is there twice.
#[test]
fn a_learner_killed_at_a_row_of_its_metrics_loses_none() {
    let cluster = Cluster::new();
    let workers = cluster.workers();
    let every = ["--set", "local.checkpoint_every=1"];
    let faults = ["write:signal=KILL:when=1", "write:signal=KILL:when=4", "fdatasync:signal=KILL:when=2"];
    for (life, fault) in faults.into_iter().enumerate() {
        let args = if life == 0 { &["smoke", "--run-dir", "run"][..] } else { &RESUME };
        let ended = cluster.traced_learner("run/metrics.jsonl", fault, &[args, &every].concat()).end();
        was_killed(&ended, &cluster.folder);
    }
    cluster.ends_as_undisturbed(workers);
    assert_eq!(cluster.folder.history(), reference(0).history);
}

#[test]
fn a_learner_killed_between_sync_and_acknowledgement_goes_on_with_the_same_weights() {
    let cluster = Cluster::new();
    let args = [&["smoke", "--run-dir", "run"], &WITHOUT_EXAMS[..]].concat();
    let learner = cluster.traced_learner(SEGMENT, "fdatasync:signal=STOP", &args);
    let workers = cluster.workers();
    let mut num_stops = 0;
    loop {
        wait_until("a sync", || {
            let calls = calls(&cluster.folder);
            let (before, stopped) = calls.rsplit_once("--- SIGSTOP {").unwrap_or_default();
            before.matches("--- SIGSTOP {").count() == num_stops && stopped.contains("--- stopped by SIGSTOP ---")
        });
        num_stops += 1;
        let records = records(&cluster.folder);
        let num_steps = records.iter().filter(|record| record.kind == JournalRecord::STEP).count();
        if num_steps >= 3 && records.last().unwrap().kind == JournalRecord::GROUP {
            break;
        }
        learner.thaw();
    }
    let run = Cluster::run_of(&learner);
    let (num_acknowledged, num_groups) = (cluster.num_acknowledged(&run), num_groups(&cluster.folder));
    assert!(num_acknowledged < num_groups, "{num_acknowledged} of {num_groups} acknowledged");
    was_killed(&learner.kill(), &cluster.folder);
    cluster.ends_as_undisturbed(workers);
}

#[test]
fn a_learner_killed_within_a_checkpoint_goes_on_with_the_same_weights() {
    let cluster = Cluster::new();
    let workers = cluster.workers();
    let kill = |call: &str| format!("{call}:signal=KILL:when=1");
    for (file, fault, complete) in [
        ("run/checkpoints/.step_00000010.partial/state.postcard", kill("write"), &[][..]),
        ("run/checkpoints/.step_00000020.partial/COMPLETE", kill("fsync"), &[10]),
        ("run/checkpoints/.step_00000030.partial", kill("/^rename"), &[10, 20]),
        // The name exists, but may not be on the disk.
        ("run/checkpoints", kill("fsync"), &[10, 20, 30]),
    ] {
        let is_first = !cluster.folder.path("run").exists();
        let args = if is_first { &["smoke", "--run-dir", "run"][..] } else { &RESUME };
        let ended = cluster.traced_learner(file, &fault, args).end();
        was_killed(&ended, &cluster.folder);
        assert_eq!(cluster.folder.checkpoints(), complete, "{file}");
    }
    cluster.ends_as_undisturbed(workers);
}

/// Kills between the new segment, the checkpoint, and the removal of the segments that no checkpoint needs any more.
#[test]
fn a_learner_killed_as_it_lets_go_of_its_journal_goes_on_with_the_same_weights() {
    let cluster = Cluster::new();
    let workers = cluster.workers();
    let kill = |call: &str| format!("{call}:signal=KILL:when=1");
    let keep = ["--set", "local.keep_journal=since-checkpoint", "--set", "local.keep_checkpoints=2"];
    let begin = [&["smoke", "--run-dir", "run"], &keep[..]].concat();
    for (file, fault, checkpoints, segments) in [
        // The segment exists and is empty. The resumed learner writes to it, and begins another at the checkpoint.
        ("run/journal/00000001.log", kill("write"), &[][..], 0..=1),
        ("run/journal/00000002.log", kill("fdatasync"), &[], 0..=2),
        ("run/checkpoints/.step_00000010.partial", kill("/^rename"), &[], 0..=3),
        // The first of those that go is gone; the second has nothing to begin with and is passed over.
        ("run/journal/00000001.log", kill("/^unlink"), &[10], 1..=4),
        ("run/checkpoints/.step_00000020.partial", kill("/^rename"), &[10], 1..=5),
        ("run/checkpoints/step_00000010", kill("/^unlink"), &[10, 20, 30], 4..=7),
    ] {
        let is_first = !cluster.folder.path("run").exists();
        let ended = cluster.traced_learner(file, &fault, if is_first { &begin } else { &RESUME }).end();
        was_killed(&ended, &cluster.folder);
        assert_eq!(cluster.folder.checkpoints(), checkpoints, "{file}");
        let left: Vec<u64> = (0..20).filter(|index| segment(&cluster.folder, *index).exists()).collect();
        assert_eq!(left, segments.collect::<Vec<_>>(), "{file}");
    }
    cluster.start("learner", &RESUME).end().success();
    cluster.folder.history().assert_steps_of(&reference(0).history);
    assert_eq!(cluster.folder.history().exams, reference(0).history.exams);
    for worker in workers {
        worker.end().success();
    }
    assert_eq!(cluster.folder.checkpoints(), [30, 40]);
    let replayed = cluster.folder.call(&["replay", "run"]).success().stdout;
    assert!(replayed.contains("from the checkpoint of step 30\nreplayed 10 steps "), "{replayed}");
}

fn segment(folder: &Folder, index: u64) -> PathBuf {
    folder.path(&format!("run/journal/{index:08}.log"))
}

#[test]
fn a_learner_killed_with_its_tasks_out_goes_on_with_the_same_weights() {
    let cluster = Cluster::new();
    let learner = cluster.learner(&[]);
    let run = Cluster::run_of(&learner);
    wait_until("all tasks", || cluster.stream(&run, "task").messages == NUM_FIRST_TASKS);
    assert_eq!(learner.kill().status.code(), None);
    cluster.ends_as_undisturbed(cluster.workers());
}

#[test]
fn a_disk_that_fails_ends_the_learner_before_it_acknowledges() {
    for (fault, says) in [
        ("fdatasync:error=EIO:when=4", "sync run/journal/00000000.log: Input/output error (os error 5)"),
        ("write:error=ENOSPC:when=4", "write run/journal/00000000.log: No space left on device (os error 28)"),
    ] {
        let cluster = Cluster::new();
        let workers = cluster.workers();
        let args = [&["smoke", "--run-dir", "run"], &WITHOUT_EXAMS[..]].concat();
        let ended = cluster.traced_learner(SEGMENT, fault, &args).end();
        assert_eq!(ended.refusal(), says);
        let calls = calls(&cluster.folder);
        assert!(!calls.split_once("(INJECTED)").unwrap().1.contains("fdatasync("), "it ends at once: {calls}");
        let run = ended.printed(" --run ");
        let num_acknowledged = cluster.num_acknowledged(run);
        let num_groups = lose_what_was_not_synced(&cluster.folder, 0);
        assert!(num_acknowledged <= num_groups, "{num_acknowledged} acknowledged, {num_groups} on the disk");
        cluster.ends_as_undisturbed(workers);
    }
}

/// Forwards connections to a server. While the network is cut nothing passes, and neither side is notified.
struct Network {
    address: String,
    state: Arc<AtomicU8>,
}

const WHOLE: u8 = 0;
const CUT: u8 = 1;
const OVER: u8 = 2;

impl Network {
    fn before(server: &str) -> Network {
        let server = server.strip_prefix("nats://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(AtomicU8::new(WHOLE));
        let network = Network { address, state: state.clone() };
        std::thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                if state.load(Ordering::SeqCst) == OVER {
                    return;
                }
                let Ok(server) = TcpStream::connect(&server) else { continue };
                // Data is forwarded at once, and not held back to be sent with later data.
                for end in [&client, &server] {
                    end.set_nodelay(true).unwrap();
                }
                let ends = [(&client, &server), (&server, &client)];
                for (from, to) in ends.map(|(from, to)| (from.try_clone().unwrap(), to.try_clone().unwrap())) {
                    let state = state.clone();
                    std::thread::spawn(move || carry(from, to, &state));
                }
            }
        });
        network
    }

    fn url(&self) -> String {
        format!("nats://{}", self.address)
    }

    /// Cuts the network for `AUTODIDACT_PARTITION_SECONDS`, by default [`PARTITION_SECONDS`].
    fn cut_for_a_while(&self) {
        let seconds = std::env::var("AUTODIDACT_PARTITION_SECONDS");
        let seconds = seconds.map_or(PARTITION_SECONDS, |seconds| seconds.parse().unwrap());
        self.state.store(CUT, Ordering::SeqCst);
        let until = tokio::time::Instant::now() + Duration::from_secs(seconds);
        wait_until("the network to be cut for long enough", || tokio::time::Instant::now() >= until);
        self.state.store(WHOLE, Ordering::SeqCst);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.state.store(OVER, Ordering::SeqCst);
        // Wakes the accepting thread, which then sees that the test is over.
        drop(TcpStream::connect(&self.address));
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, state: &AtomicU8) {
    let mut buffer = [0; 1 << 16];
    loop {
        let size = from.read(&mut buffer).unwrap_or(0);
        while state.load(Ordering::SeqCst) == CUT {
            std::thread::park_timeout(Duration::from_millis(1));
        }
        if size == 0 || to.write_all(&buffer[..size]).is_err() {
            break;
        }
    }
    // Both fail when the other side is gone, which is fine.
    drop(to.shutdown(Shutdown::Both));
    drop(from.shutdown(Shutdown::Both));
}

#[test]
fn a_learner_that_was_cut_off_goes_on() {
    let cluster = Cluster::new();
    let network = Network::before(&cluster.server.url());
    let args = ["learner", "smoke", "--run-dir", "run", "--bus", &network.url()];
    let learner = cluster.folder.start(&[&args[..], &HASTE].concat());
    outlasts_a_cut(&cluster, &network, learner, cluster.workers());
}

#[test]
fn workers_that_were_cut_off_go_on() {
    let cluster = Cluster::new();
    let network = Network::before(&cluster.server.url());
    let learner = cluster.learner(&HASTE);
    let workers = ["actor", "verifier"].map(|role| cluster.folder.start(&[role, "--bus", &network.url()]));
    outlasts_a_cut(&cluster, &network, learner, workers);
}

fn outlasts_a_cut(cluster: &Cluster, network: &Network, mut learner: Process, mut workers: [Process; 2]) {
    wait_until("step 5", || cluster.folder.last_step() >= 5);
    let before = cluster.folder.last_step();
    network.cut_for_a_while();
    let after = cluster.folder.last_step();
    assert!(after <= before + 3 && after < NUM_STEPS, "nothing came through: step {before}, then {after}");
    assert!(learner.is_running() && workers.iter_mut().all(Process::is_running));
    learner.end().success();
    cluster.has_ended_as_undisturbed(workers);
}

/// A process that may publish tasks can fill their queue; the learner then waits.
#[test]
fn a_full_queue_is_waited_for_and_garbage_is_set_aside() {
    let cluster = Cluster::new();
    let learner = cluster.learner(&HASTE);
    let run = Cluster::run_of(&learner);
    let url = cluster.server.url();
    Runtime::new().unwrap().block_on(async {
        let jetstream = async_nats::jetstream::new(async_nats::connect(url).await.unwrap());
        let put =
            async || jetstream.publish(format!("autodidact.{run}.task.garbage"), "garbage".into()).await.unwrap().await;
        while put().await.is_ok() {}
    });
    wait_until("the learner to wait", || learner.said_so_far().contains("still trying to publish a task: "));
    let workers = cluster.workers();
    learner.end().success();
    let says = "unreadable message moved to the dead-letter stream";
    assert!(workers[0].said_so_far().contains(says), "{}", workers[0].said_so_far());
    cluster.has_ended_as_undisturbed(workers);
}
