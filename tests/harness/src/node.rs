//! A node: a namespace that routes to its pods, a cgroup subtree, paths for its agent.

use std::cell::Cell;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde_json::{Value, json};

use crate::agent::{Agent, AgentOptions};
use crate::cgroup::{Cgroup, Driver, Qos};
use crate::cluster::{fabric_address, node_addresses};
use crate::netns::Netns;
use crate::pod::{Place, Pod, PodPlan};
use crate::site::Site;

/// One machine of the cluster.
#[derive(Debug)]
pub struct Node {
    site: Rc<Site>,
    index: u8,
    name: String,
    zone: String,
    netns: Rc<Netns>,
    cgroup: Cgroup,
    pods: Cell<u16>,
}

impl Node {
    pub(crate) fn new(site: Rc<Site>, index: u8, zone: &str, netns: Netns) -> anyhow::Result<Self> {
        let name = format!("node-{index}");
        let mut cgroup = Cgroup::create(site.cgroup().join(&name))?;
        std::fs::create_dir_all(cgroup.path().join("kubepods.slice"))?;
        std::fs::create_dir_all(cgroup.path().join("system.slice"))?;
        if site.kept() {
            cgroup.persist();
            netns.persist(&format!("{}-{name}", site.id()))?;
        }
        let (zone, netns, pods) = (zone.to_owned(), Rc::new(netns), Cell::new(0));
        Ok(Self { site, index, name, zone, netns, cgroup, pods })
    }

    /// `node-1`, `node-2`, …
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its zone.
    pub fn zone(&self) -> &str {
        &self.zone
    }

    /// Its IPv4 and IPv6 address.
    pub fn addresses(&self) -> [IpAddr; 2] {
        node_addresses(self.index)
    }

    /// Its own network.
    pub fn netns(&self) -> &Rc<Netns> {
        &self.netns
    }

    /// The cgroup that its agent owns.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// Where its agent pins.
    pub fn pins(&self) -> PathBuf {
        self.site.pins(&self.name)
    }

    /// Its agent's state directory.
    pub fn state_dir(&self) -> PathBuf {
        self.site.dir().join(format!("{}.state", self.name))
    }

    /// Its agent's admin socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.site.dir().join(format!("{}.sock", self.name))
    }

    /// Address of the control plane, or of anything in the fabric, as this node reaches it.
    pub fn fabric(&self, port: u16) -> String {
        format!("https://{}:{port}", fabric_address(self.index))
    }

    pub(crate) fn site(&self) -> &Rc<Site> {
        &self.site
    }

    pub(crate) fn index(&self) -> u8 {
        self.index
    }

    /// Starts the agent and waits until it is ready.
    pub fn agent(self: &Rc<Self>) -> anyhow::Result<Agent> {
        Agent::start(self, &AgentOptions::default())
    }

    /// Starts the agent with options, and waits until it is ready when these say so.
    pub fn agent_with(self: &Rc<Self>, options: &AgentOptions) -> anyhow::Result<Agent> {
        Agent::start(self, options)
    }

    /// A running pod of namespace `default`.
    pub fn pod(self: &Rc<Self>, name: &str) -> anyhow::Result<Pod> {
        self.plan(name).start()
    }

    /// A pod that is scheduled here but does not exist yet.
    pub fn plan(self: &Rc<Self>, name: &str) -> PodPlan {
        let number = self.pods.get() + 1;
        self.pods.set(number);
        PodPlan::new(Rc::clone(self), name, number, Place::Kubernetes(Driver::Systemd, Qos::Burstable))
    }

    /// A process on the node itself, in the cgroup `path` below the node's, such as a systemd service.
    pub fn host_workload(self: &Rc<Self>, name: &str, path: &str) -> anyhow::Result<Pod> {
        let mut plan = PodPlan::new(Rc::clone(self), name, 0, Place::Cgroup(path.into()));
        plan.host_network = true;
        plan.start()
    }

    /// Its Node manifest.
    pub fn manifest(&self) -> Value {
        let [v4, v6] = self.addresses();
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": {
                "kubernetes.io/hostname": self.name,
                "topology.kubernetes.io/region": "r1",
                "topology.kubernetes.io/zone": self.zone,
            }},
            "status": {"addresses": [
                {"type": "InternalIP", "address": v4},
                {"type": "InternalIP", "address": v6},
                {"type": "Hostname", "address": self.name},
            ]},
        })
    }
}
