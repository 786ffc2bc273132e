use std::sync::Arc;

use anyhow::Result;
use policy::kernels::{AdamWStep, adamw, multiply_adds};
use policy::{Decoder, Device, Feed, Model, ModelConfig, Objective, PackedWeights, Params, Sequence, sample};
use proto::{CounterRng, LegalTokens, Purpose, TokenId};
use tokio::time::Instant;

use super::peer::Peer;
use super::{Args, Report, Row, Spread};

/// Something that the network does, and that the peer does too.
pub(super) trait Workload {
    /// Does it once and gives the number of tokens.
    fn run(&mut self) -> Result<usize>;

    /// Floating-point operations a token in matrix products with weights.
    fn operations_per_token(&self) -> f64;
}

/// Measures a workload, the machine's peak and the peer in turn.
pub(super) fn measure(args: &Args, workload: &mut dyn Workload) -> Result<Report> {
    let mut peer = args.peer.then(|| Peer::start(args)).transpose()?;
    let (mut ours, mut peaks, mut theirs) = (Vec::new(), Vec::new(), Vec::<Vec<(String, f64)>>::new());
    // The first round warms up: buffers, caches, what the peer compiles.
    for round in 0..=args.repeats {
        let start = Instant::now();
        let num_tokens = workload.run()?;
        let rate = num_tokens as f64 / start.elapsed().as_secs_f64();
        let peak = peak(args.num_threads());
        let peer_rates = peer.as_mut().map(Peer::round).transpose()?;
        if round > 0 {
            ours.push(rate);
            peaks.push(peak);
            theirs.extend(peer_rates);
        }
    }
    let operations = workload.operations_per_token();
    let shares = ours.iter().zip(&peaks).map(|(rate, peak)| rate * operations / peak);
    let mut rows = vec![Row {
        name: "autodidact f32".to_owned(),
        unit: "tokens",
        per_second: Spread::of(ours.iter().copied()),
        gflops: Some(Spread::of(ours.iter().map(|rate| rate * operations / 1e9))),
        share_of_peak: Some(Spread::of(shares)),
        ratio: None,
    }];
    for (mode, (name, _)) in theirs.first().into_iter().flatten().enumerate() {
        let rates = theirs.iter().map(|round| round[mode].1);
        rows.push(Row {
            name: format!("PyTorch {name}"),
            unit: "tokens",
            per_second: Spread::of(rates.clone()),
            gflops: None,
            share_of_peak: None,
            ratio: Some(Spread::of(ours.iter().zip(rates).map(|(ours, theirs)| ours / theirs))),
        });
    }
    let peak_gflops = Some(Spread::of(peaks.iter().map(|peak| peak / 1e9)));
    Ok(Report { peak_gflops, peer_version: peer.map(|peer| peer.version.clone()), ..args.report(rows) })
}

/// A fifth of a second's work where vectors are long.
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

impl Args {
    pub(super) fn prompt(&self) -> usize {
        self.positions / 6
    }

    pub(super) fn model(&self) -> ModelConfig {
        ModelConfig {
            vocabulary_size: 64,
            max_positions: self.positions,
            d_model: self.d_model,
            num_layers: if self.d_model < 256 { 4 } else { 6 },
            num_heads: 4,
            num_kv_heads: 4,
            ff_dim: 3 * self.d_model,
        }
    }
}

pub(super) struct Training {
    model: Model,
    config: ModelConfig,
    params: Params,
    moments: (Params, Params),
    sequences: Vec<Sequence>,
    num_threads: usize,
}

impl Training {
    pub(super) fn new(args: &Args) -> Result<Training> {
        let config = args.model();
        let mask: LegalTokens = (0..config.vocabulary_size as TokenId).collect();
        let mut rng = CounterRng::new(0, Purpose::Replay, 0, 0, 0);
        let mut sequence = || {
            let mut draw = || rng.below(config.vocabulary_size as u64) as TokenId;
            let tokens: Vec<TokenId> = (0..=config.max_positions).map(|_| draw()).collect();
            Sequence::new(
                &tokens[..1],
                &tokens[1..],
                (0..config.max_positions).map(|position| (position, mask.clone())),
            )
        };
        Ok(Training {
            model: Model::new(&config, Device::Cpu)?,
            params: Params::init(&config, 0),
            moments: (Params::zeros(&config), Params::zeros(&config)),
            sequences: (0..args.batch).map(|_| sequence()).collect(),
            num_threads: args.num_threads(),
            config,
        })
    }
}

