//! Certificates that a good authority would not issue, or not any more: nobody gets into a tunnel with one, in either direction.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::ensure;
use mesh_harness::{AgentOptions, Clock, Cluster, ControlOptions, Node, Pod, agent, needs, peer, until};
use mesh_tests::Mesh;
use mesh_tests::authority::{Authority, Credential, Leaf, dns, self_signed, uri};
use mesh_tests::tunnel::{self, Impostor, Tunnel};
use rcgen::ExtendedKeyUsagePurpose;

const WHO: &[u8] = b"who\n";

/// A mesh whose authority is the test's. Nobody is revoked at first.
struct Scene {
    authority: Authority,
    revoked: PathBuf,
    mesh: Mesh,
}

fn of_account(account: &str) -> String {
    format!("spiffe://cluster.local/ns/default/sa/{account}")
}

impl Scene {
    fn start() -> anyhow::Result<Self> {
        Self::on(Cluster::start()?, |_node| Vec::new())
    }

    /// The agents with such variables in their environment.
    fn on(cluster: Cluster, environment: impl Fn(usize) -> Vec<(String, String)>) -> anyhow::Result<Self> {
        let revoked = cluster.dir().join("crl.pem");
        Self::with(cluster, &ControlOptions::default(), |number| AgentOptions {
            environment: environment(number),
            ..AgentOptions::with(&["--crl", &revoked.to_string_lossy()])
        })
    }

    /// Certificates of so short a life that agents soon learn of another root. Nobody has a revocation list.
    fn rotating() -> anyhow::Result<Self> {
        let lifetime = ["--certificate-lifetime", "6s"].map(Into::into).into();
        let control = ControlOptions { arguments: lifetime, ..ControlOptions::default() };
        Self::with(Cluster::start()?, &control, |_node| AgentOptions::default())
    }

    fn with(
        cluster: Cluster,
        control: &ControlOptions,
        options: impl Fn(usize) -> AgentOptions,
    ) -> anyhow::Result<Self> {
        let authority = Authority::new()?;
        authority.install(&cluster.dir().join("control/ca"))?;
        let revoked = cluster.dir().join("crl.pem");
        std::fs::write(&revoked, authority.revoke(&[])?)?;
        let nodes = [cluster.node("z1")?, cluster.node("z2")?];
        let control = cluster.control_with(control)?;
        let start = |(number, node): (usize, &Rc<Node>)| node.agent_with(&options(number));
        let agents = nodes.iter().enumerate().map(start).collect::<Result<_, _>>()?;
        let mesh = Mesh { agents, control, nodes: nodes.into(), cluster };
        Ok(Self { authority, revoked, mesh })
    }

    /// Lets another authority sign, while those of `beside` are trusted as well.
    fn rotate(&self, to: &Authority, beside: &[&Authority]) -> anyhow::Result<()> {
        to.install_beside(beside, &self.mesh.cluster.dir().join("control/ca"))
    }

    fn good(&self, account: &str) -> anyhow::Result<Credential> {
        self.authority.issue(&Leaf::of(&of_account(account))?)
    }

    fn revoke(&self, certificate: &Credential) -> anyhow::Result<()> {
        // Replaced whole: an agent that reads half a list would refuse everybody.
        let next = self.revoked.with_extension("next");
        std::fs::write(&next, self.authority.revoke(&[certificate])?)?;
        Ok(std::fs::rename(next, &self.revoked)?)
    }

    /// Handshakes that failed, of this node and side.
    fn failed_handshakes(&self, node: usize, side: &str) -> anyhow::Result<f64> {
        let metrics = self.mesh.agents[node].metrics()?;
        let row = format!("mesh_agent_proxy_handshakes_total{{side=\"{side}\",outcome=\"failed\"}} ");
        let value = metrics.lines().find_map(|line| line.strip_prefix(&row)?.parse().ok());
        value.ok_or_else(|| anyhow::anyhow!("no {row}in {metrics}"))
    }

