//! Runs and workers as Prometheus sees them. `docs/metrics.md` has a row for each metric.
//!
//! Counters begin at 0 with the process, as Prometheus expects of them; gauges are of the run.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use bus::nats::Server;
use learner::{Event, Missing, StepEvent, Waiting};
use prometheus::{
    Counter, Gauge, GaugeVec, Histogram, IntCounter, IntCounterVec, IntGauge, Registry, TextEncoder,
    exponential_buckets, register_counter_with_registry, register_gauge_vec_with_registry,
    register_gauge_with_registry, register_histogram_with_registry, register_int_counter_vec_with_registry,
    register_int_counter_with_registry, register_int_gauge_with_registry,
};
use proto::Role;

use crate::counted::Meters;
use crate::endpoint::Scraped;
use crate::report::{folder_bytes, word};

/// The metrics of a run. A scrape sees whole events, so that its values are of one step.
pub(crate) struct Metrics {
    values: Mutex<Values>,
    traffic: Traffic,
}

/// What any process says and hears.
pub(crate) struct Traffic {
    registry: Registry,
    pub(crate) meters: Arc<Meters>,
    /// Once it is connected; a run in one process never is.
    pub(crate) server: OnceLock<Server>,
}

impl Traffic {
    fn new() -> Result<Traffic> {
        let registry = Registry::new_custom(Some("autodidact".to_owned()), None)?;
        Ok(Traffic { meters: Arc::new(Meters::new(&registry)?), registry, server: OnceLock::new() })
    }

    fn text(&self) -> Result<String> {
        self.meters.look_at(self.server.get());
        Ok(TextEncoder::new().encode_to_string(&self.registry.gather())?)
    }
}

/// The metrics of a worker.
pub(crate) struct WorkerMetrics {
    role: Role,
    pub(crate) traffic: Traffic,
}

impl WorkerMetrics {
    pub(crate) fn new(role: Role) -> Result<WorkerMetrics> {
        Ok(WorkerMetrics { role, traffic: Traffic::new()? })
    }
}

impl Scraped for WorkerMetrics {
    fn text(&self) -> Result<String> {
        self.traffic.text()
    }

    fn readiness(&self) -> Result<(), String> {
        match self.traffic.server.get() {
            None => Err("it has not joined a run yet".to_owned()),
            Some(server) if !server.is_connected() => Err("the NATS server is away".to_owned()),
            Some(_) if self.role == Role::Actor && !self.traffic.meters.has_weights() => {
                Err("it has no weights yet".to_owned())
            }
            Some(_) => Ok(()),
        }
    }
}

struct Values {
    journal: PathBuf,
    /// Why the run does not go on, if it does not.
    readiness: Result<(), String>,
    /// Tokens that the run had trained on by the last step, earlier processes included.
    trained_tokens_before: Option<u64>,

    learner_step: IntGauge,
    learner_steps: IntCounter,
    step_seconds: Histogram,
    reward_mean: Gauge,
    rollouts: IntCounterVec,
    rollouts_solved: IntCounterVec,
    trained_tokens: IntCounter,
    wait_seconds: Counter,
    train_seconds: Counter,
    waiting_seconds: GaugeVec,
    learning_rate: Gauge,
    loss: Gauge,
    grad_norm: Gauge,
    entropy: Gauge,
    logprob_mismatch: Gauge,
    staleness: Histogram,
    stale: IntCounter,
    exam_solved: GaugeVec,
    checkpoint_time: Gauge,
    journal_bytes: IntGauge,
    audited_tasks: IntCounter,
    banned_actors: IntGauge,
}

