//! Between nodes: mutual TLS by the workloads' identities, of which an application sees nothing.

use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use mesh_harness::capture::Segment;
use mesh_harness::manifest::peer_authentication;
use mesh_harness::{AgentOptions, Capture, Pod, Service, needs, peer, until};
use mesh_tests::Mesh;
use serde_json::json;

const OUTBOUND: u16 = 15001;
const TUNNEL: u16 = 15008;

fn web() -> Service {
    Service::new("web", [10, 96, 0, 1]).also_at([0xfd00, 0x96, 0, 0, 0, 0, 0, 1]).tcp(80, 8080)
}

/// Segments of tunnels; those of the control plane are left out.
fn tunnelled(segments: &[Segment]) -> Vec<&Segment> {
    segments.iter().filter(|s| s.destination.port() == TUNNEL || s.source.port() == TUNNEL).collect()
}

/// Whether `text` crossed the cable as it is.
fn crossed(segments: &[Segment], text: &str) -> bool {
    segments.iter().any(|s| s.payload.windows(text.len()).any(|bytes| bytes == text.as_bytes()))
}

#[test]
fn what_crosses_between_nodes_is_tls_and_the_application_sees_its_real_peer() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1", "z2"])?;
    let servers = mesh.servers(&[(1, "server-in-the-clear")])?;
    let client = mesh.client(0, "client")?;
    let vip = mesh.serve_all(&web(), &servers)?;
    mesh.agents[1].wait_for_proxies(&["server-in-the-clear"])?;
    mesh.wait_until_carried(0, &client, &vip)?;
    let server = &servers[0].pod;
    for to in [vip, (web().addresses[1], 80).into(), server.address(8080), server.address6(8080)] {
        let before = mesh.agents[0].reason("proxied")?;
        let tap = Capture::start(mesh.cluster.fabric())?;
        let seen = peer::connect(&client, &to).count(20).run()?;
        let transfer = peer::transfer(&client, &to, 3_000_000, 7)?;
        let segments = tap.finish()?;
        ensure!(seen.failed.is_empty() && seen.of("server-in-the-clear") == 20, "{to}: {seen:?}");
        ensure!(transfer.exact, "{to}: bytes were changed on the way");
        ensure!(mesh.agents[0].reason("proxied")? - before == 21, "{to}: not all went through the proxy");
        // Both ends see each other as if nothing were between them.
        // (The server listens for both families, so IPv4 shows as mapped.)
        let own = match client.addresses()[usize::from(to.is_ipv6())] {
            IpAddr::V4(v4) => format!("[{}]", v4.to_ipv6_mapped()),
            IpAddr::V6(v6) => format!("[{v6}]"),
        };
        ensure!(seen.seen_as.keys().eq([&own]), "{to}: the server saw {:?} instead of {own}", seen.seen_as);
        ensure!(seen.peers.keys().eq([&to.to_string()]), "{to}: the client saw {:?}", seen.peers);
        let tunnels = tunnelled(&segments);
        ensure!(!tunnels.is_empty(), "{to}: no tunnel crossed the cable");
        ensure!(!crossed(&segments, "server-in-the-clear"), "{to}: the server's name crossed in the clear");
        let moved: usize = tunnels.iter().map(|segment| segment.payload.len()).sum();
        ensure!(moved > 6_000_000, "{to}: {moved} bytes went through tunnels");
        // Each tunnel begins with a TLS handshake record (RFC 8446, section 5.1).
        let hello = |s: &&&Segment| s.payload.starts_with(&[22, 3, 1]) && s.destination.port() == TUNNEL;
        let begun = tunnels.iter().filter(hello).count();
        // How many of them depends on how soon the server closes, which nobody waits for.
        ensure!(begun < 21, "{to}: {begun} handshakes for 21 connections: tunnels are not used again");
    }
    Ok(())
}