    /// What is wrong, the certificate, and the alerts of TLS (RFC 8446, section 6.2) of which one has to tell it.
    fn bad(&self, account: &str, role: ExtendedKeyUsagePurpose) -> anyhow::Result<Vec<Bad>> {
        let (own, now) = (of_account(account), SystemTime::now());
        let (second, hour) = (Duration::from_secs(1), Duration::from_secs(3600));
        let good = self.good(account)?;
        let issue = |leaf: Leaf| self.authority.issue(&leaf);
        let named = |names| issue(Leaf::named(names)?);
        let leaf = || Leaf::of(&own);
        let elsewhere = "spiffe://other.mesh/ns/default/sa/default";
        let node = "spiffe://cluster.local/mesh.dev/node/node-1";
        Ok(vec![
            ("expired an hour ago", issue(leaf()?.valid(now - 2 * hour, now - hour))?, "CertificateExpired"),
            (
                "expired a second ago",
                issue(leaf()?.valid(now - hour, now - 2 * second))?,
                "CertificateExpired",
            ),
            ("not yet valid", issue(leaf()?.valid(now + hour, now + 2 * hour))?, "CertificateExpired"),
            ("of another trust domain", named(vec![uri(elsewhere)?])?, "CertificateUnknown"),
            ("signed by itself", self_signed(&leaf()?)?, "UnknownCA"),
            ("of another authority of the same name", Authority::new()?.issue(&leaf()?)?, "DecryptError"),
            ("without what leads to the root", good.alone(), "UnknownCA"),
            ("without a name", named(vec![])?, "CertificateUnknown"),
            ("of a host", named(vec![dns("server.default.svc")?])?, "CertificateUnknown"),
            ("of a host, too", named(vec![uri(&own)?, dns("server.default.svc")?])?, "CertificateUnknown"),
            ("of two workloads", named(vec![uri(&own)?, uri(&of_account("other"))?])?, "CertificateUnknown"),
            ("of one workload twice", named(vec![uri(&own)?, uri(&own)?])?, "CertificateUnknown"),
            ("of a node", named(vec![uri(node)?])?, "CertificateUnknown"),
            ("of no SPIFFE identity", named(vec![uri("https://cluster.local/ns")?])?, "CertificateUnknown"),
            ("for the other role", issue(leaf()?.only_for(role))?, "UnsupportedCertificate"),
            ("with the key of another", good.with_the_key_of(&self.good(account)?), "DecryptError"),
        ])
    }
}

type Bad = (&'static str, Credential, &'static str);

/// An application that remembers everything it is told.
struct Witness {
    told: Arc<Mutex<(u64, Vec<u8>)>>,
}

impl Witness {
    /// On port 8080 of `pod`; it answers all there is with its name. It ends with the test.
    fn start(pod: &Pod) -> anyhow::Result<Self> {
        let address = SocketAddr::new(IpAddr::from([0_u16; 8]), 8080);
        let listener = pod.netns().run(|| Ok(TcpListener::bind(address)?))?;
        let told = Arc::new(Mutex::new((0, Vec::new())));
        let hearing = Arc::clone(&told);
        std::thread::spawn(move || {
            for mut connection in listener.incoming().flatten() {
                hearing.lock().unwrap_or_else(PoisonError::into_inner).0 += 1;
                let hearing = Arc::clone(&hearing);
                std::thread::spawn(move || {
                    let mut chunk = [0; 4096];
                    while let Ok(n @ 1..) = connection.read(&mut chunk) {
                        hearing.lock().unwrap_or_else(PoisonError::into_inner).1.extend(&chunk[..n]);
                        drop(connection.write_all(b"witness\n"));
                    }
                });
            }
        });
        Ok(Self { told })
    }

