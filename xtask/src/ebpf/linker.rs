//! bpf-linker: one on the PATH if it fits, else our own, built into the target folder.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command::{cargo, output, run, timed};
use crate::paths;

/// The newest that builds with this workspace's Rust version.
const VERSION: &str = "0.10.4";

/// A bpf-linker that can be started.
pub(crate) struct Linker {
    pub(crate) path: PathBuf,
    /// What `bpf-linker --version` says.
    pub(crate) version: String,
}

pub(crate) fn find() -> Result<Linker> {
    let own = paths::tools().join("bin/bpf-linker");
    if let Some(linker) = check(Path::new("bpf-linker")).or_else(|| check(&own)) {
        return Ok(linker);
    }
    let install = ["install", "--locked", "--version", VERSION, "bpf-linker", "--root"];
    timed(&format!("building bpf-linker {VERSION} from crates.io (about three minutes, once)"), || {
        run(cargo().args(install).arg(paths::tools())).with_context(|| {
            format!(
                "without it the kernel programs cannot be linked; by hand: `cargo {} DIRECTORY`",
                install.join(" ")
            )
        })
    })?;
    check(&own).with_context(|| format!("{} does not start", own.display()))
}

fn check(path: &Path) -> Option<Linker> {
    let version = output(Command::new(path).arg("--version")).ok()?.trim().to_owned();
    let fits = version.strip_prefix("bpf-linker ").is_some_and(fits);
    fits.then(|| Linker { path: path.to_path_buf(), version })
}

/// Same minor version, and at least the patch we ask for.
fn fits(version: &str) -> bool {
    let parts = |text: &str| -> Vec<u32> { text.split('.').map_while(|part| part.parse().ok()).collect() };
    let (found, wanted) = (parts(version), parts(VERSION));
    found.get(..2) == wanted.get(..2) && found >= wanted
}

#[cfg(test)]
mod tests {
    use super::fits;

    #[test]
    fn only_the_same_minor_version_fits() {
        assert!(fits("0.10.4"));
        assert!(fits("0.10.5"));
        assert!(!fits("0.10.3"));
        assert!(!fits("0.9.15"));
        assert!(!fits("0.11.0"));
    }
}
