//! From the model back to the wire, for the copy on disk. What the model does not keep is not written either.

use std::net::IpAddr;

use mesh_common::api::envoy::service::discovery::v3 as xds;
use mesh_common::api::istio::workload as wire;
use mesh_common::api::istio::workload::load_balancing as wire_lb;
use mesh_common::api::mesh::v1 as ext;
use mesh_common::api::{
    ADDRESS_TYPE, SERVICE_EXTENSION, SERVICE_EXTENSION_TYPE, WORKLOAD_EXTENSION, WORKLOAD_EXTENSION_TYPE,
};
use prost::Message;

use super::model::{
    Algorithm, Controller, Membership, Mode, Protocol, Resource, Scope, Service, Version, Workload,
};

/// The message that decodes to `resource`.
pub(super) fn encode(resource: &Resource, version: &Version) -> xds::Resource {
    let address = match resource {
        Resource::Service(of) => wire::address::Type::Service(service(of)),
        Resource::Workload(of) => wire::address::Type::Workload(workload(of)),
    };
    let address = wire::Address { r#type: Some(address) };
    xds::Resource {
        version: version.to_string(),
        resource: Some(any(ADDRESS_TYPE, &address)),
        name: resource.name(),
        aliases: Vec::new(),
    }
}

fn service(of: &Service) -> wire::Service {
    let port = |port: u16, target: Option<u16>| wire::Port {
        service_port: port.into(),
        target_port: target.map_or(0, u32::from),
        app_protocol: 0,
    };
    let of_protocol = |wanted: Protocol| {
        of.ports.iter().filter(move |p| p.protocol == wanted).map(|p| port(p.port, p.target)).collect()
    };
    let extension = ext::ServiceExtension {
        algorithm: algorithm(of.algorithm).into(),
        affinity_timeout_seconds: of.affinity_seconds,
        udp_ports: of_protocol(Protocol::Udp),
    };
    let load_balancing = wire::LoadBalancing {
        routing_preference: of.preference.iter().map(|s| scope(*s).into()).collect(),
        mode: match of.mode {
            Mode::Any => wire_lb::Mode::UnspecifiedMode,
            Mode::Strict => wire_lb::Mode::Strict,
            Mode::Failover => wire_lb::Mode::Failover,
        }
        .into(),
        health_policy: if of.allow_unready {
            wire_lb::HealthPolicy::AllowAll
        } else {
            wire_lb::HealthPolicy::OnlyHealthy
        }
        .into(),
    };
    let (namespace, hostname) = of.key.split_once('/').unwrap_or_default();
    wire::Service {
        namespace: namespace.to_owned(),
        hostname: hostname.to_owned(),
        addresses: of
            .addresses
            .iter()
            .map(|a| wire::NetworkAddress { network: String::new(), address: bytes(*a) })
            .collect(),
        ports: of_protocol(Protocol::Tcp),
        load_balancing: Some(load_balancing),
        extensions: vec![wire::Extension {
            name: SERVICE_EXTENSION.to_owned(),
            config: Some(any(SERVICE_EXTENSION_TYPE, &extension)),
        }],
        ..wire::Service::default()
    }
}

fn workload(of: &Workload) -> wire::Workload {
    let list = |m: &Membership, wanted: Protocol| wire::PortList {
        ports: m
            .ports
            .iter()
            .filter(|p| p.protocol == wanted)
            .map(|p| wire::Port {
                service_port: p.port.into(),
                target_port: p.target.into(),
                app_protocol: 0,
            })
            .collect(),
    };
    let named = |wanted: fn(&Membership) -> bool| {
        of.memberships().iter().filter(|m| wanted(m)).map(|m| m.service.to_string()).collect()
    };
    let has_udp = |m: &&Membership| m.ports.iter().any(|p| p.protocol == Protocol::Udp);
    let extension = ext::WorkloadExtension {
        pod_uid: of.pod_uid.as_deref().unwrap_or_default().to_owned(),
        cgroup: of.cgroup.as_deref().unwrap_or_default().to_owned(),
        unready_in: named(|m| m.unready),
        terminating_in: named(|m| m.terminating),
        udp_services: of
            .memberships()
            .iter()
            .filter(has_udp)
            .map(|m| (m.service.to_string(), list(m, Protocol::Udp)))
            .collect(),
        outbound_meshed: of.outbound_meshed && !of.meshed,
        outdone: of.outdone,
    };
    let app = of.app.as_deref().cloned().unwrap_or_default();
    wire::Workload {
        uid: of.uid(),
        workload_name: app.name.to_string(),
        workload_type: controller(app.controller).into(),
        canonical_name: app.service.to_string(),
        canonical_revision: app.version.to_string(),
        namespace: of.account().namespace.to_string(),
        service_account: of.account().service_account.to_string(),
        trust_domain: of.account().trust_domain.to_string(),
        addresses: of.addresses.iter().map(|a| bytes(*a)).collect(),
        network: of.network.to_string(),
        authorization_policies: of.policies().iter().map(|name| name.to_string()).collect(),
        node: of.node.to_string(),
        cluster_id: of.cluster.to_string(),
        locality: Some(wire::Locality {
            region: of.locality.region.to_string(),
            zone: of.locality.zone.to_string(),
            subzone: of.locality.subzone.to_string(),
        }),
        tunnel_protocol: if of.meshed { wire::TunnelProtocol::Hbone } else { wire::TunnelProtocol::None }
            .into(),
        status: if of.healthy { wire::WorkloadStatus::Healthy } else { wire::WorkloadStatus::Unhealthy }
            .into(),
        network_mode: if of.host_network {
            wire::NetworkMode::HostNetwork
        } else {
            wire::NetworkMode::Standard
        }
        .into(),
        capacity: Some(of.weight),
        services: of.memberships().iter().map(|m| (m.service.to_string(), list(m, Protocol::Tcp))).collect(),
        extensions: vec![wire::Extension {
            name: WORKLOAD_EXTENSION.to_owned(),
            config: Some(any(WORKLOAD_EXTENSION_TYPE, &extension)),
        }],
        ..wire::Workload::default()
    }
}

fn controller(controller: Controller) -> wire::WorkloadType {
    match controller {
        Controller::Deployment => wire::WorkloadType::Deployment,
        Controller::CronJob => wire::WorkloadType::Cronjob,
        Controller::Job => wire::WorkloadType::Job,
        Controller::Pod => wire::WorkloadType::Pod,
    }
}

fn any(type_url: &str, message: &impl Message) -> prost_types::Any {
    prost_types::Any { type_url: type_url.to_owned(), value: message.encode_to_vec() }
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn scope(scope: Scope) -> wire_lb::Scope {
    match scope {
        Scope::Region => wire_lb::Scope::Region,
        Scope::Zone => wire_lb::Scope::Zone,
        Scope::Subzone => wire_lb::Scope::Subzone,
        Scope::Node => wire_lb::Scope::Node,
        Scope::Cluster => wire_lb::Scope::Cluster,
        Scope::Network => wire_lb::Scope::Network,
    }
}

fn algorithm(algorithm: Algorithm) -> ext::Algorithm {
    match algorithm {
        Algorithm::WeightedRandom => ext::Algorithm::WeightedRandom,
        Algorithm::RoundRobin => ext::Algorithm::RoundRobin,
        Algorithm::LeastConnections => ext::Algorithm::LeastConnections,
        Algorithm::Maglev => ext::Algorithm::Maglev,
    }
}
