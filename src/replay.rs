//! `replay`: the run again, from its journal alone.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use learner::ReplayReport;

use crate::report::{note, print};
use crate::run_config::of_run;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A run directory.
    run: PathBuf,
    /// Last step to compute; all of them without it.
    #[arg(long)]
    to: Option<u64>,
    /// Threads; 0 for all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut config = of_run(&args.run, &[])?;
    config.local.threads = args.threads;
    let num_threads = config.local.num_threads();
    let last_step = args.to.unwrap_or(u64::MAX);
    let journal = args.run.join("journal");
    let report = learner::replay(config.run, &journal, crate::sources(), num_threads, last_step, |step| {
        if step.is_multiple_of(100) {
            note(format_args!("step {step} agrees"));
        }
    })?;
    let ReplayReport { num_steps, num_groups, .. } = report;
    let expected = args.to.unwrap_or(1);
    ensure!(
        num_steps >= expected,
        "{}: expected a journal with step {expected}, got {num_steps} steps",
        journal.display()
    );
    if args.json {
        return print(&serde_json::json!({"num_steps": num_steps, "num_groups": num_groups}).to_string());
    }
    print(&format!(
        "replayed {num_steps} steps from {num_groups} groups: every weights digest and state digest agrees with the journal\n"
    ))
}
