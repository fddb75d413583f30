//! ServiceEntry and WorkloadEntry of networking.istio.io: workloads on plain hosts, services outside Kubernetes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use serde::Deserialize;

use super::{
    Meta, Protocol,
    check::{Checks, is_host, is_label},
    service::is_usable,
    value::{Labels, nullable},
};

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct WorkloadEntry {
    #[serde(default)]
    pub(crate) metadata: Meta,
    #[serde(default)]
    pub(crate) spec: WorkloadSpec,
}

/// The spec of a WorkloadEntry, and an inline endpoint of a ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct WorkloadSpec {
    #[serde(deserialize_with = "nullable")]
    address: String,
    /// Port number by name of the service port.
    #[serde(deserialize_with = "nullable")]
    pub(crate) ports: BTreeMap<String, u16>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) labels: Labels,
    /// `region/zone/subzone`.
    #[serde(deserialize_with = "nullable")]
    pub(crate) locality: String,
    pub(crate) weight: Option<u32>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) service_account: String,
}

impl WorkloadSpec {
    /// The address; `None` only for what `check` refuses.
    pub(crate) fn ip(&self) -> Option<IpAddr> {
        self.address.parse().ok()
    }

    fn check(&self, at: &str, checks: &mut Checks) {
        let field = format!("{at}.address");
        match self.address.parse::<IpAddr>() {
            Ok(ip) => {
                checks.require(is_usable(ip), field, format!("{ip} cannot be the address of a workload"))
            }
            Err(_) if self.address.is_empty() => checks.refuse(field, "is missing"),
            Err(_) => checks.refuse(field, format!("{:?} is not an IP address", self.address)),
        }
        for (name, port) in &self.ports {
            checks.require(*port != 0, format!("{at}.ports.{name}"), "is 0; it must be from 1 to 65535");
        }
    }
}

/// Region, zone and subzone of `region/zone/subzone`.
pub(crate) fn locality(text: &str) -> (&str, &str, &str) {
    let mut parts = text.splitn(3, '/');
    (parts.next().unwrap_or(""), parts.next().unwrap_or(""), parts.next().unwrap_or(""))
}

impl WorkloadEntry {
    /// `metadata.labels` and `spec.labels`; the latter win.
    pub(crate) fn labels(&self) -> Labels {
        let mut labels = self.metadata.labels.clone();
        labels.extend(self.spec.labels.clone());
        labels
    }

    pub(crate) fn annotation(&self, name: &str) -> &str {
        self.metadata.annotations.get(name).map_or("", String::as_str)
    }

    pub(super) fn check(&mut self, checks: &mut Checks) {
        self.metadata.check(true, checks);
        self.spec.check("spec", checks);
        let cgroup = self.annotation("mesh.dev/cgroup");
        // A path that leaves the node's subtree would put another node's processes under this identity.
        let escapes = cgroup.split('/').any(|part| part == "..");
        checks.require(
            !escapes,
            "metadata.annotations[mesh.dev/cgroup]",
            format!("{cgroup:?} must not contain \"..\""),
        );
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct ServiceEntry {
    #[serde(default)]
    pub(crate) metadata: Meta,
    #[serde(default)]
    pub(crate) spec: ServiceEntrySpec,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ServiceEntrySpec {
    #[serde(deserialize_with = "nullable")]
    pub(crate) hosts: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    addresses: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) ports: Vec<EntryPort>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) resolution: Resolution,
    #[serde(deserialize_with = "nullable")]
    pub(crate) endpoints: Vec<WorkloadSpec>,
    pub(crate) workload_selector: Option<WorkloadSelector>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) subject_alt_names: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct EntryPort {
    #[serde(default)]
    pub(crate) number: u16,
    #[serde(default)]
    pub(crate) name: String,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) protocol: String,
    target_port: Option<u16>,
}

impl EntryPort {
    /// Transport under the application protocol that the manifest names.
    pub(crate) fn transport(&self) -> Protocol {
        if self.protocol.eq_ignore_ascii_case("UDP") { Protocol::Udp } else { Protocol::Tcp }
    }

