//! Checks that `inspect` reports of a journal what the run reported itself.

use serde_json::Value;

use crate::runs::{Folder, JournalRecord, NUM_STEPS, SEGMENT, journal_records, reference, wait_until};

const STEP: u64 = 21;

#[test]
fn the_summary_is_the_run() {
    let folder = Folder::holding(&reference(0).files);
    let summary = inspect(&folder, &[]);
    let mut manifest: Value = serde_json::from_slice(&reference(0).files["run/manifest.json"]).unwrap();
    let config = manifest.as_object_mut().unwrap().remove("config_toml").unwrap();
    assert_eq!(config.as_str().unwrap().as_bytes(), reference(0).files["run/config.toml"]);
    // The journal does not store the config's name, which is not part of what the run computes.
    assert_eq!(manifest.as_object_mut().unwrap().remove("config_name").unwrap(), "smoke");
    assert_eq!(summary["manifest"], manifest);
    assert_eq!(summary["last_step"]["step"], NUM_STEPS);
    assert_eq!(digests(&summary["last_step"]), *reference(0).history.steps.last().unwrap());
    assert_eq!(summary["evals"], reference(0).summary["evals"]);
    assert_eq!(summary["num_rollouts"].as_u64(), Some(NUM_STEPS * 16 * 8));
    assert_eq!(summary["num_groups"].as_u64(), Some(NUM_STEPS * 16));
    assert_eq!(summary["size_bytes"].as_u64(), Some(reference(0).files[SEGMENT].len() as u64));
    assert_eq!(summary["unreadable"].as_array().map(Vec::len), Some(0));
    let text = folder.call(&["inspect", "run"]).success();
    assert_eq!(text.printed("weights       "), digests(&summary["last_step"])[0]);
    assert!(text.stdout.contains("exam          countdown-3 at step 20: "), "{text:#?}");
    assert_eq!(folder.files(), reference(0).files, "inspect changes nothing");
}

#[test]
fn a_step_lists_what_it_folded() {
    let folder = Folder::holding(&reference(0).files);
    let step = inspect(&folder, &["--step", &STEP.to_string()]);
    assert_eq!(digests(&step), reference(0).history.steps[STEP as usize - 1]);
    let groups = step["groups"].as_array().unwrap();
    assert_eq!(groups.len(), 16);
    // A row of metrics.jsonl counts the answers of every family; problems that were written are counted apart.
    let text = String::from_utf8(reference(0).files["run/metrics.jsonl"].clone()).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let row = rows.filter(|row| row.get("exam").is_none()).find(|row| row["step"] == STEP).unwrap();
    for (family, solved_and_played) in row["solved_by_family"].as_object().unwrap() {
        let of_family = || groups.iter().filter(|group| group["family"] == *family.as_str());
        let sum = |key: &str| of_family().map(|group| group[key].as_u64().unwrap()).sum::<u64>();
        assert_eq!(*solved_and_played, serde_json::json!([sum("num_correct"), sum("num_rollouts")]), "{family}");
    }
    let text = folder.call(&["inspect", "run", "--step", &STEP.to_string()]).success().stdout;
    for group in groups {
        assert!(text.contains(group["asked"].as_str().unwrap()), "{group} in {text}");
    }
}

#[test]
fn a_group_shows_every_answer_and_what_was_made_of_it() {
    let folder = Folder::holding(&reference(0).files);
    let steps = (STEP..=NUM_STEPS).map(|step| inspect(&folder, &["--step", &step.to_string()]));
    let is_right = |group: &Value, is_proposal: bool| {
        group["origin"].is_null() == is_proposal && group["num_correct"].as_u64().unwrap() > 0
    };
    let mut pairs = steps.filter_map(|step| {
        let group =
            |is_proposal| step["groups"].as_array().unwrap().iter().find(|group| is_right(group, is_proposal)).cloned();
        Some([group(false)?, group(true)?])
    });
    let [solved, proposed] = pairs.next().expect("some step has a right answer and an admitted proposal");
    for line in [&solved, &proposed] {
        let id = format!("{}/{}", line["batch"], line["index"]);
        let group = inspect(&folder, &["--group", &id]);
        assert_eq!(group["asked"], line["asked"]);
        let answers = group["answers"].as_array().unwrap();
        assert_eq!(answers.len(), 8);
        let right = answers.iter().filter(|answer| answer["verdict"] == "correct").count();
        assert_eq!(line["num_correct"], right);
        assert!(answers.iter().all(|answer| answer["logprob"].as_f64().unwrap() <= 0.0));
        let text = folder.call(&["inspect", "run", "--group", &id]).success().stdout;
        let step = line["batch"].as_u64().unwrap() + 1;
        assert!(text.starts_with(&format!("group {id}, folded in step {step}: ")), "{text}");
        assert!(answers.iter().all(|answer| text.contains(answer["text"].as_str().unwrap())), "{text}");
    }
    let group = inspect(&folder, &["--group", &format!("{}/{}", solved["batch"], solved["index"])]);
    let labels: Vec<&Value> =
        group["examples"].as_array().unwrap().iter().map(|example| &example["label_origin"]).collect();
    assert!(labels.contains(&&Value::from("solved")), "{group}");
    let verified = group["answers"].as_array().unwrap().iter().find(|answer| answer["verdict"] == "correct").unwrap();
    assert!(verified["text"].as_str().unwrap().contains(" = "), "answers are in words: {verified}");
}

