//! Presets, files and `--set` as tables that are laid over each other.

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use toml::{Table, Value};

use crate::report::option;

/// The presets, compiled in.
pub(crate) const PRESETS: [(&str, &str); 6] = [
    ("laptop", include_str!("../../deploy/configs/laptop.toml")),
    ("ladder", include_str!("../../deploy/configs/ladder.toml")),
    ("qwen3-0.6b", include_str!("../../deploy/configs/qwen3-0.6b.toml")),
    ("smoke", include_str!("../../deploy/configs/smoke.toml")),
    ("smollm2", include_str!("../../deploy/configs/smollm2.toml")),
    ("smollm2-lora", include_str!("../../deploy/configs/smollm2-lora.toml")),
];

/// The keys that each `model.size` expands to.
const SIZES: &str = "
nano = { d_model = 64, num_layers = 3, num_heads = 4, num_kv_heads = 2, ff_dim = 192 }
micro = { d_model = 96, num_layers = 3, num_heads = 6, num_kv_heads = 3, ff_dim = 288 }
small = { d_model = 128, num_layers = 3, num_heads = 8, num_kv_heads = 4, ff_dim = 384 }
";

pub(super) fn preset(name: &str) -> Option<Table> {
    let (_, text) = PRESETS.iter().find(|(preset, _)| *preset == name)?;
    let mut table = text.parse().expect("presets are tested");
    spell_out_size(&mut table).expect("presets are tested");
    Some(table)
}

/// Checks that a preset has this name.
pub(crate) fn expect_preset(name: &str) -> Result<()> {
    let names: Vec<&str> = PRESETS.iter().map(|(name, _)| *name).collect();
    ensure!(names.contains(&name), "preset: expected one of {}, got {name:?}", names.join(", "));
    Ok(())
}

/// Merges a config into the preset that it names. A config without a preset must be complete.
pub(super) fn complete(mut own: Table) -> Result<Table> {
    spell_out_size(&mut own)?;
    match own.remove("preset") {
        Some(Value::String(name)) => {
            expect_preset(&name)?;
            let mut table = preset(&name).expect("the name is a preset's");
            overlay(&mut table, own);
            Ok(table)
        }
        Some(other) => bail!("preset: expected a name, got {other}"),
        None => {
            // `ladder` has the keys that every config needs.
            let needed = preset("ladder").expect("a preset");
            match needed.keys().find(|key| !own.contains_key(*key)) {
                None => Ok(own),
                Some(key) => {
                    bail!("expected a full config, or a preset such as preset = \"laptop\"; `{key}` is missing")
                }
            }
        }
    }
}

pub(super) fn overlay(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(base)), Value::Table(over)) => overlay(base, over),
            (_, value) => drop(base.insert(key, value)),
        }
    }
}

/// Replaces `model.size` with the keys that it expands to. Explicit keys take precedence.
fn spell_out_size(config: &mut Table) -> Result<()> {
    let Some(model) = config.get_mut("model").and_then(Value::as_table_mut) else { return Ok(()) };
    let Some(size) = model.remove("size") else { return Ok(()) };
    let own = std::mem::replace(model, shape(&size)?);
    overlay(model, own);
    Ok(())
}

/// Returns the keys of a `model.size`.
fn shape(size: &Value) -> Result<Table> {
    let sizes: Table = SIZES.parse().expect("a constant");
    let shape = size.as_str().and_then(|name| sizes.get(name)).and_then(Value::as_table);
    let names = || sizes.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    shape.cloned().with_context(|| format!("model.size: expected one of {}, got {size}", names()))
}

/// Optional keys of a config.
const MAY_BE_ABSENT: [&str; 15] = [
    "self_play",
    "model.adapter",
    "learner.policy_gradient",
    "learner.policy_gradient.groups_per_step",
    "learner.kl",
    "learner.distill",
    "learner.dpo",
    "language",
    "schedule.num_steps",
    "schedule.decay_from",
    "local.minutes",
    "local.base",
    "local.teacher",
    "local.file",
    "local.bus.fault",
];

