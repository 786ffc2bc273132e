//! Networks of every family compute what Hugging Face transformers computes. `tests/reference/reference.py` made the tiny
//! checkpoints, their logits and their gradients.

use std::collections::BTreeMap;
use std::path::Path;

use policy::formats::{Companions, Pretrained, StoredType, write_hf};
use policy::{
    Backend, CrossEntropy, Device, Division, Feed, LossBatch, ModelConfig, OptimizerStep, Params, Sequence,
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

fn backends() -> [Backend; 2] {
    [Device::Cpu, Device::CandleCpu].map(|device| device.open().unwrap())
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
    let file = SafeTensors::deserialize(&bytes).unwrap();
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