#[test]
fn a_run_that_goes_on_can_be_inspected() {
    let folder = Folder::new();
    let mut process = folder.start(&["train", "smoke", "--run-dir", "run"]);
    let mut seen = 0;
    wait_until("a few steps", || folder.last_step() > 3);
    while process.is_running() && seen < NUM_STEPS {
        let summary = inspect(&folder, &[]);
        let step = summary["last_step"]["step"].as_u64().unwrap();
        assert!(step >= seen, "{summary}");
        let damaged = summary["unreadable"].as_array().unwrap().iter().filter(|record| record["truncated"] != true);
        assert_eq!(damaged.count(), 0, "a record that is being written is no damage: {summary}");
        seen = step;
    }
    process.end().success();
    assert_eq!(folder.history(), reference(0).history);
}

#[test]
fn what_cannot_be_read_is_named() {
    let bytes = &reference(0).files[SEGMENT];
    let records = journal_records(bytes);
    let group = records.iter().filter(|record| record.kind == JournalRecord::GROUP).nth(20 * 16 + 5).unwrap();
    let folder = Folder::holding(&reference(0).files);
    folder.flip(SEGMENT, group.offset + JournalRecord::HEADER_BYTES);
    let ended = folder.call(&["inspect", "run"]).success();
    let says = format!("unreadable    {SEGMENT} has a damaged record at byte {}\n", group.offset);
    assert!(ended.stdout.ends_with(&says), "{ended:#?}");
    assert_eq!(inspect(&folder, &["--step", "21"])["groups"].as_array().unwrap().len(), 15, "the others are there");

    let last = records.last().unwrap();
    std::fs::write(folder.path(SEGMENT), &bytes[..last.offset + 3]).unwrap();
    let ended = folder.call(&["inspect", "run"]).success();
    let says = format!("unreadable    {SEGMENT} ends inside a record at byte {}\n", last.offset);
    assert!(ended.stdout.ends_with(&says), "{ended:#?}");
}

#[test]
fn what_is_not_there() {
    let folder = Folder::holding(&reference(0).files);
    for (args, says) in [
        (["--step", "41"], "--step: expected one of the 40 steps in the journal, got 41"),
        (["--step", "0"], "--step: expected one of the 40 steps in the journal, got 0"),
        (["--group", "20/16"], "--group: expected a group in the journal, which has 16 of batch 20, got 20/16"),
        (["--group", "99/0"], "--group: expected a group in the journal, which has 0 of batch 99, got 99/0"),
    ] {
        let refusal = folder.call(&["inspect", "run", args[0], args[1]]);
        assert_eq!(refusal.refusal(), says);
    }
    let ended = folder.call(&["inspect", "run", "--group", "20"]);
    assert!(ended.stderr.contains("expected BATCH/INDEX, such as 20/3, got \"20\""), "{ended:#?}");
    for name in ["run/journal", "absent"] {
        let says = format!("{name}: expected a run directory with a journal, found none");
        assert_eq!(folder.call(&["inspect", name]).refusal(), says);
    }
}

fn inspect(folder: &Folder, args: &[&str]) -> Value {
    let command = [&["inspect", "run", "--json"], args].concat();
    serde_json::from_str(&folder.call(&command).success().stdout).unwrap()
}

fn digests(made: &Value) -> [String; 2] {
    ["weights_digest", "state_digest"].map(|key| made[key].as_str().unwrap().to_owned())
}
