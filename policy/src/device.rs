use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::candle::{CandleBase, CandlePolicy, CandleScorer, CandleTrainer, CandleWeights};
use crate::cpu::{CpuBase, CpuPolicy, CpuScorer, CpuTrainer, PackedWeights};
use crate::weights::Placed;
use crate::{
    Division, Error, ModelConfig, Params, Policy, Scorer, TensorSpec, ThreadPool, Trainer, TrainingState, Weights,
};

/// The device that a network plays or trains on: `cpu`, `candle-cpu` or `cuda[:N]`.
///
/// ```
/// let device: policy::Device = "cuda:1".parse().unwrap();
/// assert_eq!((device, device.to_string()), (policy::Device::Cuda(1), "cuda:1".to_owned()));
/// assert!(!device.is_reproducible() && policy::Device::Cpu.is_reproducible());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Device {
    /// The CPU, in our own kernels, whose results are the same on every machine.
    Cpu,
    /// The CPU, in the candle operations that also run on GPUs. Its results depend on the machine and on the batch.
    CandleCpu,
    /// The NVIDIA GPU of this number, in candle operations, in a build with the feature `cuda`.
    Cuda(usize),
}

/// A device that has been opened.
#[derive(Clone, Debug)]
pub enum Backend {
    /// The CPU, in our own kernels.
    Cpu,
    /// Any device of candle.
    Candle(candle_core::Device),
    /// A device with the frozen weights that adapters change: [`Backend::with_base`].
    WithBase(Base),
}

/// Frozen weights on a device. Clones share them, and so do all adapters that change them.
#[derive(Clone, Debug)]
pub struct Base {
    placed: PlacedBase,
}

#[derive(Clone, Debug)]
enum PlacedBase {
    Cpu(Arc<CpuBase>),
    Candle(Arc<CandleBase>),
}

impl Device {
    /// Opens the device.
    ///
    /// # Errors
    /// [`Error::Device`] when this build or this machine has no such device.
    pub fn open(self) -> Result<Backend, Error> {
        match self {
            Device::Cpu => Ok(Backend::Cpu),
            Device::CandleCpu => Ok(Backend::Candle(candle_core::Device::Cpu)),
            Device::Cuda(number) => {
                let opened = candle_core::Device::new_cuda(number);
                opened.map(Backend::Candle).map_err(|reason| Error::Device { got: self, reason })
            }
        }
    }

    /// Whether the same inputs produce the same bits on every machine.
    pub fn is_reproducible(self) -> bool {
        self == Device::Cpu
    }
}

impl Backend {
    /// Places the frozen weights on the device that the adapters of a config change. Only adapters are then loaded and trained
    /// there.
    ///
    /// # Errors
    /// [`Error::Config`] when the shape is invalid; [`Error::Weights`] when the weights are not of that shape;
    /// [`Error::Tensor`] when the device has no room.
    pub fn with_base(&self, config: &ModelConfig, base: Params) -> Result<Backend, Error> {
        let config = config.base();
        config.validate()?;
        let sizes: Vec<usize> = config.tensors().iter().map(TensorSpec::num_elements).collect();
        if !base.tensors.iter().map(Vec::len).eq(sizes.iter().copied()) {
            let got = format!("{} tensors of other sizes", base.tensors.len());
            return Err(Error::Weights { expected: format!("the {} tensors of the network", sizes.len()), got });
        }
        let placed = match self.candle() {
            Some(device) => PlacedBase::Candle(Arc::new(CandleBase::new(&config, &base, device)?)),
            None => PlacedBase::Cpu(Arc::new(CpuBase::new(&config, base))),
        };
        Ok(Backend::WithBase(Base { placed }))
    }

    /// Returns how many of `num_threads` threads play at a time: candle computes all slots at once, with threads of its own.
    pub fn num_playing_threads(&self, num_threads: usize) -> usize {
        if self.candle().is_none() { num_threads } else { 1 }
    }

    /// Places a version of the weights on the device; of an adapter, if the config has one.
    ///
    /// # Errors
    /// [`Error::Config`] when the shape is invalid; [`Error::Weights`] when the backend has no base for an adapter, or another
    /// one; [`Error::Tensor`] when the device has no room.
    pub fn load(&self, config: &ModelConfig, params: &Params) -> Result<Weights, Error> {
        config.validate()?;
        self.expect_base(config)?;
        let placed = match self {
            Backend::Cpu => Placed::Cpu(Arc::new(PackedWeights::new(config, params, 1))),
            Backend::Candle(device) => Placed::Candle(Arc::new(CandleWeights::new(config, params, device)?)),
            Backend::WithBase(Base { placed }) => match placed {
                PlacedBase::Cpu(base) => Placed::Cpu(base.packed(config, params, 1)),
                PlacedBase::Candle(base) => Placed::Candle(Arc::new(CandleWeights::adapted(config, base, params)?)),
            },
        };
        Ok(Weights { placed })
    }

