//! Pods and peers that mean no good: what they try comes to nothing, and harms nobody else.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use mesh_harness::manifest::peer_authentication;
use mesh_harness::{Pod, Service, needs, peer, process, say, until};
use mesh_tests::{Mesh, Server, descriptors_return};

/// The ports of the proxy that are for nobody else.
const OWN: [u16; 2] = [15001, 15006];
const TUNNEL: u16 = 15008;

/// `GET / HTTP/1.1`.
const PLAIN: &str = "474554202f20485454502f312e310d0a0d0a";
/// Bytes that look like TLS at first: a hello without anything in it, a record longer than any may be, an alert, data before any
/// handshake, the preface of HTTP/2, zeros.
const MALFORMED: [&str; 6] = [
    "16030100050100000100",
    "160301ffff00",
    "15030300020228",
    "1703030005aaaaaaaaaa",
    "505249202a20485454502f322e300d0a0d0a534d0d0a0d0a",
    "00000000000000000000",
];

/// A victim on node 2, and who may try something: workloads of the mesh and pods that nobody has announced, on both nodes.
struct Scene {
    far: Pod,
    near: Pod,
    far_stranger: Pod,
    near_stranger: Pod,
    victim: Server,
    mesh: Mesh,
}

impl Scene {
    fn start() -> anyhow::Result<Self> {
        let mesh = Mesh::start(&["z1", "z2"])?;
        let victim = mesh.servers(&[(1, "victim")])?.remove(0);
        let (far, near) = (mesh.client(0, "far")?, mesh.client(1, "near")?);
        let (far_stranger, near_stranger) =
            (mesh.nodes[0].pod("far-stranger")?, mesh.nodes[1].pod("near-stranger")?);
        mesh.agents[1].wait_for_proxies(&["victim", "near"])?;
        for to in [victim.pod.address(8080), victim.pod.address6(8080)] {
            mesh.wait_until_carried(0, &far, &to)?;
        }
        Ok(Self { far, near, far_stranger, near_stranger, victim, mesh })
    }

    fn pods(&self) -> [&Pod; 4] {
        [&self.far, &self.near, &self.far_stranger, &self.near_stranger]
    }

    fn at(&self, port: u16) -> [SocketAddr; 2] {
        [self.victim.pod.address(port), self.victim.pod.address6(port)]
    }

