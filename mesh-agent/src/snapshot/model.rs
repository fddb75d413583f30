//! Services and workloads as the agent knows them.

use std::fmt;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

pub use mesh_common::serving::{Mode, Scope};

/// Transport protocol of a service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// How a backend is chosen among those that are allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// At random, in proportion to the weights.
    WeightedRandom,
    /// In turn.
    RoundRobin,
    /// The one with fewer open connections of two picked at random.
    LeastConnections,
    /// By a consistent hash of the client.
    Maglev,
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WeightedRandom => "weighted-random",
            Self::RoundRobin => "round-robin",
            Self::LeastConnections => "least-connections",
            Self::Maglev => "maglev",
        })
    }
}

/// Where a workload stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Locality {
    /// Region, or empty.
    pub region: Arc<str>,
    /// Zone, or empty.
    pub zone: Arc<str>,
    /// Subzone, or empty.
    pub subzone: Arc<str>,
}

/// One port of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePort {
    /// Port that clients dial; never 0.
    pub port: u16,
    /// Protocol of the port.
    pub protocol: Protocol,
    /// Port of the backends. `None`: the service names it, and each workload says its number.
    pub target: Option<u16>,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// `namespace/hostname`, its resource name; the namespace has no slash.
    pub key: Arc<str>,
    /// Virtual addresses; none for a headless service, and none for one that wants its traffic passed through.
    pub addresses: Addresses,
    /// Ports, unique by number and protocol.
    pub ports: Box<[ServicePort]>,
    /// How a backend is chosen.
    pub algorithm: Algorithm,
    /// Seconds that a client keeps its backend; 0: no affinity.
    pub affinity_seconds: u32,
    /// Which backends are preferred, most important first.
    pub preference: Box<[Scope]>,
    /// What the preference means.
    pub mode: Mode,
    /// Backends that are not ready serve as well.
    pub allow_unready: bool,
}

/// Port of a workload behind a service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortMapping {
    /// The service's port.
    pub port: u16,
    /// Protocol of both.
    pub protocol: Protocol,
    /// The workload's port.
    pub target: u16,
}

/// That a workload belongs to a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Membership {
    /// Key of the service.
    pub service: Arc<str>,
    /// Ports that differ from, or are only named in, the service's own list.
    pub ports: Box<[PortMapping]>,
    /// Not ready in this service.
    pub unready: bool,
    /// Going away, but still serving: for when nothing better is left.
    pub terminating: bool,
}

/// Whose a workload is. Most of a namespace's pods share one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Account {
    /// What their uids begin with; see [`split_uid`].
    pub prefix: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Service account; empty when it has none.
    pub service_account: Arc<str>,
    /// Who vouches for its identity; empty: `cluster.local`.
    pub trust_domain: Arc<str>,
}

/// What the pods of a deployment have in common.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Kin {
    /// Namespace and service account.
    pub account: Arc<Account>,
    /// Services they belong to, each once, in order of their keys.
    pub memberships: Box<[Membership]>,
    /// Names of the policies that apply to them besides those of their namespace and of the mesh, each once, in order.
    pub policies: Box<[Arc<str>]>,
}

/// Addresses of a service or a workload. One, the usual case, needs no memory of its own.
#[derive(Clone, PartialEq, Eq)]
pub struct Addresses(AddressRepr);

#[derive(Clone, PartialEq, Eq)]
enum AddressRepr {
    One(IpAddr),
    List(Box<[IpAddr]>),
}

impl Default for Addresses {
    fn default() -> Self {
        Vec::new().into()
    }
}

impl From<Vec<IpAddr>> for Addresses {
    fn from(list: Vec<IpAddr>) -> Self {
        match list.as_slice() {
            [one] => Self(AddressRepr::One(*one)),
            _ => Self(AddressRepr::List(list.into())),
        }
    }
}

impl Deref for Addresses {
    type Target = [IpAddr];

    fn deref(&self) -> &[IpAddr] {
        match &self.0 {
            AddressRepr::One(one) => std::slice::from_ref(one),
            AddressRepr::List(list) => list,
        }
    }
}

impl fmt::Debug for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// What the workloads of a node have in common. Its fields are read through [`Workload`], which derefs to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Place {
    /// Node, or empty.
    pub node: Arc<str>,
    /// Region, zone and subzone.
    pub locality: Arc<Locality>,
    /// Network, or empty for the default one.
    pub network: Arc<str>,
    /// Cluster.
    pub cluster: Arc<str>,
    /// Shares its node's network namespace, so that its address tells nothing.
    pub host_network: bool,
    /// Its node takes mutual TLS for it, at its own address.
    pub meshed: bool,
    /// What it sends to those of whom that is true goes by mutual TLS.
    pub outbound_meshed: bool,
    /// Another workload has the same address, and the better claim to it, says the control plane.
    pub outdone: bool,
    /// Ready in general; a membership may still say otherwise.
    pub healthy: bool,
    /// Share in balancing; 0 receives nothing.
    pub weight: u32,
    /// `metadata.uid` of the pod. Kept only for workloads of this agent's node: it names a cgroup here.
    pub pod_uid: Option<Box<str>>,
    /// Cgroup relative to the node's root. Kept only for workloads of this agent's node.
    pub cgroup: Option<Box<str>>,
    /// What it is an instance of. Kept only for workloads of this agent's node: it is what the others are told of these.
    pub app: Option<Arc<App>>,
}