    /// Returns a trainer that resumes from a state; it trains an adapter alone, if the config has one.
    ///
    /// # Errors
    /// As [`Backend::load`].
    pub fn trainer(
        &self,
        config: &ModelConfig,
        state: TrainingState,
        division: Division,
    ) -> Result<Box<dyn Trainer>, Error> {
        config.validate()?;
        self.expect_base(config)?;
        Ok(match self {
            Backend::Cpu => Box::new(CpuTrainer::new(config, None, state, division)),
            Backend::Candle(device) => Box::new(CandleTrainer::new(config, None, state, division.num_shards, device)?),
            Backend::WithBase(Base { placed }) => match placed {
                PlacedBase::Cpu(base) => Box::new(CpuTrainer::new(config, Some(base.clone()), state, division)),
                PlacedBase::Candle(base) => {
                    let device = base.device();
                    Box::new(CandleTrainer::new(config, Some(base.as_ref()), state, division.num_shards, device)?)
                }
            },
        })
    }

    /// Returns a scorer with fixed weights, those of a whole network. On the CPU it uses `num_threads` threads; any number gives the
    /// same bits.
    ///
    /// # Errors
    /// [`Error::Config`] when the shape is invalid or has an adapter; [`Error::Tensor`] when the device has no room.
    pub fn scorer(&self, config: &ModelConfig, params: &Params, num_threads: usize) -> Result<Box<dyn Scorer>, Error> {
        config.validate()?;
        if config.adapter.is_some() {
            let (key, expected) = ("adapter", "none in a scorer".to_owned());
            return Err(Error::Config { key, expected, got: "an adapter".to_owned() });
        }
        Ok(match self.candle() {
            None => Box::new(CpuScorer::new(config, params, num_threads)),
            Some(device) => Box::new(CandleScorer::new(config, params, device)?),
        })
    }

    /// Returns the device of candle; `None` for our own kernels.
    fn candle(&self) -> Option<&candle_core::Device> {
        match self {
            Backend::Candle(device) => Some(device),
            Backend::WithBase(Base { placed: PlacedBase::Candle(base) }) => Some(base.device()),
            Backend::Cpu | Backend::WithBase(Base { placed: PlacedBase::Cpu(_) }) => None,
        }
    }

    /// Checks that there is a base for an adapter, and none for a whole network.
    fn expect_base(&self, config: &ModelConfig) -> Result<(), Error> {
        let base = match self {
            Backend::Cpu | Backend::Candle(_) => None,
            Backend::WithBase(Base { placed: PlacedBase::Cpu(base) }) => Some(base.config()),
            Backend::WithBase(Base { placed: PlacedBase::Candle(base) }) => Some(base.config()),
        };
        let refuse =
            |expected: &str, got: &str| Err(Error::Weights { expected: expected.to_owned(), got: got.to_owned() });
        match (config.adapter, base) {
            (None, None) => Ok(()),
            (Some(_), None) => refuse("the frozen weights that the adapter changes", "none"),
            (None, Some(_)) => refuse("an adapter of the frozen weights", "a whole network"),
            // Weights do not depend on the number of positions.
            (Some(_), Some(base)) if (ModelConfig { max_positions: base.max_positions, ..config.base() }) == *base => {
                Ok(())
            }
            (Some(_), Some(_)) => refuse("the frozen weights that the adapter changes", "those of another network"),
        }
    }
}

impl Weights {
    /// Creates a policy with `num_slots` slots.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the device has no room.
    pub fn policy(&self, num_slots: usize) -> Result<Box<dyn Policy>, Error> {
        self.shared_policy(num_slots, &ThreadPool::new(1))
    }

    /// Creates a policy with `num_slots` slots, which uses the threads of the pool on the CPU if the network is large. Any number of
    /// them computes the same bits.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the device has no room.
    pub fn shared_policy(&self, num_slots: usize, pool: &ThreadPool) -> Result<Box<dyn Policy>, Error> {
        Ok(match &self.placed {
            Placed::Cpu(weights) => Box::new(CpuPolicy::new(weights.clone(), num_slots, pool.clone())),
            Placed::Candle(weights) => Box::new(CandlePolicy::new(weights.clone(), num_slots)?),
        })
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::CandleCpu => f.write_str("candle-cpu"),
            Device::Cuda(0) => f.write_str("cuda"),
            Device::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Device, String> {
        let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten();
        let device = match text.split_once(':') {
            None if text == "cpu" => Some(Device::Cpu),
            None if text == "candle-cpu" => Some(Device::CandleCpu),
            None if text == "cuda" => Some(Device::Cuda(0)),
            Some(("cuda", text)) => number(text).map(Device::Cuda),
            _ => None,
        };
        device.ok_or_else(|| format!("expected cpu, candle-cpu, cuda or cuda:N, got {text:?}"))
    }
}

impl TryFrom<String> for Device {
    type Error = String;

    fn try_from(text: String) -> Result<Device, String> {
        text.parse()
    }
}

impl From<Device> for String {
    fn from(device: Device) -> String {
        device.to_string()
    }
}
