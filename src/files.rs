//! Files that are whole or not there.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};

/// Writes a file durably, or leaves what was there. What is no regular file is written to as it is.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = path.with_file_name(partial(path));
    let write = || -> std::io::Result<()> {
        if path.symlink_metadata().is_ok_and(|metadata| !metadata.is_file()) {
            return std::fs::write(path, bytes);
        }
        let mut file = File::create(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&partial, path)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()
    };
    write().inspect_err(|_| drop(std::fs::remove_file(&partial))).with_context(|| format!("write {}", path.display()))
}

/// Names the file in which another is written.
pub(crate) fn partial(path: &Path) -> OsString {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    name
}
