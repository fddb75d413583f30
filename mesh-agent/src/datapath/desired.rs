//! What the kernel should hold for a service: pure, from the snapshot and where this node stands.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_common::abi::{self, Address, Endpoint, ServiceKey};
use mesh_common::serving::{Choice, Member, Place, Rule, choose};

use crate::snapshot::{Algorithm, Locality, Membership, Protocol, Service, ServicePort, Workload};

/// Where clients of this node stand.
#[derive(Debug, Clone)]
pub struct Vantage {
    /// Name of the node.
    pub node: Arc<str>,
    /// Its locality, as far as it is known.
    pub locality: Locality,
    /// Its cluster.
    pub cluster: Arc<str>,
    /// Its network; empty is the default one.
    pub network: Arc<str>,
}

/// One (address, port, protocol) and the backends of its connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frontend {
    /// What applications dial.
    pub key: ServiceKey,
    /// How a backend is chosen.
    pub algorithm: abi::Algorithm,
    /// Seconds that a client keeps its backend; 0: no affinity.
    pub affinity_seconds: u32,
    /// Backends, each endpoint once, in order of their endpoints; none: connections are refused.
    pub backends: Vec<Candidate>,
}

/// A backend that should serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Where to connect.
    pub endpoint: Endpoint,
    /// Share of the connections; never 0.
    pub weight: u32,
    /// Whose it is.
    pub workload: Arc<Workload>,
}

/// The frontends of `service`.
pub fn frontends<'a>(
    service: &Service,
    members: impl Iterator<Item = (&'a Arc<Workload>, &'a Membership)>,
    vantage: &Vantage,
) -> Vec<Frontend> {
    let serving = serving(service, members, vantage);
    let mut frontends = Vec::with_capacity(service.addresses.len() * service.ports.len());
    for address in service.addresses.iter() {
        for port in &service.ports {
            frontends.push(Frontend {
                key: key(*address, port),
                algorithm: algorithm(service.algorithm),
                affinity_seconds: service.affinity_seconds,
                backends: backends(*address, port, &serving),
            });
        }
    }
    frontends
}

/// The members that serve.
fn serving<'a>(
    service: &Service,
    members: impl Iterator<Item = (&'a Arc<Workload>, &'a Membership)>,
    vantage: &Vantage,
) -> Vec<(&'a Arc<Workload>, &'a Membership)> {
    let rule =
        Rule { preference: &service.preference, mode: service.mode, allow_unready: service.allow_unready };
    let locality = &vantage.locality;
    let ours = place(&vantage.node, locality, &vantage.cluster, &vantage.network);
    let members = members.map(|(workload, membership)| {
        let member = Member {
            place: place(&workload.node, &workload.locality, &workload.cluster, &workload.network),
            weight: workload.weight,
            ready: workload.healthy && !membership.unready,
            terminating: membership.terminating,
        };
        ((workload, membership), member)
    });
    let chosen = choose(&rule, &ours, members).into_iter();
    chosen.filter(|(_, choice)| *choice == Choice::Serves).map(|(member, _)| member).collect()
}

fn place<'a>(node: &'a str, locality: &'a Locality, cluster: &'a str, network: &'a str) -> Place<'a> {
    let Locality { region, zone, subzone } = locality;
    Place { node, region, zone, subzone, cluster, network }
}

fn backends(
    frontend: IpAddr,
    port: &ServicePort,
    serving: &[(&Arc<Workload>, &Membership)],
) -> Vec<Candidate> {
    let mut unique: BTreeMap<(Address, u16), Candidate> = BTreeMap::new();
    for (workload, membership) in serving {
        let Some(target) = target(port, membership) else { continue };
        for address in workload.addresses.iter().filter(|address| address.is_ipv4() == frontend.is_ipv4()) {
            let address = map_address(*address);
            unique.entry((address, target)).or_insert_with(|| Candidate {
                endpoint: Endpoint::new(address, target),
                weight: workload.weight,
                workload: Arc::clone(workload),
            });
        }
    }
    let mut backends: Vec<Candidate> = unique.into_values().collect();
    fit_weights(&mut backends);
    backends
}

/// The workload's own mapping of the port, else the service's; `None`: not served by this workload.
fn target(port: &ServicePort, membership: &Membership) -> Option<u16> {
    let own = membership.ports.iter().find(|own| own.port == port.port && own.protocol == port.protocol);
    own.map(|own| own.target).or(port.target)
}

/// Sums of weights are 32 bits wide in the kernel: huge weights keep their ratios as well as that allows.
fn fit_weights(backends: &mut [Candidate]) {
    const LIMIT: u64 = 1 << 31;
    let sum: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    if sum <= LIMIT {
        return;
    }
    for backend in backends {
        let scaled = u64::from(backend.weight) * (LIMIT / 2) / sum;
        backend.weight = u32::try_from(scaled).unwrap_or(u32::MAX).max(1);
    }
}

fn key(address: IpAddr, port: &ServicePort) -> ServiceKey {
    ServiceKey::new(
        map_address(address),
        port.port,
        match port.protocol {
            Protocol::Tcp => abi::Protocol::Tcp,
            Protocol::Udp => abi::Protocol::Udp,
        },
    )
}

/// As the maps hold it.
pub fn map_address(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(v4) => Address::from_v4(v4.octets()),
        IpAddr::V6(v6) => Address::new(v6.octets()),
    }
}

fn algorithm(algorithm: Algorithm) -> abi::Algorithm {
    match algorithm {
        Algorithm::WeightedRandom => abi::Algorithm::WeightedRandom,
        Algorithm::RoundRobin => abi::Algorithm::RoundRobin,
        Algorithm::LeastConnections => abi::Algorithm::LeastConnections,
        Algorithm::Maglev => abi::Algorithm::Maglev,
    }
}

#[cfg(test)]
#[path = "desired/tests.rs"]
mod tests;
