//! `export`: a run's weights for other programs, and its verified answers as training data.

mod examples;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use policy::formats::{Companions, Pretrained, StoredType, write_hf, write_peft};

use self::examples::{Examples, write_examples};
use crate::pretrained::{Base, tokenizer};
use crate::report::{count, print};
use crate::run_config;
use crate::subject::{Subject, load_run, run_at};

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
    /// Write the answers that are verified right, each with the conversation that asks for it, for supervised fine-tuning.
    #[arg(long, value_name = "FILE.jsonl", group = "what")]
    sft: Option<PathBuf>,
    /// Write pairs of a right and a wrong answer to the same problem, for preference optimization.
    #[arg(long, value_name = "FILE.jsonl", group = "what")]
    dpo: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let run = run_at(&args.run).with_context(|| {
        format!(
            "{}: expected a run directory, or a checkpoint in the folder of its run; found neither",
            args.run.display()
        )
    })?;
    let config = run_config::of_run(&run, &[])?;
    let Some(base) = &config.base else {
        bail!("{}: expected a run that began with a pretrained model, got a network that reads symbols", run.display());
    };
    if let Some(folder) = &args.hf {
        let stored_type = if args.dtype == "bf16" { StoredType::Bf16 } else { StoredType::F32 };
        write_model(folder, &Subject::load(&args.run)?, base, stored_type)?;
        print(&format!("{}: a model for `transformers.AutoModelForCausalLM.from_pretrained`", folder.display()))?;
    }
    if let Some(folder) = &args.adapter {
        write_adapter(folder, &args.run, base)?;
        print(&format!("{}: an adapter for `peft.PeftModel.from_pretrained`", folder.display()))?;
    }
    for (path, kind) in [(&args.sft, Examples::Right), (&args.dpo, Examples::Pairs)] {
        let Some(path) = path else { continue };
        let num_rows = write_examples(path, kind, &run, &config.run, &base.language)?;
        print(&format!("{}: {} {kind}", path.display(), count(num_rows as f64)))?;
    }
    Ok(())
}

/// Writes the averaged weights, which sit the exams, with the tokenizer of the model that the run began with.
fn write_model(folder: &Path, subject: &Subject, base: &Base, stored_type: StoredType) -> Result<()> {
    let pretrained = &base.pretrained;
    let companions = Companions { end_tokens: base.language.end_tokens(), files: &files_beside(pretrained)? };
    write_hf(folder, pretrained.config(), pretrained.family(), &subject.params, stored_type, companions)?;
    // What was written is what will be read.
    Pretrained::open(folder)?;
    Ok(())
}

/// Writes the averaged weights of the adapter. Its config names the model that it changes by where that lies here.
fn write_adapter(folder: &Path, run: &Path, base: &Base) -> Result<()> {
    let (model, checkpoint) = load_run(run)?;
    ensure!(
        model.adapter.is_some(),
        "{}: expected a run that trains an adapter (model.adapter), got one that trains all weights: use --hf",
        run.display()
    );
    let base_name = base.pretrained.path().display().to_string();
    Ok(write_peft(folder, &model, &checkpoint.training.average, &base_name)?)
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
