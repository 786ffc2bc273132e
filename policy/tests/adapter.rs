//! Adapters: what is played and trained with frozen weights and an adapter is what a network with both merged computes.

use std::path::Path;

use policy::formats::write_peft;
use policy::{
    Adapter, Backend, CrossEntropy, Device, Division, Feed, LossBatch, ModelConfig, OptimizerStep, Params, RopeScaling,
    Sequence, Trainer, TrainingState, Variant, masked_logprob, merge_adapter, read_weights, write_weights,
};
use proto::{CounterRng, LegalTokens, Purpose, TokenId};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// Returns a plain network and one with every switch of a family, with adapters of several ranks.
fn configs() -> Vec<ModelConfig> {
    let scaling = RopeScaling { factor: 4.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_positions: 32 };
    let all = Variant {
        head_dim: Some(32),
        qkv_bias: true,
        qk_norm: true,
        tied_head: true,
        rms_norm_eps: 1e-3,
        rope_theta: 50.0,
        rope_scaling: Some(scaling),
        no_rope_layers: vec![1],
        windows: vec![Some(5), None],
    };
    let config = |variant, rank, rslora| ModelConfig {
        vocabulary_size: 24,
        max_positions: 40,
        d_model: 64,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        ff_dim: 48,
        variant,
        adapter: Some(Adapter { rank, alpha: 4.0, rslora }),
    };
    let plain = Variant::default;
    vec![config(plain(), 1, false), config(plain(), 20, false), config(all, 3, true)]
}

/// Returns frozen weights whose head is large enough that no gradient is lost in rounding, and an adapter with B away from 0.
fn weights(config: &ModelConfig) -> (Params, Params) {
    let mut base = Params::init(&config.base(), 1);
    let factor = if config.variant.tied_head { 3.0 } else { 20.0 };
    base.tensors.last_mut().unwrap().iter_mut().for_each(|weight| *weight *= factor);
    let mut adapter = Params::init(config, 2);
    let mut rng = CounterRng::new(0, Purpose::Init, 9, 9, 9);
    adapter.tensors.iter_mut().skip(1).step_by(2).flatten().for_each(|b| *b = 0.2 * (rng.unit_f64() as f32 - 0.5));
    (base, adapter)
}

/// Returns sequences with more rows than one chunk holds; some begin alike.
fn sequences() -> Vec<Sequence> {
    (0..24)
        .map(|number: usize| {
            let (len, start) = (3 + number * 7 % 37, number % 2);
            let tokens: Vec<TokenId> = (0..len).map(|index| ((index + start) * 5 % 20) as TokenId).collect();
            let choices = (0..len - 2).filter(|position| (position + number) % 3 != 1).map(|position| {
                let legal = (0..20)
                    .filter(|token| *token == tokens[position + 2] || !(*token as usize + position).is_multiple_of(4))
                    .collect();
                (position, if number % 7 == 3 { LegalTokens::Any } else { legal })
            });
            Sequence::new(&tokens[..2], &tokens[2..], choices)
        })
        .filter(|sequence| !sequence.chosen.is_empty())
        .collect()
}

fn backends(config: &ModelConfig, base: &Params) -> Vec<Backend> {
    let gpu = cfg!(feature = "cuda").then_some(Device::Cuda(0));
    let devices = [Device::Cpu, Device::CandleCpu].into_iter().chain(gpu);
    devices.map(|device| device.open().unwrap().with_base(config, base.clone()).unwrap()).collect()
}

fn trainer(backend: &Backend, config: &ModelConfig, adapter: &Params, division: Division) -> Box<dyn Trainer> {
    backend.trainer(config, TrainingState::from_weights(config, adapter.clone()), division).unwrap()
}

const DIVISION: Division = Division { num_shards: 3, num_threads: 2 };

/// A step whose first moment is exactly the gradient.
const KEEPING: OptimizerStep = OptimizerStep {
    learning_rate: 1e-3,
    beta1: 0.0,
    beta2: 0.0,
    weight_decay: 0.1,
    max_grad_norm: f64::INFINITY,
    average_decay: 0.9,
};

/// Returns the loss, and the gradient.
fn pass(trainer: &mut dyn Trainer, sequences: &[Sequence]) -> (f64, Params) {
    let losses: Vec<CrossEntropy> =
        (0..sequences.len()).map(|index| CrossEntropy { weight: [0.1, 0.025, -0.05][index % 3] }).collect();
    let mut batch = LossBatch::default();
    sequences.iter().zip(&losses).for_each(|(sequence, loss)| batch.push([sequence], loss));
    let scores = trainer.gradients(&batch).unwrap();
    trainer.step(&KEEPING).unwrap();
    (batch.value(&scores), trainer.export().unwrap().first.clone())
}

