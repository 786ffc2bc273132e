//! One test body for every backend: play and training are compared with the CPU kernels, and these with finite differences.
//! With the feature `cuda` it also runs on the first GPU.

use policy::{
    Backend, BatchScores, ClippedSurrogate, CrossEntropy, Device, Division, Dpo, Draw, Feed, Loss, LossBatch,
    ModelConfig, OptimizerStep, Params, Policy, ReferenceKl, RopeScaling, Scores, Sequence, SequenceSurrogate,
    SurrogateStats, Trainer, TrainingState, Variant, masked_logprob,
};
use proto::{CounterRng, LegalTokens, Purpose, TokenId};

/// Tolerance as a share of the largest value: backends differ in the order of sums and in the last bits of exponentials.
const TOLERANCE: f32 = 3e-5;

fn backends() -> Vec<Backend> {
    let gpu = cfg!(feature = "cuda").then_some(Device::Cuda(0));
    [Device::Cpu, Device::CandleCpu].into_iter().chain(gpu).map(|device| device.open().unwrap()).collect()
}

fn assert_close(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
    assert!(scale > 0.0, "{what}: nothing to compare");
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= TOLERANCE * scale, "{what}[{index}]: expected {expected}, got {got}");
    }
}

/// Returns the config for a number of heads, a number of key-value heads and a head width.
fn config((num_heads, num_kv_heads, head_dim): (usize, usize, usize)) -> ModelConfig {
    ModelConfig {
        vocabulary_size: 24,
        max_positions: 40,
        d_model: num_heads * head_dim,
        num_layers: 2,
        num_heads,
        num_kv_heads,
        ff_dim: 32,
        variant: Variant::default(),
        adapter: None,
    }
}

const SHAPES: [(usize, usize, usize); 3] = [(4, 2, 16), (2, 2, 32), (6, 1, 16)];

/// Returns decoders of every shape, with each switch of a family, and with all of them.
fn configs() -> Vec<ModelConfig> {
    let scaling = RopeScaling { factor: 4.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_positions: 32 };
    let all = Variant {
        head_dim: Some(32),
        qkv_bias: true,
        qk_norm: true,
        tied_head: true,
        rms_norm_eps: 1e-3,
        rope_theta: 50.0,
        rope_scaling: Some(scaling),
        no_rope_layers: vec![1],
        windows: vec![Some(5), None],
    };
    let plain = Variant::default;
    let variants = [
        Variant { head_dim: all.head_dim, ..plain() },
        Variant { qkv_bias: true, ..plain() },
        Variant { qk_norm: true, ..plain() },
        Variant { tied_head: true, ..plain() },
        Variant { rms_norm_eps: all.rms_norm_eps, ..plain() },
        Variant { rope_theta: all.rope_theta, rope_scaling: all.rope_scaling, ..plain() },
        Variant { no_rope_layers: all.no_rope_layers.clone(), windows: all.windows.clone(), ..plain() },
        all,
    ];
    let variants = variants.map(|variant| ModelConfig { variant, ..config(SHAPES[0]) });
    SHAPES.map(config).into_iter().chain(variants).collect()
}

/// Returns sequences of many lengths, with more rows than one chunk holds. Their legal sets differ, and some are the whole
/// vocabulary. Not every position is a choice.
fn sequences() -> Vec<Sequence> {
    (0..24)
        .map(|number| {
            let len = 3 + number * 7 % 35;
            let tokens: Vec<TokenId> = (0..len).map(|index| ((index + number) * 5 % 20) as TokenId).collect();
            let choices = (0..len - 2).filter(|position| (position + number) % 3 != 1).map(|position| {
                let legal = (0..20)
                    .filter(|token| *token == tokens[position + 2] || !(*token as usize + position).is_multiple_of(4))
                    .collect();
                (position, if (position + number) % 7 == 3 { LegalTokens::Any } else { legal })
            });
            Sequence::new(&tokens[..2], &tokens[2..], choices)
        })
        .filter(|sequence| !sequence.chosen.is_empty())
        .collect()
}

