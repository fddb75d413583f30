//! From the wire into the model. A resource is taken whole or refused with the field that is wrong.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_common::api::envoy::service::discovery::v3 as xds;
use mesh_common::api::istio::workload as wire;
use mesh_common::api::istio::workload::load_balancing as wire_lb;
use mesh_common::api::mesh::v1 as ext;
use mesh_common::api::{
    ADDRESS_TYPE, SERVICE_EXTENSION, SERVICE_EXTENSION_TYPE, WORKLOAD_EXTENSION, WORKLOAD_EXTENSION_TYPE,
};
use prost::Message;

use super::intern::Interner;
use super::model::{
    Account, Algorithm, App, Controller, Kin, Locality, Membership, Mode, Place, PortMapping, Protocol,
    Rejected, Resource, Scope, Service, ServicePort, Versioned, Workload, split_uid,
};

/// Longest name of a resource, service or node: bounds what a faulty control plane can make the agent keep.
const NAME_LIMIT: usize = 1024;

/// Decodes the resources of one response: those that are good, and why the others are not.
///
/// When a name comes twice in a response, the last one counts.
pub fn decode(
    resources: impl IntoIterator<Item = xds::Resource>,
    interner: &mut Interner,
) -> (Vec<Versioned>, Vec<Rejected>) {
    let mut good = Vec::new();
    let mut bad = Vec::new();
    for resource in resources {
        match decode_one(resource, interner) {
            Ok(versioned) => good.push(versioned),
            Err(rejected) => bad.push(rejected),
        }
    }
    (good, bad)
}

/// Decodes one resource, or says what is wrong with it.
pub fn decode_one(resource: xds::Resource, interner: &mut Interner) -> Result<Versioned, Rejected> {
    match content(&resource, interner) {
        Ok(decoded) => Ok(Versioned {
            name: resource.name,
            version: resource.version.as_str().into(),
            resource: decoded,
        }),
        Err(reason) => Err(Rejected { name: printable(&resource.name), reason }),
    }
}

fn content(resource: &xds::Resource, interner: &mut Interner) -> Result<Resource, String> {
    let any = resource.resource.as_ref().ok_or("resource: missing")?;
    if any.type_url != ADDRESS_TYPE {
        return Err(format!("resource.type_url: {:?}, wanted {ADDRESS_TYPE}", printable(&any.type_url)));
    }
    let address =
        wire::Address::decode(any.value.as_slice()).map_err(|error| format!("resource.value: {error}"))?;
    let (name, decoded) = match address.r#type.ok_or("type: neither a workload nor a service")? {
        wire::address::Type::Service(message) => {
            let service = service(message, interner)?;
            (service.key.to_string(), Resource::Service(Arc::new(service)))
        }
        wire::address::Type::Workload(message) => {
            let workload = workload(message, interner)?;
            (workload.uid(), Resource::Workload(Arc::new(workload)))
        }
    };
    if name != resource.name {
        return Err(format!("name: the resource is {:?} by its content", printable(&name)));
    }
    Ok(decoded)
}

