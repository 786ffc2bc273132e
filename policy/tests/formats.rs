//! Pretrained networks: what is written is read again, what other programs write is read as they mean it, and what is wrong is
//! refused with a reason, without a panic and without memory that only a lying file asks for.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use peak_alloc::PeakAlloc;
use policy::formats::{Companions, Family, FormatError, Pretrained, StoredType, write_hf};
use policy::{ModelConfig, Params, RopeScaling, Variant};
use proptest::prelude::*;
use proto::{CounterRng, Purpose};
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// Counts for all tests at once: they run in threads of one process, and none needs much.
#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const FAMILIES: [Family; 5] = [Family::Llama, Family::SmolLm3, Family::Qwen2, Family::Qwen3, Family::Mistral];
/// Families whose GGUF files interleave the halves of query and key heads.
const INTERLEAVED: [Family; 2] = [Family::Llama, Family::SmolLm3];

const LLAMA3: RopeScaling =
    RopeScaling { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_positions: 8_192 };

/// Returns a network that does everything that its family can.
fn config(family: Family) -> ModelConfig {
    let mut variant = Variant { rms_norm_eps: 1e-5, rope_theta: 500_000.0, ..Variant::default() };
    match family {
        Family::Llama => variant.rope_scaling = Some(LLAMA3),
        Family::SmolLm3 => {
            (variant.tied_head, variant.no_rope_layers, variant.windows) = (true, vec![1], vec![None, Some(8)]);
        }
        Family::Qwen2 => {
            (variant.qkv_bias, variant.tied_head, variant.windows) = (true, true, vec![None, Some(6)]);
        }
        Family::Qwen3 => (variant.qk_norm, variant.head_dim) = (true, Some(32)),
        Family::Mistral => (variant.head_dim, variant.windows) = (Some(32), vec![Some(7); 2]),
    }
    ModelConfig {
        vocabulary_size: 11,
        max_positions: 64,
        d_model: 32,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        ff_dim: 64,
        variant,
        adapter: None,
    }
}

/// Draws weights of which no two are equal, norms included.
fn draw(config: &ModelConfig) -> Params {
    let mut rng = CounterRng::new(7, Purpose::Init, 1, 2, 3);
    let mut params = Params::zeros(config);
    params.tensors.iter_mut().flatten().for_each(|weight| *weight = rng.unit_f64() as f32 - 0.5);
    params
}

/// Returns the index in [`Params`] of a tensor.
fn index_of(config: &ModelConfig, name: &str) -> usize {
    config.tensors().iter().position(|spec| spec.name == name).unwrap()
}

fn written(family: Family, stored_type: StoredType) -> (TempDir, ModelConfig, Params) {
    let (folder, config) = (tempfile::tempdir().unwrap(), config(family));
    let params = draw(&config);
    write_hf(folder.path(), &config, family, &params, stored_type, Companions::default()).unwrap();
    (folder, config, params)
}

fn set_keys(path: &Path, keys: &Value) {
    let mut config: Map<String, Value> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    config.extend(keys.as_object().unwrap().clone());
    fs::write(path, serde_json::to_vec(&config).unwrap()).unwrap();
}

/// Opens and loads what is to be refused, and checks the message.
fn assert_refused(path: &Path, expected: &str) {
    let error = Pretrained::open(path).and_then(|pretrained| pretrained.load()).expect_err(expected);
    let message = error.to_string();
    assert!(message.starts_with(&path.display().to_string()), "{message}");
    assert!(message.contains(": expected ") && message.contains(", got "), "{message}");
    assert!(message.contains(expected), "{message:?} for {expected:?}");
}

#[test]
fn every_family_is_read_as_it_was_written() {
    for family in FAMILIES {
        let (folder, config, params) = written(family, StoredType::F32);
        let pretrained = Pretrained::open(folder.path()).unwrap();
        assert_eq!((pretrained.config(), pretrained.family()), (&config, family));
        assert_eq!(pretrained.load().unwrap(), params, "{family}");
        assert_eq!(pretrained.path(), folder.path());
        assert!(pretrained.gguf().is_none() && pretrained.end_tokens().is_empty());
        let file = folder.path().join("model.safetensors");
        assert_eq!(pretrained.size_bytes(), file.metadata().unwrap().len());
        let num_tensors = SafeTensors::deserialize(&fs::read(file).unwrap()).unwrap().len();
        assert_eq!(pretrained.stored_types(), BTreeMap::from([("F32", num_tensors)]));
    }
}

#[test]
fn written_tensors_have_the_names_and_the_orientation_of_transformers() {
    let (folder, config, params) = written(Family::Qwen2, StoredType::F32);
    let bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |name: &str| {
        let tensor = file.tensor(name).unwrap();
        let values = tensor.data().as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect::<Vec<_>>();
        (tensor.shape().to_vec(), values)
    };
    let ours = |name: &str| &params.tensors[index_of(&config, name)];
    assert_eq!(read("model.embed_tokens.weight"), (vec![11, 32], ours("embed.weight").clone()));
    assert!(file.tensor("lm_head.weight").is_err());
    // Queries are 32 wide, keys and values 16.
    let (shape, keys) = read("model.layers.1.self_attn.k_proj.weight");
    assert_eq!(shape, [16, 32]);
    let (row, column) = (5, 9);
    assert_eq!(keys[row * 32 + column], ours("layers.1.attention.qkv.weight")[column * 64 + 32 + row]);
    assert_eq!(read("model.layers.1.self_attn.v_proj.bias").1, ours("layers.1.attention.qkv.bias")[48..]);
    let (shape, up) = read("model.layers.0.mlp.up_proj.weight");
    assert_eq!(shape, [64, 32]);
    assert_eq!(up[row * 32 + column], ours("layers.0.mlp.gate_up.weight")[column * 128 + 64 + row]);
    let (shape, down) = read("model.layers.0.mlp.down_proj.weight");
    assert_eq!(shape, [32, 64]);
    assert_eq!(down[row * 64 + column], ours("layers.0.mlp.down.weight")[column * 32 + row]);
}

#[test]
fn halves_are_read_as_the_numbers_they_are() {
    let (folder, config, mut params) = written(Family::Llama, StoredType::Bf16);
    let rounded = |value: f32| {
        let bits = value.to_bits();
        f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
    };
    params.tensors.iter_mut().flatten().for_each(|weight| *weight = rounded(*weight));
    let pretrained = Pretrained::open(folder.path()).unwrap();
    assert_eq!(pretrained.load().unwrap(), params);
    assert_eq!(pretrained.stored_types().keys().collect::<Vec<_>>(), [&"BF16"]);
    let expected: Map<String, Value> =
        serde_json::from_slice(&fs::read(folder.path().join("config.json")).unwrap()).unwrap();
    assert_eq!((&expected["dtype"], &expected["torch_dtype"]), (&json!("bfloat16"), &json!("bfloat16")));

    // The same bytes as F16: the file's first element is that of the embedding.
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let (header, mut data) = split(&bytes);
    let header = String::from_utf8(header.to_vec()).unwrap().replace("\"BF16\"", "\"F16\"");
    data[..8].copy_from_slice(&[0x00, 0x3c, 0x00, 0xc0, 0x55, 0x35, 0x01, 0x00]);
    fs::write(&path, join(header.as_bytes(), &data)).unwrap();
    let pretrained = Pretrained::open(folder.path()).unwrap();
    assert_eq!(pretrained.stored_types().keys().collect::<Vec<_>>(), [&"F16"]);
    let embedding = &pretrained.load().unwrap().tensors[index_of(&config, "embed.weight")];
    assert_eq!(embedding[..4], [1.0, -2.0, 1365.0 / 4096.0, 2f32.powi(-24)]);
}

