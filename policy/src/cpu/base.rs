use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use proto::Digest;

use super::kernels::PackedMatrix;
use super::packed::{PackedWeights, Transposes, Unpacked};
use crate::{ModelConfig, Params};

/// Frozen weights that adapters change. What no adapter changes is packed once, for all versions.
#[derive(Debug)]
pub(crate) struct CpuBase {
    /// Of the network without an adapter.
    config: ModelConfig,
    /// All tensors but the embedding.
    params: Params,
    embed: Arc<Vec<f32>>,
    head: Arc<PackedMatrix>,
    /// Packed once there is something to train.
    head_transposed: OnceLock<Arc<PackedMatrix>>,
    /// Versions in use: actor and trainer of one process share them.
    versions: Mutex<Vec<(Digest, Weak<PackedWeights>)>>,
}

impl CpuBase {
    pub(crate) fn new(config: &ModelConfig, mut params: Params) -> CpuBase {
        let embed = std::mem::take(&mut params.tensors[0]);
        let head = Unpacked { config, embed: &embed, params: &params, adapter: None }.head();
        CpuBase {
            config: config.clone(),
            params,
            embed: Arc::new(embed),
            head: Arc::new(head),
            head_transposed: OnceLock::new(),
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

    /// Packs the transposes of a version.
    pub(crate) fn transposes(&self, config: &ModelConfig, adapter: &Params, num_threads: usize) -> Transposes {
        let unpacked = self.unpacked(config, adapter);
        let head = self.head_transposed.get_or_init(|| Arc::new(unpacked.head_transposed()));
        Transposes::with_head(unpacked, head.clone(), num_threads)
    }

    fn unpacked<'a>(&'a self, config: &'a ModelConfig, adapter: &'a Params) -> Unpacked<'a> {
        Unpacked { config, embed: &self.embed, params: &self.params, adapter: Some(adapter) }
    }
}
