//! Resolves a run's config from a preset, then a file, then `--set`.

mod local;
mod origin;
mod places;
mod rooms;
mod tables;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use domains::{File, Split, domain};
use language::text::{Constraint, TextOptions};
use language::{Language, Source};
use learner::{Constrain, Models};
use policy::{Backend, Device};
use proto::{Digest, KeyedProblem, ProblemSource};
use toml::{Table, Value};

use self::origin::{Needed, Origin};
use self::places::{at_base, file_of, spell_out_base, spell_out_teacher};
use self::rooms::{validate_exams, validate_ladder, validate_proposals};
use self::tables::{complete, key_of, preset, set};
use crate::input::{name_of_input, read_text};
use crate::pretrained::{Base, Opened, teacher};
use crate::problems::{self, ProblemFile, exam_of, spell_out_file};

pub(crate) use self::local::{BusConfig, LocalConfig, check_minutes};
pub(crate) use self::origin::TomlFile;
pub(crate) use self::places::{Places, keep_places};
pub(crate) use self::tables::{PRESETS, expect_preset, sets};

/// The preset that `train` runs by default.
pub(crate) const DEFAULT_PRESET: &str = "laptop";

/// A resolved config: the run's settings, and the settings of this machine.
#[derive(Clone, Debug)]
pub(crate) struct RunConfig {
    /// Used in the names of default run directories.
    pub(crate) name: String,
    pub(crate) run: learner::Config,
    pub(crate) local: LocalConfig,
    /// The pretrained model that the run begins with.
    pub(crate) base: Option<Base>,
    /// The file of problems that the run trains on, if it was needed and found.
    pub(crate) file: Option<ProblemFile>,
}

impl RunConfig {
    /// Returns the language of the run's prompts and answers.
    pub(crate) fn language(&self) -> Arc<dyn Language> {
        language_of(self.base.as_ref())
    }

    /// Opens a device for the run's network: with the frozen weights there, if the run trains an adapter.
    pub(crate) fn open(&self, device: Device) -> Result<Backend> {
        let backend = device.open()?;
        match self.base.as_ref().filter(|_| self.run.model.adapter.is_some()) {
            Some(base) => Ok(backend.with_base(&self.run.model, base.pretrained.load()?)?),
            None => Ok(backend),
        }
    }

    /// Returns a problem source for every domain of the language.
    pub(crate) fn sources(&self) -> Vec<Arc<dyn ProblemSource>> {
        sources_of(self.base.as_ref(), self.file.as_ref())
    }

    /// Opens the pretrained models that the learner needs.
    ///
    /// # Errors
    /// When the teacher of `learner.distill` is missing, or is another model than the config names. Workers do not need it, so no
    /// config is refused for it earlier.
    pub(crate) fn models(&self) -> Result<Models> {
        let teacher = match (&self.run.learner.distill, &self.base) {
            (Some(distill), Some(base)) => {
                let place =
                    self.local.teacher.as_ref().context(
                        "local.teacher: expected where the model of learner.distill.teacher lies, got nothing",
                    )?;
                let teacher = teacher(place, distill.teacher, base, self.run.model.max_positions);
                Some(teacher.context("local.teacher")?)
            }
            _ => None,
        };
        Ok(Models { base: self.base.as_ref().map(|base| base.pretrained.clone()), teacher })
    }

    /// Returns the names of the domains that the run trains on.
    pub(crate) fn domains(&self) -> impl Iterator<Item = &str> {
        self.run.domains.iter().map(|domain| domain.name.as_str())
    }

    /// Returns an exam's problems in the form that the run is examined on.
    pub(crate) fn exam(&self, name: &str, split: Split) -> Result<Vec<KeyedProblem>> {
        if name == problems::NAME {
            self.expect_file()?;
        }
        exam_of(&self.run, self.file.as_ref(), name, split)
    }

    /// Checks that the file of problems is here, if the run trains on one.
    pub(crate) fn expect_file(&self) -> Result<()> {
        let trains_on_one = self.domains().any(|name| name == problems::NAME);
        match &self.local.file {
            Some(place) if trains_on_one && self.file.is_none() => {
                bail!("local.file: {place}: expected the file of problems, found none")
            }
            _ => Ok(()),
        }
    }
}

/// Resolves a preset's name or the path of a TOML file, with `key=value` overrides and assignments implied by other options.
///
/// A file contains its changes and names its base: `preset = "smoke"`. Without a base it must be a full config.
pub(crate) fn resolve(config: Option<&Path>, overrides: &[String], implied: &[String]) -> Result<RunConfig> {
    resolve_with(config, overrides, implied, Needed::Yes)
}

