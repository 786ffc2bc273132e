//! Which file of a crate imports which: read from the paths that its code names, tests left out.
//!
//! Paths in the arguments of macros are not read.
//!
//! A module's file may name what is in the folder of the same name: that is what it is there for. So an import of a file below is no
//! edge; what is below may then import what stands above.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemMod, ItemUse, UseTree};

/// The files of a crate and what each imports of it.
pub(crate) struct Files {
    modules: BTreeMap<ModulePath, Module>,
}

/// `a::b` below the crate; the root is empty.
type ModulePath = Vec<String>;

struct Module {
    file: PathBuf,
    /// What it gives other names, or its own, to: the name, and the path as it is written.
    imported: BTreeMap<String, Vec<String>>,
    globs: Vec<Vec<String>>,
    /// Paths that its code names.
    named: BTreeSet<Vec<String>>,
    children: BTreeSet<String>,
}

impl Files {
    /// Reads a crate from its root file.
    pub(crate) fn read(root: &Path) -> Files {
        let mut files = Files { modules: BTreeMap::new() };
        files.add(Vec::new(), root.to_owned(), root.parent().unwrap());
        files
    }

    fn add(&mut self, path: ModulePath, file: PathBuf, folder: &Path) {
        let source = std::fs::read_to_string(&file).unwrap();
        let parsed = syn::parse_file(&source).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let mut found = Found::default();
        found.visit_file(&parsed);
        for name in &found.children {
            let (one, below) = (folder.join(format!("{name}.rs")), folder.join(name));
            let child = if one.exists() { one } else { below.join("mod.rs") };
            let child_path = [&path[..], std::slice::from_ref(name)].concat();
            self.add(child_path, child, &below);
        }
        let Found { imported, globs, named, children } = found;
        self.modules.insert(path, Module { file, imported, globs, named, children });
    }

    /// Lists pairs of files of which the first imports the second.
    pub(crate) fn imports(&self) -> BTreeSet<(PathBuf, PathBuf)> {
        let mut imports = BTreeSet::new();
        for (path, module) in &self.modules {
            let named = module.imported.values().chain(&module.globs).chain(&module.named);
            for target in named.filter_map(|named| self.resolve(path, named, 0)) {
                let is_below = target.len() >= path.len() && target[..path.len()] == path[..];
                if !is_below {
                    imports.insert((module.file.clone(), self.modules[&target].file.clone()));
                }
            }
        }
        imports
    }

    /// Finds the module in which what a path names is written; `None` where that is another crate's.
    fn resolve(&self, from: &[String], named: &[String], depth: usize) -> Option<ModulePath> {
        // Names that are given to each other in a circle do not compile.
        assert!(depth < 50, "{from:?} names {named:?}");
        let mut module = from.to_vec();
        let mut rest = named;
        match named.first()?.as_str() {
            "crate" => {
                module.clear();
                rest = &named[1..];
            }
            "self" => rest = &named[1..],
            "super" => {
                while rest.first().is_some_and(|segment| segment == "super") {
                    module.pop();
                    rest = &rest[1..];
                }
            }
            first => {
                let own = &self.modules[&module];
                if !own.children.contains(first) && !own.imported.contains_key(first) {
                    return None;
                }
                // `use name::...` beside an import of that name is of the crate of that name.
                if own.imported.get(first).is_some_and(|target| target[0] == first) {
                    return None;
                }
            }
        }
        while let Some((segment, later)) = rest.split_first() {
            let own = &self.modules[&module];
            if own.children.contains(segment) {
                module.push(segment.clone());
                rest = later;
            } else if let Some(target) = own.imported.get(segment) {
                let target = [&target[..], later].concat();
                return self.resolve(&module, &target, depth + 1);
            } else {
                let globs = own.globs.iter().filter_map(|glob| self.resolve(&module, glob, depth + 1));
                let through = globs.filter(|target| *target != module).find(|target| {
                    let target = &self.modules[target];
                    target.children.contains(segment) || target.imported.contains_key(segment)
                });
                return match through {
                    Some(target) => self.resolve(&target, &[&["self".to_owned()], rest].concat(), depth + 1),
                    None => Some(module),
                };
            }
        }
        Some(module)
    }
}

/// Finds a circle among imports: files of which each imports the next, and the last the first.
pub(crate) fn circle(imports: &BTreeSet<(PathBuf, PathBuf)>) -> Option<Vec<PathBuf>> {
    let mut imported_by = BTreeMap::<&Path, Vec<&Path>>::new();
    imports.iter().for_each(|(from, to)| imported_by.entry(from).or_default().push(to));
    let mut done = BTreeSet::new();
    imported_by.keys().find_map(|file| walk(file, &imported_by, &mut Vec::new(), &mut done))
}

