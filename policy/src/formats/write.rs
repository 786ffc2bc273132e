use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use proto::TokenId;
use serde_json::{Map, Value, json};

use super::layout::{self, Convention, Part};
use super::{Family, FormatError, StoredType, hf_config};
use crate::{Adapter, ModelConfig, Params};

/// What a folder of Hugging Face holds besides the network.
#[derive(Clone, Copy, Debug, Default)]
pub struct Companions<'a> {
    /// The tokens at which text ends.
    pub end_tokens: &'a [TokenId],
    /// Other files, such as those of the tokenizer, by name.
    pub files: &'a [(&'static str, Vec<u8>)],
}

/// Writes a folder that transformers and the engines that read its folders can load: `config.json`, `model.safetensors` and the
/// companions. The folder is complete or absent.
///
/// # Errors
/// [`FormatError::Occupied`] when the folder is not empty, [`FormatError::Unsupported`] when the family cannot express the
/// network, [`FormatError::Io`].
///
/// # Panics
/// When the weights are not of the config's shape.
pub fn write_hf(
    folder: &Path,
    config: &ModelConfig,
    family: Family,
    params: &Params,
    stored_type: StoredType,
    companions: Companions<'_>,
) -> Result<(), FormatError> {
    let sizes = config.base_tensors().iter().map(|spec| spec.num_elements()).collect::<Vec<_>>();
    assert!(params.tensors.iter().map(Vec::len).eq(sizes), "the weights are of the config's shape");
    super::validate(config, folder)?;
    let mut described = hf_config::describe(config, family, stored_type, folder)?;
    described["eos_token_id"] = match companions.end_tokens {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    let parts = layout::parts(config, Convention::HuggingFace);
    let weights = ("model.safetensors", &parts[..], params, stored_type);
    write_folder(folder, ("config.json", &described), weights, companions.files)
}

/// Writes an adapter as a folder of PEFT: `adapter_config.json` and `adapter_model.safetensors`, in F32. The folder is complete or
/// absent. `base_name` is the name or the path of the pretrained model, for those who load it.
///
/// # Errors
/// [`FormatError::Occupied`] when the folder is not empty, [`FormatError::Io`].
///
/// # Panics
/// When the config has no adapter, or `adapter` is not of its shape.
pub fn write_peft(folder: &Path, config: &ModelConfig, adapter: &Params, base_name: &str) -> Result<(), FormatError> {
    let Adapter { rank, alpha, rslora } = config.adapter.expect("a config with an adapter");
    let sizes = config.tensors().iter().map(|spec| spec.num_elements()).collect::<Vec<_>>();
    assert!(adapter.tensors.iter().map(Vec::len).eq(sizes), "the adapter is of the config's shape");
    super::validate(config, folder)?;
    let described = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": true,
        "r": rank,
        // Some readers take whole numbers alone.
        "lora_alpha": if alpha.fract() == 0.0 { json!(alpha as u64) } else { json!(alpha) },
        "use_rslora": rslora,
        "lora_dropout": 0.0,
        "target_modules": layout::target_modules(),
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "modules_to_save": null,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": false,
    });
    let parts = layout::adapter_parts(config);
    let weights = ("adapter_model.safetensors", &parts[..], adapter, StoredType::F32);
    write_folder(folder, ("adapter_config.json", &described), weights, &[])
}

/// Writes a folder with a description, weights and other files; each has its file's name first.
fn write_folder(
    folder: &Path,
    (described_name, described): (&str, &Value),
    (weights_name, parts, params, stored_type): (&str, &[Part], &Params, StoredType),
    files: &[(&str, Vec<u8>)],
) -> Result<(), FormatError> {
    refuse_occupied(folder)?;
    let partial = create_partial(folder).map_err(FormatError::io(folder, "a folder that can be created"))?;
    let write = || -> io::Result<()> {
        write_weights(&partial.join(weights_name), parts, params, stored_type)?;
        let mut text = serde_json::to_vec_pretty(described)?;
        text.push(b'\n');
        let files = files.iter().map(|(name, bytes)| (*name, bytes));
        for (name, bytes) in files.chain([(described_name, &text)]) {
            let mut file = File::create_new(partial.join(name))?;
            file.write_all(bytes)?;
            file.sync_all()?;
        }
        File::open(&partial)?.sync_all()?;
        // Replaces an empty folder, and fails over any other.
        fs::rename(&partial, folder)?;
        File::open(parent(folder))?.sync_all()
    };
    write().inspect_err(|_| drop(fs::remove_dir_all(&partial))).map_err(FormatError::io(folder, "a writable folder"))
}

