//! The one encoding: a version byte and `postcard`.
//!
//! The wire, the journal and the checkpoint have formats with separate versions, so that a change of one leaves the others
//! readable. Decoding trusts nothing: a wrong version, a truncated body or trailing bytes are errors.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;

/// The version of [`WIRE`], increased whenever the meaning of the bytes changes that processes exchange.
pub const WIRE_VERSION: u8 = 5;

/// The format of messages between processes.
pub const WIRE: Format = Format { name: "wire", version: WIRE_VERSION };

/// An encoding with a version of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// The name of the format in error messages.
    pub name: &'static str,
    /// Increased whenever the meaning of its bytes changes.
    pub version: u8,
}

impl Format {
    /// Encodes a value.
    ///
    /// # Panics
    /// When the type has no encoding (a map of unknown length), which is never so for types of this workspace.
    pub fn encode<T: Serialize>(self, value: &T) -> Vec<u8> {
        postcard::to_extend(value, vec![self.version]).expect("every type of a format has an encoding")
    }

    /// Decodes a value.
    ///
    /// # Errors
    /// [`Error::Version`], [`Error::Decode`] or [`Error::TrailingBytes`].
    ///
    /// ```
    /// let [old, new] = [1, 2].map(|version| proto::wire::Format { name: "notes", version });
    /// assert_eq!(new.decode::<u64>(&new.encode(&7u64)).unwrap(), 7);
    /// let refused = new.decode::<u64>(&old.encode(&7u64)).unwrap_err();
    /// assert_eq!(refused.to_string(), "notes version: expected 2, got 1");
    /// ```
    pub fn decode<T: DeserializeOwned>(self, bytes: &[u8]) -> Result<T, Error> {
        let what = std::any::type_name::<T>();
        let (version, body) = bytes.split_first().map_or((0, bytes), |(version, body)| (*version, body));
        if version != self.version {
            return Err(Error::Version { format: self.name, expected: self.version, got: version });
        }
        let (value, rest) = postcard::take_from_bytes(body).map_err(|source| Error::Decode {
            what,
            size_bytes: bytes.len(),
            source,
        })?;
        if !rest.is_empty() {
            return Err(Error::TrailingBytes { what, extra_bytes: rest.len() });
        }
        Ok(value)
    }
}

/// Encodes a value for the wire.
///
/// # Panics
/// As [`Format::encode`] does.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    WIRE.encode(value)
}

/// Decodes a value from the wire.
///
/// # Errors
/// As [`Format::decode`] does.
///
/// ```
/// let bytes = proto::wire::encode(&(7u64, "seven"));
/// assert_eq!(proto::wire::decode::<(u64, String)>(&bytes).unwrap(), (7, "seven".to_owned()));
/// assert!(proto::wire::decode::<(u64, String)>(&bytes[..3]).is_err());
/// ```
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    WIRE.decode(bytes)
}
