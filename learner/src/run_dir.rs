//! What a run leaves in its directory, and who may work there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use proto::TaskId;

use crate::audit::Trained;
use crate::checkpoint::{Checkpoint, load_latest};
use crate::journal::{BanRecord, Damage, EvalRecord, JournalReader, Record, StepRecord, read_journal};
use crate::plan::Plans;
use crate::received::Received;
use crate::{Control, Error, Manifest};

/// A run directory, taken for this process: a second learner is refused.
#[derive(Debug)]
pub struct RunLock {
    path: PathBuf,
    _file: File,
}

impl RunLock {
    /// Takes a run directory, which is made where there is none.
    ///
    /// # Errors
    /// When another learner has it, or it cannot be made.
    pub fn take(run_dir: &Path) -> Result<RunLock, Error> {
        std::fs::create_dir_all(run_dir).map_err(Error::io("create", run_dir))?;
        let path = run_dir.join(RunLock::FILE_NAME);
        let file =
            File::options().create(true).truncate(false).write(true).open(&path).map_err(Error::io("open", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(RunLock { path, _file: file }),
            Err(std::fs::TryLockError::WouldBlock) => Err(Error::File {
                path,
                expected: "no other learner in this run directory".to_owned(),
                got: "one that is running".to_owned(),
            }),
            Err(std::fs::TryLockError::Error(error)) => Err(Error::io("lock", &path)(error)),
        }
    }

    /// The file that is locked; empty.
    pub const FILE_NAME: &str = "LOCK";

    /// Lets go of a run directory in which nothing has begun.
    pub fn discard(self) {
        // What cannot be removed is in nobody's way.
        drop(std::fs::remove_file(&self.path));
        drop(self.path.parent().map(std::fs::remove_dir));
    }
}

/// What a run directory holds of a run. Reading it changes nothing.
pub(crate) struct Recovered {
    /// Absent where the run begins with its first step.
    pub(crate) checkpoint: Option<Checkpoint>,
    pub(crate) control: Option<Control>,
    /// Groups that the checkpoint has not folded.
    pub(crate) received: Received,
    pub(crate) banned: BTreeSet<String>,
    /// Of batches that the checkpoint has folded.
    pub(crate) trained: Trained,
    /// Tasks on which actors disagreed, and nobody has decided.
    pub(crate) disputed: BTreeSet<TaskId>,
    pub(crate) steps: BTreeMap<u64, StepRecord>,
    pub(crate) evals: Vec<EvalRecord>,
    pub(crate) manifest: Option<Manifest>,
    pub(crate) damage: Damage,
}

impl Recovered {
    /// Reads the newest checkpoint that is whole and that the journal leads to: the journal is the truth of a run.
    pub(crate) fn read(
        run_dir: &Path,
        is_reproducible: bool,
        mut refuse: impl FnMut(String),
    ) -> Result<Recovered, Error> {
        let mut newest = u64::MAX;
        loop {
            let checkpoint = load_latest(&run_dir.join("checkpoints"), newest, |error| refuse(error.to_string()))?;
            let step = checkpoint.as_ref().map_or(0, |(_, checkpoint)| checkpoint.state.step);
            let nothing = Plans::default();
            let planned = checkpoint.as_ref().map_or(&nothing, |(_, checkpoint)| &checkpoint.planned);
            let found = Recovered::after(step, planned, &run_dir.join("journal"), is_reproducible)?;
            let Some((model, checkpoint)) = checkpoint else { return Ok(found) };
            let is_known = match found.steps.get(&step) {
                Some(record) => record.weights_digest == checkpoint.state.params.digest(&model),
                // Its record may be damaged; what came after it is there.
                None => step == 0 || found.steps.range(step..).next().is_some(),
            };
            if is_known {
                let control = found.control.or(checkpoint.control);
                return Ok(Recovered { checkpoint: Some(checkpoint), control, ..found });
            }
            refuse(format!("its step {step} is not in the journal"));
            newest = step - 1;
        }
    }

    /// Reads the journal, as far as a run needs it that goes on from a step with these plans.
    fn after(step: u64, planned: &Plans, journal: &Path, is_reproducible: bool) -> Result<Recovered, Error> {
        let mut received = Received::default();
        let (mut banned, mut trained, mut disputed) = (BTreeSet::new(), Trained::default(), BTreeSet::new());
        let mut players = BTreeMap::<u64, BTreeMap<u32, String>>::new();
        let (mut steps, mut evals, mut manifest, mut control) = (BTreeMap::new(), Vec::new(), None, None);
        let mut num_records = 0;
        let damage = read_journal(journal, |record| {
            num_records += 1;
            match record {
                Record::Manifest(found) => drop(manifest.get_or_insert(found)),
                Record::Control(decided) => control = Some(decided),
                Record::Eval(eval) => evals.push(eval),
                Record::Step(done) => {
                    if !is_reproducible {
                        // Exams from here on were of steps that are played anew.
                        evals.retain(|eval: &EvalRecord| eval.step < done.step);
                    }
                    if done.step <= step {
                        let players = players.remove(&(done.step - 1)).unwrap_or_default();
                        players.values().for_each(|player| trained.note(player, done.step));
                    }
                    steps.insert(done.step, done);
                }
                Record::Group(group) => {
                    let id = group.task();
                    disputed.remove(&id);
                    players.entry(id.batch).or_default().insert(id.index, group.played_by.clone());
                    // Where steps cannot be computed again, what was played for them is of no use: the run goes on from its
                    // checkpoint.
                    if is_reproducible && planned.may_hold(id) {
                        received.insert(group);
                    }
                }
                Record::Ban(BanRecord { player, tasks }) => {
                    let is_of_player = |id: &TaskId| received.get(*id).is_some_and(|group| group.played_by == player);
                    let taken_back: Vec<TaskId> = tasks.into_iter().filter(is_of_player).collect();
                    received.take(&taken_back);
                    banned.insert(player);
                }
                Record::Dispute(id) => {
                    received.take(&[id]);
                    disputed.insert(id);
                }
            }
        })?;
        if manifest.is_none() && (num_records > 0 || !damage.unreadable.is_empty()) {
            return Err(Error::File {
                path: journal.to_owned(),
                expected: "a journal that begins with a manifest".to_owned(),
                got: "none that can be read".to_owned(),
            });
        }
        Ok(Recovered { checkpoint: None, control, received, banned, trained, disputed, steps, evals, manifest, damage })
    }
}

/// Checks that a run directory holds no run, or one that began with this manifest, as far as its first record tells.
///
/// # Errors
/// [`Error::Manifest`] names the first field that differs.
pub fn expect_begun_with(run_dir: &Path, manifest: &Manifest) -> Result<(), Error> {
    let folder = run_dir.join("journal");
    if !folder.exists() {
        return Ok(());
    }
    match JournalReader::open(&folder)?.next()? {
        Some(Ok(Record::Manifest(was))) => was.expect_same(manifest),
        _ => Ok(()),
    }
}
