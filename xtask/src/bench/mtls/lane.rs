//! Two nodes with a client and a server, and one way between them.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_harness::process::{Process, anonymous_bytes_of};
use mesh_harness::{Agent, AgentOptions, Cluster, Control, Node, Pod, cgroup, peer, until};

use super::{CONGESTION_CONTROL, Kind, nginx};

/// Where the server answers; threads that each serve one connection at a time, the least work per connection.
pub(super) const PORT: u16 = 8080;
/// Where it has a thread for every connection, for thousands that are idle.
pub(super) const IDLE_PORT: u16 = 8081;
/// More than are open at a time.
const THREADS: usize = 16;

/// Fields go in order.
pub(super) struct Lane {
    pub(super) kind: Kind,
    _proxies: Vec<Process>,
    _agents: Vec<Agent>,
    _servers: [Process; 2],
    pub(super) client: Pod,
    server: Pod,
    nodes: [Rc<Node>; 2],
    _control: Option<Control>,
    _cluster: Cluster,
}

/// Processor seconds so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cpu {
    /// Of what carries the connections, at both ends.
    pub(super) proxies: f64,
    /// Of everything on both nodes: client and server, too.
    pub(super) all: f64,
}

impl Lane {
    /// Both pods have this congestion control.
    pub(super) fn start(kind: Kind, congestion_control: &str) -> Result<Self> {
        let cluster = Cluster::start()?;
        let nodes = [cluster.node("z1")?, cluster.node("z2")?];
        let (client, server) = (nodes[0].pod("client")?, nodes[1].pod("server")?);
        for pod in [&client, &server] {
            pod.netns().run(|| {
                fs::write(CONGESTION_CONTROL, congestion_control)
                    .with_context(|| format!("--congestion-control: the kernel has no {congestion_control}"))
            })?;
        }
        cluster.manifests().put_pods([&*client, &*server])?;
        let control = if kind.is_mesh() { Some(cluster.control()?) } else { None };
        let agents = if kind.is_mesh() { start_agents(kind, &nodes)? } else { Vec::new() };
        for (agent, pod) in agents.iter().zip([&client, &server]) {
            // Then their sockets are those of workloads.
            agent.wait_for_workloads(&[&pod.name])?;
        }
        let servers = [
            peer::tcp_echo_serial(&server, "server", PORT, THREADS)?,
            peer::tcp_echo(&server, "server", IDLE_PORT)?,
        ];
        let proxies = match kind {
            Kind::Nginx | Kind::Plain => {
                let cgroups = [&nodes[0], &nodes[1]].map(proxy_of);
                nginx::start(&cluster.dir(), [&client, &server], cgroups, kind == Kind::Nginx)?
            }
            Kind::Direct | Kind::Stream | Kind::Hbone => Vec::new(),
        };
        let lane = Self {
            kind,
            _proxies: proxies,
            _agents: agents,
            _servers: servers,
            client,
            server,
            nodes,
            _control: control,
            _cluster: cluster,
        };
        lane.ready()?;
        Ok(lane)
    }

    /// Where the client connects to reach the server's `port`.
    pub(super) fn to(&self, port: u16) -> SocketAddr {
        match self.kind {
            Kind::Direct | Kind::Stream | Kind::Hbone => self.server.address(port),
            Kind::Nginx | Kind::Plain => SocketAddr::from(([127, 0, 0, 1], port)),
        }
    }

    pub(super) fn cpu(&self) -> Result<Cpu> {
        let sum = |of: &dyn Fn(&Rc<Node>) -> PathBuf| -> Result<f64> {
            self.nodes.iter().map(|node| cgroup::cpu_seconds(&of(node))).sum()
        };
        let proxies = if self.kind == Kind::Direct { 0.0 } else { sum(&proxy_of)? };
        Ok(Cpu { proxies, all: sum(&|node| node.cgroup().to_path_buf())? })
    }

    /// Memory of what carries the connections: at the client's end, at the server's.
    pub(super) fn memory(&self) -> Result<[u64; 2]> {
        let of = |node: &Rc<Node>| -> Result<u64> { memory_of(&proxy_of(node)) };
        Ok([of(&self.nodes[0])?, of(&self.nodes[1])?])
    }

    /// Waits until an answer comes, and comes the way that is to be measured.
    fn ready(&self) -> Result<()> {
        let to = self.to(PORT);
        let used = || -> Result<Vec<f64>> {
            self.nodes.iter().map(|node| cgroup::cpu_seconds(&proxy_of(node))).collect()
        };
        until(&format!("{to} answers"), Duration::from_secs(30), || {
            let seen = peer::connect(&self.client, &to).run()?;
            ensure!(seen.of("server") == 1, "{to} does not answer: {:?}", seen.failures);
            if self.kind == Kind::Direct {
                return Ok(());
            }
            let before = used()?;
            let seen = peer::transfer(&self.client, &to, 64 << 20, 1)?;
            ensure!(seen.exact, "bytes were lost or changed");
            for (before, after) in before.iter().zip(used()?) {
                // As much as no proxy uses when it has nothing to do.
                ensure!(after - before > 0.01, "{} does not carry the connection", self.kind.name());
            }
            Ok(())
        })
    }
}

/// The cgroup of a node's proxy.
fn proxy_of(node: &Rc<Node>) -> PathBuf {
    // Where the harness runs agents.
    node.cgroup().join("system.slice/mesh-agent.service")
}

/// Memory of all processes of a cgroup.
fn memory_of(cgroup: &Path) -> Result<u64> {
    let processes = cgroup::processes(cgroup)?;
    ensure!(!processes.is_empty(), "nothing runs in {}", cgroup.display());
    processes.into_iter().map(anonymous_bytes_of).sum()
}

fn start_agents(kind: Kind, nodes: &[Rc<Node>]) -> Result<Vec<Agent>> {
    // Our own protocol is what agents choose.
    let arguments: &[&str] = if kind == Kind::Hbone { &["--tunnel-protocols", "hbone"] } else { &[] };
    let options = AgentOptions::with(arguments);
    let start = |node: &Rc<Node>| node.agent_with(&options).context("an agent that carries connections");
    nodes.iter().map(start).collect()
}
