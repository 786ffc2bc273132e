//! Resolves a run's config from a preset, then a file, then `--set`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bus::Faults;
use domains::{Split, domain, exam_problems};
use language::text::{Constraint, TextOptions};
use language::{Language, Source};
use learner::{Constrain, KeepJournal, Models};
use policy::{Backend, Device};
use proto::{Digest, KeyedProblem, Problem, ProblemSource};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_path_to_error::Segment;
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use crate::input::{name_of_input, read_text, stray_mark};
use crate::pretrained::{Base, NUM_EXAMPLES, Opened, teacher};
use crate::room::positions;

/// The presets, compiled in.
pub(crate) const PRESETS: [(&str, &str); 5] = [
    ("laptop", include_str!("../deploy/configs/laptop.toml")),
    ("ladder", include_str!("../deploy/configs/ladder.toml")),
    ("smoke", include_str!("../deploy/configs/smoke.toml")),
    ("smollm2", include_str!("../deploy/configs/smollm2.toml")),
    ("smollm2-lora", include_str!("../deploy/configs/smollm2-lora.toml")),
];

/// The keys that each `model.size` expands to.
const SIZES: &str = "
nano = { d_model = 64, num_layers = 3, num_heads = 4, num_kv_heads = 2, ff_dim = 192 }
micro = { d_model = 96, num_layers = 3, num_heads = 6, num_kv_heads = 3, ff_dim = 288 }
small = { d_model = 128, num_layers = 3, num_heads = 8, num_kv_heads = 4, ff_dim = 384 }
";

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
        sources_of(self.base.as_ref())
    }

    /// Opens the pretrained models that the learner needs.
    ///
    /// # Errors
    /// Says what is wrong with the teacher of `learner.distill`. Workers do not need it, so it is not opened before.
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
    pub(crate) fn exam(&self, name: &str, split: Split) -> Result<Vec<Problem>> {
        Ok(exam_problems(name, split, self.domains())?)
    }
}

/// Keys that affect timing only and never results. They are not part of a run's identity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LocalConfig {
    /// Threads that play and train; 0 for all cores.
    pub(crate) threads: usize,
    /// Sequences decoded in parallel.
    pub(crate) slots: usize,
    /// Steps between checkpoints.
    pub(crate) checkpoint_every: u64,
    /// Number of checkpoints kept.
    pub(crate) keep_checkpoints: usize,
    /// How much of the journal is kept.
    pub(crate) keep_journal: KeepJournal,
    /// Seconds without an answer after which the run ends with an error.
    pub(crate) stall_seconds: u64,
    /// Seconds that a task may wait for a checker that is unavailable before the run ends with an error.
    pub(crate) checker_seconds: u64,
    /// Wall time in minutes after which a run without a number of steps ends; `--minutes`.
    pub(crate) minutes: Option<f64>,
    /// Where `language.base` lies on this machine: the name of a known model, or a path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) base: Option<String>,
    /// Where the teacher of `learner.distill` lies on this machine, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) teacher: Option<String>,
    /// How a run uses a NATS server, if it has one.
    pub(crate) bus: BusConfig,
}

/// How a run uses a NATS server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BusConfig {
    /// Seconds without a sign of life from a worker after which the messages it took are redelivered to another.
    pub(crate) ack_wait_seconds: f64,
    /// Seconds without a sign of progress after which a task is reissued.
    pub(crate) reissue_seconds: f64,
    /// Seconds without a sign of life after which a learner has lost its run.
    pub(crate) lease_seconds: f64,
    /// Servers that keep a copy of each stream.
    pub(crate) num_replicas: usize,
    /// Share of the tasks that two actors must agree on; 0 if all actors are trusted.
    pub(crate) audit_share: f64,
    /// Faults that every process injects, to test that they change no result.
    pub(crate) fault: Option<Faults>,
}

impl LocalConfig {
    pub(crate) fn num_threads(&self) -> usize {
        if self.threads == 0 { LocalConfig::num_cores() } else { self.threads }
    }