fn refuse_occupied(folder: &Path) -> Result<(), FormatError> {
    let occupied = |got| Err(FormatError::Occupied { path: folder.to_owned(), got });
    let unreadable = FormatError::io(folder, "a readable folder");
    match folder.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(unreadable(error)),
        Ok(metadata) if !metadata.is_dir() => occupied("a file or a link"),
        Ok(_) => match folder.read_dir().map(|mut entries| entries.next().is_some()) {
            Ok(false) => Ok(()),
            Ok(true) => occupied("a folder with files"),
            Err(error) => Err(unreadable(error)),
        },
    }
}

/// Creates a folder beside `folder` that no other process uses.
fn create_partial(folder: &Path) -> io::Result<PathBuf> {
    fs::create_dir_all(parent(folder))?;
    let name = folder.file_name().ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "a path without a name"))?;
    let mut number = 0;
    loop {
        let mut name = name.to_owned();
        name.push(format!(".{number}.partial"));
        let partial = folder.with_file_name(name);
        match fs::create_dir(&partial) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
            created => return created.map(|()| partial),
        }
    }
}

fn parent(folder: &Path) -> &Path {
    folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn write_weights(path: &Path, parts: &[Part], params: &Params, stored_type: StoredType) -> io::Result<()> {
    let (type_name, element_bytes) = match stored_type {
        StoredType::F32 => ("F32", 4),
        StoredType::Bf16 => ("BF16", 2),
    };
    // Some readers refuse files without it.
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut offset = 0;
    for Part { name, shape, .. } in parts {
        let end = offset + shape.iter().product::<usize>() * element_bytes;
        header.insert(name.clone(), json!({"dtype": type_name, "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut header = serde_json::to_vec(&Value::Object(header))?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut writer = BufWriter::with_capacity(1 << 20, File::create_new(path)?);
    writer.write_all(&(header.len() as u64).to_le_bytes())?;
    writer.write_all(&header)?;
    for part in parts {
        part.copy_out(params, |values| match stored_type {
            StoredType::F32 => values.iter().try_for_each(|value| writer.write_all(&value.to_le_bytes())),
            StoredType::Bf16 => values.iter().try_for_each(|value| writer.write_all(&to_bf16(*value).to_le_bytes())),
        })?;
    }
    writer.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

/// Rounds to the nearest BF16, ties to even.
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    // A NaN could be rounded to infinity.
    let rounded = if value.is_nan() { bits | 1 << 22 } else { bits + 0x7fff + (bits >> 16 & 1) };
    (rounded >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_rounded_to_nearest_with_ties_to_even() {
        // 1 + 2^-7 is the next after 1.
        let step = 2f32.powi(-7);
        let cases = [
            (1.0, 0x3f80),
            (1.0 + 0.49 * step, 0x3f80),
            (1.0 + 0.5 * step, 0x3f80),
            (1.0 + 1.5 * step, 0x3f82),
            (-1.0 - 0.51 * step, 0xbf81),
            (0.0, 0),
            (-0.0, 0x8000),
            (f32::MAX, 0x7f80),
            (f32::NEG_INFINITY, 0xff80),
        ];
        for (value, expected) in cases {
            assert_eq!(to_bf16(value), expected, "{value}");
        }
        assert!(f32::from_bits(u32::from(to_bf16(f32::NAN)) << 16).is_nan());
    }
}