/// Whether an assignment sets this key, directly or through a table with a value for it.
pub(crate) fn sets(assignment: &str, key: &str) -> bool {
    let named = key_of(assignment);
    let Some(rest) = key.strip_prefix(named) else { return false };
    match rest.strip_prefix('.') {
        None => rest.is_empty(),
        Some(rest) => {
            let value = parsed(assignment.split_once('=').map_or("", |(_, value)| value));
            rest.split('.').try_fold(&value, |value, part| value.get(part)).is_some()
        }
    }
}

pub(super) fn key_of(assignment: &str) -> &str {
    assignment.split('=').next().unwrap_or_default()
}

/// Parses a value as TOML; a bare word is a string.
fn parsed(value: &str) -> Value {
    let table = format!("value = {value}").parse::<Table>();
    table.ok().and_then(|mut table| table.remove("value")).unwrap_or_else(|| Value::String(value.to_owned()))
}

/// Optional tables, with a config that has them.
const EXAMPLES: [(&str, &str); 3] = [
    ("learner.policy_gradient", include_str!("../../deploy/configs/dr-grpo.toml")),
    ("model.adapter", include_str!("../../deploy/configs/smollm2-lora.toml")),
    ("self_play", include_str!("../../deploy/configs/laptop.toml")),
];

/// Returns what is wrong with an assignment to a key of a table that is not there.
fn no_table(assignment: &str, table: &str) -> anyhow::Error {
    let key = key_of(assignment);
    if !MAY_BE_ABSENT.contains(&table) {
        let part = table.rsplit('.').next().unwrap_or_default();
        return anyhow!("--set {key}: expected a table in the config, got {part:?}");
    }
    let example = EXAMPLES.iter().find(|(name, _)| *name == table).and_then(|(_, config)| {
        let mut config = config.parse().ok()?;
        set(&mut config, assignment).ok()?;
        table.split('.').try_fold(&Value::Table(config), |value, part| value.get(part)).map(Value::to_string)
    });
    let whole = format!("{table}={}", example.unwrap_or_else(|| "{ ... }".to_owned()));
    anyhow!(
        "--set {key}: expected a config with {table}, got one without; set all of its keys, as in {}",
        option("--set", &whole)
    )
}

/// Applies an assignment such as `learner.learning_rate=1e-3`. An empty value removes the key.
pub(super) fn set(table: &mut Table, assignment: &str) -> Result<()> {
    let (key, value) =
        assignment.split_once('=').with_context(|| format!("--set: expected key=value, got {assignment:?}"))?;
    // TOML would read the next line as another key.
    ensure!(!assignment.contains(['\n', '\r']), "--set: expected one key=value on one line, got {assignment:?}");
    let mut parts: Vec<&str> = key.split('.').collect();
    let last = parts.pop().unwrap_or_default();
    let mut table = table;
    for (index, part) in parts.iter().enumerate() {
        let Some(inner) = table.get_mut(*part).and_then(Value::as_table_mut) else {
            return Err(no_table(assignment, &parts[..=index].join(".")));
        };
        table = inner;
    }
    if value.is_empty() {
        let known = MAY_BE_ABSENT.join(", ");
        ensure!(MAY_BE_ABSENT.contains(&key), "--set {key}=: expected an optional key ({known})");
        table.remove(last);
        return Ok(());
    }
    let value = parsed(value);
    if key == "model.size" {
        overlay(table, shape(&value).map_err(|error| anyhow!("--set {error}"))?);
        return Ok(());
    }
    let mut own = Table::from_iter([(last.to_owned(), value)]);
    if key == "model" {
        spell_out_size(&mut own).map_err(|error| anyhow!("--set {error}"))?;
    }
    overlay(table, own);
    Ok(())
}
