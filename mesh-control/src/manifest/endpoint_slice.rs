//! EndpointSlice of discovery.k8s.io.

use std::{collections::BTreeSet, net::IpAddr};

use serde::Deserialize;

use super::{
    Meta, NsName, Protocol,
    check::Checks,
    service::{IpFamily, family, is_usable},
    value::nullable,
};

/// Names the service that a slice belongs to.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct EndpointSlice {
    #[serde(default)]
    pub(crate) metadata: Meta,
    address_type: Option<AddressType>,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) endpoints: Vec<Endpoint>,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) ports: Vec<EndpointPort>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum AddressType {
    IPv4,
    IPv6,
    /// Names, which nothing here resolves.
    #[serde(rename = "FQDN")]
    Fqdn,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Endpoint {
    #[serde(deserialize_with = "nullable")]
    addresses: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) conditions: Conditions,
    pub(crate) target_ref: Option<TargetRef>,
    pub(crate) node_name: Option<String>,
    pub(crate) zone: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

impl Conditions {
    /// Unknown counts as ready.
    pub(crate) fn is_ready(self) -> bool {
        self.ready.unwrap_or(true)
    }

    /// On its way out but still answering: better than nothing.
    pub(crate) fn is_last_resort(self) -> bool {
        !self.is_ready() && self.serving.unwrap_or(true) && self.terminating.unwrap_or(false)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct TargetRef {
    #[serde(default)]
    kind: String,
    namespace: Option<String>,
    #[serde(default)]
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct EndpointPort {
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) name: String,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) protocol: Protocol,
    /// Absent: any port, which says nothing that could be dialled.
    pub(crate) port: Option<u16>,
}

impl Endpoint {
    /// Consumers of slices use the first address only, by Kubernetes' rule.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        self.addresses.first().and_then(|a| a.parse().ok())
    }
}

impl EndpointSlice {
    /// The service that the slice belongs to.
    pub(crate) fn service(&self) -> Option<NsName> {
        let name = self.metadata.labels.get(SERVICE_LABEL)?;
        Some(NsName::new(&self.metadata.namespace, name))
    }

    /// The pod that an endpoint stands for.
    pub(crate) fn pod(&self, endpoint: &Endpoint) -> Option<NsName> {
        let target = endpoint.target_ref.as_ref().filter(|t| t.kind == "Pod" && !t.name.is_empty())?;
        let namespace = target.namespace.as_deref().filter(|ns| !ns.is_empty());
        Some(NsName::new(namespace.unwrap_or(&self.metadata.namespace), &target.name))
    }

    /// Number of the port with this name.
    pub(crate) fn port(&self, name: &str, protocol: Protocol) -> Option<u16> {
        self.ports.iter().find(|p| p.name == name && p.protocol == protocol)?.port
    }

    /// Endpoints are host names, which nothing here resolves.
    pub(crate) fn is_unresolved(&self) -> bool {
        self.address_type == Some(AddressType::Fqdn)
    }

    pub(super) fn check(&mut self, checks: &mut Checks) {
        self.metadata.check(true, checks);
        if !self.metadata.labels.contains_key(SERVICE_LABEL) {
            checks
                .note(format!("metadata.labels[{SERVICE_LABEL}]"), "is missing: the slice serves no service");
        }
        match self.address_type {
            None => checks.refuse("addressType", "is missing; it is IPv4, IPv6 or FQDN"),
            Some(AddressType::Fqdn) => {
                checks.note("addressType", "FQDN endpoints are not resolved: they are left out")
            }
            Some(AddressType::IPv4) => self.check_endpoints(IpFamily::V4, checks),
            Some(AddressType::IPv6) => self.check_endpoints(IpFamily::V6, checks),
        }
        let mut names = BTreeSet::new();
        for (i, port) in self.ports.iter().enumerate() {
            let zero = port.port == Some(0);
            checks.require(!zero, format!("ports[{i}].port"), "is 0; it must be from 1 to 65535");
            if !names.insert((port.name.as_str(), port.protocol)) {
                checks.refuse(format!("ports[{i}].name"), format!("{:?} is used twice", port.name));
            }
        }
    }

    fn check_endpoints(&self, wanted: IpFamily, checks: &mut Checks) {
        let mut pods = BTreeSet::new();
        for (i, endpoint) in self.endpoints.iter().enumerate() {
            if self.pod(endpoint).is_some_and(|pod| !pods.insert(pod)) {
                checks.refuse(
                    format!("endpoints[{i}].targetRef"),
                    "names a pod that an earlier endpoint names",
                );
            }
            let Some(address) = endpoint.addresses.first() else {
                checks.refuse(format!("endpoints[{i}].addresses"), "is empty");
                continue;
            };
            let field = || format!("endpoints[{i}].addresses[0]");
            match address.parse::<IpAddr>() {
                Err(_) => checks.refuse(field(), format!("{address:?} is not an IP address")),
                Ok(ip) if family(ip) != wanted => {
                    checks.refuse(field(), format!("{ip} is not of the slice's addressType"));
                }
                Ok(ip) => {
                    checks.require(
                        is_usable(ip),
                        field(),
                        format!("{ip} cannot be the address of an endpoint"),
                    );
                }
            }
        }
    }
}
