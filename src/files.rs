//! Atomic file writes: a file is either complete or absent.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Replaces a file atomically and durably. On failure the old file stays. A path that is no regular file is written directly.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    if path.symlink_metadata().is_ok_and(|metadata| !metadata.is_file()) {
        return std::fs::write(path, bytes).with_context(|| format!("write {}", path.display()));
    }
    write_with(path, |file| Ok(file.write_all(bytes)?))
}

/// Replaces a file by what a function writes, atomically and durably. On failure the old file stays.
pub(crate) fn write_with<T>(path: &Path, write: impl FnOnce(&mut File) -> Result<T>) -> Result<T> {
    let (mut file, partial) = create_partial(path).with_context(|| format!("write {}", path.display()))?;
    let complete = || -> Result<T> {
        let written = write(&mut file)?;
        file.sync_all()?;
        std::fs::rename(&partial, path)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()?;
        Ok(written)
    };
    complete()
        .inspect_err(|_| drop(std::fs::remove_file(&partial)))
        .with_context(|| format!("write {}", path.display()))
}

/// Whether a name is that of a partial file, from which the file `of` is made.
pub(crate) fn is_partial(name: &OsStr, of: &str) -> bool {
    let number = name.to_str().and_then(|name| name.strip_prefix(of)?.strip_prefix('.')?.strip_suffix(".partial"));
    number.is_some_and(|number| number.parse::<u64>().is_ok())
}

/// Creates a partial file for `path` that no other process uses.
fn create_partial(path: &Path) -> std::io::Result<(File, PathBuf)> {
    let mut number = 0;
    loop {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{number}.partial"));
        let partial = path.with_file_name(name);
        match File::options().write(true).create_new(true).open(&partial) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
            created => return Ok((created?, partial)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    /// Concurrent writers of one file leave the complete content of one of them.
    #[test]
    fn writers_of_one_file_do_not_mix() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.toml");
        std::fs::write(folder.path().join("x.toml.0.partial"), b"what a killed process left").unwrap();
        let texts: Vec<Vec<u8>> =
            (0..8).map(|number| vec![b'a' + number; 300_000 * (8 - usize::from(number))]).collect();
        std::thread::scope(|scope| {
            for text in &texts {
                scope.spawn(|| write_whole(&path, text).unwrap());
            }
        });
        assert!(texts.contains(&std::fs::read(&path).unwrap()));
        let names = folder.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name());
        let others: Vec<OsString> = names.filter(|name| name != "x.toml").collect();
        assert_eq!(others, ["x.toml.0.partial"]);
        assert!(is_partial(&others[0], "x.toml") && !is_partial("x.toml.mine.partial".as_ref(), "x.toml"));
    }
}