fn service(message: wire::Service, interner: &mut Interner) -> Result<Service, String> {
    let hostname = required("service.hostname", &message.hostname)?;
    let namespace = required("service.namespace", &message.namespace)?;
    if namespace.contains('/') {
        return Err("service.namespace: holds a slash".to_owned());
    }
    let extension: ext::ServiceExtension =
        extension(&message.extensions, SERVICE_EXTENSION, SERVICE_EXTENSION_TYPE)?.unwrap_or_default();
    let balancing = message.load_balancing.unwrap_or_default();
    let mode = wire_lb::Mode::try_from(balancing.mode)
        .map_err(|_unknown| format!("service.load_balancing.mode: unknown value {}", balancing.mode))?;
    let health = wire_lb::HealthPolicy::try_from(balancing.health_policy).map_err(|_unknown| {
        format!("service.load_balancing.health_policy: unknown value {}", balancing.health_policy)
    })?;
    let preference =
        balancing.routing_preference.iter().map(|&value| scope(value)).collect::<Result<_, _>>()?;
    let mut addresses = Vec::with_capacity(message.addresses.len());
    for (at, entry) in message.addresses.iter().enumerate() {
        addresses.push(address(&format!("service.addresses[{at}]"), &entry.address)?);
    }
    if matches!(mode, wire_lb::Mode::Passthrough) {
        // "Leave it to the network": with no address, the kernel has nothing to translate.
        addresses.clear();
    }
    let mut ports = Vec::with_capacity(message.ports.len() + extension.udp_ports.len());
    service_ports("service.ports", Protocol::Tcp, &message.ports, &mut ports)?;
    service_ports("mesh.dev/service.udp_ports", Protocol::Udp, &extension.udp_ports, &mut ports)?;
    Ok(Service {
        key: interner.string(&format!("{namespace}/{hostname}")),
        addresses: addresses.into(),
        ports: ports.into(),
        algorithm: algorithm(extension.algorithm)?,
        affinity_seconds: extension.affinity_timeout_seconds,
        preference,
        mode: match mode {
            wire_lb::Mode::UnspecifiedMode | wire_lb::Mode::Passthrough => Mode::Any,
            wire_lb::Mode::Strict => Mode::Strict,
            wire_lb::Mode::Failover => Mode::Failover,
        },
        allow_unready: matches!(health, wire_lb::HealthPolicy::AllowAll),
    })
}

fn service_ports(
    field: &str,
    protocol: Protocol,
    list: &[wire::Port],
    ports: &mut Vec<ServicePort>,
) -> Result<(), String> {
    for (at, entry) in list.iter().enumerate() {
        let port = port(&format!("{field}[{at}].service_port"), entry.service_port)?;
        let target = match entry.target_port {
            0 => None,
            number => Some(self::port(&format!("{field}[{at}].target_port"), number)?),
        };
        if ports.iter().any(|p| p.port == port && p.protocol == protocol) {
            return Err(format!("{field}[{at}].service_port: {port}/{protocol} is there twice"));
        }
        ports.push(ServicePort { port, protocol, target });
    }
    Ok(())
}

fn workload(message: wire::Workload, interner: &mut Interner) -> Result<Workload, String> {
    let uid = required("workload.uid", &message.uid)?;
    limited("workload.namespace", &message.namespace)?;
    limited("workload.service_account", &message.service_account)?;
    limited("workload.trust_domain", &message.trust_domain)?;
    limited("workload.node", &message.node)?;
    limited("workload.network", &message.network)?;
    limited("workload.cluster_id", &message.cluster_id)?;
    let status = wire::WorkloadStatus::try_from(message.status)
        .map_err(|_unknown| format!("workload.status: unknown value {}", message.status))?;
    let network_mode = wire::NetworkMode::try_from(message.network_mode)
        .map_err(|_unknown| format!("workload.network_mode: unknown value {}", message.network_mode))?;
    // To take an unknown way for none would send in the clear what is meant to be protected.
    let tunnel = wire::TunnelProtocol::try_from(message.tunnel_protocol)
        .map_err(|_unknown| format!("workload.tunnel_protocol: unknown value {}", message.tunnel_protocol))?;
    let extension: ext::WorkloadExtension =
        extension(&message.extensions, WORKLOAD_EXTENSION, WORKLOAD_EXTENSION_TYPE)?.unwrap_or_default();
    let mut addresses = Vec::with_capacity(message.addresses.len());
    for (at, bytes) in message.addresses.iter().enumerate() {
        addresses.push(address(&format!("workload.addresses[{at}]"), bytes)?);
    }
    let memberships = memberships(&message.services, &extension, interner)?;
    // Names of cgroups on other nodes tell nothing here and would be the largest part of most workloads.
    let local = message.node.is_empty() || *message.node == *interner.node();
    let kept = |field: &str, text: &str| -> Result<Option<Box<str>>, String> {
        let text = limited(field, text)?;
        Ok((local && !text.is_empty()).then(|| text.into()))
    };
    let (pod_uid, cgroup) = (
        kept("mesh.dev/workload.pod_uid", &extension.pod_uid)?,
        kept("mesh.dev/workload.cgroup", &extension.cgroup)?,
    );
    let found_here = pod_uid.is_some() || cgroup.is_some();
    let app = if found_here { app(&message, interner)? } else { None };
    let locality = message.locality.unwrap_or_default();
    let locality = Locality {
        region: interner.string(limited("workload.locality.region", &locality.region)?),
        zone: interner.string(limited("workload.locality.zone", &locality.zone)?),
        subzone: interner.string(limited("workload.locality.subzone", &locality.subzone)?),
    };
    let host_network = matches!(network_mode, wire::NetworkMode::HostNetwork);
    let meshed = matches!(tunnel, wire::TunnelProtocol::Hbone) && !host_network;
    let place = Place {
        node: interner.string(&message.node),
        locality: interner.locality(locality),
        network: interner.string(&message.network),
        cluster: interner.string(&message.cluster_id),
        host_network,
        meshed,
        outdone: extension.outdone,
        outbound_meshed: meshed || (extension.outbound_meshed && !host_network),
        healthy: matches!(status, wire::WorkloadStatus::Healthy),
        weight: message.capacity.unwrap_or(1),
        pod_uid,
        cgroup,
        app,
    };
    let (prefix, name) = split_uid(uid);
    let account = Account {
        prefix: interner.string(prefix),
        namespace: interner.string(&message.namespace),
        service_account: interner.string(&message.service_account),
        trust_domain: interner.string(&message.trust_domain),
    };
    let kin = Kin {
        account: interner.account(account),
        memberships: memberships.into(),
        policies: policies(&message.authorization_policies, interner)?,
    };
    Ok(Workload {
        name: name.into(),
        addresses: addresses.into(),
        kin: interner.kin(kin),
        place: interner.place(place),
    })
}

