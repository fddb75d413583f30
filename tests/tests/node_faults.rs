//! What the mesh must live through: certificates that change, a control plane out of reach, agents that stop, die and come back.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::ensure;
use mesh_harness::manifest::{authorization_policy, peer_authentication};
use mesh_harness::process::Process;
use mesh_harness::{Agent, AgentOptions, ControlOptions, Pod, needs, peer, until};
use mesh_tests::{Mesh, Server, becomes};
use serde_json::json;

/// How long certificates live here: they are renewed at half of it.
const LIFETIME: &str = "6s";

fn short_lived() -> ControlOptions {
    ControlOptions {
        arguments: vec!["--certificate-lifetime".into(), LIFETIME.into()],
        ..ControlOptions::default()
    }
}

/// Two servers on node 2, one of which takes only mutual TLS, and a client on node 1 that reaches both.
struct Scene {
    client: Pod,
    strict: Server,
    open: Server,
    mesh: Mesh,
}

impl Scene {
    fn start(options: &AgentOptions, control: &ControlOptions) -> anyhow::Result<Self> {
        let mesh = Mesh::start_under(&["z1", "z2"], options, control)?;
        let mut servers = mesh.servers(&[(1, "strict"), (1, "open")])?;
        let (open, strict) = (servers.remove(1), servers.remove(0));
        let client = mesh.client(0, "client")?;
        let policy = peer_authentication("default", "strict", Some("strict"), "STRICT");
        mesh.cluster.manifests().put("strict", &[policy])?;
        mesh.agents[1].wait_for_proxies(&["strict", "open"])?;
        for server in [&strict, &open] {
            mesh.wait_until_carried(0, &client, &server.pod.address(8080))?;
        }
        let scene = Self { client, strict, open, mesh };
        let stranger = scene.mesh.nodes[0].pod("stranger")?;
        becomes(&stranger, &scene.strict, "ECONNREFUSED")?;
        Ok(scene)
    }

    /// Connects without a pause, while `act` acts; nothing may fail.
    fn without_a_failure(&self, act: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
        let to = self.strict.pod.address(8080);
        let (mut holder, held) = peer::hold(&self.client, &to, 10)?;
        ensure!(held.alive == 10, "{held:?}");
        // One by one on warm tunnels, and many at a time, which takes ever new ones.
        let steady = peer::connect(&self.client, &to).count(0).interval(Duration::from_millis(2)).start()?;
        let bursts = peer::connect(&self.client, &to)
            .count(0)
            .concurrency(8)
            .interval(Duration::from_millis(50))
            .start()?;
        act()?;
        for running in [steady, bursts] {
            let seen = running.finish()?;
            ensure!(
                seen.failed_total() == 0 && seen.of("strict") > 100,
                "of {}: {:?}",
                seen.attempts,
                seen.failures
            );
        }
        let held = holder.ask()?;
        ensure!(held.alive == 10, "connections did not outlive their certificate: {held:?}");
        Ok(())
    }
}

/// When the certificates of an agent's workloads expire.
fn expiries(agent: &Agent) -> anyhow::Result<BTreeSet<String>> {
    Ok(agent.certificates()?.iter().map(|one| one["not_after"].to_string()).collect())
}

#[test]
fn certificates_are_renewed_every_few_seconds_without_a_failure() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start(&AgentOptions::default(), &short_lived())?;
    scene.without_a_failure(|| {
        for agent in &scene.mesh.agents {
            for _ in 0..3 {
                let before = expiries(agent)?;
                until("all certificates are new", Duration::from_secs(20), || {
                    let now = expiries(agent)?;
                    ensure!(now.is_disjoint(&before), "{now:?}");
                    Ok(())
                })?;
            }
        }
        Ok(())
    })
}

