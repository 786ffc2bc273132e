//! A run under faults: processes and the server are killed at random moments, the server's store is wiped, messages are lost,
//! repeated and delayed. The result equals that of an undisturbed run.

#[path = "../../bus/tests/nats_server/mod.rs"]
mod nats_server;
#[path = "../e2e/runs.rs"]
#[allow(dead_code, reason = "other suites use the rest")]
mod runs;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use learner::{JournalReader, Record};
use nats_server::NatsServer;
use proto::{CounterRng, Purpose, TaskId};
use runs::{Files, Folder, HASTE, NUM_STEPS, Process, get, metrics_address, wait_until};
use serde_json::Value;

const NUM_KILLS: u64 = 24;
/// The least number of steps that are left after every kill.
const STEPS_AFTER_KILLS: u64 = 4;
/// The longest wait between a step and the kill that it triggers.
const MAX_PAUSE_MS: u64 = 400;

const LEARNER: [&str; 9] = [
    "--run-dir",
    "run",
    "--json",
    "--set",
    "local.checkpoint_every=3",
    "--set",
    "local.bus.fault={ drop = 0.05, duplicate = 0.05, reorder = 0.1, seed = 1 }",
    "--run",
    "chaos",
];

/// The part of the cluster that is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    Actor(usize),
    Verifier(usize),
    Learner,
    Server,
    /// The server, and everything that it has stored.
    Store,
}

struct Cluster {
    server: NatsServer,
    folder: Folder,
    learner: Option<Process>,
    actors: Vec<Process>,
    verifiers: Vec<Process>,
    /// Redeliveries that workers had counted before they were killed.
    num_redelivered: u64,
}

impl Cluster {
    fn start(config: &[&str]) -> Cluster {
        let (server, folder) = (NatsServer::start(), Folder::holding(&files()));
        let mut cluster =
            Cluster { server, folder, learner: None, actors: Vec::new(), verifiers: Vec::new(), num_redelivered: 0 };
        let learner = [config, &LEARNER, &HASTE].concat();
        cluster.learner = Some(cluster.process("learner", &learner));
        cluster.actors = (0..3).map(|_| cluster.worker("actor")).collect();
        cluster.verifiers = (0..2).map(|_| cluster.worker("verifier")).collect();
        cluster
    }

    fn process(&self, role: &str, args: &[&str]) -> Process {
        self.folder.start(&[&[role, "--bus", &self.server.url()], args].concat())
    }

    fn worker(&self, role: &str) -> Process {
        self.process(role, &["--run", "chaos", "--metrics", "127.0.0.1:0"])
    }

    /// Kills a target with SIGKILL, and starts it again.
    fn kill(&mut self, target: Target) {
        match target {
            Target::Actor(index) => {
                let actor = self.actors.swap_remove(index);
                self.num_redelivered += num_redelivered(&actor);
                actor.kill();
                self.actors.push(self.worker("actor"));
            }
            Target::Verifier(index) => {
                let verifier = self.verifiers.swap_remove(index);
                self.num_redelivered += num_redelivered(&verifier);
                verifier.kill();
                self.verifiers.push(self.worker("verifier"));
            }
            Target::Learner => {
                let ended = self.learner.take().unwrap().kill();
                assert_eq!(ended.status.code(), None, "the kill came too late: {ended:#?}");
                let learner = [&["--resume"], &LEARNER[..], &HASTE].concat();
                self.learner = Some(self.process("learner", &learner));
            }
            Target::Server | Target::Store => {
                self.server.kill();
                if target == Target::Store {
                    self.server.wipe();
                }
                self.server.restart();
            }
        }
    }
}

