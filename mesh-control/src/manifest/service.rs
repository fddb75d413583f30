//! Service of the core group.

use std::{collections::BTreeSet, net::IpAddr};

use serde::Deserialize;

use super::{
    Meta, Protocol, TargetPort,
    check::{Checks, is_label},
    value::{Labels, nullable},
};

/// Seconds that `sessionAffinity: ClientIP` lasts unless the manifest says so.
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;
/// Kubernetes' limit: one day.
const MAX_AFFINITY_SECONDS: u32 = 86_400;

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Service {
    #[serde(default)]
    pub(crate) metadata: Meta,
    #[serde(default)]
    pub(crate) spec: ServiceSpec,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ServiceSpec {
    #[serde(rename = "type", deserialize_with = "nullable")]
    kind: ServiceType,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs", deserialize_with = "nullable")]
    cluster_ips: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) ip_families: Vec<IpFamily>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) ports: Vec<ServicePort>,
    #[serde(deserialize_with = "nullable")]
    selector: Labels,
    #[serde(deserialize_with = "nullable")]
    session_affinity: SessionAffinity,
    session_affinity_config: Option<AffinityConfig>,
    #[serde(deserialize_with = "nullable")]
    internal_traffic_policy: InternalTrafficPolicy,
    pub(crate) traffic_distribution: Option<TrafficDistribution>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) publish_not_ready_addresses: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
enum ServiceType {
    #[default]
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalName,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) enum IpFamily {
    #[serde(rename = "IPv4")]
    V4,
    #[serde(rename = "IPv6")]
    V6,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServicePort {
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) port: u16,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) protocol: Protocol,
    target_port: Option<TargetPort>,
    pub(crate) app_protocol: Option<String>,
}

