use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;

use super::FormatError;
use super::source_file::SourceFile;

/// Elements that are read and converted at a time: little beside any tensor, much beside a call of the system.
const CHUNK_ELEMENTS: usize = 1 << 18;

/// The tensors of a network as they lie in files. Built by [`Store::new`], so every tensor lies within its file.
#[derive(Debug)]
pub(super) struct Store {
    files: Vec<SourceFile>,
    tensors: BTreeMap<String, StoredTensor>,
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
pub(super) struct StoredTensor {
    /// Index of its file.
    pub(super) file: usize,
    /// Its first byte in the file.
    pub(super) offset: u64,
    pub(super) element_type: GgmlDType,
    /// Slowest dimension first.
    pub(super) shape: Vec<usize>,
    pub(super) size_bytes: u64,
}

impl StoredTensor {
    /// Returns the number of bytes of a tensor, or `None` if no file can hold it or a row is not whole blocks.
    pub(super) fn size_of(element_type: GgmlDType, shape: &[usize]) -> Option<u64> {
        let block = element_type.block_size();
        if !shape.last().copied().unwrap_or(1).is_multiple_of(block) {
            return None;
        }
        let num_elements = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size))?;
        u64::try_from((num_elements / block).checked_mul(element_type.type_size())?).ok()
    }

    /// Returns the numbers of rows and columns; a vector is one row.
    fn dims(&self) -> (usize, usize) {
        let num_columns = self.shape.last().copied().unwrap_or(1);
        (self.shape.iter().rev().skip(1).product(), num_columns)
    }
}

impl Store {
    /// Checks that the tensors have distinct names, and lie within their files without overlapping.
    ///
    /// # Errors
    /// [`FormatError::Broken`].
    pub(super) fn new(files: Vec<SourceFile>, listed: Vec<(String, StoredTensor)>) -> Result<Store, FormatError> {
        let mut tensors = BTreeMap::new();
        for (name, tensor) in listed {
            let path = &files[tensor.file].path;
            let end = tensor.offset.checked_add(tensor.size_bytes);
            if end.is_none_or(|end| end > files[tensor.file].size_bytes) {
                let expected = format!("tensor {name:?} within the file's {} bytes", files[tensor.file].size_bytes);
                let got = format!("{} bytes at offset {}", tensor.size_bytes, tensor.offset);
                return Err(FormatError::broken(path, expected, got));
            }
            if tensors.contains_key(&name) {
                return Err(FormatError::broken(path, "tensors with distinct names", format!("two named {name:?}")));
            }
            tensors.insert(name, tensor);
        }
        let mut places: Vec<(&String, &StoredTensor)> = tensors.iter().collect();
        places.sort_by_key(|(_, tensor)| (tensor.file, tensor.offset, tensor.size_bytes));
        for neighbors in places.windows(2) {
            let [(first_name, first), (second_name, second)] = [neighbors[0], neighbors[1]];
            if first.file == second.file && first.offset + first.size_bytes > second.offset {
                let got = format!("{first_name:?} over {second_name:?}");
                return Err(FormatError::broken(&files[first.file].path, "tensors that do not overlap", got));
            }
        }
        Ok(Store { files, tensors })
    }

