use proto::{CounterRng, Digest, Purpose};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::{Error, ModelConfig, TensorSpec};

/// A set of weights, or anything of the same shape: gradients, moments, averages.
#[derive(Clone, Debug, PartialEq)]
pub struct Params {
    /// In the order of [`ModelConfig::tensors`], each row-major.
    pub tensors: Vec<Vec<f32>>,
}

/// Weights in training.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingState {
    /// The weights.
    pub weights: Params,
    /// Their average, for exams and export.
    pub average: Params,
    /// Running mean of gradients.
    pub first: Params,
    /// Running mean of squared gradients.
    pub second: Params,
    /// Steps of the optimizer.
    pub num_updates: u64,
}

impl TrainingState {
    /// Returns the state before the first step, with initial weights.
    pub fn initial(config: &ModelConfig, seed: u64) -> TrainingState {
        TrainingState::from_weights(config, Params::init(config, seed))
    }

    /// Returns the state before the first step, with the weights of a pretrained network.
    pub fn from_weights(config: &ModelConfig, weights: Params) -> TrainingState {
        let [first, second] = [(); 2].map(|()| Params::zeros(config));
        TrainingState { average: weights.clone(), weights, first, second, num_updates: 0 }
    }
}

impl Params {
    /// Draws initial weights: uniform with the standard deviation of fan-in scaling, output projections of residual
    /// blocks divided by sqrt(2 layers) (Radford et al. 2019), norms 1, and a head so small that the first policy is
    /// close to uniform over the legal tokens. An adapter has A uniform within 1 / sqrt(inputs), and B = 0.
    pub fn init(config: &ModelConfig, seed: u64) -> Params {
        let draw_tensor = |(index, spec): (usize, &TensorSpec)| {
            let mut rng = CounterRng::new(seed, Purpose::Init, 0, index as u64, 0);
            let std = initial_std(config, spec);
            let mut draw = || ((2.0 * rng.unit_f64() - 1.0) * 3f64.sqrt() * std) as f32;
            let constant = if is_lora_b(spec) { 0.0 } else { 1.0 };
            (0..spec.num_elements()).map(|_| if std == 0.0 { constant } else { draw() }).collect()
        };
        Params { tensors: config.tensors().iter().enumerate().map(draw_tensor).collect() }
    }

    /// Returns zeros of the network's shape.
    pub fn zeros(config: &ModelConfig) -> Params {
        Params { tensors: config.tensors().iter().map(|spec| vec![0.0; spec.num_elements()]).collect() }
    }

    /// Computes the digest of the weights: blake3 over (name, type, shape, bytes), sorted by name.
    pub fn digest(&self, config: &ModelConfig) -> Digest {
        let mut entries: Vec<(TensorSpec, &Vec<f32>)> = config.tensors().into_iter().zip(&self.tensors).collect();
        entries.sort_by(|left, right| left.0.name.cmp(&right.0.name));
        let mut hasher = blake3::Hasher::new();
        for (spec, values) in entries {
            hasher.update(&(spec.name.len() as u64).to_le_bytes());
            hasher.update(spec.name.as_bytes());
            hasher.update(b"F32");
            spec.shape.iter().for_each(|size| {
                hasher.update(&(*size as u64).to_le_bytes());
            });
            hasher.update(as_bytes(values));
        }
        Digest::from_bytes(*hasher.finalize().as_bytes())
    }

    /// Adds another set, element by element.
    pub fn add(&mut self, other: &Params) {
        for (own, other) in self.tensors.iter_mut().zip(&other.tensors) {
            own.iter_mut().zip(other).for_each(|(own, other)| *own += other);
        }
    }
}