#[test]
fn old_and_new_keys_describe_the_same_network() {
    for family in FAMILIES {
        let (folder, config, _) = written(family, StoredType::F32);
        let path = folder.path().join("config.json");
        let both = fs::read(&path).unwrap();
        for absent in [["rope_theta", "rope_scaling", "torch_dtype"], ["rope_parameters", "dtype", "architectures"]] {
            let mut keys: Map<String, Value> = serde_json::from_slice(&both).unwrap();
            absent.iter().for_each(|key| drop(keys.remove(*key)));
            fs::write(&path, serde_json::to_vec(&keys).unwrap()).unwrap();
            assert_eq!(Pretrained::open(folder.path()).unwrap().config(), &config, "{family} without {absent:?}");
        }
    }
}

/// What transformers takes a config to mean that has fewer keys than a written one.
#[test]
fn absent_keys_have_the_defaults_of_the_family() {
    type Change = fn(&mut ModelConfig);
    let cases: [(Family, &[&str], Value, Change); 11] = [
        (Family::Llama, &["rope_theta", "rope_scaling", "rope_parameters"], json!({}), |config| {
            (config.variant.rope_theta, config.variant.rope_scaling) = (10_000.0, None);
        }),
        (Family::SmolLm3, &["rope_theta", "rope_parameters"], json!({}), |config| {
            config.variant.rope_theta = 2_000_000.0;
        }),
        (Family::SmolLm3, &["tie_word_embeddings", "layer_types"], json!({}), |_| {}),
        (Family::SmolLm3, &["no_rope_layers"], json!({"no_rope_layer_interval": 2}), |_| {}),
        (Family::SmolLm3, &["no_rope_layers", "sliding_window", "layer_types"], json!({}), |config| {
            (config.variant.no_rope_layers, config.variant.windows) = (vec![], vec![]);
        }),
        (Family::Qwen2, &["layer_types"], json!({}), |_| {}),
        (Family::Qwen2, &["layer_types", "use_sliding_window"], json!({}), |config| config.variant.windows.clear()),
        (Family::Qwen2, &["layer_types", "max_window_layers"], json!({}), |config| config.variant.windows.clear()),
        (Family::Qwen3, &[], json!({"use_sliding_window": true, "max_window_layers": 0, "layer_types": null}), |it| {
            // The key is there, and null.
            it.variant.windows.clear();
        }),
        (Family::Mistral, &["sliding_window", "rms_norm_eps"], json!({}), |config| {
            (config.variant.windows, config.variant.rms_norm_eps) = (vec![Some(4_096); 2], 1e-6);
        }),
        (Family::Mistral, &[], json!({"sliding_window": null, "max_position_embeddings": 1 << 20}), |config| {
            config.variant.windows.clear();
            config.max_positions = 1 << 17;
        }),
    ];
    for (family, absent, present, change) in cases {
        let (folder, mut config, params) = written(family, StoredType::F32);
        let path = folder.path().join("config.json");
        let mut keys: Map<String, Value> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        absent.iter().for_each(|key| drop(keys.remove(*key).unwrap()));
        fs::write(&path, serde_json::to_vec(&keys).unwrap()).unwrap();
        set_keys(&path, &present);
        change(&mut config);
        let pretrained = Pretrained::open(folder.path()).unwrap();
        assert_eq!(pretrained.config(), &config, "{family} without {absent:?} and with {present}");
        assert_eq!(pretrained.load().unwrap(), params);
    }
    let longest = ModelConfig { max_positions: 1 << 17, ..config(Family::Llama) };
    let longer = ModelConfig { max_positions: (1 << 17) + 1, ..config(Family::Llama) };
    assert!(longest.validate().is_ok() && longer.validate().is_err(), "files are cut to the longest that is valid");
}

#[test]
fn a_tied_head_that_is_stored_must_be_the_embedding() {
    let untied = ModelConfig { variant: Variant::default(), ..config(Family::Llama) };
    let embedding = index_of(&untied, "embed.weight");
    let head = index_of(&untied, "head.weight");
    let mut params = draw(&untied);
    let columns = |index: usize| (index % 11) * 32 + index / 11;
    params.tensors[head] = (0..11 * 32).map(|index| params.tensors[embedding][columns(index)]).collect();
    let folder = tempfile::tempdir().unwrap();
    write_hf(folder.path(), &untied, Family::Llama, &params, StoredType::F32, Companions::default()).unwrap();
    set_keys(&folder.path().join("config.json"), &json!({"tie_word_embeddings": true}));
    let pretrained = Pretrained::open(folder.path()).unwrap();
    assert!(pretrained.config().variant.tied_head);
    assert_eq!(pretrained.load().unwrap().tensors[..], params.tensors[..head]);

    params.tensors[head][0] += 1.0;
    let folder = tempfile::tempdir().unwrap();
    write_hf(folder.path(), &untied, Family::Llama, &params, StoredType::F32, Companions::default()).unwrap();
    set_keys(&folder.path().join("config.json"), &json!({"tie_word_embeddings": true}));
    assert_refused(folder.path(), "tensor \"lm_head.weight\" as the embedding, to which it is tied, got other weights");
}

#[test]
fn end_tokens_are_those_of_all_configs() {
    let (folder, ..) = written(Family::Llama, StoredType::F32);
    let write = |name: &str, value: Value| fs::write(folder.path().join(name), value.to_string()).unwrap();
    let ends = || Pretrained::open(folder.path()).unwrap().end_tokens().to_vec();
    set_keys(&folder.path().join("config.json"), &json!({"eos_token_id": 7}));
    assert_eq!(ends(), [7]);
    write("generation_config.json", json!({"eos_token_id": [3, 7, 5, 128_001, -1]}));
    assert_eq!(ends(), [3, 5, 7]);
    let decoder = json!({"1": {"content": "<a>"}, "2": {"content": "<end>", "special": true}});
    write("tokenizer_config.json", json!({"eos_token": "<end>", "added_tokens_decoder": decoder, "clean": true}));
    assert_eq!(ends(), [2, 3, 5, 7]);
    write("tokenizer_config.json", json!({"eos_token": {"content": "<a>"}, "added_tokens_decoder": decoder}));
    assert_eq!(ends(), [1, 3, 5, 7]);
    write("tokenizer_config.json", json!({"eos_token": null}));
    assert_eq!(ends(), [3, 5, 7]);
    write("generation_config.json", json!({"eos_token_id": "x"}));
    assert_refused(folder.path(), "generation_config.json: expected eos_token_id as a token or a list of tokens");
}

