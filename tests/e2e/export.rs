//! What a run writes for other programs. `tests/peers/exports.py` loads it with them.

use std::collections::BTreeSet;

use domains::{answer_of, domain};
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::{Field, Row};
use policy::formats::{Family, Pretrained};
use proto::{Problem, Verdict};
use serde_json::{Value, json};

use crate::bad_input::refused;
use crate::pretrained_run::{FEW_ANSWERS, TRAIN, TRAIN_ADAPTER, folder};
use crate::runs::Folder;

#[test]
fn a_trained_model_is_written_as_a_model() {
    let folder = folder();
    folder.call(&TRAIN).success();
    folder.call(&["export", "run", "--hf", "trained"]).success();
    let trained = Pretrained::open(&folder.path("trained")).unwrap();
    let base = Pretrained::open(&folder.path("model")).unwrap();
    assert_eq!((trained.family(), trained.config()), (Family::Llama, base.config()));
    let (_, checkpoint) = learner::load_newest(&folder.path("run"), |_| {}).unwrap().unwrap();
    let weights = trained.load().unwrap();
    assert!(weights == checkpoint.training.average && weights != base.load().unwrap());
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let [written, kept] = ["trained", "model"].map(|model| std::fs::read(folder.path(model).join(name)).unwrap());
        assert_eq!(written, kept);
    }
    let ends: Value = serde_json::from_slice(&std::fs::read(folder.path("trained/config.json")).unwrap()).unwrap();
    assert_eq!(ends["eos_token_id"], json!(257));
    // Asked alike, the run and the folder give the same answers.
    let ask = |subject| {
        let as_asked = ["--constrain", "answer", "--examples", "0", "--max-reply-tokens", "24"];
        let args = [&["solve", subject, "--domain", "arithmetic", "4 + 9", "--samples", "3", "--json"], &as_asked[..]];
        let mut solved: Value = serde_json::from_str(&folder.call(&args.concat()).success().stdout).unwrap();
        solved["step"] = Value::Null;
        solved
    };
    assert_eq!(ask("run"), ask("trained"));

    folder.call(&["export", "run/checkpoints/step_00000012", "--hf", "halved", "--dtype", "bf16"]).success();
    let halved = Pretrained::open(&folder.path("halved")).unwrap();
    assert_eq!(halved.stored_types().keys().collect::<Vec<_>>(), [&"BF16"]);
    refused(&folder, &["export", "run", "--hf", "halved"], &["halved: expected a new or an empty folder"]);
}

#[test]
fn an_adapter_is_written_as_one_and_merged_into_its_base() {
    let folder = folder();
    folder.call(&TRAIN_ADAPTER).success();
    folder.call(&["export", "run", "--adapter", "adapter", "--hf", "merged"]).success();
    let read = |name: &str| std::fs::read(folder.path("adapter").join(name)).unwrap();
    let described: Value = serde_json::from_slice(&read("adapter_config.json")).unwrap();
    assert_eq!((&described["peft_type"], &described["r"]), (&json!("LORA"), &json!(16)));
    let base = folder.path("model").canonicalize().unwrap();
    assert_eq!(described["base_model_name_or_path"], json!(base));
    folder.call(&["export", "run", "--adapter", "named", "--base-name", "a/model"]).success();
    let named = std::fs::read(folder.path("named/adapter_config.json")).unwrap();
    let named: Value = serde_json::from_slice(&named).unwrap();
    assert_eq!(named["base_model_name_or_path"], json!("a/model"));
    assert!(read("adapter_model.safetensors").len() > 10_000);
    let (model, checkpoint) = learner::load_newest(&folder.path("run"), |_| {}).unwrap().unwrap();
    let base = Pretrained::open(&folder.path("model")).unwrap().load().unwrap();
    let merged = policy::merge_adapter(&model, base.clone(), &checkpoint.training.average);
    assert!(Pretrained::open(&folder.path("merged")).unwrap().load().unwrap() == merged && merged != base);

    let whole = folder.call(&[&TRAIN[..3], &["whole", "--steps", "1"]].concat());
    drop(whole.success());
    let says =
        "whole: expected a run that trains an adapter (model.adapter), got one that trains all weights: use --hf";
    refused(&folder, &["export", "whole", "--adapter", "out"], &[says]);
}

