//! Writing to the disk, and reporting events once their records are there.

use serde::{Deserialize, Serialize};
use tokio::task::block_in_place;

use super::Learner;
use crate::checkpoint::{Snapshot, forget_passed, prune, save};
use crate::event::Event;
use crate::journal::{Opening, Record};
use crate::point::Point;
use crate::{Control, Error};

/// How much of a journal is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeepJournal {
    /// The whole journal: the run can be computed again from its beginning.
    All,
    /// The part that some kept checkpoint has not folded: the run can be computed again from the oldest of them.
    SinceCheckpoint,
}

impl Learner<'_> {
    /// Adds a record to the journal; it is durable after the next sync.
    pub(super) fn append(&mut self, record: Record) {
        self.records.known.take(&record, self.manifest.reproducible);
        self.records.journal.append(record);
    }

    /// Reports an event to the observer, which may wait for a disk.
    pub(super) fn tell(&mut self, event: Event) -> Result<(), Error> {
        Ok(block_in_place(|| (self.observer)(event))?)
    }

    /// Syncs the journal to the disk and acknowledges its groups, which the bus then need not keep.
    pub(super) async fn sync(&mut self) -> Result<(), Error> {
        if !self.records.unsynced.is_empty() || !self.records.untold.is_empty() {
            self.settle().await?;
        }
        for delivery in self.records.unsynced.drain(..) {
            delivery.acknowledge().await?;
        }
        Ok(())
    }

    /// Syncs the journal to the disk, and reports the events that waited for it.
    pub(super) async fn settle(&mut self) -> Result<(), Error> {
        self.records.journal.sync().await?;
        let untold = std::mem::take(&mut self.records.untold);
        untold.into_iter().try_for_each(|event| self.tell(event))
    }

    /// Fixes the end of the run by the clock, once: the decay begins at four fifths of the time limit.
    pub(super) async fn decide_end(&mut self) -> Result<(), Error> {
        let (Some(limit), None) = (self.options.time_limit, self.control) else { return Ok(()) };
        if !self.recovery.expected_steps.is_empty() {
            // The journal has later steps: the end was not fixed here.
            return Ok(());
        }
        let (step, elapsed) = (self.fold.state().step, self.elapsed());
        if elapsed < limit.mul_f64(0.8) {
            return Ok(());
        }
        let per_step = elapsed.as_secs_f64() / step as f64;
        let left = (limit.saturating_sub(elapsed).as_secs_f64() / per_step).floor().max(1.0);
        let control = Control { decay_from: step, stop_at: step + left as u64 };
        self.append(Record::Control(control));
        self.settle().await?;
        self.control = Some(control);
        self.tell(Event::Control(control))
    }

    /// Writes a checkpoint, after the journal up to it is durable and before anything that it replaces is removed.
    pub(super) async fn checkpoint(&mut self) -> Result<(), Error> {
        self.expect_in_place()?;
        if self.recovery.last_checkpoint == Some(self.fold.state().step) {
            return Ok(());
        }
        self.tell(Event::Saving)?;
        let point = self.point().await?;
        let path = block_in_place(|| {
            let [folder, journal] = ["checkpoints", "journal"].map(|name| self.options.run_dir.join(name));
            std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
            let own = self.fold.weights_digest();
            let older = self.published.versions.iter().filter(|(digest, _)| **digest != own);
            let training = self.fold.trainer().export()?;
            let snapshot = Snapshot {
                state: self.fold.state(),
                training: &training,
                planned: self.fold.planned(),
                versions: older.map(|(digest, bytes)| (*digest, bytes.to_vec())).collect(),
                control: self.control,
                point: &point,
            };
            let path = save(&folder, self.fold.config(), snapshot, &self.options.tokenizer_json)?;
            prune(&folder, &path, self.options.keep_checkpoints)?;
            if self.options.keep_journal == KeepJournal::SinceCheckpoint {
                forget_passed(&journal, &folder)?;
            }
            Ok::<_, Error>(path)
        })?;
        self.recovery.last_checkpoint = Some(self.fold.state().step);
        self.tell(Event::Checkpoint(path))
    }

    /// Finds the point in the journal from which a run must read it to resume from the current state.
    async fn point(&mut self) -> Result<Point, Error> {
        if !self.recovery.expected_steps.is_empty() {
            // The journal already has records of later steps.
            return Ok(self.recovery.begun_at.clone());
        }
        if self.options.keep_journal == KeepJournal::SinceCheckpoint {
            self.records.journal.cut(Opening { manifest: self.manifest.clone(), known: self.records.known.clone() });
        }
        let place = self.records.journal.sync().await?;
        let (known, trained) = (self.records.known.clone(), self.audits.trained().clone());
        Ok(Point { place, known, trained, received: self.received.in_order().cloned().collect() })
    }
}
