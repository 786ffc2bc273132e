//! Checks that the metrics that Prometheus reads agree with the run's own records.

use std::io::Write as _;
use std::net::TcpStream;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::cluster::Cluster;
use crate::nats_server::{NatsServer, tool};
use crate::runs::{Folder, HASTE, Process, get, metrics_address, value, wait_until};

#[test]
fn a_scrape_is_the_run_at_a_step() {
    let folder = Folder::new();
    let steps = "schedule.num_steps=100000";
    let process = folder.start(&["train", "smoke", "--run-dir", "run", "--metrics", "127.0.0.1:0", "--set", steps]);
    let address = metrics_address(&process);
    assert_eq!(get(&address, "/healthz"), (200, "ok\n".to_owned()));
    wait_until("step 22", || folder.last_step() >= 22);
    assert_eq!(get(&address, "/readyz"), (200, "ok\n".to_owned()));
    assert_eq!(get(&address, "/nothing").0, 404);
    let (status, text) = get(&address, "/metrics");
    assert_eq!(status, 200);

    let step = value(&text, "autodidact_learner_step") as u64;
    let rows = std::fs::read_to_string(folder.path("run/metrics.jsonl")).unwrap();
    let rows: Vec<Value> = rows.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let row = rows.iter().find(|row| row.get("exam").is_none() && row["step"] == step).unwrap();
    for (name, key) in [
        ("autodidact_learner_loss", "loss"),
        ("autodidact_learner_grad_norm", "grad_norm"),
        ("autodidact_learner_learning_rate", "learning_rate"),
        ("autodidact_policy_entropy_nats", "entropy"),
        ("autodidact_logprob_mismatch_nats", "logprob_mismatch"),
        ("autodidact_trained_tokens_total", "num_trained_tokens"),
    ] {
        // JSON numbers are read to within a bit or two.
        let (got, expected) = (value(&text, name), row[key].as_f64().unwrap());
        assert!((got - expected).abs() <= 1e-12 * expected.abs(), "{name}: expected {expected}, got {got}");
    }
    let upto: Vec<&Value> = rows.iter().filter(|row| row["step"].as_u64() <= Some(step)).collect();
    let sum = |key: &str| upto.iter().filter_map(|row| row[key].as_f64()).sum::<f64>();
    assert!((value(&text, "autodidact_learner_train_seconds_total") - sum("trained_s")).abs() < 1e-6);
    assert!((value(&text, "autodidact_learner_wait_seconds_total") - sum("waited_s")).abs() < 1e-6);
    let of_family =
        |at: usize| upto.iter().filter_map(|row| row["solved_by_family"]["countdown/2"][at].as_u64()).sum::<u64>();
    assert_eq!(value(&text, "autodidact_rollouts_solved_total{family=\"countdown/2\"}") as u64, of_family(0));
    assert_eq!(value(&text, "autodidact_rollouts_folded_total{family=\"countdown/2\"}") as u64, of_family(1));
    let exam = upto.iter().rfind(|row| row.get("exam").is_some()).unwrap();
    let share = exam["num_correct"].as_f64().unwrap() / exam["num_problems"].as_f64().unwrap();
    assert_eq!(value(&text, "autodidact_exam_solved_ratio{exam=\"countdown-3\"}"), share);
    let journal_bytes = value(&text, "autodidact_journal_bytes") as u64;
    assert!(0 < journal_bytes && journal_bytes <= folder.journal_bytes());

    let other = Folder::new();
    let refused = other.call(&["train", "smoke", "--run-dir", "run", "--metrics", &address]);
    let says =
        format!("--metrics: expected a free address, such as 127.0.0.1:9100, got {address}: Address already in use");
    assert!(refused.refusal().starts_with(&says), "{refused:#?}");
    assert!(other.files().is_empty(), "the run did not start");
    process.interrupt();
    process.end().success();
}

/// Metrics that describe the last step, with the keys of its row that have their values.
const OF_A_STEP: [(&str, &str); 4] = [
    ("autodidact_learner_loss", "loss"),
    ("autodidact_learner_grad_norm", "grad_norm"),
    ("autodidact_learner_learning_rate", "learning_rate"),
    ("autodidact_policy_entropy_nats", "entropy"),
];

