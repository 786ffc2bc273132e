//! What Prometheus reads of a run agrees with what the run writes of itself.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::Value;

use crate::runs::{Folder, wait_until};

#[test]
fn a_scrape_is_the_run_at_a_step() {
    let folder = Folder::new();
    let steps = "schedule.num_steps=100000";
    let process = folder.start(&["train", "smoke", "--run-dir", "run", "--metrics", "127.0.0.1:0", "--set", steps]);
    let address = || {
        let printed = process.printed_so_far();
        printed
            .lines()
            .find_map(|line| Some(line.strip_prefix("metrics: http://")?.strip_suffix("/metrics")?.to_owned()))
    };
    wait_until("the address", || address().is_some());
    let address = address().unwrap();
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
    assert_eq!(value(&text, "autodidact_rollouts_total{family=\"countdown/2\"}") as u64, of_family(1));
    let exam = upto.iter().rfind(|row| row.get("exam").is_some()).unwrap();
    let share = exam["num_correct"].as_f64().unwrap() / exam["num_problems"].as_f64().unwrap();
    assert_eq!(value(&text, "autodidact_exam_solved_ratio{exam=\"countdown-3\"}"), share);
    let journal_bytes = value(&text, "autodidact_journal_bytes") as u64;
    assert!(0 < journal_bytes && journal_bytes <= folder.journal_bytes());

    let other = Folder::new();
    let refused = other.call(&["train", "smoke", "--run-dir", "run", "--metrics", &address]);
    let says = format!(
        "--metrics: expected an address that is free, such as 127.0.0.1:9100, got {address}: Address already in use"
    );
    assert!(refused.refusal().starts_with(&says), "{refused:#?}");
    assert!(other.files().is_empty(), "the run did not start");
    process.interrupt();
    process.end().success();
}

pub(crate) fn get(address: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

fn value(text: &str, name: &str) -> f64 {
    let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("expected {name} in\n{text}")).parse().unwrap()
}
