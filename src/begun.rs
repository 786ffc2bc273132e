//! The manifest and config that a run began with, and how the current ones differ, key by key.

use std::path::Path;

use anyhow::{Result, bail};
use learner::{Error, JournalReader, Manifest, Record};
use proto::Digest;
use serde_json::Value;

use crate::run_config::{self, RunConfig};

/// The key of `manifest.json` that holds the full config as TOML. People may edit `config.toml` instead.
const CONFIG: &str = "config_toml";
/// The key of `manifest.json` that holds the config's name.
const CONFIG_NAME: &str = "config_name";

/// Returns the manifest and config that a run begins with as JSON, for people and for [`expect`].
pub(crate) fn to_json(manifest: &Manifest, config: &RunConfig) -> Result<String> {
    let mut json = serde_json::to_value(manifest)?;
    json[CONFIG] = run_config::to_toml(config)?.into();
    json[CONFIG_NAME] = config.name.clone().into();
    Ok(serde_json::to_string_pretty(&json)?)
}

/// Checks that a run directory holds no run, or one that began with this manifest and this config.
///
/// # Errors
/// Lists every config key that differs, or the first other field of the manifest, with its old and new value.
pub(crate) fn expect(run_dir: &Path, manifest: &Manifest, config: &RunConfig) -> Result<()> {
    match learner::expect_begun_with(run_dir, manifest) {
        Err(Error::Manifest { field, .. }) if field == "config" => expect_config(run_dir, config),
        same => Ok(same?),
    }
}

/// Checks that the journal of a run directory was begun with this config.
///
/// # Errors
/// Lists every key that differs, with its value in the journal and in `config`.
pub(crate) fn expect_config(run_dir: &Path, config: &RunConfig) -> Result<()> {
    let first = JournalReader::open(&run_dir.join("journal"))?.next()?.and_then(Result::ok);
    let is = config.run.digest();
    let was = first.as_ref().and_then(Record::manifest).map_or(is, |manifest| manifest.config);
    if was == is {
        return Ok(());
    }
    let changes = config_of(run_dir, was).map(|then| differences(&then, &config.run)).transpose()?;
    match changes.filter(|changes| !changes.is_empty()) {
        Some(changes) => bail!("manifest: {}; `--fork` starts a new run from this config", changes.join(", ")),
        None => bail!(
            "{}: expected a journal of this config ({}), got one of another config ({}), which is no longer in the run \
             directory",
            run_dir.join("journal").display(),
            is.short(),
            was.short()
        ),
    }
}

/// Returns the name of the config that a run began with. It may differ from the directory's name.
pub(crate) fn config_name(run_dir: &Path) -> Option<String> {
    written(run_dir)?[CONFIG_NAME].as_str().map(str::to_owned)
}

fn written(run_dir: &Path) -> Option<Value> {
    serde_json::from_str(&std::fs::read_to_string(run_dir.join("manifest.json")).ok()?).ok()
}

/// Returns the config with this hash if the run directory still has it.
fn config_of(run_dir: &Path, hash: Digest) -> Option<learner::Config> {
    let in_manifest = written(run_dir).and_then(|json| json[CONFIG].as_str().map(str::to_owned));
    let texts = [in_manifest, std::fs::read_to_string(run_dir.join("config.toml")).ok()].into_iter().flatten();
    let mut configs = texts.filter_map(|text| run_config::run_of_toml(&text));
    configs.find(|config| config.digest() == hash)
}

/// Lists the keys that differ, with their values: `seed was 0, is 3`.
fn differences(then: &learner::Config, now: &learner::Config) -> Result<Vec<String>> {
    let mut found = Vec::new();
    compare("", Some(&serde_json::to_value(then)?), Some(&serde_json::to_value(now)?), &mut found);
    Ok(found)
}

fn compare(key: &str, then: Option<&Value>, now: Option<&Value>, found: &mut Vec<String>) {
    let below = |part: &str| if key.is_empty() { part.to_owned() } else { format!("{key}.{part}") };
    match (then, now) {
        (Some(Value::Object(then)), Some(Value::Object(now))) => {
            let added = now.keys().filter(|part| !then.contains_key(*part));
            for part in then.keys().chain(added) {
                compare(&below(part), then.get(part), now.get(part), found);
            }
        }
        (Some(Value::Array(then)), Some(Value::Array(now))) => {
            for index in 0..then.len().max(now.len()) {
                compare(&below(&index.to_string()), then.get(index), now.get(index), found);
            }
        }
        _ if then == now => {}
        _ => {
            let text = |value: Option<&Value>| match value {
                None | Some(Value::Null) => "absent".to_owned(),
                Some(value) => value.to_string(),
            };
            found.push(format!("{key} was {}, is {}", text(then), text(now)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_keys() {
        let config = |overrides: &[&str]| {
            let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
            run_config::resolve(Some(Path::new("smoke")), &overrides, &[]).unwrap().run
        };
        let then = config(&[]);
        assert_eq!(differences(&then, &then).unwrap(), [""; 0]);
        let now = config(&["seed=3", "learner.learning_rate=0.005", "self_play=", "exams.names=[]"]);
        let found = differences(&then, &now).unwrap();
        assert_eq!(found[0], "exams.names.0 was \"countdown-3\", is absent");
        assert_eq!(found[1], "learner.learning_rate was 0.004, is 0.005");
        assert_eq!(found[2], "seed was 0, is 3");
        assert!(found[3].starts_with("self_play was {") && found[3].ends_with("}, is absent"), "{found:?}");
        assert_eq!(found.len(), 4);
    }
}
