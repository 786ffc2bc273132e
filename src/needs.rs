//! What a run needs of the machines that it runs on: memory, disk, and what its steps send.

use std::path::Path;

use anyhow::{Result, ensure};
use policy::{Device, ModelConfig};

use crate::fetch::{files_of, size_of};
use crate::machine::{free_bytes, memory_bytes};
use crate::run_config::RunConfig;

/// Bytes of a weight: F32 in memory, in checkpoints and on the wire.
const WEIGHT: u64 = 4;

/// Beside the weights of unfinished tasks, one for each step of lag and the current one, a server holds a version that is being
/// stored, that of an exam, and one that could not be removed.
const OTHER_VERSIONS: u64 = 3;

/// What a run needs, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Needs {
    /// The least memory of the process: weights, moments and gradients, without activations and caches. Only what the CPU computes.
    pub(crate) memory: u64,
    /// A checkpoint.
    pub(crate) checkpoint: u64,
    /// Most checkpoints that are kept.
    pub(crate) num_kept: u64,
    /// Most checkpoints that are there at a time.
    pub(crate) num_checkpoints: u64,
    /// The weights that a step publishes.
    pub(crate) published: u64,
    /// The weights that a server holds at most. 0 in a free-running run, whose slow tasks may name any number of versions.
    pub(crate) weights_on_server: u64,
    /// The files of the pretrained model.
    pub(crate) base: u64,
}

impl Needs {
    /// - `plays`: whether the process of the learner plays too.
    pub(crate) fn of(config: &RunConfig, plays: bool) -> Result<Needs> {
        let RunConfig { run, local, base, .. } = config;
        let published = WEIGHT * run.model.num_trained() as u64;
        let base = base.as_ref().map_or(Ok(0), |base| size_of(&files_of(&base.pretrained)?))?;
        let written = run.schedule.num_steps.map_or(u64::MAX, |steps| steps / local.checkpoint_every + 1);
        let of_learner = if run.learner.device == Device::Cpu {
            training_bytes(&run.model, local.num_threads(), run.learner.num_shards)
        } else {
            0
        };
        let shares = run.model.adapter.is_some() && run.learner.device == run.actor.device;
        let of_actor = if plays && run.actor.device == Device::Cpu && !shares { playing_bytes(&run.model) } else { 0 };
        Ok(Needs {
            memory: of_learner + of_actor,
            checkpoint: 4 * published + run.batch.lag * published,
            num_kept: written.min(local.keep_checkpoints as u64),
            // A checkpoint is written before an older one is removed.
            num_checkpoints: written.min(local.keep_checkpoints as u64 + 1),
            published,
            weights_on_server: if run.is_free_running() { 0 } else { (run.batch.lag + 1 + OTHER_VERSIONS) * published },
            base,
        })
    }

    /// Checks that the disk has room for the checkpoints that a run keeps, and the machine the memory that it needs at least.
    pub(crate) fn expect_room(&self, run_dir: &Path) -> Result<()> {
        expect_memory(
            self.memory,
            "the weights and their gradients",
            "; an adapter needs less (model.adapter), and so does a smaller model",
        )?;
        let there = std::fs::read_dir(run_dir.join("checkpoints")).into_iter().flatten().count() as u64;
        // The last one that is kept is replaced, and both are there meanwhile.
        let num_more = self.num_checkpoints.saturating_sub(there).max(1);
        let (needed, free) = (self.checkpoint.saturating_mul(num_more), free_bytes(run_dir)?);
        ensure!(
            needed <= free,
            "{}: expected {} of free space for {num_more} checkpoints of {}, got {}; make room there, use --run-dir to choose \
             another disk, or keep fewer (local.keep_checkpoints)",
            run_dir.display(),
            size(needed),
            size(self.checkpoint),
            size(free)
        );
        Ok(())
    }

    /// Describes the needs of a run in lines.
    ///
    /// - `over_nats`: whether its weights go over a server.
    pub(crate) fn lines(&self, run_dir: &Path, over_nats: bool) -> Result<String> {
        let of = |has: Option<u64>| has.map_or_else(String::new, |has| format!("; this machine has {}", size(has)));
        let memory = match self.memory {
            0 => String::new(),
            memory => {
                format!("memory: {} at least, activations and caches on top{}\n", size(memory), of(memory_bytes()))
            }
        };
        let checkpoint = size(self.checkpoint);
        let mut checkpoints = match self.num_kept {
            1 => format!("one checkpoint of {checkpoint} kept"),
            number => format!("{number} checkpoints of {checkpoint} kept"),
        };
        if self.num_checkpoints > self.num_kept {
            checkpoints += ", and another one while it is written";
        }
        let mut lines = format!(
            "{memory}\
             disk: {checkpoints}; {} free\n\
             every step publishes {} of weights, as F32",
            size(free_bytes(run_dir)?),
            size(self.published)
        );
        if over_nats {
            let weights = match self.weights_on_server {
                0 => String::new(),
                weights => format!("{} for them, and ", size(weights)),
            };
            lines += &format!(
                "; the server reserves {weights}{} for the pretrained model, which it holds once a worker lacks it",
                size(self.base)
            );
        }
        Ok(lines + "\n")
    }
}

