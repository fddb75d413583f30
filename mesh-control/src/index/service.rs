//! The service resources: of a Service one, of a ServiceEntry one for each host.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use mesh_common::api::{
    istio::workload::{self as api, AppProtocol, IpFamilies, LoadBalancing, load_balancing},
    mesh::v1::{Algorithm, ServiceExtension},
};

use super::{Delta, Index, Name, Owner, Problem, Vip, encode};
use crate::manifest::{
    Balancer, IpFamily, Key, Kind, NsName, Protocol, Resolution, Service, ServiceEntry, TargetPort,
    TrafficDistribution, TrafficPolicy,
};

/// A service before it is known which of its addresses it may use.
struct Draft {
    service: api::Service,
    extension: ServiceExtension,
    addresses: Vec<IpAddr>,
    ports: Vec<DraftPort>,
}

struct DraftPort {
    field: String,
    protocol: Protocol,
    number: u16,
    target: u16,
    app_protocol: AppProtocol,
}

impl Index {
    /// Computes the services of `owner` again.
    pub(super) fn refresh_service(&mut self, owner: &Owner, delta: &mut Delta) {
        let mut problems = Vec::new();
        let drafts = self.drafts(owner, &mut problems);
        let vips = |draft: &Draft| -> Vec<Vip> {
            let ports = |address: &IpAddr| -> Vec<Vip> {
                draft.ports.iter().map(|port| (*address, port.number, port.protocol)).collect()
            };
            draft.addresses.iter().flat_map(ports).collect()
        };
        let claims: BTreeMap<Name, Vec<Vip>> =
            drafts.iter().map(|(name, draft)| (Arc::clone(name), vips(draft))).collect();
        self.claim(owner, claims, delta);
        for (name, draft) in drafts {
            match self.names.holder(&name) {
                Some(holder) if holder != owner => {
                    let reason =
                        format!("{name} is already defined by {}, which stays in force", holder.key());
                    let field =
                        if holder.key().kind == Kind::Service { "spec.hosts" } else { "metadata.name" };
                    problems.push(Problem { key: owner.key(), field: field.to_owned(), reason });
                }
                Some(_) | None => {
                    let resource = self.finish(owner, Arc::clone(&name), draft, &mut problems);
                    self.publish(name, Some(resource), delta);
                }
            }
        }
        if problems.is_empty() {
            self.problems.remove(owner);
        } else {
            self.problems.insert(owner.clone(), problems);
        }
    }

    /// Replaces the names and addresses that `owner` claims, and marks whoever gains by what it gives up.
    fn claim(&mut self, owner: &Owner, claims: BTreeMap<Name, Vec<Vip>>, delta: &mut Delta) {
        let former = self.claimed.remove(owner).unwrap_or_default();
        let mut gained = Vec::new();
        let names_changed = !former.keys().eq(claims.keys());
        for (name, vips) in &former {
            let held = self.names.holder(name) == Some(owner);
            // Only who holds the name has claims to addresses under it.
            if held {
                let kept = claims.get(name).map(Vec::as_slice).unwrap_or_default();
                let lost = vips.iter().filter(|vip| !kept.contains(vip));
                gained.extend(lost.filter_map(|vip| self.vips.release(vip, name)));
            }
            if !claims.contains_key(name) {
                match self.names.release(name, owner) {
                    Some(heir) => {
                        self.mark_members(&heir);
                        self.services.push(heir);
                    }
                    None if held => self.publish(Arc::clone(name), None, delta),
                    None => {}
                }
            }
        }
        for (name, vips) in &claims {
            self.names.claim(Arc::clone(name), owner);
            if self.names.holder(name) == Some(owner) {
                vips.iter().for_each(|vip| self.vips.claim(*vip, name));
            }
        }
        for heir in gained {
            if let Some(owner) = self.names.holder(&heir) {
                self.services.push(owner.clone());
            }
        }
        if !claims.is_empty() {
            self.claimed.insert(owner.clone(), claims);
        }
        if names_changed {
            // Members name the service, so they come and go with it.
            self.mark_members(owner);
        }
    }

