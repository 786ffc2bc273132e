use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::GgmlDType;

use super::FormatError;
use super::source_file::SourceFile;
use super::stored::{Store, StoredTensor};

/// Limits beside the file's own size; all are far over those of real files.
const NUM_KEYS_MAX: u64 = 1 << 16;
const NUM_TENSORS_MAX: u64 = 1 << 16;
const NAME_BYTES_MAX: u64 = 1 << 16;
const TEXT_BYTES_MAX: u64 = 1 << 24;
const NUM_ELEMENTS_MAX: u64 = 1 << 22;
const ARRAY_DEPTH_MAX: usize = 4;
const NUM_DIMS_MAX: u32 = 4;
/// Bytes that the header is read by.
const BUFFER_BYTES: usize = 1 << 16;

/// The metadata of a GGUF file: settings of the network, and the whole tokenizer under `tokenizer.ggml.*`.
///
/// Source: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
#[derive(Debug)]
pub struct Gguf {
    values: BTreeMap<String, Value>,
}

/// A value of the metadata. Arrays are held in the widest type of their kind.
#[derive(Debug, PartialEq)]
enum Value {
    Int(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    /// An array of a kind that no network uses.
    Other,
}

impl Gguf {
    /// Returns a string, if the key has one.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.values.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns an integer of any width that is not negative, if the key has one.
    pub fn u64(&self, key: &str) -> Option<u64> {
        match self.values.get(key)? {
            Value::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// Returns a number, if the key has one.
    pub fn f64(&self, key: &str) -> Option<f64> {
        match self.values.get(key)? {
            Value::Int(value) => Some(*value as f64),
            Value::Float(value) => Some(*value),
            _ => None,
        }
    }

    /// Returns a truth value, if the key has one.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.values.get(key)? {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// Returns an array of strings, if the key has one.
    pub fn strings(&self, key: &str) -> Option<&[String]> {
        match self.values.get(key)? {
            Value::Texts(texts) => Some(texts),
            _ => None,
        }
    }

    /// Returns an array of integers of any width, if the key has one. Truth values are 0 and 1.
    pub fn ints(&self, key: &str) -> Option<&[i64]> {
        match self.values.get(key)? {
            Value::Ints(values) => Some(values),
            _ => None,
        }
    }

    /// Returns an array of 32-bit floats, if the key has one.
    pub fn floats(&self, key: &str) -> Option<&[f32]> {
        match self.values.get(key)? {
            Value::Floats(values) => Some(values),
            _ => None,
        }
    }

    /// Whether the key has a value of any type.
    pub fn contains(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// Returns a value as it is written in messages.
    pub(super) fn shown(&self, key: &str) -> String {
        match self.values.get(key) {
            None => "none".to_owned(),
            Some(Value::Int(value)) => value.to_string(),
            Some(Value::Float(value)) => value.to_string(),
            Some(Value::Bool(value)) => value.to_string(),
            Some(Value::Text(text)) => format!("{text:?}"),
            Some(Value::Texts(_) | Value::Ints(_) | Value::Floats(_) | Value::Other) => "an array".to_owned(),
        }
    }
}

/// Reads the header of a GGUF file.
///
/// # Errors
/// [`FormatError`] when the file is unreadable or broken.
pub(super) fn read_file(path: &Path) -> Result<(Gguf, Store), FormatError> {
    let file = SourceFile::open(path)?;
    let mut reader = Reader { file: &file, position: 0, buffer: Vec::new(), buffered: 0 };
    let magic = reader.array::<4>("a GGUF file, or a folder of Hugging Face")?;
    if &magic != b"GGUF" {
        let expected = "a GGUF file, or a folder of Hugging Face";
        return Err(FormatError::broken(path, expected, format!("a file that begins with {magic:?}")));
    }
    let version = reader.u32("the GGUF version")?;
    if !(2..=3).contains(&version) {
        return Err(FormatError::unsupported(path, "GGUF version 2 or 3", version.to_string()));
    }
    let num_tensors = reader.count("tensors", NUM_TENSORS_MAX)?;
    let num_keys = reader.count("keys", NUM_KEYS_MAX)?;
    let mut values = BTreeMap::new();
    for _ in 0..num_keys {
        let key = reader.text("a key", NAME_BYTES_MAX)?;
        let value_type = reader.u32(&key)?;
        let value = reader.value(&key, value_type, 0)?;
        if values.contains_key(&key) {
            return Err(FormatError::broken(path, "distinct keys", format!("two named {key:?}")));
        }
        values.insert(key, value);
    }
    let gguf = Gguf { values };

    let alignment = match gguf.u64("general.alignment") {
        None if gguf.contains("general.alignment") => 0,
        None => 32,
        Some(alignment) => alignment,
    };
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        let expected = "general.alignment as a power of two up to 1048576";
        return Err(FormatError::broken(path, expected, gguf.shown("general.alignment")));
    }
    let mut listed =
        (0..num_tensors).map(|_| reader.tensor_info(alignment)).collect::<Result<Vec<_>, FormatError>>()?;
    let data_start = reader.position.next_multiple_of(alignment);
    for (name, tensor) in &mut listed {
        let offset = tensor.offset.checked_add(data_start);
        tensor.offset = offset.ok_or_else(|| {
            let expected = format!("tensor {name:?} within the file");
            FormatError::broken(path, expected, format!("offset {}", tensor.offset))
        })?;
    }
    let store = Store::new(vec![file], listed)?;
    Ok((gguf, store))
}

/// Returns ggml's element type of a number, if candle can read it.
fn element_type(number: u32) -> Option<GgmlDType> {
    Some(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        9 => GgmlDType::Q8_1,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        15 => GgmlDType::Q8K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// Reads a header front to back, and never past the file's end.
struct Reader<'a> {
    file: &'a SourceFile,
    /// Offset in the file of the next byte to return.
    position: u64,
    /// Bytes of the file that end at `buffered`.
    buffer: Vec<u8>,
    buffered: u64,
}

impl Reader<'_> {
    /// Returns the next bytes. `what` they are is for the message.
    fn bytes(&mut self, len: usize, what: &str) -> Result<&[u8], FormatError> {
        let remaining = self.file.size_bytes - self.position;
        if len as u64 > remaining {
            let got = format!("{len} bytes at offset {} of {}", self.position, self.file.size_bytes);
            return Err(FormatError::broken(&self.file.path, format!("{what} within the file"), got));
        }
        if self.position + len as u64 > self.buffered {
            let wanted = (len.max(BUFFER_BYTES) as u64).min(remaining);
            self.buffer.resize(usize::try_from(wanted).expect("it is a length in memory"), 0);
            self.file.read_at(&mut self.buffer, self.position)?;
            self.buffered = self.position + wanted;
        }
        let unread = usize::try_from(self.buffered - self.position).expect("it is at most the buffer's length");
        self.position += len as u64;
        let start = self.buffer.len() - unread;
        Ok(&self.buffer[start..start + len])
    }

    fn array<const LEN: usize>(&mut self, what: &str) -> Result<[u8; LEN], FormatError> {
        Ok(self.bytes(LEN, what)?.try_into().expect("that many bytes were asked for"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, FormatError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, FormatError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn count(&mut self, what: &str, max: u64) -> Result<u64, FormatError> {
        let count = self.u64(what)?;
        if count > max {
            return Err(FormatError::broken(&self.file.path, format!("at most {max} {what}"), count.to_string()));
        }
        Ok(count)
    }

    fn text(&mut self, what: &str, bytes_max: u64) -> Result<String, FormatError> {
        let len = self.count(&format!("bytes of {what}"), bytes_max)?;
        let path = &self.file.path;
        let bytes = self.bytes(usize::try_from(len).expect("it is under 2^32"), what)?;
        let text = std::str::from_utf8(bytes);
        text.map(str::to_owned)
            .map_err(|error| FormatError::broken(path, format!("{what} in UTF-8"), error.to_string()))
    }

    fn truth(&mut self, what: &str) -> Result<bool, FormatError> {
        match self.array(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(FormatError::broken(&self.file.path, format!("{what} as 0 or 1"), other.to_string())),
        }
    }

    /// Reads a number, a truth value or a string.
    fn value(&mut self, key: &str, value_type: u32, depth: usize) -> Result<Value, FormatError> {
        Ok(match value_type {
            0 => Value::Int(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::Int(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Int(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Int(u32::from_le_bytes(self.array(key)?).into()),
            5 => Value::Int(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => Value::Bool(self.truth(key)?),
            8 => Value::Text(self.text(key, TEXT_BYTES_MAX)?),
            9 => self.array_value(key, depth)?,
            10 => Value::Int(u64::from_le_bytes(self.array(key)?).into()),
            11 => Value::Int(i64::from_le_bytes(self.array(key)?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => {
                let expected = format!("{key} of a type from 0 to 12");
                return Err(FormatError::broken(&self.file.path, expected, other.to_string()));
            }
        })
    }

    fn array_value(&mut self, key: &str, depth: usize) -> Result<Value, FormatError> {
        if depth == ARRAY_DEPTH_MAX {
            let expected = format!("{key} with at most {ARRAY_DEPTH_MAX} arrays in each other");
            return Err(FormatError::broken(&self.file.path, expected, "more"));
        }
        let element_type = self.u32(key)?;
        let len = self.count(&format!("elements of {key}"), NUM_ELEMENTS_MAX)?;
        // The smallest that an element can be; an array's is its type and length.
        let element_bytes = match element_type {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            9 => 12,
            _ => 8,
        };
        let remaining = self.file.size_bytes - self.position;
        if len * element_bytes > remaining {
            let expected = format!("{key} within the file's remaining {remaining} bytes");
            return Err(FormatError::broken(&self.file.path, expected, format!("{len} elements")));
        }
        Ok(match element_type {
            0..=5 | 7 | 10 | 11 => {
                let mut values = Vec::new();
                let mut fits = true;
                for _ in 0..len {
                    let value = match self.value(key, element_type, depth)? {
                        Value::Int(value) => i64::try_from(value).ok(),
                        Value::Bool(value) => Some(value.into()),
                        _ => None,
                    };
                    fits &= value.is_some();
                    values.extend(value);
                }
                if fits { Value::Ints(values) } else { Value::Other }
            }
            6 => {
                let values = (0..len).map(|_| self.array(key).map(f32::from_le_bytes));
                Value::Floats(values.collect::<Result<_, _>>()?)
            }
            8 => {
                let texts = (0..len).map(|_| self.text(key, TEXT_BYTES_MAX));
                Value::Texts(texts.collect::<Result<_, _>>()?)
            }
            _ => {
                for _ in 0..len {
                    self.value(key, element_type, depth + 1)?;
                }
                Value::Other
            }
        })
    }

    /// Reads the name, shape, type and offset of a tensor. The offset is from the start of the data.
    fn tensor_info(&mut self, alignment: u64) -> Result<(String, StoredTensor), FormatError> {
        let path = &self.file.path;
        let name = self.text("the name of a tensor", NAME_BYTES_MAX)?;
        let num_dims = self.u32(&name)?;
        if !(1..=NUM_DIMS_MAX).contains(&num_dims) {
            let expected = format!("tensor {name:?} with 1 to {NUM_DIMS_MAX} dimensions");
            return Err(FormatError::broken(path, expected, num_dims.to_string()));
        }
        // The file has the fastest dimension first.
        let mut shape = Vec::new();
        for _ in 0..num_dims {
            let size = self.u64(&name)?;
            let expected = || format!("the shape of tensor {name:?}");
            let size = usize::try_from(size).map_err(|_| FormatError::broken(path, expected(), size.to_string()))?;
            shape.insert(0, size);
        }
        let number = self.u32(&name)?;
        let Some(element_type) = element_type(number) else {
            let expected = format!(
                "tensor {name:?} as F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K or Q8_K"
            );
            return Err(FormatError::unsupported(path, expected, format!("ggml type {number}")));
        };
        let offset = self.u64(&name)?;
        if !offset.is_multiple_of(alignment) {
            let expected = format!("tensor {name:?} at a multiple of {alignment}");
            return Err(FormatError::broken(path, expected, offset.to_string()));
        }
        let Some(size_bytes) = StoredTensor::size_of(element_type, &shape) else {
            let expected = format!("tensor {name:?} with rows of whole blocks of {}", element_type.block_size());
            return Err(FormatError::broken(path, expected, format!("{shape:?}")));
        };
        Ok((name, StoredTensor { file: 0, offset, element_type, shape, size_bytes }))
    }
}
