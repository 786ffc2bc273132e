use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::FormatError;

/// A regular file, open for positioned reads.
#[derive(Debug)]
pub(super) struct SourceFile {
    pub(super) path: PathBuf,
    pub(super) size_bytes: u64,
    file: File,
}

impl SourceFile {
    pub(super) fn open(path: &Path) -> Result<SourceFile, FormatError> {
        let unreadable = |got| FormatError::Io { path: path.to_owned(), expected: "a readable file", got };
        // Before it is opened, because opening a pipe waits for a writer.
        if !path.metadata().map_err(unreadable)?.is_file() {
            return Err(FormatError::broken(path, "a regular file", "something else"));
        }
        let file = File::open(path).map_err(unreadable)?;
        let size_bytes = file.metadata().map_err(unreadable)?.len();
        Ok(SourceFile { path: path.to_owned(), size_bytes, file })
    }

    /// Fills a buffer from an offset of the file.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), FormatError> {
        self.file
            .read_exact_at(buffer, offset)
            .map_err(FormatError::io(&self.path, "a file that can be read to its end"))
    }
}

/// Reads a small file whole. Returns `None` if there is none.
///
/// # Errors
/// [`FormatError::Broken`] when the file is larger than `size_bytes_max`.
pub(super) fn read_small(path: &Path, size_bytes_max: u64) -> Result<Option<Vec<u8>>, FormatError> {
    match path.metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(got) => return Err(FormatError::Io { path: path.to_owned(), expected: "a readable file", got }),
        Ok(_) => {}
    }
    let source = SourceFile::open(path)?;
    if source.size_bytes > size_bytes_max {
        let expected = format!("a file of at most {size_bytes_max} bytes");
        return Err(FormatError::broken(path, expected, format!("{} bytes", source.size_bytes)));
    }
    let mut bytes = Vec::new();
    let read = source.file.take(size_bytes_max).read_to_end(&mut bytes);
    read.map_err(FormatError::io(path, "a readable file"))?;
    Ok(Some(bytes))
}