/// Returns answers to two prompts that begin alike, in turns: some answers are equal, or begin alike, or are the beginning of
/// another. What they choose from differs even where they are equal.
fn answers() -> Vec<Sequence> {
    let answers: [&[TokenId]; 7] =
        [&[1, 2, 3], &[1, 2, 4, 5, 6], &[1, 2, 3], &[7], &[1, 2, 4], &[8, 1, 2, 9, 10, 11], &[7, 7]];
    (0..14)
        .map(|number| {
            let prompt: Vec<TokenId> =
                (0..30).map(|index| (index * 7 + if index < 26 { 0 } else { number % 2 }) as TokenId % 20).collect();
            let answer = answers[number / 2];
            let choices =
                (0..answer.len()).filter(|position| *position == 0 || (position + number) % 4 != 3).map(|position| {
                    let legal = (0..20)
                        .filter(|token| *token == answer[position] || (*token as usize + number) % 3 != 1)
                        .collect();
                    (position, if number == 3 { LegalTokens::Any } else { legal })
                });
            Sequence::new(&prompt, answer, choices)
        })
        .collect()
}

/// Returns a state whose head is large enough that no gradient is lost in rounding.
fn training(config: &ModelConfig) -> TrainingState {
    let mut state = TrainingState::initial(config, 1);
    sharpen(config, &mut state.weights);
    state
}

/// Scales the head, or the norm before a tied head.
fn sharpen(config: &ModelConfig, weights: &mut Params) {
    let factor = if config.variant.tied_head { 3.0 } else { 20.0 };
    weights.tensors.last_mut().unwrap().iter_mut().for_each(|weight| *weight *= factor);
}

fn trainer(backend: &Backend, config: &ModelConfig, weights: &Params) -> Box<dyn Trainer> {
    let state = TrainingState { weights: weights.clone(), ..training(config) };
    backend.trainer(config, state, Division { num_shards: 3, num_threads: 2 }).unwrap()
}

/// A step whose first moment is exactly the gradient.
const KEEPING: OptimizerStep = OptimizerStep {
    learning_rate: 1e-3,
    beta1: 0.0,
    beta2: 0.0,
    weight_decay: 0.1,
    max_grad_norm: f64::INFINITY,
    average_decay: 0.9,
};

/// Results of a backend on a batch: scores, loss, gradient.
struct Pass {
    scores: BatchScores,
    loss: f64,
    gradient: Params,
}

fn pass(trainer: &mut dyn Trainer, batch: &LossBatch<'_>) -> Pass {
    let scores = trainer.gradients(batch).unwrap();
    trainer.step(&KEEPING).unwrap();
    Pass { loss: batch.value(&scores), gradient: trainer.export().unwrap().first.clone(), scores }
}

/// One loss per sequence.
type Losses = Vec<Box<dyn Loss>>;

fn batch<'a>(sequences: &'a [Sequence], losses: &'a Losses) -> LossBatch<'a> {
    let mut batch = LossBatch::default();
    sequences.iter().zip(losses).for_each(|(sequence, loss)| batch.push([sequence], loss.as_ref()));
    batch
}

fn cross_entropy(sequences: &[Sequence]) -> Losses {
    let weight = |index: usize| [1.0, 0.25, -0.5][index % 3] / sequences.len() as f32;
    (0..sequences.len()).map(|index| Box::new(CrossEntropy { weight: weight(index) }) as Box<dyn Loss>).collect()
}

/// Ratios of 0.61, 1.24, 1.65 and 0.76: with clips at 0.8 and 1.28, good answers are clipped at the third, bad ones at the
/// first and the last. Clips at 0.72 and 1.2 would clip others.
const LOG_RATIOS: [f32; 4] = [-0.5, 0.215, 0.5, -0.275];

