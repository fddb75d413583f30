//! The mesh on a cluster of one machine: what most end-to-end tests start from. The tests are in `tests/`.

pub mod authority;
pub mod saved;
pub mod tunnel;

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use mesh_harness::manifest::authorization_policy;
use mesh_harness::process::Process;
use mesh_harness::{Agent, AgentOptions, Cluster, Control, ControlOptions, Node, Pod, Service, peer, until};
use serde_json::json;

/// A cluster with a control plane and an agent on every node. Fields go in order, agents before the cluster.
#[derive(Debug)]
pub struct Mesh {
    /// One for each node.
    pub agents: Vec<Agent>,
    /// The control plane.
    pub control: Control,
    /// In the order of the zones that were asked for.
    pub nodes: Vec<Rc<Node>>,
    /// The cluster.
    pub cluster: Cluster,
}

impl Mesh {
    /// A node in each of `zones`, all ready.
    pub fn start(zones: &[&str]) -> anyhow::Result<Self> {
        Self::start_with(zones, &AgentOptions::default())
    }

    /// The same with options for all agents.
    pub fn start_with(zones: &[&str], options: &AgentOptions) -> anyhow::Result<Self> {
        Self::start_under(zones, options, &ControlOptions::default())
    }

    /// The same under a control plane with options of its own.
    pub fn start_under(
        zones: &[&str],
        options: &AgentOptions,
        control: &ControlOptions,
    ) -> anyhow::Result<Self> {
        let cluster = Cluster::start()?;
        let nodes = zones.iter().map(|zone| cluster.node(zone)).collect::<Result<Vec<_>, _>>()?;
        let control = cluster.control_with(control)?;
        let agents = nodes.iter().map(|node| node.agent_with(options)).collect::<Result<_, _>>()?;
        Ok(Self { agents, control, nodes, cluster })
    }

    /// Descriptors that each agent has open.
    pub fn descriptors(&self) -> anyhow::Result<Vec<usize>> {
        // The last answers to the harness itself are connections, too.
        std::thread::sleep(Duration::from_millis(100));
        self.agents.iter().map(Agent::descriptors).collect()
    }

    /// A pod on node number `node`, announced and enrolled.
    pub fn client(&self, node: usize, name: &str) -> anyhow::Result<Pod> {
        let pod = self.nodes[node].pod(name)?;
        self.cluster.manifests().put_pods([&*pod])?;
        self.agents[node].wait_for_workloads(&[name])?;
        Ok(pod)
    }

    /// The same of a service account of its own name, so that policies can tell it from others.
    pub fn account(&self, node: usize, name: &str) -> anyhow::Result<Pod> {
        let mut plan = self.nodes[node].plan(name);
        plan.service_account = name.to_owned();
        let pod = plan.start()?;
        self.cluster.manifests().put_pods([&*pod])?;
        self.agents[node].wait_for_workloads(&[name])?;
        Ok(pod)
    }

    /// Waits until connections from `client`, a pod on node number `node`, to `to` are carried under mutual TLS.
    pub fn wait_until_carried(&self, node: usize, client: &Pod, to: &SocketAddr) -> anyhow::Result<()> {
        self.agents[node].wait_for_proxies(&[&client.name])?;
        until(&format!("{} reaches {to} under mutual TLS", client.name), Duration::from_secs(20), || {
            let before = self.agents[node].reason("proxied")?;
            let seen = peer::connect(client, to).count(1).run()?;
            anyhow::ensure!(self.agents[node].reason("proxied")? > before, "it went direct: {seen:?}");
            anyhow::ensure!(seen.failed.is_empty(), "{seen:?}");
            Ok(())
        })
    }

    /// Pods with a TCP server on port 8080 that answers with the pod's name.
    pub fn servers(&self, placed: &[(usize, &str)]) -> anyhow::Result<Vec<Server>> {
        placed.iter().map(|(node, name)| self.server(*node, name)).collect()
    }

    fn server(&self, node: usize, name: &str) -> anyhow::Result<Server> {
        let pod = self.nodes[node].pod(name)?;
        self.cluster.manifests().put_pods([&*pod])?;
        let process = peer::tcp_echo(&pod, name, 8080)?;
        Ok(Server { process, pod })
    }

