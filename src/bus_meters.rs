//! Counts one process's traffic on the bus for Prometheus. Roles act through the messages they send, so their work is
//! counted here too.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use bus::nats::{Server, ServerCounts};
use bus::{Delivery, Error};
use prometheus::{
    HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, Registry, exponential_buckets,
    register_histogram_vec_with_registry, register_int_counter_vec_with_registry, register_int_counter_with_registry,
    register_int_gauge_vec_with_registry,
};
use proto::{Group, ScoredGroup, StopReason, TaskId, TaskKind, Verdict};
use tokio::time::Instant;

use crate::late::LateGauge;
use crate::report::word;

/// A role that a process has in a run. It decides which metrics the process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Duty {
    /// Issues tasks and takes scored groups.
    Learn,
    /// Takes tasks and sends groups.
    Play,
    /// Takes groups and sends scored groups.
    Judge,
}

impl Duty {
    pub(crate) const ALL: [Duty; 3] = [Duty::Learn, Duty::Play, Duty::Judge];

    /// Returns the queue that this role publishes to.
    fn publishes(self) -> &'static str {
        match self {
            Duty::Learn => "task",
            Duty::Play => "group",
            Duty::Judge => "scored",
        }
    }

    /// Returns the queue that this role takes from.
    fn takes(self) -> &'static str {
        match self {
            Duty::Learn => "scored",
            Duty::Play => "task",
            Duty::Judge => "group",
        }
    }
}

/// Counts the messages that one process sends and receives.
pub(crate) struct Meters {
    pub(crate) publishes: IntCounterVec,
    pub(crate) publish_seconds: HistogramVec,
    pub(crate) deliveries: IntCounterVec,
    pub(crate) tasks_issued: IntCounterVec,
    pub(crate) rollouts: IntCounterVec,
    pub(crate) rollout_tokens: IntCounterVec,
    pub(crate) rollout_seconds: HistogramVec,
    pub(crate) verdicts: IntCounterVec,
    pub(crate) verify_seconds: HistogramVec,
    /// Start times of the tasks being played and the groups being judged here.
    pub(crate) playing: Begun,
    pub(crate) judging: Begun,
    pub(crate) weights_seconds: HistogramVec,
    pub(crate) weights_bytes: LateGauge,
    pub(crate) weights_refused: IntCounter,
    pub(crate) connected: LateGauge,
    pub(crate) reconnects: IntCounter,
    pub(crate) denied: IntCounter,
    pub(crate) slow: IntCounter,
    pub(crate) dead: IntCounterVec,
    pub(crate) publish_bytes: IntCounterVec,
    pub(crate) acks: IntCounterVec,
    pub(crate) queue_messages: IntGaugeVec,
    pub(crate) queue_inflight: IntGaugeVec,
    pub(crate) weights_version: LateGauge,
    pub(crate) has_weights: AtomicBool,
}

