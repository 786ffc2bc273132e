//! Networks of every family compute what Hugging Face transformers computes. `tests/reference/reference.py` made the tiny
//! checkpoints, their logits and their gradients.

use std::collections::BTreeMap;
use std::path::Path;

use policy::formats::{Companions, Pretrained, StoredType, write_hf, write_peft};
use policy::{
    Adapter, Backend, CrossEntropy, Device, Division, Feed, LossBatch, ModelConfig, OptimizerStep, Params, Sequence,
    TrainingState,
};
use proto::{LegalTokens, TokenId};
use safetensors::SafeTensors;

#[derive(serde::Deserialize)]
struct Reference {
    tokens: Vec<TokenId>,
    /// `[T, V]`
    logits: Vec<f32>,
    /// Of every token after the first.
    logprobs: Vec<f32>,
    /// Of the mean log-probability, by tensor: its norm, and its sum with alternating signs.
    gradients: BTreeMap<String, [f32; 2]>,
}

/// Returns each family's name, checkpoint and reference.
fn families() -> Vec<(&'static str, Pretrained, Reference)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference");
    let names = ["llama", "smollm2", "smollm3", "qwen2", "qwen3", "mistral"];
    names
        .map(|name| {
            let reference = std::fs::read_to_string(folder.join(format!("{name}.json"))).unwrap();
            (name, Pretrained::open(&folder.join(name)).unwrap(), serde_json::from_str(&reference).unwrap())
        })
        .into()
}

fn backends() -> Vec<Backend> {
    let gpu = cfg!(feature = "cuda").then_some(Device::Cuda(0));
    [Device::Cpu, Device::CandleCpu].into_iter().chain(gpu).map(|device| device.open().unwrap()).collect()
}

fn assert_close(got: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= tolerance, "{what}[{index}]: expected {expected}, got {got}");
    }
}

#[test]
fn logits_are_those_of_transformers_at_once_and_token_by_token() {
    for (name, pretrained, reference) in families() {
        let (config, params) = (pretrained.config(), pretrained.load().unwrap());
        let rows = reference.logits.chunks_exact(config.vocabulary_size);
        for backend in backends() {
            let mut policy = backend.load(config, &params).unwrap().policy(2).unwrap();
            for (position, (token, expected)) in reference.tokens.iter().zip(rows.clone()).enumerate() {
                policy.feed(&[Feed { slot: 1, tokens: &[*token] }]).unwrap();
                assert_close(&policy.logits().unwrap(), expected, 1e-3, &format!("{name}, token {position}"));
            }
            policy.feed(&[Feed { slot: 0, tokens: &reference.tokens }]).unwrap();
            assert_close(&policy.logits().unwrap(), rows.clone().last().unwrap(), 1e-3, &format!("{name}, at once"));
        }
    }
}

/// The loss is the mean log-probability, so its gradient is that of the reference. A step whose first moment is the gradient shows
/// it, and a checkpoint of that moment has the gradients by the names of transformers.
#[test]
fn gradients_are_those_of_torch() {
    for (name, pretrained, reference) in families() {
        let (config, params) = (pretrained.config(), pretrained.load().unwrap());
        let num_choices = reference.tokens.len() - 1;
        let choices = (0..num_choices).map(|position| (position, LegalTokens::Any));
        let sequence = Sequence::new(&reference.tokens[..1], &reference.tokens[1..], choices);
        let loss = CrossEntropy { weight: -1.0 / num_choices as f32 };
        let mut batch = LossBatch::default();
        batch.push([&sequence], &loss);
        for backend in backends() {
            let state = TrainingState { weights: params.clone(), ..TrainingState::initial(config, 0) };
            let mut trainer = backend.trainer(config, state, Division { num_shards: 1, num_threads: 1 }).unwrap();
            assert_close(&trainer.logprobs(&[&sequence]).unwrap(), &reference.logprobs, 1e-3, name);
            trainer.gradients(&batch).unwrap();
            trainer.step(&KEEPING).unwrap();
            expect_gradients(name, &pretrained, config, &trainer.export().unwrap().first, &reference);
        }
    }
}

const KEEPING: OptimizerStep = OptimizerStep {
    learning_rate: 0.0,
    beta1: 0.0,
    beta2: 0.0,
    weight_decay: 0.0,
    max_grad_norm: f64::INFINITY,
    average_decay: 0.0,
};

fn expect_gradients(
    name: &str,
    pretrained: &Pretrained,
    config: &ModelConfig,
    gradient: &Params,
    reference: &Reference,
) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("gradient");
    write_hf(&out, config, pretrained.family(), gradient, StoredType::F32, Companions::default()).unwrap();
    let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
    expect_values(name, &bytes, reference);
}

