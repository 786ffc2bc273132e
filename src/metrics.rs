//! Prometheus metrics of runs and workers. `docs/metrics.md` has a row for each metric.
//!
//! Counters start at 0 with the process, as Prometheus expects. Gauges describe the run.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Result, anyhow};
use bus::nats::Server;
use learner::{EvalRecord, Event, Missing, StepEvent, StepReport, Waiting};
use prometheus::{
    Counter, GaugeVec, Histogram, IntCounter, IntCounterVec, IntGauge, Registry, TextEncoder, exponential_buckets,
    register_counter_with_registry, register_gauge_vec_with_registry, register_histogram_with_registry,
    register_int_counter_vec_with_registry, register_int_counter_with_registry, register_int_gauge_with_registry,
};
use proto::Role;

use crate::bus_meters::{Duty, Meters};
use crate::endpoint::Scraped;
use crate::late::LateGauge;
use crate::record::LastStep;
use crate::report::{folder_bytes, word};

/// The metrics of a run. A scrape sees whole events only, so that its values belong to one step.
pub(crate) struct Metrics {
    values: Mutex<Values>,
    traffic: Traffic,
}

/// Metrics of the messages that a process sends and receives.
pub(crate) struct Traffic {
    registry: Registry,
    pub(crate) meters: Arc<Meters>,
    /// Set once the process is connected; never set for a run in one process.
    pub(crate) server: OnceLock<Server>,
    is_alone: bool,
}

impl Traffic {
    fn new(duties: &[Duty]) -> Result<Traffic> {
        let registry = Registry::new_custom(Some("autodidact".to_owned()), None)?;
        let meters = Arc::new(Meters::new(&registry, duties)?);
        Ok(Traffic { meters, registry, server: OnceLock::new(), is_alone: duties == Duty::ALL })
    }

    fn text(&self) -> Result<String> {
        self.meters.look_at(self.server.get(), self.is_alone);
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
        let duty = match role {
            Role::Actor => Duty::Play,
            Role::Verifier => Duty::Judge,
        };
        Ok(WorkerMetrics { role, traffic: Traffic::new(&[duty])? })
    }
}

impl Scraped for WorkerMetrics {
    fn text(&self) -> Result<String> {
        self.traffic.text()
    }

    fn readiness(&self) -> Result<(), String> {
        match self.traffic.server.get() {
            None => Err("has not joined a run yet".to_owned()),
            Some(server) if !server.is_connected() => Err("the NATS server is unreachable".to_owned()),
            Some(_) if self.role == Role::Actor && !self.traffic.meters.has_weights() => {
                Err("has received no weights yet".to_owned())
            }
            Some(_) => Ok(()),
        }
    }
}

struct Values {
    journal: PathBuf,
    /// Whether the values describe the run. A resumed run must be read first.
    is_known: bool,
    /// Whether the run makes progress. The error is the reason why not.
    readiness: Result<(), String>,
    /// Tokens that the run had trained on by the last step, including earlier processes.
    trained_tokens_before: Option<u64>,

    learner_step: LateGauge,
    learner_steps: IntCounter,
    step_seconds: Histogram,
    reward_mean: LateGauge,
    rollouts: IntCounterVec,
    rollouts_solved: IntCounterVec,
    trained_tokens: IntCounter,
    wait_seconds: Counter,
    train_seconds: Counter,
    waiting_seconds: GaugeVec,
    learning_rate: LateGauge,
    loss: LateGauge,
    grad_norm: LateGauge,
    policy_gradient_loss: GaugeVec,
    policy_gradient_clip_ratio: GaugeVec,
    kl: GaugeVec,
    answers_ended: LateGauge,
    answer_tokens: LateGauge,
    mixed_groups: LateGauge,
    dpo_loss: LateGauge,
    dpo_accuracy: LateGauge,
    entropy: LateGauge,
    logprob_mismatch: LateGauge,
    staleness: Histogram,
    stale: IntCounter,
    exam_solved: GaugeVec,
    checkpoint_time: LateGauge,
    journal_bytes: IntGauge,
    audited_tasks: IntCounter,
    banned_actors: IntGauge,
}

