//! Where manifests come from: a directory, read as a whole at first and then as it changes.

mod directory;
mod pending;
mod watch;

use std::{path::Path, sync::Arc};

pub(crate) use watch::Source;

/// What is known of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    Text(String),
    /// There, but not to be read: its last content stays in force.
    Unreadable(String),
    Gone,
}

/// Files that may have changed.
pub(crate) type Batch = Vec<(Arc<Path>, Reading)>;

/// True for the names of manifests; hidden files are editors' and Kubernetes' own.
fn is_manifest(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    !is_hidden(path) && matches!(extension, Some("yaml" | "yml" | "json"))
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}