fn walk<'a>(
    file: &'a Path,
    imported_by: &BTreeMap<&'a Path, Vec<&'a Path>>,
    way: &mut Vec<&'a Path>,
    done: &mut BTreeSet<&'a Path>,
) -> Option<Vec<PathBuf>> {
    if let Some(start) = way.iter().position(|passed| *passed == file) {
        return Some(way[start..].iter().map(|passed| passed.to_path_buf()).collect());
    }
    if done.contains(file) {
        return None;
    }
    way.push(file);
    let found = imported_by.get(file).into_iter().flatten().find_map(|next| walk(next, imported_by, way, done));
    way.pop();
    done.insert(file);
    found
}

/// What a file says.
#[derive(Default)]
struct Found {
    imported: BTreeMap<String, Vec<String>>,
    globs: Vec<Vec<String>>,
    named: BTreeSet<Vec<String>>,
    children: BTreeSet<String>,
}

impl Found {
    fn import(&mut self, prefix: &[String], tree: &UseTree) {
        let with = |name: &syn::Ident| [prefix, &[name.to_string()]].concat();
        match tree {
            UseTree::Path(path) => self.import(&with(&path.ident), &path.tree),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.import(prefix, tree)),
            UseTree::Glob(_) => self.globs.push(prefix.to_vec()),
            UseTree::Name(name) if name.ident == "self" => {
                drop(self.imported.insert(prefix.last().unwrap().clone(), prefix.to_vec()));
            }
            UseTree::Name(name) => drop(self.imported.insert(name.ident.to_string(), with(&name.ident))),
            // `as _` has no name, and is an import.
            UseTree::Rename(rename) if rename.rename == "_" => drop(self.named.insert(with(&rename.ident))),
            UseTree::Rename(rename) => drop(self.imported.insert(rename.rename.to_string(), with(&rename.ident))),
        }
    }
}

impl<'ast> Visit<'ast> for Found {
    fn visit_item(&mut self, item: &'ast Item) {
        if !is_of_tests(attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        match &module.content {
            Some(_) => visit::visit_item_mod(self, module),
            None => drop(self.children.insert(module.ident.to_string())),
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        self.import(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.segments.len() > 1 {
            self.named.insert(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        }
        visit::visit_path(self, path);
    }
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Whether something is compiled for tests alone.
fn is_of_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("test")
            || attribute.path().is_ident("cfg") && attribute.parse_args::<syn::Ident>().is_ok_and(|of| of == "test")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A crate of files: the name of each, and its source.
    fn imports(sources: &[(&str, &str)]) -> BTreeSet<(PathBuf, PathBuf)> {
        let folder = tempfile::tempdir().unwrap();
        for (name, source) in sources {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, source).unwrap();
        }
        let name = |file: PathBuf| file.strip_prefix(folder.path()).unwrap().to_owned();
        let imports = Files::read(&folder.path().join("lib.rs")).imports();
        imports.into_iter().map(|(from, to)| (name(from), name(to))).collect()
    }

    #[test]
    fn a_circle_is_found_through_re_exports_and_not_through_tests() {
        let root = ("lib.rs", "mod a; mod b; mod c; pub use a::A; pub struct Root;");
        let (b, below) = ("b.rs", "mod below; pub use self::below::B; fn f() { crate::c::g() }");
        let below = [root, (b, below), ("b/below.rs", "use super::f; use crate::Root; pub struct B;")];
        let a = ("a.rs", "use crate::b::{self, B}; pub struct A;");
        // `c` leads back to `a` by the name that the root gives it.
        let closing = [&below[..], &[a, ("c.rs", "use crate::A; pub fn g() {}")]].concat();
        let found = circle(&imports(&closing)).expect("a circle");
        let names: BTreeSet<&str> = found.iter().map(|file| file.to_str().unwrap()).collect();
        assert!(names.is_superset(&BTreeSet::from(["a.rs", "b.rs", "c.rs"])), "{names:?}");
        let open = [&below[..], &[a, ("c.rs", "pub fn g() {} #[cfg(test)] mod tests { use crate::A; }")]].concat();
        assert_eq!(circle(&imports(&open)), None);
        let expected = [
            ("a.rs", "b.rs"),
            ("a.rs", "b/below.rs"),
            ("b.rs", "c.rs"),
            ("b/below.rs", "b.rs"),
            ("b/below.rs", "lib.rs"),
        ];
        assert_eq!(imports(&open), expected.map(|(from, to)| (PathBuf::from(from), PathBuf::from(to))).into());
    }
}
