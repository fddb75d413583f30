//! Policies that ask for what only HTTP can tell: what comes without TLS goes through the proxy of the server's node.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::ensure;
use mesh_harness::manifest::authorization_policy;
use mesh_harness::{AgentOptions, Pod, needs, peer, until};
use mesh_tests::{Mesh, Server, becomes, descriptors_return};
use serde_json::{Value, json};

/// A server on node 2, and clients of service accounts of their own names: beside it, and on node 1, where a stranger is who is no workload.
struct Scene {
    beside: Pod,
    also_beside: Pod,
    far: Pod,
    stranger: Pod,
    server: Server,
    mesh: Mesh,
}

fn principal(account: &str) -> Value {
    json!({"from": [{"source": {"principals": [format!("cluster.local/ns/default/sa/{account}")]}}]})
}

/// Met by nobody, and by everybody under DENY, until HTTP is looked at.
fn http() -> Value {
    json!({"to": [{"operation": {"methods": ["GET"]}}]})
}

impl Scene {
    fn start() -> anyhow::Result<Self> {
        let mesh = Mesh::start(&["z1", "z2"])?;
        let (beside, also_beside, far) =
            (mesh.account(1, "beside")?, mesh.account(1, "also-beside")?, mesh.account(0, "far")?);
        let stranger = mesh.nodes[0].pod("stranger")?;
        let target = mesh.account(1, "server")?;
        let server = Server { process: peer::tcp_echo(&target, "server", 8080)?, pod: target };
        mesh.agents[1].wait_for_proxies(&["server", "beside", "also-beside"])?;
        mesh.wait_until_carried(0, &far, &server.pod.address(8080))?;
        Ok(Self { beside, also_beside, far, stranger, server, mesh })
    }

    fn at(&self) -> SocketAddr {
        self.server.pod.address(8080)
    }

    /// The stranger, by its address.
    fn address(&self) -> Value {
        json!({"from": [{"source": {"ipBlocks": [format!("{}/32", self.stranger.addresses()[0])]}}]})
    }

    /// Lets in who meets one of `rules`, with or without one that asks for HTTP.
    fn allow(&self, rules: &[Value]) -> anyhow::Result<()> {
        let policy = authorization_policy("default", "p", Some("server"), "ALLOW", rules);
        self.mesh.cluster.manifests().put("policy", &[policy])
    }

    /// Waits until connections of the pod beside the server are led to the proxy.
    fn steered(&self) -> anyhow::Result<()> {
        until("the proxy takes them", Duration::from_secs(10), || {
            let before = self.reason("inbound_steered")?;
            let seen = peer::connect(&self.beside, &self.at()).run()?;
            ensure!(self.reason("inbound_steered")? > before && seen.of("server") == 1, "{seen:?}");
            Ok(())
        })
    }

    fn reason(&self, name: &str) -> anyhow::Result<u64> {
        self.mesh.agents[1].reason(name)
    }
}

