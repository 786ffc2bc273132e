use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use bus::Faults;
use learner::KeepJournal;
use serde::{Deserialize, Serialize};

/// Keys that affect timing only and never results. They are not part of a run's identity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LocalConfig {
    /// Threads that play and train; 0 for all cores.
    pub(crate) threads: usize,
    /// Sequences decoded in parallel.
    pub(crate) slots: usize,
    /// Steps between checkpoints.
    pub(crate) checkpoint_every: u64,
    /// Number of checkpoints kept.
    pub(crate) keep_checkpoints: usize,
    /// How much of the journal is kept.
    pub(crate) keep_journal: KeepJournal,
    /// Seconds without an answer after which the run ends with an error.
    pub(crate) stall_seconds: u64,
    /// Seconds that a task may wait for a checker that is unavailable before the run ends with an error.
    pub(crate) checker_seconds: u64,
    /// Wall time in minutes after which a run without a number of steps ends; `--minutes`.
    pub(crate) minutes: Option<f64>,
    /// Where `language.base` lies on this machine: the name of a known model, or a path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) base: Option<String>,
    /// Where the teacher of `learner.distill` lies on this machine, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) teacher: Option<String>,
    /// Where the file of problems of `domains.file` lies on this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<String>,
    /// How a run uses a NATS server, if it has one.
    pub(crate) bus: BusConfig,
}

/// How a run uses a NATS server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BusConfig {
    /// Seconds without a sign of life from a worker after which the messages it took are redelivered to another.
    pub(crate) ack_wait_seconds: f64,
    /// Seconds without a sign of progress after which a task is reissued.
    pub(crate) reissue_seconds: f64,
    /// Seconds without a sign of life after which a learner has lost its run.
    pub(crate) lease_seconds: f64,
    /// Servers that keep a copy of each stream.
    pub(crate) num_replicas: usize,
    /// Share of the tasks that two actors must agree on; 0 if all actors are trusted.
    pub(crate) audit_share: f64,
    /// Faults that every process injects, to test that they change no result.
    pub(crate) fault: Option<Faults>,
}

impl LocalConfig {
    pub(crate) fn num_threads(&self) -> usize {
        if self.threads == 0 { LocalConfig::num_cores() } else { self.threads }
    }

    pub(crate) fn num_cores() -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }

    /// Returns the time without a sign of progress after which a task is reissued.
    pub(crate) fn reissue_after(&self) -> Duration {
        Duration::from_secs_f64(self.bus.reissue_seconds)
    }

    /// Returns the share of the tasks that are audited, or `None` if it is 0.
    pub(crate) fn audit_share(&self) -> Option<f64> {
        Some(self.bus.audit_share).filter(|share| *share > 0.0)
    }

    pub(crate) fn stall_limit(&self) -> Duration {
        Duration::from_secs(self.stall_seconds)
    }

    /// Checks the values. `named` returns a key's name with the place where it was set.
    pub(super) fn validate(&self, named: &dyn Fn(&str) -> String) -> Result<()> {
        let check = |key: &str, expected: &str, got: u64, holds: bool| {
            let key = format!("local.{key}");
            if holds { Ok(()) } else { Err(anyhow!("{}: expected {expected}, got {got}", named(&key))) }
        };
        check("threads", "0 to 1024", self.threads as u64, self.threads <= 1_024)?;
        check("slots", "1 to 1048576", self.slots as u64, (1..=1 << 20).contains(&self.slots))?;
        check("checkpoint_every", "1 or more", self.checkpoint_every, self.checkpoint_every > 0)?;
        check("keep_checkpoints", "1 or more", self.keep_checkpoints as u64, self.keep_checkpoints > 0)?;
        let has_another = self.keep_journal == KeepJournal::All || self.keep_checkpoints > 1;
        let expected =
            "2 or more with local.keep_journal = \"since-checkpoint\", so that one damaged file does not end the run";
        check("keep_checkpoints", expected, self.keep_checkpoints as u64, has_another)?;
        if let Some(minutes) = self.minutes {
            check_minutes(&named("local.minutes"), minutes)?;
        }
        check("stall_seconds", "1 or more", self.stall_seconds, self.stall_seconds > 0)?;
        check("checker_seconds", "1 or more", self.checker_seconds, self.checker_seconds > 0)?;
        check("bus.num_replicas", "1 to 5", self.bus.num_replicas as u64, (1..=5).contains(&self.bus.num_replicas))?;
        let BusConfig { ack_wait_seconds, reissue_seconds, lease_seconds, audit_share, fault, .. } = self.bus;
        let waits = [("ack_wait", ack_wait_seconds), ("reissue", reissue_seconds), ("lease", lease_seconds)];
        for (key, seconds) in waits {
            let key = named(&format!("local.bus.{key}_seconds"));
            ensure!((0.1..=86_400.0).contains(&seconds), "{key}: expected 0.1 to 86400, got {seconds}");
        }
        let is_share = |share: &f64| (0.0..=1.0).contains(share);
        ensure!(is_share(&audit_share), "{}: expected 0 to 1, got {audit_share}", named("local.bus.audit_share"));
        let Some(Faults { drop, duplicate, reorder, .. }) = fault else { return Ok(()) };
        let shares = [drop, duplicate, reorder];
        ensure!(
            shares.iter().all(is_share) && shares.iter().sum::<f64>() < 1.0,
            "{}: expected shares that sum to less than 1, got {shares:?}",
            named("local.bus.fault")
        );
        Ok(())
    }
}

/// Checks a wall time in minutes; `named` is where it was set.
pub(crate) fn check_minutes(named: &str, minutes: f64) -> Result<()> {
    ensure!(minutes > 0.0 && minutes <= 1e6, "{named}: expected a number over 0, up to 1000000, got {minutes}");
    Ok(())
}
