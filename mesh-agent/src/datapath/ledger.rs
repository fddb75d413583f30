//! What is in the kernel, as the agent knows it, and the plan of writes that leads to what should be there.
//!
//! Pure: [`Ledger::plan_put`] and [`Ledger::plan_remove`] say what to write and change nothing; [`Ledger::commit`] notes
//! that it has been written. Writes are in an order in which an agent may die after each: what is new is written where
//! nothing points yet, then the pointer, then what is old is freed.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use mesh_common::abi::{Algorithm, Backend, Endpoint, Header, Page, Pointer, ServiceKey};

use super::desired::{Candidate, Frontend};
use super::maglev;
use super::pool::Pool;
use super::tree::{Growth, Slot, Tree};
use crate::config::MapSizes;

/// Pages that are kept for changes of services in force.
const RESERVE: usize = 64;

/// One write to a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// A backend slot.
    Backend(u32, Backend),
    /// Forgets the load of the backend that had the slot before.
    NoLoad(u32),
    /// A page.
    Page(u32, Box<Page>),
    /// Publishes a tree.
    Publish(ServiceKey, Pointer),
    /// Makes an address one that is no service.
    Remove(ServiceKey),
}

/// A change of one service port: what to write, and what is so afterwards.
#[derive(Debug)]
pub struct Change {
    /// In this order.
    pub writes: Vec<Write>,
    /// Backend and service numbers that had another owner before: counters under them must go first.
    pub reused: Reused,
    key: ServiceKey,
    port: Option<Port>,
    pages_taken: usize,
    backends_taken: usize,
    numbers_taken: usize,
    pages_released: Vec<u32>,
    backends_released: Vec<u32>,
    number_released: Option<u32>,
}

/// Numbers that are given to another owner.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Reused {
    /// Backend numbers.
    pub backends: Vec<u32>,
    /// Service numbers.
    pub services: Vec<u32>,
}

/// Why a service port is not in the kernel as it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A map has no room.
    #[error("map {map} is full ({capacity} entries); raise {flag}")]
    Full {
        /// The map.
        map: &'static str,
        /// Its size.
        capacity: u32,
        /// The flag that sets its size.
        flag: &'static str,
    },
    /// Another service has the address.
    #[error("{key} already belongs to {owner}")]
    Taken {
        /// Address, port and protocol.
        key: String,
        /// The service that has it.
        owner: Arc<str>,
    },
}

/// A service port in the kernel.
#[derive(Debug, Clone)]
pub struct Port {
    /// Its number.
    pub number: u32,
    /// The service that it belongs to; none until a snapshot names it.
    pub owner: Option<Arc<str>>,
    /// How it balances.
    pub algorithm: Algorithm,
    /// Its affinity; 0: none.
    pub affinity_seconds: u32,
    /// Generation in force.
    pub generation: u32,
    /// Its pages.
    pub tree: Tree,
    /// Its backends.
    pub backends: Vec<Known>,
}

/// A backend in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Its number.
    pub number: u32,
    /// Where it is.
    pub endpoint: Endpoint,
    /// Its weight.
    pub weight: u32,
    /// Whose it is; none until a snapshot names it.
    pub workload: Option<Arc<str>>,
}

/// A backend that was in the kernel.
#[derive(Debug, Clone)]
pub struct Former {
    /// Number of its service.
    pub number: u32,
    /// Its service.
    pub service: Option<Arc<str>>,
    /// Where it was, and whose.
    pub backend: Known,
}

/// Everything in the kernel that belongs to services.
#[derive(Debug)]
pub struct Ledger {
    sizes: MapSizes,
    ports: HashMap<ServiceKey, Port>,
    owned: HashMap<Arc<str>, Vec<ServiceKey>>,
    /// Keys in the kernel whose tree could not be read.
    broken: HashSet<ServiceKey>,
    numbers: Pool,
    pages: Pool,
    backends: Pool,
    incarnations: Vec<u32>,
    first_incarnation: u32,
    /// Who had the free slots last: sockets remember them, and counters are kept under their numbers.
    former: HashMap<u32, Former>,
    /// Free slots whose former service's number is given to another.
    renounced: VecDeque<u32>,
    generation: u32,
    /// Backend slots to write free, and what they hold.
    leaving: VecDeque<(u32, Endpoint)>,
    entries: usize,
}

