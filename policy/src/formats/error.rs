use std::io;
use std::path::{Path, PathBuf};

/// Errors of reading and writing pretrained networks.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// A file cannot be read or written.
    #[error("{}: expected {expected}, got {got}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was to be done with it.
        expected: &'static str,
        /// The error of the system.
        got: io::Error,
    },
    /// A file that contradicts its format, or itself.
    #[error("{}: expected {expected}, got {got}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What the format requires.
        expected: String,
        /// What the file holds.
        got: String,
    },
    /// A network that [`crate::ModelConfig`] cannot describe, or that the format cannot hold.
    #[error("{}: expected {expected}, got {got}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The supported values.
        expected: String,
        /// The value of the network.
        got: String,
    },
    /// A folder to write to that already holds something.
    #[error("{}: expected an empty folder or none, got {got}", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// What is there.
        got: &'static str,
    },
}

impl FormatError {
    pub(super) fn io(path: &Path, expected: &'static str) -> impl FnOnce(io::Error) -> FormatError {
        let path = path.to_owned();
        move |got| FormatError::Io { path, expected, got }
    }

    pub(super) fn broken(path: &Path, expected: impl Into<String>, got: impl Into<String>) -> FormatError {
        FormatError::Broken { path: path.to_owned(), expected: expected.into(), got: shortened(got.into()) }
    }

    pub(super) fn unsupported(path: &Path, expected: impl Into<String>, got: impl Into<String>) -> FormatError {
        FormatError::Unsupported { path: path.to_owned(), expected: expected.into(), got: shortened(got.into()) }
    }
}

/// Cuts what comes from a file to the length of a line.
fn shortened(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(200) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}
