//! `bench`: that it runs and what it prints. Its speed depends on the machine and is not tested.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::Value;

use crate::runs::Folder;

fn report(args: &[&str]) -> Value {
    let ended = Folder::new().call(&[&["bench", "--json", "--repeats", "2"], args].concat()).success();
    serde_json::from_str(&ended.stdout).unwrap()
}

#[test]
fn the_network_is_measured_against_the_machine() {
    for what in ["train", "decode"] {
        let report = report(&[what, "--d-model", "64", "--batch", "3", "--positions", "12", "--threads", "2"]);
        assert_eq!(report["bench"], what);
        assert_eq!(report["threads"], 2);
        let peak = report["peak_gflops"]["median"].as_f64().unwrap();
        let [row] = &report["rows"].as_array().unwrap()[..] else { panic!("expected one row: {report}") };
        let gflops = row["gflops"]["median"].as_f64().unwrap();
        assert!(gflops > 0.0 && peak > 0.0, "{report}");
        assert_eq!(row["unit"], "tokens");
    }
}

/// Two steps and more: what a run measures is what it does again.
#[test]
fn a_pretrained_model_answers_and_learns() {
    let folder = crate::pretrained_run::folder();
    let call = |args: &[&str]| -> Value {
        let args = [&["bench", "--json", "--repeats", "2", "--model", "model", "--answer-tokens", "5"], args].concat();
        serde_json::from_str(&folder.call(&args).success().stdout).unwrap()
    };
    for batch in ["1", "16"] {
        let report = call(&["decode", "--batch", batch, "--threads", "2"]);
        assert_eq!((&report["bench"], &report["rows"][0]["unit"]), (&"decode".into(), &"tokens".into()));
        assert!(report["rows"][0]["gflops"]["median"].as_f64().unwrap() > 0.0, "{report}");
    }
    let report = call(&["grpo"]);
    assert_eq!(report["rows"][0]["unit"], "answers");
    assert!(report["rows"][0]["per_second"]["min"].as_f64().unwrap() > 0.0, "{report}");
    assert!(report["peak_memory_bytes"].as_u64().unwrap() > 1 << 20, "{report}");
    // A group has 8 answers.
    let refused = folder.call(&["bench", "decode", "--model", "model", "--batch", "12"]);
    assert!(refused.refusal().contains("batch: expected up to 8, or a multiple of it, got 12"), "{refused:?}");
    let refused = folder.call(&["bench", "grpo"]);
    assert!(refused.refusal().contains("grpo: expected --model MODEL, got none"), "{refused:?}");
    let refused = folder.call(&["bench", "decode", "--model", "nowhere"]);
    assert!(refused.refusal().contains("found none at nowhere"), "{refused:?}");
}

/// One answer has two peers, each with modes of its own.
#[test]
fn peers_of_a_pretrained_model_get_its_prompts() {
    let folder = crate::pretrained_run::folder();
    let peer = fake_peer(
        &folder,
        r#"case "$*" in *"--threads 1 --answer-tokens 5") ;; *) exit 1;; esac
           read prompts; case "$prompts" in "[["*"]]") ;; *) exit 1;; esac
           echo '{"version": "1.0"}'; while read line; do echo '[["f32", 4.0]]'; done"#,
    );
    let args =
        ["bench", "decode", "--json", "--repeats", "1", "--model", "model", "--answer-tokens", "5", "--batch", "1"];
    let ended = folder.call(&[&args[..], &["--peer", "--python", &peer]].concat()).success();
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(report["peer_versions"], serde_json::json!(["transformers 1.0", "llama.cpp 1.0"]));
    let names = report["rows"].as_array().unwrap().iter().skip(1).map(|row| row["name"].as_str().unwrap());
    assert_eq!(names.collect::<Vec<_>>(), ["transformers f32", "llama.cpp f32"]);
}

