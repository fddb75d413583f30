//! Reads back what is in the kernel: after a restart the agent goes on from there.

use std::collections::{HashMap, HashSet};

use mesh_common::abi::{Algorithm, Backend, ENTRIES, MAX_DEPTH, Page, Pointer, ServiceKey};

use super::ledger::{Known, Port};
use super::tree::{Leaf, Middle, Slot, Tree};

/// The contents of the maps that hold services.
pub struct Contents<'a> {
    /// `SERVICES`.
    pub services: Vec<(ServiceKey, Pointer)>,
    /// `PAGES`, by number.
    pub page: Lookup<'a, Page>,
    /// `BACKENDS`, by number.
    pub backend: Lookup<'a, Backend>,
}

/// Reads an entry of an array; `None` beyond its end.
pub type Lookup<'a, V> = Box<dyn Fn(u32) -> Option<V> + 'a>;

/// The service ports that can be read, and the keys that lead nowhere.
pub fn adopt(contents: &Contents<'_>) -> (HashMap<ServiceKey, Box<Port>>, HashSet<ServiceKey>) {
    let mut ports = HashMap::with_capacity(contents.services.len());
    let mut broken = HashSet::new();
    for (key, pointer) in &contents.services {
        match port(contents, key, *pointer) {
            Some(port) => {
                ports.insert(*key, Box::new(port));
            }
            None => {
                broken.insert(*key);
            }
        }
    }
    (ports, broken)
}

fn port(contents: &Contents<'_>, key: &ServiceKey, pointer: Pointer) -> Option<Port> {
    let root = (contents.page)(pointer.page())?;
    let header = root.header;
    if header.key != *key || header.generation != pointer.generation() || header.service == 0 {
        return None;
    }
    let algorithm = Algorithm::from_number(header.algorithm);
    let mut bottom = Vec::new();
    let mut middle = Vec::new();
    let entries = slots(&root)?;
    match u32::from(header.depth) {
        1 => {}
        2 => bottom = leaves(&contents.page, &entries)?,
        MAX_DEPTH => {
            for (page, _) in &*entries {
                let children = slots(&(contents.page)(*page)?)?;
                bottom.extend(leaves(&contents.page, &children)?);
                middle.push(Middle { page: *page, children });
            }
        }
        _ => return None,
    }
    let tree = Tree { root: pointer.page(), leaves: bottom.into(), middle: middle.into() };
    let mut backends: HashMap<u32, Known> = HashMap::new();
    let bottom = tree.leaves.iter().flat_map(|leaf| &*leaf.slots);
    let only = if header.depth == 1 { &*entries } else { &[] };
    for (number, weight) in bottom.chain(only) {
        let slot = (contents.backend)(*number).filter(|slot| slot.service == header.service)?;
        // A Maglev table does not hold the weights; they are known again with the first snapshot.
        backends.entry(*number).or_insert(Known {
            number: *number,
            endpoint: slot.endpoint,
            weight: *weight,
            workload: None,
        });
    }
    let mut backends: Vec<Known> = backends.into_values().collect();
    backends.sort_unstable_by_key(|known| known.number);
    Some(Port {
        number: header.service,
        owner: None,
        algorithm,
        affinity_seconds: header.affinity_seconds,
        generation: header.generation,
        tree,
        backends: backends.into(),
    })
}

fn leaves(page: &Lookup<'_, Page>, children: &[Slot]) -> Option<Vec<Leaf>> {
    let leaf = |(number, _): &Slot| Some(Leaf { page: *number, slots: slots(&page(*number)?)? });
    children.iter().map(leaf).collect()
}

/// The entries of a page with their own weights.
fn slots(page: &Page) -> Option<Box<[Slot]>> {
    let used = usize::from(page.header.used);
    if used > ENTRIES {
        return None;
    }
    let mut before = 0;
    let mut slots = Vec::with_capacity(used);
    for entry in &page.entries[..used] {
        slots.push((entry.child, entry.upto.checked_sub(before)?));
        before = entry.upto;
    }
    Some(slots.into())
}