impl Metrics {
    /// Makes the metrics of a run with these task families. If the run `goes_on`, the values are unknown until
    /// [`Event::Resumed`].
    pub(crate) fn new(run_dir: &Path, duties: &[Duty], goes_on: bool, families: &[String]) -> Result<Metrics> {
        let traffic = Traffic::new(duties)?;
        let to = &traffic.registry;
        let values = Values {
            journal: run_dir.join("journal"),
            is_known: !goes_on,
            readiness: Err("no step or exam completed yet".to_owned()),
            trained_tokens_before: None,
            learner_step: LateGauge::register("learner_step", "Steps folded by the run.", to)?,
            learner_steps: register_int_counter_with_registry!(
                "learner_steps_total",
                "Steps folded by this process.",
                to
            )?,
            step_seconds: register_histogram_with_registry!(
                "learner_step_duration_seconds",
                "Time from one policy version to the next, including waiting.",
                exponential_buckets(0.0625, 2.0, 14)?,
                to
            )?,
            reward_mean: LateGauge::register(
                "learner_reward_mean",
                "Share of the last batch's rollouts that solved their problem; for proposals, that were admitted.",
                to,
            )?,
            rollouts: register_int_counter_vec_with_registry!(
                "rollouts_folded_total",
                "Rollouts folded.",
                &["family"],
                to
            )?,
            rollouts_solved: register_int_counter_vec_with_registry!(
                "rollouts_solved_total",
                "Rollouts folded that solved their problem; for proposals, that were admitted.",
                &["family"],
                to
            )?,
            trained_tokens: register_int_counter_with_registry!(
                "trained_tokens_total",
                "Input tokens trained on, counting repeats.",
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
                "Time without progress, by kind of the outstanding tasks and role that holds them; absent during progress.",
                &["role", "kind"],
                to
            )?,
            learning_rate: LateGauge::register("learner_learning_rate", "Learning rate of the last step.", to)?,
            loss: LateGauge::register("learner_loss", "Loss of the last step.", to)?,
            grad_norm: LateGauge::register(
                "learner_grad_norm",
                "Mean gradient norm of the last step, before clipping.",
                to,
            )?,
            policy_gradient_loss: register_gauge_vec_with_registry!(
                "learner_policy_gradient_loss",
                "Policy gradient loss of the last step, before weighting, by role (solver, proposer).",
                &["role"],
                to
            )?,
            policy_gradient_clip_ratio: register_gauge_vec_with_registry!(
                "learner_policy_gradient_clip_ratio",
                "Share of policy gradient tokens whose surrogate was clipped.",
                &["role"],
                to
            )?,
            kl: register_gauge_vec_with_registry!(
                "learner_kl_nats",
                "Estimated divergence per choice of the policy from a reference of its losses.",
                &["reference"],
                to
            )?,
            answers_ended: LateGauge::register(
                "learner_answers_ended_ratio",
                "Share of the last batch's answers that ended by themselves.",
                to,
            )?,
            answer_tokens: LateGauge::register(
                "learner_answer_tokens_mean",
                "Mean number of tokens of the last batch's answers.",
                to,
            )?,
            mixed_groups: LateGauge::register(
                "learner_mixed_groups_ratio",
                "Share of the last batch's groups with right and wrong answers.",
                to,
            )?,
            dpo_loss: LateGauge::register(
                "learner_dpo_loss",
                "Preference loss of the last step, before weighting.",
                to,
            )?,
            dpo_accuracy: LateGauge::register(
                "learner_dpo_accuracy_ratio",
                "Share of pairs whose right answer the policy prefers.",
                to,
            )?,
            entropy: LateGauge::register(
                "policy_entropy_nats",
                "Estimated entropy per choice of the policy that generated the last batch.",
                to,
            )?,
            logprob_mismatch: LateGauge::register(
                "logprob_mismatch_nats",
                "Mean difference between actor and learner log-probabilities at equal policy versions.",
                to,
            )?,
            staleness: register_histogram_with_registry!(
                "weights_lag_versions",
                "Steps between the oldest policy version that sampled a token of a rollout and the state that it trains.",
                vec![0.0, 1.0, 2.0, 4.0, 8.0, 16.0],
                to
            )?,
            stale: register_int_counter_with_registry!(
                "groups_stale_total",
                "Groups of a free-running run that arrived too late and were not trained on.",
                to
            )?,
            exam_solved: register_gauge_vec_with_registry!(
                "exam_solved_ratio",
                "Share of an exam's dev problems solved in its last evaluation.",
                &["exam"],
                to
            )?,
            checkpoint_time: LateGauge::register(
                "checkpoint_last_success_timestamp_seconds",
                "Unix time at which this process wrote its last checkpoint.",
                to,
            )?,
            journal_bytes: register_int_gauge_with_registry!("journal_bytes", "Size of the journal.", to)?,
            audited_tasks: register_int_counter_with_registry!(
                "audited_tasks_total",
                "Tasks that two actors agreed on.",
                to
            )?,
            banned_actors: register_int_gauge_with_registry!("banned_actors", "Actors that the run has banned.", to)?,
        };
        if !goes_on {
            values.learner_step.set(0.0);
        }
        for family in families {
            drop(values.rollouts.with_label_values(&[family]));
            drop(values.rollouts_solved.with_label_values(&[family]));
        }
        Ok(Metrics { values: Mutex::new(values), traffic })
    }