#[test]
fn wrong_configs_are_refused() {
    let cases = [
        (Family::Llama, json!({"model_type": "gpt2"}), "model_type one of \"llama\", \"smollm3\""),
        (Family::Llama, json!({"model_type": null}), "\"mistral\", got none"),
        (Family::Llama, json!({"architectures": ["LlamaForSequenceClassification"]}), "[\"LlamaForCausalLM\"], got"),
        (Family::Llama, json!({"hidden_act": "gelu"}), "expected hidden_act \"silu\", got \"gelu\""),
        (Family::Llama, json!({"attention_bias": true}), "expected attention_bias false, got true"),
        (Family::SmolLm3, json!({"attention_bias": true}), "expected attention_bias false, got true"),
        (Family::Qwen3, json!({"attention_bias": true}), "expected attention_bias false, got true"),
        (Family::Llama, json!({"attention_bias": 1}), "expected attention_bias as true or false, got 1"),
        (Family::Llama, json!({"mlp_bias": true}), "expected mlp_bias false, got true"),
        (Family::Llama, json!({"quantization_config": {"bits": 4}}), "expected quantization_config none, got {\"bits"),
        (Family::Llama, json!({"partial_rotary_factor": 0.5}), "expected partial_rotary_factor 1, got 0.5"),
        (
            Family::Qwen2,
            json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
            "expected rope_parameters.rope_type \"default\" or \"llama3\", got \"yarn\"",
        ),
        (
            Family::Qwen2,
            json!({"rope_scaling": {"type": "linear", "factor": 2.0}}),
            "expected rope_scaling.type \"default\" or \"llama3\", got \"linear\"",
        ),
        (Family::Qwen2, json!({"rope_scaling": {"factor": 2.0}}), "expected rope_scaling.factor 1 or none"),
        (Family::Qwen2, json!({"rope_scaling": 2}), "expected rope_scaling as a map, got 2"),
        (
            Family::Qwen2,
            json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
            "expected rope_parameters.full_attention none",
        ),
        (Family::Llama, json!({"rope_theta": 1e6}), "expected rope_parameters.rope_theta the same as elsewhere"),
        (
            Family::Llama,
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}),
            "expected rope_scaling the same as rope_parameters",
        ),
        (
            Family::Llama,
            json!({"rope_parameters": {"rope_type": "llama3", "factor": 32.0}}),
            "expected rope_parameters.low_freq_factor as a number, got none",
        ),
        (
            Family::Llama,
            json!({"original_max_position_embeddings": 64}),
            "expected rope_parameters.original_max_position_embeddings 64",
        ),
        (
            Family::Llama,
            json!({"rope_scaling": null, "rope_parameters": {"rope_type": "llama3", "factor": 0.5,
                "low_freq_factor": 1, "high_freq_factor": 4}}),
            "variant.rope_scaling as a factor of 1 or more",
        ),
        (Family::Llama, json!({"hidden_size": "32"}), "expected hidden_size as an integer, got \"32\""),
        (Family::Llama, json!({"hidden_size": null}), "expected hidden_size as an integer, got none"),
        (Family::Llama, json!({"hidden_size": -32}), "expected hidden_size as an integer, got -32"),
        (Family::Llama, json!({"hidden_size": 33}), "expected d_model as a multiple of 16 up to 8192, got 33"),
        (Family::Llama, json!({"hidden_size": 1e300}), "expected hidden_size as an integer"),
        (Family::Llama, json!({"num_hidden_layers": 0}), "expected num_layers as 1 to 128, got 0"),
        (Family::Llama, json!({"num_hidden_layers": u64::MAX}), "expected num_layers as 1 to 128"),
        (Family::Llama, json!({"num_hidden_layers": 1}), "the tensors of a llama network alone, got tensor"),
        (
            Family::Llama,
            json!({"num_hidden_layers": 3}),
            "tensor \"model.layers.2.input_layernorm.weight\" [32], got none",
        ),
        (Family::Llama, json!({"num_attention_heads": 0}), "expected num_heads as"),
        (Family::Llama, json!({"num_attention_heads": u64::MAX}), "expected num_heads as"),
        (Family::Llama, json!({"num_key_value_heads": 3}), "expected num_kv_heads as a divisor"),
        (Family::Llama, json!({"num_key_value_heads": null}), "k_proj.weight\" [32, 32], got [16, 32]"),
        (Family::Llama, json!({"head_dim": 7}), "expected num_heads as"),
        (Family::Llama, json!({"head_dim": 1 << 30}), "expected variant.head_dim as"),
        (Family::Qwen3, json!({"head_dim": null}), "q_proj.weight\" [256, 32], got [64, 32]"),
        (Family::Llama, json!({"vocab_size": 1 << 21}), "expected vocabulary_size as 1 to 1048576"),
        (Family::Llama, json!({"vocab_size": 12}), "\"model.embed_tokens.weight\" [12, 32], got [11, 32]"),
        (Family::Llama, json!({"intermediate_size": 48}), "gate_proj.weight\" [48, 32], got [64, 32]"),
        (Family::Llama, json!({"max_position_embeddings": 4}), "expected max_positions as 8 to 131072, got 4"),
        (Family::Llama, json!({"rms_norm_eps": 0}), "expected variant.rms_norm_eps as a number over 0, got 0"),
        (Family::Llama, json!({"rms_norm_eps": "x"}), "expected rms_norm_eps as a number, got \"x\""),
        (Family::Mistral, json!({"rope_theta": -1, "rope_parameters": null}), "variant.rope_theta as a number over 1"),
        (Family::SmolLm3, json!({"no_rope_layers": [1]}), "expected no_rope_layers as 0 or 1 for each of 2 layers"),
        (Family::SmolLm3, json!({"no_rope_layers": [1, 2]}), "expected no_rope_layers as 0 or 1 for each of 2 layers"),
        (Family::SmolLm3, json!({"no_rope_layers": null, "no_rope_layer_interval": 0}), "no_rope_layer_interval 1 or"),
        (Family::SmolLm3, json!({"use_sliding_window": false}), "expected layer_types the layers that have a window"),
        (Family::Qwen2, json!({"layer_types": ["full_attention"]}), "expected layer_types as \"full_attention\" or"),
        (Family::Qwen2, json!({"layer_types": ["x", "y"]}), "expected layer_types as \"full_attention\" or"),
        (Family::Qwen2, json!({"sliding_window": 0}), "expected variant.windows as"),
        (Family::Mistral, json!({"layer_types": ["full_attention", "sliding_attention"]}), "expected layer_types the"),
        (Family::Llama, json!({"layer_types": ["full_attention", "sliding_attention"]}), "expected layer_types the"),
        (
            Family::Llama,
            json!({"eos_token_id": "x"}),
            "expected eos_token_id as a token or a list of tokens, got \"x\"",
        ),
        // The network of another family.
        (
            Family::Qwen2,
            json!({"model_type": "mistral", "architectures": null, "layer_types": null}),
            "a mistral network alone",
        ),
        (Family::Mistral, json!({"model_type": "qwen2", "architectures": null}), "q_proj.bias\" [64], got none"),
        (Family::Mistral, json!({"model_type": "qwen3", "architectures": null}), "q_norm.weight\" [32], got none"),
    ];
    for family in FAMILIES {
        let (folder, ..) = written(family, StoredType::F32);
        let path = folder.path().join("config.json");
        let good = fs::read(&path).unwrap();
        for (_, keys, expected) in cases.iter().filter(|(other, ..)| *other == family) {
            fs::write(&path, &good).unwrap();
            set_keys(&path, keys);
            assert_refused(folder.path(), expected);
        }
    }
    let (folder, ..) = written(Family::Llama, StoredType::F32);
    let path = folder.path().join("config.json");
    let nested = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
    let broken = [&b"{\"a\": "[..], &nested, b"}"].concat();
    for (content, expected) in [
        (broken.as_slice(), "expected a map in JSON, got recursion limit exceeded"),
        (b"[]", "expected a map in JSON"),
        (b"", "expected a map in JSON"),
        (&[b' '; (1 << 20) + 1], "expected a file of at most 1048576 bytes, got 1048577 bytes"),
    ] {
        fs::write(&path, content).unwrap();
        assert_refused(folder.path(), expected);
    }
    fs::remove_file(&path).unwrap();
    assert_refused(folder.path(), "expected config.json in the folder, got none");
    fs::create_dir(&path).unwrap();
    assert_refused(folder.path(), "expected a regular file");
    let absent = folder.path().join("absent");
    assert_refused(&absent, "expected a folder of Hugging Face or a GGUF file");
    let error = Pretrained::open(&absent).unwrap_err();
    assert!(matches!(error, FormatError::Io { path, .. } if path == absent));
}

/// Returns the header and the data of a safetensors file.
fn split(bytes: &[u8]) -> (&[u8], Vec<u8>) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (&bytes[8..8 + length], bytes[8 + length..].to_vec())
}

fn join(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}