impl Ledger {
    /// What was found in the kernel; see [`super::adopt`].
    pub fn new(
        sizes: MapSizes,
        ports: HashMap<ServiceKey, Port>,
        broken: HashSet<ServiceKey>,
        slots: &[Backend],
        first_incarnation: u32,
    ) -> Self {
        let used: HashSet<u32> = ports.values().flat_map(|p| p.backends.iter().map(|b| b.number)).collect();
        // A slot that nothing names was written by an agent that died before it published.
        let leaving: VecDeque<(u32, Endpoint)> = (0..)
            .zip(slots)
            .filter(|(number, slot)| slot.service != 0 && !used.contains(number))
            .map(|(number, slot)| (number, slot.endpoint))
            .collect();
        let taken = used.iter().copied().chain(leaving.iter().map(|(number, _)| *number));
        let last = slots.iter().rposition(|slot| slot.incarnation != 0).map_or(0, |last| last + 1);
        Self {
            numbers: Pool::new(1, sizes.services.saturating_add(1), ports.values().map(|port| port.number)),
            pages: Pool::new(
                0,
                sizes.pages,
                ports.values().flat_map(|port| port.tree.pages().collect::<Vec<_>>()),
            ),
            backends: Pool::new(1, sizes.backends.saturating_add(1), taken),
            incarnations: slots[..last].iter().map(|slot| slot.incarnation).collect(),
            generation: ports.values().map(|port| port.generation).max().unwrap_or(0),
            entries: ports.len() + broken.len(),
            owned: HashMap::new(),
            leaving,
            first_incarnation,
            former: HashMap::new(),
            renounced: VecDeque::new(),
            sizes,
            ports,
            broken,
        }
    }

    /// The service ports.
    pub fn ports(&self) -> &HashMap<ServiceKey, Port> {
        &self.ports
    }

    /// Takes a key from its service without a change in the kernel: another service may claim it, or it is removed.
    pub fn disown(&mut self, key: &ServiceKey) {
        let Some(owner) = self.ports.get_mut(key).and_then(|port| port.owner.take()) else { return };
        self.forget_owned(&owner, key);
    }

    fn forget_owned(&mut self, owner: &Arc<str>, key: &ServiceKey) {
        if let Some(keys) = self.owned.get_mut(owner) {
            keys.retain(|owned| owned != key);
            if keys.is_empty() {
                self.owned.remove(owner);
            }
        }
    }

    /// Who had a free slot last.
    pub fn former(&self, backend: u32) -> Option<&Former> {
        self.former.get(&backend)
    }

    /// Forgets who had the slots that nothing is counted under.
    pub fn forget_former(&mut self, counted: impl Fn(u32) -> bool) {
        self.former.retain(|backend, _| counted(*backend));
    }

    /// Whether the kernel has a service under this key.
    pub fn holds(&self, key: &ServiceKey) -> bool {
        self.ports.contains_key(key)
    }

    /// Whether the key is in the kernel and belongs to no service.
    pub fn is_unowned(&self, key: &ServiceKey) -> bool {
        self.broken.contains(key) || self.ports.get(key).is_some_and(|port| port.owner.is_none())
    }

    /// Keys that belong to `service`.
    pub fn owned(&self, service: &str) -> &[ServiceKey] {
        self.owned.get(service).map_or(&[], Vec::as_slice)
    }

    /// Keys that belong to no service of the snapshot, and those that lead nowhere.
    pub fn unowned(&self) -> Vec<ServiceKey> {
        let unnamed = self.ports.iter().filter(|(_, port)| port.owner.is_none()).map(|(key, _)| *key);
        unnamed.chain(self.broken.iter().copied()).collect()
    }

    /// Services that own something.
    pub fn owners(&self) -> impl Iterator<Item = &Arc<str>> {
        self.owned.keys()
    }

    /// Whether the kernel held something else under this key when the agent started, and nobody has claimed it since.
    pub fn found_different(&self, frontend: &Frontend) -> bool {
        self.ports
            .get(&frontend.key)
            .is_some_and(|port| port.owner.is_none() && !same_in_kernel(port, frontend))
    }