/// Returns losses with importance ratios on both sides of both clips (which differ), for good and bad answers of any weight.
fn surrogate(trainer: &dyn Trainer, sequences: &[Sequence], entropy_bonus: f32) -> Vec<ClippedSurrogate> {
    surrogate_of(trainer, sequences, entropy_bonus, |_| 0.0, &LOG_RATIOS)
}

/// Returns losses on tokens of older weights. Some were so improbable there that they count less, or not at all.
fn decoupled(trainer: &dyn Trainer, sequences: &[Sequence]) -> Vec<ClippedSurrogate> {
    let proximal = |token: usize| [0.0, 0.5, 0.8][token % 3];
    surrogate_of(trainer, sequences, 0.1, proximal, &[-0.5, 0.9, 0.215, 2.5, -0.275, 30.0, 4.9])
}

fn surrogate_of(
    trainer: &dyn Trainer,
    sequences: &[Sequence],
    entropy_bonus: f32,
    proximal: fn(usize) -> f32,
    log_ratios: &[f32],
) -> Vec<ClippedSurrogate> {
    let loss = |(index, sequence): (usize, &Sequence)| {
        let logprobs = trainer.logprobs(&[sequence]).unwrap();
        let log_ratio = |token: usize| log_ratios[(index + token) % log_ratios.len()];
        ClippedSurrogate {
            advantages: vec![[0.75, -0.25, -1.5][index % 3]; logprobs.len()],
            behavior_logprobs: logprobs.iter().enumerate().map(|(token, logprob)| logprob - log_ratio(token)).collect(),
            proximal: (0..logprobs.len()).map(proximal).collect(),
            clip_low: 0.2,
            clip_high: 0.28,
            entropy_bonus,
            weight: [1.0, 2.0][index % 2] / sequences.len() as f32,
        }
    };
    sequences.iter().enumerate().map(loss).collect()
}

fn boxed<L: Loss + 'static>(losses: Vec<L>) -> Losses {
    losses.into_iter().map(|loss| Box::new(loss) as Box<dyn Loss>).collect()
}

/// Returns losses whose ratios lie on both sides of both clips, for sequences as a whole: exp of -0.5, 0.2, 0.5 and -0.1.
fn of_sequences(trainer: &dyn Trainer, sequences: &[Sequence]) -> Vec<SequenceSurrogate> {
    let loss = |(index, sequence): (usize, &Sequence)| {
        let logprobs = trainer.logprobs(&[sequence]).unwrap();
        // Of tokens in turns above and below the mean.
        let log_ratio = |token: usize| {
            let is_paired = token / 2 * 2 + 1 < logprobs.len();
            [-0.5, 0.2, 0.5, -0.1][index % 4] + if is_paired { [0.3, -0.3][token % 2] } else { 0.0 }
        };
        SequenceSurrogate {
            advantage: [0.75, -0.25, -1.5][index % 3],
            behavior_logprobs: logprobs.iter().enumerate().map(|(token, logprob)| logprob - log_ratio(token)).collect(),
            proximal: vec![0.0; logprobs.len()],
            clip_low: 0.2,
            clip_high: 0.28,
            entropy_bonus: 0.1,
            weight: [1.0, 2.0][index % 2] / sequences.len() as f32,
        }
    };
    sequences.iter().enumerate().map(loss).collect()
}

/// Returns penalties on the distance to a reference that is above and below the policy, and so far from it that the distance has few
/// rounding errors.
fn reference_kl(trainer: &dyn Trainer, sequences: &[Sequence]) -> Vec<ReferenceKl> {
    let loss = |sequence: &Sequence| {
        let logprobs = trainer.logprobs(&[sequence]).unwrap();
        let reference = logprobs.iter().enumerate().map(|(token, logprob)| logprob - 4.0 * LOG_RATIOS[token % 4]);
        ReferenceKl { reference_logprobs: reference.collect(), weight: 1.0 / sequences.len() as f32 }
    };
    sequences.iter().map(loss).collect()
}

