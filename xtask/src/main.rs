//! Tasks of this repository, run as `cargo xtask NAME`.
//!
//! Each task installs or builds what it needs by itself, says what it is doing, and on failure names the command
//! that a person would run instead.

mod bench;
mod command;
mod debian;
mod demo;
mod ebpf;
mod fuzz;
mod paths;
mod systemd;
mod test;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Tasks of this repository", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build the kernel programs into target/bpf/mesh.o, which the agent embeds.
    BuildEbpf(ebpf::Args),
    /// Show the mesh at work: two nodes, a control plane and a small shop on this machine.
    Demo(demo::Args),
    /// Run every test tier that can run on this machine.
    Test(test::Args),
    /// Run each hook's kernel test on Debian's kernels under qemu.
    Vmtest(vm::Args),
    /// Feed each parser what nobody would send.
    Fuzz(fuzz::Args),
    /// Measure: `cargo xtask bench l4`.
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().task {
        Task::BuildEbpf(args) => ebpf::run(&args),
        Task::Demo(args) => demo::run(args),
        Task::Test(args) => test::run(&args),
        Task::Vmtest(args) => vm::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Bench(args) => bench::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
