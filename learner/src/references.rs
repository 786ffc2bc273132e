//! Frozen networks that losses compare the policy with.

use std::sync::Arc;

use policy::formats::Pretrained;
use policy::{ModelConfig, Scorer, Sequence};

use crate::{Config, Error};

/// The pretrained models of a run.
#[derive(Clone, Debug, Default)]
pub struct Models {
    /// The one that the run begins with; `None` for a network from random weights.
    pub base: Option<Arc<Pretrained>>,
    /// The one that it learns from; `None` without distillation.
    pub teacher: Option<Arc<Pretrained>>,
}

/// The references of a run's losses, on the learner's device.
#[derive(Default)]
pub struct References {
    base: Option<Box<dyn Scorer>>,
    teacher: Option<Box<dyn Scorer>>,
}

impl References {
    /// Loads the references that the config needs.
    ///
    /// # Errors
    /// [`Error::Config`] when a model that the config needs is not given; [`Error::Base`] when it cannot be read;
    /// [`Error::Policy`] when the device has no room for it.
    pub fn load(config: &Config, num_threads: usize, models: &Models) -> Result<References, Error> {
        let load = |model: &Pretrained| -> Result<Box<dyn Scorer>, Error> {
            let shape = ModelConfig { max_positions: config.model.max_positions, ..model.config().clone() };
            Ok(config.learner.device.open()?.scorer(&shape, &model.load()?, num_threads)?)
        };
        let mut references = References::default();
        if config.learner.needs_base() {
            references.base = Some(load(models.base.as_deref().ok_or_else(no_base)?)?);
        }
        if config.learner.distill.is_some() {
            references.teacher = Some(load(models.teacher.as_deref().ok_or_else(no_teacher)?)?);
        }
        Ok(references)
    }

    /// Scores sequences under the model that the run begins with.
    pub(crate) fn base_logprobs(&self, sequences: &[Sequence]) -> Result<Vec<f32>, Error> {
        Ok(self.base.as_ref().ok_or_else(no_base)?.logprobs(&sequences.iter().collect::<Vec<_>>())?)
    }

    /// Scores sequences under the teacher.
    pub(crate) fn teacher_logprobs(&self, sequences: &[Sequence]) -> Result<Vec<f32>, Error> {
        Ok(self.teacher.as_ref().ok_or_else(no_teacher)?.logprobs(&sequences.iter().collect::<Vec<_>>())?)
    }
}

fn no_base() -> Error {
    let expected = "the pretrained model that the losses are relative to";
    Error::Config { key: "local.base", expected, got: "none".to_owned() }
}

fn no_teacher() -> Error {
    let expected = "the pretrained model that the run learns from";
    Error::Config { key: "local.teacher", expected, got: "none".to_owned() }
}

#[cfg(test)]
impl References {
    /// Returns references to made-up weights.
    pub(crate) fn of(base: Option<Box<dyn Scorer>>, teacher: Option<Box<dyn Scorer>>) -> References {
        References { base, teacher }
    }
}
