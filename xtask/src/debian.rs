//! Debian packages by name.

use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::command::{line, output, timed};

/// Whether this process may install packages and make namespaces.
pub(crate) fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Makes sure that `packages` are installed; says which command to run where it cannot.
pub(crate) fn ensure(packages: &[&str], purpose: &str) -> Result<()> {
    let missing: Vec<&str> = packages.iter().copied().filter(|name| !installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !has_apt() {
        bail!("{purpose} needs what Debian packages as {names}; install the equivalent of this system");
    }
    let mut install = Command::new("apt-get");
    // Without --no-remove, installing qemu can take other packages of the user away.
    install.args(["install", "--yes", "--quiet", "--no-install-recommends", "--no-remove"]);
    install.args(["--option", "DPkg::Lock::Timeout=300"]).args(&missing);
    install.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    if !is_root() {
        bail!(
            "{purpose} needs Debian packages; run as root: apt-get install --no-install-recommends {names}"
        );
    }
    timed(&format!("installing {names} for {purpose}"), || {
        if no_lists() {
            update()?;
            quietly(&mut install)
        } else {
            // Lists of another day may name versions that are gone.
            quietly(&mut install).or_else(|_stale| update().and_then(|()| quietly(&mut install)))
        }
    })
}

/// Whether this system has apt.
pub(crate) fn has_apt() -> bool {
    output(Command::new("apt-get").arg("--version")).is_ok()
}

/// Fetches the lists of packages.
pub(crate) fn update() -> Result<()> {
    quietly(Command::new("apt-get").args(["update", "--quiet", "--option", "DPkg::Lock::Timeout=300"]))
}

fn installed(package: &str) -> bool {
    let query =
        output(Command::new("dpkg-query").args(["--show", "--showformat=${db:Status-Status}", package]));
    query.is_ok_and(|status| status == "installed")
}

fn no_lists() -> bool {
    output(Command::new("apt-cache").args(["show", "--no-all-versions", "bash"])).is_err()
}

/// Shows the output only of what failed.
fn quietly(command: &mut Command) -> Result<()> {
    println!("xtask: {}", line(command));
    output(command).map(drop)
}
