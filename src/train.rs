//! `train`: all roles in one process, from random weights to a table of what was learned.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bus::{Bus, InProcess};
use domains::{Split, exam, exam_specs, vocabulary};
use learner::{BuildId, Event, Exam, Manifest, Outcome, RunOptions, StepEvent, Summary};
use policy::Numerics;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::report::{clock, count, is_closed_pipe, percent, print, quoted, table};
use crate::run_config::{self, RunConfig};
use crate::{baselines, curves};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A preset (laptop, ladder, smoke) or a TOML file; `laptop` without it.
    config: Option<String>,
    /// Where the run lives; `runs/<config>-<seed>-<n>` without it.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Wall time after which the run ends; 10 without it, unless the config says how many steps.
    #[arg(long, value_name = "M")]
    minutes: Option<f64>,
    /// Steps after which the run ends.
    #[arg(long, value_name = "N", conflicts_with = "minutes")]
    steps: Option<u64>,
    /// Seed of the run.
    #[arg(long)]
    seed: Option<u64>,
    /// Change one key of the config.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Go on where the run in --run-dir stopped.
    #[arg(long, requires = "run_dir", conflicts_with_all = ["config", "seed", "steps", "fork"])]
    resume: bool,
    /// Start a new run from the config of the run in --run-dir.
    #[arg(long, requires = "run_dir", conflicts_with = "config")]
    fork: bool,
    /// Print what would run, and stop.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object at the end instead of text.
    #[arg(long)]
    json: bool,
}

/// Steps that `AUTODIDACT_CI=1` stands for: enough to see every part at work.
const CI_STEPS: u64 = 3;
const DEFAULT_MINUTES: f64 = 10.0;

