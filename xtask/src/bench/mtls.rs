//! The table of mutual TLS between two nodes: direct, this mesh by its own protocol and by HBONE, and a pair of nginx, in one run. Of
//! connections that are made and closed also a pair of nginx without TLS.
//!
//! A client pod on one node, a server pod on another. What carries the connection has a cgroup of its own on either node, whose
//! processor time and memory are counted; those of client and server are counted with all else.

mod lane;
mod memory;
mod nginx;
mod traffic;

use std::fs;

use anyhow::{Context, Result, ensure};
use mesh_harness::{binaries, sys};

use super::Args;
use super::report::Report;
use crate::command::{cargo, run as execute, timed};
use crate::{debian, ebpf, paths};
use lane::Lane;

/// A setting of a network namespace.
const CONGESTION_CONTROL: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

/// What carries a connection from pod to pod.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Kind {
    /// Nothing: what all others are compared with.
    Direct,
    /// This mesh, by the protocol between its own agents.
    Stream,
    /// This mesh, by HBONE.
    Hbone,
    /// nginx at both ends, TLS 1.3, both verified.
    Nginx,
    /// nginx at both ends, which only copies: what two proxies cost a connection that is made and closed, whoever they are.
    Plain,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Part {
    /// Of idle connections and of an idle agent.
    Memory,
    /// By one connection and by eight.
    Throughput,
    /// Of small messages.
    RoundTrips,
    /// Made, used once and closed.
    Connects,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Stream => "mesh",
            Self::Hbone => "mesh by HBONE",
            Self::Nginx => "nginx",
            Self::Plain => "nginx without TLS",
        }
    }

    fn is_mesh(self) -> bool {
        match self {
            Self::Stream | Self::Hbone => true,
            Self::Direct | Self::Nginx | Self::Plain => false,
        }
    }
}

pub(super) fn run(args: &Args, report: &mut Report) -> Result<()> {
    ensure!(sys::is_root(), "this bench needs root, for network namespaces, cgroups and kernel programs");
    let others =
        [Kind::Stream, Kind::Hbone, Kind::Nginx].into_iter().filter(|kind| args.lanes.contains(kind));
    let kinds: Vec<Kind> = [Kind::Direct].into_iter().chain(others).collect();
    let plain = args.lanes.contains(&Kind::Plain).then_some(Kind::Plain);
    build(&kinds, plain)?;
    let congestion_control = match &args.congestion_control {
        Some(name) => name.clone(),
        None => fs::read_to_string(CONGESTION_CONTROL).context(CONGESTION_CONTROL)?.trim().to_owned(),
    };
    report.under(format!("congestion control {congestion_control}"));
    let start =
        |kind: &Kind| timed(&format!("lane: {}", kind.name()), || Lane::start(*kind, &congestion_control));
    let wanted = |part: Part| args.parts.contains(&part);
    // Memory first: afterwards what was needed at the busiest time is kept for the next.
    if wanted(Part::Memory) {
        timed("idle connections", || {
            for kind in kinds.iter().filter(|kind| **kind != Kind::Direct) {
                memory::idle_connections(args, &start(kind)?, report)?;
            }
            Ok(())
        })?;
        if kinds.contains(&Kind::Stream) {
            timed("memory of an idle agent", || memory::idle_agent(args, report))?;
        }
    }
    let mut lanes = kinds.iter().map(start).collect::<Result<Vec<Lane>>>()?;
    if wanted(Part::Throughput) {
        timed("throughput, one connection", || traffic::throughput(args, &lanes, 1, report))?;
        timed("throughput, eight connections", || traffic::throughput(args, &lanes, 8, report))?;
    }
    if wanted(Part::RoundTrips) {
        timed("round trips", || traffic::round_trips(args, &lanes, report))?;
    }
    if wanted(Part::Connects) {
        lanes.extend(plain.iter().map(start).collect::<Result<Vec<Lane>>>()?);
        timed("connect, request, response, close", || traffic::connections(args, &lanes, report))?;
    }
    Ok(())
}

fn build(kinds: &[Kind], plain: Option<Kind>) -> Result<()> {
    debian::ensure(&["iproute2"], "the bench")?;
    if kinds.contains(&Kind::Nginx) || plain.is_some() {
        debian::ensure(nginx::PACKAGES, "the peer of the bench")?;
    }
    let mut build = cargo();
    build.args(["build", "--release", "--package", "mesh-harness"]);
    if kinds.iter().any(|kind| kind.is_mesh()) {
        ebpf::build(false)?;
        build.args(["--package", "mesh-agent", "--package", "mesh-control"]);
    }
    timed("building release programs", || execute(&mut build))?;
    binaries::take_from(&paths::target().join("release"));
    Ok(())
}
