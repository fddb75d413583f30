//! HBONE with a node proxy that is not ours, in both directions: `tests/harness/hbone-peer` speaks it as Istio's ztunnel does, and has
//! its certificates from the control plane as any node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, ensure};
use mesh_harness::hbone::{Foreign, Opened};
use mesh_harness::manifest::authorization_policy;
use mesh_harness::{AgentOptions, Node, Pod, Service, needs, peer, sys, until};
use mesh_tests::{Mesh, Server, descriptors_return};
use serde_json::{Value, json};

const TUNNEL: u16 = 15008;
const PATIENCE: Duration = Duration::from_secs(10);
const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const BAGGAGE: &str = "k8s.cluster.name=elsewhere,k8s.namespace.name=default,k8s.pod.name=client,service.name=client,service.version=latest";
/// Codes of RST_STREAM (RFC 9113, section 7).
const INTERNAL_ERROR: u32 = 2;
const CANCEL: u32 = 8;
const CONNECT_ERROR: u32 = 10;

fn identity(account: &str) -> String {
    format!("spiffe://cluster.local/ns/default/sa/{account}")
}

/// What is told of a workload in zone `z1`, to the letter as ztunnel tells it: tools that read it look for these.
fn baggage(controller: &str, service: &str) -> String {
    format!(
        "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,{controller},service.name={service},service.version=latest,cloud.region=r1,cloud.availability_zone=z1"
    )
}

/// A pod on a node without agent, with the proxy that is not ours.
fn foreign_pod(mesh: &Mesh, node: &Rc<Node>, name: &str, account: &str) -> anyhow::Result<(Foreign, Pod)> {
    let mut plan = node.plan(name);
    plan.service_account = account.to_owned();
    let pod = plan.start()?;
    mesh.cluster.manifests().put_pods([&*pod])?;
    // The control plane has to know the pod first.
    let foreign = until("its certificate is granted", PATIENCE, || Foreign::start(&pod, &identity(account)))?;
    Ok((foreign, pod))
}

/// A server on our node, a foreign client on another.
struct Inbound {
    client: Foreign,
    client_pod: Pod,
    server: Server,
    foreign_node: Rc<Node>,
    mesh: Mesh,
}

impl Inbound {
    fn start(options: &AgentOptions) -> anyhow::Result<Self> {
        let mesh = Mesh::start_with(&["z1"], options)?;
        let server = mesh.servers(&[(0, "server")])?.remove(0);
        let foreign_node = mesh.cluster.node("z2")?;
        let (client, client_pod) = foreign_pod(&mesh, &foreign_node, "client", "client")?;
        mesh.agents[0].wait_for_proxies(&["server"])?;
        Ok(Self { client, client_pod, server, foreign_node, mesh })
    }

    fn at(&self, port: u16) -> String {
        self.server.pod.address(port).to_string()
    }

    fn tunnel(&mut self) -> anyhow::Result<Value> {
        self.client.tunnel(self.server.pod.address(TUNNEL), "ztunnel")
    }

    /// A stream to the server, as from `port` of the client's pod.
    fn stream(&mut self, tunnel: &Value, port: u16) -> anyhow::Result<Opened> {
        let forwarded =
            format!("for=\"{}\";host=web.default.svc.cluster.local", self.client_pod.address(port));
        let others = [("forwarded", forwarded.as_str()), ("baggage", BAGGAGE), ("traceparent", TRACEPARENT)];
        let opened = self.client.connect(tunnel, &self.at(8080), &others)?;
        ensure!(opened.headers[":status"] == "200", "{opened:?}");
        Ok(opened)
    }

    /// How the connections ended that the server has attended to.
    fn attended(&mut self, tunnel: &Value) -> anyhow::Result<BTreeMap<String, u64>> {
        let stream = self.stream(tunnel, 49_999)?;
        let attended = serde_json::from_str(&self.client.line(&stream, "attended")?)?;
        self.client.on(&stream, json!({"do": "say", "end": true}))?;
        Ok(attended)
    }
}

