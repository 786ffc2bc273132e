//! Names the build: blake3 over every compiled source, the exams and presets, and `Cargo.lock`.

use std::path::{Path, PathBuf};

const SOURCES: [&str; 12] = [
    "src",
    "proto/src",
    "bus/src",
    "domains/src",
    "domains/exams",
    "policy/src",
    "verifier/src",
    "actor/src",
    "learner/src",
    "deploy/configs",
    "Cargo.lock",
    "Cargo.toml",
];

fn main() {
    let mut files = Vec::new();
    for source in SOURCES {
        println!("cargo:rerun-if-changed={source}");
        collect(Path::new(source), &mut files);
    }
    files.sort();
    let mut hasher = blake3::Hasher::new();
    for file in files {
        let bytes = std::fs::read(&file).expect("a listed source can be read");
        hasher.update(file.to_string_lossy().as_bytes());
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(&bytes);
    }
    println!("cargo:rustc-env=AUTODIDACT_BUILD_ID={}", hasher.finalize().to_hex());
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).expect("a source folder can be listed") {
            collect(&entry.expect("a source folder can be listed").path(), files);
        }
    } else if path.exists() {
        files.push(path.to_owned());
    }
}
