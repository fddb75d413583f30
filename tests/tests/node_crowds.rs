//! Many connections: idle ones, and all at once.

use std::time::{Duration, Instant};

use anyhow::ensure;
use mesh_harness::process::anonymous_bytes_of;
use mesh_harness::{Pod, needs, peer, say};
use mesh_tests::{Mesh, Server, descriptors_return};

/// Connections of the largest crowd.
const IDLE: usize = 10_000;
/// Opened by one process of the client.
const PART: usize = 100;
/// No more are opened after this: a handshake costs much in a build for debugging.
const OPENING: Duration = Duration::from_secs(60);
/// Bytes that an idle connection may cost an agent, in a build for debugging.
const EACH: u64 = 16 << 10;

fn scene() -> anyhow::Result<(Mesh, Server, Pod)> {
    let mesh = Mesh::start(&["z1", "z2"])?;
    let server = mesh.servers(&[(1, "server")])?.remove(0);
    let client = mesh.client(0, "client")?;
    mesh.agents[1].wait_for_proxies(&["server"])?;
    mesh.wait_until_carried(0, &client, &server.pod.address(8080))?;
    Ok((mesh, server, client))
}

#[test]
fn a_thousand_connects_at_once_are_all_answered() -> anyhow::Result<()> {
    needs!(Mesh);
    let (mesh, server, client) = scene()?;
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

#[test]
fn ten_thousand_idle_connections_are_kept() -> anyhow::Result<()> {
    needs!(Mesh);
    let (mesh, server, client) = scene()?;
    // Each connection is two descriptors of both agents, and their limit is the machine's.
    let limit = std::fs::read_to_string(format!("/proc/{}/limits", mesh.agents[0].pid()))?;
    let limit: usize = limit
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .and_then(|line| line.split_ascii_whitespace().nth(3)?.parse().ok())
        .unwrap_or(1024);
    let most = IDLE.min((limit - 500) / 2) / PART;
    let memory = || -> anyhow::Result<Vec<u64>> {
        mesh.agents.iter().map(|agent| anonymous_bytes_of(agent.pid())).collect()
    };
    let (used, before) = (mesh.descriptors()?, memory()?);
    let mut holders = Vec::new();
    let began = Instant::now();
    while holders.len() < most && began.elapsed() < OPENING {
        let (holder, held) = peer::hold(&client, &server.pod.address(8080), PART)?;
        ensure!(held.alive == PART as u64, "{held:?}");
        holders.push(holder);
    }
    let opened = holders.len() * PART;
    if opened < IDLE {
        say(&format!(
            "only {opened} idle connections: an agent here may open {limit} files, and there was a minute"
        ));
    }
    let after = memory()?;
    let each: Vec<u64> =
        before.iter().zip(&after).map(|(before, after)| (after - before) / opened as u64).collect();
    say(&format!(
        "{opened} idle connections: {before:?} bytes of memory before, {after:?} with them, {each:?} each"
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
