//! Resources as bytes: encoded once, when they change, however many agents there are.
//!
//! The same content must give the same bytes, since their hash is the version that agents hold across restarts of either
//! side. Map fields have no order of their own, so their entries are appended one by one, in the order of their keys:
//! protobuf reads joined messages as one.

use std::collections::BTreeMap;

use bytes::Bytes;
use mesh_common::api::{
    SERVICE_EXTENSION, SERVICE_EXTENSION_TYPE, WORKLOAD_EXTENSION, WORKLOAD_EXTENSION_TYPE,
    istio::security::{Authorization, Scope},
    istio::workload::{Extension, PortList, Service, Workload},
    mesh::v1::{ServiceExtension, WorkloadExtension},
};
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint},
};
use xxhash_rust::xxh3::xxh3_64;

use super::{
    Name,
    member::{Member, Members, port_list},
};

/// Field of a service in `Address`.
const ADDRESS_SERVICE: u32 = 2;
/// Field of a workload in `Address`.
const ADDRESS_WORKLOAD: u32 = 1;

/// What a resource is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    Service,
    Workload,
    /// A policy, which is of a type of its own.
    Policy,
}

/// Who a node may stand in for: a service account of which a workload is on the node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Placement {
    pub(crate) node: Box<str>,
    pub(crate) namespace: Box<str>,
    pub(crate) service_account: Box<str>,
}

/// A resource as it is served.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Resource {
    pub(crate) name: Name,
    pub(crate) body: Body,
    pub(crate) namespace: Box<str>,
    /// Hash of the content.
    pub(crate) version: u64,
    /// An encoded `Address` or `Authorization`.
    pub(crate) bytes: Bytes,
    /// Of a workload that is on a node and has an identity.
    pub(crate) placement: Option<Box<Placement>>,
    /// A policy that holds for workloads which do not name it.
    pub(crate) wide: bool,
}

/// Encodes a policy.
pub(super) fn policy(name: Name, policy: &Authorization) -> Resource {
    let bytes: Bytes = policy.encode_to_vec().into();
    Resource {
        name,
        body: Body::Policy,
        namespace: policy.namespace.as_str().into(),
        version: xxh3_64(&bytes),
        bytes,
        placement: None,
        wide: policy.scope() != Scope::WorkloadSelector,
    }
}

/// Encodes a service; an extension that says nothing is left out.
pub(super) fn service(name: Name, mut service: Service, extension: &ServiceExtension) -> Resource {
    if *extension != ServiceExtension::default() {
        let bytes = extension.encode_to_vec();
        service.extensions.push(as_extension(SERVICE_EXTENSION, SERVICE_EXTENSION_TYPE, bytes));
    }
    let bytes = address(ADDRESS_SERVICE, &service.encode_to_vec());
    Resource {
        name,
        body: Body::Service,
        namespace: service.namespace.into(),
        version: xxh3_64(&bytes),
        bytes,
        placement: None,
        wide: false,
    }
}

/// Encodes a workload with its services; `workload` and `extension` come without ports.
pub(super) fn workload(mut workload: Workload, extension: &WorkloadExtension, members: &Members) -> Resource {
    let mut bytes = extension.encode_to_vec();
    for (name, ports) in entries(members, |member| &member.udp).filter(|(_, list)| !list.ports.is_empty()) {
        let entry =
            WorkloadExtension { udp_services: [(name, ports)].into(), ..WorkloadExtension::default() };
        bytes.extend(entry.encode_to_vec());
    }
    if !bytes.is_empty() {
        workload.extensions.push(as_extension(WORKLOAD_EXTENSION, WORKLOAD_EXTENSION_TYPE, bytes));
    }
    let mut bytes = workload.encode_to_vec();
    for (name, ports) in entries(members, |member| &member.tcp) {
        let entry = Workload { services: [(name, ports)].into(), ..Workload::default() };
        bytes.extend(entry.encode_to_vec());
    }
    let bytes = address(ADDRESS_WORKLOAD, &bytes);
    Resource {
        name: workload.uid.into(),
        body: Body::Workload,
        namespace: workload.namespace.into(),
        version: xxh3_64(&bytes),
        bytes,
        placement: None,
        wide: false,
    }
}

fn entries(
    members: &Members,
    ports: fn(&Member) -> &BTreeMap<u16, u16>,
) -> impl Iterator<Item = (String, PortList)> {
    members.iter().map(move |(name, member)| (name.to_string(), PortList { ports: port_list(ports(member)) }))
}

fn as_extension(name: &str, type_url: &str, value: Vec<u8>) -> Extension {
    let config = prost_types::Any { type_url: type_url.to_owned(), value };
    Extension { name: name.to_owned(), config: Some(config) }
}

/// An `Address` around an encoded message.
fn address(field: u32, message: &[u8]) -> Bytes {
    let mut bytes = Vec::with_capacity(message.len() + 8);
    encode_key(field, WireType::LengthDelimited, &mut bytes);
    encode_varint(message.len() as u64, &mut bytes);
    bytes.extend_from_slice(message);
    bytes.into()
}

#[cfg(test)]
mod tests {
    use mesh_common::api::istio::workload::{Address, address::Type};

    use super::*;

    fn members() -> Members {
        let member =
            |port| Member { tcp: [(port, 8080)].into(), udp: [(port, 5353)].into(), ..Member::default() };
        (1..50).map(|i| (format!("ns/s{i}").into(), member(i))).collect()
    }

    #[test]
    fn joined_map_entries_read_as_one_map() {
        let plain = Workload { uid: "u".to_owned(), namespace: "ns".to_owned(), ..Workload::default() };
        let resource = workload(plain, &WorkloadExtension::default(), &members());
        let Some(Type::Workload(read)) = Address::decode(resource.bytes).unwrap().r#type else {
            panic!("a workload")
        };
        assert_eq!((read.uid.as_str(), read.services.len()), ("u", 49));
        assert_eq!(read.services["ns/s7"].ports[0].service_port, 7);
        let config = read.extensions[0].config.clone().unwrap();
        let extension = WorkloadExtension::decode(config.value.as_slice()).unwrap();
        assert_eq!(extension.udp_services.len(), 49);
    }

    #[test]
    fn equal_content_has_equal_bytes() {
        let encode = || workload(Workload::default(), &WorkloadExtension::default(), &members()).bytes;
        assert_eq!(encode(), encode());
    }
}
