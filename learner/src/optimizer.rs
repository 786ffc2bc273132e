use policy::kernels::{AdamWStep, adamw};
use policy::{ModelConfig, Params};

use crate::Error;

/// Moments of AdamW (Loshchilov and Hutter 2019).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AdamW {
    /// Running mean of gradients.
    pub(crate) first: Params,
    /// Running mean of squared gradients.
    pub(crate) second: Params,
    /// Updates done.
    pub(crate) num_updates: u64,
}

/// Settings of one update.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Update {
    pub(crate) learning_rate: f64,
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) weight_decay: f64,
    pub(crate) max_grad_norm: f64,
}

impl AdamW {
    pub(crate) fn new(config: &ModelConfig) -> AdamW {
        AdamW { first: Params::zeros(config), second: Params::zeros(config), num_updates: 0 }
    }

    /// Moves the weights against the gradient; gives the gradient's norm before clipping.
    pub(crate) fn update(
        &mut self,
        config: &ModelConfig,
        params: &mut Params,
        gradient: &Params,
        update: Update,
    ) -> Result<f64, Error> {
        let norm = norm(gradient);
        if !norm.is_finite() {
            return Err(Error::NotFinite { what: "gradient norm", got: norm });
        }
        self.num_updates += 1;
        let clip = (update.max_grad_norm / norm.max(1e-30)).min(1.0) as f32;
        let correction1 = 1.0 - libm::pow(update.beta1, self.num_updates as f64);
        let correction2 = 1.0 - libm::pow(update.beta2, self.num_updates as f64);
        let step_size = (update.learning_rate / correction1) as f32;
        let inverse_root = (1.0 / correction2.sqrt()) as f32;
        let (beta1, beta2) = (update.beta1 as f32, update.beta2 as f32);
        for (index, spec) in config.tensors().iter().enumerate() {
            let decays = spec.shape.len() > 1;
            let keep = if decays { (1.0 - update.learning_rate * update.weight_decay) as f32 } else { 1.0 };
            let weights = &mut params.tensors[index];
            let (first, second) = (&mut self.first.tensors[index], &mut self.second.tensors[index]);
            let gradient = &gradient.tensors[index];
            let step = AdamWStep { beta1, beta2, step_size, inverse_root, keep, clip };
            adamw(weights, gradient, first, second, step);
        }
        Ok(norm)
    }
}

/// Euclidean norm, squares added in order in double precision.
fn norm(params: &Params) -> f64 {
    params.tensors.iter().flatten().map(|value| f64::from(*value) * f64::from(*value)).sum::<f64>().sqrt()
}

/// Moves averaged weights towards the weights; the decay grows from 0.1 over the first updates, so that the average
/// forgets the start.
pub(crate) fn average(ema: &mut Params, params: &Params, decay: f64, num_updates: u64) {
    let decay = decay.min((1 + num_updates) as f64 / (10 + num_updates) as f64) as f32;
    for (ema, weights) in ema.tensors.iter_mut().zip(&params.tensors) {
        for (ema, weight) in ema.iter_mut().zip(weights) {
            *ema = decay * *ema + (1.0 - decay) * weight;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// torch.optim.AdamW(lr=0.1, betas=(0.9, 0.98), weight_decay=0.1) on w = [1.0], gradients 0.5 then -0.25:
    /// w = 0.890000, then 0.854389.
    #[test]
    fn agrees_with_torch() {
        let config = crate::test_config().model;
        let mut params = Params::zeros(&config);
        let mut gradient = Params::zeros(&config);
        let mut adam = AdamW::new(&config);
        let update =
            Update { learning_rate: 0.1, beta1: 0.9, beta2: 0.98, weight_decay: 0.1, max_grad_norm: f64::INFINITY };
        params.tensors[0][0] = 1.0;
        for (step, expected) in [(0.5, 0.890_000), (-0.25, 0.854_389)] {
            gradient.tensors[0][0] = step;
            adam.update(&config, &mut params, &gradient, update).unwrap();
            assert!((params.tensors[0][0] - expected).abs() < 1e-5, "{}", params.tensors[0][0]);
        }
    }

    #[test]
    fn clips_and_refuses_nan() {
        let config = crate::test_config().model;
        let (mut params, mut gradient) = (Params::zeros(&config), Params::zeros(&config));
        let update = Update { learning_rate: 0.1, beta1: 0.0, beta2: 0.0, weight_decay: 0.0, max_grad_norm: 1.0 };
        gradient.tensors[0][0] = 30.0;
        gradient.tensors[0][1] = 40.0;
        let mut adam = AdamW::new(&config);
        assert_eq!(adam.update(&config, &mut params, &gradient, update).unwrap(), 50.0);
        assert!((adam.first.tensors[0][0] - 0.6).abs() < 1e-6);
        gradient.tensors[0][0] = f32::NAN;
        assert!(adam.update(&config, &mut params, &gradient, update).is_err());
    }

    /// One weight goes from 0 to 1 and stays there. By hand: the decays are 2/11, 3/12 and 4/13, and then as configured.
    #[test]
    fn the_average_forgets_its_start_and_then_decays_as_configured() {
        let config = crate::test_config().model;
        let (mut ema, mut params) = (Params::zeros(&config), Params::zeros(&config));
        params.tensors[0][0] = 1.0;
        params.tensors[1][2] = -2.0;
        let mut left = 1.0;
        for (num_updates, decay) in [(1, 2.0 / 11.0), (2, 3.0 / 12.0), (3, 4.0 / 13.0), (1_000, 0.9)] {
            average(&mut ema, &params, 0.9, num_updates);
            left *= decay;
            let [one, two] = [ema.tensors[0][0], ema.tensors[1][2]].map(f64::from);
            assert!((one - (1.0 - left)).abs() < 1e-6, "after {num_updates}: {one}, expected {}", 1.0 - left);
            assert!((two + 2.0 * (1.0 - left)).abs() < 1e-6, "after {num_updates}: {two}");
        }
        assert_eq!(ema.tensors[0][1], 0.0, "what does not move is where it was");
        // At the bound of the growing decay: (1 + 81) / (10 + 81) is over 0.9, one update before it is not.
        for (num_updates, decay) in [(79, 80.0 / 89.0), (81, 0.9)] {
            let mut ema = Params::zeros(&config);
            average(&mut ema, &params, 0.9, num_updates);
            assert!((f64::from(ema.tensors[0][0]) - (1.0 - decay)).abs() < 1e-6, "{num_updates}");
        }
        // Without a decay the average is the weights.
        average(&mut ema, &params, 0.0, 5);
        assert_eq!(ema, params);
    }
}
