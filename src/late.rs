use anyhow::Result;
use prometheus::{GaugeVec, Registry, register_gauge_vec_with_registry};

/// A gauge that is absent until it has a value: an initial 0 would look like a measured 0.
pub(crate) struct LateGauge(GaugeVec);

impl LateGauge {
    pub(crate) fn register(name: &str, help: &str, to: &Registry) -> Result<LateGauge> {
        let no_labels: &[&str] = &[];
        Ok(LateGauge(register_gauge_vec_with_registry!(name, help, no_labels, to)?))
    }

    pub(crate) fn set(&self, value: f64) {
        self.0.with_label_values::<&str>(&[]).set(value);
    }

    /// Sets the value, or makes the gauge absent again if there is none.
    pub(crate) fn set_known(&self, value: Option<f64>) {
        match value {
            Some(value) => self.set(value),
            None => self.0.reset(),
        }
    }
}
