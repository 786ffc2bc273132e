//! Progress output of a run for people.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use language::Language;
use learner::{Control, Event, Sample, StepEvent, StepReport};

use crate::report::{Screen, clock, count, note, percent, word};

/// Shows events on a separate thread, so that a blocked reader blocks nothing else.
#[derive(Debug)]
pub(crate) struct Display {
    events: SyncSender<Event>,
    thread: JoinHandle<Result<()>>,
}

/// Settings of the display.
pub(crate) struct Settings {
    /// Printed first.
    pub(crate) opening: String,
    /// Whether standard output stays empty.
    pub(crate) quiet: bool,
    pub(crate) time_limit: Option<Duration>,
    /// The end of the run, if the config fixes it.
    pub(crate) control: Option<Control>,
    pub(crate) warmup_steps: u64,
    /// For a run that proposes its own problems: the initial steps on the ladder alone.
    pub(crate) bootstrap_steps: Option<u64>,
    /// The language of the run's answers.
    pub(crate) language: Arc<dyn Language>,
}

/// Maximum queued events. Events beyond it are dropped.
const MAX_WAITING: usize = 1_024;

/// Wall time between two lines about steps.
const BETWEEN_LINES: Duration = Duration::from_secs(5);

impl Display {
    pub(crate) fn start(settings: Settings) -> Result<Display> {
        let (events, receiver) = sync_channel(MAX_WAITING);
        let printer = Printer { screen: Screen::new(settings.quiet), settings, last_line: None };
        let thread = std::thread::Builder::new().name("display".to_owned()).spawn(move || printer.run(&receiver));
        Ok(Display { events, thread: thread.context("start the display thread")? })
    }

    /// Queues an event to be shown, or drops it if the queue is full. Never blocks.
    pub(crate) fn show(&self, event: Event) {
        drop(self.events.try_send(event));
    }

    /// Waits until everything is shown.
    pub(crate) fn finish(self) -> Result<()> {
        drop(self.events);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Settings {
    /// Returns the name of the stage that a step belongs to.
    fn stage(&self, step: u64) -> &'static str {
        match self.bootstrap_steps {
            _ if self.control.is_some_and(|control| step > control.decay_from) => "decay",
            _ if step <= self.warmup_steps => "warm-up",
            Some(bootstrap_steps) if step <= bootstrap_steps => "bootstrap",
            Some(_) => "self-play",
            None => "ladder",
        }
    }
}

struct Printer {
    screen: Screen,
    settings: Settings,
    /// State at the last line about a step.
    last_line: Option<Line>,
}

#[derive(Clone, Copy)]
struct Line {
    step: u64,
    elapsed: Duration,
    num_rollouts: u64,
}

impl Printer {
    fn run(mut self, events: &Receiver<Event>) -> Result<()> {
        self.screen.say(&self.settings.opening)?;
        events.iter().try_for_each(|event| self.event(event))
    }

    fn event(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Resumed { step, control, truncated_bytes, unreadable, banned, .. } => {
                self.settings.control = control;
                self.screen.say(&format!("resumed at step {step}\n"))?;
                if truncated_bytes > 0 {
                    note(format_args!("journal: removed {truncated_bytes} bytes of an unreadable record from the end"));
                }
                for record in unreadable {
                    note(format_args!(
                        "journal: skipped the damaged record at byte {} of {}",
                        record.offset,
                        record.segment.display()
                    ));
                }
                if !banned.is_empty() {
                    note(format_args!("banned: {}", banned.join(", ")));
                }
                Ok(())
            }
            Event::CheckpointRefused(reason) => {
                note(format_args!("checkpoint rejected, resuming from an earlier state: {reason}"));
                Ok(())
            }
            Event::Step(event) => self.step_line(*event),
            Event::Eval(eval) => {
                let share = percent(eval.num_correct as f64 / eval.num_problems as f64);
                self.screen.say(&format!(
                    "step {:>6}  exam {}: {share} of {} dev problems\n",
                    eval.step, eval.exam, eval.num_problems
                ))
            }
            Event::Control(control) => {
                self.settings.control = Some(control);
                self.screen.say(&format!(
                    "time limit: the learning rate decays from step {}, the run ends at step {}\n",
                    control.decay_from, control.stop_at
                ))
            }
            Event::Ban(ban) => {
                note(format_args!("warning: {ban}"));
                Ok(())
            }
            Event::Waiting(waiting) => {
                note(format_args!("waiting: {waiting}"));
                Ok(())
            }
            Event::Saving => Ok(()),
            Event::Checkpoint(path) => {
                tracing::info!(path = %path.display(), "checkpoint written");
                Ok(())
            }
        }
    }