fn resolve_with(
    config: Option<&Path>,
    overrides: &[String],
    implied: &[String],
    problems: Needed,
) -> Result<RunConfig> {
    let mut said: Vec<&String> = Vec::new();
    for assignment in overrides {
        let says = |other: &&&String| sets(assignment, key_of(other)) || sets(other, key_of(assignment));
        if let Some(other) = said.iter().find(says) {
            bail!("--set {other} and --set {assignment}: expected one of them, got both");
        }
        said.push(assignment);
    }
    // Apply assignments to a table before those to its keys, in whatever order they are given.
    said.sort_by_key(|assignment| match key_of(assignment) {
        "model.size" => 1,
        key => key.split('.').count(),
    });
    let overrides: Vec<String> = said.into_iter().chain(implied).cloned().collect();
    let overrides = overrides.as_slice();
    let config = config.unwrap_or(Path::new(DEFAULT_PRESET));
    let (name, mut table, file) = match config.to_str().and_then(|name| Some((name, preset(name)?))) {
        Some((name, table)) => (name.to_owned(), table, None),
        None => {
            let (table, file) = read_file(config)?;
            (config_name(config), table, Some(file))
        }
    };
    for assignment in overrides {
        set(&mut table, assignment)?;
    }
    from_table(name, table, &Origin { file, overrides, problems })
}

/// Reads the config of a run directory, and applies overrides. The file of its problems may be gone: see
/// [`RunConfig::expect_file`].
pub(crate) fn of_run(run_dir: &Path, overrides: &[String]) -> Result<RunConfig> {
    resolve_with(Some(&path_in_run(run_dir)?), overrides, &[], Needed::Perhaps)
}

/// Parses a full config, as [`to_toml`] writes it, for a worker, which needs no problems. `base` replaces the place of its
/// pretrained model.
pub(crate) fn from_toml(name: &str, text: &str, base: Option<&str>) -> Result<RunConfig> {
    let overrides: Vec<String> = base.map(at_base).into_iter().collect();
    let mut table = text.parse()?;
    overrides.iter().try_for_each(|assignment| set(&mut table, assignment))?;
    from_table(name.to_owned(), table, &Origin { file: None, overrides: &overrides, problems: Needed::No })
}

/// Returns the digest of the pretrained model in a full config, and where it lies for the process that wrote it.
pub(crate) fn base_of_toml(text: &str) -> Option<(Digest, String)> {
    let base = run_of_toml(text)?.language?.base;
    let table: Table = text.parse().ok()?;
    Some((base, table.get("local")?.get("base")?.as_str()?.to_owned()))
}

/// Returns the settings of the run in a full config, without checking them against anything.
pub(crate) fn run_of_toml(text: &str) -> Option<learner::Config> {
    let mut table: Table = text.parse().ok()?;
    table.remove("local");
    Value::Table(table).try_into().ok()
}

/// Returns the path of a run directory's config.
pub(crate) fn path_in_run(run_dir: &Path) -> Result<PathBuf> {
    let path = run_dir.join("config.toml");
    ensure!(path.exists(), "{}: expected a run directory with a config.toml, found none", run_dir.display());
    Ok(path)
}

/// Returns a config's name: the file's name, or for a run the directory's name without seed and number.
pub(crate) fn config_name(path: &Path) -> String {
    if path == Path::new("-") {
        return "stdin".to_owned();
    }
    let is_number = |text: &str| !text.is_empty() && text.chars().all(|letter| letter.is_ascii_digit());
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let run_dir = path.parent().and_then(Path::file_name).map(|name| name.to_string_lossy());
    match (stem.as_str(), run_dir) {
        ("config", Some(run_dir)) => match run_dir.rsplitn(3, '-').collect::<Vec<_>>()[..] {
            [number, seed, config] if is_number(number) && is_number(seed) => config.to_owned(),
            _ => run_dir.to_string(),
        },
        _ => stem,
    }
}

/// Returns the full config as TOML.
pub(crate) fn to_toml(config: &RunConfig) -> Result<String> {
    let mut table = Table::try_from(&config.run)?;
    table.insert("local".to_owned(), Value::try_from(&config.local)?);
    Ok(toml::to_string(&table)?)
}