impl Workload for Training {
    /// One step as the learner does it: a shard a thread, gradients added in order, AdamW.
    fn run(&mut self) -> Result<usize> {
        let loaded = self.model.load(&self.params)?;
        let sequences: Vec<&Sequence> = self.sequences.iter().collect();
        let num_tokens: usize = sequences.iter().map(|sequence| sequence.tokens.len()).sum();
        let objectives = vec![Objective::CrossEntropy { weight: 1.0 / num_tokens as f32 }; sequences.len()];
        let shard_len = sequences.len().div_ceil(self.num_threads);
        let shards = std::thread::scope(|scope| {
            let shards = sequences.chunks(shard_len).zip(objectives.chunks(shard_len));
            let threads: Vec<_> =
                shards.map(|(sequences, objectives)| scope.spawn(|| loaded.gradients(sequences, objectives))).collect();
            threads.into_iter().map(|thread| thread.join().expect("arithmetic does not panic")).collect::<Vec<_>>()
        });
        let mut gradient: Option<Params> = None;
        for shard in shards {
            let shard = shard?.params;
            match &mut gradient {
                Some(sum) => sum.add(&shard),
                None => gradient = Some(shard),
            }
        }
        let gradient = gradient.expect("there is a sequence");
        let step = AdamWStep { beta1: 0.9, beta2: 0.99, step_size: 1e-3, inverse_root: 1.0, keep: 1.0, clip: 1.0 };
        let moments = self.moments.0.tensors.iter_mut().zip(&mut self.moments.1.tensors);
        let tensors = self.params.tensors.iter_mut().zip(&gradient.tensors).zip(moments);
        for ((weights, gradient), (first, second)) in tensors {
            adamw(weights, gradient, first, second, step);
        }
        Ok(num_tokens)
    }

    fn operations_per_token(&self) -> f64 {
        // Forward, and backward for inputs and for weights.
        3.0 * forward_operations(&self.config)
    }
}

pub(super) struct Decoding {
    decoders: Vec<Decoder>,
    batch: usize,
    prompt: Vec<TokenId>,
    positions: usize,
    config: ModelConfig,
}

impl Decoding {
    pub(super) fn new(args: &Args) -> Result<Decoding> {
        let config = args.model();
        let weights = Arc::new(PackedWeights::new(&config, &Params::init(&config, 0))?);
        let num_slots = args.batch.div_ceil(args.num_threads());
        Ok(Decoding {
            decoders: (0..args.num_threads()).map(|_| Decoder::new(weights.clone(), num_slots)).collect(),
            batch: num_slots * args.num_threads(),
            prompt: (0..args.prompt() as TokenId).map(|token| token % 64).collect(),
            positions: args.positions,
            config,
        })
    }
}

impl Workload for Decoding {
    fn run(&mut self) -> Result<usize> {
        let (prompt, positions) = (&self.prompt, self.positions);
        let slots_per_thread = self.batch / self.decoders.len();
        std::thread::scope(|scope| {
            for decoder in &mut self.decoders {
                scope.spawn(move || decode(decoder, slots_per_thread, prompt, positions));
            }
        });
        Ok(self.batch * (self.positions - self.prompt.len()))
    }

    fn operations_per_token(&self) -> f64 {
        // Of the prompt nothing is counted: it is no new token.
        forward_operations(&self.config)
    }
}

/// Fills every slot from the prompt to the last position.
fn decode(decoder: &mut Decoder, num_slots: usize, prompt: &[TokenId], positions: usize) {
    let vocabulary_size = decoder.config().vocabulary_size;
    let mask: LegalTokens = (0..vocabulary_size as TokenId).collect();
    let mut rngs: Vec<CounterRng> =
        (0..num_slots as u64).map(|slot| CounterRng::new(0, Purpose::Rollout, 0, 0, slot)).collect();
    let mut pending = vec![prompt.to_vec(); num_slots];
    (0..num_slots).for_each(|slot| decoder.reset(slot));
    for _ in prompt.len()..positions {
        let feeds: Vec<Feed<'_>> = pending.iter().enumerate().map(|(slot, tokens)| Feed { slot, tokens }).collect();
        let logits = decoder.forward(&feeds);
        let drawn: Vec<TokenId> = logits
            .chunks_exact(vocabulary_size)
            .zip(&mut rngs)
            .map(|(logits, rng)| sample(logits, &mask, 1.0, rng).0)
            .collect();
        pending = drawn.into_iter().map(|token| vec![token]).collect();
    }
}

/// Operations of one token in the matrix products with weights, forward.
fn forward_operations(config: &ModelConfig) -> f64 {
    let is_product = |name: &str| !name.starts_with("embed");
    let matrices = config.tensors().into_iter().filter(|spec| spec.shape.len() == 2 && is_product(&spec.name));
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
        };
        let block = 32 * 96 + 32 * 32 + 32 * 192 + 96 * 32;
        assert_eq!(forward_operations(&config), f64::from(2 * (2 * block + 32 * 64)));
    }
}