    /// Plaintext to the victim is refused from now on.
    fn strict(&self) -> anyhow::Result<()> {
        let strict = peer_authentication("default", "strict", Some("victim"), "STRICT");
        self.mesh.cluster.manifests().put("strict", &[strict])?;
        for stranger in [&self.far_stranger, &self.near_stranger] {
            until("plaintext is refused", Duration::from_secs(10), || {
                let seen = peer::connect(stranger, &self.at(8080)[0]).count(1).run()?;
                ensure!(seen.failed.contains_key("ECONNREFUSED"), "{seen:?}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Who means well is served as before, and both agents are the same processes as before.
    fn nobody_else_noticed(&mut self) -> anyhow::Result<()> {
        for to in self.at(8080) {
            for pod in [&self.far, &self.near] {
                let seen = peer::connect(pod, &to).count(20).run()?;
                ensure!(seen.of("victim") == 20, "{} to {to}: {seen:?}", pod.name);
            }
        }
        for agent in &mut self.mesh.agents {
            ensure!(agent.process().ended()?.is_none(), "an agent ended: {}", agent.process().log_tail());
            ensure!(agent.status()?["ready"] == true, "{}", agent.status()?);
        }
        Ok(())
    }
}

#[test]
fn the_ports_of_the_proxy_are_closed_to_other_pods() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut scene = Scene::start()?;
    let used = scene.mesh.descriptors()?;
    for pod in scene.pods() {
        for port in OWN {
            for to in scene.at(port) {
                let seen = peer::raw(pod, &to, &["--count", "3", "--hex", PLAIN])?;
                ensure!(
                    seen.opened == 0 && seen.of(&["ECONNREFUSED"]) == 3,
                    "{} to {to}: {seen:?}",
                    pod.name
                );
            }
        }
    }
    // A service that leads there is no way in either.
    let trap = Service::new("trap", [10, 96, 0, 9]).tcp(80, 15001).pods([&*scene.victim.pod]);
    let trap = scene.mesh.serve(&trap, &[scene.victim.pod.address(15001)])?;
    for pod in [&scene.far, &scene.near] {
        let seen = peer::raw(pod, &trap, &["--hex", PLAIN])?;
        ensure!(seen.opened == 0 && seen.of(&["ECONNREFUSED"]) == 1, "{} to {trap}: {seen:?}", pod.name);
    }
    // Its own, in a loop: there is nobody behind it whom it meant.
    let own = OWN.into_iter().flat_map(|port| scene.at(port)).chain([trap]);
    for to in own {
        let seen = peer::raw(&scene.victim.pod, &to, &["--count", "3", "--hex", PLAIN])?;
        ensure!(seen.heard == 0 && seen.of(&["ECONNRESET", "ECONNREFUSED", "EPIPE"]) == 3, "{to}: {seen:?}");
    }
    scene.nobody_else_noticed()?;
    descriptors_return(&scene.mesh, &used)
}

#[test]
fn nobody_gets_into_a_tunnel_without_a_certificate_of_the_mesh() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut scene = Scene::start()?;
    let used = scene.mesh.descriptors()?;
    let handshakes = scene.mesh.agents[1].metric("mesh_agent_proxy_handshakes_total", "failed")?;
    for pod in scene.pods().into_iter().chain([&scene.victim.pod]) {
        for to in scene.at(TUNNEL) {
            let seen = peer::raw(pod, &to, &["--count", "3", "--hex", PLAIN])?;
            ensure!(seen.of(&["end", "ECONNRESET"]) == 3, "{} to {to}: {seen:?}", pod.name);
            // An alert of TLS at most.
            ensure!(seen.heard <= 3 * 7, "{} to {to}: {seen:?}", pod.name);
        }
    }
    if Command::new("openssl").arg("version").output().is_ok() {
        let forged = forged(&scene)?;
        for pod in scene.pods() {
            for to in scene.at(TUNNEL) {
                let none = handshake(pod, &to, &[])?;
                ensure!(none.contains("certificate required"), "{} to {to} without any: {none}", pod.name);
                let own = handshake(pod, &to, &["-cert", &forged, "-key", &forged])?;
                ensure!(own.contains(" alert "), "{} to {to} with one of its own: {own}", pod.name);
            }
        }
        let failed = scene.mesh.agents[1].metric("mesh_agent_proxy_handshakes_total", "failed")?;
        ensure!(failed - handshakes >= 16.0, "{failed} handshakes failed, {handshakes} before");
    } else {
        say("openssl is not installed: no handshakes without a certificate");
    }
    scene.nobody_else_noticed()?;
    descriptors_return(&scene.mesh, &used)
}

/// A certificate that names the victim's identity, signed by itself.
fn forged(scene: &Scene) -> anyhow::Result<String> {
    let file = scene.mesh.cluster.dir().join("forged.pem");
    let file = file.to_str().context("a path")?.to_owned();
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "1",
        ])
        .args(["-subj", "/", "-addext", "subjectAltName=URI:spiffe://cluster.local/ns/default/sa/default"])
        .args(["-keyout", &file, "-out", &format!("{file}.crt")])
        .output()?;
    ensure!(made.status.success(), "{made:?}");
    let both = std::fs::read_to_string(&file)? + &std::fs::read_to_string(format!("{file}.crt"))?;
    std::fs::write(&file, both)?;
    Ok(file)
}

/// What `openssl s_client` says of a handshake with the proxy.
fn handshake(pod: &Pod, to: &SocketAddr, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new("timeout");
    command.args(["10", "openssl", "s_client", "-tls1_3", "-alpn", "mesh-stream/1", "-ign_eof", "-connect"]);
    command.arg(to.to_string()).args(arguments).stdin(std::process::Stdio::null());
    let output = pod.output(command)?;
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn nothing_gets_to_a_strict_workload_without_mutual_tls() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut scene = Scene::start()?;
    // An address that the control plane does not know is no way round.
    scene.victim.pod.own_range("10.102.9.0/24")?;
    let unknown: SocketAddr = "10.102.9.1:8080".parse()?;
    for pod in [&scene.far_stranger, &scene.near_stranger] {
        let seen = peer::connect(pod, &unknown).count(1).run()?;
        ensure!(seen.of("victim") == 1, "{} cannot even come there: {seen:?}", pod.name);
    }
    scene.strict()?;
    let used = scene.mesh.descriptors()?;
    for pod in [&scene.far_stranger, &scene.near_stranger] {
        for to in scene.at(8080).into_iter().chain([unknown]) {
            for client in [peer::connect(pod, &to), peer::connect(pod, &to).mapped()] {
                let seen = client.count(5).run()?;
                ensure!(seen.failed.get("ECONNREFUSED") == Some(&5), "{} to {to}: {seen:?}", pod.name);
            }
            let seen = peer::raw(pod, &to, &["--hex", PLAIN, "--flood", "10000000"])?;
            ensure!(seen.opened == 0, "{} to {to}: {seen:?}", pod.name);
        }
    }
    // Workloads of the mesh come to it by the addresses that are known, but their plaintext to the other one is plaintext.
    for pod in [&scene.far, &scene.near] {
        let seen = peer::connect(pod, &unknown).count(5).run()?;
        ensure!(seen.failed.get("ECONNREFUSED") == Some(&5), "{}: {seen:?}", pod.name);
    }
    scene.nobody_else_noticed()?;
    descriptors_return(&scene.mesh, &used)
}

#[test]
fn malformed_and_endless_bytes_harm_nobody() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut scene = Scene::start()?;
    let used = scene.mesh.descriptors()?;
    let before = process::anonymous_bytes_of(scene.mesh.agents[1].pid())?;
    for pod in [&scene.far_stranger, &scene.near, &scene.far] {
        for to in scene.at(TUNNEL) {
            for hex in MALFORMED {
                let how = ["--count", "5", "--hex", hex, "--flood", "20000000"];
                let seen = peer::raw(pod, &to, &how)?;
                let over = seen.of(&["end", "ECONNRESET", "EPIPE"]);
                ensure!(over == 5 && seen.heard <= 5 * 7, "{} says {hex} to {to}: {seen:?}", pod.name);
            }
        }
    }
    // What an application is told is for the application alone, however long and odd.
    for to in scene.at(8080) {
        for hex in MALFORMED {
            let how = ["--ask", "attend", "--hex", hex, "--flood", "5000000", "--then", "end"];
            let seen = peer::raw(&scene.far, &to, &how)?;
            ensure!(seen.of(&["end"]) == 1 && seen.lines.len() == 2, "{hex}: {seen:?}");
            ensure!(seen.lines[1].ends_with(&format!(" {}", seen.said)), "{hex}: {seen:?}");
        }
    }
    let after = process::anonymous_bytes_of(scene.mesh.agents[1].pid())?;
    say(&format!("malformed bytes: the agent's memory went from {before} to {after}"));
    ensure!(after < before + (32 << 20), "the agent grew from {before} to {after}");
    scene.nobody_else_noticed()?;
    descriptors_return(&scene.mesh, &used)
}