    pub(crate) fn num_cores() -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }

    /// Returns the time without a sign of progress after which a task is reissued.
    pub(crate) fn reissue_after(&self) -> Duration {
        Duration::from_secs_f64(self.bus.reissue_seconds)
    }

    /// Returns the share of the tasks that are audited, or `None` if it is 0.
    pub(crate) fn audit_share(&self) -> Option<f64> {
        Some(self.bus.audit_share).filter(|share| *share > 0.0)
    }

    pub(crate) fn stall_limit(&self) -> Duration {
        Duration::from_secs(self.stall_seconds)
    }

    /// Checks the values. `named` returns a key's name with the place where it was set.
    fn validate(&self, named: &dyn Fn(&str) -> String) -> Result<()> {
        let check = |key: &str, expected: &str, got: u64, holds: bool| {
            let key = format!("local.{key}");
            if holds { Ok(()) } else { Err(anyhow!("{}: expected {expected}, got {got}", named(&key))) }
        };
        check("threads", "0 to 1024", self.threads as u64, self.threads <= 1_024)?;
        check("slots", "1 to 1048576", self.slots as u64, (1..=1 << 20).contains(&self.slots))?;
        check("checkpoint_every", "1 or more", self.checkpoint_every, self.checkpoint_every > 0)?;
        check("keep_checkpoints", "1 or more", self.keep_checkpoints as u64, self.keep_checkpoints > 0)?;
        let has_another = self.keep_journal == KeepJournal::All || self.keep_checkpoints > 1;
        let expected =
            "2 or more with local.keep_journal = \"since-checkpoint\", so that one damaged file does not end the run";
        check("keep_checkpoints", expected, self.keep_checkpoints as u64, has_another)?;
        if let Some(minutes) = self.minutes {
            check_minutes(&named("local.minutes"), minutes)?;
        }
        check("stall_seconds", "1 or more", self.stall_seconds, self.stall_seconds > 0)?;
        check("checker_seconds", "1 or more", self.checker_seconds, self.checker_seconds > 0)?;
        check("bus.num_replicas", "1 to 5", self.bus.num_replicas as u64, (1..=5).contains(&self.bus.num_replicas))?;
        let BusConfig { ack_wait_seconds, reissue_seconds, lease_seconds, audit_share, fault, .. } = self.bus;
        let waits = [("ack_wait", ack_wait_seconds), ("reissue", reissue_seconds), ("lease", lease_seconds)];
        for (key, seconds) in waits {
            let key = named(&format!("local.bus.{key}_seconds"));
            ensure!((0.1..=86_400.0).contains(&seconds), "{key}: expected 0.1 to 86400, got {seconds}");
        }
        let is_share = |share: &f64| (0.0..=1.0).contains(share);
        ensure!(is_share(&audit_share), "{}: expected 0 to 1, got {audit_share}", named("local.bus.audit_share"));
        let Some(Faults { drop, duplicate, reorder, .. }) = fault else { return Ok(()) };
        let shares = [drop, duplicate, reorder];
        ensure!(
            shares.iter().all(is_share) && shares.iter().sum::<f64>() < 1.0,
            "{}: expected shares that sum to less than 1, got {shares:?}",
            named("local.bus.fault")
        );
        Ok(())
    }
}

/// Checks a wall time in minutes; `named` is where it was set.
pub(crate) fn check_minutes(named: &str, minutes: f64) -> Result<()> {
    ensure!(minutes > 0.0 && minutes <= 1e6, "{named}: expected a number over 0, up to 1000000, got {minutes}");
    Ok(())
}

/// Resolves a preset's name or the path of a TOML file, with `key=value` overrides and assignments implied by other options.
///
/// A file contains its changes and names its base: `preset = "smoke"`. Without a base it must be a full config.
pub(crate) fn resolve(config: Option<&Path>, overrides: &[String], implied: &[String]) -> Result<RunConfig> {
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
    from_table(name, table, &Origin { file, overrides })
}

/// Reads the config of a run directory, and applies overrides.
pub(crate) fn of_run(run_dir: &Path, overrides: &[String]) -> Result<RunConfig> {
    resolve(Some(&path_in_run(run_dir)?), overrides, &[])
}