#[test]
fn who_is_let_in_comes_through_the_proxy_and_the_server_sees_who_it_is() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start()?;
    let probe = scene.mesh.nodes[1].host_workload("kubelet", "system.slice/kubelet.service")?;
    // By what the kernel knows alone nothing is in between.
    scene.allow(&[principal("beside"), principal("far"), scene.address()])?;
    becomes(&scene.also_beside, &scene.server, "ECONNREFUSED")?;
    for pod in [&scene.beside, &scene.stranger] {
        becomes(pod, &scene.server, "server")?;
    }
    ensure!(scene.reason("inbound_steered")? == 0, "led to the proxy without need");
    scene.allow(&[principal("beside"), principal("far"), scene.address(), http()])?;
    scene.steered()?;
    let used = scene.mesh.descriptors()?;
    for (pod, steered) in [(&scene.beside, 6), (&scene.stranger, 6), (&scene.far, 0), (&probe, 0)] {
        let before = (scene.reason("inbound_steered")?, scene.reason("proxied")?);
        for (at, own) in [(scene.at(), 0), (scene.server.pod.address6(8080), 1)] {
            if std::ptr::eq(pod, &scene.stranger) && own == 1 {
                // Its other address is not in the policy.
                let seen = peer::connect(pod, &at).count(3).run()?;
                ensure!(seen.failed.get("ECONNREFUSED") == Some(&3), "{seen:?}");
                continue;
            }
            let seen = peer::raw(pod, &at, &["--count", "3", "--ask", "who", "--then", "end"])?;
            ensure!(seen.of(&["end"]) == 3, "{} at {at}: {seen:?}", pod.name);
            let shown: SocketAddr = seen.lines[0].rsplit(' ').next().unwrap_or_default().parse()?;
            ensure!(shown.ip().to_canonical() == pod.addresses()[own], "{}: {seen:?}", pod.name);
        }
        let now = scene.reason("inbound_steered")? - before.0;
        let steered = if std::ptr::eq(pod, &scene.stranger) { 3 } else { steered };
        ensure!(now == steered, "{}: {now} were led to the proxy", pod.name);
        let seen = peer::connect(pod, &scene.at()).run()?;
        ensure!(seen.peers.contains_key(&scene.at().to_string()), "{}: {seen:?}", pod.name);
    }
    becomes(&scene.also_beside, &scene.server, "ECONNREFUSED")?;
    let transfer = peer::transfer(&scene.beside, &scene.at(), 30_000_001, 5)?;
    ensure!(transfer.exact, "{transfer:?}");
    descriptors_return(&scene.mesh, &used)
}

#[test]
fn who_is_known_by_its_cgroup_is_known_to_the_proxy_when_it_has_long_gone() -> anyhow::Result<()> {
    needs!(Mesh);
    const ATTEND: &str = "617474656e640a";
    let scene = Scene::start()?;
    // Without an identity they would be refused.
    scene.allow(&[principal("beside"), principal("also-beside"), http()])?;
    scene.steered()?;
    let attended = || -> anyhow::Result<u64> {
        let seen = peer::raw(&scene.beside, &scene.at(), &["--ask", "attended", "--then", "end"])?;
        let all: BTreeMap<String, u64> = serde_json::from_str(&seen.lines[0])?;
        Ok(all.values().sum())
    };
    let before = attended()?;
    // They say what they have to say, and go.
    let how = ["--count", "500", "--hex", ATTEND, "--then", "close"];
    let seen = peer::raw(&scene.beside, &scene.at(), &how)?;
    ensure!(seen.of(&["closed"]) == 500, "{seen:?}");
    let seen = peer::raw(&scene.also_beside, &scene.at(), &how)?;
    ensure!(seen.of(&["closed"]) == 500, "{seen:?}");
    until("the server has heard all of them", Duration::from_secs(10), || {
        let heard = attended()? - before;
        ensure!(heard == 1000, "{heard}");
        Ok(())
    })?;
    // As many notes as there are connections, of which the proxy has taken those that were for it. (They are counted from time to time.)
    let (_holder, held) = peer::hold(&scene.beside, &scene.at(), 7)?;
    ensure!(held.alive == 7, "{held:?}");
    until("no note stays behind", Duration::from_secs(25), || {
        let stats = scene.mesh.agents[1].stats()?;
        let of = |name: &str| {
            let mut maps = stats["maps"].as_array().into_iter().flatten();
            maps.find(|map| map["name"] == name).and_then(|map| map["entries"].as_u64())
        };
        ensure!((of("CALLERS"), of("STEERED")) == (Some(7), Some(0)), "{stats}");
        Ok(())
    })
}