#[test]
fn each_hop_of_a_connection_has_its_own_congestion_control() -> anyhow::Result<()> {
    needs!(Mesh);
    let tunnels = AgentOptions::with(&["--tunnel-congestion-control", "reno"]);
    let mesh = Mesh::start_with(&["z1", "z2"], &tunnels)?;
    let client = mesh.client(0, "client")?;
    let pod = mesh.nodes[1].pod("server")?;
    for pod in [&client, &pod] {
        let setting = "/proc/sys/net/ipv4/tcp_congestion_control";
        pod.netns().run(|| Ok(std::fs::write(setting, "cubic")?))?;
    }
    let _server = peer::tcp_echo(&pod, "server", 8080)?;
    mesh.cluster.manifests().put_pods([&*pod])?;
    mesh.agents[1].wait_for_proxies(&["server"])?;
    mesh.wait_until_carried(0, &client, &pod.address(8080))?;
    let (_holder, held) = peer::hold(&client, &pod.address(8080), 1)?;
    ensure!(held.alive == 1, "{:?}", held.dead);
    // Ports of both ends, and the congestion control.
    let open = |pod: &Pod| -> anyhow::Result<Vec<([u16; 2], String)>> {
        let said = pod
            .netns()
            .run(|| Ok(Command::new("ss").args(["-tinOH", "state", "established"]).output()?))?;
        let port = |end: &str| end.rsplit(':').next().and_then(|port| port.parse().ok());
        let line = |line: &str| -> Option<([u16; 2], String)> {
            let words: Vec<&str> = line.split_whitespace().collect();
            Some(([port(words.get(2)?)?, port(words.get(3)?)?], (*words.get(4)?).to_owned()))
        };
        Ok(String::from_utf8_lossy(&said.stdout).lines().filter_map(line).collect())
    };
    for (pod, application) in [(&client, OUTBOUND), (&pod, 8080)] {
        let sockets = open(pod)?;
        let of = |port: u16| sockets.iter().filter(move |(ports, _)| ports.contains(&port));
        // The application's end, and the proxy's.
        ensure!(of(application).count() >= 2 && of(TUNNEL).count() >= 1, "{}: {sockets:?}", pod.name);
        let mut hops = of(application).chain(of(TUNNEL));
        ensure!(hops.all(|(_, name)| name == "reno"), "{}: {sockets:?}", pod.name);
    }
    // What the mesh does not carry is as it was.
    let near = client.address(9090);
    let _other = peer::tcp_echo(&client, "other", 9090)?;
    let (_holder, held) = peer::hold(&client, &near, 1)?;
    ensure!(held.alive == 1, "{:?}", held.dead);
    let sockets = open(&client)?;
    let own: Vec<_> = sockets.iter().filter(|(ports, _)| ports.contains(&9090)).collect();
    ensure!(own.len() == 2 && own.iter().all(|(_, name)| name == "cubic"), "{sockets:?}");
    Ok(())
}

#[test]
fn a_congestion_control_that_the_kernel_does_not_have_is_said_at_the_start() -> anyhow::Result<()> {
    needs!(Mesh);
    let cluster = mesh_harness::Cluster::start()?;
    let node = cluster.node("z1")?;
    let flags = AgentOptions::with(&["--tunnel-congestion-control", "not_there"]);
    let mut agent = node.agent_with(&AgentOptions { wait: false, ..flags })?;
    let status = agent.process().wait(Duration::from_secs(20))?;
    let log = agent.process().log_tail();
    ensure!(!status.success(), "it started");
    ensure!(log.contains("--tunnel-congestion-control") && log.contains("not_there"), "{log}");
    Ok(())
}

#[test]
fn on_one_node_nothing_is_proxied() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1"])?;
    let servers = mesh.servers(&[(0, "server")])?;
    let client = mesh.client(0, "client")?;
    let vip = mesh.serve_all(&web(), &servers)?;
    mesh.agents[0].wait_for_proxies(&["client", "server"])?;
    let seen = peer::connect(&client, &vip).count(20).run()?;
    ensure!(seen.of("server") == 20, "{seen:?}");
    ensure!(mesh.agents[0].reason("proxied")? == 0, "something was proxied");
    Ok(())
}

