//! What a run leaves in its directory, and who may work there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use policy::ModelConfig;
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
    file: File,
}

impl RunLock {
    /// Takes a run directory, which is made where there is none.
    ///
    /// # Errors
    /// When another learner has it, or it cannot be made.
    pub fn take(run_dir: &Path) -> Result<RunLock, Error> {
        let path = run_dir.join(RunLock::FILE_NAME);
        let mut num_tries = 0;
        loop {
            num_tries += 1;
            std::fs::create_dir_all(run_dir).map_err(Error::io("create", run_dir))?;
            let file = File::options().create(true).truncate(false).write(true).open(&path);
            let file = file.map_err(Error::io("open", &path))?;
            match file.try_lock() {
                Ok(()) => match expect_in_place(&path, &file) {
                    Ok(()) => return Ok(RunLock { path, file }),
                    // Whoever had it has removed it just now, and what is removed keeps nobody out.
                    Err(_) if num_tries < MAX_TRIES => {}
                    Err(error) => return Err(error),
                },
                Err(std::fs::TryLockError::WouldBlock) => {
                    let (expected, got) = ("no other learner in this run directory", "one that is running");
                    return Err(Error::File { path, expected: expected.to_owned(), got: got.to_owned() });
                }
                Err(std::fs::TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
            }
        }
    }

    /// Checks that the run directory at its path is still the one that was taken.
    ///
    /// # Errors
    /// [`Error::File`] when it was moved, replaced or removed.
    pub fn expect_in_place(&self) -> Result<(), Error> {
        expect_in_place(&self.path, &self.file)
    }

    /// The file that is locked; empty.
    pub const FILE_NAME: &str = "LOCK";

    /// Lets go of a run directory in which nothing has begun.
    pub fn discard(self) {
        if self.expect_in_place().is_ok() {
            // What cannot be removed is in nobody's way.
            drop(std::fs::remove_file(&self.path));
            drop(self.path.parent().map(std::fs::remove_dir));
        }
    }
}

/// How often a lock is taken anew that others remove.
const MAX_TRIES: usize = 100;

/// Checks that a path still leads to the file that is open. What is written by path, and what is written to an open file, then
/// comes to lie together.
///
/// # Errors
/// [`Error::File`] when the file, or a folder that it is in, was moved, replaced or removed.
pub fn expect_in_place(path: &Path, file: &File) -> Result<(), Error> {
    let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
    let open = identity(file.metadata().map_err(Error::io("inspect", path))?);
    let got = match std::fs::metadata(path).map(identity) {
        Ok(found) if found == open => return Ok(()),
        Ok(_) => "another file: it was moved or replaced meanwhile".to_owned(),
        Err(error) => format!("{error}: it was moved or removed meanwhile"),
    };
    Err(Error::File { path: path.to_owned(), expected: "the file that this process has open".to_owned(), got })
}

/// Reads the newest checkpoint of a run that is whole and that its journal leads to; `None` when there is none. `refuse` hears
/// why those after it are not used.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] when a segment of the journal is missing.
pub fn load_newest(run_dir: &Path, mut refuse: impl FnMut(String)) -> Result<Option<(ModelConfig, Checkpoint)>, Error> {
    let folder = run_dir.join("checkpoints");
    let steps = read_steps(run_dir)?;
    let mut newest = u64::MAX;
    while let Some(found) = load_latest(&folder, newest, |error| refuse(error.to_string()))? {
        let step = found.1.state.step;
        if is_known(&steps, &found) {
            return Ok(Some(found));
        }
        refuse(unknown(step));
        newest = step - 1;
    }
    Ok(None)
}

/// Checks that the journal of a run leads to a checkpoint that lies in its directory.
///
/// # Errors
/// [`Error::File`] when another run wrote it, or the journal was lost.
pub fn expect_known(run_dir: &Path, checkpoint: &(ModelConfig, Checkpoint)) -> Result<(), Error> {
    match is_known(&read_steps(run_dir)?, checkpoint) {
        true => Ok(()),
        false => Err(Error::File {
            path: run_dir.join("journal"),
            expected: format!("step {} with the weights of the checkpoint", checkpoint.1.state.step),
            got: "none: another run wrote it".to_owned(),
        }),
    }
}

fn read_steps(run_dir: &Path) -> Result<BTreeMap<u64, StepRecord>, Error> {
    let mut steps = BTreeMap::new();
    read_journal(&run_dir.join("journal"), |record| {
        if let Record::Step(done) = record {
            steps.insert(done.step, done);
        }
    })?;
    Ok(steps)
}

/// Whether the steps of a journal lead to a checkpoint: the journal is the truth of a run.
fn is_known(steps: &BTreeMap<u64, StepRecord>, (model, checkpoint): &(ModelConfig, Checkpoint)) -> bool {
    let step = checkpoint.state.step;
    match steps.get(&step) {
        Some(record) => record.weights_digest == checkpoint.state.params.digest(model),
        // Its record may be damaged; what came after it is there.
        None => step == 0 || steps.range(step..).next().is_some(),
    }
}

fn unknown(step: u64) -> String {
    format!("its step {step} is not in the journal")
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
            let Some(checkpoint) = checkpoint else { return Ok(found) };
            if is_known(&found.steps, &checkpoint) {
                let (_, checkpoint) = checkpoint;
                let control = found.control.or(checkpoint.control);
                return Ok(Recovered { checkpoint: Some(checkpoint), control, ..found });
            }
            refuse(unknown(step));
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
