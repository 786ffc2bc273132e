//! `replay`: the run again, from its journal alone.

use std::path::PathBuf;

use anyhow::Result;

use crate::report::print;
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
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut config = of_run(&args.run)?;
    config.local.threads = args.threads;
    let num_threads = config.local.num_threads();
    let last_step = args.to.unwrap_or(u64::MAX);
    let journal = args.run.join("journal");
    let report = learner::replay(config.run, &journal, crate::sources(), num_threads, last_step, |step| {
        if step.is_multiple_of(100) {
            eprintln!("step {step} agrees");
        }
    })?;
    print(&format!(
        "replayed {} steps from {} groups: every weights digest and state digest agrees with the journal\n",
        report.num_steps, report.num_groups
    ))
}
