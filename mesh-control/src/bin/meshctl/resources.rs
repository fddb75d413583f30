//! Services and workloads, as served.

use std::net::IpAddr;

use mesh_common::api::{
    SERVICE_EXTENSION, WORKLOAD_EXTENSION,
    istio::workload::{
        AppProtocol, Extension, Port, Service, TunnelProtocol, Workload, WorkloadStatus, load_balancing,
    },
    mesh::v1::{Algorithm, ServiceExtension, WorkloadExtension},
};
use prost::Message;
use serde_json::json;

use crate::table::{Table, View};

pub(crate) fn services(services: &[Service]) -> anyhow::Result<View> {
    let mut table =
        Table::new(&["NAMESPACE", "NAME", "ADDRESSES", "PORTS", "ALGORITHM", "AFFINITY", "LOCALITY"]);
    let mut data = Vec::new();
    for service in services {
        let extension: ServiceExtension = extension(&service.extensions, SERVICE_EXTENSION)?;
        let addresses: Vec<_> =
            service.addresses.iter().map(|address| address_of(&address.address)).collect();
        let ports: Vec<_> = ports(service, &extension).collect();
        let algorithm = algorithm(extension.algorithm());
        let affinity = extension.affinity_timeout_seconds;
        let shown = ports.iter().map(|(port, protocol)| format!("{}/{protocol}", port.service_port));
        table.row([
            service.namespace.clone(),
            service.hostname.clone(),
            addresses.join(","),
            shown.collect::<Vec<_>>().join(","),
            algorithm.to_owned(),
            if affinity == 0 { String::new() } else { format!("{affinity}s") },
            locality_rule(service),
        ]);
        let ports = ports.iter().map(|(port, protocol)| {
            let target = (port.target_port != 0).then_some(port.target_port);
            let application = AppProtocol::try_from(port.app_protocol).unwrap_or_default();
            let application = (application != AppProtocol::Unknown).then(|| application.as_str_name());
            json!({"port": port.service_port, "protocol": protocol, "target_port": target, "application": application})
        });
        data.push(json!({
            "namespace": service.namespace,
            "name": service.name,
            "hostname": service.hostname,
            "addresses": addresses,
            "ports": ports.collect::<Vec<_>>(),
            "algorithm": algorithm,
            "affinity_seconds": affinity,
            "locality": locality_rule(service),
        }));
    }
    Ok(View { data: data.into(), tables: vec![table] })
}

pub(crate) fn workloads(workloads: &[Workload]) -> anyhow::Result<View> {
    let columns = ["NAMESPACE", "NAME", "ADDRESSES", "NODE", "ZONE", "ACCOUNT", "STATUS", "SERVICES"];
    let mut table = Table::new(&columns);
    let mut data = Vec::new();
    for workload in workloads {
        let extension: WorkloadExtension = extension(&workload.extensions, WORKLOAD_EXTENSION)?;
        let addresses: Vec<_> = workload.addresses.iter().map(|address| address_of(address)).collect();
        let zone = workload.locality.as_ref().map(|locality| locality.zone.clone()).unwrap_or_default();
        let status = if workload.status() == WorkloadStatus::Healthy { "healthy" } else { "unhealthy" };
        let mut services: Vec<_> = workload.services.keys().cloned().collect();
        services.sort();
        table.row([
            workload.namespace.clone(),
            workload.name.clone(),
            addresses.join(","),
            workload.node.clone(),
            zone.clone(),
            workload.service_account.clone(),
            status.to_owned(),
            services.len().to_string(),
        ]);
        data.push(json!({
            "uid": workload.uid,
            "namespace": workload.namespace,
            "name": workload.name,
            "addresses": addresses,
            "node": workload.node,
            "region": workload.locality.as_ref().map(|locality| locality.region.clone()).unwrap_or_default(),
            "zone": zone,
            "service_account": workload.service_account,
            "status": status,
            "weight": workload.capacity.unwrap_or(1),
            "pod_uid": extension.pod_uid,
            "cgroup": extension.cgroup,
            "meshed": workload.tunnel_protocol() == TunnelProtocol::Hbone,
            "policies": workload.authorization_policies,
            "services": services,
            "unready_in": extension.unready_in,
            "terminating_in": extension.terminating_in,
        }));
    }
    Ok(View { data: data.into(), tables: vec![table] })
}

/// TCP and UDP ports of a service.
pub(crate) fn ports<'a>(
    service: &'a Service,
    extension: &'a ServiceExtension,
) -> impl Iterator<Item = (&'a Port, &'static str)> {
    let tcp = service.ports.iter().map(|port| (port, "TCP"));
    tcp.chain(extension.udp_ports.iter().map(|port| (port, "UDP")))
}

/// The extension with this name; absent is empty.
pub(crate) fn extension<T: Message + Default>(extensions: &[Extension], name: &str) -> anyhow::Result<T> {
    let found = extensions.iter().find(|extension| extension.name == name);
    match found.and_then(|extension| extension.config.as_ref()) {
        Some(config) => Ok(T::decode(config.value.as_slice())?),
        None => Ok(T::default()),
    }
}

/// An address in network order, as text.
pub(crate) fn address_of(octets: &[u8]) -> String {
    if let Ok(v4) = <[u8; 4]>::try_from(octets) {
        IpAddr::from(v4).to_string()
    } else if let Ok(v6) = <[u8; 16]>::try_from(octets) {
        IpAddr::from(v6).to_string()
    } else {
        format!("{octets:02x?}")
    }
}

pub(crate) fn algorithm(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::WeightedRandom => "weighted-random",
        Algorithm::RoundRobin => "round-robin",
        Algorithm::LeastConnections => "least-connections",
        Algorithm::Maglev => "maglev",
    }
}

/// Where endpoints are looked for first, or only.
pub(crate) fn locality_rule(service: &Service) -> String {
    let Some(balancing) = &service.load_balancing else { return String::new() };
    let nearest = balancing.routing_preference().next_back();
    let nearest = nearest.map(|scope| scope.as_str_name().to_ascii_lowercase()).unwrap_or_default();
    match balancing.mode() {
        load_balancing::Mode::Strict => format!("only {nearest}"),
        load_balancing::Mode::Failover => format!("prefer {nearest}"),
        load_balancing::Mode::Passthrough => "as dialled".to_owned(),
        load_balancing::Mode::UnspecifiedMode => String::new(),
    }
}