#[test]
fn issuer_and_root_are_exchanged_without_a_failure() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start(&AgentOptions::default(), &short_lived())?;
    let dir = scene.mesh.cluster.dir().join("control/ca");
    let root = std::fs::read_to_string(dir.join("root-cert.pem"))?;
    let take = |step: &str| -> anyhow::Result<()> {
        let dir = dir.to_string_lossy();
        // It says itself when it is too early.
        until(&format!("meshctl ca {step}"), Duration::from_secs(20), || {
            let done = scene.mesh.control.meshctl(&[
                "ca",
                step,
                "--ca-dir",
                &dir,
                "--certificate-lifetime",
                LIFETIME,
            ])?;
            ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            Ok(())
        })?;
        for agent in &scene.mesh.agents {
            let before = expiries(agent)?;
            until("all certificates are new", Duration::from_secs(20), || {
                let now = expiries(agent)?;
                ensure!(now.is_disjoint(&before), "{now:?}");
                Ok(())
            })?;
        }
        Ok(())
    };
    let (mut of_the_old_root, _held) = peer::hold(&scene.client, &scene.strict.pod.address(8080), 3)?;
    scene.without_a_failure(|| ["new-issuer", "add-root", "use-root"].into_iter().try_for_each(take))?;
    let held = of_the_old_root.ask()?;
    ensure!(held.alive == 3, "both roots are trusted: {held:?}");
    // No tunnel of the old root takes another stream.
    std::thread::sleep(Duration::from_secs(7));
    scene.without_a_failure(|| take("drop-roots"))?;
    until("what was open under the old root has ended", Duration::from_secs(5), || {
        let held = of_the_old_root.ask()?;
        ensure!(held.alive == 0, "{held:?}");
        Ok(())
    })?;
    let now = std::fs::read_to_string(dir.join("root-cert.pem"))?;
    ensure!(now != root && now.matches("BEGIN CERTIFICATE").count() == 1, "{now}");
    Ok(())
}

/// A mesh whose first node reaches the control plane through a line of its own.
fn on_a_line() -> anyhow::Result<(Scene, Process)> {
    let scene = Scene::start(&AgentOptions::default(), &short_lived())?;
    let line = scene.mesh.cluster.relay(15011, "127.0.0.1:15012", &[])?;
    Ok((scene, line))
}

#[test]
fn a_node_that_is_cut_off_past_expiry_is_refused_where_policy_guards() -> anyhow::Result<()> {
    needs!(Mesh);
    for node in [0, 1] {
        let (mut scene, line) = on_a_line()?;
        let other = AgentOptions {
            control_plane: Some(scene.mesh.nodes[node].fabric(15011)),
            ..AgentOptions::default()
        };
        scene.mesh.agents[node].process().stop()?;
        scene.mesh.agents[node] = scene.mesh.nodes[node].agent_with(&other)?;
        scene.mesh.wait_until_carried(0, &scene.client, &scene.strict.pod.address(8080))?;
        drop(line);
        match node {
            0 => {
                // It has no certificate any more: what needs one is refused, the rest goes as it is.
                becomes(&scene.client, &scene.strict, "ECONNREFUSED")?;
                becomes(&scene.client, &scene.open, "open")?;
                ensure!(
                    scene.mesh.agents[0].reason("proxy_not_ready")? > 0,
                    "{}",
                    scene.mesh.agents[0].stats()?
                );
            }
            _ => {
                // The server's node has none: nobody gets in with mutual TLS, and plaintext not either.
                becomes(&scene.client, &scene.strict, "ECONNRESET")?;
                let stranger = scene.mesh.nodes[0].pod("another-stranger")?;
                becomes(&stranger, &scene.strict, "ECONNREFUSED")?;
                becomes(&stranger, &scene.open, "open")?;
            }
        }
        let _line = scene.mesh.cluster.relay(15011, "127.0.0.1:15012", &[])?;
        becomes(&scene.client, &scene.strict, "strict")?;
        scene.mesh.wait_until_carried(0, &scene.client, &scene.open.pod.address(8080))?;
    }
    Ok(())
}