    fn drafts(&self, owner: &Owner, problems: &mut Vec<Problem>) -> Vec<(Name, Draft)> {
        match owner {
            Owner::Service(name) => {
                let service = self.inputs.services.get(name).filter(|service| !service.is_alias());
                service.map(|service| self.draft_service(name, service, problems)).into_iter().collect()
            }
            Owner::Entry(name) => {
                let entry = self.inputs.service_entries.get(name);
                entry.map(|entry| draft_entry(name, entry)).unwrap_or_default()
            }
        }
    }

    fn draft_service(&self, name: &NsName, object: &Service, problems: &mut Vec<Problem>) -> (Name, Draft) {
        let hostname = format!("{}.{}.svc.{}", name.name, name.namespace, self.mesh.cluster_domain);
        let addresses: Vec<_> = object.addresses().collect();
        let slices = self.inputs.slices_of.get(name);
        let ports = object.spec.ports.iter().enumerate().map(|(i, port)| {
            // A port that some slice does not serve is marked as named, so that each workload says whether it does.
            let unserved = slices.into_iter().flatten().filter_map(|slice| self.inputs.slices.get(slice));
            let unserved = unserved.filter(|slice| !slice.object.endpoints.is_empty());
            let mut unserved =
                unserved.filter(|slice| slice.object.port(&port.name, port.protocol).is_none());
            DraftPort {
                field: format!("spec.ports[{i}].port"),
                protocol: port.protocol,
                number: port.port,
                target: match port.target() {
                    TargetPort::Number(number) if unserved.next().is_none() => number,
                    TargetPort::Number(_) | TargetPort::Name(_) => 0,
                },
                app_protocol: app_protocol(port.app_protocol.as_deref().unwrap_or(&port.name)),
            }
        });
        let ports = ports.collect();
        let service = api::Service {
            name: name.name.to_string(),
            namespace: name.namespace.to_string(),
            load_balancing: load_balancing(object),
            ip_families: families(&object.spec.ip_families, &addresses).into(),
            canonical: true,
            hostname,
            ..api::Service::default()
        };
        let extension = ServiceExtension {
            algorithm: self.algorithm(name, problems).into(),
            affinity_timeout_seconds: object.affinity_seconds(),
            udp_ports: Vec::new(),
        };
        let resource = format!("{}/{}", name.namespace, service.hostname).into();
        (resource, Draft { service, extension, addresses, ports })
    }

    /// What the policies say; of several the oldest counts, then the first by name.
    fn algorithm(&self, service: &NsName, problems: &mut Vec<Problem>) -> Algorithm {
        let named = self.inputs.policies_of.get(service).into_iter().flatten();
        let mut policies: Vec<_> = named.filter_map(|name| self.inputs.policies.get(name)).collect();
        let age = |policy: &TrafficPolicy| policy.metadata.creation_timestamp.clone();
        policies.sort_by_key(|policy| (age(policy).is_none(), age(policy), policy.metadata.name.clone()));
        for loser in policies.iter().skip(1) {
            let target =
                loser.spec.target_refs.iter().position(|target| *target.name == *service.name).unwrap_or(0);
            problems.push(Problem {
                key: Key { kind: Kind::TrafficPolicy, name: loser.metadata.ns_name() },
                field: format!("spec.targetRefs[{target}]"),
                reason: format!(
                    "Service {service} already has TrafficPolicy {}, which stays in force",
                    policies[0].metadata.name
                ),
            });
        }
        match policies.first().and_then(|policy| policy.algorithm()).unwrap_or_default() {
            Balancer::WeightedRandom => Algorithm::WeightedRandom,
            Balancer::RoundRobin => Algorithm::RoundRobin,
            Balancer::LeastConnections => Algorithm::LeastConnections,
            Balancer::Maglev => Algorithm::Maglev,
        }
    }