    /// The writes that put `frontend` of service `owner` in force; none if it is.
    pub fn plan_put(&self, owner: &Arc<str>, frontend: &Frontend) -> Result<Option<Change>, Refusal> {
        let old = self.ports.get(&frontend.key);
        if let Some(other) = old.and_then(|port| port.owner.as_ref()).filter(|other| *other != owner) {
            return Err(Refusal::Taken { key: show(&frontend.key), owner: Arc::clone(other) });
        }
        if old.is_some_and(|old| old.owner.as_ref() == Some(owner) && same(old, frontend)) {
            return Ok(None);
        }
        let mut draft = Draft { ledger: self, backends: 0, reused: Reused::default() };
        let number = match old {
            Some(old) => old.number,
            None => draft.number(&frontend.key)?,
        };
        let mut writes = Vec::new();
        let mut staying: HashMap<Endpoint, u32> =
            old.map(|old| old.backends.iter().map(|b| (b.endpoint, b.number)).collect()).unwrap_or_default();
        let mut backends = Vec::with_capacity(frontend.backends.len());
        let mut fresh = self.backends.peek();
        for candidate in &frontend.backends {
            let number = match staying.remove(&candidate.endpoint) {
                Some(number) => number,
                None => draft.backend(&mut fresh, number, candidate, &mut writes)?,
            };
            backends.push(Known {
                number,
                endpoint: candidate.endpoint,
                weight: candidate.weight,
                workload: Some(Arc::clone(&candidate.workload)),
            });
        }
        drop(fresh);
        let (reused, backends_taken) = (draft.reused, draft.backends);
        let port = Port {
            number,
            owner: Some(Arc::clone(owner)),
            algorithm: frontend.algorithm,
            affinity_seconds: frontend.affinity_seconds,
            generation: self.generation.wrapping_add(1).max(1),
            tree: old.map(|old| old.tree.clone()).unwrap_or_default(),
            backends,
        };
        let mut change = Change {
            writes,
            reused,
            key: frontend.key,
            port: None,
            pages_taken: 0,
            backends_taken,
            numbers_taken: usize::from(old.is_none()),
            pages_released: Vec::new(),
            backends_released: staying.into_values().collect(),
            number_released: None,
        };
        if let Some(old) = old
            && same_in_kernel(old, frontend)
        {
            // Only names are new.
            change.port = Some(Port { generation: old.generation, ..port });
            return Ok(Some(change));
        }
        self.grow(old, port, &mut change)?;
        Ok(Some(change))
    }

    /// Adds the pages and the publication.
    fn grow(&self, old: Option<&Port>, mut port: Port, change: &mut Change) -> Result<(), Refusal> {
        let header = Header {
            key: change.key,
            service: port.number,
            generation: port.generation,
            stride: stride(&port),
            affinity_seconds: port.affinity_seconds,
            algorithm: port.algorithm as u8,
            ..Header::default()
        };
        let leaves = match port.algorithm {
            Algorithm::Maglev => maglev_leaves(&port.backends),
            Algorithm::WeightedRandom | Algorithm::RoundRobin | Algorithm::LeastConnections => {
                let slots: Vec<Slot> = port.backends.iter().map(|b| (b.number, b.weight)).collect();
                match old {
                    Some(old) if old.algorithm != Algorithm::Maglev => old.tree.rearranged(&slots),
                    Some(_) | None => Tree::default().rearranged(&slots),
                }
            }
        };
        let mut pages = self.pages.peek();
        let empty = Tree::default();
        let before = old.map_or(&empty, |old| &old.tree);
        let grown = before.next(leaves, header, || {
            change.pages_taken += 1;
            pages.next()
        });
        // Services in force must be able to change when there is no room for more of them.
        let reserve = if old.is_none() { RESERVE.min(self.sizes.pages as usize / 16) } else { 0 };
        let grown = grown.filter(|_| change.pages_taken + reserve <= self.pages.available());
        let Some((tree, Growth { writes, released })) = grown else {
            return Err(Refusal::Full { map: "PAGES", capacity: self.sizes.pages, flag: "--max-pages" });
        };
        change.pages_released = if old.is_some() { released } else { Vec::new() };
        change.writes.extend(writes.into_iter().map(|(number, page)| Write::Page(number, page)));
        change.writes.push(Write::Publish(change.key, Pointer::new(tree.root, port.generation)));
        port.tree = tree;
        change.port = Some(port);
        Ok(())
    }

    /// The writes that take `key` out of the kernel; none if it is not there.
    pub fn plan_remove(&self, key: &ServiceKey) -> Option<Change> {
        let old = self.ports.get(key);
        if old.is_none() && !self.broken.contains(key) {
            return None;
        }
        Some(Change {
            writes: vec![Write::Remove(*key)],
            reused: Reused::default(),
            key: *key,
            port: None,
            pages_taken: 0,
            backends_taken: 0,
            numbers_taken: 0,
            pages_released: old.map(|old| old.tree.pages().collect()).unwrap_or_default(),
            backends_released: old
                .map(|old| old.backends.iter().map(|b| b.number).collect())
                .unwrap_or_default(),
            number_released: old.map(|old| old.number),
        })
    }