/// Writes sets of tensors into one safetensors file, each under its prefix, with the config in the file's metadata.
///
/// ```
/// # let config = policy::ModelConfig { vocabulary_size: 8, max_positions: 8, d_model: 16, num_layers: 1, num_heads: 1,
/// #     num_kv_heads: 1, ff_dim: 16, variant: policy::Variant::default(), adapter: None };
/// let params = policy::Params::init(&config, 0);
/// let bytes = policy::write_weights(&config, &[("", &params)]);
/// let (same_config, sets) = policy::read_weights(&bytes, &[""]).unwrap();
/// assert_eq!((same_config, &sets[0]), (config, &params));
/// ```
pub fn write_weights(config: &ModelConfig, sets: &[(&str, &Params)]) -> Vec<u8> {
    let mut views = Vec::new();
    for (prefix, params) in sets {
        for (spec, values) in config.tensors().into_iter().zip(&params.tensors) {
            let view = TensorView::new(Dtype::F32, spec.shape, as_bytes(values));
            views.push((format!("{prefix}{}", spec.name), view.expect("the bytes have the shape's size")));
        }
    }
    let config = serde_json::to_string(config).expect("a config has a JSON form");
    let metadata = [(CONFIG_KEY.to_owned(), config)].into_iter().collect();
    safetensors::serialize(views, Some(metadata)).expect("names are distinct and shapes are sound")
}

/// Reads a file that [`write_weights`] wrote: its config, and one set of tensors for each prefix.
///
/// # Errors
/// [`Error::Weights`] when the file is broken, or a tensor is missing, misshapen or not F32.
pub fn read_weights(bytes: &[u8], prefixes: &[&str]) -> Result<(ModelConfig, Vec<Params>), Error> {
    let refuse = |expected: String, got: String| Error::Weights { expected, got };
    let broken = |error: safetensors::SafeTensorError| refuse("a safetensors file".to_owned(), error.to_string());
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(broken)?;
    let config = metadata.metadata().as_ref().and_then(|entries| entries.get(CONFIG_KEY));
    let config = config.ok_or_else(|| refuse(format!("{CONFIG_KEY:?} in the metadata"), "none".to_owned()))?;
    let config: ModelConfig = serde_json::from_str(config)
        .map_err(|error| refuse("a model config in the metadata".to_owned(), error.to_string()))?;
    config.validate()?;
    let file = SafeTensors::deserialize(bytes).map_err(broken)?;
    let read = |prefix: &str, spec: &TensorSpec| {
        let name = format!("{prefix}{}", spec.name);
        let tensor = file.tensor(&name).map_err(|error| refuse(format!("a tensor {name}"), error.to_string()))?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != spec.shape {
            let got = format!("{:?} {:?}", tensor.dtype(), tensor.shape());
            return Err(refuse(format!("{name} as F32 {:?}", spec.shape), got));
        }
        let mut values = vec![0.0; spec.num_elements()];
        bytemuck::cast_slice_mut(&mut values).copy_from_slice(tensor.data());
        Ok(values)
    };
    let sets = prefixes.iter().map(|prefix| {
        let tensors = config.tensors().iter().map(|spec| read(prefix, spec)).collect::<Result<_, _>>()?;
        Ok(Params { tensors })
    });
    let sets = sets.collect::<Result<_, Error>>()?;
    Ok((config, sets))
}

const CONFIG_KEY: &str = "autodidact.model";

fn initial_std(config: &ModelConfig, spec: &TensorSpec) -> f64 {
    let residual = 1.0 / ((2 * config.num_layers) as f64).sqrt();
    match spec.name.rsplit_once('.').map_or(spec.name.as_str(), |(stem, _)| stem) {
        "embed" => 0.1,
        "head" => 0.02,
        stem if stem.ends_with("norm") => 0.0,
        stem if stem.ends_with("lora_a") => 1.0 / ((3 * spec.shape[0]) as f64).sqrt(),
        _ if is_lora_b(spec) => 0.0,
        stem if stem.ends_with("out") || stem.ends_with("down") => residual / (spec.shape[0] as f64).sqrt(),
        _ => 1.0 / (spec.shape[0] as f64).sqrt(),
    }
}

fn is_lora_b(spec: &TensorSpec) -> bool {
    spec.name.ends_with(".lora_b.weight")
}

/// Views values as they are hashed and stored.
fn as_bytes(values: &[f32]) -> &[u8] {
    bytemuck::cast_slice(values)
}

#[cfg(target_endian = "big")]
compile_error!("weights are hashed, read and written as they lie in memory, and their format is little-endian");