/// Returns preferences for the first of every two sequences.
fn dpo(trainer: &dyn Trainer, sequences: &[Sequence], per_token: bool) -> Losses {
    let reference = |sequence: &Sequence| {
        let logprobs = trainer.logprobs(&[sequence]).unwrap();
        logprobs.iter().enumerate().map(|(token, logprob)| logprob - LOG_RATIOS[token % 4]).collect()
    };
    let loss = |(index, pair): (usize, &[Sequence])| Dpo {
        reference_logprobs: [&pair[0], &pair[1]].map(reference),
        beta: [0.1, 0.2][index % 2],
        per_token,
        weight: [1.0, 0.5][index % 2],
    };
    boxed(sequences.chunks_exact(2).enumerate().map(loss).collect())
}

/// Returns cross-entropy and the surrogate alternately.
fn mixed(trainer: &dyn Trainer, sequences: &[Sequence]) -> Losses {
    let pairs = cross_entropy(sequences).into_iter().zip(boxed(surrogate(trainer, sequences, 0.1)));
    pairs.enumerate().map(|(index, (first, second))| if index % 2 == 0 { first } else { second }).collect()
}

#[test]
fn every_backend_trains_as_the_kernels_do() {
    for config in configs() {
        let kernels = trainer(&Backend::Cpu, &config, &training(&config).weights);
        let sequences = sequences();
        let cases = [
            cross_entropy(&sequences),
            boxed(surrogate(kernels.as_ref(), &sequences, 0.0)),
            boxed(surrogate(kernels.as_ref(), &sequences, 0.5)),
            mixed(kernels.as_ref(), &sequences),
            boxed(decoupled(kernels.as_ref(), &sequences)),
            boxed(of_sequences(kernels.as_ref(), &sequences)),
            boxed(reference_kl(kernels.as_ref(), &sequences)),
        ];
        let preferences = dpo(kernels.as_ref(), &sequences, false);
        let batches = cases.iter().map(|losses| batch(&sequences, losses)).chain([pairs(&sequences, &preferences)]);
        batches.for_each(|batch| expect_as_the_kernels(&config, &batch));
    }
}

/// The kernels compute what these sequences have in common once, other backends do not.
#[test]
fn every_backend_trains_on_answers_to_one_prompt_as_the_kernels_do() {
    for config in configs() {
        let kernels = trainer(&Backend::Cpu, &config, &training(&config).weights);
        let answers = answers();
        let losses = mixed(kernels.as_ref(), &answers);
        expect_as_the_kernels(&config, &batch(&answers, &losses));
        expect_as_the_kernels(&config, &pairs(&answers, &dpo(kernels.as_ref(), &answers, true)));
    }
}

/// Groups sequences by two.
fn pairs<'a>(sequences: &'a [Sequence], losses: &'a Losses) -> LossBatch<'a> {
    let mut pairs = LossBatch::default();
    sequences.chunks_exact(2).zip(losses).for_each(|(pair, loss)| pairs.push(pair, loss.as_ref()));
    pairs
}

/// Fixed weights have the scores that they have in training, on the CPU to the last bit, on any number of threads.
#[test]
fn every_backend_scores_as_the_kernels_do() {
    for config in configs() {
        let weights = training(&config).weights;
        let sequences: Vec<Sequence> = sequences().into_iter().chain(answers()).collect();
        let sequences: Vec<&Sequence> = sequences.iter().collect();
        let expected = trainer(&Backend::Cpu, &config, &weights).logprobs(&sequences).unwrap();
        for num_threads in [1, 3] {
            let scorer = Backend::Cpu.scorer(&config, &weights, num_threads).unwrap();
            assert_eq!(scorer.logprobs(&sequences).unwrap(), expected);
            assert_eq!(scorer.logprobs(&[]).unwrap(), [0.0; 0]);
        }
        for backend in backends() {
            let got = backend.scorer(&config, &weights, 1).unwrap().logprobs(&sequences).unwrap();
            assert_close(&got, &expected, "logprobs");
        }
    }
}