#[test]
fn every_kind_of_answer_is_judged() {
    let report = report(&["verify"]);
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["deduction", "abduction", "induction", "programs mixed", "countdown"]);
    for row in rows {
        let rate = &row["per_second"];
        let [min, median, max] = ["min", "median", "max"].map(|field| rate[field].as_f64().unwrap());
        assert!(0.0 < min && min <= median && median <= max, "{row}");
    }
}

/// Writes a script that stands in for the peer, and returns its path.
fn fake_peer(folder: &Folder, says: &str) -> String {
    let path = folder.path("peer");
    std::fs::write(&path, format!("#!/bin/sh\n{says}\n")).unwrap();
    std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

const TINY: [&str; 9] = ["bench", "train", "--d-model", "64", "--batch", "2", "--positions", "12", "--peer"];

#[test]
fn a_peer_is_measured_in_the_same_rounds() {
    let folder = Folder::new();
    let peer = fake_peer(
        &folder,
        r#"echo '{"version": "9.9"}'; while read line; do echo '[["eager f32", 10.0], ["compiled f32", 20.0]]'; done"#,
    );
    let ended = folder.call(&[&TINY[..], &["--json", "--python", &peer]].concat()).success();
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(report["peer_versions"], serde_json::json!(["PyTorch 9.9"]));
    let [ours, eager, compiled] = &report["rows"].as_array().unwrap()[..] else { panic!("{report}") };
    assert_eq!([&eager["name"], &compiled["name"]], ["PyTorch eager f32", "PyTorch compiled f32"]);
    let median = |row: &Value, field: &str| row[field]["median"].as_f64().unwrap();
    assert!((median(eager, "ratio") / median(ours, "per_second") * 10.0 - 1.0).abs() < 1e-9, "{report}");
    assert!((median(eager, "ratio") / median(compiled, "ratio") - 2.0).abs() < 1e-9, "{report}");
}

#[test]
fn a_peer_that_is_missing_is_named_with_its_remedy() {
    let folder = Folder::new();
    let ended = folder.call(&[&TINY[..], &["--python", "no-such-python"]].concat());
    assert!(ended.refusal().contains("expected a Python interpreter with PyTorch (--python)"), "{ended:?}");
    let peer = fake_peer(&folder, r#"echo '{"error": "the peer needs PyTorch: pip install torch"}'"#);
    let ended = folder.call(&[&TINY[..], &["--python", &peer]].concat());
    assert!(ended.refusal().contains("the peer needs PyTorch: pip install torch"), "{ended:?}");
    let peer = fake_peer(&folder, r#"echo '{"version": "9.9"}'; read line; kill -9 $$"#);
    let ended = folder.call(&[&TINY[..], &["--python", &peer]].concat());
    assert!(ended.refusal().contains("the peer PyTorch ended too early, with signal: 9 (SIGKILL)"), "{ended:?}");
}

#[test]
fn a_server_is_measured_with_groups_weights_and_actors() {
    let server = crate::nats_server::tool("nats/bin/nats-server");
    let args = ["bus", "--groups", "20", "--weights", "1,2", "--seconds", "0.3", "--server", server.to_str().unwrap()];
    let report = report(&args);
    let rows = report["rows"].as_array().unwrap();
    let rates: Vec<(&str, &str)> =
        rows.iter().map(|row| (row["name"].as_str().unwrap(), row["unit"].as_str().unwrap())).collect();
    let [bare, _, carried, weights @ .., _, _, _, _] = &rates[..] else { panic!("{report}") };
    assert!(bare.0.contains("client library alone") && carried.0.contains("over the bus") && bare.1 == "groups");
    assert!(weights.len() == 6 && weights.iter().all(|(_, unit)| *unit == "MiB"), "{report}");
    let alone = rows.iter().find(|row| row["name"] == "simulated actors: 1").unwrap();
    assert_eq!(alone["ratio"]["median"], 1.0);
    assert!(rows.iter().all(|row| row["per_second"]["min"].as_f64().unwrap() > 0.0), "{report}");
    let refused = Folder::new().call(&["bench", "bus", "--server", "no-such-server"]);
    assert!(refused.refusal().starts_with("--server: start no-such-server: "), "{refused:#?}");
}
