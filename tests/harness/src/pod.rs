//! A pod: a namespace behind a veth pair, a cgroup as kubelet would make it, and the peers that run inside.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;

use serde_json::{Value, json};

use crate::binaries;
use crate::cgroup::{Cgroup, Driver, Qos, container_path};
use crate::cluster::{node_addresses, pod_addresses};
use crate::netns::Netns;
use crate::node::Node;
use crate::process::{Process, Surroundings};

/// Where a pod's processes are accounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Under `kubepods`.
    Kubernetes(Driver, Qos),
    /// A path below the node's cgroup.
    Cgroup(PathBuf),
}

/// A pod that is known but may not run yet.
#[derive(Debug, Clone)]
pub struct PodPlan {
    node: Rc<Node>,
    number: u16,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// Its `metadata.uid`.
    pub uid: String,
    /// Which cgroup it gets.
    pub place: Place,
    /// It uses the node's network.
    pub host_network: bool,
    /// The Deployment that it is of.
    pub deployment: Option<String>,
}

impl PodPlan {
    pub(crate) fn new(node: Rc<Node>, name: &str, number: u16, place: Place) -> Self {
        let uid = format!("5eed0000-{:04x}-4000-8000-{:012x}", node.index(), number);
        let (namespace, service_account) = ("default".to_owned(), "default".to_owned());
        let host_network = false;
        let deployment = None;
        Self {
            node,
            number,
            name: name.into(),
            namespace,
            service_account,
            uid,
            place,
            host_network,
            deployment,
        }
    }

    /// Its IPv4 and IPv6 address.
    pub fn addresses(&self) -> [IpAddr; 2] {
        match self.host_network {
            true => node_addresses(self.node.index()),
            false => pod_addresses(self.node.index(), self.number),
        }
    }

    /// The node that it is scheduled to.
    pub fn node(&self) -> &Rc<Node> {
        &self.node
    }

    /// The path of container `container` below the node's cgroup.
    pub fn cgroup_path(&self, container: &str) -> PathBuf {
        match &self.place {
            Place::Kubernetes(driver, qos) => container_path(*driver, *qos, &self.uid, container),
            Place::Cgroup(path) => path.clone(),
        }
    }

    /// Its Pod manifest, running and ready.
    pub fn manifest(&self) -> Value {
        let [v4, v6] = self.addresses();
        let mut metadata = json!({
            "name": self.name, "namespace": self.namespace, "uid": self.uid, "labels": {"app": self.name},
        });
        if let Some(deployment) = &self.deployment {
            metadata["labels"]["pod-template-hash"] = "5d4f8c7b6".into();
            let replica_set = format!("{deployment}-5d4f8c7b6");
            metadata["ownerReferences"] = json!([
                {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": replica_set, "uid": "r", "controller": true},
            ]);
        }
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": {
                "nodeName": self.node.name(),
                "serviceAccountName": self.service_account,
                "hostNetwork": self.host_network,
                "containers": [{"name": "app", "image": "app"}],
            },
            "status": {
                "phase": "Running",
                "podIP": v4,
                "podIPs": [{"ip": v4}, {"ip": v6}],
                "hostIP": self.node.addresses()[0],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        })
    }

    /// A WorkloadEntry for a place that is not a pod's.
    pub fn workload_entry(&self) -> Value {
        json!({
            "apiVersion": "networking.istio.io/v1",
            "kind": "WorkloadEntry",
            "metadata": {
                "name": self.name, "namespace": self.namespace, "labels": {"app": self.name},
                "annotations": {"mesh.dev/cgroup": self.cgroup_path("app")},
            },
            "spec": {
                "address": self.addresses()[0],
                "serviceAccount": self.service_account,
                "labels": {"app": self.name},
                "locality": format!("r1/{}", self.node.zone()),
                "network": "",
            },
        })
    }

    /// Creates its network and its cgroup.
    pub fn start(self) -> anyhow::Result<Pod> {
        let network = self.network()?;
        self.start_with(network)
    }

    /// Creates its cgroup over a network that exists.
    pub fn start_with(self, netns: Rc<Netns>) -> anyhow::Result<Pod> {
        let mut cgroup = Cgroup::create(self.node.cgroup().join(self.cgroup_path("app")))?;
        if self.node.site().kept() {
            cgroup.persist();
        }
        let log = self.log();
        let persistent = self.node.site().kept();
        let at = Surroundings { netns: &netns, cgroup: cgroup.path(), log: &log, persistent };
        let mut sleep = Command::new("sleep");
        sleep.arg("infinity");
        let pause = Process::start("pause", sleep, at, false)?;
        Ok(Pod { pause, plan: self, netns, cgroup })
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.node.site().dir().join(format!("{}.log", self.name))
    }

    /// Creates its namespace, wired to the node; or takes the node's.
    pub fn network(&self) -> anyhow::Result<Rc<Netns>> {
        if self.host_network {
            return Ok(Rc::clone(self.node.netns()));
        }
        let netns = Netns::create()?;
        let (link, [v4, v6]) = (format!("pod{}", self.number), self.addresses());
        let [high, low] = self.number.to_be_bytes();
        let mac = |end: u8| format!("02:01:{:02x}:{high:02x}:{low:02x}:{end:02x}", self.node.index());
        let (ours, theirs, path) = (mac(1), mac(2), netns.path());
        self.node.netns().ip_batch(&format!(
            "link add {link} address {ours} type veth peer name eth0 address {theirs} netns {path}\n\
             address add fe80::1/64 dev {link} nodad\n\
             link set {link} up\n\
             route add {v4} dev {link}\n\
             route add {v6} dev {link}\n\
             neighbour add {v4} lladdr {theirs} dev {link} nud permanent\n\
             neighbour add {v6} lladdr {theirs} dev {link} nud permanent\n",
            path = path.display()
        ))?;
        netns.ip_batch(&format!(
            "link set eth0 up\n\
             address add {v4}/32 dev eth0\n\
             address add {v6}/128 dev eth0 nodad\n\
             route add default via 169.254.1.1 dev eth0 onlink\n\
             route add default via fe80::1 dev eth0\n\
             neighbour add 169.254.1.1 lladdr {ours} dev eth0 nud permanent\n\
             neighbour add fe80::1 lladdr {ours} dev eth0 nud permanent\n"
        ))?;
        if self.node.site().kept() {
            netns.persist(&format!("{}-{}", self.node.site().id(), self.name))?;
        }
        Ok(Rc::new(netns))
    }
}

