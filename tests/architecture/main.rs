//! Which crates may import which: the table "Folders" of ARCHITECTURE.md, checked against `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use toml::Table;

use crate::files::{Files, circle};

mod files;

/// Every crate of the workspace, lowest first, and the crates of the workspace that it may import.
///
/// Roles (verifier, actor, learner) never import each other, and the learner knows no domain.
const MAY_IMPORT: [(&str, &[&str]); 9] = [
    ("autodidact-proto", &[]),
    ("autodidact-bus", &["autodidact-proto"]),
    ("autodidact-domains", &["autodidact-proto"]),
    ("autodidact-language", &["autodidact-proto", "autodidact-domains"]),
    ("autodidact-policy", &["autodidact-proto"]),
    ("autodidact-verifier", &["autodidact-proto", "autodidact-bus", "autodidact-domains", "autodidact-language"]),
    ("autodidact-actor", &["autodidact-proto", "autodidact-bus", "autodidact-language", "autodidact-policy"]),
    ("autodidact-learner", &["autodidact-proto", "autodidact-bus", "autodidact-policy"]),
    (
        "autodidact",
        &[
            "autodidact-proto",
            "autodidact-bus",
            "autodidact-domains",
            "autodidact-language",
            "autodidact-policy",
            "autodidact-verifier",
            "autodidact-actor",
            "autodidact-learner",
        ],
    ),
];

/// Crates that a crate of ours must not depend on, directly or indirectly.
const DOES_WITHOUT: [(&str, &[&str]); 4] = [
    ("autodidact-proto", &["tokio", "candle-core", "candle-nn"]),
    ("autodidact-bus", &["candle-core", "candle-nn"]),
    ("autodidact-domains", &["candle-core", "candle-nn"]),
    ("autodidact-verifier", &["candle-core", "candle-nn"]),
];

/// The fields that every crate inherits from the workspace, as `key.workspace = true`.
const INHERITED: [&str; 5] = ["version", "edition", "rust-version", "license", "publish"];

#[test]
fn every_crate_imports_what_the_table_allows() {
    let workspace = Workspace::read();
    let table: BTreeMap<&str, &[&str]> = MAY_IMPORT.into_iter().collect();
    let members: BTreeSet<&str> = workspace.members().map(|package| text(&package["name"])).collect();
    assert_eq!(members, table.keys().copied().collect(), "the table has a line for every crate of the workspace");
    for package in workspace.members() {
        let allowed = table[text(&package["name"])];
        // Imports of tests alone are not part of what runs.
        let imported = list(&package["dependencies"]).iter().filter(|dependency| dependency["kind"] != "dev");
        for name in imported.map(|dependency| text(&dependency["name"])).filter(|name| members.contains(name)) {
            assert!(allowed.contains(&name), "{} imports {name}; it may import {allowed:?}", package["name"]);
        }
    }
}

#[test]
fn no_two_files_of_a_crate_import_each_other() {
    let (mut circles, mut num_imports) = (Vec::new(), 0);
    for package in Workspace::read().members() {
        let folder = Path::new(text(&package["manifest_path"])).parent().unwrap().join("src");
        let mut imports = Files::read(&folder.join("lib.rs")).imports();
        num_imports += imports.len();
        while let Some(circle) = circle(&imports) {
            let names = circle.iter().map(|file| file.strip_prefix(&folder).unwrap().display().to_string());
            circles.push(format!("{}: {}", text(&package["name"]), names.collect::<Vec<_>>().join(" -> ")));
            imports.remove(&(circle.last().unwrap().clone(), circle[0].clone()));
        }
    }
    assert!(num_imports > 100, "imports are found: {num_imports}");
    assert!(circles.is_empty(), "circles of imports:\n{}", circles.join("\n"));
}

#[test]
fn low_crates_are_built_without_tensors_and_proto_without_a_runtime() {
    let workspace = Workspace::read();
    for (name, unwanted) in DOES_WITHOUT {
        let built = workspace.built_for(name);
        for unwanted in unwanted {
            assert!(!built.contains(*unwanted), "{name} is built with {unwanted}");
        }
    }
    let is_built = |name, with| workspace.built_for(name).contains(with);
    assert!(is_built("autodidact-policy", "candle-core"), "the tensors are looked for under their name");
    assert!(is_built("autodidact-bus", "tokio"), "the runtime is looked for under its name");
}

#[test]
fn every_crate_inherits_from_the_workspace() {
    for package in Workspace::read().members() {
        let name = text(&package["name"]);
        let manifest: Table = std::fs::read_to_string(text(&package["manifest_path"])).unwrap().parse().unwrap();
        let inherits = |value: &toml::Value| value.get("workspace").and_then(toml::Value::as_bool) == Some(true);
        for key in INHERITED {
            assert!(manifest["package"].get(key).is_some_and(inherits), "{name}: expected {key}.workspace = true");
        }
        assert!(manifest.get("lints").is_some_and(inherits), "{name}: expected [lints] with workspace = true");
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            for (dependency, source) in manifest.get(section).and_then(toml::Value::as_table).into_iter().flatten() {
                assert!(inherits(source), "{name}: {section}: expected {dependency}.workspace = true");
            }
        }
    }
}

/// The output of `cargo metadata`.
struct Workspace(Value);

impl Workspace {
    fn read() -> Workspace {
        let cargo = |args: &[&str]| {
            let output = Command::new(env!("CARGO")).args(args).output().unwrap();
            assert!(output.status.success(), "cargo {args:?}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        let version = cargo(&["-vV"]);
        let host = version.lines().find_map(|line| line.strip_prefix("host: ")).expect("cargo names its host");
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        let manifest = manifest.to_str().unwrap();
        // Only this machine's platform: crates that others need may not be on the disk.
        let platform = ["--filter-platform", host];
        let args = ["metadata", "--format-version", "1", "--manifest-path", manifest];
        Workspace(serde_json::from_str(&cargo(&[&args[..], &platform].concat())).unwrap())
    }

    fn members(&self) -> impl Iterator<Item = &Value> {
        let ids = list(&self.0["workspace_members"]);
        list(&self.0["packages"]).iter().filter(|package| ids.contains(&package["id"]))
    }

    /// Returns the names of all crates that are built for a member, itself included.
    fn built_for(&self, name: &str) -> BTreeSet<&str> {
        let nodes = list(&self.0["resolve"]["nodes"]).iter().map(|node| (text(&node["id"]), node));
        let nodes: BTreeMap<&str, &Value> = nodes.collect();
        let root = self.members().find(|package| package["name"] == name);
        let mut open = vec![text(&root.unwrap_or_else(|| panic!("expected a crate {name}"))["id"])];
        let mut found = BTreeSet::new();
        while let Some(id) = open.pop() {
            if found.insert(id) {
                let is_built =
                    |dependency: &&Value| list(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"] != "dev");
                let built = list(&nodes[id]["deps"]).iter().filter(is_built);
                open.extend(built.map(|dependency| text(&dependency["pkg"])));
            }
        }
        let packages = list(&self.0["packages"]).iter();
        packages.filter(|package| found.contains(text(&package["id"]))).map(|package| text(&package["name"])).collect()
    }
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a string, as documented")
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list, as documented")
}
