//! Networks of random weights that read symbols.

use anyhow::Result;
use policy::{
    CrossEntropy, Division, Draw, Feed, LossBatch, ModelConfig, OptimizerStep, Params, Policy, Sequence, Trainer,
    TrainingState,
};
use proto::{CounterRng, LegalTokens, Purpose, TokenId};

use super::Args;
use super::peer::Program;
use super::rounds::{Workload, forward_operations};

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

/// The same network in PyTorch.
fn torch(args: &Args, what: &str) -> Vec<Program> {
    let config = args.model();
    let numbers = [
        ("vocabulary-size", config.vocabulary_size),
        ("positions", args.positions),
        ("prompt", args.prompt()),
        ("d-model", config.d_model),
        ("num-layers", config.num_layers),
        ("num-heads", config.num_heads),
        ("ff-dim", config.ff_dim),
        ("batch", args.batch),
        ("threads", args.num_threads()),
    ];
    let numbers = numbers.iter().flat_map(|(name, number)| [format!("--{name}"), number.to_string()]);
    vec![Program {
        name: "PyTorch",
        source: include_str!("../../tests/peers/torch_tiny.py"),
        arguments: [what.to_owned()].into_iter().chain(numbers).collect(),
        input: None,
    }]
}

pub(super) struct Training {
    trainer: Box<dyn Trainer>,
    config: ModelConfig,
    sequences: Vec<Sequence>,
    peers: Vec<Program>,
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
            peers: torch(args, "train"),
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

    fn operations_per_unit(&self) -> f64 {
        // One forward pass, and two products in the backward pass: for inputs and for weights.
        3.0 * forward_operations(&self.config)
    }

    fn peers(&self) -> &[Program] {
        &self.peers
    }
}

pub(super) struct Decoding {
    policies: Vec<Box<dyn Policy>>,
    batch: usize,
    prompt: Vec<TokenId>,
    positions: usize,
    config: ModelConfig,
    peers: Vec<Program>,
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
            peers: torch(args, "decode"),
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

    fn operations_per_unit(&self) -> f64 {
        // Prompt tokens are not counted: they are not newly generated.
        forward_operations(&self.config)
    }

    fn peers(&self) -> &[Program] {
        &self.peers
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