impl Meters {
    /// Registers the metrics of a process with these duties. Every labelled counter starts at 0: a rate over a counter that
    /// appears with its first failure would miss that failure.
    pub(crate) fn new(to: &Registry, duties: &[Duty]) -> Result<Meters> {
        let seconds = exponential_buckets(0.0005, 4.0, 9)?;
        let build = register_int_gauge_vec_with_registry!("build_info", "Always 1.", &["version", "build"], to)?;
        let id: String = env!("AUTODIDACT_BUILD_ID").chars().take(12).collect();
        build.with_label_values(&[env!("CARGO_PKG_VERSION"), &id]).set(1);
        let meters = Meters {
            publishes: register_int_counter_vec_with_registry!(
                "bus_publish_total",
                "Messages handed to the bus.",
                &["queue", "result"],
                to
            )?,
            publish_seconds: register_histogram_vec_with_registry!(
                "bus_publish_duration_seconds",
                "How long the bus took to say that it has a message.",
                &["queue"],
                seconds.clone(),
                to
            )?,
            deliveries: register_int_counter_vec_with_registry!(
                "bus_deliveries_total",
                "Messages taken from the bus.",
                &["queue", "redelivered"],
                to
            )?,
            tasks_issued: register_int_counter_vec_with_registry!(
                "tasks_issued_total",
                "Tasks asked for by this process, issues after the first apart.",
                &["kind", "reissued"],
                to
            )?,
            rollouts: register_int_counter_vec_with_registry!(
                "rollouts_total",
                "Rollouts that this process played.",
                &["domain", "outcome"],
                to
            )?,
            rollout_tokens: register_int_counter_vec_with_registry!(
                "rollout_tokens_total",
                "Tokens in them, forced ones included.",
                &["domain"],
                to
            )?,
            rollout_seconds: register_histogram_vec_with_registry!(
                "rollout_duration_seconds",
                "From a task that is taken to its group that is sent on its way, waiting for slots and weights included.",
                &["domain"],
                exponential_buckets(0.01, 3.0, 11)?,
                to
            )?,
            verdicts: register_int_counter_vec_with_registry!(
                "verify_total",
                "Verdicts that this process gave.",
                &["domain", "verdict"],
                to
            )?,
            verify_seconds: register_histogram_vec_with_registry!(
                "verify_duration_seconds",
                "From a group that is taken to its verdicts that are sent on their way.",
                &["domain"],
                seconds.clone(),
                to
            )?,
            playing: Begun::default(),
            judging: Begun::default(),
            weights_seconds: register_histogram_vec_with_registry!(
                "weights_transfer_duration_seconds",
                "How long weights took from or to the bus.",
                &["direction"],
                seconds,
                to
            )?,
            weights_bytes: LateGauge::register("weights_bytes", "Size of the weights moved last.", to)?,
            weights_refused: register_int_counter_with_registry!(
                "weights_refused_total",
                "Weights that were not there, or not what their name says.",
                to
            )?,
            connected: LateGauge::register("bus_connected", "Whether the bus is there: 1, or 0.", to)?,
            reconnects: register_int_counter_with_registry!(
                "bus_reconnects_total",
                "Connections after the first.",
                to
            )?,
            denied: register_int_counter_with_registry!(
                "bus_permission_denied_total",
                "Requests that the server did not permit.",
                to
            )?,
            slow: register_int_counter_with_registry!(
                "bus_slow_consumer_total",
                "Times that messages came faster than they were taken.",
                to
            )?,
            dead: register_int_counter_vec_with_registry!(
                "dead_letters_total",
                "Messages that could not be read or judged.",
                &["queue"],
                to
            )?,
            publish_bytes: register_int_counter_vec_with_registry!(
                "bus_publish_bytes_total",
                "Bytes of messages that the server has, headers left out.",
                &["queue"],
                to
            )?,
            acks: register_int_counter_vec_with_registry!(
                "bus_acks_total",
                "What the server was told of messages that were taken.",
                &["queue", "kind"],
                to
            )?,
            queue_messages: register_int_gauge_vec_with_registry!(
                "queue_messages",
                "Messages that nobody has taken yet, as the learner saw them last.",
                &["queue"],
                to
            )?,
            queue_inflight: register_int_gauge_vec_with_registry!(
                "queue_inflight",
                "Messages that somebody has taken and not answered yet, as the learner saw them last.",
                &["queue"],
                to
            )?,
            weights_version: LateGauge::register(
                "weights_version",
                "Step after which the weights were published that played last.",
                to,
            )?,
            has_weights: AtomicBool::new(false),
        };
        duties.iter().for_each(|duty| meters.begin_at_zero(*duty));
        Ok(meters)
    }

    /// Creates, at 0, every counter that a duty may increment.
    pub(crate) fn begin_at_zero(&self, duty: Duty) {
        let make = |counter: &IntCounterVec, labels: &[&str]| drop(counter.with_label_values(labels));
        let domains = || domains::registry().iter().map(|domain| domain.name());
        let (publishes, takes) = (duty.publishes(), duty.takes());
        PUBLISH_RESULTS.iter().for_each(|result| make(&self.publishes, &[publishes, result]));
        make(&self.publish_bytes, &[publishes]);
        ["false", "true"].iter().for_each(|redelivered| make(&self.deliveries, &[takes, redelivered]));
        ACKS.iter().for_each(|kind| make(&self.acks, &[takes, kind]));
        make(&self.dead, &[takes]);
        match duty {
            Duty::Learn => {
                for kind in [TaskKind::Train, TaskKind::Evaluate].map(|kind| word(&kind)) {
                    ["false", "true"].iter().for_each(|reissued| make(&self.tasks_issued, &[&kind, reissued]));
                }
            }
            Duty::Play => domains().for_each(|domain| {
                [StopReason::Complete, StopReason::Length]
                    .map(outcome)
                    .iter()
                    .for_each(|outcome| make(&self.rollouts, &[domain, outcome]));
                make(&self.rollout_tokens, &[domain]);
            }),
            Duty::Judge => domains().for_each(|domain| {
                VERDICTS
                    .map(|verdict| word(&verdict))
                    .iter()
                    .for_each(|verdict| make(&self.verdicts, &[domain, verdict]));
            }),
        }
    }

    /// Updates the metrics from the connection to `server`. Without a server, `is_here` tells that the bus is in this process.
    pub(crate) fn look_at(&self, server: Option<&Server>, is_here: bool) {
        let counts = server.map_or_else(ServerCounts::default, Server::counts);
        let ServerCounts { num_reconnects, num_denied, num_slow, queues } = counts;
        let raise = |counter: &IntCounter, count: u64| counter.inc_by(count.saturating_sub(counter.get()));
        raise(&self.reconnects, num_reconnects);
        raise(&self.denied, num_denied);
        raise(&self.slow, num_slow);
        for (queue, counts) in queues {
            raise(&self.publish_bytes.with_label_values(&[queue]), counts.num_bytes_published);
            raise(&self.dead.with_label_values(&[queue]), counts.num_set_aside);
            let told = [counts.num_acknowledged, counts.num_handed_back, counts.num_set_aside];
            for (kind, count) in ACKS.iter().zip(told) {
                raise(&self.acks.with_label_values(&[queue, kind]), count);
            }
            self.queue_messages.with_label_values(&[queue]).set(counts.num_waiting as i64);
            self.queue_inflight.with_label_values(&[queue]).set(counts.num_taken as i64);
        }
        let is_connected = server.map(Server::is_connected).or(is_here.then_some(true));
        if let Some(is_connected) = is_connected {
            self.connected.set(f64::from(u8::from(is_connected)));
        }
    }

