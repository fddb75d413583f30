//! `cargo xtask demo`: two nodes, a control plane and a small shop on this machine, and what the mesh does for it.

mod guarded;
mod shop;
mod story;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use mesh_harness::{binaries, site, sys};

use crate::command::{cargo, timed};
use crate::{debian, ebpf, paths};
use shop::Shop;

/// `cargo xtask demo`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave it running, and print commands to try.
    #[arg(long)]
    keep: bool,
    /// Remove what an earlier `--keep` left running.
    #[arg(long, conflicts_with = "keep")]
    stop: bool,
}

pub(crate) fn run(args: Args) -> Result<()> {
    ensure!(
        sys::is_root(),
        "the demonstration needs root, for network namespaces, cgroups and kernel programs"
    );
    if args.stop {
        return stop();
    }
    let programs = build(std::env::var_os("MESH_RELEASE").is_some())?;
    binaries::take_from(&programs);
    let mut shop = timed("starting two nodes, a control plane and the shop", || Shop::open(args.keep))?;
    story::tell(&mut shop)?;
    if args.keep {
        story::invite(&shop, &programs);
    }
    Ok(())
}

/// Builds everything that the demonstration runs, and returns where it is.
fn build(release: bool) -> Result<PathBuf> {
    debian::ensure(&["iproute2"], "the nodes of the demonstration")?;
    ebpf::build(false)?;
    let profile = if release { "release" } else { "debug" };
    let mut build = cargo();
    build.arg("build").args(release.then_some("--release"));
    for package in ["mesh-agent", "mesh-control", "mesh-harness"] {
        build.args(["--package", package]);
    }
    timed("building the agent, the control plane and the shop", || crate::command::run(&mut build))?;
    Ok(paths::target().join(profile))
}

fn stop() -> Result<()> {
    let kept = site::kept()?;
    for id in &kept {
        site::remove(id)?;
        println!("{id} is gone");
    }
    if kept.is_empty() {
        println!("nothing was kept");
    }
    Ok(())
}

/// The path as a person in the repository would type it.
fn short(path: &Path) -> String {
    path.strip_prefix(paths::root()).unwrap_or(path).display().to_string()
}
