use candle_core::Device;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Where the network trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// In kernels of our own, whose results are the same on every machine.
    Cpu,
    /// On the first NVIDIA GPU, in plain candle operations, in a build with the feature `cuda`. Its libraries do not promise
    /// the same result twice.
    Cuda,
}

impl DeviceKind {
    /// Opens the device.
    ///
    /// # Errors
    /// [`Error::Device`] when this build or this machine has none.
    pub fn open(self) -> Result<Device, Error> {
        match self {
            DeviceKind::Cpu => Ok(Device::Cpu),
            DeviceKind::Cuda => Device::new_cuda(0).map_err(Error::Device),
        }
    }

    /// Tells whether the same inputs give the same bits again.
    pub fn is_reproducible(self) -> bool {
        self == DeviceKind::Cpu
    }
}