/// What it is an instance of; none where nothing is told.
fn app(message: &wire::Workload, interner: &mut Interner) -> Result<Option<Arc<App>>, String> {
    let texts = [
        limited("workload.workload_name", &message.workload_name)?,
        limited("workload.canonical_name", &message.canonical_name)?,
        limited("workload.canonical_revision", &message.canonical_revision)?,
    ];
    if texts.iter().all(|text| text.is_empty()) {
        return Ok(None);
    }
    let controller = match wire::WorkloadType::try_from(message.workload_type) {
        Ok(wire::WorkloadType::Deployment) => Controller::Deployment,
        Ok(wire::WorkloadType::Cronjob) => Controller::CronJob,
        Ok(wire::WorkloadType::Job) => Controller::Job,
        // What is not known is no reason to refuse a workload: this is for telemetry alone.
        Ok(wire::WorkloadType::Pod) | Err(_) => Controller::Pod,
    };
    let [name, service, version] = texts.map(|text| interner.string(text));
    Ok(Some(interner.app(App { controller, name, service, version })))
}

fn memberships(
    tcp: &std::collections::HashMap<String, wire::PortList>,
    extension: &ext::WorkloadExtension,
    interner: &mut Interner,
) -> Result<Vec<Membership>, String> {
    let mut ports: BTreeMap<&str, Vec<PortMapping>> = BTreeMap::new();
    for (service, list) in tcp {
        let field = format!("workload.services[{service:?}]");
        mappings(&field, service, Protocol::Tcp, &list.ports, &mut ports)?;
    }
    for (service, list) in &extension.udp_services {
        let field = format!("mesh.dev/workload.udp_services[{service:?}]");
        mappings(&field, service, Protocol::Udp, &list.ports, &mut ports)?;
    }
    for (field, names) in
        [("unready_in", &extension.unready_in), ("terminating_in", &extension.terminating_in)]
    {
        if let Some(stranger) = names.iter().find(|name| !ports.contains_key(name.as_str())) {
            return Err(format!(
                "mesh.dev/workload.{field}: {:?} is not one of its services",
                printable(stranger)
            ));
        }
    }
    let members = ports.into_iter().map(|(service, mut ports)| {
        ports.sort_unstable();
        Membership {
            service: interner.string(service),
            ports: ports.into(),
            unready: extension.unready_in.iter().any(|name| name == service),
            terminating: extension.terminating_in.iter().any(|name| name == service),
        }
    });
    Ok(members.collect())
}

fn policies(names: &[String], interner: &mut Interner) -> Result<Box<[Arc<str>]>, String> {
    let mut policies = Vec::with_capacity(names.len());
    for (at, name) in names.iter().enumerate() {
        policies.push(interner.string(required(&format!("workload.authorization_policies[{at}]"), name)?));
    }
    policies.sort_unstable();
    policies.dedup();
    Ok(policies.into())
}