    fn step_line(&mut self, event: StepEvent) -> Result<()> {
        let StepEvent { report, elapsed, totals, sample, .. } = event;
        let is_last = self.settings.control.is_some_and(|control| report.step == control.stop_at);
        let is_due = |line: Line| elapsed.saturating_sub(line.elapsed) >= BETWEEN_LINES;
        if !is_last && !self.last_line.is_none_or(is_due) {
            return Ok(());
        }
        let line = Line { step: report.step, elapsed, num_rollouts: totals.num_rollouts };
        let before = self.last_line.replace(line).unwrap_or(Line { step: 0, elapsed: Duration::ZERO, num_rollouts: 0 });
        let seconds = elapsed.saturating_sub(before.elapsed).as_secs_f64().max(1e-3);
        let rate = line.num_rollouts.saturating_sub(before.num_rollouts) as f64 / seconds;
        let left = match (self.settings.control, self.settings.time_limit) {
            (Some(control), _) => {
                let num_left = control.stop_at.saturating_sub(line.step);
                let pace = seconds / line.step.saturating_sub(before.step).max(1) as f64;
                format!("{num_left} steps left, {}", clock(Duration::from_secs_f64(pace * num_left as f64)))
            }
            (None, Some(limit)) => format!("{} left", clock(limit.saturating_sub(elapsed))),
            (None, None) => String::new(),
        };
        self.screen.say(&format!(
            "step {:>6}  {}  {}: {}  loss {:.3}{}  {} answers/s  {left}\n",
            report.step,
            clock(elapsed),
            self.settings.stage(report.step),
            rates(&report.solved_by_family),
            report.loss,
            distances(&report),
            count(rate),
        ))?;
        if let Some(Sample { problem, origin, answer, verdict }) = sample {
            let (origin, verdict) = (word(&origin), word(&verdict));
            let answer = self.settings.language.show(&problem.domain, &answer);
            self.screen.say(&format!("             {origin:>10}: {}   {answer}   {verdict}\n", problem.text))?;
        }
        Ok(())
    }
}

/// Returns the distances to the references of a step's losses: `  kl to base 0.021`.
fn distances(report: &StepReport) -> String {
    let distances = [("base", report.kl_to_base), ("teacher", report.kl_to_teacher)];
    let known = distances.into_iter().filter_map(|(reference, kl)| Some((reference, kl?)));
    known.map(|(reference, kl)| format!("  kl to {reference} {kl:.3}")).collect()
}

/// Sums families up by domain: `countdown 17.0 %, own 12.5 %, 31.2 % of proposals admitted`.
fn rates(families: &BTreeMap<String, (u64, u64)>) -> String {
    let mut domains = BTreeMap::<&str, [(u64, u64); 3]>::new();
    for (family, (solved, played)) in families {
        let (domain, source) = family.split_once(['/', ' ']).unwrap_or((family, ""));
        let place = match source {
            "own" | "archive" => 1,
            "proposals" => 2,
            _ => 0,
        };
        let counts = &mut domains.entry(domain).or_default()[place];
        *counts = (counts.0 + solved, counts.1 + played);
    }
    let share = |(solved, played): (u64, u64)| percent(solved as f64 / played.max(1) as f64);
    let of_domain = |(domain, [ladder, own, proposals]): (&&str, &[(u64, u64); 3])| {
        let mut text = (*domain).to_owned();
        let mut add = |counts: (u64, u64), words: String| text += if counts.1 > 0 { &words } else { "" };
        add(*ladder, format!(" {}", share(*ladder)));
        add(*own, format!(", own {}", share(*own)));
        add(*proposals, format!(", {} of proposals admitted", share(*proposals)));
        text
    };
    domains.iter().map(of_domain).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_part_of_a_stage() {
        let settings = Settings {
            opening: String::new(),
            quiet: true,
            time_limit: None,
            control: Some(Control { decay_from: 80, stop_at: 100 }),
            warmup_steps: 20,
            bootstrap_steps: Some(50),
            language: crate::language(),
        };
        let stages = [20, 21, 50, 51, 80, 81].map(|step| settings.stage(step));
        assert_eq!(stages, ["warm-up", "bootstrap", "bootstrap", "self-play", "self-play", "decay"]);
        assert_eq!(Settings { bootstrap_steps: None, ..settings }.stage(51), "ladder");
    }

    #[test]
    fn families_are_summed_up_by_domain() {
        let families = [
            ("countdown/2", (1, 4)),
            ("countdown/3", (0, 4)),
            ("countdown own", (1, 2)),
            ("countdown archive", (0, 2)),
            ("countdown proposals", (3, 4)),
            ("programs archive", (1, 1)),
        ];
        let families = families.map(|(family, counts)| (family.to_owned(), counts)).into_iter().collect();
        let expected = "countdown 12.5 %, own 25.0 %, 75.0 % of proposals admitted; programs, own 100.0 %";
        assert_eq!(rates(&families), expected);
    }
}
