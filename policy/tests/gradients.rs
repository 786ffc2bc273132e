//! The kernels' network against candle's autograd and against finite differences.

use candle_core::Device;
use policy::{Model, ModelConfig, Params, Sequence};
use proto::{ActionMask, Token};

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
            let tokens: Vec<Token> = (0..len).map(|index| ((index + number) * 5 % 20) as Token).collect();
            let choices = (0..len - 2).filter(|position| (position + number) % 3 != 1).map(|position| {
                let mask: ActionMask = (0..20)
                    .filter(|token| *token == tokens[position + 2] || !(*token as usize + position).is_multiple_of(4))
                    .collect();
                (position, mask)
            });
            Sequence::new(&tokens[..2], &tokens[2..], choices)
        })
        .filter(|sequence| !sequence.chosen.is_empty())
        .collect()
}

fn sequence_weights(sequences: &[Sequence]) -> Vec<f32> {
    (0..sequences.len()).map(|index| [1.0, 0.25, -0.5][index % 3] / sequences.len() as f32).collect()
}

/// Weights whose head is large enough that no gradient is lost in rounding.
fn params(config: &ModelConfig) -> Params {
    let mut params = Params::init(config, 1);
    params.tensors.last_mut().unwrap().iter_mut().for_each(|weight| *weight *= 20.0);
    params
}

#[test]
fn kernels_agree_with_candle() {
    for shape in SHAPES {
        let config = config(shape);
        let params = params(&config);
        let (kernels, candle) =
            (Model::new(&config, Device::Cpu).unwrap(), Model::reference(&config, Device::Cpu).unwrap());
        let sequences = sequences();
        let weights = sequence_weights(&sequences);
        let sequences: Vec<&Sequence> = sequences.iter().collect();
        let (logprobs, gradients) = kernels.load(&params).unwrap().gradients(&sequences, &weights).unwrap();
        let (expected_logprobs, expected) = candle.load(&params).unwrap().gradients(&sequences, &weights).unwrap();
        assert_close(&logprobs, &expected_logprobs, "logprobs");
        for ((spec, gradient), expected) in config.tensors().iter().zip(&gradients.tensors).zip(&expected.tensors) {
            assert_close(gradient, expected, &spec.name);
        }
    }
}

/// Every weight tensor gets a gradient that finite differences of the loss confirm: sign, weights and masks included.
#[test]
fn every_weight_has_the_gradient_of_the_loss() {
    let config = config(SHAPES[0]);
    let mut params = params(&config);
    let model = Model::new(&config, Device::Cpu).unwrap();
    let sequences = sequences();
    let weights = sequence_weights(&sequences);
    let sequences: Vec<&Sequence> = sequences.iter().collect();
    let loss = |params: &Params| {
        let logprobs = model.load(params).unwrap().logprobs(&sequences).unwrap();
        let weights = sequences.iter().zip(&weights);
        let weights = weights.flat_map(|(sequence, weight)| sequence.chosen.iter().map(|_| f64::from(*weight)));
        -logprobs.iter().zip(weights).map(|(logprob, weight)| f64::from(*logprob) * weight).sum::<f64>()
    };
    let (logprobs, gradients) = model.load(&params).unwrap().gradients(&sequences, &weights).unwrap();
    assert_eq!(logprobs, model.load(&params).unwrap().logprobs(&sequences).unwrap());
    for (index, spec) in config.tensors().iter().enumerate() {
        let gradient = &gradients.tensors[index];
        // Along the gradient the loss changes by its norm.
        let norm: f64 = gradient.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 1e-3, "{}: gradient {norm}", spec.name);
        let original = params.tensors[index].clone();
        let mut shifted = |by: f64| {
            for ((weight, original), slope) in params.tensors[index].iter_mut().zip(&original).zip(gradient) {
                *weight = original + (by / norm * f64::from(*slope)) as f32;
            }
            loss(&params)
        };
        let difference = (shifted(1e-2) - shifted(-1e-2)) / 2e-2;
        params.tensors[index] = original;
        assert!((difference / norm - 1.0).abs() < 1e-2, "{}: gradient {norm}, difference {difference}", spec.name);
    }
}