#[test]
fn plaintext_is_taken_unless_policy_is_strict() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1", "z2"])?;
    let servers = mesh.servers(&[(1, "server")])?;
    let client = mesh.client(0, "client")?;
    let server = servers[0].pod.address(8080);
    mesh.agents[1].wait_for_proxies(&["server"])?;
    mesh.wait_until_carried(0, &client, &server)?;
    // A pod that the control plane does not know, and a process of the server's own node.
    let stranger = mesh.nodes[0].pod("stranger")?;
    let probe = mesh.nodes[1].host_workload("kubelet", "system.slice/kubelet.service")?;
    for pod in [&stranger, &probe] {
        let seen = peer::connect(pod, &server).count(5).run()?;
        ensure!(seen.of("server") == 5, "permissive: {seen:?}");
    }
    let strict = peer_authentication("default", "strict", None, "STRICT");
    mesh.cluster.manifests().put("strict", &[strict])?;
    until("plaintext is refused", Duration::from_secs(10), || {
        let seen = peer::connect(&stranger, &server).count(1).run()?;
        ensure!(seen.failed.contains_key("ECONNREFUSED"), "{seen:?}");
        Ok(())
    })?;
    let seen = peer::connect(&client, &server).count(20).run()?;
    ensure!(seen.of("server") == 20, "mutual TLS is refused as well: {seen:?}");
    // A probe from the node itself is let in.
    let seen = peer::connect(&probe, &server).count(5).run()?;
    ensure!(seen.of("server") == 5, "a probe of the node is refused: {seen:?}");
    until("the denial is told", Duration::from_secs(5), || {
        let denials = mesh.agents[1].denials()?;
        let last = denials["last"].as_array().and_then(|all| all.first()).cloned().unwrap_or_default();
        ensure!(last["policy"].as_str().is_some_and(|policy| policy.contains("strict")), "{denials}");
        Ok(())
    })?;
    mesh.cluster.manifests().remove("strict")?;
    until("plaintext is taken again", Duration::from_secs(10), || {
        let seen = peer::connect(&stranger, &server).count(1).run()?;
        ensure!(seen.of("server") == 1, "{seen:?}");
        Ok(())
    })
}

#[test]
fn disabled_is_what_comes_in_and_not_what_goes_out() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1", "z2"])?;
    let [open, strict] = <[_; 2]>::try_from(mesh.servers(&[(0, "open-in-the-clear"), (1, "strict")])?)
        .map_err(|_servers| anyhow::anyhow!("not two servers"))?;
    let client = mesh.client(1, "client")?;
    let vip = mesh.serve_all(&web(), std::slice::from_ref(&strict))?;
    let (inward, outward) = (open.pod.address(8080), strict.pod.address(8080));
    mesh.agents[0].wait_for_proxies(&["open-in-the-clear"])?;
    mesh.agents[1].wait_for_proxies(&["strict"])?;
    mesh.wait_until_carried(1, &client, &inward)?;
    let modes = [("open-in-the-clear", "DISABLE"), ("strict", "STRICT")];
    let modes = modes.map(|(app, mode)| peer_authentication("default", app, Some(app), mode));
    mesh.cluster.manifests().put("modes", &modes)?;
    until("it is asked in the clear", Duration::from_secs(10), || {
        let before = mesh.agents[1].reason("proxied")?;
        let tap = Capture::start(mesh.cluster.fabric())?;
        let seen = peer::connect(&client, &inward).count(5).run()?;
        let segments = tap.finish()?;
        ensure!(seen.of("open-in-the-clear") == 5, "{seen:?}");
        ensure!(mesh.agents[1].reason("proxied")? == before, "it went through the proxy");
        ensure!(crossed(&segments, "open-in-the-clear"), "its name did not cross in the clear");
        Ok(())
    })?;
    for to in [outward, vip] {
        let before = mesh.agents[0].reason("proxied")?;
        let seen = peer::connect(&open.pod, &to).count(5).run()?;
        ensure!(seen.of("strict") == 5, "who takes no plaintext refuses it: {seen:?}");
        ensure!(mesh.agents[0].reason("proxied")? - before == 5, "not through the proxy");
    }
    let asked = ["explain", "--from", "default/open-in-the-clear", "--to", "default/web:80"];
    let told = String::from_utf8(mesh.agents[0].meshctl(&asked)?.stdout)?;
    ensure!(told.to_lowercase().contains("mtls") && told.contains("allowed"), "{told}");
    Ok(())
}