fn assert_close(got: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
    assert!(scale > 0.0, "{what}: nothing to compare");
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= tolerance * scale, "{what}[{index}]: expected {expected}, got {got}");
    }
}

/// The kernels merge the adapter, candle applies it beside the frozen weights.
#[test]
fn what_is_merged_computes_what_is_applied() {
    for config in configs() {
        let (base, adapter) = weights(&config);
        let tokens: Vec<TokenId> = (0..30).map(|index| index * 7 % 24).collect();
        let logits = |backend: &Backend, config: &ModelConfig, params: &Params| {
            let mut policy = backend.load(config, params).unwrap().policy(1).unwrap();
            policy.feed(&[Feed { slot: 0, tokens: &tokens }]).unwrap();
            policy.logits().unwrap().to_vec()
        };
        let frozen = logits(&Backend::Cpu, &config.base(), &base);
        let merged = logits(&Backend::Cpu, &config.base(), &merge_adapter(&config, base.clone(), &adapter));
        assert!(merged.iter().zip(&frozen).any(|(merged, frozen)| (merged - frozen).abs() > 1e-2));
        for backend in backends(&config, &base) {
            let got = logits(&backend, &config, &adapter);
            if backend.num_playing_threads(2) == 2 {
                assert_eq!(got, merged, "the kernels merge");
                assert_eq!(logits(&backend, &config, &Params::init(&config, 5)), frozen, "B = 0 changes no bit");
            } else {
                assert_close(&got, &merged, 1e-5, "applied");
                assert_close(&logits(&backend, &config, &Params::init(&config, 5)), &frozen, 1e-5, "B = 0");
            }
        }
    }
}

/// Actor and learner have the same log-probabilities, to the last bit, token by token and all at once.
#[test]
fn play_and_training_have_the_same_bits() {
    for config in configs() {
        let (base, adapter) = weights(&config);
        let [actor, learner] = [(); 2].map(|()| Backend::Cpu.with_base(&config, base.clone()).unwrap());
        let trainer = trainer(&learner, &config, &adapter, DIVISION);
        for sequence in &sequences() {
            let mut policy = actor.load(&config, &adapter).unwrap().policy(1).unwrap();
            let mut played = Vec::new();
            for (row, token) in sequence.tokens.iter().enumerate() {
                policy.feed(&[Feed { slot: 0, tokens: &[*token] }]).unwrap();
                let chosen = sequence.chosen.iter().filter(|chosen| chosen.row == row);
                let logits = policy.logits().unwrap();
                played.extend(chosen.map(|chosen| masked_logprob(&logits, &chosen.legal, chosen.target)));
            }
            assert_eq!(trainer.logprobs(&[sequence]).unwrap(), played);
        }
    }
}

#[test]
fn every_backend_has_the_gradient_of_an_adapter() {
    for config in configs() {
        let (base, adapter) = weights(&config);
        let sequences = sequences();
        let pass_on = |backend: &Backend| pass(trainer(backend, &config, &adapter, DIVISION).as_mut(), &sequences);
        let passes: Vec<(f64, Params)> = backends(&config, &base).iter().map(pass_on).collect();
        let (expected_loss, expected) = &passes[0];
        for (loss, gradient) in &passes[1..] {
            assert!((loss - expected_loss).abs() < 1e-4 * expected_loss.abs(), "{loss}, expected {expected_loss}");
            for ((got, expected), spec) in gradient.tensors.iter().zip(&expected.tensors).zip(config.tensors()) {
                assert_close(got, expected, 1e-4, &spec.name);
            }
        }
        // Along the gradient, the slope of the loss is the gradient's norm.
        let backend = Backend::Cpu.with_base(&config, base.clone()).unwrap();
        for (index, spec) in config.tensors().iter().enumerate() {
            let gradient = &expected.tensors[index];
            let norm: f64 = gradient.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 1e-4, "{}: gradient {norm}", spec.name);
            let shifted = |by: f64| {
                let mut adapter = adapter.clone();
                for (weight, slope) in adapter.tensors[index].iter_mut().zip(gradient) {
                    *weight += (by / norm * f64::from(*slope)) as f32;
                }
                pass(trainer(&backend, &config, &adapter, DIVISION).as_mut(), &sequences).0
            };
            let difference = (shifted(1e-2) - shifted(-1e-2)) / 2e-2;
            assert!((difference / norm - 1.0).abs() < 2e-2, "{}: gradient {norm}, difference {difference}", spec.name);
        }
    }
}

