use super::kernels::{AdamWStep, adamw};
use super::threads;
use crate::{ModelConfig, OptimizerStep, Params, TrainingState};

/// Weights that a thread updates at a time: they stay in its second-level cache until they are averaged.
const PIECE: usize = 1 << 14;

/// Updates the weights with the gradient, and then their average. Returns the gradient's norm before clipping. If the norm is not
/// finite, nothing changes.
pub(crate) fn step(
    config: &ModelConfig,
    state: &mut TrainingState,
    gradient: &Params,
    step: &OptimizerStep,
    num_threads: usize,
) -> f64 {
    let norm = norm(gradient);
    if !norm.is_finite() {
        return norm;
    }
    state.num_updates += 1;
    let clip = (step.max_grad_norm / norm.max(1e-30)).min(1.0) as f32;
    let correction1 = 1.0 - libm::pow(step.beta1, state.num_updates as f64);
    let correction2 = 1.0 - libm::pow(step.beta2, state.num_updates as f64);
    let step_size = (step.learning_rate / correction1) as f32;
    let inverse_root = (1.0 / correction2.sqrt()) as f32;
    let (beta1, beta2) = (step.beta1 as f32, step.beta2 as f32);
    let decay = step.decay_after(state.num_updates) as f32;
    let TrainingState { weights, average: averages, first, second, .. } = state;
    let tensors = weights.tensors.iter_mut().zip(&gradient.tensors).zip(&mut first.tensors).zip(&mut second.tensors);
    let pieces = tensors.zip(&mut averages.tensors).zip(config.tensors()).flat_map(|((of_step, averages), spec)| {
        let decays = spec.shape.len() > 1;
        let keep = if decays { (1.0 - step.learning_rate * step.weight_decay) as f32 } else { 1.0 };
        let step = AdamWStep { beta1, beta2, step_size, inverse_root, keep, clip };
        let (((weights, gradient), first), second) = of_step;
        let moments = first.chunks_mut(PIECE).zip(second.chunks_mut(PIECE));
        let weights = weights.chunks_mut(PIECE).zip(averages.chunks_mut(PIECE));
        weights.zip(gradient.chunks(PIECE)).zip(moments).map(move |piece| (piece, step))
    });
    let num_threads = threads::worth_starting(num_threads, config.num_trained());
    threads::for_each(num_threads, pieces, |((((weights, averages), gradient), (first, second)), step)| {
        adamw(weights, gradient, first, second, step);
        average(averages, weights, decay);
    });
    norm
}

/// Computes the Euclidean norm. Adds squares in order, in double precision.
fn norm(params: &Params) -> f64 {
    let mut sum = 0.0;
    for tensor in &params.tensors {
        tensor.iter().for_each(|value| sum += f64::from(*value) * f64::from(*value));
    }
    sum.sqrt()
}

/// Moves averaged weights towards the weights.
fn average(average: &mut [f32], weights: &[f32], decay: f32) {
    for (average, weight) in average.iter_mut().zip(weights) {
        *average = decay * *average + (1.0 - decay) * weight;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Variant;

    fn config() -> ModelConfig {
        ModelConfig {
            vocabulary_size: 8,
            max_positions: 8,
            d_model: 16,
            num_layers: 1,
            num_heads: 1,
            num_kv_heads: 1,
            ff_dim: 16,
            variant: Variant::default(),
            adapter: None,
        }
    }

    /// All weights 0.
    fn state() -> TrainingState {
        let zeros = || Params::zeros(&config());
        TrainingState { weights: zeros(), average: zeros(), first: zeros(), second: zeros(), num_updates: 0 }
    }

    const STEP: OptimizerStep = OptimizerStep {
        learning_rate: 0.1,
        beta1: 0.9,
        beta2: 0.98,
        weight_decay: 0.1,
        max_grad_norm: f64::INFINITY,
        average_decay: 0.9,
    };

    /// torch.optim.AdamW(lr=0.1, betas=(0.9, 0.98), weight_decay=0.1) on w = [1.0], gradients 0.5 then -0.25:
    /// w = 0.890000, then 0.854389.
    #[test]
    fn agrees_with_torch() {
        let (mut state, mut gradient) = (state(), Params::zeros(&config()));
        state.weights.tensors[0][0] = 1.0;
        for (slope, expected) in [(0.5, 0.890_000), (-0.25, 0.854_389)] {
            gradient.tensors[0][0] = slope;
            step(&config(), &mut state, &gradient, &STEP, 1);
            let got = state.weights.tensors[0][0];
            assert!((got - expected).abs() < 1e-5, "{got}");
        }
        assert_eq!(state.num_updates, 2);
    }

    #[test]
    fn clips_and_does_not_follow_nan() {
        let (mut state, mut gradient) = (state(), Params::zeros(&config()));
        let clipping = OptimizerStep { beta1: 0.0, beta2: 0.0, weight_decay: 0.0, max_grad_norm: 1.0, ..STEP };
        gradient.tensors[0][0] = 30.0;
        gradient.tensors[0][1] = 40.0;
        assert_eq!(step(&config(), &mut state, &gradient, &clipping, 1), 50.0);
        assert!((state.first.tensors[0][0] - 0.6).abs() < 1e-6);
        gradient.tensors[0][0] = f32::NAN;
        let before = state.clone();
        assert!(step(&config(), &mut state, &gradient, &clipping, 1).is_nan());
        assert_eq!(state, before);
    }

    /// One weight goes from 0 to 1 and stays there. By hand: the decays are 2/11, 3/12 and 4/13, and then as configured.
    #[test]
    fn the_average_forgets_its_start_and_then_decays_as_configured() {
        let (mut ema, weights) = ([0.0; 3], [1.0, -2.0, 0.0]);
        let mut left = 1.0;
        for (num_updates, decay) in [(1, 2.0 / 11.0), (2, 3.0 / 12.0), (3, 4.0 / 13.0), (1_000, 0.9)] {
            average(&mut ema, &weights, STEP.decay_after(num_updates) as f32);
            left *= decay;
            let [one, two, _] = ema.map(f64::from);
            assert!((one - (1.0 - left)).abs() < 1e-6, "after {num_updates}: {one}, expected {}", 1.0 - left);
            assert!((two + 2.0 * (1.0 - left)).abs() < 1e-6, "after {num_updates}: {two}");
        }
        assert_eq!(ema[2], 0.0, "what does not move is where it was");
        // At the bound of the growing decay: (1 + 81) / (10 + 81) is over 0.9, one update before it is not.
        for (num_updates, decay) in [(79, 80.0 / 89.0), (81, 0.9)] {
            assert!((STEP.decay_after(num_updates) - decay).abs() < 1e-12, "{num_updates}");
        }
        // Without a decay the average is the weights.
        average(&mut ema, &weights, OptimizerStep { average_decay: 0.0, ..STEP }.decay_after(5) as f32);
        assert_eq!(ema, weights);
    }
}
