//! Resources for tests, made the way the wire makes them.

use std::net::IpAddr;

use mesh_common::api::envoy::service::discovery::v3 as xds;
use mesh_common::api::istio::security;
use mesh_common::api::istio::workload as wire;
use mesh_common::api::mesh::v1 as ext;
use mesh_common::api::{
    ADDRESS_TYPE, AUTHORIZATION_TYPE, SERVICE_EXTENSION, SERVICE_EXTENSION_TYPE, WORKLOAD_EXTENSION,
    WORKLOAD_EXTENSION_TYPE,
};
use prost::Message;

use super::{Delta, Interner, Resource, Versioned, decode_one};

/// A service `NS/HOSTNAME` with TCP ports (port, target).
pub fn service(key: &str, addresses: &[&str], ports: &[(u32, u32)]) -> wire::Service {
    let (namespace, hostname) = key.split_once('/').unwrap();
    wire::Service {
        name: hostname.split('.').next().unwrap().to_owned(),
        namespace: namespace.to_owned(),
        hostname: hostname.to_owned(),
        addresses: addresses
            .iter()
            .map(|a| wire::NetworkAddress { network: String::new(), address: octets(a) })
            .collect(),
        ports: self::ports(ports),
        ..wire::Service::default()
    }
}

/// A pod on `node` in `services`, which say its ports.
pub fn workload(uid: &str, address: &str, node: &str, services: &[&str]) -> wire::Workload {
    wire::Workload {
        uid: uid.to_owned(),
        name: uid.rsplit('/').next().unwrap().to_owned(),
        namespace: uid.split('/').nth(3).unwrap_or("default").to_owned(),
        addresses: vec![octets(address)],
        node: node.to_owned(),
        services: services.iter().map(|s| ((*s).to_owned(), wire::PortList::default())).collect(),
        ..wire::Workload::default()
    }
}

/// Ports (service port, target port).
pub fn ports(list: &[(u32, u32)]) -> Vec<wire::Port> {
    list.iter()
        .map(|&(service_port, target_port)| wire::Port { service_port, target_port, app_protocol: 0 })
        .collect()
}

/// Sets our extension of a service.
pub fn extend_service(mut service: wire::Service, extension: &ext::ServiceExtension) -> wire::Service {
    service.extensions = vec![self::extension(SERVICE_EXTENSION, SERVICE_EXTENSION_TYPE, extension)];
    service
}

/// Sets our extension of a workload.
pub fn extend_workload(mut workload: wire::Workload, extension: &ext::WorkloadExtension) -> wire::Workload {
    workload.extensions = vec![self::extension(WORKLOAD_EXTENSION, WORKLOAD_EXTENSION_TYPE, extension)];
    workload
}

/// As a resource on the wire, named and versioned.
pub fn of_service(service: wire::Service, version: &str) -> xds::Resource {
    let name = format!("{}/{}", service.namespace, service.hostname);
    resource(&name, version, wire::address::Type::Service(service))
}

/// As a resource on the wire, named and versioned.
pub fn of_workload(workload: wire::Workload, version: &str) -> xds::Resource {
    let name = workload.uid.clone();
    resource(&name, version, wire::address::Type::Workload(workload))
}

/// A policy `NS/NAME` of a scope: ALLOW, without rules.
pub fn policy(name: &str, scope: security::Scope) -> security::Authorization {
    let (namespace, name) = name.split_once('/').unwrap();
    security::Authorization {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        scope: scope.into(),
        ..security::Authorization::default()
    }
}

/// As a resource on the wire, named and versioned.
pub fn of_policy(policy: security::Authorization, version: &str) -> xds::Resource {
    xds::Resource {
        name: format!("{}/{}", policy.namespace, policy.name),
        version: version.to_owned(),
        resource: Some(prost_types::Any {
            type_url: AUTHORIZATION_TYPE.to_owned(),
            value: policy.encode_to_vec(),
        }),
        aliases: Vec::new(),
    }
}

/// A resource of any name and content.
pub fn resource(name: &str, version: &str, content: wire::address::Type) -> xds::Resource {
    let value = wire::Address { r#type: Some(content) }.encode_to_vec();
    xds::Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        resource: Some(prost_types::Any { type_url: ADDRESS_TYPE.to_owned(), value }),
        aliases: Vec::new(),
    }
}

/// Decoded; panics when refused.
pub fn parsed(resource: &xds::Resource) -> Versioned {
    decode_one(resource.clone(), &mut Interner::new("node-a")).unwrap()
}

/// Decoded workload; panics when refused.
pub fn parsed_workload(workload: wire::Workload) -> std::sync::Arc<super::Workload> {
    match parsed(&of_workload(workload, "1")).resource {
        Resource::Workload(workload) => workload,
        Resource::Service(_) => panic!("a service"),
    }
}

/// A delta that updates these.
pub fn update(resources: &[xds::Resource]) -> Delta {
    Delta { updated: resources.iter().map(parsed).collect(), removed: Vec::new() }
}

/// A delta that removes these.
pub fn removal(names: &[&str]) -> Delta {
    Delta { updated: Vec::new(), removed: names.iter().map(|n| (*n).to_owned()).collect() }
}

fn extension(name: &str, type_url: &str, message: &impl Message) -> wire::Extension {
    let config = prost_types::Any { type_url: type_url.to_owned(), value: message.encode_to_vec() };
    wire::Extension { name: name.to_owned(), config: Some(config) }
}

fn octets(address: &str) -> Vec<u8> {
    match address.parse().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}
