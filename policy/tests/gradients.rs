//! The kernels' network against candle's autograd and against finite differences.

use candle_core::Device;
use policy::{DeviceKind, Loss, Model, ModelConfig, Objective, Params, PolicyGradient, Role, Sequence, SurrogateLoss};
use proto::{LegalTokens, TokenId};

fn assert_close(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
    assert!(scale > 0.0, "{what}: nothing to compare");
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= 3e-5 * scale, "{what}[{index}]: expected {expected}, got {got}");
    }
}

/// By number of heads, key-value heads and width of a head.
fn config((num_heads, num_kv_heads, head_dim): (usize, usize, usize)) -> ModelConfig {
    ModelConfig {
        vocabulary_size: 24,
        max_positions: 40,
        d_model: num_heads * head_dim,
        num_layers: 2,
        num_heads,
        num_kv_heads,
        ff_dim: 32,
    }
}

const SHAPES: [(usize, usize, usize); 3] = [(4, 2, 16), (2, 2, 32), (6, 1, 16)];

/// Of many lengths, more rows than one chunk holds, with masks that differ and choices that are not at every position.
fn sequences() -> Vec<Sequence> {
    (0..24)
        .map(|number| {
            let len = 3 + number * 7 % 35;
            let tokens: Vec<TokenId> = (0..len).map(|index| ((index + number) * 5 % 20) as TokenId).collect();
            let choices = (0..len - 2).filter(|position| (position + number) % 3 != 1).map(|position| {
                let mask: LegalTokens = (0..20)
                    .filter(|token| *token == tokens[position + 2] || !(*token as usize + position).is_multiple_of(4))
                    .collect();
                (position, mask)
            });
            Sequence::new(&tokens[..2], &tokens[2..], choices)
        })
        .filter(|sequence| !sequence.chosen.is_empty())
        .collect()
}

/// Weights whose head is large enough that no gradient is lost in rounding.
fn params(config: &ModelConfig) -> Params {
    let mut params = Params::init(config, 1);
    params.tensors.last_mut().unwrap().iter_mut().for_each(|weight| *weight *= 20.0);
    params
}

fn cross_entropy(sequences: &[Sequence]) -> Vec<Objective> {
    let weight = |index: usize| [1.0, 0.25, -0.5][index % 3] / sequences.len() as f32;
    (0..sequences.len()).map(|index| Objective::CrossEntropy { weight: weight(index) }).collect()
}

/// Ratios of 0.61, 1.24, 1.65 and 0.76: with clips at 0.8 and 1.28, good answers are clipped at the third, bad ones at the
/// first and the last. Clips at 0.72 and 1.2 would clip others.
const LOG_RATIOS: [f32; 4] = [-0.5, 0.215, 0.5, -0.275];

/// Importance ratios on either side of both clips, which differ, by turns, for good and bad answers of any weight.
fn policy_gradient(model: &Model, params: &Params, sequences: &[Sequence], entropy_bonus: f32) -> Vec<Objective> {
    policy_gradient_of(model, params, sequences, entropy_bonus, |_| 0.0, &LOG_RATIOS)
}

/// Tokens that were drawn by older weights, some so much less probable there that they count less, or not at all.
fn decoupled(model: &Model, params: &Params, sequences: &[Sequence]) -> Vec<Objective> {
    let proximal = |token: usize| [0.0, 0.5, 0.8][token % 3];
    policy_gradient_of(model, params, sequences, 0.1, proximal, &[-0.5, 0.9, 0.215, 2.5, -0.275, 30.0, 4.9])
}

fn policy_gradient_of(
    model: &Model,
    params: &Params,
    sequences: &[Sequence],
    entropy_bonus: f32,
    proximal: fn(usize) -> f32,
    log_ratios: &[f32],
) -> Vec<Objective> {
    let loaded = model.load(params).unwrap();
    let objective = |(index, sequence): (usize, &Sequence)| {
        let logprobs = loaded.logprobs(&[sequence]).unwrap();
        let log_ratio = |token: usize| log_ratios[(index + token) % log_ratios.len()];
        Objective::PolicyGradient(PolicyGradient {
            role: [Role::Solver, Role::Proposer][index / 2 % 2],
            advantage: [0.75, -0.25, -1.5][index % 3],
            behavior_logprobs: logprobs.iter().enumerate().map(|(token, logprob)| logprob - log_ratio(token)).collect(),
            proximal: (0..logprobs.len()).map(proximal).collect(),
            clip_low: 0.2,
            clip_high: 0.28,
            entropy_bonus,
            weight: [1.0, 2.0][index % 2] / sequences.len() as f32,
        })
    };
    sequences.iter().enumerate().map(objective).collect()
}

/// Cross-entropy and the policy gradient by turns.
fn mixed(model: &Model, params: &Params, sequences: &[Sequence]) -> Vec<Objective> {
    let pairs = cross_entropy(sequences).into_iter().zip(policy_gradient(model, params, sequences, 0.1));
    pairs.enumerate().map(|(index, (first, second))| if index % 2 == 0 { first } else { second }).collect()
}