#[test]
fn nothing_that_a_pod_sends_changes_whom_the_server_sees() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start()?;
    let hex = |text: &str| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
    let forged = [
        hex("PROXY TCP4 1.2.3.4 10.0.0.1 1234 80\r\n"),
        // PROXY protocol, version 2: TCP over IPv4, from 1.2.3.4.
        "0d0a0d0a000d0a515549540a2111000c010203040a00000104d20050".to_owned(),
        hex(
            "CONNECT 10.0.0.1:80 HTTP/1.1\r\nforwarded: for=1.2.3.4:1234\r\nbaggage: k8s.namespace.name=other\r\n\r\n",
        ),
        // Messages of the proxies' own protocol: requests, ends, resets.
        "010203040506070800".to_owned(),
    ];
    for to in scene.at(8080) {
        for forged in &forged {
            let seen = peer::raw(&scene.far, &to, &["--ask", "attend", "--hex", forged, "--then", "end"])?;
            let [asked, told] = &seen.lines[..] else { anyhow::bail!("{to}: {seen:?}") };
            let own = scene.far.addresses()[usize::from(to.is_ipv6())].to_string();
            ensure!(asked.contains(&own), "{to}: {seen:?}");
            ensure!(*told == format!("{asked} {}", forged.len() / 2), "{to}: {seen:?}");
        }
    }
    Ok(())
}

#[test]
fn half_open_handshakes_do_not_keep_others_out() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut scene = Scene::start()?;
    let used = scene.mesh.descriptors()?;
    let to = scene.victim.pod.address(TUNNEL);
    // More than a pod may have at a time, from two places; some say nothing, some begin.
    let (silent, _) = peer::raw_held(&scene.far_stranger, &to, &["--count", "400"])?;
    let (begun, _) = peer::raw_held(&scene.near_stranger, &to, &["--count", "400", "--hex", "160301"])?;
    // Many at a time: more tunnels than are there already.
    let seen = peer::connect(&scene.far, &scene.victim.pod.address(8080))
        .count(500)
        .concurrency(50)
        .timeout(Duration::from_secs(20))
        .run()?;
    ensure!(seen.of("victim") == 500, "{seen:?}");
    scene.nobody_else_noticed()?;
    for held in [silent, begun] {
        let seen = held.finish()?;
        say(&format!("half-open handshakes: {seen:?}"));
    }
    descriptors_return(&scene.mesh, &used)
}