/// A pod that exists. Like any, it has a process that does nothing, for as long as it is there.
#[derive(Debug)]
pub struct Pod {
    // Ended before its cgroup is removed.
    pause: Process,
    plan: PodPlan,
    netns: Rc<Netns>,
    cgroup: Cgroup,
}

impl std::ops::Deref for Pod {
    type Target = PodPlan;

    fn deref(&self) -> &PodPlan {
        &self.plan
    }
}

impl Pod {
    /// The process that does nothing.
    pub fn pause(&mut self) -> &mut Process {
        &mut self.pause
    }

    /// Its network.
    pub fn netns(&self) -> &Rc<Netns> {
        &self.netns
    }

    /// The cgroup of its container.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Answers for every address of `range`, an IPv4 prefix within the node's 10.(100+i).0.0/16.
    pub fn own_range(&self, range: &str) -> anyhow::Result<()> {
        let link = format!("pod{}", self.plan.number);
        let via = self.plan.addresses()[0];
        self.plan.node.netns().ip_batch(&format!("route add {range} via {via} dev {link} onlink\n"))?;
        self.netns.ip_batch(&format!("route add local {range} dev lo\n"))
    }

    /// Starts `mesh-peer` with `arguments` in this pod.
    pub fn peer(&self, arguments: &[String]) -> anyhow::Result<Process> {
        let mut command = Command::new(binaries::find("mesh-peer")?);
        command.args(arguments);
        let name = format!("{} of {}", arguments.first().map_or("peer", String::as_str), self.name);
        Process::start(&name, command, self.surroundings(&self.log()), true)
    }

    /// Starts any program in this pod, its output in the pod's log.
    pub fn run(&self, command: Command) -> anyhow::Result<Process> {
        Process::start(&self.name, command, self.surroundings(&self.log()), false)
    }

    /// Runs a program in this pod's network, but accounted to `cgroup`, as a node's proxy is; its output in the pod's log.
    pub fn run_beside(&self, command: Command, cgroup: &std::path::Path) -> anyhow::Result<Process> {
        fs::create_dir_all(cgroup)?;
        let log = self.log();
        Process::start(&self.name, command, Surroundings { cgroup, ..self.surroundings(&log) }, false)
    }

    /// Runs a command in this pod to its end.
    pub fn output(&self, mut command: Command) -> anyhow::Result<std::process::Output> {
        self.netns.start_in(&mut command, Some(self.cgroup.path()), false)?;
        Ok(command.output()?)
    }

    pub(crate) fn surroundings<'a>(&'a self, log: &'a std::path::Path) -> Surroundings<'a> {
        let persistent = self.plan.node.site().kept();
        Surroundings { netns: &self.netns, cgroup: self.cgroup.path(), log, persistent }
    }

    /// What its processes have logged.
    pub fn log_text(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }
}