/// What made a workload.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Controller {
    /// A Deployment.
    Deployment,
    /// A CronJob.
    CronJob,
    /// A Job.
    Job,
    /// Anything else.
    #[default]
    Pod,
}

/// What a workload is an instance of, for telemetry; nothing is decided by it. Most of a deployment's pods share one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct App {
    /// What made it.
    pub controller: Controller,
    /// The controller's name; the workload's own if it has none.
    pub name: Arc<str>,
    /// What its users call it (`service.name`).
    pub service: Arc<str>,
    /// Its version.
    pub version: Arc<str>,
}

/// A workload: a pod, or a process on a plain host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Workload {
    /// Name within the namespace: what its uid ends with.
    pub name: Box<str>,
    /// Addresses; none for a workload known by name only.
    pub addresses: Addresses,
    /// Whose it is and what it serves; shared with its like.
    pub kin: Arc<Kin>,
    /// Where it runs and how it fares; shared with its like.
    pub place: Arc<Place>,
}

impl Deref for Workload {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.place
    }
}

impl Workload {
    /// Unique name, `CLUSTER/GROUP/KIND/NAMESPACE/NAME[/MORE]`. Put together anew, since the half that many share is
    /// stored once.
    pub fn uid(&self) -> String {
        [&*self.kin.account.prefix, &*self.name].concat()
    }

    /// Namespace and service account.
    pub fn account(&self) -> &Account {
        &self.kin.account
    }

    /// Services it belongs to, each once, in order of their keys.
    pub fn memberships(&self) -> &[Membership] {
        &self.kin.memberships
    }

    /// Names of the policies that apply to it besides those of its namespace and of the mesh, each once, in order.
    pub fn policies(&self) -> &[Arc<str>] {
        &self.kin.policies
    }

    /// Its membership in a service.
    pub fn membership(&self, service: &str) -> Option<&Membership> {
        let all = self.memberships();
        let found = all.binary_search_by(|m| (*m.service).cmp(service));
        found.ok().and_then(|at| all.get(at))
    }
}

/// The two parts of a uid: `CLUSTER/GROUP/KIND/NAMESPACE/`, which many share, and the name. A uid of another shape is all
/// name.
pub fn split_uid(uid: &str) -> (&str, &str) {
    match uid.match_indices('/').nth(3) {
        Some((at, slash)) => uid.split_at(at + slash.len()),
        None => ("", uid),
    }
}

/// A service or a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource {
    /// A service.
    Service(Arc<Service>),
    /// A workload.
    Workload(Arc<Workload>),
}

impl Resource {
    /// A service's key or a workload's uid.
    pub fn name(&self) -> String {
        match self {
            Self::Service(service) => service.key.to_string(),
            Self::Workload(workload) => workload.uid(),
        }
    }
}

/// Version of a resource. Content hashes in hexadecimal, the usual case, need no memory of their own.
#[derive(Clone, PartialEq, Eq)]
pub struct Version(Repr);

#[derive(Clone, PartialEq, Eq)]
enum Repr {
    Hex { value: u64, digits: u8 },
    // A thin pointer: with a wide one, every version would be half as large again.
    Text(Box<Long>),
}

#[derive(Clone, PartialEq, Eq)]
struct Long(Box<str>);

impl From<&str> for Version {
    fn from(text: &str) -> Self {
        let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        let short = (1..=16).contains(&text.len()) && text.bytes().all(hex);
        let value = short.then(|| u64::from_str_radix(text, 16).ok()).flatten();
        match (value, u8::try_from(text.len())) {
            (Some(value), Ok(digits)) => Self(Repr::Hex { value, digits }),
            _ => Self(Repr::Text(Box::new(Long(text.into())))),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Repr::Hex { value, digits } => write!(f, "{value:0width$x}", width = usize::from(*digits)),
            Repr::Text(text) => f.write_str(&text.0),
        }
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A resource as received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned {
    /// Resource name: a service's key or a workload's uid.
    pub name: String,
    /// The control plane's version of it.
    pub version: Version,
    /// The resource.
    pub resource: Resource,
}

/// What one response changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delta {
    /// New and changed resources.
    pub updated: Vec<Versioned>,
    /// Names of resources that are gone.
    pub removed: Vec<String>,
}

/// A resource that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// Its name.
    pub name: String,
    /// Why, naming the field.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_come_back_as_they_went_in() {
        for text in
            ["", "0", "00", "0001", "deadbeef", "DEADBEEF", "ffffffffffffffff", "0ffffffffffffffff", "v1/é"]
        {
            assert_eq!(Version::from(text).to_string(), text);
        }
    }

    #[test]
    fn a_uid_is_its_two_parts() {
        assert_eq!(split_uid("c//Pod/shop/web-1"), ("c//Pod/shop/", "web-1"));
        assert_eq!(split_uid("c/g/Slice/shop/web/10.0.0.1"), ("c/g/Slice/shop/", "web/10.0.0.1"));
        assert_eq!(split_uid("c//Pod/shop/"), ("c//Pod/shop/", ""));
        assert_eq!(split_uid("c//VM"), ("", "c//VM"));
    }

    #[test]
    fn versions_differ_when_their_texts_differ() {
        assert_ne!(Version::from("1"), Version::from("01"));
        assert_ne!(Version::from("a"), Version::from("A"));
        assert_eq!(Version::from("1f"), Version::from("1f"));
    }
}
