//! Where a run's config comes from: a preset, then a file, then `--set`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

/// The presets, compiled in.
pub(crate) const PRESETS: [(&str, &str); 3] = [
    ("laptop", include_str!("../deploy/configs/laptop.toml")),
    ("ladder", include_str!("../deploy/configs/ladder.toml")),
    ("smoke", include_str!("../deploy/configs/smoke.toml")),
];

/// What `train` runs when it is told nothing.
pub(crate) const DEFAULT_PRESET: &str = "laptop";

/// A resolved config: what is learned, and how this machine goes about it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RunConfig {
    /// Names default run directories.
    pub(crate) name: String,
    pub(crate) run: learner::Config,
    pub(crate) local: LocalConfig,
}

/// Keys that change when things happen and never what; they are not part of a run's identity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LocalConfig {
    /// Threads that play and train; 0 for all cores.
    pub(crate) threads: usize,
    /// Sequences decoded side by side.
    pub(crate) slots: usize,
    /// Steps between checkpoints.
    pub(crate) checkpoint_every: u64,
    /// Checkpoints kept.
    pub(crate) keep_checkpoints: usize,
    /// Seconds without an answer after which the run ends with an error.
    pub(crate) stall_seconds: u64,
    /// Wall time after which the clock ends a run whose config has no number of steps; `--minutes`.
    pub(crate) minutes: Option<f64>,
}

impl LocalConfig {
    pub(crate) fn num_threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        if self.threads == 0 { cores() } else { self.threads }
    }

    pub(crate) fn stall_limit(&self) -> Duration {
        Duration::from_secs(self.stall_seconds)
    }

    fn validate(&self) -> Result<()> {
        let check = |key: &str, expected: &str, got: u64, holds: bool| {
            if holds { Ok(()) } else { Err(anyhow!("local.{key}: expected {expected}, got {got}")) }
        };
        check("threads", "0 to 1024", self.threads as u64, self.threads <= 1_024)?;
        check("slots", "1 to 1048576", self.slots as u64, (1..=1 << 20).contains(&self.slots))?;
        check("checkpoint_every", "1 or more", self.checkpoint_every, self.checkpoint_every > 0)?;
        check("keep_checkpoints", "1 or more", self.keep_checkpoints as u64, self.keep_checkpoints > 0)?;
        check("stall_seconds", "1 or more", self.stall_seconds, self.stall_seconds > 0)
    }
}

/// Resolves a preset's name or the path of a TOML file, and `key=value` overrides on top.
///
/// A file states what it changes; `preset = "smoke"` in it names what it starts from.
pub(crate) fn resolve(config: Option<&str>, overrides: &[String]) -> Result<RunConfig> {
    let config = config.unwrap_or(DEFAULT_PRESET);
    let (name, mut table) = match preset(config) {
        Some(text) => (config.to_owned(), text),
        None => read_file(Path::new(config))?,
    };
    for assignment in overrides {
        set(&mut table, assignment)?;
    }
    from_table(name, table)
}

/// Reads the config that a run directory holds.
pub(crate) fn of_run(run_dir: &Path) -> Result<RunConfig> {
    let path = run_dir.join("config.toml");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("{}: expected a run directory, with a config.toml", run_dir.display()))?;
    let table: Table = text.parse().map_err(|error| anyhow!("{}: {}", path.display(), one_line(&error)))?;
    let name = run_dir.file_name().map_or("run".to_owned(), |name| name.to_string_lossy().into_owned());
    from_table(name, table).with_context(|| format!("{}", path.display()))
}

/// Writes the config in full.
pub(crate) fn to_toml(config: &RunConfig) -> Result<String> {
    let mut table = Table::try_from(&config.run)?;
    table.insert("local".to_owned(), Value::try_from(&config.local)?);
    Ok(toml::to_string(&table)?)
}

fn from_table(name: String, mut table: Table) -> Result<RunConfig> {
    let local = table.remove("local").context("local: expected a table, got nothing")?;
    let local: LocalConfig = local.try_into().map_err(|error| anyhow!("local: {}", one_line(&error)))?;
    local.validate()?;
    let run: learner::Config = table.try_into().map_err(|error: toml::de::Error| anyhow!(one_line(&error)))?;
    let sources: Vec<_> = crate::sources();
    run.validate(&sources.iter().map(AsRef::as_ref).collect::<Vec<_>>())?;
    Ok(RunConfig { name, run, local })
}

