//! What `solve`, `eval` and studies measure: a network, with the language that it reads.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use language::Language;
use language::text::{Constraint, TextOptions};
use learner::{Checkpoint, expect_known, load_checkpoint, load_newest};
use policy::formats::Pretrained;
use policy::{ModelConfig, Params, merge_adapter};

use crate::pretrained::{self, Base, NUM_EXAMPLES, model_of};
use crate::report::note;
use crate::run_config::{self, Places};

/// The options of commands that measure a network.
#[derive(Clone, clap::Args)]
pub(crate) struct Args {
    /// Run directory (uses its newest checkpoint), checkpoint, or pretrained model: a Hugging Face folder, a GGUF file, or a name
    /// from `autodidact model get`.
    #[arg(value_name = "RUN|MODEL")]
    pub(crate) subject: PathBuf,
    /// Longest reply of a pretrained model, in tokens [default: 64, or as the run's config says].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_reply_tokens: Option<u32>,
    /// Worked examples in the prompt of a pretrained model, 0 to 3 [default: 3, or as the run's config says].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(..=3))]
    examples: Option<u8>,
    /// Tokens of a pretrained model's answer: `answer` for those that continue a well-formed one, `none` for all [default: none,
    /// or as the run's config says].
    #[arg(long, value_name = "WHICH", value_parser = ["answer", "none"])]
    constrain: Option<String>,
    #[command(flatten)]
    pub(crate) places: Places,
}

impl Args {
    /// Returns the options for another subject: unless it is a run, it is asked as `like` is.
    pub(crate) fn of(&self, subject: &Path, like: &Subject) -> Args {
        let mut args = Args { subject: subject.to_owned(), ..self.clone() };
        if let Some(TextOptions { max_reply_tokens, num_examples, constraint }) =
            like.options.filter(|_| !is_run(subject))
        {
            args.max_reply_tokens = Some(max_reply_tokens);
            args.examples = Some(num_examples as u8);
            args.constrain = Some(if constraint == Constraint::Answer { "answer" } else { "none" }.to_owned());
        }
        args
    }

    /// Returns the changes to the config of a run that begins with a pretrained model.
    fn overrides(&self) -> Vec<String> {
        let Args { max_reply_tokens, examples, constrain, places, .. } = self;
        let max_reply_tokens = max_reply_tokens.map(|count| format!("actor.max_answer_tokens={count}"));
        let examples = examples.map(|count| format!("language.examples={count}"));
        let constrain = constrain.as_ref().map(|which| format!("language.constrain={which}"));
        [max_reply_tokens, examples, constrain].into_iter().flatten().chain(places.overrides()).collect()
    }

    /// Returns an option that is for pretrained models and was given, as it was written.
    fn given(&self) -> Option<String> {
        let Args { max_reply_tokens, examples, constrain, places, .. } = self;
        let max_reply_tokens = max_reply_tokens.map(|count| format!("--max-reply-tokens {count}"));
        let examples = examples.map(|count| format!("--examples {count}"));
        let constrain = constrain.as_ref().map(|which| format!("--constrain {which}"));
        [max_reply_tokens, examples, constrain, places.given()].into_iter().flatten().next()
    }
}

const MAX_REPLY_TOKENS: u32 = 64;

/// A network, with the language that it reads.
pub(crate) struct Subject {
    pub(crate) model: ModelConfig,
    /// All weights: an adapter is merged into those that it changes.
    pub(crate) params: Params,
    pub(crate) language: Arc<dyn Language>,
    /// The step of the run that trained it; `None` for a pretrained model.
    pub(crate) step: Option<u64>,
    /// The pretrained model that the run began with.
    pub(crate) base: Option<Base>,
    /// How the network is asked, if it reads text.
    options: Option<TextOptions>,
}

impl Subject {
    /// Reads the averaged weights of a run's newest checkpoint, or of a checkpoint.
    pub(crate) fn load(path: &Path) -> Result<Subject> {
        Subject::load_with(path, None)
    }

