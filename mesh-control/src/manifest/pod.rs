//! Pod, Node and the two kinds that only have metadata, all of the core group.

use std::net::IpAddr;

use serde::Deserialize;

use super::{Meta, Protocol, check::Checks, service::is_usable, value::nullable};

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Pod {
    #[serde(default)]
    pub(crate) metadata: Meta,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) spec: PodSpec,
    #[serde(default, deserialize_with = "nullable")]
    status: PodStatus,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct PodSpec {
    pub(crate) node_name: Option<String>,
    pub(crate) service_account_name: Option<String>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) host_network: bool,
    #[serde(deserialize_with = "nullable")]
    containers: Vec<Container>,
    /// Restartable ones (sidecars) serve ports, too.
    #[serde(deserialize_with = "nullable")]
    init_containers: Vec<Container>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    #[serde(default, deserialize_with = "nullable")]
    ports: Vec<ContainerPort>,
    restart_policy: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    #[serde(default, deserialize_with = "nullable")]
    name: String,
    container_port: u16,
    #[serde(default, deserialize_with = "nullable")]
    protocol: Protocol,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodStatus {
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs", deserialize_with = "nullable")]
    pod_ips: Vec<PodIp>,
    #[serde(deserialize_with = "nullable")]
    phase: Phase,
    #[serde(deserialize_with = "nullable")]
    conditions: Vec<Condition>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct PodIp {
    ip: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
    #[default]
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

impl Pod {
    /// `podIPs`, or `podIP` alone.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.listed_ips().filter_map(|(_, ip)| ip.parse().ok())
    }

    /// Its processes have ended for good.
    pub(crate) fn is_finished(&self) -> bool {
        matches!(self.status.phase, Phase::Succeeded | Phase::Failed)
    }

    /// Its readiness checks pass.
    pub(crate) fn is_ready(&self) -> bool {
        self.status.conditions.iter().any(|c| c.kind == "Ready" && c.status == "True")
    }

    /// It was asked to end.
    pub(crate) fn is_terminating(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }

    /// Number of the container port with this name.
    pub(crate) fn port(&self, name: &str, protocol: Protocol) -> Option<u16> {
        let sidecars =
            self.spec.init_containers.iter().filter(|c| c.restart_policy.as_deref() == Some("Always"));
        let mut ports = self.spec.containers.iter().chain(sidecars).flat_map(|c| &c.ports);
        ports.find(|p| p.name == name && p.protocol == protocol).map(|p| p.container_port)
    }

    fn listed_ips(&self) -> impl Iterator<Item = (String, &str)> {
        let single = if self.status.pod_ips.is_empty() { self.status.pod_ip.as_deref() } else { None };
        let listed = self.status.pod_ips.iter().enumerate();
        let listed = listed.map(|(i, ip)| (format!("status.podIPs[{i}].ip"), ip.ip.as_str()));
        listed.chain(single.map(|ip| ("status.podIP".to_owned(), ip))).filter(|(_, ip)| !ip.is_empty())
    }

    pub(super) fn check(&mut self, checks: &mut Checks) {
        self.metadata.check(true, checks);
        for (field, ip) in self.listed_ips() {
            match ip.parse::<IpAddr>() {
                Ok(ip) => {
                    checks.require(is_usable(ip), field, format!("{ip} cannot be the address of a pod"))
                }
                Err(_) => checks.refuse(field, format!("{ip:?} is not an IP address")),
            }
        }
        for (c, container) in self.spec.containers.iter().enumerate() {
            for (p, port) in container.ports.iter().enumerate() {
                let field = format!("spec.containers[{c}].ports[{p}].containerPort");
                checks.require(port.container_port != 0, field, "is 0; it must be from 1 to 65535");
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Node {
    #[serde(default)]
    pub(crate) metadata: Meta,
}

impl Node {
    /// Region and zone, empty where the node has no such label.
    pub(crate) fn locality(&self) -> (&str, &str) {
        let label = |name| self.metadata.labels.get(name).map_or("", String::as_str);
        (label("topology.kubernetes.io/region"), label("topology.kubernetes.io/zone"))
    }
}
