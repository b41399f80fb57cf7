//! The house rules as tests: who imports whom, how long a file may be, where `unsafe` may stand.
//!
//! The tables below are the rules; ARCHITECTURE.md explains them. A change that needs another
//! rule changes both in one commit.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Modules that every module may import.
const LAYER_0: &[&str] = &["tensor", "request", "output", "config", "telemetry"];

/// Every other module and what it may import beside layer 0. `*` is everything.
const IMPORTS: &[(&str, &[&str])] = &[
    ("main", &["*"]),
    ("lib", &["*"]),
    ("cli", &["*"]),
    ("server", &["api", "engine", "text"]),
    ("engine", &["scheduler", "runner", "text"]),
    ("runner", &["model", "device", "ops", "scheduler", "kv"]),
    ("model", &["weights", "checkpoint", "device", "ops", "parallel", "formats"]),
    ("weights", &["checkpoint", "device", "formats", "parallel", "ops"]),
    ("device", &["ops", "parallel"]),
    ("ops", &["formats"]),
    ("checkpoint", &["formats"]),
    ("scheduler", &["kv"]),
    ("formats", &[]),
    ("parallel", &[]),
    ("text", &[]),
    ("api", &[]),
    ("kv", &[]),
];

/// Files and folders that may contain `unsafe`, each for a reason given in ARCHITECTURE.md.
const UNSAFE_ALLOWED: &[&str] = &[
    "src/tensor.rs",
    "src/tensor/",
    "src/ops/cpu/",
    "src/ops/cuda/",
    "src/formats/",
    "src/checkpoint/",
];

/// Files that may depend on a Cargo feature: none, there is one feature set.
const FEATURE_ALLOWED: &[&str] = &[];

/// No source file is longer.
const MAX_LINES: usize = 600;

/// Names that say nothing.
const REFUSED_NAMES: &[&str] = &["utils", "util", "helpers", "common", "misc", "manager"];

struct Source {
    /// Relative to the crate, with `/`.
    path: String,
    text: String,
}

fn sources(folders: &[&str]) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in folders {
        collect(&root.join(folder), &mut files);
    }
    files.sort();
    let read = |path: PathBuf| {
        let relative = path.strip_prefix(root).expect("files lie under the crate");
        Source {
            path: relative.to_string_lossy().replace('\\', "/"),
            text: fs::read_to_string(&path).expect("sources are UTF-8"),
        }
    };
    let sources: Vec<Source> = files.into_iter().map(read).collect();
    assert!(!sources.is_empty(), "no sources under {folders:?}");
    sources
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.expect("the folder can be listed").path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// The code of each line, without comments.
fn code_lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(|line| line.split("//").next().unwrap_or_default())
}

/// The top-level module that a file under `src/` belongs to.
fn module_of(path: &str) -> &str {
    let inside = path.strip_prefix("src/").expect("a source file");
    let first = inside.split('/').next().expect("a path has a first part");
    first.strip_suffix(".rs").unwrap_or(first)
}

/// Top-level modules that the code names after `crate::`, alone or in a group, or by climbing
/// out of its own module.
fn imported_modules(text: &str) -> BTreeSet<String> {
    let code = code_lines(text).collect::<Vec<_>>().join("\n");
    let mut modules = BTreeSet::new();
    for (start, climb) in code.match_indices("super::super::") {
        let name = module_name(code[start + climb.len()..].trim_start_matches("super::"));
        modules.extend(name.filter(|name| is_top_level(name)));
    }
    for (start, _) in code.match_indices("crate::") {
        if code[..start].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &code[start + "crate::".len()..];
        match rest.strip_prefix('{') {
            Some(group) => modules.extend(group_heads(group)),
            None => modules.extend(module_name(rest)),
        }
    }
    modules
}

fn is_top_level(name: &str) -> bool {
    LAYER_0.contains(&name) || IMPORTS.iter().any(|(module, _)| *module == name)
}

