use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::candle::{CandlePolicy, CandleScorer, CandleTrainer, CandleWeights};
use crate::cpu::{CpuPolicy, CpuScorer, CpuTrainer, PackedWeights};
use crate::weights::Placed;
use crate::{Division, Error, ModelConfig, Params, Policy, Scorer, Trainer, TrainingState, Weights};

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

    /// Returns how many of `num_threads` threads play at a time: candle computes all slots at once, with threads of its own.
    pub fn num_playing_threads(self, num_threads: usize) -> usize {
        if self == Device::Cpu { num_threads } else { 1 }
    }

    /// Whether the same inputs produce the same bits on every machine.
    pub fn is_reproducible(self) -> bool {
        self == Device::Cpu
    }
}

impl Backend {
    /// Places a version of the weights on the device.
    ///
    /// # Errors
    /// [`Error::Config`] when the shape is invalid; [`Error::Tensor`] when the device has no room.
    pub fn load(&self, config: &ModelConfig, params: &Params) -> Result<Weights, Error> {
        config.validate()?;
        let placed = match self {
            Backend::Cpu => Placed::Cpu(Arc::new(PackedWeights::new(config, params))),
            Backend::Candle(device) => Placed::Candle(Arc::new(CandleWeights::new(config, params, device)?)),
        };
        Ok(Weights { placed })
    }

    /// Returns a trainer that resumes from a state.
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
        Ok(match self {
            Backend::Cpu => Box::new(CpuTrainer::new(config, state, division)),
            Backend::Candle(device) => Box::new(CandleTrainer::new(config, state, division.num_shards, device)?),
        })
    }

    /// Returns a scorer with fixed weights. On the CPU it uses `num_threads` threads; any number gives the same bits.
    ///
    /// # Errors
    /// As [`Backend::load`].
    pub fn scorer(&self, config: &ModelConfig, params: &Params, num_threads: usize) -> Result<Box<dyn Scorer>, Error> {
        config.validate()?;
        Ok(match self {
            Backend::Cpu => Box::new(CpuScorer::new(config, params, num_threads)),
            Backend::Candle(device) => Box::new(CandleScorer::new(config, params, device)?),
        })
    }
}

impl Weights {
    /// Creates a policy with `num_slots` slots.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the device has no room.
    pub fn policy(&self, num_slots: usize) -> Result<Box<dyn Policy>, Error> {
        Ok(match &self.placed {
            Placed::Cpu(weights) => Box::new(CpuPolicy::new(weights.clone(), num_slots)),
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