fn mappings<'a>(
    field: &str,
    service: &'a str,
    protocol: Protocol,
    list: &[wire::Port],
    ports: &mut BTreeMap<&'a str, Vec<PortMapping>>,
) -> Result<(), String> {
    let field = printable(field);
    required(&field, service)?;
    let known = ports.entry(service).or_default();
    for (at, entry) in list.iter().enumerate() {
        let port = port(&format!("{field}[{at}].service_port"), entry.service_port)?;
        let target = self::port(&format!("{field}[{at}].target_port"), entry.target_port)?;
        if known.iter().any(|p| p.port == port && p.protocol == protocol) {
            return Err(format!("{field}[{at}].service_port: {port}/{protocol} is there twice"));
        }
        known.push(PortMapping { port, protocol, target });
    }
    Ok(())
}

fn extension<M: Message + Default>(
    list: &[wire::Extension],
    name: &str,
    type_url: &str,
) -> Result<Option<M>, String> {
    let Some(found) = list.iter().find(|extension| extension.name == name) else { return Ok(None) };
    let config = found.config.as_ref().ok_or_else(|| format!("extensions[{name}].config: missing"))?;
    if config.type_url != type_url {
        let url = printable(&config.type_url);
        return Err(format!("extensions[{name}].config.type_url: {url:?}, wanted {type_url}"));
    }
    M::decode(config.value.as_slice())
        .map(Some)
        .map_err(|error| format!("extensions[{name}].config.value: {error}"))
}

fn scope(value: i32) -> Result<Scope, String> {
    let unknown = || format!("service.load_balancing.routing_preference: unknown value {value}");
    match wire_lb::Scope::try_from(value).map_err(|_unknown| unknown())? {
        wire_lb::Scope::UnspecifiedScope => Err(unknown()),
        wire_lb::Scope::Region => Ok(Scope::Region),
        wire_lb::Scope::Zone => Ok(Scope::Zone),
        wire_lb::Scope::Subzone => Ok(Scope::Subzone),
        wire_lb::Scope::Node => Ok(Scope::Node),
        wire_lb::Scope::Cluster => Ok(Scope::Cluster),
        wire_lb::Scope::Network => Ok(Scope::Network),
    }
}

fn algorithm(value: i32) -> Result<Algorithm, String> {
    let unknown = |_error| format!("mesh.dev/service.algorithm: unknown value {value}");
    Ok(match ext::Algorithm::try_from(value).map_err(unknown)? {
        ext::Algorithm::WeightedRandom => Algorithm::WeightedRandom,
        ext::Algorithm::RoundRobin => Algorithm::RoundRobin,
        ext::Algorithm::LeastConnections => Algorithm::LeastConnections,
        ext::Algorithm::Maglev => Algorithm::Maglev,
    })
}

fn port(field: &str, value: u32) -> Result<u16, String> {
    match u16::try_from(value) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("{field}: {value} is not a port (1 to 65535)")),
    }
}

fn address(field: &str, bytes: &[u8]) -> Result<IpAddr, String> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        // An IPv4 address mapped into IPv6 is that IPv4 address: the kernel maps know it in that form only.
        return Ok(IpAddr::from(v6).to_canonical());
    }
    Err(format!("{field}: {} bytes are no address (4 or 16)", bytes.len()))
}

fn required<'a>(field: &str, text: &'a str) -> Result<&'a str, String> {
    if text.is_empty() { Err(format!("{field}: missing")) } else { limited(field, text) }
}

fn limited<'a>(field: &str, text: &'a str) -> Result<&'a str, String> {
    if text.len() > NAME_LIMIT {
        return Err(format!("{field}: {} bytes long, the limit is {NAME_LIMIT}", text.len()));
    }
    if text.chars().any(char::is_control) {
        return Err(format!("{field}: holds control characters"));
    }
    Ok(text)
}

/// A name from outside as it may appear in a log or in a NACK: bounded, and without control characters.
pub(super) fn printable(text: &str) -> String {
    let mut short: String =
        text.chars().take(200).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(200).is_some() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests;
