//! A compiler that can build `core` for the BPF target: it needs core's sources, and has to accept unstable flags.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{forget_outer_cargo, output};
use crate::{debian, paths};

/// Debian's newest compiler, which it keeps for browsers beside its normal one.
const PACKAGES: &[&str] = &["rustc-web", "cargo-web", "rust-web-src"];
const ADVICE: &str = "run `rustup toolchain install nightly --profile minimal --component rust-src`, \
     or on Debian, as root, `apt-get install rustc-web cargo-web rust-web-src`";

/// A compiler with core's sources.
pub(crate) struct Compiler {
    /// For people.
    pub(crate) name: String,
    /// What `rustc -vV` says: the object is stale when it changes.
    pub(crate) version: String,
    /// Where bpf-linker finds an LLVM that reads what this compiler writes.
    pub(crate) libraries: Vec<PathBuf>,
    kind: Kind,
}

enum Kind {
    Nightly,
    Distribution,
}

impl Compiler {
    /// This compiler's cargo, run in the repository.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = match self.kind {
            Kind::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo"]);
                command
            }
            Kind::Distribution => {
                let mut command = Command::new("/usr/bin/cargo");
                command.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
                command
            }
        };
        forget_outer_cargo(&mut command);
        command.current_dir(paths::root());
        command
    }
}

/// rustup's nightly if it has core's sources, else the distribution's compiler, installed if need be.
pub(crate) fn find() -> Result<Compiler> {
    if let Some(nightly) = nightly()? {
        return Ok(nightly);
    }
    if let Some(distribution) = distribution()? {
        return Ok(distribution);
    }
    if !debian::has_apt() {
        bail!("no compiler with core's sources: {ADVICE}");
    }
    debian::ensure(PACKAGES, "building the kernel programs").context(ADVICE)?;
    distribution()?.with_context(|| {
        format!("/usr/bin/rustc is older than {} or has no sources: {ADVICE}", env!("CARGO_PKG_RUST_VERSION"))
    })
}

fn nightly() -> Result<Option<Compiler>> {
    let Some(sysroot) = sysroot(Some("nightly")) else { return Ok(None) };
    if !has_sources(&sysroot) {
        return Ok(None);
    }
    let version = output(rustup(&["run", "nightly", "rustc", "-vV"]).current_dir("/"))?;
    let libraries = vec![sysroot.join("lib")];
    let name = format!("rustup's nightly, {}", version.lines().next().unwrap_or_default());
    Ok(Some(Compiler { name, version, libraries, kind: Kind::Nightly }))
}

fn distribution() -> Result<Option<Compiler>> {
    let (rustc, cargo) = (Path::new("/usr/bin/rustc"), Path::new("/usr/bin/cargo"));
    if !rustc.exists() || !cargo.exists() {
        return Ok(None);
    }
    let own = output(Command::new(rustc).args(["--print", "sysroot"]))?;
    let version = output(Command::new(rustc).arg("-vV"))?;
    if !has_sources(Path::new(own.trim())) || !new_enough(&version, env!("CARGO_PKG_RUST_VERSION")) {
        return Ok(None);
    }
    // bpf-linker is built by rustup's stable compiler and looks for that one's LLVM.
    let stable = sysroot(None).map(|sysroot| sysroot.join("lib"));
    let libraries = stable.into_iter().chain([PathBuf::from("/usr/lib/x86_64-linux-gnu")]).collect();
    let name = format!("the distribution's, {}", version.lines().next().unwrap_or_default());
    Ok(Some(Compiler { name, version, libraries, kind: Kind::Distribution }))
}

/// The folder of one of rustup's toolchains (the default one without a name), if rustup has it.
fn sysroot(toolchain: Option<&str>) -> Option<PathBuf> {
    let mut which = rustup(&["which"]);
    if let Some(toolchain) = toolchain {
        which.args(["--toolchain", toolchain]);
    }
    let rustc = output(which.arg("rustc").current_dir("/")).ok()?;
    Some(Path::new(rustc.trim()).parent()?.parent()?.to_path_buf())
}

/// rustup, told not to download a toolchain that is missing.
fn rustup(args: &[&str]) -> Command {
    let mut command = Command::new("rustup");
    forget_outer_cargo(&mut command);
    command.args(args).env("RUSTUP_AUTO_INSTALL", "0");
    command
}

fn has_sources(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").exists()
}

/// Whether the release that `rustc -vV` names is at least `wanted` (`1.95`).
fn new_enough(verbose_version: &str, wanted: &str) -> bool {
    let release = verbose_version.lines().find_map(|line| line.strip_prefix("release: "));
    let numbers = |text: &str| -> Vec<u32> {
        text.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse().ok()).collect()
    };
    release.is_some_and(|release| numbers(release) >= numbers(wanted))
}

#[cfg(test)]
mod tests {
    use super::new_enough;

    #[test]
    fn releases_compare_by_number() {
        assert!(new_enough("rustc 1.96.0\nrelease: 1.96.0\n", "1.95"));
        assert!(new_enough("release: 1.95.0", "1.95"));
        assert!(new_enough("release: 1.100.0-nightly", "1.95"));
        assert!(!new_enough("release: 1.63.0", "1.95"));
        assert!(!new_enough("", "1.95"));
    }
}