#[test]
fn wrong_safetensors_are_refused() {
    let (folder, ..) = written(Family::Llama, StoredType::F32);
    let path = folder.path().join("model.safetensors");
    let good = fs::read(&path).unwrap();
    let (header, data) = split(&good);
    let entries: Map<String, Value> = serde_json::from_slice(header).unwrap();
    let refuse = |bytes: &[u8], expected: &str| {
        fs::write(&path, bytes).unwrap();
        assert_refused(folder.path(), expected);
    };
    for (length, expected) in [
        (0, "expected a safetensors header, got 0 bytes"),
        (4, "expected a safetensors header, got 4 bytes"),
        (8, "expected a header of at most 0 bytes"),
        (100, "expected a header of at most 92 bytes"),
        (good.len() - 1, "expected tensor \"lm_head.weight\" within"),
    ] {
        refuse(&good[..length], expected);
    }
    for lie in [1 << 63, u64::MAX, good.len() as u64, good.len() as u64 - 7] {
        refuse(&[&lie.to_le_bytes(), &good[8..]].concat(), "expected a header of at most");
    }
    let nested = format!("{{\"__metadata__\": {}}}", "[".repeat(100_000));
    for (header, expected) in [
        ("", "expected a safetensors header in JSON"),
        ("{", "expected a safetensors header in JSON"),
        ("[]", "expected a safetensors header in JSON"),
        ("{\"a\": {}}", "missing field"),
        (nested.as_str(), "expected a safetensors header in JSON"),
        ("{}", "expected tensors of 0 bytes, as in the header"),
    ] {
        refuse(&join(header.as_bytes(), &data), expected);
    }
    // The tensor that is described wrongly, F32 [32].
    let norm = "model.layers.0.input_layernorm.weight";
    let entry = |dtype: &str, shape: Value, begin: u64, end: u64| json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]});
    let offsets: [u64; 2] = serde_json::from_value(entries[norm]["data_offsets"].clone()).unwrap();
    let [begin, end] = offsets;
    let len = data.len() as u64;
    for (changed, expected) in [
        (entry("F32", json!([32]), 0, 128), "expected tensors that do not overlap"),
        (entry("F32", json!([32]), begin + 4, end + 4), "expected tensors that do not overlap"),
        (entry("F32", json!([32]), len, len + 128), &format!("within {len} bytes of data")),
        (entry("F32", json!([32]), u64::MAX - 128, u64::MAX), &format!("within {len} bytes of data")),
        (entry("F32", json!([32]), end, begin), "expected the bytes of tensor"),
        (entry("F32", json!([31]), begin, end), "expected the bytes of tensor"),
        (entry("F32", json!([31]), begin, end - 4), "expected tensors of"),
        (entry("F32", json!([1, 32]), begin, end), "[32], got [1, 32]"),
        (entry("F32", json!([1_u64 << 63, 8]), begin, end), "expected the bytes of tensor"),
        (entry("F32", json!(vec![1; 100]), begin, end), "F32 of 100 dimensions"),
        (entry("F32", json!([-32]), begin, end), "expected a safetensors header in JSON"),
        (entry("BF16", json!([32]), begin, end), "expected the bytes of tensor"),
        (entry("I32", json!([32]), begin, end), "as F32, F16 or BF16, got I32"),
    ] {
        let mut entries = entries.clone();
        entries.insert(norm.to_owned(), changed);
        refuse(&join(&serde_json::to_vec(&entries).unwrap(), &data), expected);
    }
    let mut other = entries.clone();
    let taken = other.remove(norm).unwrap();
    refuse(&join(&serde_json::to_vec(&other).unwrap(), &data), "expected tensors of");
    other.insert("model.layers.0.self_attn.q_proj.bias".to_owned(), taken.clone());
    refuse(&join(&serde_json::to_vec(&other).unwrap(), &data), &format!("{norm:?} [32], got none"));
    let mut more = entries.clone();
    more.insert("x".to_owned(), entry("F32", json!([0]), len, len));
    refuse(&join(&serde_json::to_vec(&more).unwrap(), &data), "a llama network alone, got tensor \"x\"");
    let twice = serde_json::to_string(&entries).unwrap();
    let twice = format!("{},{norm:?}:{taken}}}", &twice[..twice.len() - 1]);
    refuse(&join(twice.as_bytes(), &data), &format!("expected tensors with distinct names, got two named {norm:?}"));
    let mut holed = data.clone();
    holed.extend([0; 4]);
    refuse(&join(header, &holed), "bytes of data");
    for bad in [f32::NAN, f32::INFINITY] {
        let mut data = data.clone();
        data[begin as usize..][..4].copy_from_slice(&bad.to_le_bytes());
        refuse(&join(header, &data), "expected finite weights");
    }

    // What old checkpoints of Llama hold, and what nobody needs.
    let mut more = entries.clone();
    more.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), entry("F32", json!([1]), len, len + 4));
    fs::write(&path, join(&serde_json::to_vec(&more).unwrap(), &holed)).unwrap();
    Pretrained::open(folder.path()).unwrap().load().unwrap();
    fs::remove_file(&path).unwrap();
    assert_refused(
        folder.path(),
        "expected model.safetensors or model.safetensors.index.json in the folder, got neither",
    );
}

/// Splits the weights of a folder into shards, tensor by tensor in turn.
fn shard(folder: &Path, num_shards: usize) -> BTreeMap<String, String> {
    let whole = folder.join("model.safetensors");
    let bytes = fs::read(&whole).unwrap();
    fs::remove_file(whole).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut weight_map = BTreeMap::new();
    for shard in 0..num_shards {
        let name = format!("model-{:05}-of-{num_shards:05}.safetensors", shard + 1);
        let tensors: Vec<_> = file.tensors().into_iter().filter(|(name, _)| name.len() % num_shards == shard).collect();
        weight_map.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), name.clone())));
        fs::write(folder.join(name), safetensors::serialize(tensors, None).unwrap()).unwrap();
    }
    write_index(folder, &weight_map);
    weight_map
}

fn write_index(folder: &Path, weight_map: &BTreeMap<String, String>) {
    let index = json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn shards_are_read_together() {
    let (folder, config, params) = written(Family::Qwen3, StoredType::F32);
    let weight_map = shard(folder.path(), 3);
    let pretrained = Pretrained::open(folder.path()).unwrap();
    assert_eq!(pretrained.config(), &config);
    assert_eq!(pretrained.load().unwrap(), params);

    let refuse = |change: &dyn Fn(&mut BTreeMap<String, String>), expected: &str| {
        let mut changed = weight_map.clone();
        change(&mut changed);
        write_index(folder.path(), &changed);
        assert_refused(folder.path(), expected);
    };
    let norm = "model.norm.weight";
    let elsewhere = weight_map.values().find(|shard| **shard != weight_map[norm]).unwrap();
    refuse(&|map| drop(map.insert(norm.into(), elsewhere.clone())), "which it holds, got");
    refuse(&|map| drop(map.remove(norm)), "which it holds, got no shard");
    refuse(&|map| drop(map.insert("x".into(), elsewhere.clone())), "expected tensor \"x\", as in the index, got none");
    refuse(&|map| drop(map.insert("x".into(), "absent.safetensors".into())), "expected a readable file");
    for name in ["../model.safetensors", "/etc/passwd", "..", "", "a/b"] {
        refuse(&|map| drop(map.insert("x".into(), name.into())), "expected shards that are files of the folder");
    }
    let many = |map: &mut BTreeMap<String, String>| map.extend((0..300).map(|it| (it.to_string(), it.to_string())));
    refuse(&many, "expected at most 256 shards, got 303");
    fs::write(folder.path().join("model.safetensors.index.json"), "{}").unwrap();
    assert_refused(folder.path(), "expected an index of shards");
}

#[test]
fn no_folder_is_overwritten() {
    let (folder, config, params) = written(Family::Llama, StoredType::F32);
    let write = |path: &Path| write_hf(path, &config, Family::Llama, &params, StoredType::F32, Companions::default());
    let before = fs::read(folder.path().join("config.json")).unwrap();
    let error = write(folder.path()).unwrap_err();
    assert!(matches!(error, FormatError::Occupied { .. }), "{error}");
    assert!(error.to_string().ends_with(": expected an empty folder or none, got a folder with files"), "{error}");
    assert_eq!(fs::read(folder.path().join("config.json")).unwrap(), before);
    let file = folder.path().join("config.json");
    assert!(matches!(write(&file).unwrap_err(), FormatError::Occupied { got: "a file or a link", .. }));

    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("new/deep");
    write(&path).unwrap();
    assert_eq!(Pretrained::open(&path).unwrap().load().unwrap(), params);
    let names: Vec<_> = path.parent().unwrap().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["deep"], "nothing partial is left");
}