impl Metrics {
    pub(crate) fn new(run_dir: &Path) -> Result<Metrics> {
        let traffic = Traffic::new()?;
        let to = &traffic.registry;
        let values = Values {
            journal: run_dir.join("journal"),
            readiness: Err("no step and no exam yet".to_owned()),
            trained_tokens_before: None,
            learner_step: register_int_gauge_with_registry!("learner_step", "Steps folded by the run.", to)?,
            learner_steps: register_int_counter_with_registry!(
                "learner_steps_total",
                "Steps folded by this process.",
                to
            )?,
            step_seconds: register_histogram_with_registry!(
                "learner_step_duration_seconds",
                "From the version of a step to the next, waiting included.",
                exponential_buckets(0.0625, 2.0, 14)?,
                to
            )?,
            reward_mean: register_gauge_with_registry!(
                "learner_reward_mean",
                "Share of the last batch's rollouts that solve their problem; of proposals, that are admitted.",
                to
            )?,
            rollouts: register_int_counter_vec_with_registry!(
                "rollouts_folded_total",
                "Rollouts folded.",
                &["family"],
                to
            )?,
            rollouts_solved: register_int_counter_vec_with_registry!(
                "rollouts_solved_total",
                "Rollouts folded that solve their problem; of proposals, the admitted ones.",
                &["family"],
                to
            )?,
            trained_tokens: register_int_counter_with_registry!(
                "trained_tokens_total",
                "Input tokens trained on, with repeats.",
                to
            )?,
            wait_seconds: register_counter_with_registry!(
                "learner_wait_seconds_total",
                "Time that the learner waited for batches and exams.",
                to
            )?,
            train_seconds: register_counter_with_registry!(
                "learner_train_seconds_total",
                "Time that the learner trained.",
                to
            )?,
            waiting_seconds: register_gauge_vec_with_registry!(
                "learner_waiting_seconds",
                "For how long nothing has come, once that is longer than it should be; of tasks of a kind, by who has them.",
                &["role", "kind"],
                to
            )?,
            learning_rate: register_gauge_with_registry!(
                "learner_learning_rate",
                "Learning rate of the last step.",
                to
            )?,
            loss: register_gauge_with_registry!("learner_loss", "Loss of the last step.", to)?,
            grad_norm: register_gauge_with_registry!(
                "learner_grad_norm",
                "Mean gradient norm of the last step, before clipping.",
                to
            )?,
            entropy: register_gauge_with_registry!(
                "policy_entropy_nats",
                "Estimated entropy of a choice of the policy that played the last batch.",
                to
            )?,
            logprob_mismatch: register_gauge_with_registry!(
                "logprob_mismatch_nats",
                "Mean difference between the log-probabilities of actor and learner; NaN where versions differ.",
                to
            )?,
            staleness: register_histogram_with_registry!(
                "weights_lag_versions",
                "Steps between the oldest version that drew a token of a rollout and the state that it trains.",
                vec![0.0, 1.0, 2.0, 4.0, 8.0, 16.0],
                to
            )?,
            stale: register_int_counter_with_registry!(
                "groups_stale_total",
                "Groups of a free-running run that came too late and were not trained on.",
                to
            )?,
            exam_solved: register_gauge_vec_with_registry!(
                "exam_solved_ratio",
                "Share of an exam's dev problems solved when it was last sat.",
                &["exam"],
                to
            )?,
            checkpoint_time: register_gauge_with_registry!(
                "checkpoint_last_success_timestamp_seconds",
                "When this process wrote its last checkpoint, in Unix time; NaN before.",
                to
            )?,
            journal_bytes: register_int_gauge_with_registry!("journal_bytes", "Size of the journal.", to)?,
            audited_tasks: register_int_counter_with_registry!(
                "audited_tasks_total",
                "Tasks that two actors agreed on.",
                to
            )?,
            banned_actors: register_int_gauge_with_registry!("banned_actors", "Actors that the run has banned.", to)?,
        };
        values.checkpoint_time.set(f64::NAN);
        Ok(Metrics { values: Mutex::new(values), traffic })
    }

    /// What the run's process says and hears.
    pub(crate) fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Takes in what happened.
    pub(crate) fn observe(&self, event: &Event) {
        let mut values = self.values();
        values.readiness = Ok(());
        values.waiting_seconds.reset();
        match event {
            Event::Step(event) => values.step(event),
            Event::Eval(eval) => {
                let share = eval.num_correct as f64 / eval.num_problems as f64;
                values.exam_solved.with_label_values(&[&eval.exam]).set(share);
            }
            Event::Resumed { step, banned, .. } => {
                values.learner_step.set(*step as i64);
                values.banned_actors.set(banned.len() as i64);
            }
            Event::Ban(_) => values.banned_actors.inc(),
            Event::Waiting(waiting) => values.waiting(waiting),
            Event::Checkpoint(_) => values.checkpoint_time.set(unix_time().as_secs_f64()),
            Event::CheckpointRefused(_) | Event::Control(_) | Event::Saving => {}
        }
    }