fn expect_as_the_kernels(config: &ModelConfig, batch: &LossBatch<'_>) {
    let weights = training(config).weights;
    for backend in backends() {
        let (mut trainer, mut kernels) =
            (trainer(&backend, config, &weights), trainer(&Backend::Cpu, config, &weights));
        let got = pass(trainer.as_mut(), batch);
        let expected = pass(kernels.as_mut(), batch);
        assert_close(&got.scores.logprobs, &expected.scores.logprobs, "logprobs");
        if expected.scores.entropies.iter().any(|entropy| *entropy != 0.0) {
            assert_close(&got.scores.entropies, &expected.scores.entropies, "entropies");
        }
        assert_eq!(got.scores.entropies.len(), expected.scores.entropies.len());
        assert_close(&[got.loss as f32], &[expected.loss as f32], "loss");
        let tensors = got.gradient.tensors.iter().zip(&expected.gradient.tensors);
        for ((got, expected), spec) in tensors.zip(config.tensors()) {
            assert_close(got, expected, &spec.name);
        }
    }
}

/// Three optimizer steps with persistent moments; the state is exported and loaded again between steps.
#[test]
fn every_backend_steps_as_the_kernels_do() {
    let config = config(SHAPES[0]);
    let sequences = sequences();
    let losses = cross_entropy(&sequences);
    let batch = batch(&sequences, &losses);
    let step = OptimizerStep { beta1: 0.9, beta2: 0.95, max_grad_norm: 0.05, learning_rate: 1e-2, ..KEEPING };
    let run = |backend: &Backend| {
        let mut state = training(&config);
        for _ in 0..3 {
            let mut trainer = backend.trainer(&config, state, Division { num_shards: 1, num_threads: 1 }).unwrap();
            trainer.gradients(&batch).unwrap();
            assert!(trainer.step(&step).unwrap() > step.max_grad_norm, "the gradient is clipped");
            state = trainer.export().unwrap().into_owned();
            assert_eq!((&*trainer.weights().unwrap(), &*trainer.average().unwrap()), (&state.weights, &state.average));
        }
        assert_eq!(state.num_updates, 3);
        state
    };
    let expected = run(&Backend::Cpu);
    for backend in backends() {
        let got = run(&backend);
        for (what, got, expected) in [("first", &got.first, &expected.first), ("second", &got.second, &expected.second)]
        {
            for ((got, expected), spec) in got.tensors.iter().zip(&expected.tensors).zip(config.tensors()) {
                // After the first step the gradients are taken at weights that already differ.
                let scale = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
                let is_close = |(got, expected): (&f32, &f32)| (got - expected).abs() <= 2e-2 * scale;
                assert!(scale > 0.0 && got.iter().zip(expected).all(is_close), "{what} {}", spec.name);
            }
        }
        for (what, got, expected) in
            [("weights", &got.weights, &expected.weights), ("average", &got.average, &expected.average)]
        {
            for ((got, expected), spec) in got.tensors.iter().zip(&expected.tensors).zip(config.tensors()) {
                // A step is as long for a gradient lost in rounding as for any other.
                let num_far =
                    got.iter().zip(expected).filter(|(got, expected)| (*got - *expected).abs() > 1e-3).count();
                assert!(num_far * 100 <= got.len(), "{what} {}: {num_far} of {}", spec.name, got.len());
            }
        }
    }
}