    /// Whether this process has ever had weights.
    pub(crate) fn has_weights(&self) -> bool {
        self.has_weights.load(Ordering::Relaxed)
    }

    /// Sets every metric to a value, as a run would.
    #[cfg(test)]
    pub(crate) fn fill(&self) {
        self.publish_seconds.with_label_values(&["task"]).observe(0.1);
        self.queue_messages.with_label_values(&["task"]).set(1);
        self.queue_inflight.with_label_values(&["task"]).set(1);
        self.rollout_seconds.with_label_values(&["countdown"]).observe(0.1);
        self.verify_seconds.with_label_values(&["countdown"]).observe(0.1);
        self.moved("get", Instant::now(), 1);
        self.weights_version.set(1.0);
    }

    pub(crate) async fn publish(
        &self,
        queue: &str,
        publish: impl Future<Output = Result<(), Error>>,
    ) -> Result<(), Error> {
        let began = Instant::now();
        let published = publish.await;
        self.publish_seconds.with_label_values(&[queue]).observe(began.elapsed().as_secs_f64());
        let [ok, too_large, denied, failed] = PUBLISH_RESULTS;
        let result = match &published {
            Ok(()) => ok,
            Err(Error::TooLarge { .. }) => too_large,
            Err(Error::Denied { .. }) => denied,
            Err(_) => failed,
        };
        self.publishes.with_label_values(&[queue, result]).inc();
        published
    }

    pub(crate) fn took<T>(&self, queue: &str, delivery: Result<Delivery<T>, Error>) -> Result<Delivery<T>, Error> {
        if let Ok(delivery) = &delivery {
            let redelivered = if delivery.is_redelivered { "true" } else { "false" };
            self.deliveries.with_label_values(&[queue, redelivered]).inc();
        }
        delivery
    }

    pub(crate) fn played(&self, group: &Group) {
        let domain = group.task.request.domain();
        if let Some(took) = self.playing.end(group.task.id) {
            self.rollout_seconds.with_label_values(&[domain]).observe(took.as_secs_f64());
        }
        for rollout in &group.rollouts {
            if let Some(last) = rollout.versions.last() {
                self.weights_version.set(last.policy_version as f64);
            }
            self.rollouts.with_label_values(&[domain, outcome(rollout.stop)]).inc();
            self.rollout_tokens.with_label_values(&[domain]).inc_by(rollout.tokens.len() as u64);
        }
    }

    pub(crate) fn judged(&self, scored: &ScoredGroup) {
        let domain = scored.group.task.request.domain();
        if let Some(took) = self.judging.end(scored.group.task.id) {
            self.verify_seconds.with_label_values(&[domain]).observe(took.as_secs_f64());
        }
        for verdict in &scored.verdicts {
            self.verdicts.with_label_values(&[domain, &word(verdict)]).inc();
        }
    }

    pub(crate) fn moved(&self, direction: &str, began: Instant, num_bytes: usize) {
        self.weights_seconds.with_label_values(&[direction]).observe(began.elapsed().as_secs_f64());
        self.weights_bytes.set(num_bytes as f64);
        self.has_weights.store(true, Ordering::Relaxed);
    }
}

/// The outcomes of publishing a message.
pub(crate) const PUBLISH_RESULTS: [&str; 4] = ["ok", "too_large", "denied", "failed"];

/// The replies to the server about a taken message: done, returned to the queue, set aside.
pub(crate) const ACKS: [&str; 3] = ["ack", "nak", "term"];

const VERDICTS: [Verdict; 6] =
    [Verdict::Correct, Verdict::Incorrect, Verdict::Malformed, Verdict::Timeout, Verdict::Resource, Verdict::Violation];

fn outcome(stop: StopReason) -> &'static str {
    match stop {
        StopReason::Complete => "complete",
        StopReason::Length => "length",
    }
}

/// Start times of tasks that have not ended yet.
#[derive(Default)]
pub(crate) struct Begun(Mutex<BTreeMap<TaskId, Instant>>);

/// More tasks than any worker has at a time. At this size the map is cleared: tasks that were handed back end elsewhere.
const MAX_BEGUN: usize = 65_536;

impl Begun {
    pub(crate) fn begin(&self, task: TaskId) {
        let mut begun = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if begun.len() >= MAX_BEGUN {
            begun.clear();
        }
        begun.insert(task, Instant::now());
    }

    pub(crate) fn end(&self, task: TaskId) -> Option<Duration> {
        let began = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&task)?;
        Some(began.elapsed())
    }
}