#[test]
fn networks_that_a_family_cannot_express_are_not_written() {
    type Change = fn(&mut Variant);
    let cases: [(Family, Change, &str); 8] = [
        (Family::Llama, |it| it.qkv_bias = true, "variant.qkv_bias as false in family llama, got true"),
        (Family::Qwen2, |it| it.qkv_bias = false, "variant.qkv_bias as true in family qwen2, got false"),
        (Family::Mistral, |it| it.qk_norm = true, "variant.qk_norm as false in family mistral, got true"),
        (Family::Qwen3, |it| it.qk_norm = false, "variant.qk_norm as true in family qwen3, got false"),
        (Family::Qwen2, |it| it.no_rope_layers = vec![0], "variant.no_rope_layers as none in family qwen2, got [0]"),
        (Family::Llama, |it| it.windows = vec![Some(9), None], "variant.windows as none in family llama"),
        (Family::Mistral, |it| it.windows = vec![Some(9), None], "variant.windows as the same for every layer"),
        (Family::Qwen3, |it| it.windows = vec![Some(9), Some(8)], "variant.windows as of one size in family qwen3"),
    ];
    for (family, change, expected) in cases {
        let mut config = config(family);
        change(&mut config.variant);
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("new");
        let error = write_hf(&path, &config, family, &Params::zeros(&config), StoredType::F32, Companions::default())
            .unwrap_err();
        assert!(matches!(error, FormatError::Unsupported { .. }) && error.to_string().contains(expected), "{error}");
        assert!(!path.exists());
    }
}

const TYPE_F32: u32 = 0;
const TYPE_F16: u32 = 1;
const TYPE_Q4_1: u32 = 3;
const TYPE_Q8_0: u32 = 8;
const TYPE_BF16: u32 = 30;

/// A GGUF file in the making, right or wrong.
#[derive(Clone)]
struct GgufFile {
    version: u32,
    alignment: usize,
    /// Each with its type before its value.
    keys: Vec<(String, Vec<u8>)>,
    tensors: Vec<GgufTensor>,
}

#[derive(Clone)]
struct GgufTensor {
    name: String,
    /// Fastest first.
    dims: Vec<u64>,
    element_type: u32,
    data: Vec<u8>,
    /// Replaces the true offset.
    offset: Option<u64>,
}

fn text_bytes(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn u32_value(value: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), value.to_le_bytes()].concat()
}

fn f32_value(value: f32) -> Vec<u8> {
    [6u32.to_le_bytes(), value.to_le_bytes()].concat()
}

fn bool_value(value: u8) -> Vec<u8> {
    [&7u32.to_le_bytes()[..], &[value]].concat()
}

fn text_value(text: &str) -> Vec<u8> {
    [&8u32.to_le_bytes()[..], &text_bytes(text)].concat()
}

fn array_value(element_type: u32, len: u64, elements: &[u8]) -> Vec<u8> {
    [&9u32.to_le_bytes()[..], &element_type.to_le_bytes(), &len.to_le_bytes(), elements].concat()
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

impl GgufFile {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            bytes.extend([text_bytes(key), value.clone()].concat());
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            bytes.extend(text_bytes(&tensor.name));
            bytes.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|size| bytes.extend(size.to_le_bytes()));
            bytes.extend(tensor.element_type.to_le_bytes());
            bytes.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
            data.resize(data.len().next_multiple_of(self.alignment), 0);
        }
        bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
        bytes.extend(data);
        bytes
    }

    fn set(&mut self, key: &str, value: Vec<u8>) -> &mut GgufFile {
        self.keys.retain(|(own, _)| own != key);
        self.keys.push((key.to_owned(), value));
        self
    }

    fn tensor(&mut self, name: &str) -> &mut GgufTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    fn add(&mut self, name: &str, dims: &[usize], values: &[f32]) {
        let dims = dims.iter().map(|size| *size as u64).collect();
        let data = f32_bytes(values);
        self.tensors.push(GgufTensor { name: name.to_owned(), dims, element_type: TYPE_F32, data, offset: None });
    }

    fn save(&self, folder: &TempDir) -> std::path::PathBuf {
        let path = folder.path().join("model.gguf");
        fs::write(&path, self.bytes()).unwrap();
        path
    }
}

/// The file's row of each of our outputs: halves of heads alternate.
fn interleave(rows: &[Vec<f32>], num_heads: usize) -> Vec<Vec<f32>> {
    let half = rows.len() / num_heads / 2;
    (0..rows.len())
        .map(|row| rows[row / (2 * half) * 2 * half + row % 2 * half + row % (2 * half) / 2].clone())
        .collect()
}

/// Returns a config that a GGUF file of the family can express.
fn gguf_config(family: Family) -> ModelConfig {
    let mut config = config(family);
    if family != Family::Mistral {
        config.variant.windows.clear();
    }
    if family == Family::SmolLm3 {
        config.num_layers = 5;
        config.variant.no_rope_layers = vec![3];
    }
    config
}

/// Builds the file that llama.cpp's conversion makes of a network.
fn gguf_of(config: &ModelConfig, family: Family, params: &Params) -> GgufFile {
    let architecture = if family == Family::Mistral { "llama".to_owned() } else { family.to_string() };
    let interleaved = INTERLEAVED.contains(&family) || family == Family::Mistral;
    let mut file = GgufFile { version: 3, alignment: 32, keys: Vec::new(), tensors: Vec::new() };
    let variant = &config.variant;
    file.set("general.architecture", text_value(&architecture));
    for (key, value) in [
        ("block_count", config.num_layers),
        ("context_length", config.max_positions),
        ("embedding_length", config.d_model),
        ("feed_forward_length", config.ff_dim),
        ("attention.head_count", config.num_heads),
        ("attention.head_count_kv", config.num_kv_heads),
        ("attention.key_length", config.head_dim()),
        ("attention.value_length", config.head_dim()),
        ("rope.dimension_count", config.head_dim()),
        ("vocab_size", config.vocabulary_size),
    ] {
        file.set(&format!("{architecture}.{key}"), u32_value(value as u32));
    }
    file.set(&format!("{architecture}.rope.freq_base"), f32_value(variant.rope_theta as f32));
    file.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), f32_value(variant.rms_norm_eps));
    if let Some(window) = variant.windows.first().copied().flatten() {
        file.set(&format!("{architecture}.attention.sliding_window"), u32_value(window as u32));
    }
    let ours = |name: &str| params.tensors[index_of(config, name)].clone();
    if let Some(scaling) = variant.rope_scaling {
        let divisors: Vec<f32> = llama_cpp_divisors(variant.rope_theta, config.head_dim(), scaling.factor);
        file.add("rope_freqs.weight", &[divisors.len()], &divisors);
    }
    file.add("token_embd.weight", &[config.d_model, config.vocabulary_size], &ours("embed.weight"));
    let (queries, keys) = (config.num_heads * config.head_dim(), config.num_kv_heads * config.head_dim());
    for layer in 0..config.num_layers {
        let mut linear = |name: &str, own: &str, outputs: std::ops::Range<usize>, num_heads: usize| {
            let weights = ours(&format!("layers.{layer}.{own}"));
            let width = config.tensors()[index_of(config, &format!("layers.{layer}.{own}"))].shape[1];
            let num_inputs = weights.len() / width;
            let row = |output| (0..num_inputs).map(|input| weights[input * width + output]).collect();
            let mut rows: Vec<Vec<f32>> = outputs.map(row).collect();
            if interleaved && num_heads > 0 {
                rows = interleave(&rows, num_heads);
            }
            file.add(&format!("blk.{layer}.{name}.weight"), &[num_inputs, rows.len()], &rows.concat());
        };
        linear("attn_q", "attention.qkv.weight", 0..queries, config.num_heads);
        linear("attn_k", "attention.qkv.weight", queries..queries + keys, config.num_kv_heads);
        linear("attn_v", "attention.qkv.weight", queries + keys..queries + 2 * keys, 0);
        linear("attn_output", "attention.out.weight", 0..config.d_model, 0);
        linear("ffn_gate", "mlp.gate_up.weight", 0..config.ff_dim, 0);
        linear("ffn_up", "mlp.gate_up.weight", config.ff_dim..2 * config.ff_dim, 0);
        linear("ffn_down", "mlp.down.weight", 0..config.d_model, 0);
        let mut vector = |name: &str, own: &str, elements: std::ops::Range<usize>| {
            let values = ours(&format!("layers.{layer}.{own}"));
            file.add(&format!("blk.{layer}.{name}"), &[elements.len()], &values[elements]);
        };
        vector("attn_norm.weight", "attention_norm.weight", 0..config.d_model);
        vector("ffn_norm.weight", "mlp_norm.weight", 0..config.d_model);
        if variant.qkv_bias {
            vector("attn_q.bias", "attention.qkv.bias", 0..queries);
            vector("attn_k.bias", "attention.qkv.bias", queries..queries + keys);
            vector("attn_v.bias", "attention.qkv.bias", queries + keys..queries + 2 * keys);
        }
        if variant.qk_norm {
            vector("attn_q_norm.weight", "attention.q_norm.weight", 0..config.head_dim());
            vector("attn_k_norm.weight", "attention.k_norm.weight", 0..config.head_dim());
        }
    }
    file.add("output_norm.weight", &[config.d_model], &ours("norm.weight"));
    if !variant.tied_head {
        let (head, width) = (ours("head.weight"), config.vocabulary_size);
        let transposed: Vec<f32> =
            (0..head.len()).map(|it| head[it % config.d_model * width + it / config.d_model]).collect();
        file.add("output.weight", &[config.d_model, width], &transposed);
    }
    file
}

