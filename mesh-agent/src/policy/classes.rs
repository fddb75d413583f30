//! Workloads that the same policies apply to: those of a namespace that name the same ones.
//!
//! Nothing is kept for a single workload, unless policies ask for its own addresses.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_common::abi::identity_of;

use super::catalog::{Catalog, Entry, Hindrance};
use super::numbers::Numbers;
use super::sets::{Set, SetKey, Sets};
use crate::snapshot::Workload;

/// Which sets the workloads of a class have.
#[derive(Debug)]
struct Class {
    /// What applies, so that a change which is none is noticed.
    contents: Contents,
    bearing: Bearing,
    /// The set of all; unused where each has its own.
    common: u32,
    /// By identity: where their own addresses count.
    own: HashMap<u64, u32>,
    /// Its workloads are to be told of their sets.
    changed: bool,
    /// It has workloads; only while looking for those that have none.
    used: bool,
}

/// What the policies that apply ask for, beside verdicts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bearing {
    /// Some are in dry run: the agent is to be told of who is let in.
    pub rehearsed: bool,
    /// Some that are enforced have conditions on HTTP: what comes without TLS goes through the node proxy.
    pub steered: bool,
}

impl Bearing {
    /// Where none can be asked, nobody is let in.
    fn of(catalog: &Catalog, namespace: &str, named: &[Arc<str>]) -> Self {
        if catalog.hindrance(namespace, named).is_some() {
            return Self::default();
        }
        let policies = || catalog.applicable(namespace, named).filter_map(|entry| entry.policy());
        Self {
            rehearsed: policies().any(|policy| policy.dry_run),
            steered: policies().any(|policy| policy.http && !policy.dry_run),
        }
    }
}

#[derive(Debug, Clone)]
enum Contents {
    Refuse(u32),
    Enforce { entries: Box<[Arc<Entry>]>, own: bool },
}

impl Contents {
    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Refuse(a), Self::Refuse(b)) => a == b,
            (Self::Enforce { entries: a, .. }, Self::Enforce { entries: b, .. }) => {
                a.iter().map(|entry| entry.number).eq(b.iter().map(|entry| entry.number))
            }
            (Self::Refuse(_), Self::Enforce { .. }) | (Self::Enforce { .. }, Self::Refuse(_)) => false,
        }
    }

    fn acquire(&self, sets: &mut Sets, addresses: Option<&[IpAddr]>) -> u32 {
        match self {
            Self::Refuse(policy) => sets.acquire(&SetKey::Refuse(*policy), &[]),
            Self::Enforce { entries, own } => {
                let mut addresses: Option<Vec<IpAddr>> = addresses.filter(|_| *own).map(Into::into);
                addresses.iter_mut().for_each(|list| list.sort_unstable());
                let policies = entries.iter().map(|entry| entry.number).collect();
                sets.acquire(&SetKey::Enforce { policies, addresses: addresses.map(Into::into) }, entries)
            }
        }
    }

    fn is_own(&self) -> bool {
        matches!(self, Self::Enforce { own: true, .. })
    }
}

/// Sets that nobody uses any more, with their numbers.
pub(super) type Unused = Vec<(u32, Set)>;

/// Names of the policies that a workload names.
type Named = Box<[Arc<str>]>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Classes {
    classes: HashMap<Arc<str>, HashMap<Named, Class>>,
    /// Numbers of policies that are named and have not come.
    awaited: HashMap<Arc<str>, u32>,
}

