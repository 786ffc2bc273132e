//! The journal's own thread: waiting for the disk blocks nothing else.

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use tokio::sync::oneshot;

use crate::Error;
use crate::journal::{Journal, Opening, Place, Record};

/// A journal that a thread writes, in the order of the calls.
#[derive(Debug)]
pub(crate) struct Writer {
    /// Absent when the thread is to end. The queue is unbounded: it may hold all records between two syncs.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    folder: PathBuf,
}

enum Job {
    Append(Box<Record>),
    Cut(Box<Opening>),
    /// Makes everything durable, and returns the position of the last record.
    Sync(oneshot::Sender<Result<Option<Place>, Error>>),
    #[cfg(test)]
    Call(Box<dyn FnOnce() + Send>),
}

impl Writer {
    /// Starts the thread.
    pub(crate) fn start(journal: Journal) -> Writer {
        let (jobs, receiver) = channel();
        let folder = journal.path().parent().unwrap_or(Path::new("")).to_owned();
        let thread = std::thread::Builder::new().name("journal".to_owned()).spawn(move || write(journal, &receiver));
        Writer { jobs: Some(jobs), thread: Some(thread.expect("could not start a thread")), folder }
    }

    /// Adds a record. It is durable after the next [`Writer::sync`], which also returns any error.
    pub(crate) fn append(&mut self, record: Record) {
        self.tell(Job::Append(Box::new(record)));
    }

    /// Starts a new segment, as [`Journal::cut`] does; durable after the next [`Writer::sync`].
    pub(crate) fn cut(&mut self, opening: Opening) {
        self.tell(Job::Cut(Box::new(opening)));
    }

    /// Waits until all added records are durable; returns the position of the last one.
    ///
    /// # Errors
    /// [`Error::Io`]: records since the last success must not be taken as written, and nothing is written any more.
    ///
    /// # Panics
    /// When the thread has panicked, with its message.
    pub(crate) async fn sync(&mut self) -> Result<Option<Place>, Error> {
        let (done, synced) = oneshot::channel();
        self.tell(Job::Sync(done));
        if let Ok(synced) = synced.await {
            return synced;
        }
        self.jobs = None;
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            resume_unwind(panic);
        }
        Err(Error::io("write", &self.folder)(std::io::Error::other("an earlier write failed")))
    }

    fn tell(&self, job: Job) {
        // The next sync reports a thread that has ended.
        drop(self.jobs.as_ref().map(|jobs| jobs.send(job)));
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.jobs = None;
        // The journal is written out before another process can take the run directory. A panic is ignored here.
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// Runs jobs until one fails.
fn write(mut journal: Journal, jobs: &Receiver<Job>) {
    let mut written = Ok(());
    for job in jobs {
        match job {
            Job::Append(record) => written = written.and_then(|()| journal.append(&record)),
            Job::Cut(opening) => written = written.and_then(|()| journal.cut(*opening)),
            Job::Sync(done) => {
                let synced = written.and_then(|()| journal.sync());
                let has_failed = synced.is_err();
                written = match done.send(synced.map(|()| journal.last())) {
                    Ok(()) if has_failed => return,
                    Ok(()) => Ok(()),
                    // The caller no longer waits: the next sync reports the error.
                    Err(unheard) => unheard.map(drop),
                };
            }
            #[cfg(test)]
            Job::Call(call) => call(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::Control;
    use crate::journal::{Damage, read_journal};

    fn writer(folder: &Path) -> Writer {
        Writer::start(Journal::open(folder, &Damage::default(), None).unwrap().0)
    }

    fn control(stop_at: u64) -> Record {
        Record::Control(Control { decay_from: 1, stop_at })
    }

    fn records(folder: &Path) -> Vec<Record> {
        let mut records = Vec::new();
        read_journal(folder, |record| records.push(record)).unwrap();
        records
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    /// The disk hangs until the only thread of the runtime has done other things.
    #[test]
    fn a_runtime_of_one_thread_goes_on_while_the_disk_is_slow() {
        let folder = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let mut writer = writer(folder.path());
            let (ticks, ticked) = channel();
            tokio::spawn(async move {
                loop {
                    tokio::task::yield_now().await;
                    if ticks.send(()).is_err() {
                        return;
                    }
                }
            });
            writer.append(control(7));
            writer.tell(Job::Call(Box::new(move || {
                for _ in 0..3 {
                    ticked
                        .recv_timeout(Duration::from_secs(60))
                        .expect("the runtime ticks while the journal is written");
                }
            })));
            assert!(writer.sync().await.unwrap().is_some());
        });
        assert_eq!(records(folder.path()), [control(7)]);
    }

    #[test]
    fn what_was_told_is_written_in_order_also_without_a_sync() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = writer(folder.path());
        (0..100).for_each(|stop_at| writer.append(control(stop_at)));
        drop(writer);
        assert_eq!(records(folder.path()), (0..100).map(control).collect::<Vec<_>>());
    }

    #[test]
    fn a_failure_is_told_by_the_sync_and_nothing_is_written_after_it() {
        let folder = tempfile::tempdir().unwrap();
        let journal = folder.path().join("journal");
        runtime().block_on(async {
            let mut writer = writer(&journal);
            writer.append(control(0));
            writer.sync().await.unwrap();
            std::fs::remove_dir_all(&journal).unwrap();
            writer.cut(Opening { manifest: crate::test_manifest(), known: Default::default() });
            writer.append(control(1));
            let error = writer.sync().await.unwrap_err().to_string();
            assert!(error.contains("00000000.log: expected the file that this process has open"), "{error}");
            let error = writer.sync().await.unwrap_err().to_string();
            assert!(error.ends_with("an earlier write failed"), "{error}");
        });
        assert!(!journal.exists());
    }

    #[test]
    fn a_journal_that_others_cut_short_is_not_written_on() {
        let folder = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let mut writer = writer(folder.path());
            writer.append(control(0));
            writer.sync().await.unwrap();
            let path = folder.path().join("00000000.log");
            std::fs::File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
            writer.append(control(1));
            let error = writer.sync().await.unwrap_err().to_string();
            assert!(error.contains("as written by this process, got "), "{error}");
        });
    }

    #[test]
    fn a_panic_of_the_thread_is_that_of_whoever_waits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        let ended = runtime().block_on(async {
            tokio::spawn(async move {
                let mut writer = writer(&path);
                writer.tell(Job::Call(Box::new(|| panic!("out of order"))));
                writer.append(control(0));
                writer.sync().await
            })
            .await
        });
        let panic = ended.unwrap_err().into_panic();
        assert_eq!(panic.downcast_ref(), Some(&"out of order"));
    }
}
