//! Clusters with a number of services of ten endpoints, and nodes that reach them in one way or another.
//!
//! Every lane has a node of its own with the client and the server, the shortest way there is, so that what a lane adds
//! weighs most. The server answers for all endpoints of the services that are called.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_harness::process::Process;
use mesh_harness::{Agent, AgentOptions, Cluster, Control, Endpoint, Node, Pod, Service, peer, until};

use super::iptables;

/// Endpoints of a service.
pub(super) const ENDPOINTS: u32 = 10;
/// Services that are really called; they lie evenly among all, since iptables walks its rules in order.
const CALLED: u32 = 10;
/// The endpoints of called services: every lane's node routes them to its own server.
const LIVE: [u8; 4] = [10, 101, 64, 0];
/// The endpoints of all others.
const OTHERS: [u8; 4] = [10, 160, 0, 0];
const PORT: u16 = 80;
pub(super) const TARGET: u16 = 8080;

/// A cluster whose control plane knows `services` services.
pub(super) struct World {
    pub(super) _control: Control,
    pub(super) cluster: Cluster,
    pub(super) services: u32,
}

/// A client on a node of its own, and what it calls. Fields go in order.
pub(super) struct Lane {
    pub(super) agent: Option<Agent>,
    pub(super) server: Process,
    pub(super) client: Pod,
    pub(super) to: Vec<SocketAddr>,
    _server_pod: Pod,
}

impl World {
    pub(super) fn new(services: u32) -> Result<Self> {
        ensure!((CALLED..=10_000).contains(&services), "--services must be from {CALLED} to 10000");
        let cluster = Cluster::start()?;
        for number in 0..services {
            cluster.manifests().put_service(&service(number, services))?;
        }
        let control = cluster.control()?;
        Ok(Self { _control: control, cluster, services })
    }

    /// No mesh: the client dials endpoints.
    pub(super) fn direct(&self) -> Result<Lane> {
        let to = (0..CALLED).map(|i| SocketAddr::new(offset(LIVE, i * ENDPOINTS), TARGET)).collect();
        self.lane(|_node| Ok(None), to)
    }

    /// An agent on the node.
    pub(super) fn mesh(&self) -> Result<Lane> {
        self.lane(|node| self.agent(node).map(Some), self.addresses())
    }

    /// kube-proxy's rules in the node's namespace, where kube-proxy writes them.
    pub(super) fn iptables(&self) -> Result<Lane> {
        let rules = iptables::rules((0..self.services).map(|number| rule(number, self.services)))?;
        self.lane(
            |node| {
                let mut restore = Command::new("iptables-restore");
                node.netns().feed(restore.args(["--wait", "5"]), &rules, "iptables")?;
                Ok(None)
            },
            self.addresses(),
        )
    }

    /// An agent with every service in the kernel.
    pub(super) fn agent(&self, node: &std::rc::Rc<Node>) -> Result<Agent> {
        let agent = node.agent_with(&AgentOptions { wait: false, ..AgentOptions::default() })?;
        until("all services are in the kernel", Duration::from_secs(60), || {
            let have = services_in_kernel(&agent)?;
            ensure!(have >= u64::from(self.services), "{have} of {}", self.services);
            Ok(())
        })?;
        Ok(agent)
    }

    fn lane(
        &self,
        prepare: impl FnOnce(&std::rc::Rc<Node>) -> Result<Option<Agent>>,
        to: Vec<SocketAddr>,
    ) -> Result<Lane> {
        let node = self.cluster.node("z1")?;
        let name = |role: &str| format!("{role}-{}", node.name());
        let (server_pod, client) = (node.pod(&name("server"))?, node.pod(&name("client"))?);
        self.cluster.manifests().put_pods([&*server_pod, &*client])?;
        let [a, b, c, d] = LIVE;
        server_pod.own_range(&format!("{a}.{b}.{c}.{d}/24"))?;
        let server = peer::tcp_echo_serial(&server_pod, "@local", TARGET, 8)?;
        let agent = prepare(&node)?;
        if let Some(agent) = &agent {
            // Then their sockets are those of workloads.
            agent.wait_for_workloads(&[&server_pod.name, &client.name])?;
        }
        let first = peer::connect(&client, &to[0]).run()?;
        ensure!(first.answered == 1, "{} does not answer: {:?}", to[0], first.failures);
        Ok(Lane { agent, server, client, to, _server_pod: server_pod })
    }

    /// Addresses of the services that are called.
    fn addresses(&self) -> Vec<SocketAddr> {
        let called = (0..self.services).filter(|number| live(*number, self.services).is_some());
        called.map(|number| service(number, self.services).at(PORT)).collect()
    }

    /// The last of the services that are called, for changes.
    pub(super) fn changing(&self) -> Service {
        let number = (0..self.services).rev().find(|number| live(*number, self.services).is_some());
        service(number.unwrap_or(0), self.services)
    }
}

/// Entries of the agent's map of services.
pub(super) fn services_in_kernel(agent: &Agent) -> Result<u64> {
    let status = agent.status()?;
    let maps = status["maps"].as_array().context("no maps in /status")?;
    let is_services =
        |map: &&serde_json::Value| map["name"].as_str().is_some_and(|n| n.eq_ignore_ascii_case("services"));
    maps.iter()
        .find(is_services)
        .and_then(|map| map["entries"].as_u64())
        .context("no map of services in /status")
}

/// Which of the called services this is.
fn live(number: u32, services: u32) -> Option<u32> {
    let step = services / CALLED;
    // The middle of each tenth.
    (number % step == step / 2 && number / step < CALLED).then_some(number / step)
}

fn endpoints(number: u32, services: u32) -> impl Iterator<Item = IpAddr> {
    let first = match live(number, services) {
        Some(called) => (LIVE, called * ENDPOINTS),
        None => (OTHERS, number * ENDPOINTS),
    };
    (0..ENDPOINTS).map(move |i| offset(first.0, first.1 + i))
}

fn service(number: u32, services: u32) -> Service {
    let address = offset([10, 96, 0, 0], number + 1);
    let endpoints = endpoints(number, services).map(Endpoint::at);
    Service::new(&format!("svc-{number}"), address).tcp(PORT, TARGET).endpoints(endpoints)
}

fn rule(number: u32, services: u32) -> iptables::Rule {
    let address = offset([10, 96, 0, 0], number + 1);
    let endpoints = endpoints(number, services).map(|ip| SocketAddr::new(ip, TARGET)).collect();
    // Affinity is written for one service that is not called, so that its match is part of the rules.
    iptables::Rule {
        name: format!("default/svc-{number}:tcp-80"),
        address,
        port: PORT,
        endpoints,
        affinity: number == 0,
    }
}

fn offset(base: [u8; 4], by: u32) -> IpAddr {
    // Skip .0, which some read as a network.
    Ipv4Addr::from(u32::from_be_bytes(base) + 1 + by).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_services_are_called_whatever_their_number() {
        for services in [10, 1000, 9999, 10_000] {
            let called = (0..services).filter(|number| live(*number, services).is_some()).count();
            assert_eq!(called, 10, "{services}");
        }
    }
}