/// First names of the parts of a `{…}` group, whose opening brace is already gone.
fn group_heads(group: &str) -> Vec<String> {
    let (mut depth, mut part, mut heads) = (0, String::new(), Vec::new());
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => heads.extend(module_name(std::mem::take(&mut part).trim())),
            _ if depth == 0 => part.push(c),
            _ => {}
        }
    }
    heads.extend(module_name(part.trim()));
    heads
}

/// The name that `text` starts with, when it is a module's.
fn module_name(text: &str) -> Option<String> {
    let name: String = text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    name.starts_with(char::is_lowercase).then_some(name)
}

fn report(violations: &[String]) {
    assert!(violations.is_empty(), "{} violations:\n{}", violations.len(), violations.join("\n"));
}

#[test]
fn modules_import_only_what_their_layer_allows() {
    let mut violations = Vec::new();
    for source in sources(&["src"]) {
        let module = module_of(&source.path);
        let allowed = match IMPORTS.iter().find(|(name, _)| *name == module) {
            Some((_, allowed)) => *allowed,
            None if LAYER_0.contains(&module) => &[],
            None => {
                violations.push(format!("{}: module `{module}` has no layer", source.path));
                continue;
            }
        };
        for imported in imported_modules(&source.text) {
            let is_allowed = imported == module
                || allowed.contains(&"*")
                || LAYER_0.contains(&imported.as_str())
                || allowed.contains(&imported.as_str());
            if !is_allowed {
                violations.push(format!("{}: may not import crate::{imported}", source.path));
            }
        }
    }
    report(&violations);
}

#[test]
fn no_file_is_longer_than_the_wall() {
    let violations: Vec<_> = sources(&["src", "tests", "benches"])
        .into_iter()
        .map(|s| (s.path, s.text.lines().count()))
        .filter(|(_, lines)| *lines > MAX_LINES)
        .map(|(path, lines)| format!("{path}: {lines} lines, at most {MAX_LINES}"))
        .collect();
    report(&violations);
}

#[test]
fn every_file_says_what_it_is() {
    let violations: Vec<_> = sources(&["src", "tests", "benches"])
        .into_iter()
        .filter(|s| !s.text.starts_with("//!"))
        .map(|s| format!("{}: must open with `//!`", s.path))
        .collect();
    report(&violations);
}

#[test]
fn unsafe_stands_only_where_it_is_allowed() {
    let is_unsafe = |line: &str| {
        line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe")
    };
    let violations: Vec<_> = sources(&["src"])
        .into_iter()
        .filter(|s| !UNSAFE_ALLOWED.iter().any(|allowed| s.path.starts_with(allowed)))
        .filter(|s| code_lines(&s.text).any(is_unsafe))
        .map(|s| format!("{}: may not contain `unsafe`", s.path))
        .collect();
    report(&violations);
}

#[test]
fn features_split_no_code() {
    let mentions = ["cfg(feature", "cfg(not(feature", "cfg_attr(feature", "cfg!(feature"];
    let violations: Vec<_> = sources(&["src"])
        .into_iter()
        .filter(|s| !FEATURE_ALLOWED.contains(&s.path.as_str()))
        .filter(|s| mentions.iter().any(|mention| s.text.contains(mention)))
        .map(|s| format!("{}: may not depend on a Cargo feature", s.path))
        .collect();
    report(&violations);
}

#[test]
fn every_file_name_says_something() {
    let violations: Vec<_> = sources(&["src"])
        .into_iter()
        .filter(|s| s.path.split(['/', '.']).any(|part| REFUSED_NAMES.contains(&part)))
        .map(|s| format!("{}: name it after what it holds", s.path))
        .collect();
    report(&violations);
}

#[test]
fn the_rules_see_through_groups_and_comments() {
    let text = "use crate::{server, text::{a, b}};\n// crate::engine\nlet x = crate::kv::f();\n\
                use super::super::ops::args;\nuse super::super::neighbour;";
    let expected = ["kv", "ops", "server", "text"].map(str::to_owned).into();
    assert_eq!(imported_modules(text), expected);
}
