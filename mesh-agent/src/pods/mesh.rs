//! Who can be reached where: an index of the snapshot that proxies read while its owner writes.
//!
//! It holds references to the snapshot's own records. Endpoints of a service are worked out only for a connection whose first one
//! has failed.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use mesh_common::abi::{self, Proxy, ServiceKey, identity_of};
use tokio::sync::watch;

use crate::datapath::desired::{Candidate, Vantage, frontends, map_address};
use crate::identity::{SpiffeId, spiffe_of};
use crate::proxy::host::Endpoint;
use crate::snapshot::{Addresses, Changed, Service, Snapshot, Workload};

/// Endpoints that a connection tries after its first.
pub const RETRIES: usize = 3;

/// For so long connections to an address are looked for at which nobody is any more.
const REMEMBERED: Duration = Duration::from_secs(60);

/// Who is at an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// Nobody that is known.
    Unknown,
    /// A workload whose node takes no tunnels for it.
    Plain(Arc<Workload>),
    /// A workload that takes tunnels.
    Meshed(Arc<Workload>, Endpoint),
}

/// See the module.
#[derive(Debug)]
pub struct Mesh {
    held: RwLock<Held>,
    changed: watch::Sender<u64>,
    grace: Duration,
    turn: AtomicUsize,
}

#[derive(Debug, Default)]
struct Held {
    by_address: HashMap<IpAddr, Arc<Workload>>,
    /// Workloads whose address is another's, too, who has the better claim; mostly one is the other's successor.
    outdone: HashMap<IpAddr, Vec<Arc<Workload>>>,
    /// Addresses by [`identity_of`] the uid.
    by_uid: HashMap<u64, Addresses>,
    /// Who has gone, until the grace time is over.
    leaving: Vec<(Instant, IpAddr, Arc<Workload>)>,
    /// Addresses at which nobody is any more, for as long as connections to them are looked for.
    gone: HashMap<IpAddr, Instant>,
    /// Workloads of this node by identity, those without an address of their own included.
    neighbours: HashMap<u64, Arc<Workload>>,
    services: HashMap<Arc<str>, Backed>,
    by_service_address: HashMap<IpAddr, Arc<str>>,
    vantage: Option<Vantage>,
}

#[derive(Debug, Clone)]
struct Backed {
    service: Arc<Service>,
    members: Arc<[Arc<Workload>]>,
}

impl Mesh {
    /// One that knows nobody. Connections to an endpoint that has gone may go on for `grace`.
    pub fn new(grace: Duration) -> Self {
        Self { held: RwLock::default(), changed: watch::Sender::default(), grace, turn: AtomicUsize::new(0) }
    }

    /// How long connections to, or of, who has gone may go on.
    pub fn grace(&self) -> Duration {
        self.grace
    }

