//! Starts any command as an application of a pod would start.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use mesh_harness::sys::enter_network;

/// Enters the namespace and the cgroup, and becomes the command.
pub(crate) fn run(netns: &Path, cgroup: &Path, command: &[String]) -> anyhow::Result<()> {
    let file = File::open(netns).with_context(|| netns.display().to_string())?;
    std::fs::write(cgroup.join("cgroup.procs"), "0").with_context(|| cgroup.display().to_string())?;
    enter_network(file.as_fd()).context("entering the network namespace")?;
    let (program, arguments) = command.split_first().context("no command")?;
    Err(Command::new(program).args(arguments).exec()).with_context(|| program.clone())
}
