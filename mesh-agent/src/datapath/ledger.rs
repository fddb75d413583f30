//! What is in the kernel, as the agent knows it, and the plan of writes that leads to what should be there.
//!
//! Pure: [`Ledger::plan_put`] and [`Ledger::plan_remove`] say what to write and change nothing; [`Ledger::commit`] notes
//! that it has been written. Writes are in an order in which an agent may die after each: what is new is written where
//! nothing points yet, then the pointer, then what is old is freed.

mod plan;

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use mesh_common::abi::{Algorithm, Backend, Endpoint, ServiceKey};

use self::plan::same_in_kernel;
pub use self::plan::{Change, Refusal, Reused, Write};
use super::desired::Frontend;
use super::pool::Pool;
use super::tree::Tree;
use crate::config::MapSizes;
use crate::snapshot::Workload;

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
    pub backends: Box<[Known]>,
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
    pub workload: Option<Arc<Workload>>,
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
    /// In boxes, since a table has room for more than it holds.
    ports: HashMap<ServiceKey, Box<Port>>,
    /// The same by owner.
    owned: BTreeSet<(Arc<str>, ServiceKey)>,
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
        ports: HashMap<ServiceKey, Box<Port>>,
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
            owned: BTreeSet::new(),
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
    pub fn ports(&self) -> &HashMap<ServiceKey, Box<Port>> {
        &self.ports
    }

    /// Takes a key from its service without a change in the kernel: another service may claim it, or it is removed.
    pub fn disown(&mut self, key: &ServiceKey) {
        let Some(owner) = self.ports.get_mut(key).and_then(|port| port.owner.take()) else { return };
        self.owned.remove(&(owner, *key));
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
    pub fn owned(&self, service: &Arc<str>) -> Vec<ServiceKey> {
        let from = (Arc::clone(service), ServiceKey::default());
        self.owned.range(from..).take_while(|(owner, _)| owner == service).map(|(_, key)| *key).collect()
    }

    /// Keys that belong to no service of the snapshot, and those that lead nowhere.
    pub fn unowned(&self) -> Vec<ServiceKey> {
        let unnamed = self.ports.iter().filter(|(_, port)| port.owner.is_none()).map(|(key, _)| *key);
        unnamed.chain(self.broken.iter().copied()).collect()
    }

    /// Services that own something.
    pub fn owners(&self) -> BTreeSet<&Arc<str>> {
        self.owned.iter().map(|(owner, _)| owner).collect()
    }

    /// Whether the kernel held something else under this key when the agent started, and nobody has claimed it since.
    pub fn found_different(&self, frontend: &Frontend) -> bool {
        self.ports
            .get(&frontend.key)
            .is_some_and(|port| port.owner.is_none() && !same_in_kernel(port, frontend))
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
                    self.owned.insert((Arc::clone(owner), change.key));
                }
                let old = self.ports.insert(change.key, Box::new(port));
                self.entries += usize::from(old.is_none() && !was_broken);
                return;
            }
            None => self.ports.remove(&change.key),
        };
        self.entries -= usize::from(old.is_some() || was_broken);
        if let Some(owner) = old.and_then(|old| old.owner) {
            self.owned.remove(&(owner, change.key));
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

#[cfg(test)]
#[path = "ledger/tests.rs"]
mod tests;
