//! Integration tests by name: `api_*`, `node_*`, `interop_*` are tiers of their own, the rest belongs to `unit`.

use std::path::Path;

use anyhow::{Context, Result};

use crate::paths;

/// One file of integration tests.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TestFile {
    /// The package's folder, relative to the root.
    pub(crate) folder: String,
    pub(crate) name: String,
}

/// Packages with tests for this machine; `tests/kernel` is a tier with its own runner.
const FOLDERS: &[&str] = &["mesh-agent", "mesh-common", "mesh-control", "tests", "tests/harness", "xtask"];
/// Prefixes that are tiers.
const TIERS: &[&str] = &["api_", "node_", "interop_"];

/// The test files that start with `prefix`.
pub(crate) fn with_prefix(prefix: &str) -> Result<Vec<TestFile>> {
    Ok(all()?.into_iter().filter(|file| file.name.starts_with(prefix)).collect())
}

/// The test files of no tier.
pub(crate) fn others() -> Result<Vec<TestFile>> {
    Ok(all()?.into_iter().filter(|file| !TIERS.iter().any(|prefix| file.name.starts_with(prefix))).collect())
}

fn all() -> Result<Vec<TestFile>> {
    let mut found = Vec::new();
    for folder in FOLDERS {
        let tests = paths::root().join(folder).join("tests");
        if tests.is_dir() {
            found.extend(in_folder(folder, &tests)?);
        }
    }
    found.sort();
    Ok(found)
}

fn in_folder(folder: &str, tests: &Path) -> Result<Vec<TestFile>> {
    let context = || format!("cannot read {}", tests.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(tests).with_context(context)? {
        let path = entry.with_context(context)?.path();
        // As cargo finds them: a file, or a folder with a main.rs.
        let is_test =
            path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").exists();
        if let (true, Some(name)) = (is_test, path.file_stem()) {
            found.push(TestFile { folder: folder.to_owned(), name: name.to_string_lossy().into_owned() });
        }
    }
    Ok(found)
}