pub(crate) fn run(args: Args) -> Result<()> {
    let plan = Plan::new(&args)?;
    if args.dry_run {
        return print(&run_config::to_toml(&plan.config)?);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let summary = runtime.block_on(run_roles(&plan))?;
    curves::write(&plan.run_dir.join("curves.svg"), &summary.evals)?;
    if args.json { print(&json(&plan, &summary).to_string()) } else { print(&closing(&plan, &summary)?) }
}

/// A run, decided.
struct Plan {
    config: RunConfig,
    /// What leads to the config again, as arguments of `train`: all but the seed and the end of the schedule.
    origin: Vec<String>,
    manifest: Manifest,
    run_dir: PathBuf,
    resume: bool,
    time_limit: Option<Duration>,
    quiet: bool,
}

impl Plan {
    fn new(args: &Args) -> Result<Plan> {
        let mut overrides = args.overrides.clone();
        let mut steps = args.steps;
        if std::env::var_os("AUTODIDACT_CI").is_some_and(|value| value == "1") && !args.resume && steps.is_none() {
            eprintln!("AUTODIDACT_CI=1: this run is shortened as --steps {CI_STEPS} does");
            steps = Some(CI_STEPS);
        }
        overrides.extend(args.seed.map(|seed| format!("seed={seed}")));
        overrides.extend(steps.map(|steps| format!("schedule.num_steps={steps}")));
        if args.minutes.is_some_and(|minutes| !(minutes > 0.0 && minutes <= 1e6)) {
            bail!("--minutes: expected a number over 0, got {}", args.minutes.unwrap_or_default());
        }
        if args.minutes.is_some() && !args.resume && steps.is_none() {
            // The clock decides; a number of steps from the preset does not.
            overrides.push("schedule.num_steps=".to_owned());
        }
        let mut config = match &args.run_dir {
            Some(run_dir) if args.resume || args.fork => {
                let path = run_dir.join("config.toml").display().to_string();
                run_config::of_run(run_dir)?;
                run_config::resolve(Some(&path), &overrides)?
            }
            _ => run_config::resolve(args.config.as_deref(), &overrides)?,
        };
        for name in &config.run.exams.names {
            exam(name)?;
        }
        let run_dir = match &args.run_dir {
            Some(run_dir) if !args.fork => run_dir.clone(),
            _ => free_run_dir(&config),
        };
        let occupied = run_dir.read_dir().is_ok_and(|mut entries| entries.next().is_some());
        if occupied && !args.resume && !args.dry_run {
            bail!(
                "--run-dir {0}: expected an empty or absent folder, found files; `--resume --run-dir {0}` goes on with the run there",
                run_dir.display()
            );
        }
        let clocked = config.run.schedule.num_steps.is_none();
        let minutes = args.minutes.or(config.local.minutes).unwrap_or(DEFAULT_MINUTES);
        config.local.minutes = clocked.then_some(minutes);
        let time_limit = clocked.then(|| Duration::from_secs_f64(60.0 * minutes));
        Ok(Plan {
            manifest: manifest(&config)?,
            origin: origin(args),
            config,
            run_dir,
            resume: args.resume,
            time_limit,
            quiet: args.json,
        })
    }
}

fn manifest(config: &RunConfig) -> Result<Manifest> {
    let exams: BTreeMap<_, _> = exam_specs()
        .into_iter()
        .map(|spec| Ok((spec.name.to_owned(), exam(spec.name)?.digest())))
        .collect::<Result<_>>()?;
    let verifiers = domains::registry().iter().map(|domain| (domain.name().to_owned(), "1".to_owned())).collect();
    Ok(Manifest {
        config: config.run.digest(),
        build: BuildId(env!("AUTODIDACT_BUILD_ID").to_owned()),
        verifiers,
        exams,
        numerics: Numerics::measure()?,
        reproducible: true,
    })
}

/// Names the config on a command line: preset or file, and what was set.
fn origin(args: &Args) -> Vec<String> {
    let config = match &args.run_dir {
        Some(run_dir) if args.resume || args.fork => run_dir.join("config.toml").display().to_string(),
        _ => args.config.clone().unwrap_or_else(|| run_config::DEFAULT_PRESET.to_owned()),
    };
    let overrides = args.overrides.iter().filter(|assignment| !assignment.starts_with("local."));
    std::iter::once(config).chain(overrides.flat_map(|assignment| ["--set".to_owned(), assignment.clone()])).collect()
}

fn free_run_dir(config: &RunConfig) -> PathBuf {
    let name = |number: u32| PathBuf::from(format!("runs/{}-{}-{number}", config.name, config.run.seed));
    (1..).map(name).find(|path| !path.exists()).expect("some number is free")
}

/// Starts actor, verifier and learner, and shows what they do.
async fn run_roles(plan: &Plan) -> Result<Summary> {
    let (config, local) = (&plan.config.run, &plan.config.local);
    std::fs::create_dir_all(&plan.run_dir).with_context(|| format!("create {}", plan.run_dir.display()))?;
    if !plan.resume {
        write_file(&plan.run_dir.join("config.toml"), &run_config::to_toml(&plan.config)?)?;
        write_file(&plan.run_dir.join("manifest.json"), &serde_json::to_string_pretty(&plan.manifest)?)?;
    }
    let exams: Vec<Exam> = config
        .exams
        .names
        .iter()
        .map(|name| Ok(Exam { name: name.clone(), problems: exam(name)?.split(Split::Dev).to_vec() }))
        .collect::<Result<_>>()?;
    let exam_tasks: usize = exams.iter().map(|exam| exam.problems.len()).sum();
    let capacity = (config.batch.lag as usize + 1) * config.batch.num_tasks as usize + exam_tasks;
    let bus: Arc<dyn Bus> = Arc::new(InProcess::new(capacity));
    let shutdown = CancellationToken::new();
    let (events, receiver) = mpsc::unbounded_channel();
    let options = RunOptions {
        run_dir: plan.run_dir.clone(),
        num_threads: local.num_threads(),
        time_limit: plan.time_limit,
        checkpoint_every: local.checkpoint_every,
        keep_checkpoints: local.keep_checkpoints,
        stall_limit: local.stall_limit(),
        tokenizer_json: tokenizer_json(),
    };
    let mut display = Display::new(plan)?;
    display.opening()?;
    let actor_config = actor::Config { num_threads: local.num_threads(), num_slots: local.slots };
    let mut actor = tokio::spawn(actor::run(actor_config, bus.clone(), shutdown.clone()));
    let mut verifier = tokio::spawn(verifier::run(bus.clone(), shutdown.clone()));
    let mut learner = tokio::spawn(learner::run(
        config.clone(),
        options,
        plan.manifest.clone(),
        crate::sources(),
        exams,
        bus,
        events,
        shutdown.clone(),
    ));
    let shown = tokio::spawn(display.show(receiver));
    tokio::spawn(stop_on_interrupt(shutdown.clone()));
    // The learner ends by itself; the others end only by failing, and their failure ends the run.
    let failure = tokio::select! {
        summary = &mut learner => {
            shutdown.cancel();
            let summary = summary??;
            shown.await??;
            return Ok(summary);
        }
        ended = &mut actor => ended?.err().map(anyhow::Error::from),
        ended = &mut verifier => ended?.err().map(anyhow::Error::from),
    };
    shutdown.cancel();
    let summary = learner.await??;
    shown.await??;
    match failure {
        Some(error) => Err(error),
        None => Ok(summary),
    }
}

/// Ctrl-C once stops at the next chance; twice quits.
async fn stop_on_interrupt(shutdown: CancellationToken) {
    if tokio::signal::ctrl_c().await.is_ok() {
        eprintln!("stopping: writing a checkpoint (Ctrl-C again quits at once)");
        shutdown.cancel();
    }
    if tokio::signal::ctrl_c().await.is_ok() {
        std::process::exit(130);
    }
}

fn tokenizer_json() -> String {
    let names: Vec<String> = (0..vocabulary::VOCABULARY_SIZE as proto::Token).map(vocabulary::token_name).collect();
    serde_json::json!({"type": "word-level", "tokens": names}).to_string()
}

fn write_file(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// Shows events and writes `metrics.jsonl`.
struct Display {
    run_dir: PathBuf,
    metrics: File,
    time_limit: Option<Duration>,
    num_steps: Option<u64>,
    quiet: bool,
    resume: bool,
    head: String,
    last_line: Option<(Duration, u64)>,
}

impl Display {
    fn new(plan: &Plan) -> Result<Display> {
        let path = plan.run_dir.join("metrics.jsonl");
        let metrics = File::options().create(true).append(true).open(&path);
        let config = &plan.config.run;
        let head = format!(
            "{} parameters, {} problems x {} answers a step, {} threads, config {}",
            count(config.model.num_parameters() as f64),
            config.batch.num_tasks,
            config.batch.num_rollouts,
            plan.config.local.num_threads(),
            config.digest().short(),
        );
        Ok(Display {
            run_dir: plan.run_dir.clone(),
            metrics: metrics.with_context(|| format!("write {}", path.display()))?,
            time_limit: plan.time_limit,
            num_steps: config.schedule.num_steps,
            quiet: plan.quiet,
            resume: plan.resume,
            head,
            last_line: None,
        })
    }

    /// A reader that goes away misses the rest of what is said; the run and its files miss nothing.
    fn say(&mut self, text: &str) -> Result<()> {
        match if self.quiet { Ok(()) } else { print(text) } {
            Err(error) if is_closed_pipe(&error) => self.quiet = true,
            result => result?,
        }
        Ok(())
    }

    fn opening(&mut self) -> Result<()> {
        self.say(&format!("run directory: {}\n{}\n", self.run_dir.display(), self.head))
    }

    async fn show(mut self, mut events: mpsc::UnboundedReceiver<Event>) -> Result<()> {
        while let Some(event) = events.recv().await {
            match event {
                Event::Resumed { step, truncated_bytes, unreadable, evals } => {
                    if !self.resume {
                        self.say("going on with the run found here\n")?;
                    }
                    self.forget_metrics_after(step, &evals)?;
                    self.say(&format!("resumed at step {step}\n"))?;
                    if truncated_bytes > 0 {
                        eprintln!("journal: {truncated_bytes} bytes of an unfinished record were removed from its end");
                    }
                    for record in unreadable {
                        eprintln!(
                            "journal: the record at byte {} of {} is damaged and is passed over",
                            record.offset,
                            record.segment.display()
                        );
                    }
                }
                Event::CheckpointRefused(reason) => {
                    eprintln!("checkpoint refused, going on from an earlier state: {reason}")
                }
                Event::Step(event) => {
                    let mut entry = serde_json::to_value(&event.report)?;
                    entry["elapsed_s"] = event.elapsed.as_secs_f64().into();
                    entry["waited_s"] = event.waited.as_secs_f64().into();
                    entry["trained_s"] = event.trained.as_secs_f64().into();
                    entry["num_rollouts"] = event.totals.num_rollouts.into();
                    entry["num_trained_tokens"] = event.totals.num_trained_tokens.into();
                    writeln!(self.metrics, "{entry}")?;
                    self.step_line(*event)?;
                }
                Event::Eval(eval) => {
                    writeln!(self.metrics, "{}", eval_row(&eval))?;
                    let share = percent(eval.num_correct as f64 / eval.num_problems as f64);
                    self.say(&format!(
                        "step {:>6}  exam {}: {share} of {} dev problems\n",
                        eval.step, eval.exam, eval.num_problems
                    ))?;
                }
                Event::Control(control) => {
                    self.num_steps = Some(control.stop_at);
                    self.say(&format!(
                        "the clock decides: the learning rate decays from step {}, the run ends with step {}\n",
                        control.decay_from, control.stop_at
                    ))?;
                }
                Event::Checkpoint(path) => tracing::info!(path = %path.display(), "checkpoint written"),
            }
        }
        Ok(())
    }

    fn step_line(&mut self, event: StepEvent) -> Result<()> {
        let StepEvent { report, elapsed, totals, sample, .. } = event;
        let due = self.last_line.is_none_or(|(at, _)| elapsed.saturating_sub(at) >= Duration::from_secs(5));
        if !due && Some(report.step) != self.num_steps {
            return Ok(());
        }
        let (since, before) = self.last_line.unwrap_or((Duration::ZERO, 0));
        let rate = (totals.num_rollouts - before) as f64 / elapsed.saturating_sub(since).as_secs_f64().max(1e-3);
        self.last_line = Some((elapsed, totals.num_rollouts));
        let families: Vec<String> = report
            .solved_by_family
            .iter()
            .map(|(family, (solved, played))| format!("{family} {}", percent(*solved as f64 / (*played).max(1) as f64)))
            .collect();
        let left = match (self.num_steps, self.time_limit) {
            (Some(steps), _) => format!("{} steps left", steps.saturating_sub(report.step)),
            (None, Some(limit)) => format!("{} left", clock(limit.saturating_sub(elapsed))),
            (None, None) => String::new(),
        };
        self.say(&format!(
            "step {:>6}  {}  solved: {}  loss {:.3}  {} answers/s  {left}\n",
            report.step,
            clock(elapsed),
            families.join(", "),
            report.loss,
            count(rate),
        ))?;
        if let Some((problem, answer, verdict)) = sample {
            let domain = domains::domain(&problem.domain)?;
            let verdict = serde_json::to_value(verdict)?;
            let verdict = verdict.as_str().unwrap_or_default().to_owned();
            self.say(&format!("               {}   {}   {verdict}\n", problem.text, domain.render_answer(&answer)))?;
        }
        Ok(())
    }

    /// Removes what an earlier process wrote past the state that this one goes on from; it will be written again. Exams
    /// stay as the journal has them.
    fn forget_metrics_after(&mut self, step: u64, evals: &[learner::EvalRecord]) -> Result<()> {
        let path = self.run_dir.join("metrics.jsonl");
        let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let text = String::from_utf8_lossy(&text);
        let mut missing: Vec<serde_json::Value> = evals.iter().map(eval_row).collect();
        let mut keeps = |line: &&str| match serde_json::from_str::<serde_json::Value>(line) {
            Ok(row) if row.get("exam").is_some() => {
                let found = missing.iter().position(|exam| *exam == row);
                found.map(|index| missing.remove(index)).is_some()
            }
            Ok(row) => row["step"].as_u64().is_some_and(|at| at <= step),
            Err(_) => false,
        };
        let mut kept: Vec<String> = text.lines().filter(&mut keeps).map(str::to_owned).collect();
        kept.extend(missing.iter().map(ToString::to_string));
        let kept: String = kept.into_iter().map(|line| line + "\n").collect();
        let partial = self.run_dir.join("metrics.jsonl.partial");
        write_file(&partial, &kept)?;
        std::fs::rename(&partial, &path).with_context(|| format!("rename {}", partial.display()))?;
        self.metrics = File::options().append(true).open(&path).with_context(|| format!("write {}", path.display()))?;
        Ok(())
    }
}

fn eval_row(eval: &learner::EvalRecord) -> serde_json::Value {
    serde_json::json!({"step": eval.step, "exam": eval.exam, "num_correct": eval.num_correct, "num_problems": eval.num_problems})
}

/// What a person wants to know at the end.
fn closing(plan: &Plan, summary: &Summary) -> Result<String> {
    let run_dir = quoted(&plan.run_dir.display().to_string());
    let mut text = String::from("\n");
    if summary.outcome == Outcome::Interrupted {
        let minutes =
            plan.time_limit.map_or(String::new(), |limit| format!(" --minutes {}", limit.as_secs_f64() / 60.0));
        text += &format!(
            "stopped at step {} after {}; go on with: autodidact train --resume --run-dir {run_dir}{minutes}\n",
            summary.step,
            clock(summary.elapsed)
        );
        return Ok(text);
    }
    text += &format!(
        "{} steps in {}: {} answers, {} of them right, {} tokens trained on\n\n",
        summary.step,
        clock(summary.elapsed),
        count(summary.totals.num_rollouts as f64),
        count(summary.totals.num_correct as f64),
        count(summary.totals.num_trained_tokens as f64),
    );
    text += &exam_table(summary)?;
    let total: f64 = summary.totals.trained_by_origin.iter().map(|cell| cell.2).sum();
    if total > 0.0 {
        text += "\nwhere the trained tokens came from\n";
    }
    for (problem_origin, label_origin, weighted) in &summary.totals.trained_by_origin {
        let name = |value: serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let (problem, label) = (name(serde_json::to_value(problem_origin)?), name(serde_json::to_value(label_origin)?));
        text += &format!("  problem: {problem}, label: {label}  {}\n", percent(weighted / total));
    }
    text += &format!(
        "\njournal {}, weights {}\n",
        bytes(folder_bytes(&plan.run_dir.join("journal"))),
        summary.weights_digest.short()
    );
    if let Some(control) = summary.control {
        text += &format!(
            "the same weights again: autodidact train {} --seed {} --steps {} --set schedule.decay_from={}\n",
            plan.origin.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "),
            plan.config.run.seed,
            control.stop_at,
            control.decay_from
        );
    }
    text += &format!("test exams: autodidact eval {run_dir}\ncurves: {run_dir}/curves.svg\n");
    Ok(text)
}

fn exam_table(summary: &Summary) -> Result<String> {
    let mut rows = vec![["dev exam", "before", "after", "random legal", "1 blind try"].map(str::to_owned).to_vec()];
    let names: std::collections::BTreeSet<&str> = summary.evals.iter().map(|eval| eval.exam.as_str()).collect();
    for name in names {
        let mut of_exam: Vec<_> = summary.evals.iter().filter(|eval| eval.exam == name).collect();
        of_exam.sort_by_key(|eval| eval.step);
        let share = |eval: Option<&&learner::EvalRecord>| {
            eval.map_or("-".to_owned(), |eval| percent(eval.num_correct as f64 / eval.num_problems as f64))
        };
        let problems = exam(name)?.split(Split::Dev);
        let random = baselines::uniform_legal(problems, 8)?.pass_at(1).0;
        let blind = baselines::enumeration(problems, 1)? as f64 / problems.len() as f64;
        rows.push(vec![
            name.to_owned(),
            share(of_exam.first()),
            share(of_exam.last()),
            percent(random),
            percent(blind),
        ]);
    }
    Ok(table(&rows))
}

fn json(plan: &Plan, summary: &Summary) -> serde_json::Value {
    serde_json::json!({
        "run_dir": plan.run_dir,
        "outcome": if summary.outcome == Outcome::Finished { "finished" } else { "interrupted" },
        "step": summary.step,
        "weights_digest": summary.weights_digest,
        "control": summary.control,
        "elapsed_s": summary.elapsed.as_secs_f64(),
        "evals": summary.evals,
        "totals": summary.totals,
    })
}

fn folder_bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
}

fn bytes(size: u64) -> String {
    format!("{:.1} MiB", size as f64 / f64::from(1 << 20))
}