/// Counts the redelivered messages of a worker, first sent to it or to another. 0 if it serves no metrics yet.
fn num_redelivered(worker: &Process) -> u64 {
    if !worker.printed_so_far().contains("metrics: http") {
        return 0;
    }
    let (_, text) = get(&metrics_address(worker), "/metrics");
    let lines = text.lines().filter(|line| line.starts_with("autodidact_bus_deliveries_total{"));
    let redelivered = lines.filter(|line| line.contains("redelivered=\"true\""));
    redelivered.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

/// Returns the targets of all kills, in random order.
fn targets(salt: u64) -> Vec<Target> {
    let mut targets: Vec<Target> = (0..NUM_KILLS as usize)
        .map(|kill| match kill % 8 {
            0 | 4 => Target::Learner,
            2 => Target::Verifier(kill / 8 % 2),
            6 if kill < 8 => Target::Store,
            6 => Target::Server,
            _ => Target::Actor(kill % 3),
        })
        .collect();
    let mut rng = CounterRng::new(0, Purpose::Fault, salt, 0, 0);
    for last in (1..targets.len()).rev() {
        targets.swap(last, rng.below(last as u64 + 1) as usize);
    }
    targets
}

/// Programs at a lag of 1: problems with keys, which are sent separately from their tasks.
const KEYED: &str = "preset = \"smoke\"\ndomains = [{ name = \"programs-digits\", share = 1.0, levels = [\
                     { level = 2, weight = 1.0 }, { level = 3, weight = 1.0 }, { level = 6, weight = 1.0 }] }]\n\
                     model.max_positions = 72\nbatch.lag = 1\nself_play.bootstrap_steps = 2\nexams.names = []\n";

fn files() -> Files {
    Files::from([("keyed.toml".to_owned(), KEYED.as_bytes().to_vec())])
}

#[test]
fn a_run_under_fire_gives_the_weights_of_one_in_peace() {
    survives("smoke");
}

#[test]
fn a_run_with_keys_under_fire_gives_the_weights_of_one_in_peace() {
    survives("keyed.toml");
}

fn survives(config: &str) {
    let in_peace = Folder::holding(&files());
    let expected = in_peace.call(&["train", config, "--run-dir", "run", "--json"]).success();
    let expected: Value = serde_json::from_str(&expected.stdout).unwrap();
    let mut cluster = Cluster::start(&[config]);
    let mut kills = BTreeMap::<String, u32>::new();
    let salt = config.len() as u64;
    for (kill, target) in targets(salt).into_iter().enumerate() {
        let step = kill as u64 * (NUM_STEPS - STEPS_AFTER_KILLS) / NUM_KILLS;
        let began = cluster.folder.path("run/config.toml");
        wait_until("the moment of a kill", || began.exists() && cluster.folder.last_step() >= step);
        let mut rng = CounterRng::new(0, Purpose::Fault, salt, 1, kill as u64);
        std::thread::park_timeout(Duration::from_millis(rng.below(MAX_PAUSE_MS)));
        cluster.kill(target);
        let name = format!("{target:?}");
        *kills.entry(name.split('(').next().unwrap().to_owned()).or_default() += 1;
    }
    let ended = cluster.learner.take().unwrap().end().success();
    let summary: Value = serde_json::from_str(&ended.stdout).unwrap();
    cluster.folder.history().assert_steps_of(&in_peace.history());
    for key in ["outcome", "step", "weights_digest", "evals", "totals"] {
        assert_eq!(summary[key], expected[key], "{key}");
    }
    let (lost, twice) = count_journal(&cluster.folder);
    println!(
        "{config}: {NUM_KILLS} kills {kills:?}; at least {} redeliveries to workers; by the last learner alone {} \
         re-issues, {} duplicates; {lost} tasks lost, {twice} trained on twice",
        cluster.num_redelivered, summary["num_reissued"], summary["num_duplicates"]
    );
    assert_eq!((lost, twice), (0, 0));
    for worker in cluster.actors.drain(..).chain(cluster.verifiers.drain(..)) {
        worker.end().success();
    }
}

/// Counts the tasks of folded batches that the journal lacks, and the groups and steps that it has twice.
fn count_journal(folder: &Folder) -> (usize, usize) {
    let mut reader = JournalReader::open(&folder.path("run/journal")).unwrap();
    let (mut groups, mut steps, mut twice) = (BTreeSet::<TaskId>::new(), BTreeMap::new(), 0);
    while let Some(record) = reader.next().unwrap() {
        match record.unwrap() {
            Record::Group(group) => twice += usize::from(!groups.insert(group.scored.group.task.id)),
            Record::Step(step) => twice += usize::from(steps.insert(step.step, step.groups.len()).is_some()),
            _ => {}
        }
    }
    let folded: usize = steps.values().sum();
    assert_eq!(steps.len() as u64, NUM_STEPS);
    (folded.saturating_sub(groups.len()), twice)
}
