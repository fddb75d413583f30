//! Which mode of mutual TLS holds: of the mesh, a namespace, a workload, a port; and who has opted out of it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::ensure;
use mesh_harness::manifest::{authorization_policy, peer_authentication};
use mesh_harness::process::Process;
use mesh_harness::{Capture, Pod, needs, peer, until};
use mesh_tests::{Mesh, Server, becomes};
use serde_json::{Value, json};

/// A client and a stranger on node 1. On node 2 two servers of one namespace, and one of another, each at two ports.
struct Scene {
    client: Pod,
    stranger: Pod,
    servers: Vec<(Pod, [Process; 2])>,
    mesh: Mesh,
}

const PORTS: [u16; 2] = [8080, 9090];

impl Scene {
    fn start() -> anyhow::Result<Self> {
        let mesh = Mesh::start(&["z1", "z2"])?;
        let mut servers = Vec::new();
        for (namespace, name) in [("default", "one"), ("default", "two"), ("other", "three")] {
            let mut plan = mesh.nodes[1].plan(name);
            plan.namespace = namespace.to_owned();
            let pod = plan.start()?;
            mesh.cluster.manifests().put_pods([&*pod])?;
            let processes = [peer::tcp_echo(&pod, name, PORTS[0])?, peer::tcp_echo(&pod, name, PORTS[1])?];
            servers.push((pod, processes));
        }
        let client = mesh.client(0, "client")?;
        let stranger = mesh.nodes[0].pod("stranger")?;
        mesh.agents[1].wait_for_proxies(&["one", "two", "three"])?;
        for (pod, _) in &servers {
            mesh.wait_until_carried(0, &client, &pod.address(PORTS[0]))?;
        }
        Ok(Self { client, stranger, servers, mesh })
    }

    /// Waits until plaintext is taken exactly there, and refused at once elsewhere; mutual TLS is, everywhere.
    fn plaintext(&self, policies: &[Value], taken: &[(&str, u16)]) -> anyhow::Result<()> {
        self.mesh.cluster.manifests().put("modes", policies)?;
        until(&format!("plaintext is taken only by {taken:?}"), Duration::from_secs(10), || {
            for (server, port) in self.places() {
                let seen = peer::connect(&self.stranger, &server.address(port)).run()?;
                let open = taken.contains(&(server.name.as_str(), port));
                let as_it_should = if open {
                    seen.of(&server.name)
                } else {
                    seen.failed.get("ECONNREFUSED").copied().unwrap_or(0)
                };
                ensure!(as_it_should == 1, "{} at {port}: {seen:?}", server.name);
            }
            Ok(())
        })?;
        for (server, port) in self.places() {
            let before = self.mesh.agents[0].reason("proxied")?;
            let seen = peer::connect(&self.client, &server.address(port)).count(3).run()?;
            ensure!(seen.of(&server.name) == 3, "mutual TLS to {} at {port}: {seen:?}", server.name);
            let proxied = self.mesh.agents[0].reason("proxied")? - before;
            ensure!(proxied == 3, "{proxied} of 3 to {} at {port} went through the proxy", server.name);
        }
        Ok(())
    }

    fn places(&self) -> impl Iterator<Item = (&Pod, u16)> {
        self.servers.iter().flat_map(|(pod, _)| PORTS.map(|port| (pod, port)))
    }
}

#[test]
fn the_narrowest_mode_counts() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start()?;
    let everybody =
        [("one", 8080), ("one", 9090), ("two", 8080), ("two", 9090), ("three", 8080), ("three", 9090)];
    scene.plaintext(&[], &everybody)?;
    let mut policies = vec![peer_authentication("mesh-system", "mesh", None, "STRICT")];
    scene.plaintext(&policies, &[])?;
    // A namespace over the mesh, and a workload over its namespace.
    policies.push(peer_authentication("default", "namespace", None, "PERMISSIVE"));
    scene.plaintext(&policies, &everybody[..4])?;
    policies.push(peer_authentication("default", "workload", Some("one"), "STRICT"));
    scene.plaintext(&policies, &everybody[2..4])?;
    // What says nothing leaves it to what is wider.
    policies[1] = peer_authentication("default", "namespace", None, "UNSET");
    scene.plaintext(&policies, &[])?;
    // A selector in the root namespace is for workloads of that one, of which there are none.
    scene.plaintext(&[peer_authentication("mesh-system", "mesh", Some("one"), "STRICT")], &everybody)
}

#[test]
fn a_port_may_be_otherwise_than_its_workload() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start()?;
    let but = |app: &str, mode: &str, at_9090: &str| {
        let mut policy = peer_authentication("default", app, Some(app), mode);
        policy["spec"]["portLevelMtls"] = json!({"9090": {"mode": at_9090}});
        policy
    };
    let others = [("three", 8080), ("three", 9090)];
    let policies = [but("one", "STRICT", "PERMISSIVE"), but("two", "PERMISSIVE", "STRICT")];
    scene.plaintext(&policies, &[&[("one", 9090), ("two", 8080)], &others[..]].concat())?;
    let policies = [but("two", "STRICT", "PERMISSIVE"), but("one", "PERMISSIVE", "STRICT")];
    scene.plaintext(&policies, &[&[("two", 9090), ("one", 8080)], &others[..]].concat())?;
    // For one port nobody can be told to send no TLS: it goes on.
    scene.plaintext(
        &[but("one", "STRICT", "DISABLE"), but("two", "UNSET", "STRICT")],
        &[("one", 9090), ("two", 8080), ("three", 8080), ("three", 9090)],
    )
}

