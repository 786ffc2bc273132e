//! Exclusive access to a run directory.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::Error;

/// An exclusive lock on a run directory: a second learner is refused.
#[derive(Debug)]
pub struct RunLock {
    path: PathBuf,
    file: File,
}

impl RunLock {
    /// Locks a run directory, and creates it if there is none.
    ///
    /// # Errors
    /// When another learner holds the lock, or the directory cannot be created.
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
                    // The previous holder has just removed the file, and a lock on a removed file excludes nobody.
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

    /// Checks that the run directory at its path is still the one that was locked.
    ///
    /// # Errors
    /// [`Error::File`] when it was moved, replaced or removed.
    pub fn expect_in_place(&self) -> Result<(), Error> {
        expect_in_place(&self.path, &self.file)
    }

    /// Name of the lock file, which is empty.
    pub const FILE_NAME: &str = "LOCK";

    /// Releases a run directory in which nothing has begun, and removes it if it is empty.
    pub fn discard(self) {
        if self.expect_in_place().is_ok() {
            // Files that cannot be removed do no harm.
            drop(std::fs::remove_file(&self.path));
            drop(self.path.parent().map(std::fs::remove_dir));
        }
    }
}

/// Maximum number of attempts at a lock that others remove.
const MAX_TRIES: usize = 100;

/// Checks that a path still leads to the open file, so that data written by path and data written to the open file lie together.
///
/// # Errors
/// [`Error::File`] when the file, or a folder that it is in, was moved, replaced or removed.
pub fn expect_in_place(path: &Path, file: &File) -> Result<(), Error> {
    let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
    let open = identity(file.metadata().map_err(Error::io("inspect", path))?);
    let got = match std::fs::metadata(path).map(identity) {
        Ok(found) if found == open => return Ok(()),
        Ok(_) => "another file: the original was moved or replaced".to_owned(),
        Err(error) => format!("{error}: the file was moved or removed"),
    };
    Err(Error::File { path: path.to_owned(), expected: "the file that this process has open".to_owned(), got })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_directory_is_one_learners() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("run");
        let lock = RunLock::take(&run_dir).unwrap();
        let error = RunLock::take(&run_dir).unwrap_err().to_string();
        assert!(error.ends_with("LOCK: expected no other learner in this run directory, got one that is running"));
        drop(lock);
        RunLock::take(&run_dir).unwrap().discard();
        assert!(!run_dir.exists(), "nothing had begun");
    }
}