    /// The resource, without the ports that another service holds at one of its addresses.
    fn finish(
        &self,
        owner: &Owner,
        name: Name,
        draft: Draft,
        problems: &mut Vec<Problem>,
    ) -> encode::Resource {
        let Draft { mut service, mut extension, addresses, ports } = draft;
        for port in ports {
            let other = addresses.iter().find_map(|address| {
                let holder = self.vips.holder(&(*address, port.number, port.protocol))?;
                (*holder != name).then_some((address, holder))
            });
            if let Some((address, holder)) = other {
                let reason = format!(
                    "{}/{} at {address} already belongs to {holder}; the port is left out",
                    port.number, port.protocol
                );
                problems.push(Problem { key: owner.key(), field: port.field, reason });
                continue;
            }
            let encoded = api::Port {
                service_port: u32::from(port.number),
                target_port: u32::from(port.target),
                app_protocol: port.app_protocol.into(),
            };
            match port.protocol {
                Protocol::Tcp => service.ports.push(encoded),
                Protocol::Udp => extension.udp_ports.push(encoded),
                Protocol::Sctp => {}
            }
        }
        service.addresses = addresses.iter().map(|address| network_address(*address)).collect();
        encode::service(name, service, &extension)
    }
}

fn draft_entry(name: &NsName, entry: &ServiceEntry) -> Vec<(Name, Draft)> {
    let addresses: Vec<_> = entry.addresses().collect();
    let draft = |host: &String| {
        let ports = entry.spec.ports.iter().enumerate().map(|(i, port)| DraftPort {
            field: format!("spec.ports[{i}].number"),
            protocol: port.transport(),
            number: port.number,
            target: port.target(),
            app_protocol: app_protocol(&port.protocol.to_ascii_lowercase()),
        });
        let passthrough =
            LoadBalancing { mode: load_balancing::Mode::Passthrough.into(), ..LoadBalancing::default() };
        let service = api::Service {
            name: name.name.to_string(),
            namespace: name.namespace.to_string(),
            hostname: host.clone(),
            subject_alt_names: entry.spec.subject_alt_names.clone(),
            load_balancing: (entry.spec.resolution == Resolution::None).then_some(passthrough),
            ip_families: families(&[], &addresses).into(),
            ..api::Service::default()
        };
        let draft = Draft {
            service,
            extension: ServiceExtension::default(),
            addresses: addresses.clone(),
            ports: ports.collect(),
        };
        (format!("{}/{host}", name.namespace).into(), draft)
    };
    entry.spec.hosts.iter().map(draft).collect()
}

fn network_address(address: IpAddr) -> api::NetworkAddress {
    api::NetworkAddress { network: String::new(), address: octets(address) }
}

/// An address in network order.
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// An address as it was written by [`octets`].
pub(super) fn address(octets: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from)).ok()
}

/// From a port's `appProtocol`, or its name (`http-admin`).
fn app_protocol(text: &str) -> AppProtocol {
    match text.split('-').next().unwrap_or("") {
        "http" => AppProtocol::Http11,
        "http2" => AppProtocol::Http2,
        "grpc" => AppProtocol::Grpc,
        _ if text == "kubernetes.io/h2c" => AppProtocol::Http2,
        _ => AppProtocol::Unknown,
    }
}

fn families(named: &[IpFamily], addresses: &[IpAddr]) -> IpFamilies {
    let has = |family, is: fn(&IpAddr) -> bool| named.contains(&family) || addresses.iter().any(is);
    match (has(IpFamily::V4, IpAddr::is_ipv4), has(IpFamily::V6, IpAddr::is_ipv6)) {
        (true, true) => IpFamilies::Dual,
        (true, false) => IpFamilies::Ipv4Only,
        (false, true) => IpFamilies::Ipv6Only,
        (false, false) => IpFamilies::Automatic,
    }
}

fn load_balancing(object: &Service) -> Option<LoadBalancing> {
    use load_balancing::{HealthPolicy, Mode, Scope};
    let (scopes, mode): (&[Scope], Mode) = match object.spec.traffic_distribution {
        _ if object.is_local() => (&[Scope::Node], Mode::Strict),
        Some(TrafficDistribution::SameZone) => {
            (&[Scope::Network, Scope::Region, Scope::Zone], Mode::Failover)
        }
        Some(TrafficDistribution::SameNode) => {
            (&[Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node], Mode::Failover)
        }
        None => (&[], Mode::UnspecifiedMode),
    };
    let health = if object.spec.publish_not_ready_addresses {
        HealthPolicy::AllowAll
    } else {
        HealthPolicy::OnlyHealthy
    };
    let balancing = LoadBalancing {
        routing_preference: scopes.iter().map(|scope| (*scope).into()).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    };
    (balancing != LoadBalancing::default()).then_some(balancing)
}
