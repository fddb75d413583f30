//! The objects by name, who refers to whom, and what a change of one of them touches.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    Index, Origin, Owner, addresses,
    joined::Joined,
    selection::{Chooser, Selection},
};
use crate::{
    manifest::{
        AuthorizationPolicy, Endpoint, EndpointSlice, Kind, Node, NsName, Object, PeerAuthentication, Pod,
        Service, ServiceEntry, TrafficPolicy, WorkloadEntry,
    },
    store::Change,
};

#[derive(Default)]
pub(super) struct Inputs {
    pub(super) services: HashMap<NsName, Arc<Service>>,
    pub(super) slices: HashMap<NsName, Slice>,
    pub(super) pods: HashMap<NsName, Arc<Pod>>,
    pub(super) nodes: HashMap<Arc<str>, Arc<Node>>,
    pub(super) service_entries: HashMap<NsName, Arc<ServiceEntry>>,
    pub(super) workload_entries: HashMap<NsName, Arc<WorkloadEntry>>,
    pub(super) policies: HashMap<NsName, Arc<TrafficPolicy>>,
    pub(super) authorizations: HashMap<NsName, Arc<AuthorizationPolicy>>,
    pub(super) peers: HashMap<NsName, Arc<PeerAuthentication>>,
    /// The latter by namespace.
    pub(super) peers_in: HashMap<Arc<str>, BTreeSet<NsName>>,
    /// Namespaces whose workloads are not announced as meshed.
    pub(super) outside: HashSet<Arc<str>>,
    pub(super) joined: Joined,
    /// Slices by the service that they name.
    pub(super) slices_of: HashMap<NsName, BTreeSet<NsName>>,
    /// Endpoints that stand for a pod: position by slice.
    pub(super) endpoints_of: HashMap<NsName, BTreeMap<NsName, usize>>,
    /// Policies by the service that they target.
    pub(super) policies_of: HashMap<NsName, BTreeSet<NsName>>,
    /// Workloads by node, as far as they were computed.
    pub(super) placed: HashMap<Arc<str>, HashSet<Origin>>,
    pub(super) node_of: HashMap<Origin, Arc<str>>,
    pub(super) selection: Selection,
}

/// A slice, with its endpoints by address.
pub(super) struct Slice {
    pub(super) object: Arc<EndpointSlice>,
    points: HashMap<IpAddr, Vec<u32>>,
}

impl Slice {
    fn new(object: Arc<EndpointSlice>) -> Self {
        let mut points: HashMap<_, Vec<u32>> = HashMap::with_capacity(object.endpoints.len());
        for (i, endpoint) in (0..).zip(&object.endpoints) {
            if let Some(address) = endpoint.address() {
                points.entry(address).or_default().push(i);
            }
        }
        Self { object, points }
    }

    /// The endpoints at an address: several where pods share their node's.
    pub(super) fn at(&self, address: IpAddr) -> impl Iterator<Item = &Endpoint> {
        let points = self.points.get(&address).into_iter().flatten();
        points.filter_map(|i| self.object.endpoints.get(usize::try_from(*i).ok()?))
    }
}

fn by_address(slice: Option<&EndpointSlice>) -> HashMap<Option<IpAddr>, Vec<&Endpoint>> {
    let mut found: HashMap<_, Vec<&Endpoint>> = HashMap::new();
    for endpoint in slice.into_iter().flat_map(|slice| &slice.endpoints) {
        found.entry(endpoint.address()).or_default().push(endpoint);
    }
    found
}

/// Puts or removes, and tells what was there.
pub(super) fn swap<V>(table: &mut HashMap<NsName, V>, name: &NsName, value: Option<V>) -> Option<V> {
    match value {
        Some(value) => table.insert(name.clone(), value),
        None => table.remove(name),
    }
}

/// Adds or removes an element of the set under `key`; empty sets are dropped.
pub(super) fn link<K: Eq + std::hash::Hash, V: Ord>(
    table: &mut HashMap<K, BTreeSet<V>>,
    key: K,
    value: V,
    present: bool,
) {
    let set = table.entry(key);
    if present {
        set.or_default().insert(value);
    } else if let std::collections::hash_map::Entry::Occupied(mut set) = set {
        set.get_mut().remove(&value);
        if set.get().is_empty() {
            set.remove();
        }
    }
}

impl Index {
    /// Takes one change in and marks what it touches.
    pub(super) fn take(&mut self, change: Change) {
        let Some(object) = change.after.as_ref().or(change.before.as_ref()) else { return };
        let name = object.key().name;
        let gone = change.after.is_none();
        match object {
            Object::Pod(pod) => self.take_pod(name, (!gone).then_some(pod)),
            Object::EndpointSlice(slice) => self.take_slice(name, (!gone).then_some(slice)),
            Object::Service(service) => self.take_service(name, (!gone).then_some(service)),
            Object::ServiceEntry(entry) => self.take_service_entry(name, (!gone).then_some(entry)),
            Object::WorkloadEntry(entry) => self.take_workload_entry(name, (!gone).then_some(entry)),
            Object::TrafficPolicy(policy) => self.take_policy(name, (!gone).then_some(policy)),
            Object::Node(node) => self.take_node(name, (!gone).then_some(node)),
            Object::AuthorizationPolicy(policy) => self.take_authorization(name, (!gone).then_some(policy)),
            Object::PeerAuthentication(peers) => self.take_peers(name, (!gone).then_some(peers)),
            Object::Name(Kind::Namespace, meta) => {
                self.take_namespace(&name.name, (!gone).then_some(&**meta))
            }
            Object::Name(_, _) => {}
        }
    }