impl Classes {
    /// How many classes there are, and how many policies are waited for.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.classes.values().map(HashMap::len).sum(), self.awaited.len())
    }

    /// Names of the policies that workloads name and that have not come.
    pub(super) fn awaited(&self) -> impl Iterator<Item = &Arc<str>> {
        self.awaited.keys()
    }

    /// Whether workloads of that namespace are known.
    pub(super) fn has_namespace(&self, namespace: &str) -> bool {
        self.classes.contains_key(namespace)
    }

    /// The number of a workload's set; that of workloads nothing is known for, if it has not been announced.
    pub(super) fn set_of(&self, workload: &Workload) -> u32 {
        let class =
            self.classes.get(&workload.account().namespace).and_then(|of| of.get(workload.policies()));
        match class {
            Some(class) if class.contents.is_own() => {
                let own = class.own.get(&identity_of(&workload.uid()).0);
                own.copied().unwrap_or(Sets::NOT_ARRIVED)
            }
            Some(class) => class.common,
            None => Sets::NOT_ARRIVED,
        }
    }

    /// What the policies that apply to a workload ask for.
    pub(super) fn bearing(&self, workload: &Workload) -> Bearing {
        let of = self.classes.get(&workload.account().namespace);
        of.and_then(|of| of.get(workload.policies())).map(|class| class.bearing).unwrap_or_default()
    }

    /// Makes sure that the workload has a set.
    pub(super) fn enter(
        &mut self,
        workload: &Workload,
        catalog: &Catalog,
        (sets, numbers): (&mut Sets, &mut Numbers),
        unused: &mut Unused,
    ) -> u32 {
        let namespace = &workload.account().namespace;
        let known = self.classes.get_mut(namespace).and_then(|of| of.get_mut(workload.policies()));
        let class = match known {
            Some(class) => class,
            None => {
                let named = workload.policies();
                let contents = contents(catalog, namespace, named, &mut self.awaited, numbers);
                let common = if contents.is_own() { 0 } else { contents.acquire(sets, None) };
                let bearing = Bearing::of(catalog, namespace, named);
                let own = HashMap::new();
                let class = Class { contents, bearing, common, own, changed: false, used: false };
                self.classes.entry(Arc::clone(namespace)).or_default().entry(named.into()).or_insert(class)
            }
        };
        class.admit(workload, sets, unused)
    }

    /// The workload has gone.
    pub(super) fn leave(&mut self, workload: &Workload, sets: &mut Sets, unused: &mut Unused) {
        let of = self.classes.get_mut(&workload.account().namespace);
        let class = of.and_then(|of| of.get_mut(workload.policies()));
        let own = class.and_then(|class| class.own.remove(&identity_of(&workload.uid()).0));
        release(own, sets, unused);
    }

    /// Looks again what applies to the classes that are `concerned`; whether anything changed, so that
    /// [`Classes::reenter`] is to be asked for every workload.
    pub(super) fn resolve(
        &mut self,
        concerned: impl Fn(&str, &[Arc<str>]) -> bool,
        catalog: &Catalog,
        (sets, numbers): (&mut Sets, &mut Numbers),
        unused: &mut Unused,
    ) -> bool {
        let mut any = false;
        for (namespace, of) in &mut self.classes {
            for (named, class) in of.iter_mut().filter(|(named, _)| concerned(namespace, named)) {
                let contents = contents(catalog, namespace, named, &mut self.awaited, numbers);
                let before = std::mem::replace(&mut class.bearing, Bearing::of(catalog, namespace, named));
                if contents.same(&class.contents) {
                    // The same, but the entries may be newer copies.
                    class.contents = contents;
                    let changed = class.bearing != before;
                    (class.changed, any) = (class.changed || changed, any || changed);
                    continue;
                }
                let before = (!class.contents.is_own()).then_some(class.common);
                class.contents = contents;
                // The new one first, so that a set that stays in use stays the same.
                class.common = if class.contents.is_own() { 0 } else { class.contents.acquire(sets, None) };
                release(before, sets, unused);
                (class.changed, any) = (true, true);
            }
        }
        self.stop_waiting(catalog, numbers);
        any
    }

    /// Forgets the policies that are waited for no more.
    fn stop_waiting(&mut self, catalog: &Catalog, numbers: &mut Numbers) {
        let named: HashSet<&Arc<str>> = self.classes.values().flat_map(HashMap::keys).flatten().collect();
        self.awaited.retain(|name, number| {
            let waited = named.contains(name) && catalog.get(name).is_none();
            if !waited {
                numbers.retire(*number);
            }
            waited
        });
    }

    /// The set of a workload, if its class changed.
    pub(super) fn reenter(
        &mut self,
        workload: &Workload,
        sets: &mut Sets,
        unused: &mut Unused,
    ) -> Option<u32> {
        let of = self.classes.get_mut(&workload.account().namespace)?;
        let class = of.get_mut(workload.policies()).filter(|class| class.changed)?;
        Some(class.admit(workload, sets, unused))
    }

    /// All workloads have been told of their sets.
    pub(super) fn told(&mut self, sets: &mut Sets, unused: &mut Unused) {
        for class in self.classes.values_mut().flat_map(HashMap::values_mut).filter(|class| class.changed) {
            class.changed = false;
            if !class.contents.is_own() {
                class.own.drain().for_each(|(_, number)| release(Some(number), sets, unused));
            }
        }
    }

    /// Drops the classes that none of these workloads is in, and the sets of single workloads that are none of these. Namespaces
    /// that are left without a workload.
    pub(super) fn retain<'a>(
        &mut self,
        workloads: impl Iterator<Item = &'a Arc<Workload>>,
        catalog: &Catalog,
        (sets, numbers): (&mut Sets, &mut Numbers),
        unused: &mut Unused,
    ) -> Vec<Arc<str>> {
        let mut single = HashSet::new();
        for workload in workloads {
            let of = self.classes.get_mut(&workload.account().namespace);
            if let Some(class) = of.and_then(|of| of.get_mut(workload.policies())) {
                class.used = true;
                if class.contents.is_own() {
                    single.insert(identity_of(&workload.uid()).0);
                }
            }
        }
        for of in self.classes.values_mut() {
            of.retain(|_, class| {
                let used = std::mem::take(&mut class.used);
                class.own.retain(|identity, number| {
                    let stays = used && single.contains(identity);
                    release((!stays).then_some(*number), sets, unused);
                    stays
                });
                if !used && !class.contents.is_own() {
                    release(Some(class.common), sets, unused);
                }
                used
            });
        }
        let empty = self.classes.extract_if(|_, of| of.is_empty()).map(|(namespace, _)| namespace).collect();
        self.stop_waiting(catalog, numbers);
        empty
    }
}

