//! `metrics.jsonl`: a row for every step and every exam of a run, across all processes of the run.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use learner::{EvalRecord, Event, StepReport, expect_in_place};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use serde_json::Value;

use crate::files::write_whole;

/// Writes the rows as events arrive.
#[derive(Debug)]
pub(crate) struct Recorder {
    path: PathBuf,
    file: File,
    /// CPU time of earlier processes, up to the step that this one resumed from.
    cpu_before: Duration,
    last_step: Option<LastStep>,
}

/// The step from which a run resumes, read from its row.
#[derive(Clone, Debug)]
pub(crate) struct LastStep {
    pub(crate) report: StepReport,
    pub(crate) num_trained_tokens: u64,
}

/// Number of last steps that are averaged.
const LAST_STEPS: usize = 10;

impl Recorder {
    pub(crate) fn open(run_dir: &Path) -> Result<Recorder> {
        let path = run_dir.join("metrics.jsonl");
        Ok(Recorder { file: append_to(&path)?, path, cpu_before: Duration::ZERO, last_step: None })
    }

    pub(crate) fn record(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Resumed { step, evals, .. } => self.forget_rows_after(*step, evals),
            Event::Step(event) => {
                let mut row = serde_json::to_value(&event.report)?;
                row["elapsed_s"] = event.elapsed.as_secs_f64().into();
                row["cpu_s"] = self.cpu_time()?.as_secs_f64().into();
                row["waited_s"] = event.waited.as_secs_f64().into();
                row["trained_s"] = event.trained.as_secs_f64().into();
                row["num_stale"] = event.num_stale.into();
                row["num_rollouts"] = event.totals.num_rollouts.into();
                row["num_trained_tokens"] = event.totals.num_trained_tokens.into();
                self.write(&row)
            }
            Event::Eval(eval) => self.write(&eval_row(eval)),
            Event::Saving => {
                expect_in_place(&self.path, &self.file)?;
                self.file.sync_data().with_context(|| format!("sync {}", self.path.display()))
            }
            Event::CheckpointRefused(_)
            | Event::Control(_)
            | Event::Checkpoint(_)
            | Event::Waiting(_)
            | Event::Ban(_) => Ok(()),
        }
    }

    /// Returns the last step before this process, once the run has resumed from it.
    pub(crate) fn last_step(&self) -> Option<&LastStep> {
        self.last_step.as_ref()
    }

    /// Finishes the file after all rows. Returns the CPU time of the run, including earlier processes.
    pub(crate) fn finish(self) -> Result<Duration> {
        expect_in_place(&self.path, &self.file)?;
        self.cpu_time()
    }

    /// Returns the CPU time of the run so far, including earlier processes.
    fn cpu_time(&self) -> Result<Duration> {
        let usage = getrusage(UsageWho::RUSAGE_SELF).context("read the CPU time of this process")?;
        let duration = |time: TimeVal| Duration::new(time.tv_sec() as u64, 1_000 * time.tv_usec() as u32);
        Ok(self.cpu_before + duration(usage.user_time()) + duration(usage.system_time()))
    }

    fn write(&mut self, row: &Value) -> Result<()> {
        expect_in_place(&self.path, &self.file)?;
        // Write the whole row in one call, so that a kill falls between rows.
        let line = format!("{row}\n");
        self.file.write_all(line.as_bytes()).with_context(|| format!("write {}", self.path.display()))
    }

    /// Removes the rows of steps after `step`, from which this process resumes; they will be written again. Exam rows are made
    /// to match the journal.
    fn forget_rows_after(&mut self, step: u64, evals: &[EvalRecord]) -> Result<()> {
        let text = std::fs::read(&self.path).with_context(|| format!("read {}", self.path.display()))?;
        let text = String::from_utf8_lossy(&text);
        let mut missing: Vec<Value> = evals.iter().map(eval_row).collect();
        let mut kept = String::new();
        for line in text.lines() {
            // Skip a row that was cut short by a kill.
            let Ok(row) = serde_json::from_str::<Value>(line) else { continue };
            let keep = if row.get("exam").is_some() {
                let found = missing.iter().position(|exam| *exam == row);
                found.map(|index| missing.remove(index)).is_some()
            } else {
                row["step"].as_u64().is_some_and(|at| at <= step)
            };
            if keep {
                kept += &format!("{line}\n");
                self.cpu_before = row["cpu_s"].as_f64().map_or(self.cpu_before, Duration::from_secs_f64);
                if row["step"].as_u64() == Some(step) && row.get("exam").is_none() {
                    self.last_step = LastStep::read(row);
                }
            }
        }
        missing.iter().for_each(|row| kept += &format!("{row}\n"));
        write_whole(&self.path, kept.as_bytes())?;
        self.file = append_to(&self.path)?;
        Ok(())
    }
}

impl LastStep {
    fn read(row: Value) -> Option<LastStep> {
        let num_trained_tokens = row.get("num_trained_tokens")?.as_u64()?;
        Some(LastStep { report: serde_json::from_value(row).ok()?, num_trained_tokens })
    }
}

/// Returns the mean entropy of a run's policy over its last steps.
pub(crate) fn mean_entropy(run_dir: &Path) -> Result<f64> {
    let path = run_dir.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let rows = text.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let last: Vec<f64> = rows.filter_map(|row| row["entropy"].as_f64()).take(LAST_STEPS).collect();
    ensure!(!last.is_empty(), "{}: expected rows with an entropy, found none", path.display());
    Ok(last.iter().sum::<f64>() / last.len() as f64)
}

fn append_to(path: &Path) -> Result<File> {
    File::options().create(true).append(true).open(path).with_context(|| format!("write {}", path.display()))
}

fn eval_row(eval: &EvalRecord) -> Value {
    serde_json::json!({"step": eval.step, "exam": eval.exam, "num_correct": eval.num_correct, "num_problems": eval.num_problems})
}