fn from_table(name: String, mut table: Table, origin: &Origin<'_>) -> Result<RunConfig> {
    let named = |key: &str| origin.name(&key.split('.').map(str::to_owned).collect::<Vec<_>>());
    let mut local = match table.remove("local") {
        Some(Value::Table(local)) => local,
        Some(other) => bail!("{}: expected a table, got {other}", named("local")),
        None => bail!("local: expected a table, got nothing"),
    };
    let opened = spell_out_base(&mut table, &mut local).map_err(|error| error.context(named("model.base")))?;
    spell_out_teacher(&mut table, &mut local).map_err(|error| error.context(named("learner.distill.teacher")))?;
    let named_file = spell_out_file(&mut table, &mut local).map_err(|error| error.context(named("domains")))?;
    let local: LocalConfig = origin.read(local, "local")?;
    let run: learner::Config = origin.read(table, "")?;
    local.validate(&named)?;
    let base = match (&run.language, &local.base) {
        (Some(language), Some(base)) => {
            let opened = opened.map_or_else(|| Opened::named(base), Ok);
            let options = text_options(&run).expect("a run with a language");
            let base = opened.and_then(|opened| Base::new(opened, language.base, &run.model, options));
            Some(base.map_err(|error| error.context(named("local.base")))?)
        }
        (Some(_), None) => {
            bail!("{}: expected where the model of language.base lies, got nothing", named("local.base"))
        }
        (None, Some(base)) => {
            bail!("{}: expected none in a run without a pretrained model, got {base:?}", named("local.base"))
        }
        (None, None) => None,
    };
    if let (None, Some(teacher)) = (&run.learner.distill, &local.teacher) {
        bail!("{}: expected none without learner.distill, got {teacher:?}", named("local.teacher"));
    }
    ensure!(
        base.is_some() || run.model.variant.is_plain(),
        "{}: expected none, since networks from random weights have the plain decoder",
        named("model.variant")
    );
    for entry in run.domains.iter().filter(|_| base.is_some()) {
        let is_in_words = domain(&entry.name)?.wording().is_some();
        ensure!(
            is_in_words,
            "{}: expected domains in words, which a pretrained model needs, got {}",
            named("domains"),
            entry.name
        );
    }
    let (expected, got) = (language_of(base.as_ref()).vocabulary_size(), run.model.vocabulary_size);
    ensure!(got == expected, "{}: expected {expected}, got {got}", named("model.vocabulary_size"));
    let file = file_of(&run, &local, named_file, origin)?;
    let sources = sources_of(base.as_ref(), file.as_ref());
    run.validate(&sources.iter().map(AsRef::as_ref).collect::<Vec<_>>()).map_err(|error| match error {
        learner::Error::Config { key, expected, got } => anyhow!("{}: expected {expected}, got {got}", named(key)),
        learner::Error::Policy(policy::Error::Config { key, expected, got }) => {
            anyhow!("{}: expected {expected}, got {got}", named(&format!("model.{key}")))
        }
        error => error.into(),
    })?;
    ensure!(
        local.bus.audit_share == 0.0 || !run.is_free_running(),
        "{}: expected 0 in a free-running run, whose rollouts depend on timing, got {}",
        named("local.bus.audit_share"),
        local.bus.audit_share
    );
    ensure!(
        local.bus.audit_share == 0.0 || run.actor.device.is_reproducible(),
        "{}: expected 0 with actor.device = {}, whose rollouts are not reproducible, got {}",
        named("local.bus.audit_share"),
        run.actor.device,
        local.bus.audit_share
    );
    if let (Some(minutes), Some(steps)) = (local.minutes, run.schedule.num_steps) {
        let (minutes_at, steps_at) = (named("local.minutes"), named("schedule.num_steps"));
        bail!("{minutes_at} = {minutes}, {steps_at} = {steps}: expected one limit on the run, got both");
    }
    let language = language_of(base.as_ref());
    file.as_ref()
        .map_or(Ok(()), |file| file.expect_room(language.as_ref(), run.model.max_positions))
        .map_err(|error| error.context(named("domains")))?;
    let has_problems = |name: &str| name != problems::NAME || file.is_some() || origin.problems == Needed::Yes;
    validate_exams(&run, file.as_ref(), language.as_ref(), has_problems)
        .map_err(|error| error.context(named("exams.names")))?;
    validate_proposals(&run).map_err(|error| error.context(named("self_play.propose_tasks")))?;
    validate_ladder(&run, language.as_ref()).map_err(|error| error.context(named("domains")))?;
    Ok(RunConfig { name, run, local, base, file })
}