    fn values(&self) -> MutexGuard<'_, Values> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Scraped for Metrics {
    fn text(&self) -> Result<String> {
        // Held until all is read: what is read is of one step.
        let values = self.values();
        values.journal_bytes.set(folder_bytes(&values.journal) as i64);
        self.traffic.text()
    }

    fn readiness(&self) -> Result<(), String> {
        match self.traffic.server.get() {
            Some(server) if !server.is_connected() => Err("the NATS server is away".to_owned()),
            _ => self.values().readiness.clone(),
        }
    }
}

impl Values {
    fn step(&mut self, event: &StepEvent) {
        let StepEvent { report, waited, trained, totals, num_audited, num_stale, .. } = event;
        self.learner_step.set(report.step as i64);
        self.learner_steps.inc();
        self.step_seconds.observe((*waited + *trained).as_secs_f64());
        let (solved, played) =
            report.solved_by_family.values().fold((0, 0), |sum, pair| (sum.0 + pair.0, sum.1 + pair.1));
        self.reward_mean.set(solved as f64 / played as f64);
        for (family, (solved, played)) in &report.solved_by_family {
            self.rollouts.with_label_values(&[family]).inc_by(*played);
            self.rollouts_solved.with_label_values(&[family]).inc_by(*solved);
        }
        // Where a resumed process begins, what was trained on before is not told apart from its first step.
        let before = self.trained_tokens_before.unwrap_or(if report.step == 1 { 0 } else { totals.num_trained_tokens });
        self.trained_tokens.inc_by(totals.num_trained_tokens - before);
        self.trained_tokens_before = Some(totals.num_trained_tokens);
        self.wait_seconds.inc_by(waited.as_secs_f64());
        self.train_seconds.inc_by(trained.as_secs_f64());
        self.audited_tasks.inc_by(num_audited - self.audited_tasks.get());
        self.learning_rate.set(report.learning_rate);
        self.loss.set(report.loss);
        self.grad_norm.set(report.grad_norm);
        self.entropy.set(report.entropy);
        self.logprob_mismatch.set(report.logprob_mismatch.unwrap_or(f64::NAN));
        for (steps, count) in &report.rollouts_by_staleness {
            (0..*count).for_each(|_| self.staleness.observe(*steps as f64));
        }
        self.stale.inc_by(num_stale.saturating_sub(self.stale.get()));
    }

    /// Says in what role somebody has what is waited for.
    fn waiting(&mut self, waiting: &Waiting) {
        self.readiness = Err(waiting.to_string());
        for Missing { task, holder, .. } in &waiting.first {
            let role = holder.as_ref().map_or("none".to_owned(), |holder| word(&holder.role));
            let labels = [role, word(&task.kind)];
            self.waiting_seconds.with_label_values(&labels).set(waiting.waited.as_secs_f64());
        }
    }
}

/// For people alone; no result depends on it.
#[expect(clippy::disallowed_methods, reason = "no result depends on it")]
fn unix_time() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Labels that a run would give.
    fn with_labels() -> Metrics {
        let metrics = Metrics::new(Path::new("absent")).unwrap();
        let values = metrics.values();
        values.exam_solved.with_label_values(&["countdown-3"]).set(0.5);
        values.waiting_seconds.with_label_values(&["actor", "train"]).set(30.0);
        values.rollouts.with_label_values(&["countdown/1"]).inc();
        values.rollouts_solved.with_label_values(&["countdown/1"]).inc();
        drop(values);
        metrics.traffic.meters.fill();
        metrics
    }

    #[test]
    fn every_metric_has_a_row_in_the_docs() {
        let text = with_labels().text().unwrap();
        let kinds: BTreeSet<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let rows = include_str!("../docs/metrics.md").lines().filter_map(|line| line.strip_prefix("| `autodidact_"));
        let documented: BTreeSet<String> = rows
            .map(|row| {
                let cells: Vec<&str> = row.split('|').map(str::trim).collect();
                format!("autodidact_{} {}", cells[0].trim_end_matches('`').split('{').next().unwrap(), cells[1])
            })
            .collect();
        assert_eq!(documented, kinds.into_iter().map(str::to_owned).collect());
        assert_eq!(text.matches("# HELP ").count(), documented.len(), "every metric says what it is");
    }
}
