//! `study`: runs every arm with every seed, and compares each arm with the control.
//!
//! A study is a file, and a directory that holds its runs and `study.csv`. Every run is a separate process, so that a
//! failure does not affect other runs. A finished run is recognised by its manifest and not repeated.

mod paired;
mod rows;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, bail, ensure};
use domains::{Split, exams_of};
use learner::{JournalReader, Manifest, Record};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::Digest;
use serde::Deserialize;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::input::{name_of_input, read_text};
use crate::manifest::manifest;
use crate::plan::{self, End};
use crate::player::{Player, Scored};
use crate::record::mean_entropy;
use crate::report::{Screen, argument, note, print, quoted, quoted_path};
use crate::room::positions_needed;
use crate::run_config::{self, RunConfig, TomlFile, expect_preset};
use crate::signals::{pass_on_to, stop_in_order};
use crate::subject::Subject;
use rows::{Row, Rows};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Study file in TOML, such as deploy/studies/smoke.toml.
    file: PathBuf,
    /// Directory for its runs and `study.csv` [default: `runs/study-<file stem>`].
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Print the planned runs and the table so far, and exit.
    #[arg(long, conflicts_with = "json")]
    dry_run: bool,
    /// Print one JSON object at the end instead of text.
    #[arg(long)]
    json: bool,
}

/// The content of a study file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StudyFile {
    /// Name of the arm that the others are compared with.
    control: String,
    /// Every arm runs with each of these.
    seeds: Vec<u64>,
    /// Sampled answers a problem, the k of pass@k; 1 to 4096.
    samples: u32,
    /// Exams to score; absent for those of the domains that the arms train on.
    exams: Option<Vec<String>>,
    /// Split of the exams.
    #[serde(default = "test_split")]
    split: Split,
    /// Number of problems of each exam, from its first on; absent for all of them.
    num_problems: Option<u64>,
    /// Steps of every run; absent if the configs or `minutes` set the end of a run.
    steps: Option<u64>,
    /// Wall time of every run, in minutes.
    minutes: Option<f64>,
    #[serde(rename = "arm")]
    arms: Vec<Arm>,
}

fn test_split() -> Split {
    Split::Test
}

/// A named config.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Arm {
    /// Letters, digits, `-` and `_`.
    name: String,
    /// The preset that the arm starts from. Excludes `config`.
    preset: Option<String>,
    /// The TOML file that the arm starts from, relative to the study's file. Excludes `preset`.
    config: Option<PathBuf>,
    /// Changes to the config, as with `--set`.
    #[serde(default)]
    set: Vec<String>,
    /// Those of the study's seeds with which it runs; absent for all of them.
    seeds: Option<Vec<u64>>,
}

/// A fully resolved study.
struct Study {
    file: StudyFile,
    exams: Vec<String>,
    /// How many problems of each exam are sat.
    num_problems: Vec<u64>,
    /// Ordered by seed, so that the first pairs are complete early.
    runs: Vec<Run>,
}

/// One arm with one seed.
#[derive(Clone)]
struct Run {
    arm: String,
    seed: u64,
    /// Arguments of `train` that start the run.
    words: Vec<String>,
    config: RunConfig,
    manifest: Manifest,
    /// Digest of manifest and wall time: the manifest does not contain the length of a run that the clock ends.
    identity: Digest,
    /// Named by `identity`, so that a changed config or program is a new run.
    run_dir: PathBuf,
}

/// The output of `train --json`.
#[derive(Debug, Deserialize)]
struct Trained {
    outcome: String,
    step: u64,
    elapsed_s: f64,
    cpu_s: f64,
    totals: TrainedTotals,
}

#[derive(Debug, Deserialize)]
struct TrainedTotals {
    num_trained_tokens: u64,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let shutdown = stop_in_order("the current run is writing a checkpoint")?;
    let dir = args
        .dir
        .as_deref()
        .map(argument)
        .unwrap_or_else(|| PathBuf::from(format!("runs/study-{}", run_config::config_name(&args.file))));
    let study = Study::read(&args.file, &dir)?;
    let path = dir.join("study.csv");
    if args.dry_run {
        let rows = if path.exists() { rows::read(&path)?.0 } else { Vec::new() };
        study.print_plan(&rows)?;
        return study.print_table(&rows, false);
    }
    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let at = path.display().to_string();
    let mut rows = Rows::open(path)?;
    if rows.torn_bytes > 0 {
        note(format_args!("{at}: removed an incomplete line of {} bytes from the end", rows.torn_bytes));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let failed = runtime.block_on(study.run(&mut rows, &mut Screen::new(args.json), &shutdown));
    // Do not wait for an exam that was stopped.
    runtime.shutdown_background();
    let mut again = format!("autodidact study {}", quoted_path(&args.file));
    if args.dir.is_some() {
        again += &format!(" --dir {}", quoted_path(&dir));
    }
    let Some(failed) = failed? else {
        note(format_args!("stopped; resume with: {again}"));
        let outcome = serde_json::json!({"outcome": "interrupted", "go_on": again});
        return if args.json { print(&outcome.to_string()) } else { Ok(()) };
    };
    study.print_table(rows.all(), args.json)?;
    let (num_failed, num_runs) = (failed.len(), study.runs.len());
    ensure!(failed.is_empty(), "{num_failed} of {num_runs} runs failed: {}; retry with: {again}", failed.join(", "));
    Ok(())
}

impl Study {
    fn read(path: &Path, dir: &Path) -> Result<Study> {
        let text = read_text(path).with_context(|| format!("read {}", path.display()))?;
        let file: StudyFile = TomlFile { path: name_of_input(path), text }.read()?;
        Study::decide(file, path, dir).with_context(|| path.display().to_string())
    }