    /// Notes that all writes of `change` have been done.
    pub fn commit(&mut self, change: Change, now: Instant) {
        for write in &change.writes {
            if let Write::Backend(number, slot) = write {
                let at = *number as usize;
                if self.incarnations.len() <= at {
                    self.incarnations.resize(at + 1, 0);
                }
                self.incarnations[at] = slot.incarnation;
                self.former.remove(number);
            }
        }
        self.numbers.take(change.numbers_taken);
        self.pages.take(change.pages_taken);
        self.backends.take(change.backends_taken);
        for page in change.pages_released {
            self.pages.release(page, now);
        }
        if let Some(old) = self.ports.get(&change.key) {
            let released = |known: &&Known| change.backends_released.contains(&known.number);
            for known in old.backends.iter().filter(released) {
                let former =
                    Former { number: old.number, service: old.owner.clone(), backend: known.clone() };
                self.former.insert(known.number, former);
                self.leaving.push_back((known.number, known.endpoint));
            }
        }
        for number in &change.reused.services {
            let had: Vec<u32> = self
                .former
                .iter()
                .filter(|(_, former)| former.number == *number)
                .map(|(slot, _)| *slot)
                .collect();
            for slot in had {
                self.former.remove(&slot);
                let incarnation = &mut self.incarnations[slot as usize];
                *incarnation = incarnation.wrapping_add(1).max(1);
                self.renounced.push_back(slot);
            }
        }
        if let Some(number) = change.number_released {
            self.numbers.release(number, now);
        }
        let was_broken = self.broken.remove(&change.key);
        let old = match change.port {
            Some(port) => {
                self.generation = self.generation.max(port.generation);
                if let Some(owner) = &port.owner {
                    let keys = self.owned.entry(Arc::clone(owner)).or_default();
                    if !keys.contains(&change.key) {
                        keys.push(change.key);
                    }
                }
                let old = self.ports.insert(change.key, port);
                self.entries += usize::from(old.is_none() && !was_broken);
                return;
            }
            None => self.ports.remove(&change.key),
        };
        self.entries -= usize::from(old.is_some() || was_broken);
        if let Some(owner) = old.and_then(|old| old.owner) {
            self.forget_owned(&owner, &change.key);
        }
    }

    /// The next backend slot to write free, and what to write there.
    pub fn leaving(&self) -> Option<(u32, Backend)> {
        let (number, endpoint) = *self.leaving.front()?;
        let incarnation = self.incarnations.get(number as usize).copied().unwrap_or(0);
        // The endpoint stays, for programs that have just found the slot theirs and now read it.
        Some((number, Backend { incarnation, endpoint, ..Backend::default() }))
    }

    /// The next free slot to write again, under another incarnation, and what to write there.
    pub fn renounced(&self) -> Option<(u32, Backend)> {
        let number = *self.renounced.front()?;
        let incarnation = self.incarnations.get(number as usize).copied().unwrap_or(0);
        Some((number, Backend { incarnation, ..Backend::default() }))
    }

    /// Notes that the slot of [`Ledger::renounced`] has been written.
    pub fn renewed(&mut self) {
        self.renounced.pop_front();
    }

    /// Notes that the slot of [`Ledger::leaving`] has been written free.
    pub fn left(&mut self, now: Instant) {
        if let Some((number, _)) = self.leaving.pop_front() {
            self.backends.release(number, now);
        }
    }

    /// Ends the rest of numbers whose time has come; whether there may be room for what was refused.
    pub fn wake(&mut self, now: Instant) -> bool {
        let rested = self.pages.rests() || self.backends.rests() || self.numbers.rests();
        self.pages.wake(now);
        self.backends.wake(now);
        self.numbers.wake(now);
        rested
    }

    /// Keys in `SERVICES`, whether they can be read or not.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Pages and backends in use.
    pub fn in_use(&self) -> (usize, usize) {
        let pages = self.ports.values().map(|port| port.tree.pages().count()).sum();
        (pages, self.ports.values().map(|port| port.backends.len()).sum())
    }
}

/// Numbers that a plan would take.
struct Draft<'a> {
    ledger: &'a Ledger,
    backends: usize,
    reused: Reused,
}

