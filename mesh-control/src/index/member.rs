//! Who serves which service, on which ports, in which state.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use mesh_common::api::istio::workload::Port;

use super::{Index, Name, Origin, Owner};
use crate::manifest::{
    Endpoint, EndpointSlice, NsName, Pod, Protocol, Service, ServiceEntry, ServicePort, TargetPort,
    WorkloadEntry, WorkloadSpec,
};

/// State of an endpoint in one service; the best of several counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum State {
    #[default]
    Unready,
    /// On its way out, but still serving: used when nothing better is left.
    Terminating,
    Ready,
}

/// A workload's part in one service.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Member {
    pub(super) state: State,
    /// Target by service port.
    pub(super) tcp: BTreeMap<u16, u16>,
    pub(super) udp: BTreeMap<u16, u16>,
}

impl Member {
    fn serve(&mut self, protocol: Protocol, port: u16, target: u16) {
        match protocol {
            Protocol::Tcp => self.tcp.insert(port, target),
            Protocol::Udp => self.udp.insert(port, target),
            Protocol::Sctp => None,
        };
    }

    /// Adds what another slice, of the other family say, knows of the same workload.
    fn merge(&mut self, other: Self) {
        self.state = self.state.max(other.state);
        self.tcp.extend(other.tcp);
        self.udp.extend(other.udp);
    }
}

/// A member's ports, as the workload API lists them.
pub(super) fn port_list(ports: &BTreeMap<u16, u16>) -> Vec<Port> {
    let port = |(service, target): (&u16, &u16)| Port {
        service_port: u32::from(*service),
        target_port: u32::from(*target),
        app_protocol: 0,
    };
    ports.iter().map(port).collect()
}

/// Services of one workload.
pub(super) type Members = BTreeMap<Name, Member>;

impl Index {
    /// The services of a pod: where a service has slices they decide, else its selector does.
    pub(super) fn members_of_pod(&self, name: &NsName, pod: &Pod) -> Members {
        let mut members = Members::new();
        for (slice, at) in self.inputs.endpoints_of.get(name).into_iter().flatten() {
            let Some(slice) = self.inputs.slices.get(slice) else { continue };
            let own = |endpoint: &&Endpoint| {
                endpoint.address().is_some_and(|own| pod.addresses().any(|a| a == own))
            };
            if let Some(endpoint) = slice.object.endpoints.get(*at).filter(own) {
                self.add_from_slice(&slice.object, endpoint, &mut members);
            }
        }
        for owner in self.inputs.selection.owners(&Origin::Pod(name.clone())) {
            match &owner {
                Owner::Service(service) if self.inputs.slices_of.contains_key(service) => {}
                Owner::Service(service) => {
                    let Some(service) = self.inputs.services.get(service) else { continue };
                    let member =
                        service_member(service, state_in(service, pod), |port| match port.target() {
                            TargetPort::Number(number) => Some(number),
                            TargetPort::Name(name) => pod.port(&name, port.protocol),
                        });
                    self.add(&owner, &member, &mut members);
                }
                Owner::Entry(entry) => {
                    let Some(entry) = self.inputs.service_entries.get(entry) else { continue };
                    self.add(&owner, &entry_member(entry, own_state(pod), None), &mut members);
                }
            }
        }
        members
    }

    /// The services that select a workload entry.
    pub(super) fn members_of_workload_entry(&self, name: &NsName, entry: &WorkloadEntry) -> Members {
        let mut members = Members::new();
        for owner in self.inputs.selection.owners(&Origin::WorkloadEntry(name.clone())) {
            let member = match &owner {
                Owner::Service(service) => {
                    let Some(service) = self.inputs.services.get(service) else { continue };
                    let ports = &entry.spec.ports;
                    service_member(service, State::Ready, |port| {
                        match (ports.get(&port.name), port.target()) {
                            (Some(own), _) => Some(*own),
                            (None, TargetPort::Number(number)) => Some(number),
                            (None, TargetPort::Name(name)) => ports.get(&name).copied(),
                        }
                    })
                }
                Owner::Entry(other) => {
                    let Some(other) = self.inputs.service_entries.get(other) else { continue };
                    entry_member(other, State::Ready, Some(&entry.spec))
                }
            };
            self.add(&owner, &member, &mut members);
        }
        members
    }

    /// The services of an inline endpoint: the hosts of its entry.
    pub(super) fn members_of_inline(
        &self,
        name: &NsName,
        entry: &ServiceEntry,
        endpoint: &WorkloadSpec,
    ) -> Members {
        let mut members = Members::new();
        let member = entry_member(entry, State::Ready, Some(endpoint));
        self.add(&Owner::Entry(name.clone()), &member, &mut members);
        members
    }

    /// A slice's endpoint and its service, when its address is not that of a known pod: a pod may serve on addresses that its
    /// status does not list.
    pub(super) fn members_of_endpoint(&self, name: &NsName, address: IpAddr) -> Option<(&Endpoint, Members)> {
        let slice = self.inputs.slices.get(name)?;
        let is_pod = |endpoint: &Endpoint| {
            let pod = slice.object.pod(endpoint).and_then(|pod| self.inputs.pods.get(&pod));
            pod.is_some_and(|pod| pod.addresses().any(|own| own == address))
        };
        let endpoint = slice.at(address).find(|endpoint| !is_pod(endpoint))?;
        let mut members = Members::new();
        self.add_from_slice(&slice.object, endpoint, &mut members);
        (!members.is_empty()).then_some((endpoint, members))
    }

    fn add_from_slice(&self, slice: &EndpointSlice, endpoint: &Endpoint, members: &mut Members) {
        let Some(name) = slice.service().filter(|_| !slice.is_unresolved()) else { return };
        let Some(service) = self.inputs.services.get(&name) else { return };
        let state = match endpoint.conditions {
            conditions if conditions.is_ready() => State::Ready,
            conditions if conditions.is_last_resort() => State::Terminating,
            _ => State::Unready,
        };
        let member = service_member(service, state, |port| slice.port(&port.name, port.protocol));
        self.add(&Owner::Service(name), &member, members);
    }

    /// Adds the member to every service name that the owner holds.
    fn add(&self, owner: &Owner, member: &Member, members: &mut Members) {
        for name in self.claimed.get(owner).into_iter().flat_map(BTreeMap::keys) {
            if self.names.holder(name) == Some(owner) {
                members.entry(Arc::clone(name)).or_default().merge(member.clone());
            }
        }
    }
}

fn service_member(service: &Service, state: State, target: impl Fn(&ServicePort) -> Option<u16>) -> Member {
    let mut member = Member { state, ..Member::default() };
    for port in &service.spec.ports {
        if let Some(target) = target(port) {
            member.serve(port.protocol, port.port, target);
        }
    }
    member
}

fn entry_member(entry: &ServiceEntry, state: State, endpoint: Option<&WorkloadSpec>) -> Member {
    let mut member = Member { state, ..Member::default() };
    for port in &entry.spec.ports {
        let own = endpoint.and_then(|endpoint| endpoint.ports.get(&port.name));
        member.serve(port.transport(), port.number, own.copied().unwrap_or(port.target()));
    }
    member
}

/// As the EndpointSlice controller would set the conditions.
fn state_in(service: &Service, pod: &Pod) -> State {
    if service.spec.publish_not_ready_addresses { State::Ready } else { own_state(pod) }
}

/// A pod's state without regard to any service.
pub(super) fn own_state(pod: &Pod) -> State {
    match (pod.is_ready(), pod.is_terminating()) {
        (true, false) => State::Ready,
        (true, true) => State::Terminating,
        (false, _) => State::Unready,
    }
}
