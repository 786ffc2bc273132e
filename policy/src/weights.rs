use std::sync::Arc;

use crate::ModelConfig;
use crate::candle::CandleWeights;
use crate::cpu::PackedWeights;

/// One version of the weights, on the device that plays it. Clones share the data.
#[derive(Clone, Debug)]
pub struct Weights {
    pub(crate) placed: Placed,
}

/// The weights in the format of their backend.
#[derive(Clone, Debug)]
pub(crate) enum Placed {
    Cpu(Arc<PackedWeights>),
    Candle(Arc<CandleWeights>),
}

impl Weights {
    /// Returns the shape of the network.
    pub fn config(&self) -> &ModelConfig {
        match &self.placed {
            Placed::Cpu(weights) => &weights.config,
            Placed::Candle(weights) => &weights.config,
        }
    }

    /// Whether these are clones of the same weights.
    pub fn is_same(&self, other: &Weights) -> bool {
        match (&self.placed, &other.placed) {
            (Placed::Cpu(own), Placed::Cpu(other)) => Arc::ptr_eq(own, other),
            (Placed::Candle(own), Placed::Candle(other)) => Arc::ptr_eq(own, other),
            _ => false,
        }
    }

    pub(crate) fn on_cpu(&self) -> Option<&Arc<PackedWeights>> {
        if let Placed::Cpu(weights) = &self.placed { Some(weights) } else { None }
    }

    pub(crate) fn in_candle(&self) -> Option<&Arc<CandleWeights>> {
        if let Placed::Candle(weights) = &self.placed { Some(weights) } else { None }
    }
}
