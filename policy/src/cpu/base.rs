use std::sync::{Arc, Mutex, PoisonError, Weak};

use proto::Digest;

use super::kernels::PackedMatrix;
use super::packed::{PackedWeights, Unpacked};
use crate::{ModelConfig, Params};

/// Frozen weights that adapters change. What no adapter changes is packed once, for all versions.
#[derive(Debug)]
pub(crate) struct CpuBase {
    /// Of the network without an adapter.
    config: ModelConfig,
    /// All tensors but the embedding.
    params: Params,
    /// Absent if the head is its transpose.
    embed: Option<Arc<Vec<f32>>>,
    head: Arc<PackedMatrix>,
    /// Versions in use: actor and trainer of one process share them.
    versions: Mutex<Vec<(Digest, Weak<PackedWeights>)>>,
}

impl CpuBase {
    pub(crate) fn new(config: &ModelConfig, mut params: Params) -> CpuBase {
        let head = Unpacked::own(config, &params).head();
        let embed = std::mem::take(&mut params.tensors[0]);
        CpuBase {
            config: config.clone(),
            params,
            embed: (!config.variant.tied_head).then(|| Arc::new(embed)),
            head: Arc::new(head),
            versions: Mutex::default(),
        }
    }

    /// Returns the config of the network without an adapter.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns a version, which is packed on some threads unless it is in use already.
    pub(crate) fn packed(&self, config: &ModelConfig, adapter: &Params, num_threads: usize) -> Arc<PackedWeights> {
        let digest = adapter.digest(config);
        // Held while a version is packed, so that no other thread packs it too.
        let mut versions = self.versions.lock().unwrap_or_else(PoisonError::into_inner);
        versions.retain(|(_, version)| version.strong_count() > 0);
        let same = versions.iter().filter(|(other, _)| *other == digest).filter_map(|(_, version)| version.upgrade());
        if let Some(version) = same.into_iter().find(|version| version.config == *config) {
            return version;
        }
        let unpacked = self.unpacked(config, adapter);
        let version = Arc::new(PackedWeights::with_head(unpacked, self.embed.clone(), self.head.clone(), num_threads));
        versions.push((digest, Arc::downgrade(&version)));
        version
    }

    fn unpacked<'a>(&'a self, config: &'a ModelConfig, adapter: &'a Params) -> Unpacked<'a> {
        Unpacked { config, params: &self.params, adapter: Some(adapter) }
    }
}
