//! Where the programs under test are.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

use anyhow::Context;

static CHOSEN: OnceLock<PathBuf> = OnceLock::new();

/// Takes all programs from `dir` from now on; the first choice stays.
pub fn take_from(dir: &Path) {
    CHOSEN.get_or_init(|| dir.to_owned());
}

/// The path of program `name`: in the directory that [`take_from`] or `MESH_BIN_DIR`
/// names, else the newest of those beside this executable's target
/// directory, debug or release.
pub fn find(name: &str) -> anyhow::Result<PathBuf> {
    let chosen = CHOSEN.get().cloned().or_else(|| std::env::var_os("MESH_BIN_DIR").map(PathBuf::from));
    if let Some(dir) = chosen {
        let path = dir.join(name);
        return path.exists().then_some(path).with_context(|| format!("{} has no {name}", dir.display()));
    }
    let own = std::env::current_exe()?;
    // target/PROFILE/NAME, or target/PROFILE/deps/NAME for a test.
    let target = own.ancestors().find(|dir| dir.join("debug").is_dir() || dir.join("release").is_dir());
    let target = target.with_context(|| format!("{} is in no target directory", own.display()))?;
    let candidates = ["debug", "release"].map(|profile| target.join(profile).join(name));
    let built = |path: &PathBuf| -> Option<SystemTime> { path.metadata().ok()?.modified().ok() };
    let newest = candidates.into_iter().filter(|path| path.exists()).max_by_key(built);
    newest
        .with_context(|| format!("{name} is not built: run cargo build (it belongs in {})", target.display()))
}