/// Computes the tensor `rope_freqs.weight` as llama.cpp's `conversion/llama.py` does, in single precision.
fn llama_cpp_divisors(theta: f64, head_dim: usize, factor: f64) -> Vec<f32> {
    let divisor = |index: usize| {
        let frequency = 1.0 / (theta as f32).powf(2.0 * index as f32 / head_dim as f32);
        let wave_length = 2.0 * std::f32::consts::PI / frequency;
        if wave_length < 8_192.0 / 4.0 {
            1.0
        } else if wave_length > 8_192.0 {
            factor as f32
        } else {
            let smooth = (8_192.0 / wave_length - 1.0) / 3.0;
            1.0 / ((1.0 - smooth) / factor as f32 + smooth)
        }
    };
    (0..head_dim / 2).map(divisor).collect()
}

#[test]
fn gguf_files_are_read_as_llama_cpp_means_them() {
    let folder = tempfile::tempdir().unwrap();
    for family in FAMILIES {
        for version in [2, 3] {
            let config = gguf_config(family);
            let params = draw(&config);
            let mut file = gguf_of(&config, family, &params);
            file.version = version;
            let path = file.save(&folder);
            let pretrained = Pretrained::open(&path).unwrap();
            assert_eq!((pretrained.config(), pretrained.family()), (&config, family));
            assert_eq!(pretrained.load().unwrap(), params, "{family}");
            assert_eq!(pretrained.path(), &*path);
            assert_eq!(pretrained.stored_types(), BTreeMap::from([("F32", file.tensors.len())]));
            assert_eq!(pretrained.size_bytes(), path.metadata().unwrap().len());
        }
    }
}

#[test]
fn the_scaling_of_llama_is_recovered_from_its_divisors() {
    let folder = tempfile::tempdir().unwrap();
    for (theta, head_dim, factor) in [(500_000.0, 64, 32.0), (500_000.0, 128, 8.0), (10_000.0, 16, 8.0)] {
        let mut config = gguf_config(Family::Llama);
        config.variant.head_dim = (head_dim != 16).then_some(head_dim);
        config.variant.rope_theta = theta;
        config.variant.rope_scaling = Some(RopeScaling { factor, ..LLAMA3 });
        let mut file = gguf_of(&config, Family::Llama, &draw(&config));
        assert_eq!(Pretrained::open(&file.save(&folder)).unwrap().config(), &config);
        file.tensor("rope_freqs.weight").data = f32_bytes(&vec![1.0; head_dim / 2]);
        config.variant.rope_scaling = None;
        assert_eq!(Pretrained::open(&file.save(&folder)).unwrap().config(), &config);
        for wrong in [vec![2.0; head_dim / 2], llama_cpp_divisors(theta, head_dim, 16.0)] {
            file.tensor("rope_freqs.weight").data = f32_bytes(&wrong);
            assert_refused(&file.save(&folder), "of the llama3 scaling by 8 or 32 of 8192 positions");
        }
        file.tensor("rope_freqs.weight").dims = vec![head_dim as u64 / 2 - 1];
        assert_refused(&file.save(&folder), "expected tensor \"rope_freqs.weight\" as F32");
    }
}

/// Blocks of 32 by the definition in ggml-common.h: of Q8_0 a half d and 32 signed bytes, of Q4_1 halves d and m and 16 bytes
/// with elements j and j + 16.
#[test]
fn quantised_rows_are_read_as_ggml_means_them() {
    let config = gguf_config(Family::Llama);
    let mut params = draw(&config);
    let mut file = gguf_of(&config, Family::Llama, &params);
    let mut rng = CounterRng::new(1, Purpose::Init, 0, 0, 0);
    // Halves of 0.5, -0.25 and 2.
    let scales = [(0x3800_u16, 0.5f32), (0xb400, -0.25), (0x4000, 2.0)];
    let mut q8_0 = |num_rows: usize| -> (Vec<u8>, Vec<Vec<f32>>) {
        let mut rows = Vec::new();
        let mut bytes = Vec::new();
        for row in 0..num_rows {
            let (half, scale) = scales[row % 3];
            let quants: Vec<i8> = (0..32).map(|_| rng.below(256) as u8 as i8).collect();
            bytes.extend(half.to_le_bytes());
            bytes.extend(quants.iter().map(|quant| *quant as u8));
            rows.push(quants.iter().map(|quant| f32::from(*quant) * scale).collect());
        }
        (bytes, rows)
    };
    let (embedding_bytes, embedding) = q8_0(11);
    let mut rng = CounterRng::new(2, Purpose::Init, 0, 0, 0);
    let mut q4_1 = |num_rows: usize| -> (Vec<u8>, Vec<Vec<f32>>) {
        let mut rows = Vec::new();
        let mut bytes = Vec::new();
        for row in 0..num_rows {
            let [(half, scale), (low_half, low)] = [scales[row % 3], scales[(row + 1) % 3]];
            let quants: Vec<u8> = (0..16).map(|_| rng.below(256) as u8).collect();
            bytes.extend([half.to_le_bytes(), low_half.to_le_bytes()].concat());
            bytes.extend(&quants);
            let nibbles = quants.iter().map(|byte| byte & 15).chain(quants.iter().map(|byte| byte >> 4));
            rows.push(nibbles.map(|nibble| f32::from(nibble) * scale + low).collect());
        }
        (bytes, rows)
    };
    let (query_bytes, queries) = q4_1(32);
    let (up_bytes, up) = q4_1(64);
    let half = |value: f32| ((value.to_bits() >> 16) as u16).to_le_bytes();
    let norm: Vec<f32> = (0..32).map(|index| 1.0 + index as f32 / 32.0).collect();
    for (name, element_type, data) in [
        ("token_embd.weight", TYPE_Q8_0, embedding_bytes),
        ("blk.0.attn_q.weight", TYPE_Q4_1, query_bytes),
        ("blk.1.ffn_up.weight", TYPE_Q4_1, up_bytes),
        ("output_norm.weight", TYPE_BF16, norm.iter().flat_map(|value| half(*value)).collect()),
        ("blk.0.attn_norm.weight", TYPE_F16, 0x3555_u16.to_le_bytes().repeat(32)),
    ] {
        let tensor = file.tensor(name);
        (tensor.element_type, tensor.data) = (element_type, data);
    }
    params.tensors[index_of(&config, "embed.weight")] = embedding.concat();
    params.tensors[index_of(&config, "norm.weight")] = norm;
    params.tensors[index_of(&config, "layers.0.attention_norm.weight")] = vec![1365.0 / 4096.0; 32];
    let own_queries = &mut params.tensors[index_of(&config, "layers.0.attention.qkv.weight")];
    for (row, values) in queries.iter().enumerate() {
        // Undoes what [`interleave`] does to heads of 16.
        let output = row / 16 * 16 + row % 2 * 8 + row % 16 / 2;
        values.iter().enumerate().for_each(|(input, value)| own_queries[input * 64 + output] = *value);
    }
    let own_up = &mut params.tensors[index_of(&config, "layers.1.mlp.gate_up.weight")];
    for (row, values) in up.iter().enumerate() {
        values.iter().enumerate().for_each(|(input, value)| own_up[input * 128 + 64 + row] = *value);
    }
    let folder = tempfile::tempdir().unwrap();
    let pretrained = Pretrained::open(&file.save(&folder)).unwrap();
    assert_eq!(pretrained.load().unwrap(), params);
    let types = pretrained.stored_types();
    assert_eq!(["Q8_0", "Q4_1", "BF16", "F16"].map(|name| types[name]), [1, 2, 1, 1]);

    file.tensor("blk.1.ffn_up.weight").data[0..2].copy_from_slice(&0x7c00_u16.to_le_bytes());
    assert_refused(&file.save(&folder), "expected finite weights, got");
}

