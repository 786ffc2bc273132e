//! The first two layers of a real pretrained model, SmolLM2-135M-Instruct, with its tokenizer: five steps have the same digests
//! however they are computed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write as _};
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{Content, Value, write};

use crate::cluster::Cluster;
use crate::fetch::{Elsewhere, has_joined};
use crate::pretrained::model;
use crate::runs::{Folder, HASTE, History, wait_until};

const NUM_STEPS: u64 = 5;
const NUM_LAYERS: u32 = 2;

const TRAIN: [&str; 4] = ["train", "cut.toml", "--run-dir", "run"];

/// Writes the first layers of a network of the family llama.
fn cut(from: &Path, to: &Path) {
    let mut file = BufReader::new(File::open(from).unwrap());
    let content = Content::read(&mut file).unwrap();
    let mut metadata: BTreeMap<&str, &Value> =
        content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let num_layers = Value::U32(NUM_LAYERS);
    metadata.insert("llama.block_count", &num_layers).expect("the number of layers");
    let layer_of = |name: &str| name.strip_prefix("blk.")?.split('.').next()?.parse::<u32>().ok();
    let names = content.tensor_infos.keys().filter(|name| layer_of(name).is_none_or(|layer| layer < NUM_LAYERS));
    let tensors: BTreeMap<&str, QTensor> =
        names.map(|name| (name.as_str(), content.tensor(&mut file, name, &Device::Cpu).unwrap())).collect();
    let mut out = BufWriter::new(File::create(to).unwrap());
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    write(&mut out, &metadata.into_iter().collect::<Vec<_>>(), &tensors).unwrap();
    out.flush().unwrap();
}

fn write_in(folder: &Folder) {
    cut(&model(), &folder.path("cut.gguf"));
    // Every process looks for the model in its own folder. Two layers know nothing: some of their answers are right where there
    // are few, and all of them are likely.
    let config = "preset = \"smollm2\"\nmodel = { base = \"/proc/self/cwd/cut.gguf\", max_positions = 128 }\n\
                  batch = { num_tasks = 4, num_rollouts = 4 }\nschedule = { num_steps = 5, warmup_steps = 1 }\n\
                  actor.temperature = 4.0\n\
                  domains = [{ name = \"comparison\", share = 1.0, levels = [{ level = 1, weight = 1.0 }] }]\n\
                  exams.names = []\n";
    std::fs::write(folder.path("cut.toml"), config).unwrap();
}

fn trained(set: &[&str]) -> History {
    let folder = Folder::new();
    write_in(&folder);
    let set = set.iter().flat_map(|change| ["--set", change]);
    folder.call(&TRAIN.into_iter().chain(set).collect::<Vec<_>>()).success();
    folder.history()
}

#[test]
fn five_steps_have_the_same_digests_however_they_are_computed() {
    let expected = trained(&["local.threads=1", "local.slots=4"]);
    assert_eq!(expected.steps.len() as u64, NUM_STEPS);
    let first_and_last = [0, NUM_STEPS as usize - 1].map(|step| &expected.steps[step][0]);
    assert_ne!(first_and_last[0], first_and_last[1], "weights change");
    trained(&["local.threads=2", "local.slots=64"]).assert_steps_of(&expected);

    // Two actors, of which one lacks the model and the other one is killed, and a learner that is killed.
    let cluster = Cluster::new();
    write_in(&cluster.folder);
    let learner = cluster.start("learner", &[&TRAIN[1..], &HASTE[..]].concat());
    let verifier = cluster.start("verifier", &[]);
    let elsewhere = Elsewhere::new();
    let fetches = elsewhere.start(&cluster, "actor", &["--threads", "1"]);
    wait_until("the actor without the model to join", || has_joined(&fetches));
    assert!(fetches.said_so_far().contains("fetched the pretrained model "), "{}", fetches.said_so_far());
    let actor = cluster.start("actor", &["--slots", "3"]);
    wait_until("step 1", || cluster.folder.last_step() >= 1);
    actor.kill();
    wait_until("step 2", || cluster.folder.last_step() >= 2);
    learner.kill();
    assert!(cluster.folder.last_step() < NUM_STEPS, "the kill finds the process alive");
    let resumed = cluster.start("learner", &[&["--resume", "--run-dir", "run"], &HASTE[..]].concat());
    resumed.end().success();
    cluster.folder.history().assert_steps_of(&expected);
    for worker in [fetches, verifier] {
        worker.end().success();
    }
}