#[test]
fn a_foreign_client_is_served_stream_by_stream_on_one_tunnel() -> anyhow::Result<()> {
    needs!(Hbone);
    let mut scene = Inbound::start(&AgentOptions::default())?;
    let used = scene.mesh.descriptors()?;
    for windows in ["ztunnel", "least"] {
        let tunnel = scene.client.tunnel(scene.server.pod.address(TUNNEL), windows)?;
        ensure!(tunnel["peer"] == json!([identity("default")]), "{tunnel}");
        ensure!(tunnel["alpn"] == "h2" && tunnel["version"] == "TLSv1.3", "{tunnel}");
        let ports = [40_001, 40_002, 40_003];
        let streams = ports.map(|port| scene.stream(&tunnel, port));
        let streams = streams.into_iter().collect::<Result<Vec<_>, _>>()?;
        for (port, stream) in ports.iter().zip(&streams) {
            // The server listens for both families, so IPv4 shows as mapped.
            let client = format!("server [::ffff:{}]:{port}", scene.client_pod.addresses()[0]);
            let heard = scene.client.line(stream, "who")?;
            ensure!(heard == client, "the server sees {heard:?} instead of {client:?}");
            let wanted = baggage("k8s.pod.name=server", "server");
            ensure!(stream.headers["baggage"] == wanted, "{stream:?}: wanted {wanted}");
        }
        // Much more than any window, while the others wait for their turn.
        scene.client.line(&streams[0], "echo")?;
        let exchanged = scene.client.on(&streams[0], json!({"do": "exchange", "size": 8 << 20}))?;
        ensure!(exchanged["exact"] == true, "{windows}: bytes were changed on the way");
        for stream in &streams {
            scene.client.on(stream, json!({"do": "say", "text": "close\n", "end": true}))?;
            let heard = scene.client.on(stream, json!({"do": "hear"}))?;
            ensure!(heard["ended"] == true && heard["reset"].is_null(), "{heard}");
        }
    }
    // IPv6, and a client that does not tell whom it speaks for.
    let tunnel = scene.client.tunnel(scene.server.pod.address6(TUNNEL), "ztunnel")?;
    let stream = scene.client.connect(&tunnel, &scene.server.pod.address6(8080).to_string(), &[])?;
    let heard = scene.client.line(&stream, "who")?;
    ensure!(heard.starts_with(&format!("server [{}]:", scene.client_pod.addresses()[1])), "{heard}");
    drop(scene.client);
    descriptors_return(&scene.mesh, &used)
}

#[test]
fn a_foreign_client_and_the_server_see_how_the_other_ends() -> anyhow::Result<()> {
    needs!(Hbone);
    let mut scene = Inbound::start(&AgentOptions::default())?;
    let tunnel = scene.tunnel()?;
    // The client ends first: the server answers after that.
    let stream = scene.stream(&tunnel, 40_001)?;
    scene.client.line(&stream, "attend")?;
    scene.client.on(&stream, json!({"do": "say", "text": "12345", "end": true}))?;
    let heard = scene.client.on(&stream, json!({"do": "hear"}))?;
    let text = heard["text"].as_str().unwrap_or_default();
    ensure!(text.ends_with(" 5\n") && heard["ended"] == true, "{heard}");
    // The server does: the client goes on.
    let stream = scene.stream(&tunnel, 40_002)?;
    scene.client.line(&stream, "finish")?;
    let heard = scene.client.on(&stream, json!({"do": "hear"}))?;
    ensure!(heard["ended"] == true && heard["text"] == "" && heard["reset"].is_null(), "{heard}");
    scene.client.on(&stream, json!({"do": "say", "text": "1234567", "end": true}))?;
    // The server resets.
    let stream = scene.stream(&tunnel, 40_003)?;
    scene.client.on(&stream, json!({"do": "say", "text": "reset\n"}))?;
    let heard = scene.client.on(&stream, json!({"do": "hear"}))?;
    ensure!(heard["reset"] == CONNECT_ERROR && heard["ended"] == false, "{heard}");
    // The client does; CANCEL is how ztunnel ends what has ended in order at its application.
    for (port, code) in [(40_004, CONNECT_ERROR), (40_005, INTERNAL_ERROR), (40_006, CANCEL)] {
        let stream = scene.stream(&tunnel, port)?;
        scene.client.line(&stream, "attend")?;
        scene.client.on(&stream, json!({"do": "reset", "code": code}))?;
    }
    until("the server has seen all ends", PATIENCE, || {
        let attended = scene.attended(&tunnel)?;
        let wanted = [("end", 2), ("7 bytes", 1), ("ECONNRESET", 2)];
        ensure!(attended == wanted.map(|(how, count)| (how.to_owned(), count)).into(), "{attended:?}");
        Ok(())
    })
}

