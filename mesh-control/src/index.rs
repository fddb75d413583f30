//! From objects to the resources that agents are served. Pure, and incremental: a change marks what it touches, and only
//! that is computed again.

mod addresses;
mod authorization;
mod claims;
mod encode;
mod inputs;
mod joined;
mod member;
mod peers;
mod queue;
mod selection;
mod service;
mod workload;

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

pub(crate) use encode::{Body, Placement, Resource};
use inputs::Inputs;
pub(crate) use joined::Joined;

use self::{addresses::Addresses, claims::Claims, queue::Queue};
use crate::{
    manifest::{Key, Kind, NsName, Protocol},
    store::Change,
};

/// A resource name: `NS/HOSTNAME` of a service, the uid of a workload.
pub(crate) type Name = Arc<str>;

/// What the whole mesh has in common.
#[derive(Clone, Debug)]
pub(crate) struct Mesh {
    pub(crate) cluster_id: String,
    pub(crate) cluster_domain: String,
    pub(crate) trust_domain: String,
    /// Policies in it hold for the whole mesh.
    pub(crate) root_namespace: String,
}

/// The object that a service comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Owner {
    Service(NsName),
    /// Each of its hosts is a service.
    Entry(NsName),
}

impl Owner {
    fn key(&self) -> Key {
        match self {
            Self::Service(name) => Key { kind: Kind::Service, name: name.clone() },
            Self::Entry(name) => Key { kind: Kind::ServiceEntry, name: name.clone() },
        }
    }
}

/// The object, or the part of one, that a workload comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Origin {
    Pod(NsName),
    WorkloadEntry(NsName),
    /// An inline endpoint of a ServiceEntry.
    Inline(NsName, IpAddr),
    /// An endpoint of a slice whose pod is not known.
    Slice(NsName, IpAddr),
}

/// An object that is valid by itself, but at odds with another one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Problem {
    pub(crate) key: Key,
    pub(crate) field: String,
    pub(crate) reason: String,
}

/// What agents must be told: resources that are new or different, and names that are gone (`None`).
pub(crate) type Delta = BTreeMap<Name, Option<Resource>>;

/// What a push tells: policies have names of their own.
#[derive(Debug, Default)]
pub(crate) struct Update {
    pub(crate) addresses: Delta,
    pub(crate) policies: Delta,
}

impl Update {
    /// Number of changes.
    pub(crate) fn len(&self) -> usize {
        self.addresses.len() + self.policies.len()
    }
}

/// The object that a policy on the wire comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Policy {
    Authorization(NsName),
    /// The modes of single ports.
    Peers(NsName),
    /// What workloads without plaintext name.
    Strict,
}

/// An address that can have only one service.
type Vip = (IpAddr, u16, Protocol);

/// Everything that is computed, and what it is computed from.
pub(crate) struct Index {
    mesh: Mesh,
    inputs: Inputs,
    services: Queue<Owner>,
    workloads: Queue<Origin>,
    policies: Queue<Policy>,
    /// Who may use a service name.
    names: Claims<Name, Owner>,
    /// Which service may use an address.
    vips: Claims<Vip, Name>,
    /// Which workload has an address.
    addresses: Addresses,
    /// Names that an owner claims, each with the addresses that it claims.
    claimed: HashMap<Owner, BTreeMap<Name, Vec<Vip>>>,
    problems: BTreeMap<Owner, Vec<Problem>>,
    /// What is in force: versions of all services and workloads.
    versions: Versions,
    /// And those of all policies.
    policy_versions: Versions,
}

type Versions = HashMap<Name, u64>;

impl Index {
    pub(crate) fn new(mesh: Mesh) -> Self {
        Self {
            mesh,
            inputs: Inputs::default(),
            services: Queue::default(),
            workloads: Queue::default(),
            policies: Queue::default(),
            names: Claims::default(),
            vips: Claims::default(),
            addresses: Addresses::default(),
            claimed: HashMap::new(),
            problems: BTreeMap::new(),
            versions: Versions::new(),
            policy_versions: Versions::new(),
        }
    }

    /// Takes changes in, and returns what they change for agents.
    pub(crate) fn apply(&mut self, changes: Vec<Change>) -> Update {
        for change in changes {
            self.take(change);
        }
        let (mut delta, mut policies) = (Delta::new(), Delta::new());
        while let Some(policy) = self.policies.pop() {
            let (name, resource) = self.policy(&policy);
            publish(&mut self.policy_versions, name, resource, &mut policies);
        }
        // Services first: a workload names only services that hold their name, and a service that gains or loses its
        // name marks its workloads.
        while let Some(owner) = self.services.pop() {
            self.refresh_service(&owner, &mut delta);
        }
        while let Some(origin) = self.workloads.pop() {
            self.refresh_workload(&origin, &mut delta);
        }
        Update { addresses: delta, policies }
    }

    /// The policy on the wire, as its object now says.
    fn policy(&self, policy: &Policy) -> (Name, Option<Resource>) {
        let (name, content) = match policy {
            Policy::Authorization(name) => (name.to_string(), self.authorization(name)),
            Policy::Peers(name) => (peers::converted(name), self.port_policy(name)),
            Policy::Strict => (self.strict_name(), self.strict_policy()),
        };
        let name: Name = name.into();
        (Arc::clone(&name), content.map(|content| encode::policy(name, &content)))
    }

    /// Conflicts between objects.
    pub(crate) fn problems(&self) -> impl Iterator<Item = Problem> {
        self.problems.values().flatten().cloned().chain(self.overruled()).chain(self.outdone())
    }

    /// As [`publish`], for services and workloads.
    fn publish(&mut self, name: Name, resource: Option<Resource>, delta: &mut Delta) {
        publish(&mut self.versions, name, resource, delta);
    }
}

/// Notes the resource that is now in force under a name; unchanged content is not passed on.
fn publish(versions: &mut Versions, name: Name, resource: Option<Resource>, delta: &mut Delta) {
    match resource {
        Some(resource) if versions.get(&name) == Some(&resource.version) => {}
        Some(resource) => {
            versions.insert(Arc::clone(&name), resource.version);
            delta.insert(name, Some(resource));
        }
        None => {
            if versions.remove(&name).is_some() {
                delta.insert(name, None);
            }
        }
    }
}

#[cfg(test)]
mod tests;