#[test]
fn a_stopping_agent_lets_connections_end_and_the_next_one_carries_on() -> anyhow::Result<()> {
    needs!(Mesh);
    for node in [0, 1] {
        let options = AgentOptions::with(&["--drain-timeout", "8"]);
        let mut scene = Scene::start(&options, &ControlOptions::default())?;
        let to = scene.strict.pod.address(8080);
        let (mut holder, held) = peer::hold(&scene.client, &to, 3)?;
        ensure!(held.alive == 3, "{held:?}");
        // Under way when the agent is told to stop, and over before it is out of patience.
        let transfer = peer::start_transfer(&scene.client, &to, 64 << 20, 5)?;
        until("bytes are moving", Duration::from_secs(10), || {
            let moved = scene.mesh.agents[node].metric("mesh_agent_proxy_buffer_bytes", "")?;
            ensure!(moved > 0.0, "nothing");
            Ok(())
        })?;
        mesh_harness::sys::kill(scene.mesh.agents[node].pid(), libc::SIGTERM)?;
        if node == 0 {
            // Nothing new is led to a proxy that takes nothing new.
            becomes(&scene.client, &scene.open, "open")?;
            let unguarded = scene.open.pod.address(8080);
            let seen = peer::connect(&scene.client, &unguarded)
                .count(50)
                .interval(Duration::from_millis(20))
                .run()?;
            ensure!(seen.of("open") == 50, "while it drains: {:?}", seen.failed);
        }
        let seen = transfer.wait()?;
        ensure!(seen.exact, "node {node}: {seen:?}");
        let status = scene.mesh.agents[node].process().wait(Duration::from_secs(20))?;
        ensure!(status.success(), "{status}");
        let held = holder.ask()?;
        ensure!(held.alive == 0, "node {node}: who carries these? {held:?}");
        // Without the agent: what needs it is refused or reset, never let in.
        let seen = peer::connect(&scene.client, &to).count(5).run()?;
        ensure!(seen.answered == 0, "node {node}: {seen:?}");
        scene.mesh.agents[node] = scene.mesh.nodes[node].agent_with(&options)?;
        becomes(&scene.client, &scene.strict, "strict")?;
        scene.mesh.wait_until_carried(0, &scene.client, &to)?;
    }
    Ok(())
}