impl Class {
    fn admit(&mut self, workload: &Workload, sets: &mut Sets, unused: &mut Unused) -> u32 {
        if !self.contents.is_own() {
            return self.common;
        }
        let number = self.contents.acquire(sets, Some(&workload.addresses));
        release(self.own.insert(identity_of(&workload.uid()).0, number), sets, unused);
        number
    }
}

fn release(number: Option<u32>, sets: &mut Sets, unused: &mut Unused) {
    unused.extend(number.and_then(|number| Some((number, sets.release(number)?))));
}

fn contents(
    catalog: &Catalog,
    namespace: &str,
    named: &[Arc<str>],
    awaited: &mut HashMap<Arc<str>, u32>,
    numbers: &mut Numbers,
) -> Contents {
    match catalog.hindrance(namespace, named) {
        Some(Hindrance::NotArrived) => Contents::Refuse(Numbers::NOT_ARRIVED),
        Some(Hindrance::NotUnderstood(entry)) => Contents::Refuse(entry.number),
        Some(Hindrance::Awaited(name)) => {
            let number = awaited.entry(Arc::clone(name)).or_insert_with(|| numbers.give(name));
            Contents::Refuse(*number)
        }
        None => {
            let enforced = |entry: &&Arc<Entry>| entry.policy().is_some_and(|policy| !policy.dry_run);
            let entries: Box<[Arc<Entry>]> =
                catalog.applicable(namespace, named).filter(enforced).cloned().collect();
            let policies = entries.iter().filter_map(|entry| entry.policy());
            let own = mesh_common::policy::Mentions::of(policies).destination_ips;
            Contents::Enforce { entries, own }
        }
    }
}