    pub(super) fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }

    pub(super) fn tensors(&self) -> impl Iterator<Item = (&String, &StoredTensor)> {
        self.tensors.iter()
    }

    pub(super) fn path_of(&self, tensor: &StoredTensor) -> &Path {
        &self.files[tensor.file].path
    }

    /// Returns the size of all files.
    pub(super) fn size_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size_bytes).sum()
    }

    /// Reads a tensor as F32, a few rows at a time: calls `take` with the first row's index, the number of columns, and rows.
    /// A vector is one row.
    ///
    /// # Errors
    /// [`FormatError::Io`], [`FormatError::Broken`] when an element is not finite, and errors of `take`.
    pub(super) fn read_rows(
        &self,
        tensor: &StoredTensor,
        mut take: impl FnMut(usize, usize, &[f32]) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        let file = &self.files[tensor.file];
        let (num_rows, num_columns) = tensor.dims();
        if num_rows == 0 || num_columns == 0 {
            return Ok(());
        }
        let row_bytes = num_columns / tensor.element_type.block_size() * tensor.element_type.type_size();
        let rows_at_once = (CHUNK_ELEMENTS / num_columns).clamp(1, num_rows);
        let mut bytes = AlignedBytes::new(rows_at_once * row_bytes);
        for first in (0..num_rows).step_by(rows_at_once) {
            let num_rows = rows_at_once.min(num_rows - first);
            let chunk = bytes.first_mut(num_rows * row_bytes);
            file.read_at(chunk, tensor.offset + (first * row_bytes) as u64)?;
            let values = to_f32(tensor.element_type, chunk, num_rows * num_columns)
                .map_err(|error| FormatError::broken(&file.path, "numbers that candle reads", error.to_string()))?;
            if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                return Err(FormatError::broken(&file.path, "finite weights", value.to_string()));
            }
            take(first, num_columns, &values)?;
        }
        Ok(())
    }
}

/// Returns ggml's name of an element type, which is also that of safetensors.
pub(super) fn type_name(element_type: GgmlDType) -> &'static str {
    match element_type {
        GgmlDType::F32 => "F32",
        GgmlDType::F16 => "F16",
        GgmlDType::BF16 => "BF16",
        GgmlDType::Q4_0 => "Q4_0",
        GgmlDType::Q4_1 => "Q4_1",
        GgmlDType::Q5_0 => "Q5_0",
        GgmlDType::Q5_1 => "Q5_1",
        GgmlDType::Q8_0 => "Q8_0",
        GgmlDType::Q8_1 => "Q8_1",
        GgmlDType::Q2K => "Q2_K",
        GgmlDType::Q3K => "Q3_K",
        GgmlDType::Q4K => "Q4_K",
        GgmlDType::Q5K => "Q5_K",
        GgmlDType::Q6K => "Q6_K",
        GgmlDType::Q8K => "Q8_K",
    }
}

fn to_f32(element_type: GgmlDType, bytes: &[u8], num_elements: usize) -> candle_core::Result<Vec<f32>> {
    match element_type {
        GgmlDType::F32 => Ok(bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect()),
        GgmlDType::BF16 => {
            let halves = bytes.as_chunks().0.iter().map(|half| u32::from(u16::from_le_bytes(*half)));
            Ok(halves.map(|half| f32::from_bits(half << 16)).collect())
        }
        other => match other.from_data(Cow::Borrowed(bytes)).dequantize(num_elements)? {
            CpuStorage::F32(values) => Ok(values),
            _ => candle_core::bail!("{other:?} does not dequantize to F32"),
        },
    }
}

/// A buffer whose first byte has the alignment that candle asserts.
struct AlignedBytes {
    bytes: Vec<u8>,
    start: usize,
}

impl AlignedBytes {
    const ALIGNMENT: usize = 8;

    fn new(len: usize) -> AlignedBytes {
        let bytes = vec![0; len + AlignedBytes::ALIGNMENT];
        let start = bytes.as_ptr().align_offset(AlignedBytes::ALIGNMENT).min(AlignedBytes::ALIGNMENT);
        AlignedBytes { bytes, start }
    }

    fn first_mut(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_converted_exactly() {
        let values = |element_type, halves: [u16; 4]| {
            let mut bytes = AlignedBytes::new(8);
            let chunk = bytes.first_mut(8);
            chunk.copy_from_slice(&halves.map(u16::to_le_bytes).concat());
            to_f32(element_type, chunk, 4).unwrap()
        };
        // One, minus two, a third as it is rounded, and the least subnormal.
        let [third, least] = [1365.0 / 4096.0, 2f32.powi(-24)];
        assert_eq!(values(GgmlDType::F16, [0x3c00, 0xc000, 0x3555, 0x0001]), [1.0, -2.0, third, least]);
        let [third, least] = [171.0 / 512.0, f32::MIN_POSITIVE / 128.0];
        assert_eq!(values(GgmlDType::BF16, [0x3f80, 0xc000, 0x3eab, 0x0001]), [1.0, -2.0, third, least]);
    }
}
