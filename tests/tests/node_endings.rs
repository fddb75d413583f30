//! How connections begin and end: between nodes, through two proxies, and on one node through one, where policy asks for that, as on one node
//! where nothing is between the ends.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::ensure;
use mesh_harness::process::anonymous_bytes_of;
use mesh_harness::{AgentOptions, Pod, needs, peer, say, until};
use mesh_tests::{Mesh, Server, descriptors_return, steer};

/// A client with two servers on its own node, one of them behind that node's proxy, and one on another.
struct Scene {
    client: Pod,
    near: Server,
    steered: Server,
    far: Server,
    mesh: Mesh,
}

impl Scene {
    fn start(options: &AgentOptions) -> anyhow::Result<Self> {
        let mesh = Mesh::start_with(&["z1", "z2"], options)?;
        let far = mesh.servers(&[(1, "far")])?.remove(0);
        let near = mesh.servers(&[(0, "near")])?.remove(0);
        let steered = mesh.servers(&[(0, "steered")])?.remove(0);
        let client = mesh.client(0, "client")?;
        mesh.agents[0].wait_for_proxies(&["client", "near", "steered"])?;
        steer(&mesh, &client, &steered)?;
        mesh.agents[1].wait_for_proxies(&["far"])?;
        mesh.wait_until_carried(0, &client, &far.pod.address(8080))?;
        Ok(Self { client, near, steered, far, mesh })
    }

    fn servers(&self) -> [&Server; 3] {
        [&self.near, &self.steered, &self.far]
    }

    /// How the connections ended to which a server has attended, as it saw them.
    fn attended(&self, server: &Server) -> anyhow::Result<BTreeMap<String, u64>> {
        let seen =
            peer::raw(&self.client, &server.pod.address(8080), &["--ask", "attended", "--then", "end"])?;
        ensure!(seen.lines.len() == 1, "{seen:?}");
        Ok(serde_json::from_str(&seen.lines[0])?)
    }
}

/// A way to end connections, and how it shows to the client and to a server that watches.
type Way<'a> = (&'a [&'a str], &'a [&'a str], Option<&'a str>);

/// `close`, `reset`, `leave`, `gush`, `shut`, each with a line feed.
const CLOSE: &str = "636c6f73650a";
const RESET: &str = "72657365740a";
const LEAVE: &str = "6c656176650a";
const GUSH: &str = "677573680a";
const SHUT: &str = "736875740a";

const WAYS: [Way<'_>; 11] = [
    // The server answers after the client's end: only a half-closed connection takes it there.
    (&["--ask", "attend", "--flood", "100000", "--then", "end"], &["end"], Some("end")),
    (&["--ask", "attend", "--then", "reset"], &["reset"], Some("ECONNRESET")),
    // In the middle of much, too.
    (&["--ask", "attend", "--flood", "300000", "--then", "reset"], &["reset"], Some("ECONNRESET")),
    // Two lines come, one of which the client does not read.
    (&["--ask", "who\nattend", "--then", "leave"], &["left"], Some("ECONNRESET")),
    // The server says more than the client waits for.
    (&["--ask", "insist", "--then", "close"], &["closed"], Some("EPIPE")),
    (&["--ask", "insist", "--then", "shut"], &["end"], Some("EPIPE")),
    (&["--hex", CLOSE], &["end"], None),
    (&["--hex", RESET], &["ECONNRESET"], None),
    (&["--hex", GUSH], &["ECONNRESET"], None),
    // The client says more than the server waits for.
    (&["--hex", LEAVE, "--flood", "30000000"], &["ECONNRESET"], None),
    // That its end comes before its reset is so on one node only; proxies do not make what is in vain wait.
    (&["--hex", SHUT, "--flood", "30000000"], &["EPIPE", "ECONNRESET"], None),
];

#[test]
fn whoever_ends_a_connection_the_other_sees_how() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start(&AgentOptions::default())?;
    let used = scene.mesh.descriptors()?;
    for server in scene.servers() {
        for to in [server.pod.address(8080), server.pod.address6(8080)] {
            for (how, at_client, at_server) in WAYS {
                let before = scene.attended(server)?;
                let seen = peer::raw(&scene.client, &to, &[&["--count", "20"], how].concat())?;
                ensure!(seen.of(at_client) == 20, "{to}: {how:?}: {seen:?}");
                if at_server == Some("end") {
                    let said = |line: &&String| line.ends_with(" 100000");
                    ensure!(seen.lines.iter().filter(said).count() == 20, "{to}: {how:?}: {seen:?}");
                }
                until(&format!("{to}: {how:?}: the server has seen it"), Duration::from_secs(10), || {
                    let mut now = scene.attended(server)?;
                    now.iter_mut().for_each(|(end, count)| *count -= before.get(end).copied().unwrap_or(0));
                    now.retain(|_, count| *count > 0);
                    let wanted = at_server.map(|end| (end.to_owned(), 20)).into_iter().collect();
                    ensure!(now == wanted, "{now:?} instead of {wanted:?}");
                    Ok(())
                })?;
            }
        }
    }
    descriptors_return(&scene.mesh, &used)
}

