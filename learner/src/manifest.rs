use std::collections::BTreeMap;

use policy::Numerics;
use proto::Digest;
use serde::{Deserialize, Serialize};

use crate::Error;

/// What code runs: blake3 over the compiled sources and `Cargo.lock`, in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BuildId(pub String);

/// Everything that a run's results depend on. The first record of its journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Hash of the config.
    pub config: Digest,
    /// Which code.
    pub build: BuildId,
    /// Which checkers, by domain.
    pub verifiers: BTreeMap<String, String>,
    /// Which exam files, by exam.
    pub exams: BTreeMap<String, Digest>,
    /// Which arithmetic.
    pub numerics: Numerics,
    /// Whether every component promises the same result twice: then steps can be computed again from their groups. That
    /// groups come out the same is for the schedule to promise, which the config names.
    pub reproducible: bool,
}

impl Manifest {
    /// Checks that `now` continues the run that `self` started.
    ///
    /// # Errors
    /// [`Error::Manifest`] names the first field that differs and both values.
    pub fn expect_same(&self, now: &Manifest) -> Result<(), Error> {
        fn compare(field: &'static str, was: &impl Serialize, is: &impl Serialize) -> Result<(), Error> {
            let text = |value: String| if value.len() > 200 { format!("{}...", &value[..200]) } else { value };
            let was = serde_json::to_string(was).expect("manifest fields have a JSON form");
            let is = serde_json::to_string(is).expect("manifest fields have a JSON form");
            if was == is { Ok(()) } else { Err(Error::Manifest { field, was: text(was), is: text(is) }) }
        }
        compare("config", &self.config, &now.config)?;
        compare("build", &self.build, &now.build)?;
        compare("verifiers", &self.verifiers, &now.verifiers)?;
        compare("exams", &self.exams, &now.exams)?;
        compare("numerics", &self.numerics, &now.numerics)?;
        compare("reproducible", &self.reproducible, &now.reproducible)
    }
}