#[test]
fn verified_answers_are_written_as_training_data() {
    let folder = folder();
    folder.call(&TRAIN).success();
    let few = FEW_ANSWERS.into_iter().flat_map(|change| ["--set", change]);
    folder.call(&[&TRAIN[..3], &["few"], &few.collect::<Vec<_>>()].concat()).success();
    let mut said = folder.call(&["export", "run", "--sft", "right.jsonl"]).success().stdout;
    said += &folder.call(&["export", "few", "--dpo", "pairs.jsonl"]).success().stdout;
    let rows = |name: &str| -> Vec<Value> {
        let text = std::fs::read_to_string(folder.path(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let (right, pairs) = (rows("right.jsonl"), rows("pairs.jsonl"));
    let printed = format!(
        "right.jsonl: {} right answers\npairs.jsonl: {} pairs of a right and a wrong answer\n",
        right.len(),
        pairs.len()
    );
    assert_eq!(said, printed);
    let verdict = |row: &Value, column: &str| {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let problem = Problem { domain: text(&row["domain"]), text: text(&row["problem"]) };
        let domain = domain(&problem.domain).unwrap();
        assert!(!domain.is_exam(&problem));
        let question = domain.wording().unwrap().question(&problem).unwrap();
        assert_eq!(row["prompt"], json!([{"role": "user", "content": question}]));
        assert_eq!(row[column][0]["role"], "assistant");
        domain.judge(&problem, None, answer_of(&text(&row[column][0]["content"]))).unwrap().verdict
    };
    assert!(right.iter().all(|row| verdict(row, "completion") == Verdict::Correct));
    assert!(right.iter().any(|row| row["label"] == "hindsight"));
    assert!(!pairs.is_empty() && pairs.iter().all(|row| verdict(row, "chosen") == Verdict::Correct));
    assert!(pairs.iter().all(|row| verdict(row, "rejected") != Verdict::Correct));
    // As Parquet, the same.
    folder.call(&["export", "run", "--sft", "right.parquet"]).success();
    folder.call(&["export", "few", "--dpo", "pairs.parquet"]).success();
    for (name, rows) in [("right.parquet", &right), ("pairs.parquet", &pairs)] {
        let table = SerializedFileReader::new(std::fs::File::open(folder.path(name)).unwrap()).unwrap();
        let read: Vec<Value> = table.get_row_iter(None).unwrap().map(|row| row_json(row.unwrap())).collect();
        assert_eq!(read, *rows, "{name}");
    }
    refused(&folder, &["export", "run", "--sft", "right.parquet"], &["right.parquet: expected a new file, found one"]);
    let distinct: BTreeSet<String> =
        right.iter().map(|row| format!("{} {}", row["problem"], row["completion"])).collect();
    assert_eq!(distinct.len(), right.len());

    refused(&folder, &["export", "run", "--sft", "right.jsonl"], &["right.jsonl: expected a new file, found one"]);
    refused(&folder, &["export", "run", "--sft", "nowhere/a.jsonl"], &["nowhere/a.jsonl"]);
    refused(&folder, &["export", "model", "--sft", "a.jsonl"], &["model: expected a run directory"]);
    let nothing = folder.call(&["export", "run"]);
    let usage = "--hf <DIR>|--adapter <DIR>|--sft <FILE>|--dpo <FILE>";
    assert!(!nothing.status.success() && nothing.stderr.contains(usage), "{nothing:?}");
}

/// Returns a row of texts and lists of structs as JSON.
fn row_json(row: Row) -> Value {
    let value = |field| match field {
        Field::Str(text) => text.into(),
        Field::Group(row) => row_json(row),
        Field::ListInternal(list) => list
            .elements()
            .iter()
            .map(|element| match element {
                Field::Group(row) => row_json(row.clone()),
                other => panic!("{other}"),
            })
            .collect(),
        other => panic!("{other}"),
    };
    Value::Object(row.into_columns().into_iter().map(|(name, field)| (name, value(field))).collect())
}

#[test]
fn a_run_of_symbols_has_nothing_to_write() {
    let folder = Folder::new();
    folder.call(&["train", "smoke", "--run-dir", "run", "--steps", "1"]).success();
    let says = "run: expected a run that began with a pretrained model, got a network that reads symbols";
    refused(&folder, &["export", "run", "--hf", "out"], &[says]);
    assert!(!folder.path("out").exists());
}
