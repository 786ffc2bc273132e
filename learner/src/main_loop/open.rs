//! Opening a learner from the content of its run directory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bus::Bus;
use proto::{Digest, ProblemSource, TaskKind};
use tokio::task::block_in_place;
use tokio::time::Instant;

use super::publishing::Published;
use super::{Counts, Exam, Learner, Records, Recovery, RunOptions};
use crate::audit::Audits;
use crate::checkpoint::Checkpoint;
use crate::event::{Event, Observer};
use crate::journal::{Journal, Record};
use crate::ledger::Ledger;
use crate::plan::Plans;
use crate::point::Point;
use crate::run_dir::Recovered;
use crate::state::initial_training;
use crate::waiting::Workers;
use crate::writer::Writer;
use crate::{Config, Error, Fold, Manifest, References, RunLock, State};

impl<'a> Learner<'a> {
    #[expect(clippy::too_many_arguments, reason = "as of `run`")]
    pub(super) async fn open(
        config: Config,
        options: RunOptions,
        lock: &'a RunLock,
        manifest: Manifest,
        sources: Vec<Arc<dyn ProblemSource>>,
        exams: Vec<Exam>,
        bus: Arc<dyn Bus>,
        observer: Observer<'a>,
    ) -> Result<Learner<'a>, Error> {
        let is_reproducible = manifest.reproducible;
        let mut refusals = Vec::new();
        let recovered =
            block_in_place(|| Recovered::read(&options.run_dir, is_reproducible, |reason| refusals.push(reason)));
        let refusals = refusals.into_iter().map(Event::CheckpointRefused);
        refusals.into_iter().try_for_each(|refusal| block_in_place(|| observer(refusal)))?;
        let Recovered {
            checkpoint,
            known,
            received,
            banned,
            trained,
            mut steps,
            elapsed_ms,
            manifest: was,
            damage,
            last,
        } = recovered?;
        // Checked before the resumption is reported: a refused config must change nothing.
        if let Some(was) = &was {
            was.expect_same(&manifest)?;
        }
        let resumes = checkpoint.is_some();
        // A checkpoint without a readable point in the journal is written again.
        let last_checkpoint = checkpoint.as_ref().filter(|found| found.point.is_ok()).map(|found| found.state.step);
        let control = config.control().or(known.control);
        let (state, training, planned, versions, begun_at) = match checkpoint {
            Some(Checkpoint { state, training, planned, versions, point, .. }) => {
                (state, training, planned, versions, point.unwrap_or_default())
            }
            None => {
                let training = block_in_place(|| initial_training(&config, options.models.base.as_deref()))?;
                (State::initial(), training, Plans::default(), Vec::new(), Point::default())
            }
        };
        let versions: BTreeMap<Digest, Arc<[u8]>> =
            versions.into_iter().map(|(digest, bytes)| (digest, bytes.into())).collect();
        for (digest, bytes) in &versions {
            bus.put_weights(*digest, bytes.clone()).await?;
        }
        let mut evals = known.evals.clone();
        if !is_reproducible {
            steps.clear();
            evals.retain(|eval| eval.step <= state.step);
        }
        let folder = options.run_dir.join("journal");
        let (journal, truncated_bytes) = block_in_place(|| Journal::open(&folder, &damage, last))?;
        if options.resume {
            let (step, unreadable, evals) = (state.step, damage.unreadable, evals.clone());
            let banned = banned.iter().cloned().collect();
            let resumed = Event::Resumed { step, control, truncated_bytes, unreadable, evals, banned };
            block_in_place(|| observer(resumed))?;
        }
        let audits = Audits::new(options.audit, banned, trained, known.disputed.clone());
        let fold = block_in_place(|| {
            let references = References::load(&config, options.num_threads, &options.models)?;
            let start = (state, training);
            Fold::new(config, sources, &options.backend, options.num_threads, start, planned, references)
        })?;
        let mut learner = Learner {
            options,
            lock,
            exams,
            bus,
            observer,
            fold,
            manifest: manifest.clone(),
            records: Records { journal: Writer::start(journal), known, unsynced: Vec::new(), untold: Vec::new() },
            recovery: Recovery { begun_at, expected_steps: steps, last_checkpoint, resumes },
            control,
            received,
            sitting: None,
            evals,
            elapsed_before: Duration::from_millis(elapsed_ms),
            started: Instant::now(),
            published: Published::of(versions),
            ledger: Ledger::default(),
            audits,
            wanted: BTreeSet::new(),
            workers: Workers::default(),
            got_further: Instant::now(),
            counts: Counts::default(),
        };
        if was.is_none() {
            learner.append(Record::Manifest(manifest));
            learner.records.journal.sync().await?;
        }
        if let Some(last) = learner.fold.state().step.checked_sub(1) {
            // This also tells the bus how far the run is.
            learner.bus.forget_batch(TaskKind::Train, last).await?;
        }
        Ok(learner)
    }
}