impl ServicePort {
    /// The target, which is the port itself when the manifest names none.
    pub(crate) fn target(&self) -> TargetPort {
        self.target_port.clone().unwrap_or(TargetPort::Number(self.port))
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
enum SessionAffinity {
    #[default]
    None,
    #[serde(rename = "ClientIP")]
    ClientIp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct AffinityConfig {
    #[serde(rename = "clientIP")]
    client_ip: Option<ClientIpConfig>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ClientIpConfig {
    timeout_seconds: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
enum InternalTrafficPolicy {
    #[default]
    Cluster,
    Local,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) enum TrafficDistribution {
    /// The older name of `PreferSameZone`.
    #[serde(rename = "PreferSameZone", alias = "PreferClose")]
    SameZone,
    #[serde(rename = "PreferSameNode")]
    SameNode,
}

impl Service {
    /// The virtual addresses; empty when headless.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.spec.listed_ips().filter_map(|ip| ip.parse().ok())
    }

    /// Seconds that a client keeps its backend; 0 is no affinity.
    pub(crate) fn affinity_seconds(&self) -> u32 {
        match self.spec.session_affinity {
            SessionAffinity::None => 0,
            SessionAffinity::ClientIp => self.spec.affinity_timeout().unwrap_or(DEFAULT_AFFINITY_SECONDS),
        }
    }

    /// Only endpoints of the client's own node may be used.
    pub(crate) fn is_local(&self) -> bool {
        self.spec.internal_traffic_policy == InternalTrafficPolicy::Local
    }

    /// Labels of the pods that serve; nothing for a mere alias.
    pub(crate) fn selector(&self) -> &Labels {
        static NOTHING: Labels = Labels::new();
        if self.is_alias() { &NOTHING } else { &self.spec.selector }
    }

    /// An ExternalName is a DNS alias: nothing to balance.
    pub(crate) fn is_alias(&self) -> bool {
        self.spec.kind == ServiceType::ExternalName
    }

    /// All that decides who serves this service, on which ports and in which state, is the same in `other`.
    pub(crate) fn has_members_of(&self, other: &Self) -> bool {
        let (a, b) = (&self.spec, &other.spec);
        self.is_alias() == other.is_alias()
            && a.ports == b.ports
            && a.selector == b.selector
            && a.publish_not_ready_addresses == b.publish_not_ready_addresses
    }

    pub(super) fn check(&mut self, checks: &mut Checks) {
        self.metadata.check(true, checks);
        let name = &self.metadata.name;
        checks.require(
            name.is_empty() || is_label(name),
            "metadata.name",
            format!("{name:?} is not a DNS label"),
        );
        if self.is_alias() {
            return;
        }
        self.spec.check_addresses(checks);
        self.spec.check_ports(checks);
        if let Some(seconds) = self.spec.affinity_timeout() {
            checks.require(
                (1..=MAX_AFFINITY_SECONDS).contains(&seconds),
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                format!("{seconds} is not between 1 and {MAX_AFFINITY_SECONDS}"),
            );
        }
    }
}

impl ServiceSpec {
    /// `clusterIPs`, or `clusterIP` alone, as older manifests have it.
    fn listed_ips(&self) -> impl Iterator<Item = &str> {
        let single = if self.cluster_ips.is_empty() { self.cluster_ip.as_deref() } else { None };
        self.cluster_ips.iter().map(String::as_str).chain(single).filter(|ip| !ip.is_empty())
    }

    fn affinity_timeout(&self) -> Option<u32> {
        self.session_affinity_config?.client_ip?.timeout_seconds
    }

    fn check_addresses(&self, checks: &mut Checks) {
        let field = |i: usize| {
            if self.cluster_ips.is_empty() {
                "spec.clusterIP".to_owned()
            } else {
                format!("spec.clusterIPs[{i}]")
            }
        };
        let mut families = Vec::new();
        for (i, ip) in self.listed_ips().enumerate() {
            match ip.parse::<IpAddr>() {
                Ok(ip) if is_usable(ip) => families.push(family(ip)),
                Ok(ip) => checks.refuse(field(i), format!("{ip} cannot be the address of a service")),
                Err(_) if ip == "None" => {}
                Err(_) => checks.refuse(field(i), format!("{ip:?} is not an IP address")),
            }
        }
        match (&self.cluster_ip, self.cluster_ips.first()) {
            (Some(one), Some(first)) if !one.is_empty() && one != first => {
                checks
                    .refuse("spec.clusterIPs[0]", format!("{first:?} differs from spec.clusterIP, {one:?}"));
            }
            (Some(_) | None, Some(_) | None) => {}
        }
        if self.listed_ips().count() > 1 && self.listed_ips().any(|ip| ip == "None") {
            checks.refuse("spec.clusterIPs", "\"None\" stands alone");
        }
        if families.len() > 2 || (families.len() == 2 && families[0] == families[1]) {
            checks.refuse("spec.clusterIPs", "holds more than one address of a family");
        }
        if !families.is_empty() && !self.ip_families.is_empty() && self.ip_families != families {
            checks.refuse("spec.ipFamilies", "does not match the families of spec.clusterIPs");
        }
        if self.listed_ips().next().is_none() {
            checks.note(
                "spec.clusterIP",
                "is missing: the service has no address, since none is allocated for manifests",
            );
        }
    }

    fn check_ports(&self, checks: &mut Checks) {
        let (mut numbers, mut names) = (BTreeSet::new(), BTreeSet::new());
        for (i, port) in self.ports.iter().enumerate() {
            let field = |name: &str| format!("spec.ports[{i}].{name}");
            checks.require(port.port != 0, field("port"), "is missing or 0; it must be from 1 to 65535");
            if !numbers.insert((port.port, port.protocol)) {
                checks.refuse(field("port"), format!("{}/{} is listed twice", port.port, port.protocol));
            }
            if !port.name.is_empty() {
                checks.require(
                    is_label(&port.name),
                    field("name"),
                    format!("{:?} is not a DNS label", port.name),
                );
            } else if self.ports.len() > 1 {
                checks.refuse(field("name"), "is missing: with several ports each needs a name");
            }
            if !port.name.is_empty() && !names.insert(port.name.as_str()) {
                checks.refuse(field("name"), format!("{:?} is used twice", port.name));
            }
            if port.protocol == Protocol::Sctp {
                checks.note(field("protocol"), "SCTP is not balanced: the port is left out");
            }
        }
    }
}

pub(super) fn family(ip: IpAddr) -> IpFamily {
    if ip.is_ipv4() { IpFamily::V4 } else { IpFamily::V6 }
}

/// A service or endpoint at these addresses would capture what is not its own.
pub(super) fn is_usable(ip: IpAddr) -> bool {
    !ip.is_unspecified() && !ip.is_multicast()
}
