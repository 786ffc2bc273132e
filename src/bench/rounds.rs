//! Rounds that measure a workload, the machine's peak, and peers in turn.

use anyhow::Result;
use policy::cpu::kernels::multiply_adds;
use policy::{Device, ModelConfig};
use tokio::time::Instant;

use super::memory::peak_memory;
use super::peer::{Peer, Program};
use super::{Args, Report, Row, Spread};

/// A workload that both our network and its peers run.
pub(super) trait Workload {
    /// Runs the workload once and returns the number of units.
    fn run(&mut self) -> Result<usize>;

    /// Returns the name of the units.
    fn unit(&self) -> &'static str {
        "tokens"
    }

    /// Returns the floating-point operations per unit in matrix products with weights.
    fn operations_per_unit(&self) -> f64;

    /// Returns the programs that run the same workload.
    fn peers(&self) -> &[Program];
}

/// Measures a workload, the machine's peak and, with `--peer`, the peers in turn.
pub(super) fn measure(args: &Args, workload: &mut dyn Workload) -> Result<Report> {
    let programs = if args.peer { workload.peers() } else { &[] };
    let mut peers = programs.iter().map(|program| Peer::start(&args.python, program)).collect::<Result<Vec<_>>>()?;
    let (mut ours, mut peaks, mut theirs) = (Vec::new(), Vec::new(), Vec::<Vec<(String, f64)>>::new());
    // The first round is a warm-up for buffers, caches and the peers' compilation.
    for round in 0..=args.repeats {
        let start = Instant::now();
        let num_units = workload.run()?;
        let rate = num_units as f64 / start.elapsed().as_secs_f64();
        let peak = peak(args.num_threads());
        let peer_rates = peers.iter_mut().map(Peer::round).collect::<Result<Vec<_>>>()?.concat();
        if round > 0 {
            ours.push(rate);
            peaks.push(peak);
            theirs.push(peer_rates);
        }
    }
    let (unit, operations) = (workload.unit(), workload.operations_per_unit());
    let shares = ours.iter().zip(&peaks).map(|(rate, peak)| rate * operations / peak);
    // The peak is that of so many threads of the processor; candle has its own.
    let is_of_kernels = args.device == Device::Cpu;
    let mut rows = vec![Row {
        name: format!("autodidact f32, {}", args.device),
        unit,
        per_second: Spread::of(ours.iter().copied()),
        gflops: Some(Spread::of(ours.iter().map(|rate| rate * operations / 1e9))),
        share_of_peak: is_of_kernels.then(|| Spread::of(shares)),
        ratio: None,
    }];
    for (mode, (name, _)) in theirs[0].iter().enumerate() {
        let rates = theirs.iter().map(|round| round[mode].1);
        rows.push(Row {
            name: name.clone(),
            unit,
            per_second: Spread::of(rates.clone()),
            gflops: None,
            share_of_peak: None,
            ratio: Some(Spread::of(ours.iter().zip(rates).map(|(ours, theirs)| ours / theirs))),
        });
    }
    Ok(Report {
        peak_gflops: Some(Spread::of(peaks.iter().map(|peak| peak / 1e9))),
        peer_versions: peers.into_iter().map(|peer| peer.version.clone()).collect(),
        peak_memory_bytes: peak_memory(),
        ..args.report(rows)
    })
}

/// About 0.2 s of work on a machine with long vectors.
const PEAK_ROUNDS: usize = 50_000_000;

/// Measures multiply-adds in registers on all threads, in operations per second.
fn peak(num_threads: usize) -> f64 {
    let start = Instant::now();
    let operations: f64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..num_threads).map(|_| scope.spawn(|| multiply_adds(PEAK_ROUNDS))).collect();
        threads.into_iter().map(|thread| thread.join().expect("arithmetic does not panic")).sum()
    });
    operations / start.elapsed().as_secs_f64()
}

/// Returns the operations per token in matrix products with weights in the forward pass.
pub(super) fn forward_operations(config: &ModelConfig) -> f64 {
    block_operations(config) + 2.0 * (config.d_model * config.vocabulary_size) as f64
}

/// Returns the same without the head.
pub(super) fn block_operations(config: &ModelConfig) -> f64 {
    let is_of_block = |name: &str| !name.starts_with("embed") && !name.starts_with("head");
    let matrices = config.tensors().into_iter().filter(|spec| spec.shape.len() == 2 && is_of_block(&spec.name));
    2.0 * matrices.map(|spec| spec.num_elements() as f64).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: two blocks of 32 wide layers and a head of 64 tokens.
    #[test]
    fn operations_are_those_of_the_weights() {
        let config = ModelConfig {
            vocabulary_size: 64,
            max_positions: 16,
            d_model: 32,
            num_layers: 2,
            num_heads: 2,
            num_kv_heads: 2,
            ff_dim: 96,
            variant: policy::Variant::default(),
            adapter: None,
        };
        let block = 32 * 96 + 32 * 32 + 32 * 192 + 96 * 32;
        assert_eq!(forward_operations(&config), f64::from(2 * (2 * block + 32 * 64)));
    }
}