    fn load_with(path: &Path, args: Option<&Args>) -> Result<Subject> {
        let overrides = args.map(Args::overrides).unwrap_or_default();
        let (model, checkpoint) = load_run(path)?;
        let (params, step) = (checkpoint.training.average, Some(checkpoint.state.step));
        let symbols = crate::language();
        if model.vocabulary_size == symbols.vocabulary_size() && model.adapter.is_none() {
            ensure!(
                overrides.is_empty(),
                "{}: expected a pretrained model or a run that began with one, got a network that reads symbols",
                args.and_then(Args::given).unwrap_or_default()
            );
            return Ok(Subject { model, params, language: symbols, step, base: None, options: None });
        }
        let run = run_at(path).with_context(|| {
            format!(
                "{}: expected a checkpoint in the folder of its run, whose config names its tokenizer",
                path.display()
            )
        })?;
        let config = run_config::of_run(&run, &overrides)?;
        let options = run_config::text_options(&config.run);
        let language = config.language();
        let params = match (&model.adapter, &config.base) {
            (Some(_), Some(base)) => merge_adapter(&model, base.pretrained.load()?, &params),
            (Some(_), None) => bail!("{}: expected a run with the base of its adapter, got none", run.display()),
            (None, _) => params,
        };
        Ok(Subject { model: model.base(), params, language, step, base: config.base, options })
    }

    /// Reads what a command names: a run, a checkpoint, or a pretrained model.
    pub(crate) fn named(args: &Args) -> Result<Subject> {
        let Args { subject, max_reply_tokens, examples, constrain, places } = args;
        if is_run(subject) {
            return Subject::load_with(subject, Some(args));
        }
        if let Some(given) = places.given() {
            bail!("{given}: expected a run that began with a pretrained model, got {}", subject.display());
        }
        let path = model_of(subject)?.with_context(|| {
            format!(
                "{}: expected a run with a complete checkpoint, a checkpoint, or a pretrained model (a folder with \
                 config.json, a GGUF file, or a name from `autodidact model get`); found none of them",
                subject.display()
            )
        })?;
        let pretrained = Pretrained::open(&path)?;
        let options = TextOptions {
            max_reply_tokens: max_reply_tokens.unwrap_or(MAX_REPLY_TOKENS),
            num_examples: examples.map_or(NUM_EXAMPLES, usize::from),
            constraint: if constrain.as_deref() == Some("answer") { Constraint::Answer } else { Constraint::None },
        };
        let language = Arc::new(pretrained::language(&pretrained, options)?);
        let (model, params) = (pretrained.config().clone(), pretrained.load()?);
        Ok(Subject { model, params, language, step: None, base: None, options: Some(options) })
    }

    /// Returns the network before its training: random weights, or the pretrained model that the run began with; `None` for a
    /// pretrained model.
    pub(crate) fn untrained(&self) -> Result<Option<Subject>> {
        if self.step.is_none() {
            return Ok(None);
        }
        let params = match &self.base {
            Some(base) => base.pretrained.load()?,
            None => Params::init(&self.model, 0),
        };
        let (model, language, base) = (self.model.clone(), self.language.clone(), self.base.clone());
        Ok(Some(Subject { model, params, language, step: Some(0), base, options: self.options }))
    }

    /// Whether the network reads symbols.
    pub(crate) fn reads_symbols(&self) -> bool {
        self.step.is_some() && self.base.is_none()
    }
}

/// Whether a path is a run or a checkpoint, or was meant as one.
fn is_run(path: &Path) -> bool {
    ["COMPLETE", "state.postcard", "config.toml", "checkpoints", "journal"].iter().any(|name| path.join(name).exists())
}

/// Reads a checkpoint, or the newest complete one of a run. A checkpoint in a run's folder must match the run's journal.
pub(crate) fn load_run(path: &Path) -> Result<(ModelConfig, Checkpoint)> {
    if path.join("COMPLETE").exists() {
        let (model, checkpoint) = load_checkpoint(path)?;
        if let Some(run) = run_of(path) {
            expect_known(&run, &model, &checkpoint).with_context(|| path.display().to_string())?;
        }
        return Ok((model, checkpoint));
    }
    let refused = |reason: String| note(format_args!("checkpoint rejected, using an earlier one: {reason}"));
    load_newest(path, refused)?.with_context(|| {
        format!("{}: expected a run with a complete checkpoint, or a checkpoint; found neither", path.display())
    })
}

/// Returns the run that lies at a path, or in whose folder the checkpoint there lies.
pub(crate) fn run_at(path: &Path) -> Option<PathBuf> {
    run_of(path).or_else(|| path.join("config.toml").exists().then(|| path.to_owned()))
}

/// Returns the run in whose folder a checkpoint lies.
fn run_of(checkpoint: &Path) -> Option<PathBuf> {
    // Resolve `.` and links first.
    let checkpoint = checkpoint.canonicalize().ok()?;
    let run = checkpoint.parent().filter(|folder| folder.ends_with("checkpoints"))?.parent()?;
    run.join("config.toml").exists().then(|| run.to_owned())
}