/// No worker runs, so nothing happens. A new run has no values that need a step; a resumed run has those of its last step and
/// its exams from the first scrape on.
#[test]
fn a_learner_without_workers_says_what_it_knows() {
    let cluster = Cluster::new();
    let args = ["--metrics", "127.0.0.1:0", "--set", "local.stall_seconds=20"];
    let args = [&args[..], &HASTE].concat();
    let scrape = |process: &Process| {
        let (address, mut answer) = (metrics_address(process), (0, String::new()));
        wait_until("the run's values", || {
            answer = get(&address, "/metrics");
            assert!(answer.0 == 200 || answer == (503, "the run is still loading\n".to_owned()), "{answer:?}");
            answer.0 == 200
        });
        answer.1
    };
    let not_ready = (503, "no step or exam completed yet\n".to_owned());

    let learner = cluster.learner(&args);
    let text = scrape(&learner);
    assert_eq!(get(&metrics_address(&learner), "/readyz"), not_ready);
    assert_eq!(value(&text, "autodidact_learner_step"), 0.0);
    for name in OF_A_STEP.map(|(name, _)| name).iter().chain(&["autodidact_learner_reward_mean", "autodidact_exam"]) {
        assert!(!text.lines().any(|line| line.starts_with(name)), "{name} in\n{text}");
    }
    for failure in [
        "autodidact_bus_publish_total{queue=\"task\",result=\"failed\"}",
        "autodidact_dead_letters_total{queue=\"scored\"}",
        "autodidact_bus_acks_total{kind=\"term\",queue=\"scored\"}",
    ] {
        assert_eq!(value(&text, failure), 0.0);
    }
    assert_clean(&text);

    let workers = ["actor", "verifier"].map(|role| cluster.start(role, &[]));
    wait_until("step 22", || cluster.folder.last_step() >= 22);
    drop(workers);
    let is_waiting = || get(&metrics_address(&learner), "/readyz").1.contains(" tasks are outstanding: ");
    wait_until("everything that they had sent to be taken in", is_waiting);
    learner.terminate();
    learner.end().success();
    let resume = [&["--resume", "--run-dir", "run"], &args[..]].concat();
    let learner = cluster.start("learner", &resume);
    let text = scrape(&learner);
    assert_eq!(get(&metrics_address(&learner), "/readyz"), not_ready);
    let step = cluster.folder.last_step();
    assert_eq!(value(&text, "autodidact_learner_step") as u64, step);
    assert_eq!(value(&text, "autodidact_learner_steps_total"), 0.0);
    let rows = std::fs::read_to_string(cluster.folder.path("run/metrics.jsonl")).unwrap();
    let rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let row = rows.iter().find(|row| row.get("exam").is_none() && row["step"] == step).unwrap();
    for (name, key) in OF_A_STEP {
        let (got, expected) = (value(&text, name), row[key].as_f64().unwrap());
        assert!((got - expected).abs() <= 1e-12 * expected.abs(), "{name}: expected {expected}, got {got}");
    }
    let exam = rows.iter().rfind(|row| row.get("exam").is_some()).unwrap();
    let share = exam["num_correct"].as_f64().unwrap() / exam["num_problems"].as_f64().unwrap();
    assert_eq!(value(&text, "autodidact_exam_solved_ratio{exam=\"countdown-3\"}"), share);
    assert!((0.0..=1.0).contains(&value(&text, "autodidact_learner_reward_mean")));
    learner.terminate();
    learner.end().success();
}

