//! `export`: a run's weights for other programs, and its verified answers as training data.

mod examples;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use policy::formats::{Companions, Pretrained, StoredType, write_hf, write_peft};
use policy::merge_adapter;

use self::examples::{Examples, expect_new, write_examples};
use crate::pretrained::{Base, tokenizer};
use crate::report::{count, print};
use crate::run_config::{self, Places};
use crate::subject::{load_run, run_at};

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true))]
pub(crate) struct Args {
    /// Run that began with a pretrained model (uses its newest checkpoint), or a checkpoint.
    run: PathBuf,
    /// Write the trained model to a new folder of Hugging Face: weights, configs, tokenizer.
    #[arg(long, value_name = "DIR", group = "what")]
    hf: Option<PathBuf>,
    /// Write the adapter to a new folder of PEFT, for runs that train one.
    #[arg(long, value_name = "DIR", group = "what")]
    adapter: Option<PathBuf>,
    /// Type of the weights of `--hf`. `f32` keeps them as they were trained, `bf16` takes half the space.
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = ["f32", "bf16"], requires = "hf")]
    dtype: String,
    /// Write the answers that are verified right, each with the conversation that asks for it, for supervised fine-tuning: as
    /// JSON lines, or as Parquet if the name ends in `.parquet`.
    #[arg(long, value_name = "FILE", group = "what")]
    sft: Option<PathBuf>,
    /// Write pairs of a right and a wrong answer to the same problem, for preference optimization, likewise.
    #[arg(long, value_name = "FILE", group = "what")]
    dpo: Option<PathBuf>,
    /// What `adapter_config.json` calls the pretrained model, such as HuggingFaceTB/SmolLM2-135M-Instruct [default: its path].
    #[arg(long, value_name = "NAME", requires = "adapter")]
    base_name: Option<String>,
    #[command(flatten)]
    places: Places,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let run = run_at(&args.run).with_context(|| {
        format!(
            "{}: expected a run directory, or a checkpoint in the folder of its run; found neither",
            args.run.display()
        )
    })?;
    let config = run_config::of_run(&run, &args.places.overrides())?;
    let Some(base) = &config.base else {
        bail!("{}: expected a run that began with a pretrained model, got a network that reads symbols", run.display());
    };
    ensure!(
        args.adapter.is_none() || config.run.model.adapter.is_some(),
        "{}: expected a run that trains an adapter (model.adapter), got one that trains all weights: use --hf",
        run.display()
    );
    // Nothing is written if something cannot be.
    args.hf.iter().chain(&args.adapter).try_for_each(|folder| expect_no_files(folder))?;
    args.sft.iter().chain(&args.dpo).try_for_each(|file| expect_new(file))?;
    if args.hf.is_some() || args.adapter.is_some() {
        write_weights(args, base)?;
    }
    for (path, kind) in [(&args.sft, Examples::Right), (&args.dpo, Examples::Pairs)] {
        let Some(path) = path else { continue };
        let num_rows = write_examples(path, kind, &run, &config.run, &base.language)?;
        print(&format!("{}: {} {kind}", path.display(), count(num_rows as f64)))?;
    }
    Ok(())
}

/// Writes the averaged weights of one checkpoint, which sit the exams: merged, and as an adapter.
fn write_weights(args: &Args, base: &Base) -> Result<()> {
    let (model, checkpoint) = load_run(&args.run)?;
    let (step, params, pretrained) = (checkpoint.state.step, checkpoint.training.average, &base.pretrained);
    if let Some(folder) = &args.adapter {
        let name = args.base_name.clone().unwrap_or_else(|| pretrained.path().display().to_string());
        write_peft(folder, &model, &params, &name)?;
        print(&format!("{}: the adapter of step {step}, for peft.PeftModel.from_pretrained", folder.display()))?;
    }
    let Some(folder) = &args.hf else { return Ok(()) };
    let params = if model.adapter.is_some() { merge_adapter(&model, pretrained.load()?, &params) } else { params };
    let stored_type = if args.dtype == "bf16" { StoredType::Bf16 } else { StoredType::F32 };
    let companions = Companions { end_tokens: base.language.end_tokens(), files: &files_beside(pretrained)? };
    write_hf(folder, pretrained.config(), pretrained.family(), &params, stored_type, companions)?;
    // What was written is what will be read.
    Pretrained::open(folder)?;
    print(&format!(
        "{}: the model of step {step}, for transformers.AutoModelForCausalLM.from_pretrained",
        folder.display()
    ))
}

/// Checks that a folder is empty or absent.
fn expect_no_files(folder: &Path) -> Result<()> {
    let is_free = match folder.read_dir() {
        Ok(mut files) => files.next().is_none(),
        Err(error) => error.kind() == ErrorKind::NotFound && folder.symlink_metadata().is_err(),
    };
    ensure!(is_free, "{}: expected a new or an empty folder, found something else", folder.display());
    Ok(())
}

/// Files of a folder of Hugging Face that fine-tuning leaves as they are.
const KEPT: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
];

/// Returns the tokenizer's files, by name.
fn files_beside(pretrained: &Pretrained) -> Result<Vec<(&'static str, Vec<u8>)>> {
    if pretrained.gguf().is_some() {
        return Ok(tokenizer(pretrained)?.hugging_face_files()?.to_vec());
    }
    let present = KEPT.into_iter().filter(|name| pretrained.path().join(name).is_file());
    let read = |name: &'static str| {
        let path = pretrained.path().join(name);
        Ok((name, std::fs::read(&path).with_context(|| format!("read {}", path.display()))?))
    };
    present.map(read).collect()
}