    fn decide(mut file: StudyFile, path: &Path, dir: &Path) -> Result<Study> {
        file.validate()?;
        let mut end = End::new(file.steps, file.minutes);
        end.shorten_for_ci("runs are");
        let mut runs = Vec::new();
        for seed in &file.seeds {
            for arm in file.arms.iter().filter(|arm| arm.seeds.as_ref().is_none_or(|seeds| seeds.contains(seed))) {
                let at = || format!("arm {}", arm.name);
                let (start, config) = arm.resolve(*seed, end, path).with_context(at)?;
                let manifest = manifest(&config).with_context(at)?;
                runs.push(Run::new(arm, *seed, end, start, config, manifest, dir));
            }
        }
        expect_one_update_size(&runs, &file.control)?;
        let exams = match file.exams.take() {
            Some(exams) => exams,
            None => trained_exams(&runs, file.split)?,
        };
        ensure!(!exams.is_empty(), "exams: expected one or more, got none");
        let mut num_problems = Vec::new();
        for (index, name) in exams.iter().enumerate() {
            ensure!(!exams[..index].contains(name), "exams: expected every exam once, got {name} twice");
            for run in &runs {
                let needed = positions_needed(run.config.language().as_ref(), &run.config.exam(name, file.split)?)?;
                let has = run.config.run.model.max_positions;
                let arm = &run.arm;
                ensure!(needed <= has, "exams: {name} needs model.max_positions = {needed}, arm {arm} has {has}");
            }
            let has = runs[0].config.exam(name, file.split)?.len() as u64;
            num_problems.push(file.num_problems.map_or(has, |wanted| wanted.min(has)));
        }
        Ok(Study { file, exams, num_problems, runs })
    }

    /// Runs the missing runs and exams. Returns the runs that failed, or `None` if it was told to stop.
    async fn run(
        &self,
        rows: &mut Rows,
        screen: &mut Screen,
        shutdown: &CancellationToken,
    ) -> Result<Option<Vec<String>>> {
        let mut failed = Vec::new();
        for (index, run) in self.runs.iter().enumerate() {
            let missing = self.missing_exams(run, rows.all());
            if missing.is_empty() {
                continue;
            }
            if shutdown.is_cancelled() {
                return Ok(None);
            }
            let label = format!("{} seed {}", run.arm, run.seed);
            screen.say(&format!("[{}/{}] {label}: {}\n", index + 1, self.runs.len(), run.run_dir.display()))?;
            match self.carry_out(run, missing, shutdown).await {
                Ok(Some(new)) => {
                    for row in new {
                        screen.say(&format!("      {}\n", row.text()))?;
                        rows.append(row)?;
                    }
                }
                Ok(None) => return Ok(None),
                Err(error) => {
                    note(format_args!("{label} failed: {error:#}"));
                    failed.push(label);
                }
            }
        }
        Ok(Some(failed))
    }

    async fn carry_out(&self, run: &Run, exams: Vec<String>, shutdown: &CancellationToken) -> Result<Option<Vec<Row>>> {
        let Some(trained) = run.train(shutdown).await? else { return Ok(None) };
        let (run, file) = (run.clone(), self.file.clone());
        let examined = tokio::task::spawn_blocking(move || run.examine(&trained, &exams, &file));
        tokio::select! {
            rows = examined => Ok(Some(rows??)),
            () = shutdown.cancelled() => Ok(None),
        }
    }

    /// Returns the exams for which a run has no row.
    fn missing_exams(&self, run: &Run, rows: &[Row]) -> Vec<String> {
        let has_row = |exam: &String| rows.iter().any(|row| self.is_row_of(row, run) && row.exam == *exam);
        self.exams.iter().filter(|exam| !has_row(exam)).cloned().collect()
    }