/// A non-finite gradient changes nothing.
#[test]
fn no_backend_follows_what_is_not_finite() {
    let config = config(SHAPES[0]);
    let sequences = sequences();
    let losses: Losses =
        sequences.iter().map(|_| Box::new(CrossEntropy { weight: f32::NAN }) as Box<dyn Loss>).collect();
    for backend in backends() {
        let mut trainer = trainer(&backend, &config, &training(&config).weights);
        let before = trainer.export().unwrap().into_owned();
        trainer.gradients(&batch(&sequences, &losses)).unwrap();
        assert!(trainer.step(&KEEPING).unwrap().is_nan());
        assert_eq!(*trainer.export().unwrap(), before);
    }
}

/// Slots are fed different numbers of tokens (some none), forked, shortened, reset and filled again; then the weights change.
/// However a slot got its tokens, it has the logits of a slot that was fed them all at once, on the CPU to the last bit.
#[test]
fn every_backend_plays_as_the_kernels_do() {
    for config in configs() {
        let tokens: Vec<TokenId> = (0..40).map(|index| index * 7 % 24).collect();
        let [first, second] = [1, 2].map(|seed| {
            let mut params = Params::init(&config, seed);
            sharpen(&config, &mut params);
            params
        });
        let at_once = |weights: &Params, tokens: &[TokenId]| {
            let mut policy = Backend::Cpu.load(&config, weights).unwrap().policy(1).unwrap();
            policy.feed(&[Feed { slot: 0, tokens }]).unwrap();
            policy.logits().unwrap().to_vec()
        };
        for backend in backends() {
            let mut policy = backend.load(&config, &first).unwrap().policy(4).unwrap();
            let expect = |policy: &dyn Policy, weights: &Params, held: &[&[TokenId]], what: &str| {
                let expected: Vec<f32> = held.iter().flat_map(|tokens| at_once(weights, tokens)).collect();
                match backend {
                    Backend::Cpu => assert_eq!(*policy.logits().unwrap(), expected, "{what}"),
                    _ => assert_close(&policy.logits().unwrap(), &expected, what),
                }
            };
            policy.feed(&[Feed { slot: 2, tokens: &tokens[..7] }, Feed { slot: 0, tokens: &tokens[3..4] }]).unwrap();
            expect(policy.as_ref(), &first, &[&tokens[..7], &tokens[3..4]], "prompts");
            policy.feed(&[Feed { slot: 2, tokens: &tokens[7..8] }]).unwrap();
            expect(policy.as_ref(), &first, &[&tokens[..8]], "one of them");
            policy.fork(2, 3, 8).unwrap();
            policy.fork(2, 1, 8).unwrap();
            let branches = [[&tokens[..8], &[5]].concat(), [&tokens[..8], &[9, 2, 11]].concat(), tokens[..9].to_vec()];
            let feeds = [
                Feed { slot: 1, tokens: &branches[0][8..] },
                Feed { slot: 3, tokens: &branches[1][8..] },
                Feed { slot: 2, tokens: &branches[2][8..] },
            ];
            policy.feed(&feeds).unwrap();
            expect(policy.as_ref(), &first, &branches.each_ref().map(Vec::as_slice), "branches");
            policy.reset(2);
            policy.feed(&[Feed { slot: 2, tokens: &tokens }, Feed { slot: 0, tokens: &tokens[4..6] }]).unwrap();
            expect(policy.as_ref(), &first, &[&tokens, &tokens[3..6]], "a slot filled again, to its end");
            // Prefixes within and beyond one block of the CPU's keys, over longer and shorter contents, and none.
            for (from, to, len) in [(2, 0, 17), (2, 3, 5), (0, 1, 16), (2, 2, 33), (3, 3, 0)] {
                policy.fork(from, to, len).unwrap();
            }
            let branches = [(0, 17), (1, 16), (2, 33), (3, 0)].map(|(slot, len)| [&tokens[..len], &[slot, 8]].concat());
            let feeds = branches.iter().enumerate();
            let feeds: Vec<_> =
                feeds.map(|(slot, tokens)| Feed { slot, tokens: &tokens[tokens.len() - 2..] }).collect();
            policy.feed(&feeds).unwrap();
            expect(policy.as_ref(), &first, &branches.each_ref().map(Vec::as_slice), "prefixes");
            policy.set_weights(&backend.load(&config, &second).unwrap()).unwrap();
            policy.feed(&[Feed { slot: 1, tokens: &tokens[..5] }]).unwrap();
            expect(policy.as_ref(), &second, &[&tokens[..5]], "other weights");
        }
    }
}

