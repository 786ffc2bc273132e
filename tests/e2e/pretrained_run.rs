//! Runs that begin with a pretrained model. The model is a tiny one of random weights, in a folder of Hugging Face.

use std::path::Path;

use policy::formats::{Companions, Family, StoredType, write_hf};
use policy::{ModelConfig, Params, Variant};
use serde_json::{Value, json};

use crate::bad_input::refused;
use crate::cluster::Cluster;
use crate::runs::{Folder, HASTE, History, RESUME, metrics, wait_until};

/// Steps of the runs here.
const NUM_STEPS: u64 = 12;

/// A token for every byte, and two special ones.
const VOCABULARY_SIZE: usize = 258;

/// Writes a tiny model whose tokens are bytes.
pub(crate) fn write_model(folder: &Path, seed: u64) {
    write_model_of(folder, Family::Llama, &tiny(), seed);
}

fn tiny() -> ModelConfig {
    ModelConfig {
        vocabulary_size: VOCABULARY_SIZE,
        max_positions: 1024,
        d_model: 32,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        ff_dim: 64,
        variant: Variant { tied_head: true, rms_norm_eps: 1e-5, rope_theta: 1e5, ..Variant::default() },
        adapter: None,
    }
}

fn write_model_of(folder: &Path, family: Family, config: &ModelConfig, seed: u64) {
    std::fs::create_dir(folder).unwrap();
    write_hf(folder, config, family, &Params::init(config, seed), StoredType::F32, Companions::default()).unwrap();
    let special = |id: usize, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true,
        })
    };
    let vocabulary: serde_json::Map<String, Value> =
        (0..=255).map(|byte| (symbol(byte).to_string(), json!(byte))).collect();
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [special(256, "<|im_start|>"), special(257, "<|im_end|>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    let template = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let settings = json!({"eos_token": "<|im_end|>", "chat_template": template});
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer_config.json"), settings.to_string()).unwrap();
}

/// Returns the character by which byte-level tokenizers write a byte: itself if it is printable, else one of those from 256 on.
fn symbol(byte: u8) -> char {
    let is_printable = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let stand_in = || 256 + (0..byte).filter(|before| !is_printable(before)).count() as u32;
    char::from_u32(if is_printable(&byte) { byte.into() } else { stand_in() }).unwrap()
}

/// Makes a folder with the model and configs that begin with it.
pub(crate) fn folder() -> Folder {
    let folder = Folder::new();
    write_in(&folder);
    folder
}

fn write_in(folder: &Folder) {
    write_tiny(folder, "model");
}

/// Writes the model as `model`, and configs that say that it lies at `place`.
pub(crate) fn write_tiny(folder: &Folder, place: &str) {
    write_model(&folder.path("model"), 0);
    let config = "preset = \"smollm2\"\nmodel = { base = \"PLACE\", max_positions = 448 }\n\
                  batch = { num_tasks = 20, num_rollouts = 8 }\n\
                  learner = { learning_rate = 3e-3, update_tokens = 2000 }\n\
                  schedule.num_steps = 12\nexams.names = [\"arithmetic-sum\"]\nlocal.slots = 16\n";
    let config = config.replace("PLACE", place);
    std::fs::write(folder.path("tiny.toml"), &config).unwrap();
    // The same run with an adapter.
    let config = config.replace("smollm2", "smollm2-lora").replace("3e-3", "2e-2");
    std::fs::write(folder.path("lora.toml"), config).unwrap();
}

pub(crate) const TRAIN: [&str; 4] = ["train", "tiny.toml", "--run-dir", "run"];
pub(crate) const TRAIN_ADAPTER: [&str; 4] = ["train", "lora.toml", "--run-dir", "run"];

/// Returns the history of a run with changes.
pub(crate) fn trained(train: [&str; 4], changes: &[&str]) -> History {
    let folder = folder();
    let set = changes.iter().flat_map(|change| ["--set", change]);
    folder.call(&train.into_iter().chain(set).collect::<Vec<_>>()).success();
    folder.history()
}

#[test]
fn threads_slots_and_kills_change_nothing() {
    let expected = expect_the_same_however_it_runs(TRAIN);
    for changes in ["language.examples=1", "language.constrain=none", "learner.hindsight=false"] {
        assert_ne!(trained(TRAIN, &[changes]).steps[0], expected.steps[0], "{changes} is part of what is learned");
    }
}

#[test]
fn threads_slots_and_kills_change_no_adapter() {
    let expected = expect_the_same_however_it_runs(TRAIN_ADAPTER);
    for changes in ["model.adapter.rank=8", "model.adapter.alpha=16", "model.adapter.rslora=true", "model.adapter="] {
        // The first step of the optimizer has the same length at any scale of the gradient.
        let other = trained(TRAIN_ADAPTER, &[changes]);
        assert_ne!(other.steps.last(), expected.steps.last(), "{changes} is part of what is learned");
    }
}

/// Runs a config on different numbers of threads and slots, with kills, and again from its journal. Returns its history.
fn expect_the_same_however_it_runs(train: [&str; 4]) -> History {
    let expected = trained(train, &["local.threads=1", "local.slots=4"]);
    assert_eq!(expected.steps.len() as u64, NUM_STEPS);
    trained(train, &["local.threads=2", "local.slots=64"]).assert_steps_of(&expected);
    let killed = folder();
    for step in [3, 6] {
        let args = if step == 3 { &[&train[..], &["--set", "local.checkpoint_every=2"]].concat()[..] } else { &RESUME };
        let process = killed.start(args);
        wait_until("steps", || killed.last_step() >= step);
        process.kill();
        assert!(killed.last_step() < NUM_STEPS, "the kill finds the process alive");
    }
    killed.resume().success();
    killed.history().assert_steps_of(&expected);
    let replayed = killed.call(&["replay", "run"]).success();
    assert!(replayed.stdout.contains("replayed 12 steps"), "{replayed:#?}");
    let rows = metrics(&killed.path("run"));
    let steps: Vec<&Value> = rows.iter().filter(|row| row.get("exam").is_none()).collect();
    assert!(steps.iter().all(|row| row["logprob_mismatch"] == json!(0.0)), "{steps:?}");
    let num_examples: u64 = steps.iter().map(|row| row["num_examples"].as_u64().unwrap()).sum();
    assert!(num_examples > 0, "hindsight makes examples: {steps:?}");
    expected
}

/// Problems with so few answers that random weights solve some of them, but not all.
pub(crate) const FEW_ANSWERS: [&str; 2] =
    ["domains=[{name=\"comparison\",share=1.0,levels=[{level=1,weight=1.0}]}]", "exams.names=[]"];

/// Runs that train by policy gradients on their own answers, with a penalty on the distance to the model that they begin with.
#[test]
fn a_penalty_on_the_distance_to_the_base_is_part_of_a_run() {
    const POLICY_GRADIENT: &str = "learner.policy_gradient={kind=\"grpo\",weight=1.0,clip_low=0.2,clip_high=0.28,\
                                   entropy_bonus=0.0,updates_per_step=1,cross_entropy=false}";
    let with = |kl: &[&str]| {
        let folder = folder();
        let set = [&FEW_ANSWERS[..], &[POLICY_GRADIENT, "schedule.num_steps=4"], kl].concat();
        let set = set.iter().flat_map(|change| ["--set", *change]);
        folder.call(&TRAIN.into_iter().chain(set).collect::<Vec<_>>()).success();
        folder
    };
    let distances = |folder: &Folder| -> Vec<Option<f64>> {
        let rows = metrics(&folder.path("run"));
        rows.iter().filter(|row| row.get("exam").is_none()).map(|row| row["kl_to_base"].as_f64()).collect()
    };
    let free = with(&[]);
    assert_eq!(distances(&free), [None; 4]);
    for form in ["loss", "advantage"] {
        let held = with(&[&format!("learner.kl={{to=\"base\",weight=0.5,form=\"{form}\"}}")]);
        let distances = distances(&held);
        assert_eq!(distances[0], Some(0.0), "the first answers are the base's own");
        assert!(distances[1..].iter().all(|distance| distance.unwrap() != 0.0), "{distances:?}");
        assert_ne!(held.history().steps, free.history().steps);
        held.call(&["replay", "run"]).success();
    }
    let penalty = "learner.kl={to=\"base\",weight=0.5,form=\"loss\"}";
    let says = "learner.kl: expected none without learner.policy_gradient";
    refused(&folder(), &[&TRAIN[..], &["--set", penalty]].concat(), &[says]);
    let says = "learner.kl: expected none in a run without a pretrained model";
    refused(&Folder::new(), &["train", "smoke", "--run-dir", "run", "--set", penalty], &[says]);
}

/// The control that imitates the domains' solvers.
#[test]
fn a_solver_answers_in_place_of_the_policy() {
    let folder = folder();
    let set = ["actor.behavior=solver", "learner.hindsight=false", "batch.num_rollouts=1", "schedule.num_steps=3"];
    let set = set.iter().flat_map(|change| ["--set", *change]);
    folder.call(&TRAIN.into_iter().chain(set).collect::<Vec<_>>()).success();
    let rows = metrics(&folder.path("run"));
    let steps: Vec<&Value> = rows.iter().filter(|row| row.get("exam").is_none()).collect();
    assert_eq!(steps.len(), 3);
    for row in steps {
        assert_eq!((&row["solve_rate"], &row["num_examples"]), (&json!(1.0), &json!(20)), "{row}");
        assert_eq!(row["answers"]["ended_share"], json!(1.0), "{row}");
    }
    folder.call(&["replay", "run"]).success();
    let solver = ["--set", "actor.behavior=solver"];
    let says =
        "actor.behavior: expected policy or uniform-legal for countdown level 1, which has no solver in this language";
    refused(&folder, &[&["train", "smoke"][..], &solver, &["--set", "self_play="]].concat(), &[says]);
}

/// A run whose verdicts give no advantage: it learns from another model with the same tokens.
#[test]
fn a_teacher_is_part_of_a_run() {
    const DISTILL: [&str; 3] = [
        "learner.policy_gradient={kind=\"distill\",weight=1.0,clip_low=0.2,clip_high=0.28,entropy_bonus=0.0,\
         updates_per_step=1,cross_entropy=false}",
        "learner.distill={teacher=\"teacher\",weight=1.0}",
        "learner.learning_rate=1e-2",
    ];
    let folder = folder();
    write_model(&folder.path("teacher"), 1);
    let set: Vec<&str> = DISTILL.into_iter().flat_map(|change| ["--set", change]).collect();
    folder.call(&[&TRAIN[..], &set].concat()).success();
    let rows = metrics(&folder.path("run"));
    let steps = rows.iter().filter(|row| row.get("exam").is_none());
    let distances: Vec<f64> = steps.map(|row| row["kl_to_teacher"].as_f64().unwrap()).collect();
    assert_eq!(distances.len() as u64, NUM_STEPS);
    assert!(distances[NUM_STEPS as usize - 1] < distances[0], "the policy comes closer: {distances:?}");
    folder.call(&["replay", "run"]).success();
    let config = std::fs::read_to_string(folder.path("run/config.toml")).unwrap();
    let place = folder.path("teacher").canonicalize().unwrap();
    assert!(config.contains(&format!("teacher = \"{}\"", place.display())), "{config}");

    // Another model at that place, one with other tokens, and one with fewer positions or none at all.
    std::fs::remove_dir_all(folder.path("teacher")).unwrap();
    refused(&folder, &["train", "--resume", "--run-dir", "run"], &["local.teacher: ", "expected a pretrained model"]);
    write_model(&folder.path("teacher"), 2);
    refused(&folder, &["train", "--resume", "--run-dir", "run"], &["local.teacher: ", "expected a model with digest"]);
    let tokenizer = folder.path("teacher/tokenizer.json");
    let other = std::fs::read_to_string(&tokenizer).unwrap().replace("<|im_start|>", "<|start|>");
    std::fs::write(&tokenizer, other).unwrap();
    let again = [&["train", "tiny.toml", "--run-dir", "again"], &set[..]].concat();
    let says = ["local.teacher: ", "whose token 256 is \"<|im_start|>\", got \"<|start|>\""];
    refused(&folder, &again, &says);
    let says = "local.teacher: expected none without learner.distill, got \"teacher\"";
    refused(&folder, &[&again[..4], &["--set", "local.teacher=teacher"]].concat(), &[says]);
    assert!(!folder.path("again").exists(), "a refused run leaves nothing");
}

/// Preferences between a run's own answers, relative to the model that it begins with.
#[test]
fn preferences_are_part_of_a_run() {
    const DPO: &str = "learner.dpo={weight=1.0,beta=0.1,per_token=false,updates_per_step=2,cross_entropy=false}";
    let folder = folder();
    let set: Vec<&str> = FEW_ANSWERS.into_iter().chain([DPO]).flat_map(|change| ["--set", change]).collect();
    folder.call(&[&TRAIN[..], &set].concat()).success();
    let rows = metrics(&folder.path("run"));
    let reports: Vec<&Value> = rows.iter().map(|row| &row["dpo"]).filter(|report| report.is_object()).collect();
    assert!(!reports.is_empty(), "some group has right and wrong answers: {rows:?}");
    let first = reports[0]["loss"].as_f64().unwrap();
    assert!((first - 2f64.ln()).abs() < 0.2, "the policy is near its base at first: {reports:?}");
    folder.call(&["replay", "run"]).success();
}

/// A run whose model proposes problems, of sums of one digit so that random weights solve some of them.
const PROPOSES: [&str; 5] = [
    "domains=[{name=\"arithmetic\",share=1.0,levels=[{level=1,weight=1.0}]},\
     {name=\"strings\",share=1.0,levels=[{level=1,weight=1.0}]}]",
    "self_play={bootstrap_steps=1,propose_tasks=6,proposer_loss=\"cross-entropy\",proposer_share=0.2,\
     problems={proposer=0.6,mutation=0.1,archive=0.2,ladder=0.1}}",
    "language.examples=1",
    "exams.names=[]",
    "schedule.num_steps=6",
];

/// Proposals in words are asked for, admitted, tried and kept, and what comes of them does not depend on how the run goes.
#[test]
fn proposals_in_words_are_part_of_a_run() {
    let with = |local: &[&'static str]| {
        let folder = folder();
        let set = [&PROPOSES[..], local].concat().into_iter().flat_map(|change| ["--set", change]);
        folder.call(&TRAIN.into_iter().chain(set).collect::<Vec<_>>()).success();
        folder
    };
    let expected = with(&["local.threads=1", "local.slots=4"]);
    let other = with(&["local.threads=2", "local.slots=64"]);
    other.history().assert_steps_of(&expected.history());
    let replayed = other.call(&["replay", "run"]).success();
    assert!(replayed.stdout.contains("replayed 6 steps"), "{replayed:#?}");

    let rows = metrics(&expected.path("run"));
    let of = |key: &str| -> Vec<u64> { rows.iter().filter_map(|row| row["self_play"][key].as_u64()).collect() };
    let sum = |key: &str| of(key).into_iter().sum::<u64>();
    let archived = of("num_archived");
    assert!(archived[0] > 0 && archived[5] > archived[0], "the archive grows: {archived:?}");
    let counts = ["new", "repeated", "refused", "malformed"].map(|kind| sum(&format!("num_{kind}_proposals")));
    // The first step has measured no niche yet; from then on there are six tasks of eight proposals each.
    assert_eq!(counts.iter().sum::<u64>(), 5 * 6 * 8, "{counts:?}");
    // Under the constraint every proposal is a problem; some that are asked for a sum of one digit are in no exam.
    assert!(counts[0] > 30 && counts[3] == 0, "{counts:?}");
    let tried: u64 = rows
        .iter()
        .flat_map(|row| row["self_play"]["difficulties"].as_array())
        .flatten()
        .filter_map(Value::as_u64)
        .sum();
    assert!(tried > 0, "proposals are posed: {rows:?}");
    let families: Vec<&String> = rows
        .iter()
        .filter_map(|row| row["solved_by_family"].as_object())
        .flat_map(|families| families.keys())
        .collect();
    for family in ["arithmetic proposals", "strings proposals", "arithmetic own", "arithmetic archive"] {
        assert!(families.iter().any(|name| *name == family), "{family}: {families:?}");
    }

    // What was asked for and what came of it can be read.
    let step = expected.call(&["inspect", "run", "--step", "2", "--json"]).success();
    let step: Value = serde_json::from_str(&step.stdout).unwrap();
    assert!(step["groups"][0]["family"].as_str().unwrap().ends_with(" proposals"), "{step}");
    let group = expected.call(&["inspect", "run", "--group", "1/0"]).success();
    let asked = "a problem: sums of one-digit numbers, with a value from ";
    assert!(group.stdout.contains(asked) && group.stdout.contains(" + "), "{group:#?}");

    // Without the constraint random weights write noise, which is refused with a reason.
    let free = with(&["language.constrain=none"]);
    let free_rows = metrics(&free.path("run"));
    let num_malformed =
        free_rows.iter().filter_map(|row| row["self_play"]["num_malformed_proposals"].as_u64()).sum::<u64>();
    assert_eq!(num_malformed, 5 * 6 * 8);
    let group = free.call(&["inspect", "run", "--group", "1/0"]).success();
    assert!(group.stdout.contains("malformed: "), "{group:#?}");
}

/// The policy gradient trains proposals as they were sampled, under the prompt that asked for them.
#[test]
fn proposals_in_words_train_by_policy_gradient() {
    let folder = folder();
    let mut set = PROPOSES.map(|change| change.replace("cross-entropy", "policy-gradient"));
    // Of problems with few answers random weights solve some, and only those reward their proposer.
    set[0] = FEW_ANSWERS[0].to_owned();
    set[4] = "schedule.num_steps=12".to_owned();
    let set = set.iter().flat_map(|change| ["--set", change]);
    folder.call(&TRAIN.into_iter().chain(set).collect::<Vec<_>>()).success();
    let rows = metrics(&folder.path("run"));
    assert!(rows.iter().any(|row| row["proposer"]["num_rollouts"].as_u64() > Some(0)), "{rows:?}");
    assert!(rows.iter().all(|row| row["logprob_mismatch"].as_f64().unwrap_or(0.0) == 0.0), "{rows:?}");
}

#[test]
fn domains_that_cannot_propose_are_refused() {
    let folder = folder();
    std::fs::write(folder.path("mine.jsonl"), "{\"prompt\":\"What is 6 * 7?\",\"answer\":\"42\"}\n".repeat(20))
        .unwrap();
    let own = "domains=[{name=\"arithmetic\",share=1.0,levels=[{level=1,weight=1.0}]},\
               {name=\"file\",path=\"mine.jsonl\",share=1.0}]";
    let set = ["--set", own, "--set", PROPOSES[1], "--set", "exams.names=[]"];
    let says = "self_play.propose_tasks: expected 0 with domain file, whose problems no model can propose, got 6";
    refused(&folder, &[&TRAIN[..], &set].concat(), &[says]);
    // Requests are longer than questions.
    let set = PROPOSES.iter().flat_map(|change| ["--set", *change]).chain(["--set", "model.max_positions=280"]);
    let train: Vec<&str> = TRAIN.into_iter().chain(set).collect();
    refused(&folder, &train, &["arithmetic level 1 needs model.max_positions = ", " for proposals, got 280"]);
    assert!(!folder.path("run").exists(), "a refused run leaves nothing");
}

#[test]
fn an_adapter_learns_on_candle() {
    expect_an_adapter_learns("candle-cpu", Family::Llama, &tiny(), 2);
}

/// All that Qwen3 0.6B has, but its vocabulary.
#[cfg(feature = "cuda")]
#[test]
fn an_adapter_of_qwen_learns_on_a_gpu() {
    let variant = Variant {
        head_dim: Some(128),
        qk_norm: true,
        tied_head: true,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        ..Variant::default()
    };
    let (num_heads, num_kv_heads, num_layers) = (16, 8, 28);
    let config = ModelConfig { d_model: 1024, num_layers, num_heads, num_kv_heads, ff_dim: 3072, variant, ..tiny() };
    expect_an_adapter_learns("cuda", Family::Qwen3, &config, 5);
}

/// Runs the preset for a GPU with random weights of a shape.
fn expect_an_adapter_learns(device: &str, family: Family, model: &ModelConfig, num_steps: u64) {
    let folder = Folder::new();
    write_model_of(&folder.path("model"), family, model, 0);
    let config = format!(
        "preset = \"qwen3-0.6b\"\nmodel = {{ base = \"model\", max_positions = 448 }}\n\
         batch = {{ num_tasks = 6, num_rollouts = 4 }}\nactor.device = \"{device}\"\n\
         learner = {{ device = \"{device}\", update_tokens = 2000 }}\n\
         schedule.num_steps = {num_steps}\nexams.names = []\nlocal.slots = 24\n"
    );
    std::fs::write(folder.path("gpu.toml"), config).unwrap();
    folder.call(&["train", "gpu.toml", "--run-dir", "run"]).success();
    let rows = metrics(&folder.path("run"));
    let mismatch: Vec<f64> = rows.iter().map(|row| row["logprob_mismatch"].as_f64().unwrap()).collect();
    assert!(mismatch.len() as u64 == num_steps && mismatch.iter().all(|mismatch| *mismatch < 1e-4), "{mismatch:?}");
    assert!(rows[0]["num_examples"].as_u64().unwrap() > 0, "hindsight makes examples: {rows:?}");
    assert_ne!(rows[0]["weights_digest"], rows[1]["weights_digest"]);
}

#[test]
fn processes_over_nats_give_the_weights_of_one() {
    for train in [TRAIN, TRAIN_ADAPTER] {
        expect_the_same_over_nats(train);
    }
}

fn expect_the_same_over_nats(train: [&str; 4]) {
    let expected = trained(train, &[]);
    let cluster = Cluster::new();
    write_in(&cluster.folder);
    let learner = cluster.start("learner", &[&train[1..], &HASTE[..]].concat());
    // A worker that has the model elsewhere.
    write_model(&cluster.folder.path("elsewhere"), 0);
    let workers = [
        cluster.start("actor", &[]),
        cluster.start("actor", &["--base", "elsewhere", "--slots", "3"]),
        cluster.start("verifier", &["--base", "elsewhere"]),
    ];
    learner.end().success();
    workers.into_iter().for_each(|worker| drop(worker.end().success()));
    cluster.folder.history().assert_steps_of(&expected);
}

#[test]
fn a_run_is_measured_and_compared_with_its_base() {
    for train in [TRAIN, TRAIN_ADAPTER] {
        expect_measures(train);
    }
}

fn expect_measures(train: [&str; 4]) {
    let folder = folder();
    let ended = folder.call(&train).success();
    assert!(ended.stdout.contains("arithmetic-sum") && !ended.stdout.contains("random legal"), "{ended:#?}");
    let measured =
        folder.call(&["eval", "run", "--exam", "arithmetic-sum", "--split", "dev", "--samples", "2", "--json"]);
    let measured: Value = serde_json::from_str(&measured.success().stdout).unwrap();
    let scores = &measured["scores"];
    assert_eq!((&measured["compared_with"], &scores["num_problems"]), (&json!("pretrained model"), &json!(200)));
    let [trained, before] =
        ["trained", "untrained"].map(|who| scores[who]["greedy_pass_at_1"]["mean"].as_f64().unwrap());
    let difference = scores["paired_greedy"]["difference"].as_f64().unwrap();
    assert!((difference - (trained - before)).abs() < 1e-9, "{scores}");
    let solved = folder.call(&["solve", "run", "--domain", "arithmetic", "4 + 9", "--samples", "1"]).success();
    assert!(solved.stdout.starts_with("4 + 9"), "{solved:#?}");
    let group = folder.call(&["inspect", "run", "--group", "0/0"]).success();
    assert!(group.stdout.contains("<|im_end|>"), "{group:#?}");
    let checkpoint = folder.path("run/checkpoints/step_00000012/model.safetensors");
    let (model, _) = policy::read_weights(&std::fs::read(checkpoint).unwrap(), &[""]).unwrap();
    assert_eq!(model.adapter.is_some(), train == TRAIN_ADAPTER, "the checkpoint holds what was trained, alone");
}

/// What a run keeps on the disk and sends is said before it begins, and refused if the disk has no room for it.
#[test]
fn what_a_run_needs_is_said_before_it_begins() {
    let folder = folder();
    let ended = folder.call(&[&TRAIN[..], &["--steps", "1"]].concat()).success();
    let (_, after) = ended.stdout.split_once("disk: one checkpoint of ").unwrap();
    let said: f64 = after.split_once(" kB kept; ").unwrap().0.parse().unwrap();
    let size = |name: &str| {
        let path = folder.path("run/checkpoints/step_00000001").join(name);
        path.metadata().unwrap().len() as f64 / 1e3
    };
    let stored = size("model.safetensors") + size("optimizer.safetensors");
    assert!((said / stored - 1.0).abs() < 0.05, "{said} kB is about {stored} kB");
    let (_, after) = ended.stdout.split_once("\nevery step publishes ").unwrap();
    let published: f64 = after.split_once(" kB of weights, as F32\n").unwrap().0.parse().unwrap();
    assert!((4.0 * published / said - 1.0).abs() < 0.05, "{published} kB of {said} kB");
    assert!(ended.stdout.contains("\nmemory: 967 kB at least, "), "{ended:#?}");
    let many = ["local.keep_checkpoints=1000000000", "local.checkpoint_every=1", "schedule.num_steps=2000000000"];
    let many = many.iter().flat_map(|change| ["--set", change]);
    let again: Vec<&str> = ["train", "tiny.toml", "--run-dir", "again"].into_iter().chain(many).collect();
    let says = [" of free space for 1000000001 checkpoints of ", "keep fewer (local.keep_checkpoints)"];
    refused(&folder, &again, &says);
    assert!(!folder.path("again").exists(), "a refused run leaves nothing");
    folder.call(&[&again[..], &["--dry-run"]].concat()).success();
}

/// The base of an adapter's run is needed for whatever is done with the run, and it must be the same.
#[test]
fn an_adapter_without_its_base_is_refused() {
    let folder = folder();
    folder.call(&TRAIN_ADAPTER).success();
    std::fs::remove_dir_all(folder.path("model")).unwrap();
    let commands: [&[&str]; 4] = [
        &["train", "--resume", "--run-dir", "run"],
        &["replay", "run"],
        &["eval", "run", "--exam", "arithmetic-sum"],
        &["solve", "run", "--domain", "arithmetic", "4 + 9"],
    ];
    for command in commands {
        refused(&folder, command, &["local.base: ", "expected a pretrained model"]);
    }
    write_model(&folder.path("model"), 1);
    for command in commands {
        refused(&folder, command, &["local.base: ", "expected a model with digest"]);
    }
    let adapter = "model.adapter={rank=4,alpha=8.0}";
    let smoke = ["train", "smoke", "--set", adapter];
    refused(&folder, &smoke, &["model.adapter: expected none in a run without a pretrained model"]);
    for (change, says) in [
        ("model.adapter.rank=0", "model.adapter.rank: expected 1 to 256, got 0"),
        ("model.adapter.alpha=-1", "model.adapter.alpha: expected over 0, up to 1000000, got -1"),
        ("model.adapter.dropout=0.1", "model.adapter.dropout: unknown field"),
    ] {
        refused(&folder, &["train", "lora.toml", "--set", change], &[says]);
    }
}

#[test]
fn a_base_that_is_missing_or_another_is_refused() {
    let folder = folder();
    let set = |key: &'static str| [&TRAIN[..], &["--set", key]].concat();
    for (change, says) in [
        ("model.base=nowhere", &["model.base: nowhere: expected a pretrained model", "found none"][..]),
        ("model.base=tiny.toml", &["tiny.toml: expected"]),
        ("model.d_model=64", &["expected max_positions and adapter alone beside it", "got model.d_model"]),
        ("model.max_positions=2048", &["model.max_positions: expected up to 1024", "got 2048"]),
        ("language.examples=4", &["language.examples: expected 0 to 3, got 4"]),
        ("language.constrain=all", &["language.constrain: unknown variant `all`"]),
    ] {
        refused(&folder, &set(change), says);
        assert!(!folder.path("run").exists(), "{change} leaves nothing");
    }
    folder.call(&TRAIN).success();
    std::fs::rename(folder.path("model"), folder.path("moved")).unwrap();
    refused(&folder, &["train", "--resume", "--run-dir", "run"], &["local.base: ", "expected a pretrained model"]);
    let eval = ["eval", "run", "--exam", "arithmetic-sum", "--split", "dev", "--samples", "1"];
    refused(&folder, &eval, &["local.base: ", "expected a pretrained model"]);
    folder.call(&[&eval[..], &["--base", "moved"]].concat()).success();
    folder.call(&["train", "--resume", "--run-dir", "run", "--set", "local.base=moved"]).success();
    // From now on it is found there.
    folder.call(&["train", "--resume", "--run-dir", "run"]).success();
    std::fs::remove_dir_all(folder.path("moved")).unwrap();
    refused(
        &folder,
        &["train", "--resume", "--run-dir", "run"],
        &["local.base: ", "moved", "expected a pretrained model"],
    );
    write_model(&folder.path("moved"), 1);
    refused(&folder, &["train", "--resume", "--run-dir", "run"], &["local.base: ", "expected a model with digest"]);
}