#[test]
fn a_foreign_client_is_told_why_it_is_refused() -> anyhow::Result<()> {
    needs!(Hbone);
    let mut scene = Inbound::start(&AgentOptions::default())?;
    let (mut guest, _guest_pod) = foreign_pod(&scene.mesh, &scene.foreign_node, "guest", "guest")?;
    let neighbour = scene.mesh.servers(&[(0, "neighbour")])?.remove(0);
    let tunnel = scene.tunnel()?;
    let held = scene.stream(&tunnel, 40_001)?;
    let guests = guest.tunnel(scene.server.pod.address(TUNNEL), "ztunnel")?;
    let guests_held = guest.connect(&guests, &scene.at(8080), &[])?;
    ensure!(guests_held.headers[":status"] == "200", "{guests_held:?}");
    guest.line(&guests_held, "who")?;
    // Policy asks for the identity of the certificate, whatever is told.
    let only = authorization_policy(
        "default",
        "only-client",
        Some("server"),
        "ALLOW",
        &[json!({"from": [{"source": {"principals": ["cluster.local/ns/default/sa/client"]}}]})],
    );
    scene.mesh.cluster.manifests().put("only-client", &[only])?;
    let forwarded = format!("for=\"{}\"", scene.client_pod.address(40_002));
    until("the guest is refused", PATIENCE, || {
        let refused = guest.connect(&guests, &scene.at(8080), &[("forwarded", &forwarded)])?;
        ensure!(refused.headers[":status"] == "401", "{refused:?}");
        Ok(())
    })?;
    // What it had open ends; the other's goes on.
    let ended = guest.on(&guests_held, json!({"do": "hear"}))?;
    ensure!(ended["reset"] == CONNECT_ERROR, "{ended}");
    scene.client.line(&held, "who")?;
    let connect = |authority: String| vec![(":method", "CONNECT".to_owned()), (":authority", authority)];
    let get = ["GET", "http", &scene.at(8080), "/"].map(str::to_owned);
    let get = [":method", ":scheme", ":authority", ":path"].into_iter().zip(get).collect();
    for (headers, status) in [
        (connect(scene.at(8080)), "200"),
        // Another workload, a name, no port, the proxy's own ports, no CONNECT.
        (connect(neighbour.pod.address(8080).to_string()), "400"),
        (connect("server.default.svc.cluster.local:8080".to_owned()), "400"),
        (connect(scene.server.pod.addresses()[0].to_string()), "400"),
        (connect(scene.at(15001)), "400"),
        (connect(scene.at(15006)), "400"),
        (connect(scene.at(TUNNEL)), "400"),
        (get, "400"),
        // Nobody listens.
        (connect(scene.at(8081)), "503"),
    ] {
        let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let answer = scene.client.open(&tunnel, &headers)?;
        ensure!(answer.headers[":status"] == status, "{headers:?}: {answer:?} instead of {status}");
    }
    // None of this was any trouble for the stream beside.
    scene.client.line(&held, "who")?;
    let none = json!({"do": "tunnel", "to": scene.at(TUNNEL), "certificate": false});
    let none = scene.client.attempt(&none)?;
    ensure!(none["error"].as_str().is_some_and(|error| error.contains("CERTIFICATE_REQUIRED")), "{none}");
    Ok(())
}