/// With the same random numbers every backend draws the same tokens, with close log-probabilities: among a few tokens, many, or
/// the whole vocabulary (of no special size), at any temperature.
#[test]
fn every_backend_draws_as_the_kernels_do() {
    let config = ModelConfig { vocabulary_size: 1_000, ..config(SHAPES[0]) };
    let mut weights = Params::init(&config, 3);
    weights.tensors.last_mut().unwrap().iter_mut().for_each(|weight| *weight *= 40.0);
    let few: LegalTokens = [3, 300, 999].into_iter().collect();
    let many: LegalTokens = (0..1_000).filter(|token| token % 7 != 2).collect();
    let asked: Vec<(&LegalTokens, f32)> = [&few, &LegalTokens::Any, &many, &LegalTokens::Any]
        .into_iter()
        .flat_map(|legal| [1.0, 0.0, 0.5].map(|temperature| (legal, temperature)))
        .collect();
    let tokens: Vec<TokenId> = (0..asked.len() as TokenId).map(|index| index * 31 % 1_000).collect();
    let draw = |backend: &Backend, seed: u64| {
        let mut policy = backend.load(&config, &weights).unwrap().policy(asked.len()).unwrap();
        let feeds: Vec<Feed<'_>> = tokens.chunks(1).enumerate().map(|(slot, tokens)| Feed { slot, tokens }).collect();
        policy.feed(&feeds).unwrap();
        let mut rngs: Vec<CounterRng> =
            (0..asked.len() as u64).map(|slot| CounterRng::new(seed, Purpose::Rollout, 0, 0, slot)).collect();
        // Two draws after every other feed, in descending order.
        let feed_of = |number: usize| (asked.len() - 1 - number) / 2 * 2;
        let draws = asked.iter().zip(&mut rngs).enumerate();
        let mut draws: Vec<Draw<'_>> = draws
            .map(|(number, ((legal, temperature), rng))| Draw {
                feed: feed_of(number),
                legal,
                temperature: *temperature,
                rng,
            })
            .collect();
        let drawn = policy.sample(&mut draws).unwrap();
        let logits = policy.logits().unwrap();
        for (number, ((token, logprob), (legal, temperature))) in drawn.iter().zip(&asked).enumerate() {
            let logits = &logits[feed_of(number) * 1_000..][..1_000];
            assert!(legal.contains(*token));
            if *temperature != 0.5 {
                let expected = masked_logprob(logits, legal, *token);
                assert!(
                    (logprob - expected).abs() < 1e-4,
                    "{legal:?} at {temperature}: {logprob}, expected {expected}"
                );
            }
        }
        // Every stream advanced by the same number of draws: its next number is the same too.
        (drawn, rngs.iter_mut().map(CounterRng::next_u64).collect::<Vec<_>>())
    };
    for seed in 0..20 {
        let (expected, rest) = draw(&Backend::Cpu, seed);
        for backend in backends() {
            let (got, got_rest) = draw(&backend, seed);
            assert_eq!(got_rest, rest);
            for ((got, expected), (legal, temperature)) in got.iter().zip(&expected).zip(&asked) {
                assert_eq!(got.0, expected.0, "{legal:?} at {temperature}");
                assert!(
                    (got.1 - expected.1).abs() < 1e-4,
                    "{legal:?} at {temperature}: {got:?}, expected {expected:?}"
                );
            }
        }
    }
}