fn language_of(base: Option<&Base>) -> Arc<dyn Language> {
    base.map_or_else(crate::language, |base| base.language.clone() as Arc<dyn Language>)
}

fn sources_of(base: Option<&Base>, file: Option<&ProblemFile>) -> Vec<Arc<dyn ProblemSource>> {
    let Some(base) = base else { return Source::of_symbols() };
    let mut sources = Source::of_words(base.language.clone());
    // A worker knows the domain without its problems.
    let problems = file.map(|file| file.problems.clone()).unwrap_or_default();
    sources.push(Arc::new(Source::new(Arc::new(File::of(problems)), base.language.clone())));
    sources
}

/// Returns how a run asks its pretrained model, if it begins with one.
pub(crate) fn text_options(run: &learner::Config) -> Option<TextOptions> {
    let language = run.language.as_ref()?;
    let constraint = match language.constrain {
        Constrain::Answer => Constraint::Answer,
        Constrain::None => Constraint::None,
    };
    Some(TextOptions { max_reply_tokens: run.actor.max_answer_tokens, num_examples: language.examples, constraint })
}

/// Reads a file, and merges it into the preset that it names.
fn read_file(path: &Path) -> Result<(Table, TomlFile)> {
    let names: Vec<&str> = PRESETS.iter().map(|(name, _)| *name).collect();
    let text = read_text(path).with_context(|| {
        format!("config: expected one of {}, or a TOML file, got {:?}", names.join(", "), path.display().to_string())
    })?;
    let file = TomlFile { path: name_of_input(path), text };
    let table = complete(file.parse()?).with_context(|| path.display().to_string())?;
    Ok((table, file))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The others need their model: tests/e2e/pretrained_run.rs.
    const FROM_RANDOM_WEIGHTS: [&str; 3] = ["laptop", "ladder", "smoke"];

    #[test]
    fn presets_resolve_and_survive_their_file() {
        for name in FROM_RANDOM_WEIGHTS {
            let config = resolve(Some(Path::new(name)), &[], &[]).unwrap();
            let table = to_toml(&config).unwrap().parse().unwrap();
            let read =
                from_table(config.name.clone(), table, &Origin { file: None, overrides: &[], problems: Needed::Yes })
                    .unwrap();
            assert_eq!((read.name, read.run, read.local), (config.name, config.run, config.local));
        }
    }

    /// The output of `config` for a preset reads back as that preset, including its absent keys.
    #[test]
    fn a_config_in_full_is_laid_over_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.toml");
        for name in FROM_RANDOM_WEIGHTS {
            let config = resolve(Some(Path::new(name)), &["self_play=".to_owned()], &[]).unwrap();
            std::fs::write(&path, to_toml(&config).unwrap()).unwrap();
            let read = resolve(Some(&path), &[], &[]).unwrap();
            assert_eq!((read.run, read.local), (config.run, config.local), "{name}");
        }
    }

    #[test]
    fn runs_are_named_by_their_config() {
        for (path, name) in [
            ("mine.toml", "mine"),
            ("runs/ladder-0-12/config.toml", "ladder"),
            ("runs/two-words-7-1/config.toml", "two-words"),
            ("my-run/config.toml", "my-run"),
            ("config.toml", "config"),
        ] {
            assert_eq!(config_name(Path::new(path)), name);
        }
    }

    #[test]
    fn every_key_stands_in_the_preset_smoke() {
        let text = PRESETS.iter().find(|(name, _)| *name == "smoke").unwrap().1;
        let full = |optional: &[&str]| {
            let optional: Vec<String> = optional.iter().map(|text| (*text).to_owned()).collect();
            let config = resolve(Some(Path::new("smoke")), &optional, &[]).unwrap();
            Value::Table(to_toml(&config).unwrap().parse().unwrap())
        };
        let mut waiting = vec![full(&["schedule.decay_from=1"]), full(&["schedule.num_steps=", "local.minutes=1"])];
        while let Some(value) = waiting.pop() {
            match value {
                Value::Table(table) => {
                    for (key, value) in table {
                        assert!(text.contains(&key), "{key}");
                        waiting.push(value);
                    }
                }
                Value::Array(values) => waiting.extend(values),
                _ => {}
            }
        }
    }

    #[test]
    fn overrides_change_one_key() {
        let set = |overrides: &[&str]| {
            let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
            resolve(Some(Path::new("smoke")), &overrides, &[])
        };
        assert_eq!(set(&["learner.reuse=3"]).unwrap().run.learner.reuse, 3.0);
        assert_eq!(set(&["learner.reuse=3.5"]).unwrap().run.learner.reuse, 3.5);
        assert_eq!(set(&["actor.behavior=uniform-legal"]).unwrap().run.actor.behavior, proto::Behavior::UniformLegal);
        assert_eq!(set(&["schedule.num_steps="]).unwrap().run.schedule.num_steps, None);
        for overrides in [["model.size=small", "model.num_layers=5"], ["model.num_layers=5", "model.size=small"]] {
            let small = set(&overrides).unwrap().run.model;
            assert_eq!((small.d_model, small.ff_dim, small.num_layers, small.max_positions), (128, 384, 5, 32));
        }
        let micro = set(&["model={size=\"micro\", ff_dim=96}"]).unwrap().run.model;
        assert_eq!((micro.d_model, micro.ff_dim, micro.max_positions), (96, 96, 32), "as `model.size` does");
        let local = set(&["local.slots=16"]).unwrap();
        assert_eq!(local.run.digest(), set(&[]).unwrap().run.digest(), "local keys are not part of the identity");
        let free_running = ["batch.lag=1", "batch.max_staleness=8", "local.bus.audit_share=0.1"];
        let error = set(&free_running).unwrap_err().to_string();
        assert!(error.contains("local.bus.audit_share: expected 0 in a free-running run"), "{error}");
        let unequal = ["actor.device=candle-cpu", "local.bus.audit_share=0.1"];
        let error = set(&unequal).unwrap_err().to_string();
        assert!(error.contains("local.bus.audit_share: expected 0 with actor.device = candle-cpu"), "{error}");
        for said in [["seed=3", "seed=3"], ["schedule.num_steps=3", "schedule={num_steps=4,warmup_steps=1}"]] {
            let error = set(&said).unwrap_err().to_string();
            assert_eq!(error, format!("--set {} and --set {}: expected one of them, got both", said[0], said[1]));
        }
        let schedule = set(&["schedule.num_steps=30", "schedule={warmup_steps=1}"]).unwrap().run.schedule;
        assert_eq!((schedule.num_steps, schedule.warmup_steps), (Some(30), 1), "in whatever order");
        for (wrong, says) in [
            ("seed=3\nlearner.reuse=2", "--set: expected one key=value on one line, got \"seed=3\\nlearner.reuse=2\""),
            (
                "local.minutes=1",
                "--set local.minutes = 1, schedule.num_steps = 40: expected one limit on the run, got both",
            ),
            ("learner.lr=1", "unknown field `lr`"),
            ("lerner.reuse=1", "expected a table"),
            (
                "learner.policy_gradient.kind=grpo",
                "--set learner.policy_gradient.kind: expected a config with learner.policy_gradient, got one without; set all of its \
                 keys, as in --set 'learner.policy_gradient={ clip_high = 0.28, clip_low = 0.2, cross_entropy = true, \
                 entropy_bonus = 0.0, kind = \"grpo\", updates_per_step = 4, weight = 1.0 }'",
            ),
            ("learner.kl.weight=1", "set all of its keys, as in --set 'learner.kl={ ... }'"),
            ("learner.reuse", "expected key=value"),
            ("learner.reuse=-1.0", "learner.reuse: expected over 0"),
            ("learner.reuse=many", "invalid type"),
            ("model.vocabulary_size=100", "model.vocabulary_size: expected 256, got 100"),
            ("model.variant={tied_head=true}", "model.variant: expected none"),
            ("model.d_model=33", "model.d_model: expected a multiple of 16"),
            ("model.size=huge", "expected one of micro, nano, small, got \"huge\""),
            ("local.slots=0", "local.slots: expected 1 to"),
            (
                "local.keep_journal=some",
                "local.keep_journal: unknown variant `some`, expected `all` or `since-checkpoint`",
            ),
            ("local.bus.audit_share=1.5", "local.bus.audit_share: expected 0 to 1, got 1.5"),
            ("local.slot=1", "unknown field `slot`"),
            ("batch.lag=2", "batch.lag: expected 0 or 1, got 2"),
            ("batch.max_staleness=0", "batch.max_staleness: expected 1 to 1000, got 0"),
            ("batch.max_staleness=8", "batch.lag: expected 1 to 8, at most batch.max_staleness, got 0"),
        ] {
            let error = set(&[wrong]).unwrap_err().to_string();
            assert!(error.contains(says), "{wrong}: {error}");
        }
    }
}
