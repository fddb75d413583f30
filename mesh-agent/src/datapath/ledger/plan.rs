//! The writes that lead from what is in the kernel to what should be there. Nothing here changes the ledger.

use std::collections::HashMap;
use std::sync::Arc;

use mesh_common::abi::{Algorithm, Backend, ENTRIES, Endpoint, Header, Page, Pointer, ServiceKey};

use super::{Known, Ledger, Port};
use crate::datapath::desired::{Candidate, Frontend};
use crate::datapath::maglev;
use crate::datapath::show::show;
use crate::datapath::tree::{Growth, Slot, Tree};
use crate::snapshot::Workload;

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
    pub(super) key: ServiceKey,
    pub(super) port: Option<Port>,
    pub(super) pages_taken: usize,
    pub(super) backends_taken: usize,
    pub(super) numbers_taken: usize,
    pub(super) pages_released: Vec<u32>,
    pub(super) backends_released: Vec<u32>,
    pub(super) number_released: Option<u32>,
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

impl Ledger {
    /// The writes that put `frontend` of service `owner` in force; none if it is.
    pub fn plan_put(&self, owner: &Arc<str>, frontend: &Frontend) -> Result<Option<Change>, Refusal> {
        let old = self.ports.get(&frontend.key).map(Box::as_ref);
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
            backends: backends.into(),
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
        let names: HashMap<&Endpoint, &Arc<Workload>> =
            old.backends.iter().filter_map(|b| Some((&b.endpoint, b.workload.as_ref()?))).collect();
        // The same record, not only an equal one: the snapshot's is then the only one in memory.
        let same =
            |b: &Candidate| names.get(&b.endpoint).is_some_and(|known| Arc::ptr_eq(known, &b.workload));
        frontend.backends.iter().all(same)
    }
}

pub(super) fn same_in_kernel(old: &Port, frontend: &Frontend) -> bool {
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
    table.chunks(ENTRIES).map(<[Slot]>::to_vec).collect()
}