/// Checks that this machine has the memory that playing needs at least.
pub(crate) fn expect_memory_to_play(model: &ModelConfig) -> Result<()> {
    expect_memory(playing_bytes(model), "the weights", "")
}

fn expect_memory(needed: u64, what: &str, advice: &str) -> Result<()> {
    expect_memory_of(needed, memory_bytes(), what, advice)
}

fn expect_memory_of(needed: u64, has: Option<u64>, what: &str, advice: &str) -> Result<()> {
    let has = has.unwrap_or(u64::MAX);
    ensure!(needed <= has, "memory: expected {} or more for {what}, got {}{advice}", size(needed), size(has));
    Ok(())
}

/// Returns the least bytes in which the CPU plays: the weights as kernels read them, beside the matrices that an adapter changes.
pub(crate) fn playing_bytes(model: &ModelConfig) -> u64 {
    let weights = model.base().num_parameters() as u64;
    let embedding = (model.vocabulary_size * model.d_model) as u64;
    let frozen = if model.adapter.is_some() { weights - embedding } else { 0 };
    WEIGHT * (frozen + weights)
}

/// Returns the least bytes in which the CPU trains: the weights, their average and two moments, gradients, the weights as kernels
/// read them, and the encoded version that is published.
pub(crate) fn training_bytes(model: &ModelConfig, num_threads: usize, num_shards: usize) -> u64 {
    let trained = model.num_trained() as u64;
    let num_gradients = num_shards.min(num_threads + 1) as u64;
    WEIGHT * (4 * trained + num_gradients * trained + trained) + playing_bytes(model)
}

/// Formats a size: `538 MB` or `2.15 GB`.
pub(crate) fn size(num_bytes: u64) -> String {
    match num_bytes as f64 {
        bytes if bytes < 1e6 => format!("{:.0} kB", bytes / 1e3),
        bytes if bytes < 1e9 => format!("{:.0} MB", bytes / 1e6),
        bytes => format!("{:.2} GB", bytes / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use policy::Variant;

    use super::*;

    /// SmolLM2 135M: 134,515,008 weights.
    #[test]
    fn memory_is_that_of_weights_moments_and_gradients() {
        let model = ModelConfig {
            vocabulary_size: 49_152,
            max_positions: 128,
            d_model: 576,
            num_layers: 30,
            num_heads: 9,
            num_kv_heads: 3,
            ff_dim: 1_536,
            variant: Variant { tied_head: true, ..Variant::default() },
            adapter: None,
        };
        let weights = 134_515_008;
        assert_eq!(playing_bytes(&model), 4 * weights);
        // Weights, average, two moments, two gradients, an encoded version, and the weights as they are read.
        assert_eq!(training_bytes(&model, 2, 2), 4 * (4 + 2 + 1 + 1) * weights);
        assert_eq!(training_bytes(&model, 1, 8), training_bytes(&model, 2, 2));
        let adapter = Some(policy::Adapter { rank: 16, alpha: 32.0, rslora: false });
        let adapted = ModelConfig { adapter, ..model };
        // The embedding, 49,152 * 576, is there once. In each of 30 layers, A and B have 16 * (576 + 576) weights for queries and
        // outputs each, 16 * (576 + 192) for keys and values each, and 16 * (576 + 1,536) for each of the three others.
        let (embedding, trained) = (28_311_552, 30 * 16 * (2 * 1_152 + 2 * 768 + 3 * 2_112));
        assert_eq!(playing_bytes(&adapted), 8 * weights - 4 * embedding);
        assert_eq!(training_bytes(&adapted, 2, 2), 8 * weights - 4 * embedding + 28 * trained);
    }

    #[test]
    fn a_machine_with_too_little_memory_is_refused() {
        let expect = |needed, has| expect_memory_of(needed, has, "the weights", "; a smaller model needs less");
        assert!(expect(5_000_000_000, None).is_ok() && expect(5, Some(5)).is_ok());
        let refused = expect(5_607_000_000, Some(4_000_000_000)).unwrap_err().to_string();
        let says = "memory: expected 5.61 GB or more for the weights, got 4.00 GB; a smaller model needs less";
        assert_eq!(refused, says);
    }

    #[test]
    fn sizes_are_written_for_people() {
        assert_eq!([999, 538_060_032, 2_152_240_128].map(size), ["1 kB", "538 MB", "2.15 GB"]);
    }
}