    fn take_pod(&mut self, name: NsName, pod: Option<&Arc<Pod>>) {
        let origin = Origin::Pod(name.clone());
        let labels = pod.map(|pod| pod.metadata.labels.clone());
        self.inputs.selection.set_labels(&origin, &name.namespace, labels);
        let before = swap(&mut self.inputs.pods, &name, pod.cloned());
        let claims = |pod: Option<&Arc<Pod>>| addresses::of_pod(&name, pod.map(Arc::as_ref));
        self.move_claims(claims(before.as_ref()), claims(pod));
        let addresses = |pod: Option<&Arc<Pod>>| pod.map(|pod| pod.addresses().collect::<Vec<_>>());
        if addresses(before.as_ref()) != addresses(pod) {
            // Endpoints that name a pod are workloads of their own unless their address is known to be the pod's.
            for (slice, at) in self.inputs.endpoints_of.get(&name).into_iter().flatten() {
                let endpoint = self.inputs.slices.get(slice).and_then(|s| s.object.endpoints.get(*at));
                if let Some(address) = endpoint.and_then(Endpoint::address) {
                    self.workloads.push(Origin::Slice(slice.clone(), address));
                }
            }
        }
        self.workloads.push(origin);
    }

    fn take_slice(&mut self, name: NsName, slice: Option<&Arc<EndpointSlice>>) {
        let before = swap(&mut self.inputs.slices, &name, slice.map(|slice| Slice::new(Arc::clone(slice))));
        let before = before.map(|slice| slice.object);
        let (was, is) = (before.as_deref(), slice.map(Arc::as_ref));
        let (old_service, service) =
            (was.and_then(EndpointSlice::service), is.and_then(EndpointSlice::service));
        let same_ports = was.map(|s| &s.ports) == is.map(|s| &s.ports);
        self.mark_endpoints(&name, was, is, !same_ports || old_service != service);
        if let Some(was) = was {
            for pod in was.endpoints.iter().filter_map(|e| was.pod(e)) {
                if let Some(slices) = self.inputs.endpoints_of.get_mut(&pod) {
                    slices.remove(&name);
                    if slices.is_empty() {
                        self.inputs.endpoints_of.remove(&pod);
                    }
                }
            }
        }
        if let Some(is) = is {
            for (i, pod) in is.endpoints.iter().enumerate().filter_map(|(i, e)| Some((i, is.pod(e)?))) {
                self.inputs.endpoints_of.entry(pod).or_default().entry(name.clone()).or_insert(i);
            }
        }
        // A slice without endpoints does not count among those that have the service's ports.
        let used = |slice: Option<&EndpointSlice>| slice.is_some_and(|slice| !slice.endpoints.is_empty());
        if same_ports && old_service == service && used(was) == used(is) {
            return;
        }
        for (service, present) in [(old_service, false), (service, true)] {
            let Some(service) = service else { continue };
            let had = self.inputs.slices_of.contains_key(&service);
            link(&mut self.inputs.slices_of, service.clone(), name.clone(), present);
            let owner = Owner::Service(service.clone());
            if had != self.inputs.slices_of.contains_key(&service) {
                // Slices replace the selection of pods.
                self.mark_chosen(&owner);
            }
            self.services.push(owner);
        }
    }

    /// Marks the workloads of the endpoints that differ between two contents of a slice.
    fn mark_endpoints(
        &mut self,
        name: &NsName,
        was: Option<&EndpointSlice>,
        is: Option<&EndpointSlice>,
        all: bool,
    ) {
        let (old, new) = (by_address(was), by_address(is));
        for (slice, mine, other) in [(was, &old, &new), (is, &new, &old)] {
            let Some(slice) = slice else { continue };
            for endpoint in &slice.endpoints {
                let address = endpoint.address();
                if all || mine.get(&address) != other.get(&address) {
                    self.workloads_of_endpoint(name, address, slice.pod(endpoint));
                }
            }
        }
    }

    fn workloads_of_endpoint(&mut self, slice: &NsName, address: Option<IpAddr>, pod: Option<NsName>) {
        if let Some(pod) = pod {
            self.workloads.push(Origin::Pod(pod));
        }
        if let Some(address) = address {
            self.workloads.push(Origin::Slice(slice.clone(), address));
        }
    }