    pub(crate) fn target(&self) -> u16 {
        self.target_port.filter(|p| *p != 0).unwrap_or(self.number)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum Resolution {
    /// The client's destination is final.
    #[default]
    None,
    Static,
    Dns,
    DnsRoundRobin,
    DynamicDns,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct WorkloadSelector {
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) labels: Labels,
}

impl ServiceEntry {
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.spec.addresses.iter().filter_map(|a| a.parse().ok())
    }

    /// Labels that choose pods and workload entries.
    pub(crate) fn selector(&self) -> Option<&Labels> {
        self.spec.workload_selector.as_ref().map(|s| &s.labels).filter(|l| !l.is_empty())
    }

    pub(super) fn check(&mut self, checks: &mut Checks) {
        self.metadata.check(true, checks);
        self.check_names(checks);
        self.check_ports(checks);
        let spec = &self.spec;
        match spec.resolution {
            Resolution::Static => {}
            Resolution::None => {
                checks.require(
                    spec.endpoints.is_empty(),
                    "spec.endpoints",
                    "must be empty with resolution NONE",
                );
            }
            Resolution::Dns | Resolution::DnsRoundRobin | Resolution::DynamicDns => {
                checks.refuse("spec.resolution", "DNS is not supported: use STATIC or NONE");
            }
        }
        if spec.workload_selector.is_some() && !spec.endpoints.is_empty() {
            checks.refuse("spec.workloadSelector", "cannot stand beside spec.endpoints");
        }
        let mut seen = BTreeSet::new();
        for (i, endpoint) in spec.endpoints.iter().enumerate() {
            endpoint.check(&format!("spec.endpoints[{i}]"), checks);
            if endpoint.ip().is_some_and(|ip| !seen.insert(ip)) {
                checks.refuse(
                    format!("spec.endpoints[{i}].address"),
                    format!("{} is listed twice", endpoint.address),
                );
            }
        }
    }

    fn check_names(&self, checks: &mut Checks) {
        checks.require(!self.spec.hosts.is_empty(), "spec.hosts", "is missing or empty");
        for (i, host) in self.spec.hosts.iter().enumerate() {
            let field = || format!("spec.hosts[{i}]");
            checks.require(is_host(host), field(), format!("{host:?} is not a host name in lower case"));
            if self.spec.hosts[..i].contains(host) {
                checks.refuse(field(), format!("{host:?} is listed twice"));
            }
        }
        for (i, address) in self.spec.addresses.iter().enumerate() {
            let field = format!("spec.addresses[{i}]");
            match address.parse::<IpAddr>() {
                Ok(ip) => {
                    checks.require(is_usable(ip), field, format!("{ip} cannot be the address of a service"))
                }
                Err(_) if address.contains('/') => {
                    checks.refuse(field, format!("{address:?}: address ranges are not supported"));
                }
                Err(_) => checks.refuse(field, format!("{address:?} is not an IP address")),
            }
        }
    }

    fn check_ports(&self, checks: &mut Checks) {
        let (mut numbers, mut names) = (BTreeSet::new(), BTreeSet::new());
        for (i, port) in self.spec.ports.iter().enumerate() {
            let field = |name: &str| format!("spec.ports[{i}].{name}");
            checks.require(port.number != 0, field("number"), "is missing or 0; it must be from 1 to 65535");
            if !numbers.insert((port.number, port.transport())) {
                checks
                    .refuse(field("number"), format!("{}/{} is listed twice", port.number, port.transport()));
            }
            checks.require(
                is_label(&port.name),
                field("name"),
                format!("{:?} is not a DNS label", port.name),
            );
            if !names.insert(port.name.as_str()) {
                checks.refuse(field("name"), format!("{:?} is used twice", port.name));
            }
            const KNOWN: [&str; 9] = ["", "TCP", "UDP", "HTTP", "HTTPS", "HTTP2", "GRPC", "TLS", "MONGO"];
            let known = KNOWN.iter().any(|known| port.protocol.eq_ignore_ascii_case(known));
            checks.require(known, field("protocol"), format!("{:?} is not a known protocol", port.protocol));
        }
    }
}