#[test]
fn a_foreign_client_is_told_that_the_agent_stops() -> anyhow::Result<()> {
    needs!(Hbone);
    let mut scene = Inbound::start(&AgentOptions::with(&["--drain-timeout", "8"]))?;
    let tunnel = scene.tunnel()?;
    let streams = [scene.stream(&tunnel, 40_001)?, scene.stream(&tunnel, 40_002)?];
    for stream in &streams {
        scene.client.line(stream, "who")?;
    }
    sys::kill(scene.mesh.agents[0].pid(), libc::SIGTERM)?;
    let state = scene.client.ask(&json!({"do": "state", "tunnel": tunnel["tunnel"], "goaways": 1}))?;
    ensure!(state["goaways"][0]["code"] == 0 && state["over"].is_null(), "{state}");
    // What is open has its time.
    scene.client.line(&streams[1], "who")?;
    scene.client.line(&streams[0], "attend")?;
    scene.client.on(&streams[0], json!({"do": "say", "text": "12345", "end": true}))?;
    let heard = scene.client.on(&streams[0], json!({"do": "hear"}))?;
    ensure!(heard["text"].as_str().is_some_and(|text| text.ends_with(" 5\n")), "{heard}");
    ensure!(heard["ended"] == true, "{heard}");
    ensure!(scene.mesh.agents[0].process().ended()?.is_none(), "it has not waited");
    // And no longer.
    let state = scene.client.ask(&json!({"do": "state", "tunnel": tunnel["tunnel"], "over": true}))?;
    ensure!(!state["over"].is_null(), "{state}");
    let status = scene.mesh.agents[0].process().wait(PATIENCE)?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// A client on our node, and servers on a node with foreign proxies.
struct Outbound {
    client: Pod,
    proxies: Vec<Foreign>,
    servers: Vec<Server>,
    vip: SocketAddr,
    mesh: Mesh,
}

fn web() -> Service {
    Service::new("web", [10, 96, 0, 1]).also_at([0xfd00, 0x96, 0, 0, 0, 0, 0, 1]).tcp(80, 8080)
}

impl Outbound {
    fn start(names: &[&str], how: &Value) -> anyhow::Result<Self> {
        let mesh = Mesh::start(&["z1"])?;
        let node = mesh.cluster.node("z2")?;
        let (mut proxies, mut servers) = (Vec::new(), Vec::new());
        for &name in names {
            let (mut proxy, pod) = foreign_pod(&mesh, &node, name, "default")?;
            proxy.listen(how)?;
            let process = peer::tcp_echo(&pod, name, 8080)?;
            proxies.push(proxy);
            servers.push(Server { process, pod });
        }
        proxies[0].join(&servers[0].pod)?;
        let vip = mesh.serve_all(&web(), &servers)?;
        let mut plan = mesh.nodes[0].plan("client");
        plan.deployment = Some("shoppers".to_owned());
        let client = plan.start()?;
        mesh.cluster.manifests().put_pods([&*client])?;
        mesh.agents[0].wait_for_workloads(&["client"])?;
        for server in &servers {
            mesh.wait_until_carried(0, &client, &server.pod.address(8080))?;
        }
        Ok(Self { client, proxies, servers, vip, mesh })
    }

    fn one(how: &Value) -> anyhow::Result<Self> {
        Self::start(&["far"], how)
    }

    fn to(&self) -> SocketAddr {
        self.servers[0].pod.address(8080)
    }

    fn raw(&self, how: &[&str]) -> anyhow::Result<mesh_harness::report::Raw> {
        peer::raw(&self.client, &self.to(), how)
    }

    fn attended(&self) -> anyhow::Result<BTreeMap<String, u64>> {
        let seen = self.raw(&["--ask", "attended", "--then", "end"])?;
        ensure!(seen.lines.len() == 1, "{seen:?}");
        Ok(serde_json::from_str(&seen.lines[0])?)
    }
}

#[test]
fn what_a_foreign_server_is_asked_is_as_it_knows_it() -> anyhow::Result<()> {
    needs!(Hbone);
    let mut scene = Outbound::one(&json!({}))?;
    let pod = &scene.servers[0].pod;
    let vip6 = SocketAddr::new(web().addresses[1], 80);
    let mut traces = BTreeSet::new();
    for (to, authority, host) in [
        (scene.vip, pod.address(8080), ";host=web.default.svc.cluster.local"),
        (vip6, pod.address6(8080), ";host=web.default.svc.cluster.local"),
        (pod.address(8080), pod.address(8080), ""),
        (pod.address6(8080), pod.address6(8080), ""),
    ] {
        let seen = peer::connect(&scene.client, &to).count(1).run()?;
        ensure!(seen.of("far") == 1, "{to}: {seen:?}");
        ensure!(seen.peers.keys().eq([&to.to_string()]), "{to}: the client saw {:?}", seen.peers);
        let tunnels = scene.proxies[0].seen()?;
        let mut streams =
            tunnels.iter().flat_map(|tunnel| tunnel["streams"].as_array().into_iter().flatten());
        let of = |stream: &&Value| stream["headers"][1] == json!([":authority", authority.to_string()]);
        let last = streams.rfind(of).with_context(|| format!("no {authority} in {tunnels:?}"))?;
        let headers: Vec<(String, String)> = serde_json::from_value(last["headers"].clone())?;
        // CONNECT has these two, and neither scheme nor path (RFC 9113, section 8.5).
        let names: Vec<_> = headers.iter().map(|(name, _)| name.as_str()).collect();
        let wanted = [":method", ":authority", "forwarded", "traceparent", "baggage"];
        ensure!(names == wanted, "{headers:?}");
        let value = |name: &str| headers.iter().find(|(of, _)| of == name).map_or("", |(_, value)| value);
        ensure!(value(":method") == "CONNECT", "{headers:?}");
        let own = SocketAddr::new(scene.client.addresses()[usize::from(to.is_ipv6())], 0).to_string();
        let own = own.trim_end_matches('0');
        let forwarded = value("forwarded").strip_prefix("for=\"").and_then(|rest| rest.strip_suffix(host));
        let port = forwarded.and_then(|rest| rest.strip_prefix(own)?.strip_suffix('"')?.parse::<u16>().ok());
        ensure!(port.is_some(), "{headers:?}: not {own}, or not {host:?}");
        let parts: Vec<_> = value("traceparent").split('-').map(str::len).collect();
        ensure!(parts == [2, 32, 16, 2] && traces.insert(value("traceparent").to_owned()), "{headers:?}");
        let wanted = baggage("k8s.deployment.name=shoppers", "client");
        ensure!(value("baggage") == wanted, "{headers:?}: wanted {wanted}");
    }
    for tunnel in scene.proxies[0].seen()? {
        ensure!(tunnel["peer"] == json!([identity("default")]), "{tunnel}");
        ensure!(tunnel["alpn"] == "h2" && tunnel["version"] == "TLSv1.3", "{tunnel}");
    }
    Ok(())
}

#[test]
fn streams_to_a_foreign_server_share_a_tunnel_and_are_exact() -> anyhow::Result<()> {
    needs!(Hbone);
    for windows in ["ztunnel", "least"] {
        let mut scene = Outbound::one(&json!({"windows": windows}))?;
        let used = scene.mesh.descriptors()?;
        let seen = peer::connect(&scene.client, &scene.vip).count(100).concurrency(10).run()?;
        ensure!(seen.of("far") == 100, "{windows}: {seen:?}");
        let transfers = [1, 2, 3].map(|seed| peer::start_transfer(&scene.client, &scene.vip, 6 << 20, seed));
        for transfer in transfers {
            let moved = transfer?.wait()?;
            ensure!(moved.exact, "{windows}: {moved:?}");
        }
        let tunnels = scene.proxies[0].seen()?;
        // Those that began while there was none yet have waited for the one that the first made.
        ensure!(tunnels.len() <= 5, "{windows}: {} tunnels for 100 connections", tunnels.len());
        drop(scene.proxies);
        descriptors_return(&scene.mesh, &used)?;
    }
    Ok(())
}

#[test]
fn an_application_and_a_foreign_server_see_how_the_other_ends() -> anyhow::Result<()> {
    needs!(Hbone);
    let mut scene = Outbound::one(&json!({}))?;
    // The client ends first: the server answers after that. Then the server does.
    let seen = scene.raw(&["--ask", "attend", "--flood", "100000", "--then", "end"])?;
    ensure!(seen.of(&["end"]) == 1 && seen.lines.len() == 2, "{seen:?}");
    ensure!(seen.lines[1].ends_with(" 100000"), "{seen:?}");
    let seen = scene.raw(&["--ask", "finish", "--flood", "100000", "--then", "end"])?;
    ensure!(seen.of(&["end"]) == 1 && seen.lines.len() == 1, "{seen:?}");
    until("the server has heard all", PATIENCE, || {
        let attended = scene.attended()?;
        let wanted = [("end".to_owned(), 1), ("100000 bytes".to_owned(), 1)].into();
        ensure!(attended == wanted, "{attended:?}");
        Ok(())
    })?;
    // The client resets.
    scene.raw(&["--count", "5", "--ask", "attend", "--then", "reset"])?;
    until("the resets have come", PATIENCE, || {
        let streams = scene.proxies[0].streams()?;
        let resets = streams.iter().filter(|stream| stream["reset"] == CONNECT_ERROR).count();
        ensure!(resets == 5, "{resets} resets: {streams:?}");
        Ok(())
    })?;
    // The server does, or its proxy; CANCEL is how ztunnel ends what has ended in order.
    let reset = "72657365740a";
    let seen = scene.raw(&["--count", "5", "--hex", reset])?;
    ensure!(seen.of(&["ECONNRESET"]) == 5, "{seen:?}");
    for (code, heard) in [(INTERNAL_ERROR, "ECONNRESET"), (CONNECT_ERROR, "ECONNRESET"), (CANCEL, "end")] {
        let (held, _) = peer::raw_held(&scene.client, &scene.to(), &["--count", "5", "--ask", "attend"])?;
        scene.proxies[0].ask(&json!({"do": "cut", "code": code}))?;
        let seen = held.finish()?;
        ensure!(seen.of(&[heard]) == 5, "{code}: {seen:?} instead of {heard}");
    }
    Ok(())
}

#[test]
fn what_a_foreign_server_refuses_is_reset_or_goes_to_another() -> anyhow::Result<()> {
    needs!(Hbone);
    let mut scene = Outbound::start(&["far", "other"], &json!({}))?;
    let answer = |proxy: &mut Foreign, status: u16| proxy.ask(&json!({"do": "answers", "status": status}));
    for status in [400, 401, 403, 404, 500, 503, 504] {
        answer(&mut scene.proxies[0], status)?;
        // It alone was dialled.
        let seen = scene.raw(&["--count", "3", "--ask", "who"])?;
        ensure!(seen.of(&["ECONNRESET"]) == 3 && seen.heard == 0, "{status}: {seen:?}");
        // A service: only another's trouble is a reason to ask somebody else.
        let seen = peer::connect(&scene.client, &scene.vip).count(20).run()?;
        let (others, failed) = (seen.of("other"), seen.failed_total());
        if status >= 500 {
            ensure!(others == 20, "{status}: {seen:?}");
        } else {
            ensure!(others + failed == 20 && others > 0 && failed > 0, "{status}: {seen:?}");
            ensure!(seen.failed.keys().eq(["ECONNRESET"]), "{status}: {seen:?}");
        }
    }
    // Nobody is left.
    for proxy in &mut scene.proxies {
        answer(proxy, 503)?;
    }
    let seen = peer::connect(&scene.client, &scene.vip).count(5).run()?;
    ensure!(seen.failed.get("ECONNRESET") == Some(&5), "{seen:?}");
    for proxy in &mut scene.proxies {
        answer(proxy, 200)?;
    }
    // The application is not there.
    scene.servers[0].process.kill()?;
    let seen = scene.raw(&["--count", "3", "--ask", "who"])?;
    ensure!(seen.of(&["ECONNRESET"]) == 3, "{seen:?}");
    Ok(())
}

#[test]
fn a_foreign_server_that_goes_away_in_order_costs_no_connection() -> anyhow::Result<()> {
    needs!(Hbone);
    let mut scene = Outbound::one(&json!({}))?;
    let (mut holder, held) = peer::hold(&scene.client, &scene.to(), 3)?;
    ensure!(held.alive == 3, "{held:?}");
    let before = scene.proxies[0].seen()?.len();
    let running = peer::connect(&scene.client, &scene.vip).count(1_000_000).concurrency(4).start()?;
    for round in 0..20 {
        std::thread::sleep(Duration::from_millis(100));
        // What crosses it is served, or is left for another tunnel.
        scene.proxies[0].ask(&json!({"do": "goaway", "all": round % 2 == 0}))?;
    }
    let seen = running.finish()?;
    ensure!(seen.failed.is_empty() && seen.answered > 100, "{seen:?}");
    let held = holder.ask()?;
    ensure!(held.alive == 3, "an open stream has ended: {held:?}");
    let made = scene.proxies[0].seen()?.len() - before;
    // After the last one none need have begun, and one that is made serves all who wait.
    ensure!((10..=60).contains(&made), "{made} tunnels after 20 times GOAWAY");
    holder.close()?;
    until("old tunnels are closed", PATIENCE, || {
        let tunnels = scene.proxies[0].seen()?;
        let open = tunnels.iter().filter(|tunnel| tunnel["over"].is_null()).count();
        ensure!(open <= 5, "{open} of {} are open", tunnels.len());
        Ok(())
    })
}

#[test]
fn a_foreign_server_that_takes_few_streams_gets_more_tunnels() -> anyhow::Result<()> {
    needs!(Hbone);
    let mut scene = Outbound::one(&json!({"limit": 3}))?;
    let (mut holder, held) = peer::hold(&scene.client, &scene.to(), 20)?;
    ensure!(held.alive == 20, "{held:?}");
    let held = holder.ask()?;
    ensure!(held.alive == 20, "{held:?}");
    for tunnel in scene.proxies[0].seen()? {
        let open = |stream: &&Value| stream["done"] == false;
        let open = tunnel["streams"].as_array().into_iter().flatten().filter(open).count();
        ensure!(open <= 3, "{open} streams are open: {tunnel}");
    }
    holder.close()
}

/// REFUSED_STREAM: nothing was done for that stream, so it may be asked for again (RFC 9113, section 8.7).
#[test]
fn a_stream_that_a_foreign_server_refuses_goes_on_another_tunnel() -> anyhow::Result<()> {
    needs!(Hbone);
    let mut scene = Outbound::one(&json!({}))?;
    scene.proxies[0].ask(&json!({"do": "answers", "status": "refused"}))?;
    let seen = peer::connect(&scene.client, &scene.to()).count(20).run()?;
    ensure!(seen.of("far") == 20, "{seen:?}");
    let streams = scene.proxies[0].streams()?;
    // Of the last, nobody has heard yet.
    let refused = streams.iter().filter(|stream| stream["bytes"] == 0).count();
    ensure!(refused >= 9, "{refused} were refused: {streams:?}");
    Ok(())
}

#[test]
fn a_foreign_server_must_be_the_workload_that_was_meant() -> anyhow::Result<()> {
    needs!(Hbone);
    let mut scene = Outbound::one(&json!({}))?;
    let node = Rc::clone(scene.servers[0].pod.node());
    // Another workload of the same node, whose certificate is as good.
    let mut other = node.plan("other");
    other.service_account = "other".to_owned();
    scene.mesh.cluster.manifests().put_pods([&other])?;
    let proxy = &mut scene.proxies[0];
    let pod = &scene.servers[0].pod;
    until("the other's certificate is granted", PATIENCE, || proxy.certify(pod, &identity("other")))?;
    proxy.ask(&json!({"do": "goaway"}))?;
    let before = scene.mesh.agents[0].metric("mesh_agent_proxy_handshakes_total", "failed")?;
    let streams = scene.proxies[0].streams()?.len();
    let seen = scene.raw(&["--count", "3", "--ask", "who"])?;
    ensure!(seen.of(&["ECONNRESET"]) == 3 && seen.heard == 0, "{seen:?}");
    let failed = scene.mesh.agents[0].metric("mesh_agent_proxy_handshakes_total", "failed")? - before;
    ensure!(failed >= 3.0, "{failed} handshakes failed");
    let asked = scene.proxies[0].streams()?.len() - streams;
    ensure!(asked == 0, "{asked} streams were asked for");
    scene.proxies[0].certify(&scene.servers[0].pod, &identity("default"))?;
    let seen = scene.raw(&["--ask", "who", "--then", "end"])?;
    ensure!(seen.of(&["end"]) == 1 && seen.lines.len() == 1, "{seen:?}");
    Ok(())
}
