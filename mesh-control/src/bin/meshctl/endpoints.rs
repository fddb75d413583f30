//! Services joined with the workloads that serve them.

use std::collections::HashMap;

use mesh_common::api::{
    SERVICE_EXTENSION, WORKLOAD_EXTENSION,
    istio::workload::{Port, Service, Workload, WorkloadStatus},
    mesh::v1::{ServiceExtension, WorkloadExtension},
};
use serde_json::json;

use crate::{
    resources::{address_of, extension, ports},
    table::{Table, View},
};

pub(crate) fn endpoints(services: &[Service], workloads: &[Workload]) -> anyhow::Result<View> {
    let mut members: HashMap<&str, Vec<(&Workload, WorkloadExtension)>> = HashMap::new();
    for workload in workloads {
        let own: WorkloadExtension = extension(&workload.extensions, WORKLOAD_EXTENSION)?;
        for service in workload.services.keys() {
            members.entry(service).or_default().push((workload, own.clone()));
        }
    }
    let mut table = Table::new(&["SERVICE", "PORT", "ENDPOINT", "STATE", "WEIGHT", "NODE", "WORKLOAD"]);
    let mut data = Vec::new();
    for service in services {
        let name = format!("{}/{}", service.namespace, service.hostname);
        let own: ServiceExtension = extension(&service.extensions, SERVICE_EXTENSION)?;
        for (port, protocol) in ports(service, &own) {
            for (workload, extension) in members.get(name.as_str()).into_iter().flatten() {
                let udp = protocol == "UDP";
                let Some(target) = target(port, workload, extension, &name, udp) else { continue };
                let state = state(workload, extension, &name);
                let weight = workload.capacity.unwrap_or(1);
                for address in workload.addresses.iter().map(|address| address_of(address)) {
                    let endpoint = if address.contains(':') {
                        format!("[{address}]:{target}")
                    } else {
                        format!("{address}:{target}")
                    };
                    table.row([
                        name.clone(),
                        format!("{}/{protocol}", port.service_port),
                        endpoint,
                        state.to_owned(),
                        weight.to_string(),
                        workload.node.clone(),
                        workload.uid.clone(),
                    ]);
                    data.push(json!({
                        "service": name, "port": port.service_port, "protocol": protocol, "address": address,
                        "target_port": target, "state": state, "weight": weight, "node": workload.node,
                        "workload": workload.uid,
                    }));
                }
            }
        }
    }
    Ok(View { data: data.into(), tables: vec![table] })
}

/// The port that the workload serves it on: its own entry, else the service's number.
fn target(
    port: &Port,
    workload: &Workload,
    extension: &WorkloadExtension,
    service: &str,
    udp: bool,
) -> Option<u32> {
    let lists = if udp { &extension.udp_services } else { &workload.services };
    let own = lists
        .get(service)
        .and_then(|list| list.ports.iter().find(|own| own.service_port == port.service_port));
    own.map(|own| own.target_port).or((port.target_port != 0).then_some(port.target_port))
}

fn state(workload: &Workload, extension: &WorkloadExtension, service: &str) -> &'static str {
    let listed = |names: &[String]| names.iter().any(|name| name == service);
    if listed(&extension.terminating_in) {
        "terminating"
    } else if listed(&extension.unready_in) || workload.status() == WorkloadStatus::Unhealthy {
        "unready"
    } else {
        "ready"
    }
}
