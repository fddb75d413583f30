//! Agents that stop, crash, return, are replaced, and are removed: connections never notice.

use std::time::Duration;

use mesh_harness::peer::Running;
use mesh_harness::report::Attempts;
use mesh_harness::{Agent, AgentOptions, Pod, Service, agent, needs, peer, site};
use mesh_tests::{Mesh, Server, addresses};

const CONNECTS: u64 = 10_000;

fn web() -> Service {
    Service::new("web", [10, 96, 0, 1]).tcp(80, 8080)
}

/// A mesh of one node, three servers, a client, and the service in force.
fn mesh() -> anyhow::Result<(Mesh, Vec<Server>, Pod)> {
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "a"), (0, "b"), (0, "c")])?;
    let client = mesh.client(0, "client")?;
    mesh.serve_all(&web(), &servers)?;
    Ok((mesh, servers, client))
}

/// Lets the loop go on until it has made enough connects, and asserts that none failed.
fn ten_thousand_without_failure(running: Running, began: std::time::Instant) -> anyhow::Result<Attempts> {
    // The loop has no count of its own, so that it covers all that the test did, however long it took.
    std::thread::sleep(Duration::from_secs(3).saturating_sub(began.elapsed()));
    let seen = running.finish()?;
    assert_eq!(seen.failed_total(), 0, "of {}: {:?}", seen.attempts, seen.failures);
    Ok(seen)
}