#[test]
fn what_the_kernel_refuses_it_refuses_without_an_agent() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut scene = Scene::start(&AgentOptions::default(), &ControlOptions::default())?;
    let account = |name: &str| -> anyhow::Result<Pod> {
        let mut plan = scene.mesh.nodes[1].plan(name);
        plan.service_account = name.to_owned();
        let pod = plan.start()?;
        scene.mesh.cluster.manifests().put_pods([&*pod])?;
        scene.mesh.agents[1].wait_for_workloads(&[name])?;
        Ok(pod)
    };
    let (good, bad) = (account("good")?, account("bad")?);
    let rule = json!({"from": [{"source": {"principals": ["cluster.local/ns/default/sa/good"]}}]});
    let allow = authorization_policy("default", "good-only", Some("open"), "ALLOW", &[rule]);
    scene.mesh.cluster.manifests().put("allow", &[allow])?;
    let far_stranger = scene.mesh.nodes[0].pod("far-stranger")?;
    let near_stranger = scene.mesh.nodes[1].pod("near-stranger")?;
    let as_policy_says = |scene: &Scene| -> anyhow::Result<()> {
        for (pod, server, outcome) in [
            (&good, &scene.open, "open"),
            (&bad, &scene.open, "ECONNREFUSED"),
            (&near_stranger, &scene.open, "ECONNREFUSED"),
            (&far_stranger, &scene.open, "ECONNREFUSED"),
            (&near_stranger, &scene.strict, "ECONNREFUSED"),
            (&far_stranger, &scene.strict, "ECONNREFUSED"),
        ] {
            becomes(pod, server, outcome)?;
        }
        Ok(())
    };
    as_policy_says(&scene)?;
    let reasons = |scene: &Scene| -> anyhow::Result<[u64; 3]> {
        let of = |name| scene.mesh.agents[1].reason(name);
        Ok([of("denied")?, of("inbound_denied")?, of("inbound_admitted")?])
    };
    let before = reasons(&scene)?;
    scene.mesh.agents[1].process().kill()?;
    for round in 0..2 {
        // At once, and when the last heartbeat is over.
        for (pod, to, allowed) in [
            (&good, scene.open.pod.address(8080), true),
            (&bad, scene.open.pod.address6(8080), false),
            (&near_stranger, scene.open.pod.address(8080), false),
            (&far_stranger, scene.strict.pod.address6(8080), false),
            (&near_stranger, scene.strict.pod.address(8080), false),
        ] {
            let seen = peer::connect(pod, &to).count(10).run()?;
            let wanted =
                if allowed { seen.answered } else { seen.failed.get("ECONNREFUSED").copied().unwrap_or(0) };
            ensure!(wanted == 10, "round {round}, {} to {to}: {seen:?}", pod.name);
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    scene.mesh.agents[1] = scene.mesh.nodes[1].agent()?;
    // Refused in `connect()` who is known, at the server's who is not, and let in who may: each counted while no agent ran.
    let after = reasons(&scene)?;
    let counted = [0, 1, 2].map(|i| after[i] - before[i]);
    ensure!(counted == [20, 60, 20], "{counted:?} for two rounds of ten");
    as_policy_says(&scene)
}

#[test]
fn a_pod_that_comes_while_the_agent_is_stopped_gets_in_nowhere_that_is_guarded() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut scene = Scene::start(&AgentOptions::default(), &ControlOptions::default())?;
    scene.mesh.agents[0].process().stop()?;
    let late = scene.mesh.nodes[0].pod("late")?;
    scene.mesh.cluster.manifests().put_pods([&*late])?;
    let policy = peer_authentication("default", "late", Some("late"), "STRICT");
    scene.mesh.cluster.manifests().put("late", &[policy])?;
    let server = Server { process: peer::tcp_echo(&late, "late", 8080)?, pod: late };
    // No program knows whose it is, so it goes as it is: what takes only mutual TLS refuses it.
    becomes(&server.pod, &scene.strict, "ECONNREFUSED")?;
    becomes(&server.pod, &scene.open, "open")?;
    // Known to nobody, it is guarded by nobody on its own node; this connection is from before the guard.
    let stranger = scene.mesh.nodes[1].pod("another-stranger")?;
    let (mut early, held) = peer::hold(&stranger, &server.pod.address(8080), 1)?;
    ensure!(held.alive == 1, "{held:?}");
    scene.mesh.agents[0] = scene.mesh.nodes[0].agent()?;
    scene.mesh.wait_until_carried(0, &server.pod, &scene.strict.pod.address(8080))?;
    becomes(&stranger, &server, "ECONNREFUSED")?;
    until("what policy does not permit has ended", Duration::from_secs(10), || {
        let held = early.ask()?;
        ensure!(held.alive == 0, "{held:?}");
        Ok(())
    })
}

#[test]
fn a_workload_that_left_the_mesh_while_no_agent_ran_is_guarded_no_more() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut scene = Scene::start(&AgentOptions::default(), &ControlOptions::default())?;
    let manifests = || scene.mesh.cluster.manifests();
    let mut servers = scene.mesh.servers(&[(0, "leaves"), (0, "stays")])?;
    let strict = |name| peer_authentication("default", name, Some(name), "STRICT");
    manifests().put("both", &[strict("leaves"), strict("stays")])?;
    let (stays, leaves) = (servers.remove(1), servers.remove(0));
    let stranger = scene.mesh.nodes[1].pod("stranger-to-both")?;
    for server in [&leaves, &stays] {
        becomes(&stranger, server, "ECONNREFUSED")?;
    }
    scene.mesh.agents[0].process().stop()?;
    manifests().remove("pod-leaves")?;
    manifests().put("both", &[strict("stays")])?;
    becomes(&stranger, &leaves, "ECONNREFUSED")?;
    // Nor does the next agent know from before whose namespace it was.
    std::fs::remove_dir_all(scene.mesh.nodes[0].state_dir())?;
    scene.mesh.agents[0] = scene.mesh.nodes[0].agent()?;
    // Once the whole mesh is known, and every workload of this node found; and then for good.
    until("who left is reached, and stays so", Duration::from_secs(30), || {
        let seen = peer::connect(&stranger, &leaves.pod.address(8080))
            .count(20)
            .interval(Duration::from_millis(100))
            .run()?;
        ensure!(seen.of("leaves") == 20, "{:?}", seen.failed);
        Ok(())
    })?;
    becomes(&stranger, &stays, "ECONNREFUSED")
}