    /// Returns the message metrics of the run's process.
    pub(crate) fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Updates the metrics with an event. `last_step` is the step that the run resumed from.
    pub(crate) fn observe(&self, event: &Event, last_step: Option<&LastStep>) {
        let mut values = self.values();
        match event {
            Event::Step(event) => {
                values.gets_further();
                values.step(event);
            }
            Event::Eval(eval) => {
                values.gets_further();
                values.exam(eval);
            }
            Event::Resumed { step, evals, banned, .. } => {
                values.is_known = true;
                values.learner_step.set(*step as f64);
                values.banned_actors.set(banned.len() as i64);
                evals.iter().for_each(|eval| values.exam(eval));
                if let Some(LastStep { report, num_trained_tokens }) = last_step {
                    values.report(report);
                    values.trained_tokens_before = Some(*num_trained_tokens);
                }
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
        // The lock is held until all values are read, so that they belong to one step.
        let values = self.values();
        if !values.is_known {
            return Err(anyhow!("the run is still loading"));
        }
        values.journal_bytes.set(folder_bytes(&values.journal) as i64);
        self.traffic.text()
    }

    fn readiness(&self) -> Result<(), String> {
        match self.traffic.server.get() {
            Some(server) if !server.is_connected() => Err("the NATS server is unreachable".to_owned()),
            _ => self.values().readiness.clone(),
        }
    }
}

impl Values {
    fn gets_further(&mut self) {
        self.readiness = Ok(());
        self.waiting_seconds.reset();
    }

    fn step(&mut self, event: &StepEvent) {
        let StepEvent { report, waited, trained, totals, num_audited, num_stale, .. } = event;
        self.report(report);
        self.learner_steps.inc();
        self.step_seconds.observe((*waited + *trained).as_secs_f64());
        for (family, (solved, played)) in &report.solved_by_family {
            self.rollouts.with_label_values(&[family]).inc_by(*played);
            self.rollouts_solved.with_label_values(&[family]).inc_by(*solved);
        }
        // If the row of the previous step is lost, the tokens of this process' first step are unknown and not counted.
        let before = self.trained_tokens_before.unwrap_or(if report.step == 1 { 0 } else { totals.num_trained_tokens });
        self.trained_tokens.inc_by(totals.num_trained_tokens - before);
        self.trained_tokens_before = Some(totals.num_trained_tokens);
        self.wait_seconds.inc_by(waited.as_secs_f64());
        self.train_seconds.inc_by(trained.as_secs_f64());
        self.audited_tasks.inc_by(num_audited - self.audited_tasks.get());
        for (steps, count) in &report.rollouts_by_staleness {
            (0..*count).for_each(|_| self.staleness.observe(*steps as f64));
        }
        self.stale.inc_by(num_stale.saturating_sub(self.stale.get()));
    }

    /// Sets the gauges of the run's last step, whichever process made it.
    fn report(&mut self, report: &StepReport) {
        self.learner_step.set(report.step as f64);
        let (solved, played) =
            report.solved_by_family.values().fold((0, 0), |sum, pair| (sum.0 + pair.0, sum.1 + pair.1));
        self.reward_mean.set(solved as f64 / played as f64);
        self.learning_rate.set(report.learning_rate);
        self.loss.set(report.loss);
        self.grad_norm.set(report.grad_norm);
        self.entropy.set(report.entropy);
        self.logprob_mismatch.set_known(report.logprob_mismatch);
        self.answers_ended.set_known(report.answers.as_ref().map(|answers| answers.ended_share));
        self.answer_tokens.set_known(report.answers.as_ref().map(|answers| answers.mean_tokens));
        self.mixed_groups.set_known(report.answers.as_ref().map(|answers| answers.mixed_share));
        self.kl.reset();
        for (reference, kl) in [("base", report.kl_to_base), ("teacher", report.kl_to_teacher)] {
            if let Some(kl) = kl {
                self.kl.with_label_values(&[reference]).set(kl);
            }
        }
        self.dpo_loss.set_known(report.dpo.as_ref().map(|dpo| dpo.loss));
        self.dpo_accuracy.set_known(report.dpo.as_ref().map(|dpo| dpo.accuracy));
        self.policy_gradient_loss.reset();
        self.policy_gradient_clip_ratio.reset();
        for (role, report) in [("solver", &report.policy_gradient), ("proposer", &report.proposer)] {
            if let Some(report) = report {
                self.policy_gradient_loss.with_label_values(&[role]).set(report.loss);
                self.policy_gradient_clip_ratio.with_label_values(&[role]).set(report.clip_fraction);
            }
        }
    }

    fn exam(&mut self, eval: &EvalRecord) {
        let share = eval.num_correct as f64 / eval.num_problems as f64;
        self.exam_solved.with_label_values(&[&eval.exam]).set(share);
    }

    /// Records what the run waits for, by the role of each task's holder.
    fn waiting(&mut self, waiting: &Waiting) {
        self.readiness = Err(waiting.to_string());
        self.waiting_seconds.reset();
        for Missing { task, holder, .. } in &waiting.first {
            let role = holder.as_ref().map_or("none".to_owned(), |holder| word(&holder.role));
            let labels = [role, word(&task.kind)];
            self.waiting_seconds.with_label_values(&labels).set(waiting.waited.as_secs_f64());
        }
    }
}

/// Returns the Unix time, for people only; no result depends on it.
#[expect(clippy::disallowed_methods, reason = "no result depends on it")]
fn unix_time() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use learner::{AnswersReport, DpoReport, PolicyGradientReport};
    use proto::Digest;

    use super::*;
    use crate::bus_meters::{ACKS, PUBLISH_RESULTS};

    fn metrics(duties: &[Duty], goes_on: bool) -> Metrics {
        Metrics::new(Path::new("absent"), duties, goes_on, &["countdown/1".to_owned()]).unwrap()
    }

    fn report(step: u64) -> StepReport {
        let digest = Digest::of_bytes(b"");
        let policy_gradient = PolicyGradientReport {
            loss: -0.125,
            clip_fraction: 0.25,
            truncated_fraction: 0.0,
            importance_ratio: 1.0,
            entropy: 0.5,
            num_rollouts: 3,
        };
        StepReport {
            step,
            weights_digest: digest,
            state_digest: digest,
            learning_rate: 0.001,
            loss: 1.5,
            grad_norm: 2.5,
            proposer: Some(PolicyGradientReport { loss: -0.75, clip_fraction: 0.5, ..policy_gradient.clone() }),
            policy_gradient: Some(policy_gradient),
            dpo: Some(DpoReport { loss: 0.6875, accuracy: 0.75, margin: 0.125, num_pairs: 4 }),
            kl_to_base: Some(0.0625),
            kl_to_teacher: Some(0.3125),
            solve_rate: 0.5,
            answers: Some(AnswersReport { ended_share: 0.875, mean_tokens: 6.5, mixed_share: 0.625 }),
            solved_by_family: BTreeMap::from([("a".to_owned(), (1, 6)), ("b".to_owned(), (2, 2))]),
            self_play: None,
            entropy: 0.75,
            rollouts_by_staleness: BTreeMap::new(),
            num_examples: 4,
            num_new_examples: 3,
            num_example_tokens: 40,
            num_updates: 2,
            logprob_mismatch: Some(0.0),
        }
    }

    /// Makes metrics with the labels of a run and a value for every gauge.
    fn with_labels() -> Metrics {
        let metrics = metrics(&Duty::ALL, false);
        let mut values = metrics.values();
        values.report(&report(1));
        values.checkpoint_time.set(1.8e9);
        values.exam_solved.with_label_values(&["countdown-3"]).set(0.5);
        values.waiting_seconds.with_label_values(&["actor", "train"]).set(30.0);
        values.rollouts.with_label_values(&["countdown/1"]).inc();
        values.rollouts_solved.with_label_values(&["countdown/1"]).inc();
        drop(values);
        metrics.traffic.meters.fill();
        metrics
    }

    /// Finds the values of a text by name and labels.
    fn series(text: &str) -> BTreeMap<&str, f64> {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.filter_map(|line| line.rsplit_once(' ')).map(|(name, value)| (name, value.parse().unwrap())).collect()
    }

    /// Metrics of a step are absent before the first step: 0 would be a value.
    #[test]
    fn nothing_is_said_of_steps_before_there_is_one() {
        let metrics = metrics(&[Duty::Learn], false);
        let text = metrics.text().unwrap();
        let series = series(&text);
        assert_eq!(series["autodidact_learner_step"], 0.0);
        for counter in ["folded", "solved"] {
            assert_eq!(series[format!("autodidact_rollouts_{counter}_total{{family=\"countdown/1\"}}").as_str()], 0.0);
        }
        let of_steps = [
            "loss",
            "entropy",
            "reward",
            "grad_norm",
            "learning_rate",
            "mismatch",
            "policy_gradient",
            "kl_nats",
            "dpo",
            "answer",
            "mixed",
            "checkpoint_last",
        ];
        let exist: Vec<_> = series.keys().filter(|name| of_steps.iter().any(|part| name.contains(part))).collect();
        assert!(exist.is_empty(), "{exist:?}");
        assert!(!text.contains("autodidact_exam_solved_ratio"), "{text}");
        assert!(!text.contains("autodidact_weights_bytes ") && !text.contains("autodidact_weights_version "), "{text}");
        assert!(!text.contains("autodidact_bus_connected"), "nobody has looked: {text}");
    }

    #[test]
    fn a_run_that_goes_on_has_its_own_values_before_it_is_scraped() {
        let metrics = metrics(&[Duty::Learn], true);
        assert_eq!(metrics.text().unwrap_err().to_string(), "the run is still loading");
        let eval = |step, num_correct| EvalRecord { step, exam: "e".to_owned(), num_correct, num_problems: 200 };
        let resumed = Event::Resumed {
            step: 7,
            control: None,
            truncated_bytes: 0,
            unreadable: Vec::new(),
            evals: vec![eval(0, 10), eval(5, 50)],
            banned: vec!["mallory".to_owned()],
        };
        let last_step = LastStep { report: report(7), num_trained_tokens: 1_000 };
        metrics.observe(&resumed, Some(&last_step));
        let text = metrics.text().unwrap();
        let series = series(&text);
        for (name, expected) in [
            ("learner_step", 7.0),
            ("learner_loss", 1.5),
            ("learner_grad_norm", 2.5),
            ("learner_learning_rate", 0.001),
            ("learner_reward_mean", 0.375),
            ("policy_entropy_nats", 0.75),
            ("learner_policy_gradient_loss{role=\"solver\"}", -0.125),
            ("learner_policy_gradient_loss{role=\"proposer\"}", -0.75),
            ("learner_policy_gradient_clip_ratio{role=\"proposer\"}", 0.5),
            ("learner_kl_nats{reference=\"base\"}", 0.0625),
            ("learner_kl_nats{reference=\"teacher\"}", 0.3125),
            ("learner_answers_ended_ratio", 0.875),
            ("learner_answer_tokens_mean", 6.5),
            ("learner_mixed_groups_ratio", 0.625),
            ("learner_dpo_loss", 0.6875),
            ("learner_dpo_accuracy_ratio", 0.75),
            ("exam_solved_ratio{exam=\"e\"}", 0.25),
            ("banned_actors", 1.0),
            // Of this process.
            ("learner_steps_total", 0.0),
            ("trained_tokens_total", 0.0),
        ] {
            assert_eq!(series[format!("autodidact_{name}").as_str()], expected, "{name}");
        }
        assert!(metrics.readiness().is_err(), "it has made no step yet");
    }

    /// A counter that appeared only with its first failure would have a rate of 0.
    #[test]
    fn failures_are_counted_from_zero() {
        for (duty, takes, publishes, others) in [
            (Duty::Learn, "scored", "task", "autodidact_tasks_issued_total{kind=\"evaluate\",reissued=\"true\"}"),
            (Duty::Play, "task", "group", "autodidact_rollouts_total{domain=\"programs\",outcome=\"length\"}"),
            (Duty::Judge, "group", "scored", "autodidact_verify_total{domain=\"countdown\",verdict=\"malformed\"}"),
        ] {
            let text = metrics(&[duty], false).text().unwrap();
            let series = series(&text);
            let mut expected = vec![
                others.to_owned(),
                format!("autodidact_dead_letters_total{{queue=\"{takes}\"}}"),
                format!("autodidact_bus_deliveries_total{{queue=\"{takes}\",redelivered=\"true\"}}"),
            ];
            let results = PUBLISH_RESULTS
                .map(|result| format!("autodidact_bus_publish_total{{queue=\"{publishes}\",result=\"{result}\"}}"));
            expected.extend(results);
            expected.extend(ACKS.map(|kind| format!("autodidact_bus_acks_total{{kind=\"{kind}\",queue=\"{takes}\"}}")));
            for name in &expected {
                assert_eq!(series.get(name.as_str()), Some(&0.0), "{name} in\n{text}");
            }
            // The process has no metrics of other queues.
            let queues =
                series.keys().filter(|name| name.contains("dead_letters") || name.contains("bus_publish_total"));
            assert_eq!(queues.count(), 1 + PUBLISH_RESULTS.len(), "{text}");
        }
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
