//! Where things are in the repository and in its target folder.

use std::path::{Path, PathBuf};

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Where cargo puts what it builds for this machine.
pub(crate) fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(elsewhere) => root().join(elsewhere),
        None => own_target(),
    }
}

/// What xtask itself makes or downloads: always in the repository, so that it is kept between runs, and so that the
/// agent's build script finds the kernel programs.
pub(crate) fn own_target() -> PathBuf {
    root().join("target")
}

/// A program of this workspace in the development profile.
pub(crate) fn program(name: &str) -> PathBuf {
    target().join("debug").join(name)
}

/// Tools built from crates.io; not on the user's PATH.
pub(crate) fn tools() -> PathBuf {
    own_target().join("tools")
}

/// The kernel programs, as the agent embeds them.
pub(crate) fn kernel_object() -> PathBuf {
    own_target().join("bpf/mesh.o")
}
