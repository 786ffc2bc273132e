use anyhow::Result;
use policy::cpu::kernels::multiply_adds;
use policy::{
    CrossEntropy, Device, Division, Draw, Feed, LossBatch, ModelConfig, OptimizerStep, Params, Policy, Sequence,
    Trainer, TrainingState,
};
use proto::{CounterRng, LegalTokens, Purpose, TokenId};
use tokio::time::Instant;

use super::peer::Peer;
use super::{Args, Report, Row, Spread};

/// A workload that both our network and the peer run.
pub(super) trait Workload {
    /// Runs the workload once and returns the number of tokens.
    fn run(&mut self) -> Result<usize>;

    /// Returns the floating-point operations per token in matrix products with weights.
    fn operations_per_token(&self) -> f64;
}

/// Measures a workload, the machine's peak and the peer in turn.
pub(super) fn measure(args: &Args, workload: &mut dyn Workload) -> Result<Report> {
    let mut peer = args.peer.then(|| Peer::start(args)).transpose()?;
    let (mut ours, mut peaks, mut theirs) = (Vec::new(), Vec::new(), Vec::<Vec<(String, f64)>>::new());
    // The first round is a warm-up for buffers, caches and the peer's compilation.
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
    // The peak is that of so many threads of the processor; candle has its own.
    let is_of_kernels = args.device == Device::Cpu;
    let mut rows = vec![Row {
        name: format!("autodidact f32, {}", args.device),
        unit: "tokens",
        per_second: Spread::of(ours.iter().copied()),
        gflops: Some(Spread::of(ours.iter().map(|rate| rate * operations / 1e9))),
        share_of_peak: is_of_kernels.then(|| Spread::of(shares)),
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
            variant: policy::Variant::default(),
            adapter: None,
        }
    }
}

pub(super) struct Training {
    trainer: Box<dyn Trainer>,
    config: ModelConfig,
    sequences: Vec<Sequence>,
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
        let num_threads = args.num_threads();
        let backend = args.device.open()?;
        let division = Division { num_shards: backend.num_playing_threads(num_threads), num_threads };
        Ok(Training {
            trainer: backend.trainer(&config, TrainingState::initial(&config, 0), division)?,
            sequences: (0..args.batch).map(|_| sequence()).collect(),
            config,
        })
    }
}

impl Workload for Training {
    /// Runs one step as the learner does: one shard per thread, gradients added in order, AdamW.
    fn run(&mut self) -> Result<usize> {
        let num_tokens: usize = self.sequences.iter().map(|sequence| sequence.tokens.len()).sum();
        let loss = CrossEntropy { weight: 1.0 / num_tokens as f32 };
        let mut batch = LossBatch::default();
        self.sequences.iter().for_each(|sequence| batch.push([sequence], &loss));
        self.trainer.gradients(&batch)?;
        self.trainer.step(&OptimizerStep {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.99,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            average_decay: 0.99,
        })?;
        Ok(num_tokens)
    }

    fn operations_per_token(&self) -> f64 {
        // One forward pass, and two products in the backward pass: for inputs and for weights.
        3.0 * forward_operations(&self.config)
    }
}

pub(super) struct Decoding {
    policies: Vec<Box<dyn Policy>>,
    batch: usize,
    prompt: Vec<TokenId>,
    positions: usize,
    config: ModelConfig,
}

impl Decoding {
    pub(super) fn new(args: &Args) -> Result<Decoding> {
        let config = args.model();
        let backend = args.device.open()?;
        let weights = backend.load(&config, &Params::init(&config, 0))?;
        let num_threads = backend.num_playing_threads(args.num_threads());
        let num_slots = args.batch.div_ceil(num_threads);
        Ok(Decoding {
            policies: (0..num_threads).map(|_| weights.policy(num_slots)).collect::<Result<_, _>>()?,
            batch: num_slots * num_threads,
            prompt: (0..args.prompt() as TokenId).map(|token| token % 64).collect(),
            positions: args.positions,
            config,
        })
    }
}

impl Workload for Decoding {
    fn run(&mut self) -> Result<usize> {
        let (prompt, positions) = (&self.prompt, self.positions);
        let slots_per_thread = self.batch / self.policies.len();
        std::thread::scope(|scope| {
            let decode = |policy| scope.spawn(move || decode(policy, slots_per_thread, prompt, positions));
            let threads: Vec<_> = self.policies.iter_mut().map(|policy| decode(policy.as_mut())).collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("decoding does not panic"))
        })?;
        Ok(self.batch * (self.positions - self.prompt.len()))
    }

    fn operations_per_token(&self) -> f64 {
        // Prompt tokens are not counted: they are not newly generated.
        forward_operations(&self.config)
    }
}

/// Fills every slot from the prompt to the last position.
fn decode(
    policy: &mut dyn Policy,
    num_slots: usize,
    prompt: &[TokenId],
    positions: usize,
) -> Result<(), policy::Error> {
    let legal: LegalTokens = (0..policy.config().vocabulary_size as TokenId).collect();
    let mut rngs: Vec<CounterRng> =
        (0..num_slots as u64).map(|slot| CounterRng::new(0, Purpose::Rollout, 0, 0, slot)).collect();
    let mut pending = vec![prompt.to_vec(); num_slots];
    (0..num_slots).for_each(|slot| policy.reset(slot));
    for _ in prompt.len()..positions {
        let feeds: Vec<Feed<'_>> = pending.iter().enumerate().map(|(slot, tokens)| Feed { slot, tokens }).collect();
        policy.feed(&feeds)?;
        let mut draws: Vec<Draw<'_>> = rngs
            .iter_mut()
            .enumerate()
            .map(|(feed, rng)| Draw { feed, legal: &legal, temperature: 1.0, rng })
            .collect();
        pending = policy.sample(&mut draws)?.into_iter().map(|(token, _)| vec![token]).collect();
    }
    Ok(())
}

/// Returns the operations per token in matrix products with weights in the forward pass.
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
            variant: policy::Variant::default(),
            adapter: None,
        };
        let block = 32 * 96 + 32 * 32 + 32 * 192 + 96 * 32;
        assert_eq!(forward_operations(&config), f64::from(2 * (2 * block + 32 * 64)));
    }
}