    /// Whether a row has the scores of a run in one of the study's exams.
    fn is_row_of(&self, row: &Row, run: &Run) -> bool {
        let mut sizes = self.exams.iter().zip(&self.num_problems);
        let is_whole = sizes.any(|(exam, num_problems)| (exam, *num_problems) == (&row.exam, row.num_problems));
        is_whole && row.manifest == run.identity && (row.split, row.k) == (self.file.split, self.file.samples)
    }

    fn print_plan(&self, rows: &[Row]) -> Result<()> {
        for run in &self.runs {
            let state = match self.missing_exams(run, rows).len() {
                0 => "finished",
                _ if run.exists() => "to resume",
                _ => "to start",
            };
            let words: Vec<String> = run.words.iter().map(|word| quoted(word)).collect();
            print(&format!("{state}: autodidact train {}", words.join(" ")))?;
        }
        print(&format!("exams: {}\n\n", self.exams.join(", ")))
    }

    /// Prints the table of this study's own runs. Other rows of the file are ignored.
    fn print_table(&self, rows: &[Row], json: bool) -> Result<()> {
        let rows_of = |arm: &Arm| {
            let runs = self.runs.iter().filter(|run| run.arm == arm.name);
            let is_of_arm = |row: &&Row| runs.clone().any(|run| self.is_row_of(row, run));
            (arm.name.clone(), rows.iter().filter(is_of_arm).cloned().collect())
        };
        let arms: Vec<(String, Vec<Row>)> = self.file.arms.iter().map(rows_of).collect();
        let table = paired::Table::new(&self.file.control, &self.exams, arms);
        if json { print(&serde_json::to_string(&table)?) } else { print(&table.text()) }
    }
}

/// Checks that every arm has the control's update size. The learning rate is tied to it, so a difference would measure both.
fn expect_one_update_size(runs: &[Run], control: &str) -> Result<()> {
    let size = |run: &Run| run.config.run.learner.update_tokens;
    let expected = runs.iter().find(|run| run.arm == control).map(size).context("the control has a run")?;
    for run in runs {
        let (arm, got) = (&run.arm, size(run));
        ensure!(
            got == expected,
            "arm {arm}: expected learner.update_tokens = {expected}, as in the control {control}, got {got}"
        );
    }
    Ok(())
}

impl StudyFile {
    fn validate(&self) -> Result<()> {
        let mut names = BTreeSet::new();
        for Arm { name, seeds, .. } in &self.arms {
            let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "-_".contains(letter);
            let is_name = !name.is_empty() && name.chars().all(is_plain);
            ensure!(is_name, "arm.name: expected letters, digits, - and _, got {name:?}");
            ensure!(names.insert(name.as_str()), "arm.name: expected every name once, got {name:?} twice");
            let is_known = |seeds: &[u64]| !seeds.is_empty() && seeds.iter().all(|seed| self.seeds.contains(seed));
            ensure!(
                seeds.as_deref().is_none_or(is_known),
                "arm {name}: seeds: expected some of the study's, {:?}, got {:?}",
                self.seeds,
                seeds.as_deref().unwrap_or_default()
            );
        }
        let control = self.control.as_str();
        let known = || names.iter().copied().collect::<Vec<_>>().join(", ");
        ensure!(names.contains(control), "control: expected one of {}, got {control:?}", known());
        ensure!(!self.seeds.is_empty(), "seeds: expected one or more, got none");
        let seeds: BTreeSet<_> = self.seeds.iter().collect();
        ensure!(seeds.len() == self.seeds.len(), "seeds: expected every seed once, got {:?}", self.seeds);
        ensure!(self.num_problems != Some(0), "num_problems: expected 1 or more, got 0");
        ensure!((1..=4_096).contains(&self.samples), "samples: expected 1 to 4096, got {}", self.samples);
        ensure!(self.steps.is_none() || self.minutes.is_none(), "expected steps or minutes, got both");
        Ok(())
    }
}

impl Arm {
    /// Returns the preset or file that `train` starts from, and the resulting config.
    fn resolve(&self, seed: u64, end: End, study: &Path) -> Result<(String, RunConfig)> {
        let start = match (&self.preset, &self.config) {
            (Some(preset), None) => {
                expect_preset(preset)?;
                preset.clone()
            }
            (None, Some(path)) => argument(&study.with_file_name("").join(path)).display().to_string(),
            _ => bail!("expected one of preset and config, got both or neither"),
        };
        let config = plan::resolve(Some(Path::new(&start)), &self.set, Some(seed), end)?;
        Ok((start, config))
    }
}

impl Run {
    fn new(arm: &Arm, seed: u64, end: End, start: String, config: RunConfig, manifest: Manifest, dir: &Path) -> Run {
        let identity = match config.local.minutes {
            None => Digest::of(&manifest),
            Some(minutes) => Digest::of(&(&manifest, minutes)),
        };
        let run_dir = dir.join(format!("{}-{seed}-{}", arm.name, identity.short()));
        let mut words = vec![start, "--seed".to_owned(), seed.to_string()];
        words.extend(end.words());
        words.extend(arm.set.iter().flat_map(|assignment| ["--set".to_owned(), assignment.clone()]));
        words.extend(["--run-dir".to_owned(), run_dir.display().to_string()]);
        Run { arm: arm.name.clone(), seed, words, config, manifest, identity, run_dir }
    }

