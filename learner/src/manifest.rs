use std::collections::BTreeMap;

use policy::Numerics;
use proto::Digest;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Error;

/// Identifies the code: blake3 over the compiled sources and `Cargo.lock`, in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BuildId(pub String);

/// Everything that a run's results depend on. It is the first record of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Hash of the config.
    pub config: Digest,
    /// Id of the code.
    pub build: BuildId,
    /// Versions of the checkers, by domain.
    pub verifiers: BTreeMap<String, String>,
    /// Hashes of the exam files, by exam.
    pub exams: BTreeMap<String, Digest>,
    /// The arithmetic.
    pub numerics: Numerics,
    /// Whether every component is reproducible, so that steps can be computed again from their groups. Whether groups are
    /// reproducible too depends on the schedule in the config.
    pub reproducible: bool,
}

impl Manifest {
    /// Checks that `now` continues the run that `self` started.
    ///
    /// # Errors
    /// [`Error::Manifest`] with the first field that differs, down to its key, and both values.
    pub fn expect_same(&self, now: &Manifest) -> Result<(), Error> {
        let [was, is] = [self, now].map(|manifest| serde_json::to_value(manifest).expect("a manifest has a JSON form"));
        let fields = ["config", "build", "verifiers", "exams", "numerics", "reproducible"];
        match fields.iter().find_map(|field| difference((*field).to_owned(), &was[field], &is[field])) {
            None => Ok(()),
            Some((field, was, is)) => Err(Error::Manifest { field, was, is }),
        }
    }
}

/// Returns the first key that differs, and both values.
fn difference(field: String, was: &Value, is: &Value) -> Option<(String, String, String)> {
    match (was, is) {
        (Value::Object(was_of), Value::Object(is_of)) => {
            let mut keys = was_of.keys().chain(is_of.keys());
            keys.find_map(|key| difference(format!("{field}.{key}"), &was[key], &is[key]))
        }
        _ if was == is => None,
        _ => {
            let text = |value: &Value| if value.is_null() { "absent".to_owned() } else { value.to_string() };
            Some((field, text(was), text(is)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named_down_to_its_key() {
        let digest = |text: &str| Digest::of_bytes(text.as_bytes());
        let manifest = Manifest {
            config: digest("config"),
            build: BuildId("abc".to_owned()),
            verifiers: [("countdown".to_owned(), "1".to_owned())].into(),
            exams: [("countdown-3".to_owned(), digest("three")), ("countdown-4".to_owned(), digest("four"))].into(),
            numerics: Numerics {
                kernels: "fixed-order/2".to_owned(),
                device: policy::Device::Cpu,
                dtype: "f32".to_owned(),
                pass_digest: None,
            },
            reproducible: true,
        };
        manifest.expect_same(&manifest).unwrap();
        let error = |change: fn(&mut Manifest)| {
            let mut now = manifest.clone();
            change(&mut now);
            manifest.expect_same(&now).unwrap_err().to_string()
        };
        for (change, says) in [
            ((|now| now.build.0 = "abd".to_owned()) as fn(&mut Manifest), "manifest: build was \"abc\", is \"abd\"; "),
            (|now| now.exams.retain(|name, _| name != "countdown-4"), "manifest: exams.countdown-4 was \""),
            (
                |now| drop(now.verifiers.insert("chess".to_owned(), "1".to_owned())),
                "verifiers.chess was absent, is \"1\"; ",
            ),
            (
                |now| now.numerics.kernels = "candle".to_owned(),
                "numerics.kernels was \"fixed-order/2\", is \"candle\"; ",
            ),
            (|now| now.reproducible = false, "manifest: reproducible was true, is false; "),
        ] {
            assert!(error(change).contains(says), "{}", error(change));
        }
    }
}
