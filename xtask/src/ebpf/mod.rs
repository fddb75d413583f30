//! `cargo xtask build-ebpf`: the kernel programs, with whichever toolchain this machine has or can get.

mod linker;
mod stamp;
mod strip;
mod toolchain;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::command::{run as execute, timed};
use crate::paths;
use linker::Linker;
use toolchain::Compiler;

/// `cargo xtask build-ebpf`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build even if nothing changed since the last time.
    #[arg(long)]
    force: bool,
}

/// Debug information becomes BTF. CPU v3 (kernel 5.12) has atomics that return the old value and 32-bit jumps.
const FLAGS: &[&str] = &["-Cdebuginfo=2", "-Clink-arg=--btf", "-Ctarget-cpu=v3"];

pub(crate) fn run(args: &Args) -> Result<()> {
    let object = build(args.force)?;
    let size = std::fs::metadata(&object).with_context(|| format!("cannot read {}", object.display()))?.len();
    println!("xtask: {} ({size} bytes)", object.display());
    Ok(())
}

/// Builds the kernel programs unless they are up to date, and returns where they are.
pub(crate) fn build(force: bool) -> Result<PathBuf> {
    let object = paths::kernel_object();
    let compiler = toolchain::find()?;
    let linker = linker::find()?;
    let stamp = stamp::Stamp::now(&[&compiler.version, &linker.version, &FLAGS.join(" "), "stripped"])?;
    if !force && object.exists() && stamp.matches() {
        println!("xtask: kernel programs are up to date");
        return Ok(object);
    }
    println!("xtask: compiler: {}", compiler.name);
    println!("xtask: linker: {} ({})", linker.path.display(), linker.version);
    timed("building the kernel programs (the first time builds core, too: about a minute)", || {
        compile(&compiler, &linker)
    })?;
    publish(&build_folder().join("bpfel-unknown-none/kernel/mesh-ebpf"), &object)?;
    stamp.write()?;
    Ok(object)
}

fn build_folder() -> PathBuf {
    paths::own_target().join("ebpf")
}

fn compile(compiler: &Compiler, linker: &Linker) -> Result<()> {
    let mut cargo = compiler.cargo();
    cargo.args(["build", "--locked", "--package", "mesh-ebpf", "--profile", "kernel"]);
    cargo
        .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core", "--target-dir"])
        .arg(build_folder());
    cargo.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));
    cargo.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &linker.path);
    cargo.env("LD_LIBRARY_PATH", search_path(&compiler.libraries));
    cargo.env_remove("RUSTFLAGS").env_remove("CARGO_TARGET_DIR").env_remove("RUSTC_WRAPPER");
    execute(&mut cargo)
}

/// Where bpf-linker looks for LLVM; what the user set comes last.
fn search_path(libraries: &[PathBuf]) -> OsString {
    let mut all: Vec<PathBuf> = libraries.to_vec();
    if let Some(users) = std::env::var_os("LD_LIBRARY_PATH") {
        all.extend(std::env::split_paths(&users));
    }
    std::env::join_paths(all).unwrap_or_default()
}

/// Puts the object in place whole, without what only a debugger reads, and only if it differs: the agent is rebuilt when its time changes.
fn publish(built: &Path, object: &Path) -> Result<()> {
    let new = std::fs::read(built).with_context(|| format!("cannot read {}", built.display()))?;
    let new = strip::strip(&new)?;
    if std::fs::read(object).is_ok_and(|old| old == new) {
        return Ok(());
    }
    let folder = object.parent().context("the object has no folder")?;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let temporary = object.with_extension(format!("new-{}", std::process::id()));
    std::fs::write(&temporary, new).with_context(|| format!("cannot write {}", temporary.display()))?;
    std::fs::rename(&temporary, object).with_context(|| format!("cannot replace {}", object.display()))
}