fn expect_values(name: &str, bytes: &[u8], reference: &Reference) {
    let file = SafeTensors::deserialize(bytes).unwrap();
    assert_eq!(file.len(), reference.gradients.len(), "{name}");
    for (tensor, expected) in &reference.gradients {
        let (words, _) = file.tensor(tensor).unwrap().data().as_chunks::<4>();
        let values: Vec<f64> = words.iter().map(|word| f64::from(f32::from_le_bytes(*word))).collect();
        let norm = values.iter().map(|value| value * value).sum::<f64>().sqrt();
        let signed: f64 = values.iter().zip([1.0, -1.0].into_iter().cycle()).map(|(value, sign)| value * sign).sum();
        let tolerance = 1e-3 * expected[0];
        assert!(expected[0] > 1e-4, "{name} {tensor}: nothing to compare");
        assert_close(&[norm as f32, signed as f32], expected, tolerance, &format!("{name} {tensor}"));
    }
}

/// An adapter that PEFT made computes what PEFT computes, has the gradients of torch, and is written as PEFT wrote it.
#[test]
fn an_adapter_is_that_of_peft() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference");
    let pretrained = Pretrained::open(&folder.join("llama")).unwrap();
    let config =
        ModelConfig { adapter: Some(Adapter { rank: 3, alpha: 6.0, rslora: true }), ..pretrained.config().clone() };
    let bytes = std::fs::read(folder.join("llama-lora/adapter_model.safetensors")).unwrap();
    let adapter = read_adapter(&config, &bytes);
    let text = std::fs::read_to_string(folder.join("llama-lora.json")).unwrap();
    let reference: Reference = serde_json::from_str(&text).unwrap();
    let num_choices = reference.tokens.len() - 1;
    let choices = (0..num_choices).map(|position| (position, LegalTokens::Any));
    let sequence = Sequence::new(&reference.tokens[..1], &reference.tokens[1..], choices);
    let loss = CrossEntropy { weight: -1.0 / num_choices as f32 };
    let mut batch = LossBatch::default();
    batch.push([&sequence], &loss);
    let written = tempfile::tempdir().unwrap();
    for (number, backend) in backends().into_iter().enumerate() {
        let backend = backend.with_base(&config, pretrained.load().unwrap()).unwrap();
        let mut policy = backend.load(&config, &adapter).unwrap().policy(1).unwrap();
        for (token, expected) in reference.tokens.iter().zip(reference.logits.chunks_exact(config.vocabulary_size)) {
            policy.feed(&[Feed { slot: 0, tokens: &[*token] }]).unwrap();
            assert_close(&policy.logits().unwrap(), expected, 1e-3, "logits");
        }
        let state = TrainingState::from_weights(&config, adapter.clone());
        let mut trainer = backend.trainer(&config, state, Division { num_shards: 1, num_threads: 1 }).unwrap();
        trainer.gradients(&batch).unwrap();
        trainer.step(&KEEPING).unwrap();
        let out = written.path().join(format!("gradient-{number}"));
        write_peft(&out, &config, &trainer.export().unwrap().first, "llama").unwrap();
        expect_values("adapter", &std::fs::read(out.join("adapter_model.safetensors")).unwrap(), &reference);
    }
    let out = written.path().join("adapter");
    write_peft(&out, &config, &adapter, "llama").unwrap();
    let own = std::fs::read(out.join("adapter_model.safetensors")).unwrap();
    let (own, expected) = (SafeTensors::deserialize(&own).unwrap(), SafeTensors::deserialize(&bytes).unwrap());
    assert_eq!(own.len(), expected.len());
    for (name, expected) in expected.iter() {
        assert_eq!(own.tensor(name).unwrap(), expected, "{name}");
    }
    let [own, expected] = [&out, &folder.join("llama-lora")].map(|folder| {
        let bytes = std::fs::read(folder.join("adapter_config.json")).unwrap();
        serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&bytes).unwrap()
    });
    for (key, value) in own {
        assert_eq!(Some(&value), expected.get(&key), "{key}");
    }
}

/// Reads the tensors of PEFT in our order; ours are their transposes.
fn read_adapter(config: &ModelConfig, bytes: &[u8]) -> Params {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let read = |layer: usize, module: &str, matrix: &str| {
        let tensor = file.tensor(&format!("base_model.model.model.layers.{layer}.{module}.{matrix}.weight")).unwrap();
        let (words, _) = tensor.data().as_chunks::<4>();
        let (rows, columns) = (tensor.shape()[0], tensor.shape()[1]);
        (0..rows * columns).map(|index| f32::from_le_bytes(words[index % rows * columns + index / rows])).collect()
    };
    let modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"];
    let modules = modules.into_iter().chain(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]);
    let pairs =
        |layer| modules.clone().flat_map(move |module| ["lora_A", "lora_B"].map(|matrix| (layer, module, matrix)));
    let tensors = (0..config.num_layers).flat_map(pairs).map(|(layer, module, matrix)| read(layer, module, matrix));
    Params { tensors: tensors.collect() }
}