    fn take_service(&mut self, name: NsName, service: Option<&Arc<Service>>) {
        let owner = Owner::Service(name.clone());
        let before = swap(&mut self.inputs.services, &name, service.cloned());
        let same_members = match (before.as_deref(), service) {
            (Some(before), Some(after)) => before.has_members_of(after),
            (Some(_) | None, Some(_) | None) => false,
        };
        if !same_members {
            self.mark_members(&owner);
            let nothing = BTreeMap::new();
            let selector = service.map_or(&nothing, |service| service.selector());
            self.inputs.selection.set_selector(&Chooser::Owner(owner.clone()), &name.namespace, selector);
            self.mark_chosen(&owner);
        }
        self.services.push(owner);
    }

    fn take_service_entry(&mut self, name: NsName, entry: Option<&Arc<ServiceEntry>>) {
        let owner = Owner::Entry(name.clone());
        self.mark_members(&owner);
        let nothing = BTreeMap::new();
        let selector = entry.and_then(|e| e.selector()).unwrap_or(&nothing);
        self.inputs.selection.set_selector(&Chooser::Owner(owner.clone()), &name.namespace, selector);
        let before = swap(&mut self.inputs.service_entries, &name, entry.cloned());
        let claims =
            |entry: Option<&Arc<ServiceEntry>>| addresses::of_service_entry(&name, entry.map(Arc::as_ref));
        self.move_claims(claims(before.as_ref()), claims(entry));
        self.mark_members(&owner);
        self.services.push(owner);
    }

    fn take_workload_entry(&mut self, name: NsName, entry: Option<&Arc<WorkloadEntry>>) {
        let origin = Origin::WorkloadEntry(name.clone());
        let labels = entry.map(|entry| entry.labels());
        self.inputs.selection.set_labels(&origin, &name.namespace, labels);
        let before = swap(&mut self.inputs.workload_entries, &name, entry.cloned());
        let claims =
            |entry: Option<&Arc<WorkloadEntry>>| addresses::of_workload_entry(&name, entry.map(Arc::as_ref));
        self.move_claims(claims(before.as_ref()), claims(entry));
        self.workloads.push(origin);
    }

    fn take_policy(&mut self, name: NsName, policy: Option<&Arc<TrafficPolicy>>) {
        let before = swap(&mut self.inputs.policies, &name, policy.cloned());
        for (policy, present) in [(before.as_ref(), false), (policy, true)] {
            for target in policy.into_iter().flat_map(|p| &p.spec.target_refs) {
                let service =
                    NsName { namespace: Arc::clone(&name.namespace), name: target.name.as_str().into() };
                link(&mut self.inputs.policies_of, service.clone(), name.clone(), present);
                self.services.push(Owner::Service(service));
            }
        }
    }

    fn take_node(&mut self, name: NsName, node: Option<&Arc<Node>>) {
        let before = match node {
            Some(node) => self.inputs.nodes.insert(Arc::clone(&name.name), Arc::clone(node)),
            None => self.inputs.nodes.remove(&name.name),
        };
        if before.as_deref().map(Node::locality) != node.map(|node| node.locality()) {
            self.mark_placed(&name.name);
        }
        self.note_node(&name.name, node.is_some());
    }

    /// Marks the workloads on a node.
    pub(super) fn mark_placed(&mut self, node: &str) {
        let placed = self.inputs.placed.get(node).into_iter().flatten();
        let mut placed: Vec<_> = placed.cloned().collect();
        placed.sort();
        placed.into_iter().for_each(|origin| self.workloads.push(origin));
    }

    /// Marks every workload that is, or may be, a member of the services of `owner`.
    pub(super) fn mark_members(&mut self, owner: &Owner) {
        self.mark_chosen(owner);
        match owner {
            Owner::Service(service) => {
                for slice in self.inputs.slices_of.get(service).cloned().into_iter().flatten() {
                    let Some(object) = self.inputs.slices.get(&slice).map(|s| Arc::clone(&s.object)) else {
                        continue;
                    };
                    for endpoint in &object.endpoints {
                        self.workloads_of_endpoint(&slice, endpoint.address(), object.pod(endpoint));
                    }
                }
            }
            Owner::Entry(name) => {
                let entry = self.inputs.service_entries.get(name);
                for address in entry.into_iter().flat_map(|e| &e.spec.endpoints).filter_map(|e| e.ip()) {
                    self.workloads.push(Origin::Inline(name.clone(), address));
                }
            }
        }
    }

    /// Marks the workloads that the selector of `owner` chooses.
    fn mark_chosen(&mut self, owner: &Owner) {
        self.inputs
            .selection
            .chosen(&Chooser::Owner(owner.clone()))
            .into_iter()
            .for_each(|origin| self.workloads.push(origin));
    }
}

impl Inputs {
    /// Remembers on which node a workload is, so that a change of the node finds it.
    pub(super) fn place(&mut self, origin: &Origin, node: &str) {
        if self.node_of.get(origin).map_or("", |node| node) == node {
            return;
        }
        if let Some(former) = self.node_of.remove(origin)
            && let Some(placed) = self.placed.get_mut(&former)
        {
            placed.remove(origin);
            if placed.is_empty() {
                self.placed.remove(&former);
            }
        }
        if !node.is_empty() {
            let node: Arc<str> = node.into();
            self.placed.entry(Arc::clone(&node)).or_default().insert(origin.clone());
            self.node_of.insert(origin.clone(), node);
        }
    }
}
