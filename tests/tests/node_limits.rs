//! What has a limit: connections of a pod through its node, those to who has gone, and what the kernel has room to know.

use std::time::{Duration, Instant};

use anyhow::ensure;
use mesh_harness::manifest::authorization_policy;
use mesh_harness::{AgentOptions, needs, peer, until};
use mesh_tests::{Mesh, becomes};
use serde_json::json;

#[test]
fn a_pod_that_has_all_its_connections_gets_no_more_and_its_neighbours_do() -> anyhow::Result<()> {
    needs!(Mesh);
    const MOST: u64 = 10;
    let mesh = Mesh::start_with(
        &["z1", "z2"],
        &AgentOptions::with(&["--proxy-max-connections", &MOST.to_string()]),
    )?;
    let servers = mesh.servers(&[(1, "one"), (1, "two")])?;
    let [one, two] = [0, 1].map(|i| servers[i].pod.address(8080));
    let (client, neighbour) = (mesh.client(0, "client")?, mesh.client(0, "neighbour")?);
    mesh.agents[1].wait_for_proxies(&["one", "two"])?;
    for pod in [&client, &neighbour] {
        mesh.wait_until_carried(0, pod, &one)?;
        mesh.wait_until_carried(0, pod, &two)?;
    }
    let refused =
        |node: usize| mesh.agents[node].metric("mesh_agent_proxy_limit_reached_total", "connections");
    // All that the client may have, of which no server has as much as it may.
    let (mut to_one, held) = peer::hold_in_turn(&client, &one, 6)?;
    ensure!(held.alive == 6, "{held:?}");
    let (mut to_two, held) = peer::hold_in_turn(&client, &two, 4)?;
    ensure!(held.alive == 4, "{held:?}");
    let before = [refused(0)?, refused(1)?];
    let seen = peer::connect(&client, &two).count(5).run()?;
    ensure!(seen.failed.get("ECONNRESET") == Some(&5), "the client has more than it may: {seen:?}");
    ensure!([refused(0)? - before[0], refused(1)? - before[1]] == [5.0, 0.0], "what was refused is not told");
    let seen = peer::connect(&neighbour, &two).count(5).run()?;
    ensure!(seen.of("two") == 5, "its neighbour pays for it: {seen:?}");
    // All that a server may have: more are refused on its node, whoever comes, and its neighbour is reached.
    let (more_to_one, held) = peer::hold_in_turn(&neighbour, &one, 4)?;
    ensure!(held.alive == 4, "{held:?}");
    let seen = peer::connect(&neighbour, &one).count(5).run()?;
    ensure!(seen.answered == 0, "the server has more than it may: {seen:?}");
    ensure!(refused(1)? - before[1] >= 5.0, "what was refused is not told at the server's node");
    let seen = peer::connect(&neighbour, &two).count(5).run()?;
    ensure!(seen.of("two") == 5, "its neighbour pays for it: {seen:?}");
    more_to_one.close()?;
    for (held, all) in [(to_one.ask()?, 6), (to_two.ask()?, 4)] {
        ensure!(held.alive == all, "what was there has ended: {held:?}");
    }
    to_one.close()?;
    to_two.close()?;
    until("there is room again", Duration::from_secs(10), || {
        let seen = peer::connect(&client, &two).count(5).run()?;
        ensure!(seen.of("two") == 5, "{seen:?}");
        Ok(())
    })
}

#[test]
fn connections_to_who_has_gone_end_after_their_grace_and_not_before() -> anyhow::Result<()> {
    needs!(Mesh);
    const GRACE: Duration = Duration::from_secs(2);
    let options = AgentOptions::with(&["--endpoint-grace", &GRACE.as_secs().to_string()]);
    let mesh = Mesh::start_with(&["z1", "z2"], &options)?;
    let servers = mesh.servers(&[(0, "near"), (1, "far"), (0, "near-stays"), (1, "far-stays")])?;
    let client = mesh.client(0, "client")?;
    mesh.agents[0].wait_for_proxies(&["client", "near", "near-stays"])?;
    mesh.agents[1].wait_for_proxies(&["far", "far-stays"])?;
    let mut holders = Vec::new();
    for server in &servers {
        let to = server.pod.address(8080);
        if server.pod.name.starts_with("far") {
            mesh.wait_until_carried(0, &client, &to)?;
        }
        let (holder, held) = peer::hold(&client, &to, 3)?;
        ensure!(held.alive == 3, "{}: {held:?}", server.pod.name);
        holders.push(holder);
    }
    let removed = Instant::now();
    for server in &servers[..2] {
        mesh.cluster.manifests().remove(&format!("pod-{}", server.pod.name))?;
    }
    let mut ended = [None; 2];
    until("connections to both have ended", Duration::from_secs(30), || {
        let mut alive = 0;
        for (holder, ended) in holders.iter_mut().zip(&mut ended) {
            let held = holder.ask()?;
            *ended = ended.or((held.alive < 3).then(|| removed.elapsed()));
            alive += held.alive;
        }
        ensure!(alive == 0, "{alive} have not");
        Ok(())
    })?;
    for (server, ended) in servers.iter().zip(ended) {
        ensure!(ended > Some(GRACE), "connections to {} ended too early: {ended:?}", server.pod.name);
    }
    for (server, holder) in servers.iter().zip(&mut holders).skip(2) {
        let held = holder.ask()?;
        ensure!(held.alive == 3, "{}: {held:?}", server.pod.name);
    }
    Ok(())
}

#[test]
fn what_there_is_no_room_to_know_is_refused_here_and_judged_elsewhere() -> anyhow::Result<()> {
    needs!(Mesh);
    // Room for the verdicts of no set at all.
    let mesh = Mesh::start_with(&["z1", "z2"], &AgentOptions::with(&["--max-verdicts", "4"]))?;
    let servers = mesh.servers(&[(0, "near"), (1, "far")])?;
    let (client, stranger) = (mesh.client(0, "client")?, mesh.nodes[1].pod("stranger")?);
    let [near, far] = [0, 1].map(|i| servers[i].pod.address(8080));
    mesh.agents[0].wait_for_proxies(&["near", "client"])?;
    mesh.agents[1].wait_for_proxies(&["far"])?;
    mesh.wait_until_carried(0, &client, &far)?;
    let rule = json!({
        "from": [{"source": {"principals": ["cluster.local/ns/default/sa/default"]}}],
        "to": [{"operation": {"ports": ["8080", "8081", "8082"]}}],
    });
    let policy = authorization_policy("default", "all", None, "ALLOW", &[rule]);
    mesh.cluster.manifests().put("policy", &[policy])?;
    becomes(&client, &servers[0], "ECONNREFUSED")?;
    for (pod, to, outcome, reason) in [
        (&client, near, "ECONNREFUSED", "no_verdict"),
        (&stranger, near, "ECONNREFUSED", "inbound_no_verdict"),
        (&client, far, "far", "proxied"),
    ] {
        let before = mesh.agents[0].reason(reason)?;
        let seen = peer::connect(pod, &to).count(5).run()?;
        let so = seen.of(outcome) + seen.failed.get(outcome).unwrap_or(&0);
        ensure!(so == 5, "{} to {to}: {seen:?}", pod.name);
        ensure!(
            mesh.agents[0].reason(reason)? - before == 5,
            "{} to {to}: {}",
            pod.name,
            mesh.agents[0].stats()?
        );
    }
    let left_out = mesh.agents[0].metric("mesh_agent_policy_verdicts_left_out", "")?;
    ensure!(left_out > 0.0, "it is not told that there is no room");
    Ok(())
}