/// Where the network in candle operations is tried: on the CPU, and with the feature `cuda` on the GPU too.
fn devices() -> Vec<Device> {
    let gpu = cfg!(feature = "cuda").then(|| DeviceKind::Cuda.open().unwrap());
    std::iter::once(Device::Cpu).chain(gpu).collect()
}

#[test]
fn kernels_agree_with_candle() {
    for shape in SHAPES {
        let config = config(shape);
        let params = params(&config);
        let kernels = Model::new(&config, Device::Cpu).unwrap();
        let sequences = sequences();
        let objectives = [
            cross_entropy(&sequences),
            policy_gradient(&kernels, &params, &sequences, 0.0),
            policy_gradient(&kernels, &params, &sequences, 0.5),
            mixed(&kernels, &params, &sequences),
            decoupled(&kernels, &params, &sequences),
        ];
        for (device, objectives) in devices().iter().flat_map(|device| objectives.iter().map(move |it| (device, it))) {
            let candle = Model::reference(&config, device.clone()).unwrap();
            let sequences: Vec<&Sequence> = sequences.iter().collect();
            let got = kernels.load(&params).unwrap().gradients(&sequences, objectives).unwrap();
            let expected = candle.load(&params).unwrap().gradients(&sequences, objectives).unwrap();
            assert_close(&got.logprobs, &expected.logprobs, "logprobs");
            assert_close(&[got.loss.total() as f32], &[expected.loss.total() as f32], "loss");
            let counts =
                |loss: Loss| [loss.solver, loss.proposer].map(|of_role| (of_role.num_clipped, of_role.num_truncated));
            assert_eq!(counts(got.loss), counts(expected.loss));
            for ((spec, got), expected) in
                config.tensors().iter().zip(&got.params.tensors).zip(&expected.params.tensors)
            {
                assert_close(got, expected, &spec.name);
            }
        }
    }
}

/// Every weight tensor gets a gradient that finite differences of the loss confirm: sign, weights, masks, both clips and the
/// entropy included.
#[test]
fn every_weight_has_the_gradient_of_the_loss() {
    let config = config(SHAPES[0]);
    let mut params = params(&config);
    let model = Model::new(&config, Device::Cpu).unwrap();
    let sequences = sequences();
    for objectives in [
        cross_entropy(&sequences),
        policy_gradient(&model, &params, &sequences, 0.0),
        policy_gradient(&model, &params, &sequences, 0.5),
    ] {
        let sequences: Vec<&Sequence> = sequences.iter().collect();
        let pass = |params: &Params| model.load(params).unwrap().gradients(&sequences, &objectives).unwrap();
        let gradients = pass(&params);
        assert_eq!(gradients.logprobs, model.load(&params).unwrap().logprobs(&sequences).unwrap());
        for (index, spec) in config.tensors().iter().enumerate() {
            let gradient = &gradients.params.tensors[index];
            // Along the gradient the loss changes by its norm.
            let norm: f64 = gradient.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 1e-3, "{}: gradient {norm}", spec.name);
            let original = params.tensors[index].clone();
            let mut shifted = |by: f64| {
                for ((weight, original), slope) in params.tensors[index].iter_mut().zip(&original).zip(gradient) {
                    *weight = original + (by / norm * f64::from(*slope)) as f32;
                }
                pass(&params).loss.total()
            };
            // Steep ones get a short step, so that no ratio crosses its clip.
            let step = 1e-2 / norm.max(1.0);
            let difference = (shifted(step) - shifted(-step)) / (2.0 * step);
            params.tensors[index] = original;
            assert!((difference / norm - 1.0).abs() < 1e-2, "{}: gradient {norm}, difference {difference}", spec.name);
        }
    }
}

/// Figures that the policy gradient reports, for ratios that are known.
#[test]
fn clipped_tokens_and_ratios_are_counted() {
    let config = config(SHAPES[0]);
    let params = params(&config);
    let model = Model::new(&config, Device::Cpu).unwrap();
    let sequences = sequences();
    let objectives = policy_gradient(&model, &params, &sequences, 0.0);
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
    let sequences: Vec<&Sequence> = sequences.iter().collect();
    let loss = model.load(&params).unwrap().gradients(&sequences, &objectives).unwrap().loss;
    let sum = |count: fn(&SurrogateLoss) -> u64| count(&loss.solver) + count(&loss.proposer);
    assert_eq!((sum(|it| it.num_tokens), sum(|it| it.num_clipped)), (num_tokens, num_clipped));
    assert!(loss.solver.num_tokens > 0 && loss.proposer.num_tokens > 0, "{loss:?}");
    let got_ratio = loss.solver.sum_importance_ratio + loss.proposer.sum_importance_ratio;
    assert!((got_ratio - sum_ratio).abs() < 1e-3, "expected {sum_ratio}, got {loss:?}");
    assert_eq!(loss.cross_entropy, 0.0);
}