#[test]
fn metadata_is_read_for_the_tokenizer() {
    let config = gguf_config(Family::Qwen2);
    let mut file = gguf_of(&config, Family::Qwen2, &draw(&config));
    let tokens: Vec<String> = (0..11).map(|token| format!("t{token}é")).collect();
    let integers = [i32::MIN, 0, 3].map(i32::to_le_bytes).concat();
    file.set(
        "tokenizer.ggml.tokens",
        array_value(8, 11, &tokens.iter().flat_map(|it| text_bytes(it)).collect::<Vec<_>>()),
    )
    .set("tokenizer.ggml.token_type", array_value(5, 3, &integers))
    .set("tokenizer.ggml.scores", array_value(6, 2, &f32_bytes(&[0.5, -1.0])))
    .set("tokenizer.ggml.eos_token_id", u32_value(5))
    .set("tokenizer.ggml.eot_token_id", u32_value(2))
    .set("tokenizer.ggml.eom_token_id", u32_value(11))
    .set("tokenizer.chat_template", text_value("{{ x }}"))
    .set("a.u64", [&10u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat())
    .set("a.i64", [&11u32.to_le_bytes()[..], &(-1i64).to_le_bytes()].concat())
    .set("a.f64", [&12u32.to_le_bytes()[..], &0.1f64.to_le_bytes()].concat())
    .set("a.i8", [&1u32.to_le_bytes()[..], &[0xff]].concat())
    .set("a.bool", bool_value(1))
    .set("a.bools", array_value(7, 2, &[0, 1]))
    .set("a.huge", array_value(10, 1, &u64::MAX.to_le_bytes()))
    .set("a.nested", array_value(9, 1, &[&4u32.to_le_bytes()[..], &1u64.to_le_bytes(), &7u32.to_le_bytes()].concat()))
    .set("a.none", array_value(8, 0, &[]));
    let folder = tempfile::tempdir().unwrap();
    let pretrained = Pretrained::open(&file.save(&folder)).unwrap();
    assert_eq!(pretrained.end_tokens(), [2, 5]);
    let gguf = pretrained.gguf().unwrap();
    assert_eq!(gguf.strings("tokenizer.ggml.tokens"), Some(&tokens[..]));
    assert_eq!(gguf.strings("a.none"), Some(&[][..]));
    assert_eq!(gguf.ints("tokenizer.ggml.token_type"), Some(&[i32::MIN.into(), 0, 3][..]));
    assert_eq!(gguf.ints("a.bools"), Some(&[0, 1][..]));
    assert_eq!(gguf.floats("tokenizer.ggml.scores"), Some(&[0.5, -1.0][..]));
    assert_eq!(gguf.str("tokenizer.chat_template"), Some("{{ x }}"));
    assert_eq!((gguf.u64("a.u64"), gguf.u64("a.i64"), gguf.u64("a.bool")), (Some(u64::MAX), None, None));
    assert_eq!((gguf.f64("a.f64"), gguf.f64("a.i8"), gguf.f64("a.bool")), (Some(0.1), Some(-1.0), None));
    assert_eq!((gguf.bool("a.bool"), gguf.bool("a.i8"), gguf.bool("absent")), (Some(true), None, None));
    assert!(gguf.contains("a.nested") && gguf.ints("a.nested").is_none() && gguf.ints("a.huge").is_none());
}

#[test]
fn wrong_gguf_files_are_refused() {
    let config = gguf_config(Family::Llama);
    let good = gguf_of(&config, Family::Llama, &draw(&config));
    let folder = tempfile::tempdir().unwrap();
    let nested = |depth: usize| {
        let inner = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(depth);
        [&9u32.to_le_bytes()[..], &inner, &4u32.to_le_bytes(), &0u64.to_le_bytes()].concat()
    };
    let lie = 1u64 << 62;
    let text_lie = |len: u64| [&8u32.to_le_bytes()[..], &len.to_le_bytes(), b"abc"].concat();
    let not_utf8 = [&8u32.to_le_bytes()[..], &1u64.to_le_bytes(), &[0xff]].concat();
    let keys: Vec<(&str, Vec<u8>, &str)> = vec![
        ("general.architecture", text_value("gpt2"), "expected general.architecture \"llama\", \"smollm3\""),
        ("general.architecture", u32_value(1), "\"qwen3\", got 1"),
        ("general.type", text_value("adapter"), "expected general.type \"model\", got \"adapter\""),
        ("split.count", u32_value(2), "expected split.count 1, a single file, got 2"),
        ("general.alignment", u32_value(0), "expected general.alignment as a power of two up to 1048576, got 0"),
        ("general.alignment", u32_value(24), "expected general.alignment as a power of two"),
        ("general.alignment", u32_value(1 << 31), "expected general.alignment as a power of two"),
        ("general.alignment", text_value("32"), "expected general.alignment as a power of two"),
        ("llama.block_count", text_value("2"), "expected llama.block_count as an integer, got \"2\""),
        ("llama.block_count", u32_value(u32::MAX), "expected num_layers as 1 to 128"),
        ("llama.block_count", u32_value(3), "tensor \"blk.2.attn_norm.weight\" [32], got none"),
        ("llama.block_count", u32_value(1), "the tensors of a llama network alone, got tensor \"blk.1."),
        ("llama.embedding_length", u32_value(48), "expected tensor \"token_embd.weight\" [11, 48], got [11, 32]"),
        ("llama.attention.head_count", u32_value(0), "expected num_heads as"),
        ("llama.attention.head_count", array_value(4, 2, &[1; 8]), "head_count as an integer, got an array"),
        ("llama.attention.key_length", u32_value(1 << 30), "value_length 1073741824"),
        (
            "llama.attention.value_length",
            u32_value(32),
            "expected llama.attention.value_length 16, the width of a head",
        ),
        (
            "llama.rope.dimension_count",
            u32_value(8),
            "expected llama.rope.dimension_count 16, the width of a head, got 8",
        ),
        ("llama.vocab_size", u32_value(12), "expected 11 tokens in llama.vocab_size"),
        ("tokenizer.ggml.tokens", array_value(8, 1, &text_bytes("a")), "expected 11 tokens in tokenizer.ggml.tokens"),
        ("llama.rope.freq_base", text_value("x"), "expected llama.rope.freq_base as a number"),
        ("llama.rope.freq_base", f32_value(f32::NAN), "expected variant.rope_theta as a number over 1, got NaN"),
        (
            "llama.rope.scaling.type",
            text_value("yarn"),
            "expected llama.rope.scaling.type \"none\", or \"linear\" by 1",
        ),
        ("llama.rope.scaling.type", u32_value(0), "expected llama.rope.scaling.type \"none\", or \"linear\" by 1"),
        ("llama.rope.scaling.factor", f32_value(4.0), "expected llama.rope.scaling.factor 1 or none, got 4"),
        ("llama.rope.scale_linear", f32_value(4.0), "expected llama.rope.scale_linear 1 or none, got 4"),
        ("llama.expert_count", u32_value(8), "expected llama.expert_count 0 or none, got 8"),
        ("llama.attention.scale", f32_value(0.1), "expected llama.attention.scale 0 or none"),
        ("llama.attention.causal", bool_value(0), "expected llama.attention.causal true or none, got false"),
        ("llama.attention.sliding_window_pattern", u32_value(2), ""),
        ("x", bool_value(2), "expected x as 0 or 1, got 2"),
        ("x", 13u32.to_le_bytes().to_vec(), "expected x of a type from 0 to 12, got 13"),
        ("x", text_lie(lie), "expected at most 16777216 bytes of x"),
        ("x", text_lie(1 << 24), "expected x within the file, got 16777216 bytes at offset"),
        ("x", not_utf8, "expected x in UTF-8"),
        ("x", array_value(4, lie, &[0; 8]), "expected at most 4194304 elements of x"),
        ("x", array_value(4, 1 << 22, &[0; 8]), "expected x within the file's remaining"),
        ("x", array_value(8, 1 << 22, &[0; 8]), "expected x within the file's remaining"),
        ("x", array_value(9, 1 << 22, &[0; 8]), "expected x within the file's remaining"),
        ("x", array_value(13, 1, &[0; 8]), "expected x of a type from 0 to 12, got 13"),
        ("x", nested(10_000), "expected x with at most 4 arrays in each other, got more"),
    ];
    for (key, value, expected) in keys {
        let mut file = good.clone();
        file.set(key, value);
        if expected.is_empty() {
            Pretrained::open(&file.save(&folder)).expect(key);
        } else {
            assert_refused(&file.save(&folder), expected);
        }
    }
    for key in
        ["general.architecture", "llama.block_count", "llama.context_length", "llama.attention.layer_norm_rms_epsilon"]
    {
        let mut file = good.clone();
        file.keys.retain(|(own, _)| own != key);
        assert_refused(&file.save(&folder), key);
    }
    let mut file = good.clone();
    file.keys.push(("llama.block_count".to_owned(), u32_value(2)));
    assert_refused(&file.save(&folder), "expected distinct keys, got two named \"llama.block_count\"");
    for family in [Family::Qwen2, Family::SmolLm3] {
        let config = gguf_config(family);
        let mut file = gguf_of(&config, family, &draw(&config));
        file.set(&format!("{family}.attention.sliding_window"), u32_value(8));
        assert_refused(&file.save(&folder), &format!("expected {family}.attention.sliding_window none or 0, got 8"));
    }

    type Change = fn(&mut GgufFile);
    let changes: [(Change, &str); 18] = [
        (|file| file.version = 1, "expected GGUF version 2 or 3, got 1"),
        (|file| file.version = 3 << 24, "expected GGUF version 2 or 3, got 50331648"),
        (|file| file.tensors.truncate(3), "tensor \"blk.0.attn_norm.weight\" [32], got none"),
        (|file| file.tensor("token_embd.weight").name = "x".into(), "expected tensor \"token_embd.weight\", got none"),
        (
            |file| file.tensor("output_norm.weight").name = "output_norm.bias".into(),
            "\"output_norm.weight\" [32], got none",
        ),
        (|file| file.add("blk.0.attn_q.bias", &[32], &[0.0; 32]), "alone, got tensor \"blk.0.attn_q.bias\""),
        (
            |file| file.add("output_norm.weight", &[32], &[0.0; 32]),
            "distinct names, got two named \"output_norm.weight\"",
        ),
        (|file| file.tensor("output_norm.weight").dims = vec![16, 2], "\"output_norm.weight\" [32], got [2, 16]"),
        (|file| file.tensor("output_norm.weight").dims = vec![], "with 1 to 4 dimensions, got 0"),
        (|file| file.tensor("output_norm.weight").dims = vec![1; 5], "with 1 to 4 dimensions, got 5"),
        (|file| file.tensor("output_norm.weight").dims = vec![1 << 62, 1 << 62], "with rows of whole blocks"),
        (|file| file.tensor("output_norm.weight").dims = vec![1 << 40], "within the file's"),
        (|file| file.tensor("output_norm.weight").element_type = 99, "Q6_K or Q8_K, got ggml type 99"),
        (|file| file.tensor("output_norm.weight").element_type = 12, "with rows of whole blocks of 256, got [32]"),
        (|file| file.tensor("output_norm.weight").offset = Some(4), "at a multiple of 32, got 4"),
        (|file| file.tensor("output_norm.weight").offset = Some(1 << 40), "within the file's"),
        (|file| file.tensor("output_norm.weight").offset = Some(u64::MAX - 31), "within the file, got offset"),
        (|file| file.tensor("output_norm.weight").offset = Some(0), "expected tensors that do not overlap"),
    ];
    for (change, expected) in changes {
        let mut file = good.clone();
        change(&mut file);
        assert_refused(&file.save(&folder), expected);
    }

    let bytes = good.bytes();
    let path = folder.path().join("model.gguf");
    let refuse = |bytes: &[u8], expected: &str| {
        fs::write(&path, bytes).unwrap();
        assert_refused(&path, expected);
    };
    for (offset, expected) in
        [(8, "at most 65536 tensors"), (16, "at most 65536 keys"), (24, "at most 65536 bytes of a key")]
    {
        let mut lying = bytes.clone();
        lying[offset..offset + 8].copy_from_slice(&(1u64 << 63).to_le_bytes());
        refuse(&lying, expected);
    }
    refuse(b"{}", "expected a GGUF file, or a folder of Hugging Face within the file");
    refuse(b"nothing known", "expected a GGUF file, or a folder of Hugging Face, got a file that begins with");
    for length in (0..4_096).step_by(37).chain((4_096..bytes.len() - 1).step_by(9_973)) {
        refuse(&bytes[..length], "within the file");
    }
}

/// The largest that all tests together may need at a time.
const MEMORY_BYTES_MAX: usize = 64 << 20;

/// Opens and loads what may be broken: it must not panic, and not ask for memory as a lying file would have it.
fn try_to_read(path: &Path) {
    if let Ok(pretrained) = Pretrained::open(path) {
        drop(pretrained.load());
    }
    let peak = ALLOCATOR.peak_usage();
    assert!(peak < MEMORY_BYTES_MAX, "{peak} bytes");
}

/// Replaces bytes, and then cuts the end off.
fn damage(bytes: &mut Vec<u8>, changes: &[(usize, u8)], cut: Option<usize>) {
    for (position, byte) in changes {
        let position = position % bytes.len();
        bytes[position] = *byte;
    }
    bytes.truncate(cut.map_or(bytes.len(), |cut| cut % bytes.len()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damaged_gguf_files_do_no_harm(
        changes in prop::collection::vec((0usize..3_000, any::<u8>()), 0..4),
        cut in prop::option::weighted(0.2, any::<usize>()),
    ) {
        static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
            let config = gguf_config(Family::Llama);
            let mut file = gguf_of(&config, Family::Llama, &Params::zeros(&config));
            file.set("tokenizer.ggml.tokens", array_value(8, 11, &text_bytes("token").repeat(11)));
            file.bytes()
        });
        let mut bytes = GOOD.clone();
        damage(&mut bytes, &changes, cut);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        fs::write(&path, bytes).unwrap();
        try_to_read(&path);
    }

    #[test]
    fn damaged_folders_do_no_harm(
        changes in prop::collection::vec((0usize..3_000, any::<u8>()), 0..4),
        cut in prop::option::weighted(0.2, any::<usize>()),
        name in prop::sample::select(vec!["model.safetensors", "config.json"]),
    ) {
        static GOOD: LazyLock<TempDir> = LazyLock::new(|| written(Family::Mistral, StoredType::Bf16).0);
        let folder = tempfile::tempdir().unwrap();
        for own_name in ["model.safetensors", "config.json"] {
            let mut bytes = fs::read(GOOD.path().join(own_name)).unwrap();
            if own_name == name {
                damage(&mut bytes, &changes, cut);
            }
            fs::write(folder.path().join(own_name), bytes).unwrap();
        }
        try_to_read(folder.path());
    }
}
