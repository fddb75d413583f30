//! Sets of policies, interned and numbered.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_common::policy::{Action, Mentions, Policy};

use super::catalog::Entry;
use super::numbers::Numbers;

/// What a set is, so that equal ones are one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum SetKey {
    /// Refuses everything, by the policy of that number.
    Refuse(u32),
    /// Asks the policies of these numbers, at the workload's own addresses where they count.
    Enforce { policies: Box<[u32]>, addresses: Option<Box<[IpAddr]>> },
}

/// A set in use. It never changes: another content is another set under another number.
#[derive(Debug)]
pub(super) struct Set {
    pub(super) key: SetKey,
    pub(super) policies: Box<[Arc<Entry>]>,
    pub(super) mentions: Mentions,
    users: usize,
}

impl Set {
    /// The names of those that ask for a match: nobody comes in whom none of them matches.
    pub(super) fn asking(&self) -> Option<Arc<str>> {
        asking(self.policies.iter(), false)
    }

    pub(super) fn policies(&self) -> impl Iterator<Item = &Policy> {
        self.policies.iter().filter_map(|entry| entry.policy())
    }

    /// Ports with verdicts of their own, and the one that stands for all others, which is written as 0.
    pub(super) fn ports(&self) -> impl Iterator<Item = (u16, u16)> {
        let other = self.mentions.other_port().map(|port| (0, port));
        // The others last: while a table is incomplete, no port goes by the verdict of the others that has its own.
        self.mentions.ports.iter().map(|port| (*port, *port)).chain(other)
    }

    pub(super) fn port_count(&self) -> usize {
        self.mentions.ports.len() + usize::from(self.mentions.other_port().is_some())
    }
}

/// The names of the ALLOW policies among these that are in force, or else of those in dry run.
pub(super) fn asking<'a>(entries: impl Iterator<Item = &'a Arc<Entry>>, dry_run: bool) -> Option<Arc<str>> {
    let asks = |policy: &Policy| policy.action == Action::Allow && policy.dry_run == dry_run;
    let names: Vec<&str> =
        entries.filter(|entry| entry.policy().is_some_and(asks)).map(|entry| &**entry.name()).collect();
    (!names.is_empty()).then(|| names.join(", ").into())
}

/// The sets in use, by number.
#[derive(Debug)]
pub(super) struct Sets {
    sets: BTreeMap<u32, Set>,
    numbers: HashMap<SetKey, u32>,
    last: u32,
}

impl Sets {
    /// The set of workloads that no policies are known for: always there, with this number, which means the same to every agent.
    pub(super) const NOT_ARRIVED: u32 = 1;

    pub(super) fn new() -> Self {
        let key = SetKey::Refuse(Numbers::NOT_ARRIVED);
        let set = Set { key: key.clone(), policies: Box::default(), mentions: Mentions::default(), users: 1 };
        Self {
            sets: BTreeMap::from([(Self::NOT_ARRIVED, set)]),
            numbers: HashMap::from([(key, Self::NOT_ARRIVED)]),
            last: Self::NOT_ARRIVED,
        }
    }

    /// From now on only numbers above `number`, which an agent before this one used.
    pub(super) fn skip(&mut self, number: u32) {
        self.last = self.last.max(number);
    }

    pub(super) fn get(&self, number: u32) -> Option<&Set> {
        self.sets.get(&number)
    }

    /// Whether that set refuses everything.
    pub(super) fn refuses(&self, number: u32) -> bool {
        self.get(number).is_some_and(|set| matches!(set.key, SetKey::Refuse(_)))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Set)> {
        self.sets.iter().map(|(number, set)| (*number, set))
    }

    pub(super) fn len(&self) -> usize {
        self.sets.len()
    }

    /// The number of the set that is like this, for one more user; 0 for one without policies.
    pub(super) fn acquire(&mut self, key: &SetKey, policies: &[Arc<Entry>]) -> u32 {
        if matches!(key, SetKey::Enforce { .. }) && policies.is_empty() {
            return 0;
        }
        if let Some(number) = self.numbers.get(key)
            && let Some(set) = self.sets.get_mut(number)
        {
            set.users += 1;
            return *number;
        }
        let number = loop {
            self.last = self.last.wrapping_add(1).max(Self::NOT_ARRIVED + 1);
            if !self.sets.contains_key(&self.last) {
                break self.last;
            }
        };
        let mentions = Mentions::of(policies.iter().filter_map(|entry| entry.policy()));
        let set = Set { key: key.clone(), policies: policies.into(), mentions, users: 1 };
        self.sets.insert(number, set);
        self.numbers.insert(key.clone(), number);
        number
    }

    /// One user less; the set, if that was the last.
    pub(super) fn release(&mut self, number: u32) -> Option<Set> {
        let set = self.sets.get_mut(&number)?;
        set.users -= 1;
        if set.users > 0 {
            return None;
        }
        let set = self.sets.remove(&number)?;
        self.numbers.remove(&set.key);
        Some(set)
    }
}