/// At B = 0 the gradient of A is 0 and that of B is not: the first step moves B alone.
#[test]
fn an_adapter_begins_to_move_at_b() {
    let config = &configs()[1];
    let (base, _) = weights(config);
    let adapter = Params::init(config, 3);
    let bound = 1.0 / (config.d_model as f32).sqrt();
    let largest = adapter.tensors[0].iter().fold(0f32, |max, value| max.max(value.abs()));
    assert!(largest <= bound && largest > 0.95 * bound, "A is uniform within {bound}: {largest}");
    for backend in backends(config, &base) {
        let (_, gradient) = pass(trainer(&backend, config, &adapter, DIVISION).as_mut(), &sequences());
        for pair in gradient.tensors.chunks_exact(2) {
            assert!(pair[0].iter().all(|slope| *slope == 0.0) && pair[1].iter().any(|slope| *slope != 0.0));
        }
    }
}

#[test]
fn threads_change_no_bit_of_an_adapter() {
    for config in configs() {
        let (base, adapter) = weights(&config);
        let backend = Backend::Cpu.with_base(&config, base).unwrap();
        let trained = |num_shards, num_threads| {
            let mut trainer = trainer(&backend, &config, &adapter, Division { num_shards, num_threads });
            (0..3).for_each(|_| drop(pass(trainer.as_mut(), &sequences())));
            trainer.export().unwrap().into_owned()
        };
        let expected = trained(4, 1);
        assert_eq!(trained(4, 2), expected);
        assert_eq!(trained(4, 7), expected);
        assert_ne!(trained(1, 1).weights, expected.weights, "shards are part of the result");
    }
}

/// What is stored, sent and hashed is the adapter alone, with the scale in the config beside it.
#[test]
fn an_adapter_is_stored_alone() {
    let config = &configs()[1];
    let (_, adapter) = weights(config);
    let (same_config, sets) = read_weights(&write_weights(config, &[("", &adapter)]), &[""]).unwrap();
    assert_eq!((&same_config, &sets[0]), (config, &adapter));
    // By hand: width 64, queries 64, keys and values 32 each, feed-forward 48; two blocks of rank 20.
    let num_trained = 2 * 20 * (128 + 96 + 96 + 128 + 112 + 112 + 112);
    let num_frozen = 2 * 24 * 64 + 64 + 2 * (64 * 128 + 64 * 64 + 64 * 96 + 48 * 64 + 2 * 64);
    assert_eq!((config.num_trained(), config.num_parameters()), (num_trained, num_frozen + num_trained));
    assert_eq!((config.base().num_trained(), config.base().num_parameters()), (num_frozen, num_frozen));
}

#[test]
fn an_adapter_without_its_base_is_refused() {
    let config = &configs()[0];
    let (base, adapter) = weights(config);
    let refusal = |backend: &Backend, config: &ModelConfig, params: &Params| {
        let state = TrainingState::from_weights(config, params.clone());
        let refused = backend.load(config, params).unwrap_err().to_string();
        assert_eq!(backend.trainer(config, state, DIVISION).map(drop).unwrap_err().to_string(), refused);
        refused
    };
    let other = ModelConfig { variant: Variant { rope_theta: 7.0, ..config.variant.clone() }, ..config.clone() };
    let longer = ModelConfig { max_positions: 64, ..config.clone() };
    for device in [Device::Cpu, Device::CandleCpu] {
        let plain = device.open().unwrap();
        let says = "weights: expected the frozen weights that the adapter changes, got ";
        assert_eq!(refusal(&plain, config, &adapter), format!("{says}none"));
        let with_base = plain.with_base(config, base.clone()).unwrap();
        assert_eq!(refusal(&with_base, &other, &adapter), format!("{says}those of another network"));
        let says = "weights: expected an adapter of the frozen weights, got a whole network";
        assert_eq!(refusal(&with_base, &config.base(), &base), says);
        assert!(with_base.load(&longer, &adapter).is_ok(), "weights do not depend on the number of positions");
        let refused = plain.with_base(config, adapter.clone()).unwrap_err().to_string();
        assert!(refused.starts_with("weights: expected the 15 tensors of the network"), "{refused}");
    }
}

