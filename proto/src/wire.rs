//! The one encoding: a version byte and `postcard`.
//!
//! Decoding trusts nothing: a wrong version, a truncated body or trailing bytes are errors.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;

/// Bumped whenever the meaning of encoded bytes changes.
pub const WIRE_VERSION: u8 = 4;

/// Encodes a value.
///
/// # Panics
/// When the type has no encoding (a map of unknown length); none of ours has that.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_extend(value, vec![WIRE_VERSION]).expect("every wire type has an encoding")
}

/// Decodes a value.
///
/// # Errors
/// [`Error::WireVersion`], [`Error::Decode`] or [`Error::TrailingBytes`].
///
/// ```
/// let bytes = proto::wire::encode(&(7u64, "seven"));
/// assert_eq!(proto::wire::decode::<(u64, String)>(&bytes).unwrap(), (7, "seven".to_owned()));
/// assert!(proto::wire::decode::<(u64, String)>(&bytes[..3]).is_err());
/// ```
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let what = std::any::type_name::<T>();
    let (version, body) = match bytes.split_first() {
        Some((version, body)) => (*version, body),
        None => return Err(Error::WireVersion { expected: WIRE_VERSION, got: 0 }),
    };
    if version != WIRE_VERSION {
        return Err(Error::WireVersion { expected: WIRE_VERSION, got: version });
    }
    let (value, rest) =
        postcard::take_from_bytes(body).map_err(|source| Error::Decode { what, size_bytes: bytes.len(), source })?;
    if !rest.is_empty() {
        return Err(Error::TrailingBytes { what, extra_bytes: rest.len() });
    }
    Ok(value)
}
