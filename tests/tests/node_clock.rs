//! A node whose clock is moved: what its certificates and those of its peers are worth is judged by it, and all is well once it is right again.

use std::time::{Duration, Instant};

use anyhow::ensure;
use mesh_harness::manifest::peer_authentication;
use mesh_harness::{AgentOptions, Clock, Cluster, ControlOptions, Pod, needs, peer, say, until};
use mesh_tests::{Mesh, Server, becomes};

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;

/// A client on node 1, and two servers on node 2, one of which takes only mutual TLS. The clock is that of one of the nodes.
struct Scene {
    client: Pod,
    stranger: Pod,
    strict: Server,
    open: Server,
    clock: Clock,
    node: usize,
    mesh: Mesh,
}

impl Scene {
    fn start(node: usize, control: &ControlOptions) -> anyhow::Result<Self> {
        let cluster = Cluster::start()?;
        let nodes = vec![cluster.node("z1")?, cluster.node("z2")?];
        let control = cluster.control_with(control)?;
        let clock = Clock::new(&cluster.dir())?;
        let mut agents = Vec::new();
        for (number, of) in nodes.iter().enumerate() {
            let environment = if number == node { clock.environment() } else { Vec::new() };
            let options = AgentOptions::with(&["--proxy-idle-timeout", "1"]);
            agents.push(of.agent_with(&AgentOptions { environment, ..options })?);
        }
        let mesh = Mesh { agents, control, nodes, cluster };
        let mut servers = mesh.servers(&[(1, "strict"), (1, "open")])?;
        let (open, strict) = (servers.remove(1), servers.remove(0));
        let client = mesh.client(0, "client")?;
        let policy = peer_authentication("default", "strict", Some("strict"), "STRICT");
        mesh.cluster.manifests().put("strict", &[policy])?;
        mesh.agents[1].wait_for_proxies(&["strict", "open"])?;
        for server in [&strict, &open] {
            mesh.wait_until_carried(0, &client, &server.pod.address(8080))?;
        }
        let stranger = mesh.nodes[0].pod("stranger")?;
        let scene = Self { client, stranger, strict, open, clock, node, mesh };
        becomes(&scene.stranger, &scene.strict, "ECONNREFUSED")?;
        Ok(scene)
    }

    /// The clock is wrong by so much: nobody is let in who could not show that he may be.
    fn is_refused(&self, by: i64) -> anyhow::Result<()> {
        let agent = &self.mesh.agents[self.node];
        let (refused, direct) = (agent.reason("proxy_not_ready")?, agent.reason("proxy_not_ready_direct")?);
        // What was made while the clock was right would go on being used.
        until("no tunnel waits for a connection", Duration::from_secs(10), || {
            let idle = self.mesh.agents[0].metric("mesh_agent_proxy_idle_tunnels", "")?;
            ensure!(idle == 0.0, "{idle} do");
            Ok(())
        })?;
        self.clock.moved_by(by)?;
        let to = self.strict.pod.address(8080);
        let at_once = peer::connect(&self.client, &to).count(1).run()?;
        ensure!(at_once.answered == 0, "{at_once:?}");
        match self.node {
            // This node has no certificate that is worth anything: what needs one is refused, the rest goes as it is.
            0 => {
                becomes(&self.client, &self.strict, "ECONNREFUSED")?;
                becomes(&self.client, &self.open, "open")?;
                ensure!(agent.reason("proxy_not_ready")? > refused, "{}", agent.stats()?);
                ensure!(agent.reason("proxy_not_ready_direct")? > direct, "{}", agent.stats()?);
            }
            // The server's node has none: nobody gets in with mutual TLS, and without it only where that is permitted.
            _ => {
                for server in [&self.strict, &self.open] {
                    becomes(&self.client, server, "ECONNRESET")?;
                }
            }
        }
        becomes(&self.stranger, &self.open, "open")?;
        for pod in [&self.client, &self.stranger] {
            let seen = peer::connect(pod, &to).count(50).interval(Duration::from_millis(20)).run()?;
            ensure!(seen.answered == 0 && seen.failed_total() == 50, "{by}: {} to {to}: {seen:?}", pod.name);
        }
        Ok(())
    }

    /// The clock is right again, and all is as before.
    fn recovers(&mut self) -> anyhow::Result<()> {
        self.clock.moved_by(0)?;
        becomes(&self.client, &self.strict, "strict")?;
        for server in [&self.strict, &self.open] {
            self.mesh.wait_until_carried(0, &self.client, &server.pod.address(8080))?;
        }
        becomes(&self.stranger, &self.strict, "ECONNREFUSED")?;
        for agent in &mut self.mesh.agents {
            ensure!(agent.process().ended()?.is_none(), "an agent ended: {}", agent.process().log_tail());
            until("the agent is ready, and complains of nothing", Duration::from_secs(10), || {
                let status = agent.status()?;
                let error = &status["certificate_authority"]["last_error"];
                ensure!(status["ready"] == true && error.is_null(), "{status}");
                Ok(())
            })?;
        }
        Ok(())
    }
}

#[test]
fn a_clock_that_is_set_costs_new_connections_and_no_open_ones_for_as_long_as_it_is_wrong()
-> anyhow::Result<()> {
    needs!(Clock);
    for node in [0, 1] {
        let mut scene = Scene::start(node, &ControlOptions::default())?;
        for by in [2 * DAY, -6 * HOUR] {
            let mut holders = Vec::new();
            for server in [&scene.strict, &scene.open] {
                let (holder, held) = peer::hold(&scene.client, &server.pod.address(8080), 3)?;
                ensure!(held.alive == 3, "{held:?}");
                holders.push(holder);
            }
            scene.is_refused(by)?;
            for holder in &mut holders {
                let held = holder.ask()?;
                ensure!(held.alive == 3, "node {node}, {by} s: open connections ended: {held:?}");
            }
            scene.recovers()?;
            for mut holder in holders {
                let held = holder.ask()?;
                ensure!(held.alive == 3, "node {node}, {by} s: open connections ended: {held:?}");
                holder.close()?;
            }
        }
    }
    Ok(())
}

#[test]
fn certificates_that_have_ended_while_the_clock_was_wrong_are_renewed_once_it_is_right() -> anyhow::Result<()>
{
    needs!(Clock);
    let control = ControlOptions {
        arguments: vec!["--certificate-lifetime".into(), "6s".into()],
        ..ControlOptions::default()
    };
    for by in [HOUR, -HOUR] {
        let mut scene = Scene::start(0, &control)?;
        scene.is_refused(by)?;
        // Each attempt to renew them fails, and the next one waits for twice as long.
        std::thread::sleep(Duration::from_secs(20));
        let right = Instant::now();
        scene.recovers()?;
        let took = right.elapsed();
        say(&format!("{by} s: all is well {took:?} after the clock was right again"));
        // The clock is looked at every five seconds.
        ensure!(took < Duration::from_secs(12), "{by} s: it took {took:?}");
    }
    Ok(())
}