    /// Announces a service and waits until each agent's kernel has these backends for its first address and port.
    pub fn serve(&self, service: &Service, backends: &[SocketAddr]) -> anyhow::Result<SocketAddr> {
        self.cluster.manifests().put_service(service)?;
        let port = &service.ports[0];
        let address = service.at(port.port);
        for agent in &self.agents {
            match port.protocol {
                "UDP" => agent.wait_for_udp_backends(&address, backends)?,
                _ => agent.wait_for_backends(&address, backends)?,
            }
        }
        Ok(address)
    }

    /// A service `name` on port 80 of `address` in front of these servers, in force on all nodes.
    pub fn serve_all(&self, service: &Service, servers: &[Server]) -> anyhow::Result<SocketAddr> {
        let service = service.clone().pods(servers.iter().map(|server| &*server.pod));
        self.serve(&service, &addresses(servers))
    }
}

/// Waits until connections of `pod` to `server` fail so, or are answered if `outcome` is the server's name.
pub fn becomes(pod: &Pod, server: &Server, outcome: &str) -> anyhow::Result<()> {
    let to = server.pod.address(8080);
    until(&format!("{} to {to}: {outcome}", pod.name), Duration::from_secs(20), || {
        let seen = peer::connect(pod, &to).count(1).run()?;
        anyhow::ensure!(seen.of(outcome) == 1 || seen.failed.contains_key(outcome), "{seen:?}");
        Ok(())
    })
}

/// Lets everybody come to `server`, of node number 0, by a policy that asks for HTTP as well, and waits until connections of `client`, a pod
/// of the same node, go through the proxy.
pub fn steer(mesh: &Mesh, client: &Pod, server: &Server) -> anyhow::Result<()> {
    let rules = [json!({}), json!({"to": [{"operation": {"methods": ["GET"]}}]})];
    let policy = authorization_policy("default", "steer", Some(&server.pod.name), "ALLOW", &rules);
    mesh.cluster.manifests().put("steer", &[policy])?;
    until(&format!("{} is led to the proxy", client.name), Duration::from_secs(20), || {
        let before = mesh.agents[0].reason("inbound_steered")?;
        let seen = peer::connect(client, &server.pod.address(8080)).count(1).run()?;
        anyhow::ensure!(mesh.agents[0].reason("inbound_steered")? > before, "it went past it: {seen:?}");
        anyhow::ensure!(seen.of(&server.pod.name) == 1, "{seen:?}");
        Ok(())
    })
}

/// A pod with a server.
#[derive(Debug)]
pub struct Server {
    /// The server.
    pub process: Process,
    /// The pod.
    pub pod: Pod,
}

/// Where servers listen, over IPv4.
pub fn addresses(servers: &[Server]) -> Vec<SocketAddr> {
    servers.iter().map(|server| server.pod.address(8080)).collect()
}

/// Asserts that `value` lies within `range`, and says what it is.
#[track_caller]
pub fn assert_within(what: &str, value: f64, range: std::ops::RangeInclusive<f64>) {
    assert!(range.contains(&value), "{what} is {value:.3}, not within {range:?}");
}

/// Waits until no agent has more descriptors open than it had, what it keeps on purpose left out, and none carries a connection.
pub fn descriptors_return(mesh: &Mesh, before: &[usize]) -> anyhow::Result<()> {
    until("all that was opened is closed", Duration::from_secs(30), || {
        let now = mesh.descriptors()?;
        // Tunnels that wait for the next connection are kept on purpose.
        for (node, agent) in mesh.agents.iter().enumerate() {
            let kept = agent.metric("mesh_agent_proxy_idle_tunnels", "")? as usize;
            let carried = agent.metric("mesh_agent_proxy_connections", "outbound")?;
            anyhow::ensure!(carried == 0.0, "node {node} still carries {carried}");
            let tunnels = kept + agent.metric("mesh_agent_proxy_connections", "inbound")? as usize;
            // And so are sockets that each pod's proxy has made ahead, eight of each family.
            let ahead = 16 * agent.metric("mesh_agent_proxy_pods", "ready")? as usize;
            let kinds = || agent.descriptor_kinds().unwrap_or_default();
            let (before, now) = (before[node], now[node]);
            anyhow::ensure!(
                now <= before + tunnels + ahead,
                "node {node}: {before} before, {now} now: {:?}",
                kinds()
            );
        }
        Ok(())
    })
}