fn one_line(error: &toml::de::Error) -> String {
    error.to_string().trim().replace('\n', " ")
}

fn preset(name: &str) -> Option<Table> {
    let (_, text) = PRESETS.iter().find(|(preset, _)| *preset == name)?;
    Some(text.parse().expect("presets are tested"))
}

fn read_file(path: &Path) -> Result<(String, Table)> {
    let names: Vec<&str> = PRESETS.iter().map(|(name, _)| *name).collect();
    let text = std::fs::read_to_string(path).with_context(|| {
        format!("config: expected one of {}, or a TOML file, got {:?}", names.join(", "), path.display().to_string())
    })?;
    let mut own: Table = text.parse().map_err(|error| anyhow!("{}: {}", path.display(), one_line(&error)))?;
    let base = match own.remove("preset") {
        Some(Value::String(name)) => name,
        Some(other) => bail!("{}: preset: expected a name, got {other}", path.display()),
        None => DEFAULT_PRESET.to_owned(),
    };
    let expected = || format!("{}: preset: expected one of {}, got {base:?}", path.display(), names.join(", "));
    let mut table = preset(&base).with_context(expected)?;
    overlay(&mut table, own);
    let name = path.file_stem().map_or("run".to_owned(), |stem| stem.to_string_lossy().into_owned());
    Ok((name, table))
}

fn overlay(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(base)), Value::Table(over)) => overlay(base, over),
            (_, value) => drop(base.insert(key, value)),
        }
    }
}

/// Carries out `learner.learning_rate=1e-3`; an empty value removes the key.
fn set(table: &mut Table, assignment: &str) -> Result<()> {
    let (key, value) =
        assignment.split_once('=').with_context(|| format!("--set: expected key=value, got {assignment:?}"))?;
    let mut parts: Vec<&str> = key.split('.').collect();
    let last = parts.pop().unwrap_or_default();
    let mut table = table;
    for part in parts {
        table = table
            .get_mut(part)
            .and_then(Value::as_table_mut)
            .with_context(|| format!("--set {key}: expected a table of the config, got {part:?}"))?;
    }
    if value.is_empty() {
        table.remove(last);
        return Ok(());
    }
    // A value is TOML; a bare word is a string.
    let parsed = format!("value = {value}").parse::<Table>().ok().and_then(|mut parsed| parsed.remove("value"));
    table.insert(last.to_owned(), parsed.unwrap_or_else(|| Value::String(value.to_owned())));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_resolve_and_survive_their_file() {
        for (name, _) in PRESETS {
            let config = resolve(Some(name), &[]).unwrap();
            let table = to_toml(&config).unwrap().parse().unwrap();
            assert_eq!(from_table(config.name.clone(), table).unwrap(), config);
        }
    }

    #[test]
    fn overrides_change_one_key() {
        let set = |overrides: &[&str]| {
            resolve(Some("smoke"), &overrides.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(set(&["learner.reuse=3"]).unwrap().run.learner.reuse, 3.0);
        assert_eq!(set(&["learner.reuse=3.5"]).unwrap().run.learner.reuse, 3.5);
        assert_eq!(set(&["actor.behavior=uniform-legal"]).unwrap().run.actor.behavior, proto::Behavior::UniformLegal);
        assert_eq!(set(&["schedule.num_steps="]).unwrap().run.schedule.num_steps, None);
        let local = set(&["local.slots=16"]).unwrap();
        assert_eq!(local.run.digest(), set(&[]).unwrap().run.digest(), "local keys are not part of the identity");
        for (wrong, says) in [
            ("learner.lr=1", "unknown field `lr`"),
            ("lerner.reuse=1", "expected a table"),
            ("learner.reuse", "expected key=value"),
            ("learner.reuse=-1.0", "learner.reuse: expected over 0"),
            ("learner.reuse=many", "invalid type"),
            ("model.vocabulary_size=100", "model.vocabulary_size: expected 256, got 100"),
            ("model.d_model=33", "model.d_model: expected a multiple of 16"),
            ("local.slots=0", "local.slots: expected 1 to"),
            ("local.slot=1", "unknown field `slot`"),
            ("batch.lag=2", "batch.lag: expected 0 or 1, got 2"),
        ] {
            let error = set(&[wrong]).unwrap_err().to_string();
            assert!(error.contains(says), "{wrong}: {error}");
        }
    }
}
