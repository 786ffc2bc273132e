//! `replay`: recomputes a run from its journal alone.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use learner::ReplayReport;
use policy::Device;

use crate::begun;
use crate::report::{note, print};
use crate::run_config::{Places, of_run};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run directory.
    run: PathBuf,
    /// Last step to recompute [default: the last step of the journal].
    #[arg(long)]
    to: Option<u64>,
    #[command(flatten)]
    places: Places,
    /// CPU threads; 0 uses all cores.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1024))]
    threads: u16,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut config = of_run(&args.run, &args.places.overrides())?;
    config.expect_file()?;
    begun::expect_config(&args.run, &config)?;
    config.local.threads = args.threads.into();
    let num_threads = config.local.num_threads();
    let last_step = args.to.unwrap_or(u64::MAX);
    // A run on another device cannot be replayed.
    let backend = config.open(Device::Cpu)?;
    let (sources, models) = (config.sources(), config.models()?);
    let start = (&backend, &models);
    let report = learner::verify_journal(config.run, &args.run, start, sources, num_threads, last_step, |step| {
        if step.is_multiple_of(100) {
            note(format_args!("step {step}: digests match"));
        }
    })?;
    let ReplayReport { first_step, last_step, num_groups, .. } = report;
    let journal = args.run.join("journal");
    let begins = match first_step {
        0 => String::new(),
        step => {
            format!("the journal no longer has the first {step} steps: started from the checkpoint of step {step}\n")
        }
    };
    let expected = args.to.unwrap_or(first_step + 1);
    if expected <= first_step {
        bail!(
            "--to: expected a step after {first_step}, from which the journal of {} can be replayed, got {expected}",
            args.run.display()
        );
    }
    ensure!(
        last_step >= expected,
        "{}: expected a journal with step {expected}, got {last_step} steps",
        journal.display()
    );
    let num_steps = last_step - first_step;
    if args.json {
        let report = serde_json::json!({"first_step": first_step, "num_steps": num_steps, "num_groups": num_groups});
        return print(&report.to_string());
    }
    print(&format!(
        "{begins}replayed {num_steps} steps from {num_groups} groups: every weights digest and state digest matches the \
         journal\n"
    ))
}
