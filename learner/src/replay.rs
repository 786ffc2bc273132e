use std::path::Path;
use std::sync::Arc;

use proto::{ProblemSource, ScoredGroup, TaskKind};

use crate::journal::{JournalReader, Record, RecordError};
use crate::main_loop::expect_step;
use crate::received::Received;
use crate::{Config, Error, Fold, Manifest, Plans, State};

/// What a replay found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplayReport {
    /// Steps that came out with the digests of the journal.
    pub num_steps: u64,
    /// Groups that were folded.
    pub num_groups: u64,
    /// What the run depended on.
    pub manifest: Manifest,
}

/// Computes a run again from its journal alone and compares the digests of every step up to `last_step`.
///
/// `each` hears the number of every step that agrees.
///
/// # Errors
/// [`Error::Integrity`] names the first step that differs, that lacks a group or that a damaged record may belong to;
/// [`Error::NotReproducible`] when the run promised no digests; [`Error::File`] when the journal has no manifest.
pub fn replay(
    config: Config,
    journal: &Path,
    sources: Vec<Arc<dyn ProblemSource>>,
    num_threads: usize,
    last_step: u64,
    mut each: impl FnMut(u64),
) -> Result<ReplayReport, Error> {
    if !config.learner.device.is_reproducible() {
        return Err(Error::NotReproducible);
    }
    let mut control = config.control();
    let state = State::initial(&config);
    let mut fold = Fold::new(config, sources, num_threads, state, Plans::default())?;
    let mut received = Received::default();
    let (mut manifest, mut num_groups) = (None, 0);
    let mut damaged = None;
    let mut reader = JournalReader::open(journal)?;
    while manifest.is_none() || fold.state().step < last_step {
        let Some(record) = reader.next()? else { break };
        match record {
            Ok(Record::Manifest(found)) if !found.reproducible => return Err(Error::NotReproducible),
            Ok(Record::Manifest(found)) => manifest = manifest.or(Some(found)),
            Ok(Record::Control(decided)) => control = Some(decided),
            Ok(Record::Group(group)) if group.task().kind == TaskKind::Train => {
                received.insert(group);
            }
            Ok(Record::Step(expected)) if expected.step <= last_step => {
                expect_undamaged(&damaged)?;
                let batch = expected.step - 1;
                let ids = received.named(&expected.groups).filter(|_| fold.state().step == batch);
                let Some(ids) = ids else {
                    let reason = "the journal lacks some of its groups".to_owned();
                    return Err(Error::Integrity { what: "batch", step: batch, reason });
                };
                let groups: Vec<ScoredGroup> = received.take(&ids).into_iter().map(|(_, group)| group.scored).collect();
                fold.plan();
                let report = fold.fold(&groups, control)?;
                expect_step(&expected, report.weights_digest, report.state_digest)?;
                num_groups += groups.len() as u64;
                each(expected.step);
            }
            Ok(_) => {}
            // Where a run was killed its journal ends inside a record.
            Err(error) if error.truncated => {}
            Err(error) => drop(damaged.get_or_insert((fold.state().step, error))),
        }
    }
    let manifest = manifest.ok_or_else(|| Error::File {
        path: journal.to_owned(),
        expected: "a journal that begins with a manifest".to_owned(),
        got: "none".to_owned(),
    })?;
    expect_undamaged(&damaged)?;
    Ok(ReplayReport { num_steps: fold.state().step, num_groups, manifest })
}

fn expect_undamaged(damaged: &Option<(u64, RecordError)>) -> Result<(), Error> {
    let Some((step, record)) = damaged else { return Ok(()) };
    let reason = format!("the record at byte {} of {} is damaged", record.offset, record.segment.display());
    Err(Error::Integrity { what: "journal", step: *step, reason })
}