    fn exists(&self) -> bool {
        self.run_dir.join("config.toml").exists()
    }

    /// Trains in a separate process, resuming where an earlier one stopped. Returns `None` if it was told to stop.
    async fn train(&self, shutdown: &CancellationToken) -> Result<Option<Trained>> {
        let mut command = Command::new(std::env::current_exe().context("find the path of this program")?);
        command.arg("train");
        if self.exists() {
            command.args(["--resume", "--run-dir"]).arg(&self.run_dir);
        } else {
            command.args(&self.words);
        }
        // In its own process group, the child gets the terminal's signals only through this process, and so only once.
        command.arg("--json").stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
        let child = command.spawn().context("start train")?;
        let id = Pid::from_raw(child.id().context("train has only just started")? as i32);
        let _passed_on = pass_on_to(id);
        if shutdown.is_cancelled() {
            // The signal came before the child was registered. The child may have ended already.
            let _ = kill(id, Signal::SIGTERM);
        }
        let output = child.wait_with_output().await.context("wait for train")?;
        if shutdown.is_cancelled() && !output.status.success() {
            // The signal came before the child handled signals, or the child could not stop cleanly.
            return Ok(None);
        }
        ensure!(output.status.success(), "train ended with {}", output.status);
        let trained: Trained = serde_json::from_slice(&output.stdout).context("read the output of train")?;
        Ok((trained.outcome == "finished").then_some(trained))
    }

    /// Scores the run's final averaged weights on the exams.
    fn examine(&self, trained: &Trained, exams: &[String], file: &StudyFile) -> Result<Vec<Row>> {
        let (split, samples) = (file.split, file.samples);
        // The program may have been replaced since the study began.
        let mut journal = JournalReader::open(&self.run_dir.join("journal"))?;
        match journal.next()?.and_then(Result::ok).as_ref().and_then(Record::manifest) {
            Some(started) => self.manifest.expect_same(started)?,
            None => bail!("{}: expected a journal that begins with a manifest", self.run_dir.display()),
        }
        let subject = Subject::load(&self.run_dir)?;
        let (expected, got) = (trained.step, subject.step.unwrap_or(0));
        ensure!(got == expected, "{}: expected a checkpoint of step {expected}, got {got}", self.run_dir.display());
        let max_positions = subject.model.max_positions;
        let player = Player::new(subject, max_positions, self.config.local.threads)?;
        let entropy_nats = mean_entropy(&self.run_dir)?;
        let sit = |name: &String| {
            let mut problems = self.config.exam(name, split)?;
            problems.truncate(file.num_problems.map_or(usize::MAX, |wanted| wanted as usize));
            let Scored { greedy, sampled, .. } = player.score(&problems, samples)?;
            Ok(Row {
                arm: self.arm.clone(),
                seed: self.seed,
                manifest: self.identity,
                steps: trained.step,
                trained_tokens: trained.totals.num_trained_tokens,
                cpu_seconds: trained.cpu_s,
                wall_seconds: trained.elapsed_s,
                exam: name.clone(),
                split,
                num_problems: problems.len() as u64,
                pass_at_1_greedy: greedy.pass_at(1).0,
                pass_at_1_sampled: sampled.pass_at(1).0,
                pass_at_k: sampled.pass_at(samples).0,
                k: samples,
                entropy_nats,
            })
        };
        exams.iter().map(sit).collect()
    }
}

/// Returns the exams of the domains that the runs train on, if every network has room for them.
fn trained_exams(runs: &[Run], split: Split) -> Result<Vec<String>> {
    let mut exams = Vec::new();
    for spec in exams_of(runs.iter().flat_map(|run| run.config.domains())) {
        let fits = |run: &Run| {
            let needed = positions_needed(run.config.language().as_ref(), &run.config.exam(spec.name, split)?)?;
            Ok(needed <= run.config.run.model.max_positions)
        };
        if runs.iter().map(fits).collect::<Result<Vec<_>>>()?.into_iter().all(|fits| fits) {
            exams.push(spec.name.to_owned());
        }
    }
    Ok(exams)
}