#[test]
fn a_change_of_policy_ends_what_the_proxy_carries_and_a_dry_run_is_told_once() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start()?;
    let all = [principal("beside"), principal("also-beside"), principal("far"), scene.address(), http()];
    scene.allow(&all)?;
    scene.steered()?;
    let mut held = Vec::new();
    for pod in [&scene.beside, &scene.also_beside, &scene.stranger, &scene.far] {
        let (holder, seen) = peer::hold(pod, &scene.at(), 5)?;
        ensure!(seen.alive == 5, "{}: {seen:?}", pod.name);
        held.push(holder);
    }
    // First as a trial: it is told of who comes, and of nobody twice.
    let mut dry = authorization_policy("default", "dry", Some("server"), "DENY", &[principal("beside")]);
    dry["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
    scene.mesh.cluster.manifests().put("dry", &[dry])?;
    let told = || -> anyhow::Result<u64> {
        let denials = scene.mesh.agents[1].denials()?;
        let counts = denials["counts"].as_array().into_iter().flatten();
        Ok(counts.filter(|c| c["policy"] == "default/dry").filter_map(|c| c["denials"].as_u64()).sum())
    };
    until("the dry run is known", Duration::from_secs(10), || {
        peer::connect(&scene.beside, &scene.at()).run()?;
        ensure!(told()? > 0, "nothing is told");
        Ok(())
    })?;
    std::thread::sleep(Duration::from_millis(500));
    let before = told()?;
    for pod in [&scene.beside, &scene.also_beside] {
        let seen = peer::connect(pod, &scene.at()).count(5).run()?;
        ensure!(seen.of("server") == 5, "{seen:?}");
    }
    // Whoever tells has told: the kernel's ring is read several times a second.
    std::thread::sleep(Duration::from_secs(1));
    ensure!(told()? - before == 5, "{} of 5 are told", told()? - before);
    for holder in &mut held {
        let seen = holder.ask()?;
        ensure!(seen.alive == 5, "{seen:?}");
    }
    scene.allow(&[principal("also-beside"), principal("far"), http()])?;
    for (holder, alive) in held.iter_mut().zip([0, 5, 0, 5]) {
        until(&format!("{alive} are left"), Duration::from_secs(5), || {
            let seen = holder.ask()?;
            ensure!(seen.alive == alive, "{seen:?}");
            Ok(())
        })?;
    }
    becomes(&scene.beside, &scene.server, "ECONNREFUSED")?;
    // Without HTTP in it the kernel decides alone again; who is there stays.
    scene.allow(&[principal("also-beside"), principal("far")])?;
    until("the proxy is out of the way", Duration::from_secs(10), || {
        let before = scene.reason("inbound_steered")?;
        let seen = peer::connect(&scene.also_beside, &scene.at()).count(3).run()?;
        ensure!(scene.reason("inbound_steered")? == before && seen.of("server") == 3, "{seen:?}");
        Ok(())
    })?;
    ensure!(held[1].ask()?.alive == 5, "those that the proxy carries have ended");
    Ok(())
}

#[test]
fn without_the_agent_nobody_comes_in_where_policies_ask_for_http() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut scene = Scene::start()?;
    scene.allow(&[principal("beside"), scene.address(), http()])?;
    scene.steered()?;
    let outcome = |pod: &Pod, wanted: &str| -> anyhow::Result<()> {
        let seen = peer::connect(pod, &scene.server.pod.address(8080)).count(5).run()?;
        ensure!(seen.of(wanted) + seen.failed.get(wanted).unwrap_or(&0) == 5, "{}: {seen:?}", pod.name);
        Ok(())
    };
    outcome(&scene.beside, "server")?;
    scene.mesh.agents[1].process().kill()?;
    // At once, whatever the heartbeat still says: nobody listens. Later who is on the same node is not even let out.
    outcome(&scene.beside, "ECONNREFUSED")?;
    outcome(&scene.stranger, "ECONNREFUSED")?;
    std::thread::sleep(Duration::from_secs(1));
    outcome(&scene.beside, "ECONNREFUSED")?;
    let node = scene.mesh.nodes[1].clone();
    scene.mesh.agents[1] = node.agent_with(&AgentOptions::default())?;
    for (reason, least) in [("inbound_no_proxy", 5), ("proxy_dead", 5)] {
        ensure!(scene.reason(reason)? >= least, "not counted: {}", scene.mesh.agents[1].stats()?);
    }
    scene.mesh.agents[1].wait_for_proxies(&["server"])?;
    for pod in [&scene.beside, &scene.stranger] {
        becomes(pod, &scene.server, "server")?;
    }
    Ok(())
}