    /// Connections and bytes since it was asked last.
    fn told(&self) -> (u64, Vec<u8>) {
        std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A workload whose application remembers, and a pod that the mesh does not know: all that it has is a certificate. Fields go in order.
struct Witnessed {
    client: Pod,
    witness: Witness,
    server: Pod,
    scene: Scene,
}

impl Witnessed {
    fn start() -> anyhow::Result<Self> {
        Self::of(Scene::start()?)
    }

    fn of(scene: Scene) -> anyhow::Result<Self> {
        let server = scene.mesh.client(1, "server")?;
        let witness = Witness::start(&server)?;
        let client = scene.mesh.nodes[0].pod("client")?;
        scene.mesh.agents[1].wait_for_proxies(&["server"])?;
        Ok(Self { client, witness, server, scene })
    }
}

#[test]
fn a_client_gets_in_with_a_good_certificate_and_with_no_other() -> anyhow::Result<()> {
    needs!(Mesh);
    let Witnessed { client, witness, server, scene } = Witnessed::start()?;
    let own = [server.address(tunnel::PORT), server.address6(tunnel::PORT)];
    let application = [server.address(8080), server.address6(8080)];
    let good = tunnel::client(&scene.good("client")?)?;
    let gets_in = || -> anyhow::Result<()> {
        for (to, application) in own.into_iter().zip(application) {
            let mut tunnel = Tunnel::dial(&client, to, &good)?;
            ensure!(tunnel.converse(application, WHO)? == b"witness\n");
            ensure!(witness.told() == (1, WHO.to_vec()));
        }
        Ok(())
    };
    gets_in()?;
    let before = scene.failed_handshakes(1, "inbound")?;
    let bad = scene.bad("client", ExtendedKeyUsagePurpose::ServerAuth)?;
    for (what, credential, wanted) in &bad {
        let config = tunnel::client(credential)?;
        for (to, application) in own.into_iter().zip(application) {
            let mut tunnel = Tunnel::dial(&client, to, &config)?;
            let Err(error) = tunnel.converse(application, WHO) else {
                anyhow::bail!("a certificate {what} is let in");
            };
            let alert = tunnel::alert(&error).map(|alert| format!("{alert:?}"));
            ensure!(alert.as_deref() == Some(wanted), "{what}: {error}");
        }
    }
    let told = witness.told();
    ensure!(told == (0, vec![]), "the application was told {told:?}");
    // The last is counted after its alert is on its way.
    until("each is counted once", Duration::from_secs(5), || {
        let failed = scene.failed_handshakes(1, "inbound")? - before;
        ensure!(
            failed == (2 * bad.len()) as f64,
            "{failed} handshakes failed, of {} bad ones twice",
            bad.len()
        );
        Ok(())
    })?;
    gets_in()
}

#[test]
fn a_revoked_client_gets_in_no_more_and_what_it_had_open_ends() -> anyhow::Result<()> {
    needs!(Mesh);
    let Witnessed { client, witness, server, scene } = Witnessed::start()?;
    let (to, application) = (server.address(tunnel::PORT), server.address(8080));
    let (revoked, other) = (scene.good("client")?, tunnel::client(&scene.good("client")?)?);
    let config = tunnel::client(&revoked)?;
    let mut open = Tunnel::dial(&client, to, &config)?;
    ensure!(open.converse(application, WHO)? == b"witness\n");
    let mut of_other = Tunnel::dial(&client, to, &other)?;
    ensure!(of_other.converse(application, WHO)? == b"witness\n");
    // By the session of the first one, which no certificate need be shown for.
    let mut resumed = Tunnel::dial(&client, to, &config)?;
    ensure!(resumed.is_resumed() && resumed.converse(application, WHO)? == b"witness\n");
    witness.told();
    scene.revoke(&revoked)?;
    for open in [&mut open, &mut resumed] {
        let ended = open.hear_data();
        ensure!(ended.is_err(), "it goes on: {ended:?}");
    }
    // Both anew and by a session of before.
    for config in [tunnel::client(&revoked)?, config] {
        let mut refused = Tunnel::dial(&client, to, &config)?;
        ensure!(!refused.is_resumed(), "a session of a revoked certificate is taken");
        let Err(error) = refused.converse(application, WHO) else { anyhow::bail!("it is let in") };
        let alert = tunnel::alert(&error).map(|alert| format!("{alert:?}"));
        ensure!(alert.as_deref() == Some("CertificateRevoked"), "{error}");
    }
    let told = witness.told();
    ensure!(told == (0, vec![]), "the application was told {told:?}");
    // Another certificate of the same workload is as good as any.
    of_other.say_on(WHO)?;
    ensure!(of_other.hear_data()? == b"witness\n");
    ensure!(Tunnel::dial(&client, to, &other)?.converse(application, WHO)? == b"witness\n");
    Ok(())
}

#[test]
fn a_client_whose_root_is_dropped_gets_in_no_more_and_what_it_had_open_ends() -> anyhow::Result<()> {
    needs!(Mesh);
    let Witnessed { client, witness, server, scene } = Witnessed::of(Scene::rotating()?)?;
    let (to, application) = (server.address(tunnel::PORT), server.address(8080));
    let former = tunnel::client(&scene.good("client")?)?;
    let mut open = Tunnel::dial(&client, to, &former)?;
    ensure!(open.converse(application, WHO)? == b"witness\n");
    let next = Authority::new()?;
    scene.rotate(&next, &[&scene.authority])?;
    let renewed = tunnel::client(&next.issue(&Leaf::of(&of_account("client"))?)?)?;
    let mut newer = until("a client of the new root gets in", Duration::from_secs(20), || {
        let mut tunnel = Tunnel::dial(&client, to, &renewed)?;
        ensure!(tunnel.converse(application, WHO)? == b"witness\n");
        Ok(tunnel)
    })?;
    let goes_on = |tunnel: &mut Tunnel| -> anyhow::Result<()> {
        tunnel.say_on(WHO)?;
        ensure!(tunnel.hear_data()? == b"witness\n");
        Ok(())
    };
    goes_on(&mut open)?;
    scene.rotate(&next, &[])?;
    until("what a client of the old root had open ends", Duration::from_secs(20), || {
        let heard = open.say_on(WHO).and_then(|()| open.hear_data());
        ensure!(heard.is_err(), "it goes on");
        Ok(())
    })?;
    goes_on(&mut newer)?;
    witness.told();
    // By a session of before as well.
    let mut refused = Tunnel::dial(&client, to, &former)?;
    let Err(error) = refused.converse(application, WHO) else { anyhow::bail!("it is let in") };
    let alert = tunnel::alert(&error).map(|alert| format!("{alert:?}"));
    ensure!(!refused.is_resumed() && alert.as_deref() == Some("DecryptError"), "{error}");
    let told = witness.told();
    ensure!(told == (0, vec![]), "the application was told {told:?}");
    ensure!(Tunnel::dial(&client, to, &renewed)?.converse(application, WHO)? == b"witness\n");
    goes_on(&mut newer)
}

/// An agent on node 1, with a client, and a workload of node 2 whose tunnels end at the test itself.
struct Impersonated {
    client: Pod,
    server: Pod,
    impostor: Impostor,
    scene: Scene,
}

impl Impersonated {
    fn start() -> anyhow::Result<Self> {
        Self::on(Scene::start()?)
    }

    fn on(mut scene: Scene) -> anyhow::Result<Self> {
        // Its node has joined and so its workloads are meshed; but the agent is no more.
        scene.mesh.agents.remove(1).process().stop()?;
        let removed = agent::uninstall(&scene.mesh.nodes[1])?;
        ensure!(removed.status.success(), "{removed:?}");
        let mut plan = scene.mesh.nodes[1].plan("server");
        plan.service_account = "server".to_owned();
        let server = plan.start()?;
        scene.mesh.cluster.manifests().put_pods([&*server])?;
        let impostor = Impostor::start(&server, "impostor", &scene.good("server")?)?;
        let client = scene.mesh.client(0, "client")?;
        for to in [server.address(8080), server.address6(8080)] {
            scene.mesh.wait_until_carried(0, &client, &to)?;
        }
        Ok(Self { client, server, impostor, scene })
    }

    /// Waits until this is refused, or not.
    fn is_refused(&self, what: &str, refused: bool) -> anyhow::Result<()> {
        for to in [self.server.address(8080), self.server.address6(8080)] {
            until(&format!("{what}: {to} is refused: {refused}"), Duration::from_secs(10), || {
                let seen = peer::connect(&self.client, &to).count(1).run()?;
                ensure!((seen.of("impostor") == 0) == refused, "{seen:?}");
                Ok(())
            })?;
        }
        self.impostor.heard()?;
        Ok(())
    }
}

#[test]
fn a_server_hears_nothing_unless_its_certificate_is_that_of_whom_the_client_meant() -> anyhow::Result<()> {
    needs!(Mesh);
    let world = Impersonated::start()?;
    let (impostor, scene) = (&world.impostor, &world.scene);
    let to = [world.server.address(8080), world.server.address6(8080)];
    world.is_refused("good", false)?;
    let mut bad = scene.bad("server", ExtendedKeyUsagePurpose::ClientAuth)?;
    bad.push(("of another workload", scene.good("other")?, "CertificateUnknown"));
    bad.push(("of the client itself", scene.good("default")?, "CertificateUnknown"));
    for (what, credential, wanted) in &bad {
        impostor.present(credential)?;
        impostor.heard()?;
        let before = scene.failed_handshakes(0, "outbound")?;
        for to in to {
            let seen = peer::connect(&world.client, &to).count(3).run()?;
            let reset: u64 = seen.failed.get("ECONNRESET").copied().unwrap_or(0);
            ensure!(seen.answered == 0 && reset == 3, "{what}: {seen:?}");
        }
        let heard = impostor.heard()?;
        ensure!(heard.connections == 6 && heard.handshakes == 0, "{what}: {heard:?}");
        ensure!(heard.bytes == 0 && heard.said.is_empty(), "{what}: {heard:?}");
        ensure!(heard.refusals.iter().all(|refusal| refusal == wanted), "{what}: {heard:?}");
        let failed = scene.failed_handshakes(0, "outbound")? - before;
        ensure!(failed == 6.0, "{what}: {failed} handshakes failed");
        // In between, so that it is the certificate and nothing else.
        impostor.present(&scene.good("server")?)?;
        for to in to {
            let seen = peer::connect(&world.client, &to).count(1).run()?;
            ensure!(seen.of("impostor") == 1, "after {what}: {seen:?}");
        }
        let heard = impostor.heard()?;
        ensure!(heard.handshakes == 2 && heard.said == b"who\nwho\n", "after {what}: {heard:?}");
    }
    Ok(())
}

#[test]
fn a_revoked_server_hears_nothing_more_and_what_was_open_ends() -> anyhow::Result<()> {
    needs!(Mesh);
    let world = Impersonated::start()?;
    let (revoked, other) = (world.scene.good("server")?, world.scene.good("server")?);
    world.impostor.present(&revoked)?;
    let (mut holder, held) = peer::hold(&world.client, &world.server.address(8080), 2)?;
    ensure!(held.alive == 2, "{held:?}");
    world.scene.revoke(&revoked)?;
    world.is_refused("revoked", true)?;
    let held = holder.ask()?;
    ensure!(held.alive == 0, "it goes on: {held:?}");
    for to in [world.server.address(8080), world.server.address6(8080)] {
        let seen = peer::connect(&world.client, &to).count(3).run()?;
        ensure!(seen.failed.get("ECONNRESET") == Some(&3), "{seen:?}");
    }
    let heard = world.impostor.heard()?;
    ensure!(heard.bytes == 0 && heard.refusals.len() == 6, "{heard:?}");
    ensure!(heard.refusals.iter().all(|refusal| refusal == "CertificateRevoked"), "{heard:?}");
    world.impostor.present(&other)?;
    world.is_refused("another of the same workload", false)
}

#[test]
fn a_server_whose_root_is_dropped_hears_nothing_more_and_what_was_open_ends() -> anyhow::Result<()> {
    needs!(Mesh);
    let world = Impersonated::on(Scene::rotating()?)?;
    let (to, next) = (world.server.address(8080), Authority::new()?);
    let (mut of_former, held) = peer::hold(&world.client, &to, 2)?;
    ensure!(held.alive == 2, "{held:?}");
    world.scene.rotate(&next, &[&world.scene.authority])?;
    world.impostor.present(&next.issue(&Leaf::of(&of_account("server"))?)?)?;
    // Asked all the while, since the impostor gives up who says nothing for long.
    until("a server of the new root is taken", Duration::from_secs(20), || {
        let former = of_former.ask()?;
        ensure!(former.alive == 2, "{former:?}");
        let seen = peer::connect(&world.client, &to).count(1).run()?;
        ensure!(seen.of("impostor") == 1, "{seen:?}");
        Ok(())
    })?;
    let (mut of_next, held) = peer::hold(&world.client, &to, 2)?;
    ensure!(held.alive == 2, "{held:?}");
    world.scene.rotate(&next, &[])?;
    until("what was open to a server of the old root ends", Duration::from_secs(20), || {
        let (former, next) = (of_former.ask()?, of_next.ask()?);
        ensure!(former.alive == 0 && next.alive == 2, "{former:?}, {next:?}");
        Ok(())
    })?;
    of_next.close()?;
    world.impostor.present(&world.scene.good("server")?)?;
    world.is_refused("of the old root", true)?;
    world.impostor.present(&next.issue(&Leaf::of(&of_account("server"))?)?)?;
    world.is_refused("of the new root", false)
}

/// Certificates of `account` that are valid from and to so many seconds from now on: by the right time, all of them are.
const SPANS: [(i64, i64); 3] = [(-30, 3600), (-3000, 3600), (-3000, 10_800)];
/// Wrong clocks of a node whose own certificate has begun two minutes ago and lives for a day, and which of those are valid then.
const CLOCKS: [(i64, [bool; 3]); 4] = [
    (0, [true, true, true]),
    (-60, [false, true, true]),
    (7200, [false, false, true]),
    (0, [true, true, true]),
];

fn spans(scene: &Scene, account: &str) -> anyhow::Result<Vec<Credential>> {
    let now = SystemTime::now();
    let at = |seconds: i64| {
        let apart = Duration::from_secs(seconds.unsigned_abs());
        if seconds < 0 { now - apart } else { now + apart }
    };
    let issue =
        |(from, until)| scene.authority.issue(&Leaf::of(&of_account(account))?.valid(at(from), at(until)));
    SPANS.into_iter().map(issue).collect()
}

#[test]
fn a_node_judges_its_clients_by_its_own_clock() -> anyhow::Result<()> {
    needs!(Clock);
    let cluster = Cluster::start()?;
    let clock = Clock::new(&cluster.dir())?;
    let scene = Scene::on(cluster, |node| if node == 1 { clock.environment() } else { Vec::new() })?;
    let server = scene.mesh.client(1, "server")?;
    let witness = Witness::start(&server)?;
    let client = scene.mesh.nodes[0].pod("client")?;
    scene.mesh.agents[1].wait_for_proxies(&["server"])?;
    let spans = spans(&scene, "client")?;
    for (by, valid) in CLOCKS {
        clock.moved_by(by)?;
        for (credential, valid) in spans.iter().zip(valid) {
            let mut tunnel =
                Tunnel::dial(&client, server.address(tunnel::PORT), &tunnel::client(credential)?)?;
            let answer = tunnel.converse(server.address(8080), WHO);
            let told = witness.told();
            let refused = answer.as_ref().err().and_then(tunnel::alert).map(|alert| format!("{alert:?}"));
            match valid {
                true => ensure!(answer? == b"witness\n" && told == (1, WHO.to_vec()), "{by} s"),
                false => ensure!(
                    refused.as_deref() == Some("CertificateExpired") && told == (0, vec![]),
                    "{by} s: {answer:?}, and the application was told {told:?}"
                ),
            }
        }
    }
    Ok(())
}

#[test]
fn a_node_judges_servers_by_its_own_clock() -> anyhow::Result<()> {
    needs!(Clock);
    let cluster = Cluster::start()?;
    let clock = Clock::new(&cluster.dir())?;
    let scene = Scene::on(cluster, |node| if node == 0 { clock.environment() } else { Vec::new() })?;
    let world = Impersonated::on(scene)?;
    let spans = spans(&world.scene, "server")?;
    for (by, valid) in CLOCKS {
        clock.moved_by(by)?;
        for (credential, valid) in spans.iter().zip(valid) {
            world.impostor.present(credential)?;
            world.impostor.heard()?;
            let seen = peer::connect(&world.client, &world.server.address(8080)).count(3).run()?;
            let heard = world.impostor.heard()?;
            match valid {
                true => ensure!(seen.of("impostor") == 3 && heard.said == WHO.repeat(3), "{by} s: {seen:?}"),
                false => {
                    ensure!(seen.failed.get("ECONNRESET") == Some(&3), "{by} s: {seen:?}");
                    ensure!(heard.bytes == 0 && heard.refusals == ["CertificateExpired"; 3], "{heard:?}");
                }
            }
        }
    }
    Ok(())
}
