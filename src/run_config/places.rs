//! What the names of models and files in a config stand for, and where they lie.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use proto::Digest;
use toml::{Table, Value};

use super::local::LocalConfig;
use super::origin::{Needed, Origin};
use super::tables::overlay;
use crate::files::write_whole;
use crate::input::read_text;
use crate::pretrained::{NUM_EXAMPLES, Opened};
use crate::problems::{self, NOTHING_TO_TRAIN_ON, ProblemFile};

/// Where the files of a run lie, if they have moved.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Places {
    /// Where the pretrained model lies that the run began with, if not where its config says: a name or a path.
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
    /// Where the file of problems lies that the run trains on, if not where its config says.
    #[arg(long, value_name = "FILE")]
    file: Option<String>,
}

impl Places {
    /// Returns the changes to the run's config.
    pub(crate) fn overrides(&self) -> Vec<String> {
        let at_file = |file: &str| format!("local.file={}", Value::from(file));
        self.base.as_deref().map(at_base).into_iter().chain(self.file.as_deref().map(at_file)).collect()
    }

    /// Returns an option that was given, as it was written.
    pub(crate) fn given(&self) -> Option<String> {
        let named = |name: &str, value: &Option<String>| value.as_ref().map(|value| format!("{name} {value}"));
        named("--base", &self.base).or_else(|| named("--file", &self.file))
    }
}

/// Returns the change to a run's config that says where its pretrained model lies.
pub(super) fn at_base(base: &str) -> String {
    format!("local.base={}", Value::from(base))
}

/// Writes the places where a resumed run found its files to the config in its directory, unless they are there already.
pub(crate) fn keep_places(run_dir: &Path, found: &LocalConfig) -> Result<()> {
    let path = run_dir.join("config.toml");
    let mut config: Table = read_text(&path)?.parse().with_context(|| path.display().to_string())?;
    let local = config.get_mut("local").and_then(Value::as_table_mut);
    let local = local.with_context(|| format!("{}: expected a table `local`, got none", path.display()))?;
    let mut is_same = true;
    for (key, place) in [("base", &found.base), ("teacher", &found.teacher), ("file", &found.file)] {
        let Some(place) = place else { continue };
        let place = Value::from(place_of(place)?);
        is_same &= local.get(key) == Some(&place);
        local.insert(key.to_owned(), place);
    }
    if is_same { Ok(()) } else { write_whole(&path, toml::to_string(&config)?.as_bytes()) }
}

/// Replaces `model.base` with the keys that it stands for: the shape of the network, `language.base`, and `local.base`. Returns
/// the model, if one is named.
pub(super) fn spell_out_base(config: &mut Table, local: &mut Table) -> Result<Option<Opened>> {
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
pub(super) fn spell_out_teacher(config: &mut Table, local: &mut Table) -> Result<()> {
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

/// Opens the file of problems that a run trains on, unless `named` is it already.
pub(super) fn file_of(
    run: &learner::Config,
    local: &LocalConfig,
    named: Option<ProblemFile>,
    origin: &Origin<'_>,
) -> Result<Option<ProblemFile>> {
    let name = |key: &str| origin.name(&key.split('.').map(str::to_owned).collect::<Vec<_>>());
    let entry = run.domains.iter().enumerate().find(|(_, entry)| entry.name == problems::NAME || entry.file.is_some());
    let Some((index, entry)) = entry else {
        let place = local.file.as_ref();
        return place.map_or(Ok(None), |place| {
            bail!(
                "{}: expected none in a run without the domain `{}`, got {place:?}",
                name("local.file"),
                problems::NAME
            )
        });
    };
    let key = format!("domains.{index}");
    ensure!(entry.name == problems::NAME, "{}: expected no file for the domain {}, got one", name(&key), entry.name);
    ensure!(
        run.language.is_some(),
        "{}: expected a pretrained model (model.base) to ask the problems of a file, got none",
        name(&key)
    );
    let Some(digest) = entry.file else {
        bail!("{}: expected path = \"FILE\" of the problems, got nothing", name(&key))
    };
    let Some(place) = &local.file else {
        bail!("{}: expected where the file of problems lies, got nothing", name("local.file"))
    };
    let is_needed = match origin.problems {
        Needed::Yes => true,
        Needed::Perhaps => named.is_some() || Path::new(place).exists(),
        Needed::No => false,
    };
    if !is_needed {
        return Ok(None);
    }
    let opened = named.map_or_else(|| ProblemFile::open(Path::new(place)), Ok).and_then(|file| file.expect(digest));
    let file = opened.map_err(|error| error.context(name("local.file")))?;
    ensure!(file.problems.train().len() > 0, "{place}: {NOTHING_TO_TRAIN_ON}");
    Ok(Some(file))
}

/// Returns the name of a known model, or the path in full: elsewhere a relative path would be another one.
fn place_of(name: &str) -> Result<String> {
    Ok(if Path::new(name).exists() { std::path::absolute(name)?.display().to_string() } else { name.to_owned() })
}
