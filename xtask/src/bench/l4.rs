//! The table of kernel load balancing: direct to the pod, this mesh, and kube-proxy's iptables rules, side by side.

mod iptables;
mod scale;
mod traffic;
mod world;

use anyhow::{Result, ensure};
use mesh_harness::{binaries, sys};

use super::Args;
use super::report::Report;
use crate::command::{cargo, run as execute, timed};
use crate::{debian, ebpf, paths};
use world::World;

/// Services in the small case.
const FEW: u32 = 10;

pub(super) fn run(args: &Args, report: &mut Report) -> Result<()> {
    ensure!(sys::is_root(), "this bench needs root, for network namespaces, cgroups and kernel programs");
    build()?;
    let few = timed("setting up the world of 10 services", || World::new(FEW))?;
    let many =
        timed(&format!("setting up the world of {} services", args.services), || World::new(args.services))?;
    let direct = timed("lane: direct", || few.direct())?;
    let lanes = [
        timed("lane: mesh, few services", || few.mesh())?,
        timed("lane: iptables, few services", || few.iptables())?,
        timed("lane: mesh, many services", || many.mesh())?,
        timed("lane: iptables, many services", || many.iptables())?,
    ];
    let [mesh_few, iptables_few, mesh_many, iptables_many] = &lanes;
    let lanes = traffic::Lanes { direct: &direct, mesh_few, iptables_few, mesh_many, iptables_many };
    timed("connect, request, response, close", || traffic::connections(args, &lanes, report))?;
    timed("established connections", || traffic::established(args, &direct, mesh_many, report))?;
    timed("kernel time", || scale::kernel_time(args, mesh_many, report))?;
    timed("changes", || scale::changes(&many, mesh_many, report))?;
    scale::memory(mesh_many, report)?;
    timed("starts", || scale::starts(args, &many, report))
}

fn build() -> Result<()> {
    debian::ensure(&["iproute2", "iptables"], "the bench")?;
    ebpf::build(false)?;
    let mut build = cargo();
    build.args(["build", "--release", "--package", "mesh-agent", "--package", "mesh-control"]);
    build.args(["--package", "mesh-harness"]);
    timed("building release programs", || execute(&mut build))?;
    binaries::take_from(&paths::target().join("release"));
    Ok(())
}