/// A real Prometheus scrapes every process of a cluster while it works, and has the expected values.
#[test]
fn prometheus_scrapes_a_cluster() {
    let (server, folder) = (NatsServer::start(), Folder::new());
    let url = server.url();
    let start = |args: &[&str]| folder.start(&[args, &["--bus", &url, "--metrics", "127.0.0.1:0"]].concat());
    let steps = "schedule.num_steps=100000";
    let actor = start(&["actor"]);
    let early = get(&metrics_address(&actor), "/readyz");
    assert_eq!(early, (503, "has not joined a run yet\n".to_owned()));
    let learner = start(&[&["learner", "smoke", "--run-dir", "run", "--set", steps], &HASTE[..]].concat());
    let verifier = start(&["verifier"]);
    let processes = [("learner", &learner), ("actor", &actor), ("verifier", &verifier)];
    let prometheus = Prometheus::start(&folder, &processes.map(|(job, process)| (job, metrics_address(process))));
    for (query, least) in [
        ("count(up == 1)", 3.0),
        ("count(autodidact_build_info)", 3.0),
        ("sum(autodidact_bus_connected)", 3.0),
        ("autodidact_learner_step{job=\"learner\"}", 5.0),
        ("sum(autodidact_tasks_issued_total{job=\"learner\",kind=\"train\"})", 80.0),
        ("sum(autodidact_rollouts_total{job=\"actor\",domain=\"countdown\"})", 80.0),
        ("sum(autodidact_rollout_tokens_total{job=\"actor\"})", 80.0),
        ("sum(autodidact_verify_total{job=\"verifier\",domain=\"countdown\"})", 80.0),
        ("sum(autodidact_rollout_duration_seconds_count{job=\"actor\",domain=\"countdown\"})", 10.0),
        ("sum(autodidact_verify_duration_seconds_count{job=\"verifier\",domain=\"countdown\"})", 10.0),
        ("sum(autodidact_learner_steps_total{job=\"learner\"})", 5.0),
        ("sum(autodidact_bus_acks_total{job=\"actor\",queue=\"task\",kind=\"ack\"})", 80.0),
        ("sum(autodidact_bus_publish_bytes_total{job=\"verifier\",queue=\"scored\"})", 80_000.0),
        ("max(autodidact_weights_version{job=\"actor\"})", 2.0),
        ("sum(autodidact_bus_deliveries_total{job=\"learner\",queue=\"scored\",redelivered=\"false\"})", 80.0),
        ("sum(autodidact_bus_publish_total{job=\"actor\",queue=\"group\",result=\"ok\"})", 80.0),
        ("autodidact_bus_publish_duration_seconds_count{job=\"verifier\",queue=\"scored\"}", 80.0),
        ("autodidact_weights_transfer_duration_seconds_count{job=\"actor\",direction=\"get\"}", 2.0),
    ] {
        let mut last = None;
        wait_until(query, || {
            last = prometheus.query(query);
            last.is_some_and(|value| value >= least)
        });
    }
    for (job, process) in processes {
        let address = metrics_address(process);
        assert_eq!(get(&address, "/readyz"), (200, "ok\n".to_owned()), "{job}");
        assert_clean(&get(&address, "/metrics").1);
    }
    for process in [learner, actor, verifier] {
        process.terminate();
        process.end().success();
    }
}

/// A Prometheus server for one test.
struct Prometheus {
    address: String,
    _process: Process,
}

impl Prometheus {
    fn start(folder: &Folder, targets: &[(&str, String)]) -> Prometheus {
        let jobs: String = targets
            .iter()
            .map(|(job, address)| {
                format!("  - job_name: {job}\n    static_configs: [{{ targets: [\"{address}\"] }}]\n")
            })
            .collect();
        let config = format!("global: {{ scrape_interval: 250ms, scrape_timeout: 250ms }}\nscrape_configs:\n{jobs}");
        std::fs::write(folder.path("prometheus.yml"), config).unwrap();
        // Prometheus takes the port of a socket that is closed again.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let mut command = Command::new(tool("prometheus/usr/bin/prometheus"));
        command.args(["--config.file=prometheus.yml", "--storage.tsdb.path=prometheus"]);
        command.arg(format!("--web.listen-address={address}"));
        let process = folder.start_command(command);
        wait_until("Prometheus", || TcpStream::connect(&address).is_ok());
        Prometheus { address, _process: process }
    }

    /// Returns the single value of an expression, if there is one.
    fn query(&self, expression: &str) -> Option<f64> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let (status, body) = get(&self.address, &format!("/api/v1/query?query={encoded}"));
        if status == 503 {
            return None;
        }
        let answer: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(answer["status"], "success", "{expression}: {body}");
        answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()
    }
}

/// Checks the names, units, types and help of metrics with Prometheus' own tool.
fn assert_clean(text: &str) {
    let mut command = Command::new(tool("prometheus/usr/bin/promtool"));
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[ended.stdout, ended.stderr].concat()).into_owned();
    assert!(ended.status.success() && said.is_empty(), "{said}\n{text}");
}
