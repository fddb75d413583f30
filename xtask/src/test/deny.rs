//! cargo-deny: licences, bans and sources. Its list of advisories lives on a git host, which not every machine
//! that tests can reach, so those are left to a run with network: `cargo deny check advisories`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::Outcome;
use crate::command::{cargo, output, run, timed};
use crate::paths;

/// Without its default features it links no TLS, which halves the time to build it.
const VERSION: &str = "0.18.3";

pub(crate) fn check() -> Result<Outcome> {
    let deny = find()?;
    let mut command = Command::new(deny);
    command.current_dir(paths::root()).args([
        "--log-level",
        "error",
        "check",
        "--hide-inclusion-graph",
        "bans",
        "licenses",
        "sources",
    ]);
    run(&mut command)?;
    let mut outcome = Outcome { passed: 3, ..Outcome::default() };
    outcome.add(Outcome::skipped(
        "advisories: their list is fetched from a git host; run `cargo deny check advisories`",
    ));
    Ok(outcome)
}

fn find() -> Result<PathBuf> {
    let own = paths::tools().join("bin/cargo-deny");
    if let Some(found) = [Path::new("cargo-deny"), &own].into_iter().find(|path| starts(path)) {
        return Ok(found.to_path_buf());
    }
    let install = [
        "install",
        "--locked",
        "--debug",
        "--no-default-features",
        "--version",
        VERSION,
        "cargo-deny",
        "--root",
    ];
    timed(&format!("building cargo-deny {VERSION} from crates.io (about three minutes, once)"), || {
        run(cargo().args(install).arg(paths::tools()))
            .with_context(|| format!("by hand: `cargo {} DIRECTORY`", install.join(" ")))
    })?;
    Ok(own)
}

fn starts(path: &Path) -> bool {
    output(Command::new(path).arg("--version")).is_ok()
}
