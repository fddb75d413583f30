//! Many connections: idle ones, and all at once.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use mesh_harness::process::anonymous_bytes_of;
use mesh_harness::{AgentOptions, Pod, needs, peer, say};
use mesh_tests::{Mesh, Server, descriptors_return};

/// Connections of the largest crowd.
const IDLE: usize = 10_000;
/// Opened by one process of the client.
const PART: usize = 100;
/// Descriptors of an agent that are not of these connections: maps, programs, listeners, sockets made ahead.
const OTHERS: usize = 500;
/// Opening them all may take so long: a handshake costs much in a build for debugging.
const OPENING: Duration = Duration::from_secs(600);
/// Bytes that an idle connection may cost an agent, in a build for debugging.
const EACH: u64 = 16 << 10;

fn scene(tunnels: &str) -> anyhow::Result<(Mesh, Server, Pod)> {
    let mesh = Mesh::start_with(&["z1", "z2"], &AgentOptions::with(&["--tunnel-protocols", tunnels]))?;
    let server = mesh.servers(&[(1, "server")])?.remove(0);
    let client = mesh.client(0, "client")?;
    mesh.agents[1].wait_for_proxies(&["server"])?;
    mesh.wait_until_carried(0, &client, &server.pod.address(8080))?;
    Ok((mesh, server, client))
}

#[test]
fn a_thousand_connects_at_once_are_all_answered() -> anyhow::Result<()> {
    needs!(Mesh);
    let (mesh, server, client) = scene("stream,hbone")?;
    let used = mesh.descriptors()?;
    for to in [server.pod.address(8080), server.pod.address6(8080)] {
        let seen = peer::connect(&client, &to)
            .count(1_000)
            .concurrency(1_000)
            .timeout(Duration::from_secs(60))
            .run()?;
        ensure!(seen.of("server") == 1_000, "{to}: {:?} of {}", seen.failed, seen.attempts);
    }
    descriptors_return(&mesh, &used)
}

/// How many descriptors a process may have.
fn open_files(pid: u32) -> anyhow::Result<usize> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    match line.and_then(|line| line.split_ascii_whitespace().next()).context("no limit of open files")? {
        "unlimited" => Ok(usize::MAX),
        number => Ok(number.parse()?),
    }
}

#[test]
fn ten_thousand_idle_connections_are_kept() -> anyhow::Result<()> {
    needs!(Mesh);
    // Each connection is two descriptors of both agents.
    kept("stream", 2)
}

#[test]
fn ten_thousand_idle_connections_are_kept_by_hbone() -> anyhow::Result<()> {
    needs!(Mesh);
    // Tunnels are shared.
    kept("hbone", 1)
}

fn kept(tunnels: &str, descriptors: usize) -> anyhow::Result<()> {
    let (mesh, server, client) = scene(tunnels)?;
    let limit = open_files(mesh.agents[0].pid())?;
    let most = IDLE.min(limit.saturating_sub(OTHERS) / descriptors) / PART;
    ensure!(most > 0, "an agent here may open {limit} files: there is no room for a crowd");
    let memory = || -> anyhow::Result<Vec<u64>> {
        mesh.agents.iter().map(|agent| anonymous_bytes_of(agent.pid())).collect()
    };
    let (used, before) = (mesh.descriptors()?, memory()?);
    let mut holders = Vec::new();
    let began = Instant::now();
    while holders.len() < most {
        let opened = holders.len() * PART;
        ensure!(began.elapsed() < OPENING, "only {opened} of {} connections within {OPENING:?}", most * PART);
        let (holder, held) = peer::hold(&client, &server.pod.address(8080), PART)?;
        ensure!(held.alive == PART as u64, "{held:?}");
        holders.push(holder);
    }
    let opened = holders.len() * PART;
    if opened < IDLE {
        say(&format!("only {opened} idle connections: an agent here may open {limit} files"));
    }
    let after = memory()?;
    let each: Vec<u64> =
        before.iter().zip(&after).map(|(before, after)| (after - before) / opened as u64).collect();
    say(&format!(
        "{opened} idle connections by {tunnels}: {before:?} bytes of memory before, {after:?} with them, {each:?} each"
    ));
    ensure!(each.iter().all(|each| *each < EACH), "{each:?} bytes for each connection");
    // New ones come through as before, and the old ones all still answer.
    let seen = peer::connect(&client, &server.pod.address(8080)).count(50).run()?;
    ensure!(seen.of("server") == 50, "{seen:?}");
    for holder in &mut holders {
        let held = holder.ask()?;
        ensure!(held.alive == PART as u64, "{held:?}");
    }
    for holder in holders {
        holder.close()?;
    }
    descriptors_return(&mesh, &used)
}