#[test]
fn an_open_connection_that_policy_no_longer_permits_ends() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1", "z2"])?;
    let servers = mesh.servers(&[(0, "near"), (1, "far")])?;
    let client = mesh.client(0, "client")?;
    let (near, far) = (servers[0].pod.address(8080), servers[1].pod.address(8080));
    mesh.agents[0].wait_for_proxies(&["client", "near"])?;
    mesh.agents[1].wait_for_proxies(&["far"])?;
    mesh.wait_until_carried(0, &client, &far)?;
    let (mut to_near, held) = peer::hold(&client, &near, 3)?;
    ensure!(held.alive == 3, "{held:?}");
    let (mut to_far, held) = peer::hold(&client, &far, 3)?;
    ensure!(held.alive == 3, "{held:?}");
    let deny = mesh_harness::manifest::authorization_policy(
        "default",
        "deny-all",
        None,
        "DENY",
        &[json!({"from": [{"source": {"principals": ["cluster.local/ns/default/sa/default"]}}]})],
    );
    mesh.cluster.manifests().put("deny", &[deny])?;
    for (name, holder) in [("near", &mut to_near), ("far", &mut to_far)] {
        until(&format!("connections to {name} have ended"), Duration::from_secs(10), || {
            let held = holder.ask()?;
            ensure!(held.alive == 0, "{held:?}");
            Ok(())
        })?;
    }
    for to in [near, far] {
        let seen = peer::connect(&client, &to).count(3).run()?;
        ensure!(seen.failed.get("ECONNREFUSED") == Some(&3), "{to}: {seen:?}");
    }
    Ok(())
}

#[test]
fn a_dead_agent_refuses_what_needs_it_and_is_not_needed_where_policy_does_not_say_so() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut mesh = Mesh::start(&["z1", "z2"])?;
    let servers = mesh.servers(&[(1, "strict"), (1, "open")])?;
    let client = mesh.client(0, "client")?;
    let strict = peer_authentication("default", "strict", Some("strict"), "STRICT");
    mesh.cluster.manifests().put("strict", &[strict])?;
    let (strict, open) = (servers[0].pod.address(8080), servers[1].pod.address(8080));
    mesh.agents[1].wait_for_proxies(&["strict", "open"])?;
    mesh.wait_until_carried(0, &client, &strict)?;
    mesh.wait_until_carried(0, &client, &open)?;
    until("the policy has come", Duration::from_secs(10), || {
        let stranger = mesh.nodes[0].pod("stranger")?;
        let seen = peer::connect(&stranger, &strict).count(1).run()?;
        ensure!(seen.failed.contains_key("ECONNREFUSED"), "{seen:?}");
        Ok(())
    })?;
    let reasons = |mesh: &Mesh| -> anyhow::Result<[u64; 3]> {
        let of = |name| mesh.agents[0].reason(name);
        Ok([of("proxy_dead")?, of("proxy_dead_direct")?, of("proxied")?])
    };
    let before = reasons(&mesh)?;
    mesh.agents[0].process().kill()?;
    // Heartbeats are written ahead by less than a second.
    std::thread::sleep(Duration::from_secs(1));
    let seen = peer::connect(&client, &strict).count(5).run()?;
    ensure!(seen.failed.get("ECONNREFUSED") == Some(&5), "strict: {seen:?}");
    let seen = peer::connect(&client, &open).count(7).run()?;
    ensure!(seen.of("open") == 7, "permissive: {seen:?}");
    mesh.agents[0] = mesh.nodes[0].agent()?;
    // The next agent finds what the kernel has counted: refused for want of the proxy, not by a closed port.
    let after = reasons(&mesh)?;
    let counted = [0, 1, 2].map(|i| after[i] - before[i]);
    ensure!(counted == [5, 7, 0], "refused, direct and proxied: {counted:?}");
    mesh.wait_until_carried(0, &client, &strict)
}
