//! Publishing weights.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use policy::write_weights;
use proto::{Digest, Version};
use tokio::task::{JoinHandle, block_in_place};

use super::Learner;
use crate::Error;

/// Weights that were stored on the bus.
pub(super) struct Published {
    /// Encoded weights that planned batches refer to.
    pub(super) versions: BTreeMap<Digest, Arc<[u8]>>,
    /// The background job that stores weights again that the bus may have lost.
    repair: Option<Repair>,
}

impl Published {
    pub(super) fn of(versions: BTreeMap<Digest, Arc<[u8]>>) -> Published {
        Published { versions, repair: None }
    }
}

/// A background job of the main loop; aborted on drop.
struct Repair(JoinHandle<()>);

impl Drop for Repair {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Learner<'_> {
    /// Stores the current version and removes those that no task refers to.
    pub(super) async fn publish_weights(&mut self) -> Result<(), Error> {
        let digest = self.fold.weights_digest();
        let (model, trainer) = (&self.fold.config().model, self.fold.trainer());
        let written = block_in_place(|| trainer.weights().map(|weights| write_weights(model, &[("", &weights)])));
        let bytes: Arc<[u8]> = written?.into();
        self.bus.put_weights(digest, bytes.clone()).await?;
        self.published.versions.insert(digest, bytes);
        self.announce().await?;
        let named: BTreeSet<Digest> = self.fold.planned().iter().map(|planned| planned.task.weights).collect();
        self.published.versions.retain(|version, _| *version == digest || named.contains(version));
        let needed: Vec<Digest> = self.published.versions.keys().copied().collect();
        Ok(self.bus.retain_weights(&needed).await?)
    }

    /// Announces the current weights to the actors of a free-running run.
    pub(super) async fn announce(&self) -> Result<(), Error> {
        if self.fold.config().is_free_running() {
            let version = Version { policy_version: self.fold.state().step, weights: self.fold.weights_digest() };
            self.bus.announce(version).await?;
        }
        Ok(())
    }

    /// Stores all weights again that tasks refer to and the bus lacks. Runs in the background, since they may be large.
    pub(super) fn put_weights(&mut self) {
        if self.published.repair.as_ref().is_some_and(|repair| !repair.0.is_finished()) {
            return;
        }
        let sat = self.sitting.iter().map(|sitting| (&sitting.weights.0, &sitting.weights.1));
        let weights = self.published.versions.iter().chain(sat).map(|(digest, bytes)| (*digest, bytes.clone()));
        let (bus, weights) = (self.bus.clone(), weights.collect::<Vec<_>>());
        self.published.repair = Some(Repair(tokio::spawn(async move {
            for (digest, bytes) in weights {
                if let Err(error) = bus.put_weights(digest, bytes).await {
                    // It is tried again when tasks are overdue again.
                    tracing::warn!(%error, "could not republish weights");
                }
            }
        })));
    }
}