/// Finite differences of the loss confirm the gradient of every weight tensor, including sign, weights, masks, both clips,
/// entropy, sequences as a whole, a reference, and pairs.
#[test]
fn every_weight_has_the_gradient_of_the_loss() {
    let configs = configs();
    let [plain, .., all] = &configs[..] else { unreachable!("there are several") };
    for config in [plain, all] {
        expect_gradients(config, &sequences());
        expect_gradients(config, &answers());
    }
}

fn expect_gradients(config: &ModelConfig, sequences: &[Sequence]) {
    let mut weights = training(config).weights;
    let kernels = trainer(&Backend::Cpu, config, &weights);
    let cases = [
        cross_entropy(sequences),
        boxed(surrogate(kernels.as_ref(), sequences, 0.0)),
        boxed(surrogate(kernels.as_ref(), sequences, 0.5)),
        boxed(of_sequences(kernels.as_ref(), sequences)),
        boxed(reference_kl(kernels.as_ref(), sequences)),
    ];
    let preferences = [false, true].map(|per_token| dpo(kernels.as_ref(), sequences, per_token));
    let batches = cases.iter().map(|losses| batch(sequences, losses));
    for batch in batches.chain(preferences.iter().map(|losses| pairs(sequences, losses))) {
        let pass = |weights: &Params| pass(trainer(&Backend::Cpu, config, weights).as_mut(), &batch);
        let Pass { scores, gradient, .. } = pass(&weights);
        let trainer = trainer(&Backend::Cpu, config, &weights);
        assert_eq!(scores.logprobs, trainer.logprobs(batch.sequences()).unwrap());
        for (index, spec) in config.tensors().iter().enumerate() {
            let gradient = &gradient.tensors[index];
            // Along the gradient, the slope of the loss is the gradient's norm.
            let norm: f64 = gradient.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 1e-3, "{}: gradient {norm}", spec.name);
            let original = weights.tensors[index].clone();
            let mut shifted = |by: f64| {
                for ((weight, original), slope) in weights.tensors[index].iter_mut().zip(&original).zip(gradient) {
                    *weight = original + (by / norm * f64::from(*slope)) as f32;
                }
                pass(&weights).loss
            };
            // Steep gradients get a short step, so that no ratio crosses its clip.
            let step = 1e-2 / norm.max(1.0);
            let difference = (shifted(step) - shifted(-step)) / (2.0 * step);
            weights.tensors[index] = original;
            assert!((difference / norm - 1.0).abs() < 1e-2, "{}: gradient {norm}, difference {difference}", spec.name);
        }
    }
}

/// The surrogate reports the right statistics for known ratios.
#[test]
fn clipped_tokens_and_ratios_are_counted() {
    let config = config(SHAPES[0]);
    let trainer = trainer(&Backend::Cpu, &config, &training(&config).weights);
    let sequences = sequences();
    let (mut num_tokens, mut num_clipped, mut sum_ratio) = (0, 0, 0.0);
    for (index, sequence) in sequences.iter().enumerate() {
        for token in 0..sequence.chosen.len() {
            let case = (index + token) % 4;
            num_tokens += 1;
            let is_good = index % 3 == 0;
            num_clipped += u64::from(if is_good { case == 2 } else { case == 0 || case == 3 });
            sum_ratio += f64::from(LOG_RATIOS[case]).exp();
        }
    }
    let losses = surrogate(trainer.as_ref(), &sequences, 0.0);
    let mut stats = SurrogateStats::default();
    for (sequence, loss) in sequences.iter().zip(&losses) {
        let logprobs = trainer.logprobs(&[sequence]).unwrap();
        stats.add(&loss.stats(Scores { logprobs: &logprobs, entropies: &vec![0.0; logprobs.len()] }));
    }
    assert_eq!((stats.num_tokens, stats.num_clipped), (num_tokens, num_clipped));
    assert!((stats.sum_importance_ratio - sum_ratio).abs() < 1e-3, "expected {sum_ratio}, got {stats:?}");
}