    /// A number that changes when an endpoint has gone (its grace time over) or become another's, and with [`Mesh::bump`].
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Lets every connection be looked at anew.
    pub fn bump(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    /// Takes a change of the snapshot in.
    pub fn apply(&self, changed: &Changed, snapshot: &Snapshot, vantage: &Vantage, now: Instant) {
        let held = &mut *self.held.write().unwrap_or_else(PoisonError::into_inner);
        let deadline = now + self.grace;
        let mut judged_anew = false;
        for workload in &changed.workloads {
            let uid = workload.uid();
            let now = snapshot.workload(&uid);
            // Policies come before the workloads that name them: what these say now may be another thing.
            let before = workload.addresses.first().and_then(|address| held.by_address.get(address));
            judged_anew |= before.zip(now).is_some_and(|(before, now)| before.policies() != now.policies());
            held.neighbour(&uid, now.filter(|workload| workload.node == vantage.node));
            held.put(&uid, now, deadline);
        }
        for key in &changed.services {
            let members = || snapshot.members(key).map(|(workload, _)| Arc::clone(workload)).collect();
            let service = snapshot.service(key).filter(|service| !service.addresses.is_empty());
            held.put_service(
                key,
                service.map(|service| Backed { service: Arc::clone(service), members: members() }),
            );
        }
        held.vantage = Some(vantage.clone());
        if judged_anew {
            self.bump();
        }
    }

    /// A workload of this node, by its identity.
    pub fn neighbour(&self, identity: u64) -> Option<Arc<Workload>> {
        self.read().neighbours.get(&identity).map(Arc::clone)
    }

    /// Whether somebody was at that address a while ago, and nobody is now.
    pub fn has_gone(&self, address: IpAddr) -> bool {
        self.read().gone.get(&address).is_some_and(|since| since.elapsed() < REMEMBERED)
    }

    /// Ends what has had its grace time.
    pub fn tick(&self, now: Instant) {
        if self.read().leaving.iter().all(|(deadline, ..)| now < *deadline) {
            return;
        }
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        held.gone.retain(|_, since| now.saturating_duration_since(*since) < REMEMBERED);
        let (over, leaving) =
            std::mem::take(&mut held.leaving).into_iter().partition(|(deadline, ..)| now >= *deadline);
        held.leaving = leaving;
        let over: Vec<(Instant, IpAddr, Arc<Workload>)> = over;
        for (_, address, _) in over {
            if !held.by_address.contains_key(&address) {
                held.gone.insert(address, now);
            }
        }
        if held.leaving.is_empty() {
            held.leaving.shrink_to_fit();
        }
        drop(held);
        self.bump();
    }

    /// The workload that has that address as its own.
    pub fn at(&self, address: IpAddr) -> Option<Arc<Workload>> {
        self.read().by_address.get(&address).map(Arc::clone)
    }

    /// Who is there now.
    pub fn reach(&self, target: SocketAddr) -> Reach {
        let Some(workload) = self.at(target.ip()) else { return Reach::Unknown };
        match endpoint(&workload, target) {
            Some(endpoint) => Reach::Meshed(workload, endpoint),
            None => Reach::Plain(workload),
        }
    }

    /// The workload that a connection goes to, if it may go on: `identity` is there, or was until a moment ago.
    pub fn still(&self, target: IpAddr, identity: Option<&SpiffeId>) -> Option<Arc<Workload>> {
        let held = self.read();
        let left = held.leaving.iter().rev().filter(|(_, address, _)| *address == target);
        let mut all = held.by_address.get(&target).into_iter().chain(left.map(|(.., workload)| workload));
        let same = |workload: &&Arc<Workload>| {
            identity.is_none_or(|identity| spiffe_of(workload).is_ok_and(|theirs| theirs == *identity))
        };
        all.find(same).map(Arc::clone)
    }

    /// Endpoints of the service at `dialled` that take tunnels, without `failed`, for this connection in another order than for the last.
    pub fn others(&self, dialled: SocketAddr, failed: &[Endpoint]) -> Vec<(Arc<Workload>, Endpoint)> {
        let (backed, vantage) = {
            let held = self.read();
            let key = held.by_service_address.get(&dialled.ip());
            let backed = key.and_then(|key| held.services.get(key)).cloned();
            let (Some(backed), Some(vantage)) = (backed, held.vantage.clone()) else { return Vec::new() };
            (backed, vantage)
        };
        let key = &backed.service.key;
        let members =
            backed.members.iter().filter_map(|workload| Some((workload, workload.membership(key)?)));
        let wanted = ServiceKey::new(map_address(dialled.ip()), dialled.port(), abi::Protocol::Tcp);
        let all = frontends(&backed.service, members, &vantage);
        let Some(frontend) = all.into_iter().find(|frontend| frontend.key == wanted) else {
            return Vec::new();
        };
        let mut backends = frontend.backends;
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % backends.len().max(1);
        backends.rotate_left(turn);
        let untried = |candidate: Candidate| {
            let target = socket_address(&candidate.endpoint);
            let endpoint = endpoint(&candidate.workload, target)?;
            (!failed.contains(&endpoint)).then_some((candidate.workload, endpoint))
        };
        backends.into_iter().filter_map(untried).take(RETRIES).collect()
    }

    /// Host name of the service at that address.
    pub fn host(&self, dialled: IpAddr) -> Option<Box<str>> {
        let held = self.read();
        let key = held.by_service_address.get(&dialled)?;
        key.split_once('/').map(|(_namespace, host)| host.into())
    }

    // Nothing in here panics half-way through a change.
    fn read(&self) -> RwLockReadGuard<'_, Held> {
        self.held.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn put(&mut self, uid: &str, workload: Option<&Arc<Workload>>, deadline: Instant) {
        // One that shares its node's address is not to be found by it.
        let workload = workload.filter(|workload| !workload.host_network && !workload.addresses.is_empty());
        let before = self.by_uid.remove(&identity_of(uid).0).unwrap_or_default();
        let after = workload.map(|workload| workload.addresses.clone()).unwrap_or_default();
        for address in before.iter().filter(|address| !after.contains(address)) {
            self.leave(uid, *address, deadline);
        }
        let Some(workload) = workload else { return };
        for address in after.iter() {
            self.come(uid, *address, workload, deadline);
        }
        self.by_uid.insert(identity_of(uid).0, after);
    }

    fn neighbour(&mut self, uid: &str, workload: Option<&Arc<Workload>>) {
        match workload {
            Some(workload) => drop(self.neighbours.insert(identity_of(uid).0, Arc::clone(workload))),
            None => drop(self.neighbours.remove(&identity_of(uid).0)),
        }
    }

    fn come(&mut self, uid: &str, address: IpAddr, workload: &Arc<Workload>, deadline: Instant) {
        self.gone.remove(&address);
        self.withdraw(uid, address);
        let there = self.by_address.remove(&address);
        // The same as it is now, and all others that claim it.
        let other = there.as_ref().filter(|there| there.uid() != uid);
        if let Some(other) = other {
            self.outdone.entry(address).or_default().push(Arc::clone(other));
        }
        let best = match self.outdone.get_mut(&address) {
            None => Arc::clone(workload),
            Some(others) => {
                others.push(Arc::clone(workload));
                best_of(others).map_or_else(|| Arc::clone(workload), |at| others.swap_remove(at))
            }
        };
        self.by_address.insert(address, Arc::clone(&best));
        self.tidy(address);
        // Whoever meant another than who is there now, or the same under another identity, has to ask again.
        let meant = |there: &Arc<Workload>| {
            there.uid() == best.uid() && spiffe_of(there).ok() == spiffe_of(&best).ok()
        };
        self.leaving.extend(there.filter(|there| !meant(there)).map(|there| (deadline, address, there)));
    }

    fn leave(&mut self, uid: &str, address: IpAddr, deadline: Instant) {
        self.withdraw(uid, address);
        if self.by_address.get(&address).is_some_and(|there| there.uid() == uid) {
            let others = self.outdone.get_mut(&address);
            let next = others.and_then(|others| best_of(others).map(|at| others.swap_remove(at)));
            let gone = match next {
                Some(next) => self.by_address.insert(address, next),
                None => self.by_address.remove(&address),
            };
            self.leaving.extend(gone.map(|gone| (deadline, address, gone)));
        }
        self.tidy(address);
    }

    /// It is not among those that claim an address in vain.
    fn withdraw(&mut self, uid: &str, address: IpAddr) {
        if let Some(others) = self.outdone.get_mut(&address) {
            others.retain(|other| other.uid() != uid);
        }
    }

    fn tidy(&mut self, address: IpAddr) {
        if self.outdone.get(&address).is_some_and(Vec::is_empty) {
            self.outdone.remove(&address);
        }
    }

    fn put_service(&mut self, key: &Arc<str>, backed: Option<Backed>) {
        if let Some(before) = self.services.remove(key) {
            for address in before.service.addresses.iter() {
                if self.by_service_address.get(address) == Some(key) {
                    self.by_service_address.remove(address);
                }
            }
        }
        if let Some(backed) = backed {
            for address in backed.service.addresses.iter() {
                self.by_service_address.insert(*address, Arc::clone(key));
            }
            self.services.insert(Arc::clone(key), backed);
        }
    }
}

/// Who of those that claim an address has it, whoever came first: the kind of claim counts, then what the control plane says of it, then the name.
fn best_of(claimants: &[Arc<Workload>]) -> Option<usize> {
    let claim = |at: &usize| {
        let workload = &claimants[*at];
        (rank(workload), !workload.outdone, Reverse(workload.uid()))
    };
    (0..claimants.len()).max_by_key(claim)
}

/// How much a workload's claim to an address weighs. A pod's is told by its node; that of an entry, and of an endpoint without a workload
/// behind it, by whoever writes manifests in some namespace, who must not take a pod out of its own policies.
fn rank(workload: &Workload) -> u8 {
    let uid = workload.uid();
    let kind = uid.split('/').nth(2).unwrap_or_default();
    match kind {
        "Pod" => 2,
        "WorkloadEntry" => 1,
        _ => 0,
    }
}

/// Where a workload takes tunnels for one of its ports, if it does.
fn endpoint(workload: &Workload, target: SocketAddr) -> Option<Endpoint> {
    let identity = spiffe_of(workload).ok().filter(|_| workload.meshed)?;
    Some(Endpoint { identity, tunnel: SocketAddr::new(target.ip(), Proxy::TUNNEL), target })
}

fn socket_address(endpoint: &abi::Endpoint) -> SocketAddr {
    let ip = IpAddr::from(endpoint.address().bytes()).to_canonical();
    SocketAddr::new(ip, endpoint.port())
}

#[cfg(test)]
#[path = "mesh/tests.rs"]
mod tests;