/// The byte that TCP calls urgent is no part of the stream unless its reader asks for that (`SO_OOBINLINE`). A proxy does not carry it, so it is
/// missing for a reader on another node that asks; around it nothing is lost, and nothing changes places.
#[test]
fn urgent_data_does_not_harm_the_stream_that_it_is_beside() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start(&AgentOptions::default())?;
    let used = scene.mesh.descriptors()?;
    let hex: String = b"before-and-after\n".iter().map(|byte| format!("{byte:02x}")).collect();
    for (server, carried) in [(&scene.near, true), (&scene.steered, false), (&scene.far, false)] {
        for to in [server.pod.address(8080), server.pod.address6(8080)] {
            for (ask, second) in [
                ("echo", "before-and-after"),
                ("inline", if carried { "!before-and-after" } else { "before-and-after" }),
            ] {
                let how = ["--count", "20", "--ask", ask, "--hex", &hex, "--urgent", "--then", "end"];
                let seen = peer::raw(&scene.client, &to, &how)?;
                ensure!(seen.of(&["end"]) == 20 && seen.lines.len() == 60, "{to}: {ask}: {seen:?}");
                // Each heard who is there, and its own lines.
                let exact = |three: &[String]| {
                    three[0].starts_with(&server.pod.name) && three[1..] == ["before-and-after", second]
                };
                ensure!(seen.lines.chunks(3).all(exact), "{to}: {ask}: {seen:?}");
            }
        }
    }
    descriptors_return(&scene.mesh, &used)
}

#[test]
fn a_server_may_speak_first() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start(&AgentOptions::default())?;
    for server in scene.servers() {
        let name = &server.pod.name;
        let _greeter = peer::tcp_greeter(&server.pod, name, 9090)?;
        for to in [server.pod.address(9090), server.pod.address6(9090)] {
            let seen = peer::raw(&scene.client, &to, &["--count", "20", "--hear-first", "--then", "end"])?;
            ensure!(seen.of(&["end"]) == 20, "{to}: {seen:?}");
            ensure!(
                seen.lines.len() == 20 && seen.lines.iter().all(|line| line.starts_with(name)),
                "{to}: {seen:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_connection_may_be_idle_for_longer_than_a_tunnel() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start(&AgentOptions::with(&["--proxy-idle-timeout", "1"]))?;
    let (mut holder, held) = peer::hold(&scene.client, &scene.far.pod.address(8080), 5)?;
    ensure!(held.alive == 5, "{held:?}");
    std::thread::sleep(Duration::from_secs(4));
    let held = holder.ask()?;
    ensure!(held.alive == 5, "{held:?}");
    holder.close()
}

#[test]
fn whoever_does_not_read_makes_the_other_wait_and_not_the_agents_grow() -> anyhow::Result<()> {
    needs!(Mesh);
    let mut scene = Scene::start(&AgentOptions::default())?;
    let used = scene.mesh.descriptors()?;
    let memory = || -> anyhow::Result<Vec<u64>> {
        scene.mesh.agents.iter().map(|agent| anonymous_bytes_of(agent.pid())).collect()
    };
    let before = memory()?;
    // A server that does not read, then a client that does not.
    let mut holders = Vec::new();
    for server in [&scene.far, &scene.far, &scene.far, &scene.steered] {
        let to = server.pod.address(8080);
        let how = ["--ask", "deaf", "--flood", "1000000000", "--timeout-ms", "2000"];
        let (holder, seen) = peer::raw_held(&scene.client, &to, &how)?;
        ensure!(seen.blocked == 1, "a server that does not read took all: {seen:?}");
        // Four kernel buffers at most are on the way.
        ensure!(seen.said < 64 << 20, "{seen:?}");
        holders.push(holder);
        holders.push(peer::raw_held(&scene.client, &to, &["--ask", "pump"])?.0);
    }
    for (server, name) in [(&scene.far, "far"), (&scene.steered, "steered")] {
        let seen = peer::connect(&scene.client, &server.pod.address(8080)).count(100).run()?;
        ensure!(seen.of(name) == 100, "others wait, too: {seen:?}");
    }
    let after = memory()?;
    say(&format!(
        "eight connections that nobody reads: {before:?} bytes of memory before, {after:?} with them"
    ));
    for (before, after) in before.iter().zip(&after) {
        ensure!(*after < before + (16 << 20), "an agent grew from {before} to {after}");
    }
    drop(holders);
    // What they said is still to be delivered, as without the mesh, for as long as there is somebody who may read it.
    scene.far.process.kill()?;
    scene.steered.process.kill()?;
    descriptors_return(&scene.mesh, &used)
}

#[test]
fn large_transfers_in_both_directions_at_once_are_exact() -> anyhow::Result<()> {
    needs!(Mesh);
    let scene = Scene::start(&AgentOptions::default())?;
    let used = scene.mesh.descriptors()?;
    let sizes = [1 << 20, 7_777_777, 32 << 20, 100 << 20];
    let mut running = Vec::new();
    for (seed, bytes) in sizes.into_iter().enumerate() {
        for to in [scene.far.pod.address(8080), scene.far.pod.address6(8080), scene.steered.pod.address(8080)]
        {
            running.push((bytes, peer::start_transfer(&scene.client, &to, bytes, seed as u64 + 1)?));
        }
    }
    for (bytes, transfer) in running {
        let seen = transfer.wait()?;
        ensure!(seen.exact && seen.received == bytes, "{bytes}: {seen:?}");
    }
    descriptors_return(&scene.mesh, &used)
}
