use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use domains::{exam, exam_specs};
use learner::{BuildId, Manifest};
use policy::Numerics;

use crate::run_config::RunConfig;

/// Returns the manifest of a run whose learner is on this machine.
pub(crate) fn manifest(config: &RunConfig) -> Result<Manifest> {
    manifest_with(config, Numerics::measure(config.run.learner.device).context("learner.device")?)
}

/// Returns the manifest of a run with these numerics.
pub(crate) fn manifest_with(config: &RunConfig, numerics: Numerics) -> Result<Manifest> {
    let exams: BTreeMap<_, _> = exam_specs()
        .into_iter()
        .map(|spec| Ok((spec.name.to_owned(), exam(spec.name)?.digest())))
        .collect::<Result<_>>()?;
    let verifiers = domains::registry().iter().map(|domain| (domain.name().to_owned(), "1".to_owned())).collect();
    Ok(Manifest {
        config: config.run.digest(),
        build: build_id(),
        verifiers,
        exams,
        numerics,
        reproducible: config.run.is_reproducible(),
    })
}

/// Returns what identifies the sources of this program.
pub(crate) fn build_id() -> BuildId {
    BuildId(env!("AUTODIDACT_BUILD_ID").to_owned())
}
