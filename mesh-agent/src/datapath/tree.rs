//! A service's tree of pages, as it is in the kernel, and the pages that another list of backends would need.
//!
//! Entries keep their place from one version to the next, so that a change of one backend rewrites one leaf and what lies
//! above it; all other pages are shared with the version before.

use mesh_common::abi::{ENTRIES, Entry, Header, Page};

/// A backend number and its weight.
pub type Slot = (u32, u32);

/// The pages of one service port.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tree {
    /// Root page.
    pub root: u32,
    /// Leaves in order; none when the root is the only page. That is written anew with every change, so that nothing of it
    /// has to be known.
    pub leaves: Box<[Leaf]>,
    /// Pages between root and leaves, in order; none when the root can name all leaves.
    pub middle: Box<[Middle]>,
}

/// A leaf and what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// Its page.
    pub page: u32,
    /// Its entries.
    pub slots: Box<[Slot]>,
}

/// A page of the middle level and its children.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Middle {
    /// Its page.
    pub page: u32,
    /// Pages of its children and their weights.
    pub children: Box<[Slot]>,
}

/// What it takes to get from one tree to the next.
#[derive(Debug, Default)]
pub struct Growth {
    /// Pages to write, the root last.
    pub writes: Vec<(u32, Box<Page>)>,
    /// Pages of the old tree that the new one does not use.
    pub released: Vec<u32>,
}

impl Tree {
    /// All pages.
    pub fn pages(&self) -> impl Iterator<Item = u32> + '_ {
        let leaves = self.leaves.iter().map(|leaf| leaf.page);
        leaves.chain(self.middle.iter().map(|middle| middle.page)).chain([self.root])
    }

    /// Leaves that hold `slots` in place of what this tree holds: entries that stay keep their leaf, new ones fill gaps.
    ///
    /// `slots` names each backend once.
    pub fn rearranged(&self, slots: &[Slot]) -> Vec<Vec<Slot>> {
        let mut wanted: std::collections::HashMap<u32, u32> = slots.iter().copied().collect();
        let mut leaves: Vec<Vec<Slot>> = self
            .leaves
            .iter()
            .map(|leaf| {
                let kept = leaf.slots.iter().filter_map(|(backend, _)| wanted.remove_entry(backend));
                kept.collect()
            })
            .collect();
        let mut fresh = slots.iter().filter(|(backend, _)| wanted.contains_key(backend)).copied().peekable();
        for leaf in &mut leaves {
            leaf.extend(fresh.by_ref().take(ENTRIES - leaf.len()));
        }
        while fresh.peek().is_some() {
            leaves.push(fresh.by_ref().take(ENTRIES).collect());
        }
        // An empty leaf gives its place to the last one, so that no other moves.
        let mut at = 0;
        while at < leaves.len() {
            if leaves[at].is_empty() {
                leaves.swap_remove(at);
            } else {
                at += 1;
            }
        }
        leaves
    }

    /// The next version of this tree, with these leaves. `header` is that of the root but for its depth, its total and the
    /// number of its entries. `allocate` gives a free page, or none when there is no more: then nothing has happened.
    pub fn next(
        &self,
        leaves: Vec<Vec<Slot>>,
        header: Header,
        mut allocate: impl FnMut() -> Option<u32>,
    ) -> Option<(Self, Growth)> {
        let mut growth = Growth::default();
        let root = allocate()?;
        if leaves.len() <= 1 {
            let slots = leaves.into_iter().next().unwrap_or_default();
            let total = weight(&slots);
            growth.writes.push((root, page(Header { depth: 1, total, ..header }, &slots)));
            growth.released.extend(self.pages());
            return Some((Self { root, ..Self::default() }, growth));
        }
        let mut bottom = Vec::with_capacity(leaves.len());
        let mut middle = Vec::new();
        for (at, slots) in leaves.into_iter().enumerate() {
            let same = self.leaves.get(at).filter(|old| *old.slots == *slots);
            let number = match same {
                Some(old) => old.page,
                None => {
                    let number = allocate()?;
                    growth.writes.push((number, page(Header { depth: 1, ..Header::default() }, &slots)));
                    number
                }
            };
            bottom.push(Leaf { page: number, slots: slots.into() });
        }
        let children: Vec<Slot> = bottom.iter().map(|leaf| (leaf.page, weight(&leaf.slots))).collect();
        let total = weight(&children);
        if children.len() <= ENTRIES {
            growth.writes.push((root, page(Header { depth: 2, total, ..header }, &children)));
        } else {
            let mut top = Vec::new();
            for (at, children) in children.chunks(ENTRIES).enumerate() {
                let number = match self.middle.get(at).filter(|old| *old.children == *children) {
                    Some(old) => old.page,
                    None => {
                        let number = allocate()?;
                        growth
                            .writes
                            .push((number, page(Header { depth: 2, ..Header::default() }, children)));
                        number
                    }
                };
                top.push((number, weight(children)));
                middle.push(Middle { page: number, children: children.into() });
            }
            if top.len() > ENTRIES {
                return None;
            }
            growth.writes.push((root, page(Header { depth: 3, total, ..header }, &top)));
        }
        let tree = Self { root, leaves: bottom.into(), middle: middle.into() };
        let kept: std::collections::HashSet<u32> = tree.pages().collect();
        growth.released.extend(self.pages().filter(|page| !kept.contains(page)));
        Some((tree, growth))
    }
}

fn weight(slots: &[Slot]) -> u32 {
    slots.iter().map(|(_, weight)| *weight).sum()
}

fn page(mut header: Header, slots: &[Slot]) -> Box<Page> {
    debug_assert!(slots.len() <= ENTRIES, "a page holds {ENTRIES} entries");
    header.used = u8::try_from(slots.len()).unwrap_or(u8::MAX);
    let mut page = Box::new(Page { header, ..Page::default() });
    let mut upto = 0;
    for (entry, (child, weight)) in page.entries.iter_mut().zip(slots) {
        upto += weight;
        *entry = Entry { child: *child, upto };
    }
    page
}

#[cfg(test)]
#[path = "tree/tests.rs"]
mod tests;
