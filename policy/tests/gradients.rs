//! Every fused operation against plain candle operations, and the whole network against finite differences.

use candle_core::{Device, Tensor, Var};
use policy::kernels::{
    AttentionShape, MatrixView, PackedMatrix, RotaryTable, attention_backward, attention_forward, matmul, rms_norm,
    rms_norm_backward, swiglu, swiglu_backward,
};
use policy::{
    Model, ModelConfig, Params, Sequence, TrainBatch, attention_plain, masked_logprob, masked_logprob_plain,
    rms_norm_plain, swiglu_plain,
};
use proto::{ActionMask, CounterRng, Purpose, Token};

fn draws(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = CounterRng::new(seed, Purpose::Init, 9, 9, 9);
    (0..len).map(|_| 2.0 * rng.unit_f64() as f32 - 1.0).collect()
}

fn var(values: &[f32], shape: &[usize]) -> Var {
    Var::from_slice(values, shape, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Gradient of `sum(out * weights)` through plain candle operations.
fn plain_gradients(out: &Tensor, weights: &[f32], vars: &[&Var]) -> Vec<Vec<f32>> {
    let weights = Tensor::from_slice(weights, out.shape(), &Device::Cpu).unwrap();
    let gradients = (out * weights).unwrap().sum_all().unwrap().backward().unwrap();
    vars.iter().map(|var| values(gradients.get(var).unwrap())).collect()
}

fn assert_close(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
    assert!(scale > 0.0, "{what}: nothing to compare");
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= 2e-5 * scale, "{what}[{index}]: expected {expected}, got {got}");
    }
}

#[test]
fn rms_norm_agrees_with_candle() {
    let (x, w, grad) = (draws(5 * 48, 1), draws(48, 2), draws(5 * 48, 3));
    let (x_var, w_var) = (var(&x, &[5, 48]), var(&w, &[48]));
    let plain = rms_norm_plain(&x_var, &w_var).unwrap();
    let mut out = vec![0.0; x.len()];
    rms_norm(&x, &w, &mut out);
    assert_close(&out, &values(&plain), "out");
    let (mut grad_x, mut grad_w) = (vec![0.0; x.len()], vec![0.0; w.len()]);
    rms_norm_backward(&x, &w, &grad, &mut grad_x, &mut grad_w);
    let expected = plain_gradients(&plain, &grad, &[&x_var, &w_var]);
    assert_close(&grad_x, &expected[0], "grad_x");
    assert_close(&grad_w, &expected[1], "grad_weight");
}

#[test]
fn swiglu_agrees_with_candle() {
    let (x, grad) = (draws(7 * 64, 1), draws(7 * 32, 2));
    let x_var = var(&x, &[7, 64]);
    let plain = swiglu_plain(&x_var).unwrap();
    let mut out = vec![0.0; grad.len()];
    swiglu(&x, &mut out, 32);
    assert_close(&out, &values(&plain), "out");
    let mut grad_x = vec![0.0; x.len()];
    swiglu_backward(&x, &grad, &mut grad_x, 32);
    assert_close(&grad_x, &plain_gradients(&plain, &grad, &[&x_var])[0], "grad");
}

#[test]
fn matmul_agrees_with_candle() {
    let (x, w) = (draws(9 * 33, 1), draws(33 * 21, 2));
    let plain = var(&x, &[9, 33]).matmul(&var(&w, &[33, 21])).unwrap();
    let mut out = vec![0.0; 9 * 21];
    let packed = PackedMatrix::new(MatrixView::row_major(&w, 21), 33, 21);
    matmul(MatrixView::row_major(&x, 33), 9, &packed, &mut out);
    assert_close(&out, &values(&plain), "out");
}

#[test]
fn attention_agrees_with_candle() {
    for (num_heads, num_kv_heads, head_dim) in [(4, 2, 16), (2, 2, 32), (6, 1, 16)] {
        let shape = AttentionShape { num_heads, num_kv_heads, head_dim };
        let lengths = [1, 17, 5, 16];
        let rows: usize = lengths.iter().sum();
        let rotary = RotaryTable::new(20, head_dim);
        let (qkv, grad) = (draws(rows * shape.qkv_dim(), 1), draws(rows * num_heads * head_dim, 2));
        let qkv_var = var(&qkv, &[rows, shape.qkv_dim()]);
        let plain = attention_plain(&qkv_var, shape, &rotary, &lengths).unwrap();
        let mut out = vec![0.0; grad.len()];
        attention_forward(shape, &rotary, &lengths, &qkv, &mut out);
        assert_close(&out, &values(&plain), "out");
        let mut grad_qkv = vec![0.0; qkv.len()];
        attention_backward(shape, &rotary, &lengths, &qkv, &grad, &mut grad_qkv);
        assert_close(&grad_qkv, &plain_gradients(&plain, &grad, &[&qkv_var])[0], "grad");
    }
}