/// Parses a full config, as [`to_toml`] writes it. `base` replaces the place of its pretrained model.
pub(crate) fn from_toml(name: &str, text: &str, base: Option<&str>) -> Result<RunConfig> {
    let overrides: Vec<String> = base.map(|base| format!("local.base={}", Value::from(base))).into_iter().collect();
    let mut table = text.parse()?;
    overrides.iter().try_for_each(|assignment| set(&mut table, assignment))?;
    from_table(name.to_owned(), table, &Origin { file: None, overrides: &overrides })
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

/// Checks that a preset has this name.
pub(crate) fn expect_preset(name: &str) -> Result<()> {
    let names: Vec<&str> = PRESETS.iter().map(|(name, _)| *name).collect();
    ensure!(names.contains(&name), "preset: expected one of {}, got {name:?}", names.join(", "));
    Ok(())
}

/// A TOML file.
pub(crate) struct TomlFile {
    pub(crate) path: PathBuf,
    pub(crate) text: String,
}

impl TomlFile {
    /// Parses the file directly into `T`, without a preset or overrides.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T> {
        // The parser would accept a second mark.
        ensure!(
            stray_mark(&self.text) != Some(0),
            "{}: expected at most one byte order mark (U+FEFF), got two",
            self.path.display()
        );
        toml::from_str(&self.text).map_err(|error| self.refusal(&error))
    }

    fn parse(&self) -> Result<Table> {
        self.read()
    }

    fn refusal(&self, error: &toml::de::Error) -> anyhow::Error {
        let position = error.span().map_or(String::new(), |span| self.position(span.start));
        let mark = stray_mark(&self.text).map_or(String::new(), |offset| {
            format!("; a byte order mark (U+FEFF) is at{}", self.position(offset).trim_start_matches(','))
        });
        anyhow!("{}{position}: {}{mark}", self.path.display(), error.message())
    }

    /// Describes the position of a byte: `, line 3, column 1`.
    fn position(&self, offset: usize) -> String {
        let before = &self.text[..offset];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let (line, column) = (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1);
        format!(", line {line}, column {column}")
    }

    /// Returns the byte offset of a key in the file.
    fn offset_of(&self, key: &[String]) -> Option<usize> {
        let document = DeTable::parse(&self.text).ok()?;
        let (first, rest) = key.split_first()?;
        let (name, mut value) = document.get_ref().get_key_value(first.as_str())?;
        let mut offset = name.span().start;
        for part in rest {
            (offset, value) = match value.get_ref() {
                DeValue::Table(table) => {
                    let (name, value) = table.get_key_value(part.as_str())?;
                    (name.span().start, value)
                }
                DeValue::Array(array) => {
                    let value = array.get(part.parse::<usize>().ok()?)?;
                    (value.span().start, value)
                }
                _ => return None,
            };
        }
        Some(offset)
    }
}

/// The sources of a config's keys, as far as a person wrote them.
struct Origin<'a> {
    file: Option<TomlFile>,
    overrides: &'a [String],
}

impl Origin<'_> {
    /// Returns a key's name with the place where it was set.
    fn name(&self, key: &[String]) -> String {
        let dotted = key.join(".");
        if self.overrides.iter().any(|assignment| key_of(assignment) == dotted) {
            return format!("--set {dotted}");
        }
        let place = self.file.as_ref().and_then(|file| Some((file, file.offset_of(key)?)));
        place.map_or(dotted.clone(), |(file, offset)| {
            format!("{}{}: {dotted}", file.path.display(), file.position(offset))
        })
    }

    /// Deserializes a table; `prefix` is its path in the config.
    fn read<T: DeserializeOwned>(&self, table: Table, prefix: &str) -> Result<T> {
        serde_path_to_error::deserialize(Value::Table(table)).map_err(
            |error: serde_path_to_error::Error<toml::de::Error>| {
                let mut key: Vec<String> = prefix.split_terminator('.').map(str::to_owned).collect();
                key.extend(error.path().iter().filter_map(|segment| match segment {
                    Segment::Map { key } => Some(key.clone()),
                    Segment::Seq { index } => Some(index.to_string()),
                    Segment::Enum { .. } | Segment::Unknown => None,
                }));
                anyhow!("{}: {}", self.name(&key), error.inner().message())
            },
        )
    }
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
    let sources = sources_of(base.as_ref());
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
    validate_exams(&run, language.as_ref()).map_err(|error| error.context(named("exams.names")))?;
    validate_ladder(&run, language.as_ref()).map_err(|error| error.context(named("domains")))?;
    Ok(RunConfig { name, run, local, base })
}

