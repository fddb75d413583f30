//! Whether the kernel programs are up to date: a fingerprint of all they are made of.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::paths;

const SOURCES: &[&str] =
    &["mesh-ebpf", "mesh-common/src", "mesh-common/Cargo.toml", "Cargo.toml", "Cargo.lock"];

/// Fingerprint of sources and tools. Not cryptographic: it guards against staleness, not against an enemy.
pub(crate) struct Stamp(String);

impl Stamp {
    /// Of the sources as they are now, and of `tools`.
    pub(crate) fn now(tools: &[&str]) -> Result<Self> {
        let mut hasher = DefaultHasher::new();
        tools.hash(&mut hasher);
        let root = paths::root();
        for source in SOURCES {
            add(&mut hasher, &root.join(source))?;
        }
        Ok(Self(format!("{:016x}\n", hasher.finish())))
    }

    /// Whether the last build was made of the same.
    pub(crate) fn matches(&self) -> bool {
        std::fs::read_to_string(file()).is_ok_and(|last| last == self.0)
    }

    /// Notes that the object is now made of this.
    pub(crate) fn write(&self) -> Result<()> {
        std::fs::write(file(), &self.0).with_context(|| format!("cannot write {}", file().display()))
    }
}

/// Not beside the object: the agent is built again when anything in that folder changes.
fn file() -> PathBuf {
    paths::own_target().join("ebpf/mesh.stamp")
}

fn add(hasher: &mut DefaultHasher, path: &Path) -> Result<()> {
    let context = || format!("cannot read {}", path.display());
    path.hash(hasher);
    if !path.is_dir() {
        std::fs::read(path).with_context(context)?.hash(hasher);
        return Ok(());
    }
    let entries = std::fs::read_dir(path).with_context(context)?;
    let entries: std::io::Result<Vec<PathBuf>> =
        entries.map(|entry| entry.map(|entry| entry.path())).collect();
    let mut entries = entries.with_context(context)?;
    entries.sort();
    entries.iter().try_for_each(|entry| add(hasher, entry))
}