#[test]
fn masked_logprob_agrees_with_candle() {
    let logits = draws(3 * 40, 1);
    let masks: [ActionMask; 3] = [[1, 5].into_iter().collect(), (0..40).collect(), (3..9).collect()];
    let choices: Vec<(Token, ActionMask)> = masks.into_iter().zip([5, 0, 8]).map(|(mask, target)| (target, mask)).collect();
    let plain = masked_logprob_plain(&var(&logits, &[3, 40]), &choices).unwrap();
    let fused: Vec<f32> =
        logits.chunks_exact(40).zip(&choices).map(|(logits, (target, mask))| masked_logprob(logits, mask, *target)).collect();
    assert_close(&fused, &values(&plain), "out");
}

fn config() -> ModelConfig {
    ModelConfig {
        vocabulary_size: 24,
        max_positions: 16,
        d_model: 32,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        ff_dim: 32,
    }
}

fn sequences() -> Vec<Sequence> {
    let mask: ActionMask = (0..20).collect();
    [5usize, 12, 9]
        .into_iter()
        .map(|len| {
            let tokens: Vec<Token> = (0..len).map(|index| (index * 5 % 20) as Token).collect();
            Sequence::new(&tokens[..2], &tokens[2..], (0..len - 2).step_by(2).map(|position| (position, mask)))
        })
        .collect()
}

/// Every weight tensor gets a gradient that finite differences of the loss confirm, sign, weights and masks included.
#[test]
fn every_weight_has_the_gradient_of_the_loss() {
    let mut params = Params::init(&config(), 1);
    // Larger than the initial head, so that no gradient is lost in rounding.
    params.tensors.last_mut().unwrap().iter_mut().for_each(|weight| *weight *= 20.0);
    let model = Model::new(&config(), Device::Cpu).unwrap();
    let sequences = sequences();
    let batch = TrainBatch { sequences: sequences.iter().collect(), weights: vec![1.0, 0.25, -0.5] };
    let loss = |params: &Params| {
        let logprobs = model.logprobs(params, &batch.sequences).unwrap();
        let weights = batch.sequences.iter().zip(&batch.weights);
        let weights = weights.flat_map(|(sequence, weight)| sequence.chosen.iter().map(|_| f64::from(*weight)));
        -logprobs.iter().zip(weights).map(|(logprob, weight)| f64::from(*logprob) * weight).sum::<f64>()
    };
    let (logprobs, gradients) = model.gradients(&params, &batch).unwrap();
    assert_eq!(logprobs, model.logprobs(&params, &batch.sequences).unwrap());
    for (index, spec) in config().tensors().iter().enumerate() {
        let gradient = &gradients.tensors[index];
        // Along the gradient the loss changes by its squared norm.
        let norm: f64 = gradient.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 1e-3, "{}: gradient {norm}", spec.name);
        let shifted = |by: f64| {
            let mut params = params.clone();
            for (weight, slope) in params.tensors[index].iter_mut().zip(gradient) {
                *weight += (by / norm * f64::from(*slope)) as f32;
            }
            loss(&params)
        };
        let difference = (shifted(5e-3) - shifted(-5e-3)) / 1e-2;
        assert!((difference / norm - 1.0).abs() < 1e-2, "{}: gradient {norm}, difference {difference}", spec.name);
    }
}

/// The same network in plain candle operations, for devices that have no kernels.
#[test]
fn fused_network_agrees_with_plain_candle() {
    let params = Params::init(&config(), 1);
    let sequences = sequences();
    let batch = TrainBatch { sequences: sequences.iter().collect(), weights: vec![1.0, 0.25, -0.5] };
    let fused = Model::new(&config(), Device::Cpu).unwrap();
    let plain = Model::plain(&config(), Device::Cpu).unwrap();
    let (fused_logprobs, fused_gradients) = fused.gradients(&params, &batch).unwrap();
    let (plain_logprobs, plain_gradients) = plain.gradients(&params, &batch).unwrap();
    assert_close(&fused_logprobs, &plain_logprobs, "logprobs");
    for ((spec, fused), plain) in config().tensors().iter().zip(&fused_gradients.tensors).zip(&plain_gradients.tensors) {
        assert_close(fused, plain, &spec.name);
    }
}
