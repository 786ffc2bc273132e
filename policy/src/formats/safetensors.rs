use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Component, Path};

use candle_core::quantized::GgmlDType;
use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};

use super::FormatError;
use super::source_file::{SourceFile, read_small};
use super::stored::{Store, StoredTensor};

/// Longest header, as in the safetensors library.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Longest index of shards.
const INDEX_BYTES_MAX: u64 = 1 << 26;
/// Most shards; each is an open file.
const NUM_SHARDS_MAX: usize = 256;
/// Most dimensions of a tensor.
const NUM_DIMS_MAX: usize = 8;

/// Lists the tensors of a folder with `model.safetensors`, or with shards and their index.
///
/// # Errors
/// [`FormatError`] when a file is absent, unreadable or broken, or the index does not agree with the shards.
pub(super) fn read_folder(folder: &Path) -> Result<Store, FormatError> {
    let whole = folder.join("model.safetensors");
    if whole.exists() {
        let file = SourceFile::open(&whole)?;
        let listed = read_header(&file, 0)?;
        return Store::new(vec![file], listed);
    }
    let index_path = folder.join("model.safetensors.index.json");
    let Some(bytes) = read_small(&index_path, INDEX_BYTES_MAX)? else {
        let expected = "model.safetensors or model.safetensors.index.json in the folder";
        return Err(FormatError::broken(folder, expected, "neither"));
    };
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|error| FormatError::broken(&index_path, "an index of shards", error.to_string()))?;
    let shards: BTreeSet<&String> = index.weight_map.values().collect();
    if shards.len() > NUM_SHARDS_MAX {
        let expected = format!("at most {NUM_SHARDS_MAX} shards");
        return Err(FormatError::broken(&index_path, expected, shards.len().to_string()));
    }
    let (mut files, mut listed) = (Vec::new(), Vec::new());
    for shard in shards {
        let mut components = Path::new(shard).components();
        if !matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) {
            return Err(FormatError::broken(&index_path, "shards that are files of the folder", format!("{shard:?}")));
        }
        let file = SourceFile::open(&folder.join(shard))?;
        let tensors = read_header(&file, files.len())?;
        if let Some((name, _)) = tensors.iter().find(|(name, _)| index.weight_map.get(name) != Some(shard)) {
            let listed = index.weight_map.get(name).map_or("no shard".to_owned(), |other| format!("{other:?}"));
            let expected = format!("shard {shard:?} for tensor {name:?}, which it holds");
            return Err(FormatError::broken(&index_path, expected, listed));
        }
        files.push(file);
        listed.extend(tensors);
    }
    let found: BTreeSet<&String> = listed.iter().map(|(name, _)| name).collect();
    if let Some((name, shard)) = index.weight_map.iter().find(|(name, _)| !found.contains(name)) {
        return Err(FormatError::broken(&folder.join(shard), format!("tensor {name:?}, as in the index"), "none"));
    }
    Store::new(files, listed)
}

/// Lists the tensors of one file: a length, a header in JSON, and data without holes.
fn read_header(file: &SourceFile, file_index: usize) -> Result<Vec<(String, StoredTensor)>, FormatError> {
    let broken = |expected: String, got: String| FormatError::broken(&file.path, expected, got);
    let Some(after_length) = file.size_bytes.checked_sub(8) else {
        return Err(broken("a safetensors header".to_owned(), format!("{} bytes", file.size_bytes)));
    };
    let mut length = [0; 8];
    file.read_at(&mut length, 0)?;
    let header_bytes = u64::from_le_bytes(length);
    let limit = after_length.min(HEADER_BYTES_MAX);
    if header_bytes > limit {
        return Err(broken(format!("a header of at most {limit} bytes"), format!("{header_bytes} bytes")));
    }
    let mut header = vec![0; usize::try_from(header_bytes).expect("it is under 2^32")];
    file.read_at(&mut header, 8)?;
    let Header(entries) = serde_json::from_slice(&header)
        .map_err(|error| broken("a safetensors header in JSON".to_owned(), error.to_string()))?;
    drop(header);

    let data_bytes = after_length - header_bytes;
    let mut names: Vec<&String> = entries.iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(broken("tensors with distinct names".to_owned(), format!("two named {:?}", twice[0])));
    }
    let mut listed = Vec::new();
    for (name, Entry { dtype, shape, data_offsets: [begin, end] }) in entries {
        let element_type = match dtype.as_str() {
            "F32" => GgmlDType::F32,
            "F16" => GgmlDType::F16,
            "BF16" => GgmlDType::BF16,
            other => {
                let expected = format!("tensor {name:?} as F32, F16 or BF16");
                return Err(FormatError::unsupported(&file.path, expected, other));
            }
        };
        let size_bytes = (shape.len() <= NUM_DIMS_MAX).then(|| StoredTensor::size_of(element_type, &shape)).flatten();
        let Some(size_bytes) = size_bytes.filter(|size_bytes| end.checked_sub(begin) == Some(*size_bytes)) else {
            let expected = format!("the bytes of tensor {name:?}, {dtype} {}", shown(&shape));
            return Err(broken(expected, format!("offsets {begin} to {end}")));
        };
        if end > data_bytes {
            let expected = format!("tensor {name:?} within {data_bytes} bytes of data");
            return Err(broken(expected, format!("offsets {begin} to {end}")));
        }
        let offset = 8 + header_bytes + begin;
        listed.push((name, StoredTensor { file: file_index, offset, element_type, shape, size_bytes }));
    }
    // With [`Store::new`], which finds overlaps, equal sizes mean that there are no holes.
    let held: u128 = listed.iter().map(|(_, tensor)| u128::from(tensor.size_bytes)).sum();
    if held != u128::from(data_bytes) {
        return Err(broken(
            format!("tensors of {held} bytes, as in the header"),
            format!("{data_bytes} bytes of data"),
        ));
    }
    Ok(listed)
}

/// Returns a shape as it is written in messages.
fn shown(shape: &[usize]) -> String {
    if shape.len() > NUM_DIMS_MAX { format!("of {} dimensions", shape.len()) } else { format!("{shape:?}") }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The entries of a header in the file's order, with repeated names.
struct Header(Vec<(String, Entry)>);

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