impl Draft<'_> {
    fn number(&mut self, key: &ServiceKey) -> Result<u32, Refusal> {
        let sizes = &self.ledger.sizes;
        let full = Refusal::Full { map: "SERVICES", capacity: sizes.services, flag: "--max-services" };
        if self.ledger.entries >= sizes.services as usize && !self.ledger.broken.contains(key) {
            return Err(full);
        }
        let number = self.ledger.numbers.peek().next().ok_or(full)?;
        if !self.ledger.numbers.unused(number) {
            self.reused.services.push(number);
        }
        Ok(number)
    }

    fn backend(
        &mut self,
        fresh: &mut impl Iterator<Item = u32>,
        service: u32,
        candidate: &Candidate,
        writes: &mut Vec<Write>,
    ) -> Result<u32, Refusal> {
        let capacity = self.ledger.sizes.backends;
        let number =
            fresh.next().ok_or(Refusal::Full { map: "BACKENDS", capacity, flag: "--max-backends" })?;
        self.backends += 1;
        let before = self.ledger.incarnations.get(number as usize).copied().unwrap_or(0);
        if before != 0 {
            self.reused.backends.push(number);
            writes.push(Write::NoLoad(number));
        }
        let incarnation =
            if before == 0 { self.ledger.first_incarnation } else { before.wrapping_add(1).max(1) };
        writes.push(Write::Backend(
            number,
            Backend { endpoint: candidate.endpoint, service, incarnation, reserved: 0 },
        ));
        Ok(number)
    }
}

/// Whether `frontend` is in force, names included.
fn same(old: &Port, frontend: &Frontend) -> bool {
    same_in_kernel(old, frontend) && {
        let names: HashMap<&Endpoint, &Option<Arc<str>>> =
            old.backends.iter().map(|b| (&b.endpoint, &b.workload)).collect();
        frontend
            .backends
            .iter()
            .all(|b| names.get(&b.endpoint).is_some_and(|name| name.as_ref() == Some(&b.workload)))
    }
}

fn same_in_kernel(old: &Port, frontend: &Frontend) -> bool {
    old.algorithm == frontend.algorithm
        && old.affinity_seconds == frontend.affinity_seconds
        && old.generation != 0
        && old.backends.len() == frontend.backends.len()
        && {
            let known: HashMap<&Endpoint, u32> =
                old.backends.iter().map(|b| (&b.endpoint, b.weight)).collect();
            frontend.backends.iter().all(|b| known.get(&b.endpoint) == Some(&b.weight))
        }
}

/// A step through the positions that visits each once, and interleaves backends where weights differ.
fn stride(port: &Port) -> u32 {
    let total: u64 = port.backends.iter().map(|b| u64::from(b.weight)).sum();
    if port.algorithm != Algorithm::RoundRobin || port.backends.iter().all(|b| b.weight == 1) {
        return 1;
    }
    let golden = total * 618 / 1000;
    let coprime = (golden.max(1)..total).find(|step| gcd(*step, total) == 1);
    coprime.and_then(|step| u32::try_from(step).ok()).unwrap_or(1)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The Maglev table in leaves of fixed extent, so that a slot that stays keeps its leaf.
fn maglev_leaves(backends: &[Known]) -> Vec<Vec<Slot>> {
    let mut ordered: Vec<&Known> = backends.iter().collect();
    ordered.sort_unstable_by_key(|b| (b.endpoint.address().bytes(), b.endpoint.port()));
    let list: Vec<(Endpoint, u32)> = ordered.iter().map(|b| (b.endpoint, b.weight)).collect();
    let table: Vec<Slot> = maglev::table(&list).into_iter().map(|index| (ordered[index].number, 1)).collect();
    table.chunks(mesh_common::abi::ENTRIES).map(<[Slot]>::to_vec).collect()
}

/// `ADDRESS:PORT/PROTOCOL`.
pub fn show(key: &ServiceKey) -> String {
    let protocol = match key.protocol() {
        Some(mesh_common::abi::Protocol::Tcp) => "TCP",
        Some(mesh_common::abi::Protocol::Udp) => "UDP",
        None => "?",
    };
    format!("{}/{protocol}", show_endpoint(&key.endpoint()))
}

/// `ADDRESS:PORT`.
pub fn show_endpoint(endpoint: &Endpoint) -> String {
    std::net::SocketAddr::new(unmap(endpoint), endpoint.port()).to_string()
}

/// As the standard library has it.
pub fn unmap(endpoint: &Endpoint) -> std::net::IpAddr {
    match endpoint.address().to_v4() {
        Some(octets) => octets.into(),
        None => endpoint.address().bytes().into(),
    }
}

#[cfg(test)]
#[path = "ledger/tests.rs"]
mod tests;