/// A pod that has opted out, with a server, announced.
fn opted_out(mesh: &Mesh, node: usize, name: &str) -> anyhow::Result<Server> {
    let mut plan = mesh.nodes[node].plan(name);
    plan.service_account = name.to_owned();
    let pod = plan.start()?;
    let mut manifest = pod.manifest();
    manifest["metadata"]["labels"]["istio.io/dataplane-mode"] = json!("none");
    mesh.cluster.manifests().put(&format!("pod-{name}"), &[manifest])?;
    mesh.agents[node].wait_for_workloads(&[name])?;
    Ok(Server { process: peer::tcp_echo(&pod, name, 8080)?, pod })
}

/// That connections between these nodes cross in the clear: their server's name can be read on the cable.
fn in_the_clear(mesh: &Mesh, pod: &Pod, to: &SocketAddr, name: &str) -> anyhow::Result<()> {
    let proxied = || -> anyhow::Result<u64> {
        Ok(mesh.agents[0].reason("proxied")? + mesh.agents[1].reason("proxied")?)
    };
    let before = proxied()?;
    let tap = Capture::start(mesh.cluster.fabric())?;
    let seen = peer::connect(pod, to).count(5).run()?;
    let segments = tap.finish()?;
    ensure!(seen.of(name) == 5, "{} to {to}: {seen:?}", pod.name);
    ensure!(proxied()? == before, "{} to {to} went through a proxy", pod.name);
    let mut payloads = segments.iter().map(|segment| &segment.payload);
    let crossed = payloads.any(|payload| payload.windows(name.len()).any(|bytes| bytes == name.as_bytes()));
    ensure!(crossed, "{} to {to}: {name} did not cross in the clear", pod.name);
    Ok(())
}

#[test]
fn who_has_opted_out_goes_in_the_clear_and_is_judged_by_others_all_the_same() -> anyhow::Result<()> {
    needs!(Mesh);
    let mesh = Mesh::start(&["z1", "z2"])?;
    let out = opted_out(&mesh, 0, "opted-out")?;
    let server = mesh.servers(&[(1, "meshed-server")])?.remove(0);
    let near = mesh.servers(&[(0, "near")])?.remove(0);
    let client = mesh.client(0, "client")?;
    mesh.agents[1].wait_for_proxies(&["meshed-server"])?;
    let (to_server, to_out) = (server.pod.address(8080), out.pod.address(8080));
    mesh.wait_until_carried(0, &client, &to_server)?;
    // Both ways, although the other end would speak TLS.
    in_the_clear(&mesh, &out.pod, &to_server, "meshed-server")?;
    in_the_clear(&mesh, &server.pod, &to_out, "opted-out")?;

    // Where it comes to, it has no identity, but an address; at the server, which tells so.
    let allow = |app: &str, source: Value| {
        let rule = json!({"from": [{"source": source}]});
        authorization_policy("default", "p", Some(app), "ALLOW", &[rule])
    };
    let address = format!("{}/32", out.pod.addresses()[0]);
    let principal = "cluster.local/ns/default/sa/opted-out";
    for (policy, outcome) in [
        (allow("meshed-server", json!({"principals": [principal]})), "ECONNREFUSED"),
        (allow("meshed-server", json!({"ipBlocks": [address]})), "meshed-server"),
        (peer_authentication("default", "p", None, "STRICT"), "ECONNREFUSED"),
    ] {
        mesh.cluster.manifests().put("policy", std::slice::from_ref(&policy))?;
        becomes(&out.pod, &server, outcome)?;
        let counter = if outcome == "ECONNREFUSED" { "inbound_denied" } else { "inbound_admitted" };
        let before = mesh.agents[1].reason(counter)?;
        let seen = peer::connect(&out.pod, &to_server).count(5).run()?;
        ensure!(seen.of(outcome) + seen.failed.get(outcome).unwrap_or(&0) == 5, "{policy}: {seen:?}");
        let counted = mesh.agents[1].reason(counter)? - before;
        ensure!(counted == 5, "{counted} of 5 were judged at the server, with {policy}");
    }
    // On its own node it is known all the same.
    let policy = allow("near", json!({"principals": [principal]}));
    mesh.cluster.manifests().put("policy", &[policy])?;
    becomes(&client, &near, "ECONNREFUSED")?;
    becomes(&out.pod, &near, "near")?;
    // Opting in again is all it takes.
    mesh.cluster.manifests().put_pods([&*out.pod])?;
    mesh.wait_until_carried(0, &out.pod, &to_server)
}