/// Connects for as long as `change` takes, and for 10,000 connects at least.
fn while_connecting(client: &Pod, change: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Attempts> {
    let (began, loops) = (std::time::Instant::now(), peer::connect(client, &web().at(80)).concurrency(4));
    let running = loops.count(0).start()?;
    change()?;
    let mut seen = ten_thousand_without_failure(running, began)?;
    if seen.attempts < CONNECTS {
        let more =
            peer::connect(client, &web().at(80)).concurrency(4).count(CONNECTS - seen.attempts).run()?;
        assert_eq!(more.failed_total(), 0, "{:?}", more.failures);
        seen.attempts += more.attempts;
    }
    assert!(seen.attempts >= CONNECTS);
    Ok(seen)
}

#[test]
fn no_connect_fails_while_endpoints_change() -> anyhow::Result<()> {
    needs!(Mesh);
    let (mesh, servers, client) = mesh()?;
    let seen = while_connecting(&client, || {
        for round in 0..60 {
            // Each of the three is left out in turn; it still serves who has just chosen it.
            let left: Vec<_> = (0..3).filter(|i| round % 4 != *i).collect();
            let pods = left.iter().map(|i| &*servers[*i].pod);
            let backends: Vec<_> = left.iter().map(|i| servers[*i].pod.address(8080)).collect();
            mesh.serve(&web().pods(pods), &backends)?;
        }
        Ok(())
    })?;
    assert_eq!(seen.by_name.len(), 3, "{seen:?}");
    Ok(())
}

#[test]
fn no_connect_fails_while_the_agent_is_killed_and_restarted() -> anyhow::Result<()> {
    needs!(Mesh);
    let (mut mesh, servers, client) = mesh()?;
    let (mut holder, held) = peer::hold(&client, &web().at(80), 10)?;
    let node = mesh.nodes[0].clone();
    let mut agents = std::mem::take(&mut mesh.agents);
    while_connecting(&client, || {
        for _ in 0..5 {
            agents[0].process().kill()?;
            std::thread::sleep(Duration::from_millis(100));
            agents[0] = node.agent()?;
            agents[0].wait_for_backends(&web().at(80), &addresses(&servers))?;
        }
        Ok(())
    })?;
    assert_eq!(holder.ask()?.by_name, held.by_name);
    // The new agent follows changes.
    mesh.agents = agents;
    mesh.serve_all(&web(), &servers[..1])?;
    let seen = peer::connect(&client, &web().at(80)).count(50).run()?;
    assert_eq!(seen.of("a"), 50, "{seen:?}");
    Ok(())
}

#[test]
fn balancing_goes_on_without_an_agent() -> anyhow::Result<()> {
    needs!(Mesh);
    let (mut mesh, _servers, client) = mesh()?;
    mesh.agents[0].process().kill()?;
    let seen = peer::connect(&client, &web().at(80)).count(300).run()?;
    assert_eq!((seen.answered, seen.by_name.len()), (300, 3), "{seen:?}");
    Ok(())
}

#[test]
fn no_connect_fails_while_the_agent_is_replaced_by_one_with_other_map_sizes() -> anyhow::Result<()> {
    needs!(Mesh);
    let (mut mesh, servers, client) = mesh()?;
    let node = mesh.nodes[0].clone();
    let mut agents = std::mem::take(&mut mesh.agents);
    let sizes = ["--max-services=512", "--max-backends=2048", "--max-pages=1024", "--max-affinity=1024"];
    let other = ["--max-services=2048", "--max-udp-flows=4096", "--max-counters=4096", "--max-workloads=512"];
    while_connecting(&client, || {
        for options in [AgentOptions::with(&sizes), AgentOptions::with(&other), AgentOptions::default()] {
            agents[0].process().stop()?;
            agents[0] = node.agent_with(&options)?;
            agents[0].wait_for_backends(&web().at(80), &addresses(&servers))?;
        }
        Ok(())
    })?;
    agents[0].process().stop()?;
    agents[0] = node.agent_with(&AgentOptions::with(&sizes))?;
    let capacity = |agent: &Agent, name: &str| -> anyhow::Result<u64> {
        let status = agent.status()?;
        let maps = status["maps"].as_array().cloned().unwrap_or_default();
        let map = maps.iter().find(|map| map["name"].as_str().is_some_and(|n| n.eq_ignore_ascii_case(name)));
        Ok(map
            .and_then(|map| map["capacity"].as_u64())
            .unwrap_or_else(|| panic!("no map {name} in {status}")))
    };
    assert_eq!(capacity(&agents[0], "services")?, 512);
    let seen = peer::connect(&client, &web().at(80)).count(100).run()?;
    assert_eq!(seen.answered, 100, "{seen:?}");
    Ok(())
}

#[test]
fn stopping_leaves_the_kernel_in_force_and_uninstall_removes_everything() -> anyhow::Result<()> {
    needs!(Mesh);
    let (mut mesh, _servers, client) = mesh()?;
    let node = mesh.nodes[0].clone();
    let mut agent = mesh.agents.remove(0);
    agent.process().stop()?;
    let seen = peer::connect(&client, &web().at(80)).count(100).run()?;
    assert_eq!((seen.answered, seen.by_name.len()), (100, 3), "{seen:?}");
    assert!(node.pins().exists());

    let output = agent::uninstall(&node)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    assert!(said.lines().count() >= 5, "it says what it removed: {said}");
    assert!(!node.pins().exists(), "{} is still there", node.pins().display());
    let seen = peer::connect(&client, &web().at(80)).count(3).run()?;
    assert_eq!((seen.answered, seen.failed_total()), (0, 3), "nothing intercepts any more: {seen:?}");

    // Removing what is not there is no error, and a new agent starts from nothing.
    assert!(agent::uninstall(&node)?.status.success());
    let _agent = node.agent()?;
    let seen = peer::connect(&client, &web().at(80)).count(30).run()?;
    assert_eq!(seen.answered, 30, "{seen:?}");
    Ok(())
}

#[test]
fn nothing_of_a_meshed_cluster_is_left_behind() -> anyhow::Result<()> {
    needs!(Mesh);
    let all = mesh()?;
    let id = all.0.cluster.id().to_owned();
    assert!(site::leftovers(&id)?.iter().any(|path| path.starts_with("/sys/fs/bpf/")));
    drop(all);
    assert_eq!(site::leftovers(&id)?, [""; 0]);
    Ok(())
}