#[test]
fn adapters_out_of_range_are_refused() {
    let config = &configs()[0];
    for (adapter, says) in [
        (Adapter { rank: 0, alpha: 1.0, rslora: false }, "model.adapter.rank: expected 1 to 256, got 0"),
        (Adapter { rank: 257, alpha: 1.0, rslora: false }, "model.adapter.rank: expected 1 to 256, got 257"),
        (Adapter { rank: 1, alpha: 0.0, rslora: false }, "model.adapter.alpha: expected over 0, up to 1000000, got 0"),
        (
            Adapter { rank: 1, alpha: f64::NAN, rslora: false },
            "model.adapter.alpha: expected over 0, up to 1000000, got NaN",
        ),
    ] {
        let config = ModelConfig { adapter: Some(adapter), ..config.clone() };
        assert_eq!(config.validate().unwrap_err().to_string(), says);
    }
    let scale = |rslora| Adapter { rank: 16, alpha: 32.0, rslora }.scale();
    assert_eq!((scale(false), scale(true)), (2.0, 8.0));
}

/// PEFT's matrices are `[outputs, inputs]`, and an adapter's product of them is the change of the weights.
#[test]
fn files_of_peft_hold_the_adapter() {
    let config = &configs()[2];
    let (base, adapter) = weights(config);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    write_peft(&path, config, &adapter, "a/model").unwrap();
    let described: Value = serde_json::from_slice(&std::fs::read(path.join("adapter_config.json")).unwrap()).unwrap();
    let modules = json!(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]);
    for (key, expected) in [
        ("peft_type", json!("LORA")),
        ("task_type", json!("CAUSAL_LM")),
        ("base_model_name_or_path", json!("a/model")),
        ("r", json!(3)),
        ("lora_alpha", json!(4)),
        ("use_rslora", json!(true)),
        ("use_dora", json!(false)),
        ("bias", json!("none")),
        ("target_modules", modules),
    ] {
        assert_eq!(described[key], expected, "{key}");
    }
    let bytes = std::fs::read(path.join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 2 * 14);
    let read = |name: &str| {
        let tensor = file.tensor(name).unwrap();
        let values = tensor.data().as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect::<Vec<_>>();
        (tensor.shape().to_vec(), values)
    };
    let merged = merge_adapter(config, base.clone(), &adapter);
    let index_of = |name: &str| config.base_tensors().iter().position(|spec| spec.name == name).unwrap();
    // Module, our matrix, its width, the first column and the number of columns.
    let modules = [
        ("self_attn.q_proj", "attention.qkv", 256, 0, 128),
        ("self_attn.k_proj", "attention.qkv", 256, 128, 64),
        ("self_attn.v_proj", "attention.qkv", 256, 192, 64),
        ("self_attn.o_proj", "attention.out", 64, 0, 64),
        ("mlp.gate_proj", "mlp.gate_up", 96, 0, 48),
        ("mlp.up_proj", "mlp.gate_up", 96, 48, 48),
        ("mlp.down_proj", "mlp.down", 64, 0, 64),
    ];
    let scale = 4.0 / 3f32.sqrt();
    for layer in 0..2 {
        for (module, matrix, width, first, outputs) in modules {
            let name = |part: &str| format!("base_model.model.model.layers.{layer}.{module}.{part}.weight");
            let ((a_shape, a), (b_shape, b)) = (read(&name("lora_A")), read(&name("lora_B")));
            let index = index_of(&format!("layers.{layer}.{matrix}.weight"));
            let inputs = base.tensors[index].len() / width;
            assert_eq!((a_shape, b_shape), (vec![3, inputs], vec![outputs, 3]), "{module}");
            for (input, output) in [(0, 0), (1, outputs - 1), (inputs - 1, outputs / 3)] {
                let place = input * width + first + output;
                let change = merged.tensors[index][place] - base.tensors[index][place];
                let expected: f32 = (0..3).map(|rank| scale * b[output * 3 + rank] * a[rank * inputs + input]).sum();
                assert!((change - expected).abs() < 1e-5 && expected != 0.0, "{module}: {change}, expected {expected}");
            }
        }
    }
    let again = write_peft(&path, config, &adapter, "a/model").unwrap_err().to_string();
    assert!(again.ends_with("expected an empty folder or none, got a folder with files"), "{again}");
    assert!(!Path::new(&path.with_extension("0.partial")).exists());
}
