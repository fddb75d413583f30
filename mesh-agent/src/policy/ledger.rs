//! What was planned for the kernel: for whom each set has verdicts there, within what there is room for.

use std::collections::{BTreeMap, BTreeSet};

use mesh_common::abi::{PlainKey, VerdictKey};

use super::plan::PolicyPlan;
use super::sets::{Set, Sets};
use super::table::{self, Source};

/// Rows of one set. A source has all its verdicts of a set or none: with some of them, others would stand for those that lack.
#[derive(Debug, Default)]
struct Rows {
    plain: usize,
    /// By source: in which families.
    sources: BTreeMap<u64, Vec<u16>>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ledger {
    capacity: usize,
    sets: BTreeMap<u32, Rows>,
    verdicts: usize,
    plain: usize,
    /// What an agent before this one left.
    adopted: (Vec<VerdictKey>, Vec<(u32, PlainKey)>),
    left_out: usize,
    plain_left_out: usize,
}

impl Ledger {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            sets: BTreeMap::new(),
            verdicts: 0,
            plain: 0,
            adopted: Default::default(),
            left_out: 0,
            plain_left_out: 0,
        }
    }

    /// Verdicts planned, for identities and for addresses.
    pub(super) fn used(&self) -> (usize, usize) {
        (self.verdicts, self.plain)
    }

    /// Pairs of set and source, and sets, that there was no room for.
    pub(super) fn left_out(&self) -> (usize, usize) {
        (self.left_out, self.plain_left_out)
    }

    pub(super) fn adopt(&mut self, verdicts: Vec<VerdictKey>, plain: Vec<(u32, PlainKey)>) {
        self.verdicts += verdicts.len();
        self.plain += plain.len();
        self.adopted = (verdicts, plain);
    }

    /// Drops what was adopted and not written anew.
    pub(super) fn drop_adopted(&mut self, plan: &mut PolicyPlan) {
        let (verdicts, plain) = std::mem::take(&mut self.adopted);
        // Only the set of those that nothing is known for has the same number for both agents: its rows were counted twice.
        let rows = |number: u32| self.sets.get(&number);
        let families = |key: &VerdictKey| rows(key.policies).and_then(|rows| rows.sources.get(&key.source));
        let (again, gone): (Vec<_>, Vec<_>) = verdicts
            .into_iter()
            .partition(|key| families(key).is_some_and(|families| families.contains(&key.family)));
        let (plain_again, gone_plain): (Vec<_>, Vec<_>) =
            plain.into_iter().partition(|(_, key)| rows(key.policies).is_some_and(|rows| rows.plain > 0));
        self.verdicts = self.verdicts.saturating_sub(again.len());
        self.plain = self.plain.saturating_sub(plain_again.len());
        plan.gone.extend(gone);
        plan.gone_plain.extend(gone_plain);
    }

    /// A set is used no more.
    pub(super) fn retire(&mut self, number: u32, set: &Set, plan: &mut PolicyPlan) {
        let Some(rows) = self.sets.remove(&number) else { return };
        for (identity, families) in &rows.sources {
            plan.gone.extend(table::keys(number, set, *identity, families));
        }
        if rows.plain > 0 {
            plan.gone_plain.extend(gone_plain(number, set));
        }
    }

    /// A source has gone.
    pub(super) fn forget(&mut self, identity: u64, sets: &Sets, plan: &mut PolicyPlan) {
        for (number, rows) in &mut self.sets {
            if let (Some(families), Some(set)) = (rows.sources.remove(&identity), sets.get(*number)) {
                plan.gone.extend(table::keys(*number, set, identity, &families));
            }
        }
    }

    /// A source is not what it was: its verdicts are written anew where it has any.
    pub(super) fn renew(&mut self, identity: u64, source: &Source, sets: &Sets, plan: &mut PolicyPlan) {
        for (number, rows) in &mut self.sets {
            let (Some(families), Some(set)) = (rows.sources.get_mut(&identity), sets.get(*number)) else {
                continue;
            };
            let now: Vec<u16> = source.families(set).collect();
            let new = now.iter().filter(|family| !families.contains(family)).count();
            let grown = new * set.port_count();
            if self.verdicts + grown > self.capacity {
                plan.gone.extend(table::keys(*number, set, identity, families));
                rows.sources.remove(&identity);
                continue;
            }
            self.verdicts += grown;
            let gone: Vec<u16> = families.iter().copied().filter(|family| !now.contains(family)).collect();
            plan.gone.extend(table::keys(*number, set, identity, &gone));
            let mut written = table::verdicts(*number, set, identity, source);
            // These are in use. Refusals first: what was refused under "all other ports" may now be refused by its own.
            written.sort_by_key(|(_, verdict)| verdict.allows());
            plan.verdicts.extend(written);
            *families = now;
        }
    }

    /// Writes what lacks: the sets of `local` workloads first, at the cost of others.
    pub(super) fn fill(
        &mut self,
        sets: &Sets,
        local: &BTreeSet<u32>,
        sources: &BTreeMap<u64, Source>,
        plan: &mut PolicyPlan,
    ) {
        (self.left_out, self.plain_left_out) = (0, 0);
        for (number, set) in sets.iter() {
            let rows = self.sets.entry(number).or_default();
            let wanted = if local.contains(&number) { table::plain_count(set) } else { 0 };
            if rows.plain > 0 && wanted == 0 {
                plan.gone_plain.extend(gone_plain(number, set));
                rows.plain = 0;
            } else if rows.plain == 0 && wanted > 0 {
                if self.plain + wanted > self.capacity {
                    self.plain_left_out += 1;
                    continue;
                }
                plan.plain.extend(table::plain(number, set));
                (rows.plain, self.plain) = (wanted, self.plain + wanted);
            }
        }
        let order = |near: bool| sets.iter().filter(move |(number, _)| local.contains(number) == near);
        for (near, (number, set)) in order(true).map(|s| (true, s)).chain(order(false).map(|s| (false, s))) {
            if self.sets.get(&number).is_some_and(|rows| rows.sources.len() == sources.len()) {
                continue;
            }
            for (identity, source) in sources {
                if self.sets.get(&number).is_some_and(|rows| rows.sources.contains_key(identity)) {
                    continue;
                }
                let families: Vec<u16> = source.families(set).collect();
                let wanted = families.len() * set.port_count();
                while near && self.verdicts + wanted > self.capacity && self.evict(sets, local, plan) {}
                if self.verdicts + wanted > self.capacity {
                    self.left_out += 1;
                    continue;
                }
                plan.verdicts.extend(table::verdicts(number, set, *identity, source));
                self.verdicts += wanted;
                self.sets.entry(number).or_default().sources.insert(*identity, families);
            }
        }
    }

    /// What a plan removes makes room when it is through.
    pub(super) fn settle(&mut self, plan: &PolicyPlan) {
        self.verdicts = self.verdicts.saturating_sub(plan.gone.len());
        self.plain = self.plain.saturating_sub(plan.gone_plain.len());
    }

    /// A verdict could not be written: all of its set and source count as not written.
    pub(super) fn failed(&mut self, key: &VerdictKey, sets: &Sets) {
        let Some(rows) = self.sets.get_mut(&key.policies) else { return };
        if let (Some(families), Some(set)) = (rows.sources.remove(&key.source), sets.get(key.policies)) {
            self.verdicts = self.verdicts.saturating_sub(families.len() * set.port_count());
        }
    }

    /// The same of a set's verdicts for addresses.
    pub(super) fn failed_plain(&mut self, number: u32) {
        if let Some(rows) = self.sets.get_mut(&number) {
            self.plain = self.plain.saturating_sub(std::mem::take(&mut rows.plain));
        }
    }

    /// Takes the verdicts of a set that no workload of this node has: their connections are judged by the proxy.
    fn evict(&mut self, sets: &Sets, local: &BTreeSet<u32>, plan: &mut PolicyPlan) -> bool {
        let far = |(number, rows): &(&u32, &mut Rows)| !local.contains(number) && !rows.sources.is_empty();
        let Some((number, rows)) = self.sets.iter_mut().rev().find(far) else { return false };
        let Some(set) = sets.get(*number) else { return false };
        // Evicted is done first: what the same plan renews of it would come back.
        plan.verdicts.retain(|(key, _)| key.policies != *number);
        for (identity, families) in std::mem::take(&mut rows.sources) {
            let keys = table::keys(*number, set, identity, &families);
            self.verdicts = self.verdicts.saturating_sub(keys.len());
            plan.evicted.extend(keys);
        }
        true
    }
}

fn gone_plain(number: u32, set: &Set) -> Vec<(u32, PlainKey)> {
    table::plain(number, set).into_iter().rev().map(|(prefix, key, _)| (prefix, key)).collect()
}