fn language_of(base: Option<&Base>) -> Arc<dyn Language> {
    base.map_or_else(crate::language, |base| base.language.clone() as Arc<dyn Language>)
}

fn sources_of(base: Option<&Base>) -> Vec<Arc<dyn ProblemSource>> {
    base.map_or_else(Source::of_symbols, |base| Source::of_words(base.language.clone()))
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

/// Replaces `model.base` with the keys that it stands for: the shape of the network, `language.base`, and `local.base`. Returns
/// the model, if one is named.
fn spell_out_base(config: &mut Table, local: &mut Table) -> Result<Option<Opened>> {
    let Some(model) = config.get_mut("model").and_then(Value::as_table_mut) else { return Ok(None) };
    let Some(base) = model.remove("base") else { return Ok(None) };
    let base = base.as_str().with_context(|| format!("expected the name or the path of a model, got {base}"))?;
    if let Some(other) = model.keys().find(|key| !["max_positions", "adapter"].contains(&key.as_str())) {
        bail!(
            "expected max_positions and adapter alone beside it, since the model has a shape of its own, got model.{other}"
        );
    }
    if let Some(place) = local.get("base") {
        bail!("expected the place of the model in model.base alone, got local.base = {place} too");
    }
    let opened = Opened::named(base)?;
    let mut shape = Table::try_from(opened.pretrained.config())?;
    shape.remove("max_positions");
    overlay(model, shape);
    local.insert("base".to_owned(), place_of(base)?.into());
    let language = config.entry("language").or_insert_with(|| Table::new().into()).as_table_mut();
    let language = language.context("expected a table `language`, got another value")?;
    let digest = Value::from(opened.digest.to_string());
    let expected = language.entry("base").or_insert_with(|| digest.clone());
    ensure!(*expected == digest, "{base}: expected a model with the digest of language.base, {expected}, got {digest}");
    language.entry("examples").or_insert(Value::Integer(NUM_EXAMPLES as i64));
    language.entry("constrain").or_insert("answer".into());
    Ok(Some(opened))
}

/// Replaces the name or the path of the teacher in `learner.distill.teacher` with the digest of its files, and `local.teacher`.
fn spell_out_teacher(config: &mut Table, local: &mut Table) -> Result<()> {
    let distill = config.get_mut("learner").and_then(|learner| learner.get_mut("distill"));
    let Some(teacher) = distill.and_then(|distill| distill.get_mut("teacher")) else { return Ok(()) };
    let name = teacher.as_str().with_context(|| format!("expected the name or the path of a model, got {teacher}"))?;
    if name.parse::<Digest>().is_ok() {
        return Ok(());
    }
    if let Some(place) = local.get("teacher") {
        bail!("expected the place of the teacher here alone, got local.teacher = {place} too");
    }
    local.insert("teacher".to_owned(), place_of(name)?.into());
    *teacher = Opened::named(name)?.digest.to_string().into();
    Ok(())
}

/// Returns the name of a known model, or the path in full: elsewhere a relative path would be another one.
fn place_of(name: &str) -> Result<String> {
    Ok(if Path::new(name).exists() { std::path::absolute(name)?.display().to_string() } else { name.to_owned() })
}

/// Checks on a few problems of every level that their answers fit in full, and that their niches can be proposed.
fn validate_ladder(config: &learner::Config, language: &dyn Language) -> Result<()> {
    let proposes = config.self_play.as_ref().is_some_and(|own| own.propose_tasks > 0);
    for entry in &config.domains {
        let domain = domain(&entry.name)?;
        for level in entry.levels.iter().map(|entry| entry.level) {
            let name = format!("{} level {level}", entry.name);
            for index in 0..NUM_CHECKED_PROBLEMS {
                let KeyedProblem { problem, key } = domain.ladder(level, config.seed, index);
                let room = language.room(&problem)?;
                let (needed, available) = (room.answer, config.actor.max_answer_tokens as usize);
                ensure!(needed <= available, "{name} needs actor.max_answer_tokens = {needed}, got {available}");
                let (needed, positions) = (room.prompt + available, config.model.max_positions);
                ensure!(needed <= positions, "{name} needs model.max_positions = {needed}, got {positions}");
                if !proposes {
                    continue;
                }
                let niche = domain.niche(&problem, key.as_ref())?;
                let room = language.proposal_room(&entry.name, niche)?;
                let (needed, available) = (room.prompt + room.answer, config.model.max_positions);
                ensure!(
                    needed <= available,
                    "{name} needs model.max_positions = {needed} for proposals, got {available}"
                );
            }
        }
    }
    Ok(())
}

const NUM_CHECKED_PROBLEMS: u64 = 8;

/// Checks that the exams exist, once each, and that the network has room for their problems.
fn validate_exams(config: &learner::Config, language: &dyn Language) -> Result<()> {
    for (index, name) in config.exams.names.iter().enumerate() {
        let problems = exam_problems(name, Split::Dev, config.domains.iter().map(|entry| entry.name.as_str()))?;
        ensure!(!config.exams.names[..index].contains(name), "expected every exam once, got {name} twice");
        let lengths = problems.iter().map(|problem| positions(language, problem)).collect::<Result<Vec<_>>>()?;
        let longest = lengths.iter().map(|(prompt, _)| *prompt).max().unwrap_or(0);
        let answer = config.actor.max_answer_tokens as usize;
        let (needed, available) = (longest + answer, config.model.max_positions);
        ensure!(
            needed <= available,
            "{name} needs model.max_positions = {needed} (prompts of up to {longest} tokens, actor.max_answer_tokens = \
             {answer}), got {available}"
        );
        let needed = lengths.iter().map(|(_, answer)| *answer).max().unwrap_or(0);
        let available = config.actor.max_answer_tokens as usize;
        ensure!(needed <= available, "{name} needs actor.max_answer_tokens = {needed}, got {available}");
    }
    Ok(())
}

fn preset(name: &str) -> Option<Table> {
    let (_, text) = PRESETS.iter().find(|(preset, _)| *preset == name)?;
    let mut table = text.parse().expect("presets are tested");
    spell_out_size(&mut table).expect("presets are tested");
    Some(table)
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

/// Merges a config into the preset that it names. A config without a preset must be complete.
fn complete(mut own: Table) -> Result<Table> {
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

fn overlay(base: &mut Table, over: Table) {
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
const MAY_BE_ABSENT: [&str; 14] = [
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

fn key_of(assignment: &str) -> &str {
    assignment.split('=').next().unwrap_or_default()
}

/// Parses a value as TOML; a bare word is a string.
fn parsed(value: &str) -> Value {
    let table = format!("value = {value}").parse::<Table>();
    table.ok().and_then(|mut table| table.remove("value")).unwrap_or_else(|| Value::String(value.to_owned()))
}

/// Applies an assignment such as `learner.learning_rate=1e-3`. An empty value removes the key.
fn set(table: &mut Table, assignment: &str) -> Result<()> {
    let (key, value) =
        assignment.split_once('=').with_context(|| format!("--set: expected key=value, got {assignment:?}"))?;
    // TOML would read the next line as another key.
    ensure!(!assignment.contains(['\n', '\r']), "--set: expected one key=value on one line, got {assignment:?}");
    let mut parts: Vec<&str> = key.split('.').collect();
    let last = parts.pop().unwrap_or_default();
    let mut table = table;
    for part in parts {
        table = table
            .get_mut(part)
            .and_then(Value::as_table_mut)
            .with_context(|| format!("--set {key}: expected a table in the config, got {part:?}"))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// `smollm2` and `smollm2-lora` need their model: tests/e2e/pretrained.rs.
    const FROM_RANDOM_WEIGHTS: [&str; 3] = ["laptop", "ladder", "smoke"];

    #[test]
    fn presets_resolve_and_survive_their_file() {
        for name in FROM_RANDOM_WEIGHTS {
            let config = resolve(Some(Path::new(name)), &[], &[]).unwrap();
            let table = to_toml(&config).unwrap().parse().unwrap();
            let read = from_table(config.name.clone(), table, &Origin { file: None, overrides: &[] }).unwrap();
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
