//! The owner's side: takes in policies and workloads, and plans what the kernel must hold.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::abi::{PlainKey, Verdict, VerdictKey, identity_of};
use tracing::warn;

use super::NOT_ARRIVED;
use super::catalog::{Cause, Entry, Touched};
use super::classes::{Bearing, Classes, Unused};
use super::ledger::Ledger;
use super::numbers::Numbers;
use super::plan::{PolicyPlan, VerdictMaps};
use super::sets::Sets;
use super::shared::Shared;
use super::table::Source;
use crate::identity::spiffe_of;
use crate::snapshot::{Authorization, Changed, PolicyUpdate, Snapshot, Workload};

/// How often is looked for sets that no workload has any more. Until then they only take room.
const SWEEP: Duration = Duration::from_secs(10);

/// Policies, and the sets of them that workloads have.
#[derive(Debug)]
pub struct Policies {
    node: Box<str>,
    shared: Arc<Shared>,
    numbers: Numbers,
    sets: Sets,
    classes: Classes,
    ledger: Ledger,
    sources: BTreeMap<u64, Source>,
    /// Something could not be written, or had no room.
    retry: bool,
    write_failures: u64,
    /// What is saved is not what is held.
    unsaved: bool,
    /// Workloads have gone since sets were last looked through, then.
    departed: bool,
    swept: Option<Instant>,
}

/// Figures for `/status` and metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// All policies have been named once, by the control plane or on disk.
    pub complete: bool,
    /// Policies held, those that are not understood among them.
    pub policies: usize,
    /// Policies that are not understood.
    pub not_understood: usize,
    /// Policies that workloads name and that have not come.
    pub awaited: usize,
    /// Workloads of this node that refuse everything since policies have not come at all.
    pub refusing_not_arrived: usize,
    /// Workloads of this node that refuse everything since a policy has not come or is not understood.
    pub refusing: usize,
    /// Sets of policies.
    pub sets: usize,
    /// Verdicts planned for the kernel, by identity.
    pub verdicts: usize,
    /// Verdicts planned for the kernel, by address.
    pub plain_verdicts: usize,
    /// Pairs of a set and a workload of this node that there was no room for.
    pub left_out: usize,
    /// Sets that there was no room for, by address.
    pub plain_left_out: usize,
    /// Plans of which something could not be written or removed.
    pub write_failures: u64,
}

impl Policies {
    /// For an agent on `node`, with room in the kernel for `capacity` verdicts of each kind.
    pub fn new(node: &str, capacity: usize) -> Self {
        Self {
            node: node.into(),
            shared: Arc::default(),
            numbers: Numbers::new(),
            sets: Sets::new(),
            classes: Classes::default(),
            ledger: Ledger::new(capacity),
            sources: BTreeMap::new(),
            retry: false,
            write_failures: 0,
            unsaved: false,
            departed: false,
            swept: None,
        }
    }

    /// Takes over what an agent before this one left in the kernel: the sets that peers have, and verdicts. Its numbers are
    /// not used again; what it left stays until [`Policies::drop_adopted`]. To be called first.
    pub fn adopt(
        &mut self,
        peers: impl Iterator<Item = u32>,
        verdicts: impl Iterator<Item = (VerdictKey, Verdict)>,
        plain: impl Iterator<Item = (u32, PlainKey, Verdict)>,
    ) {
        peers.for_each(|number| self.sets.skip(number));
        let mut seen = |number: u32, verdict: Verdict| {
            self.sets.skip(number);
            self.numbers.skip(verdict.policy);
        };
        let verdicts = verdicts.map(|(key, verdict)| {
            seen(key.policies, verdict);
            key
        });
        let verdicts = verdicts.collect();
        let plain = plain.map(|(prefix, key, verdict)| {
            seen(key.policies, verdict);
            (prefix, key)
        });
        let plain = plain.collect();
        self.ledger.adopt(verdicts, plain);
    }

    /// What an agent before this one left is to go: every peer that the kernel holds has been written since.
    pub fn drop_adopted(&mut self) -> PolicyPlan {
        let mut plan = PolicyPlan::default();
        self.ledger.drop_adopted(&mut plan);
        self.ledger.settle(&plan);
        plan
    }

    /// For whoever judges connections.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// What a change would change by content, for whoever keeps a record of it; `None`: nothing that counts before all have been named.
    /// With that they are all in it, as they will be.
    pub fn news(&self, update: &PolicyUpdate, complete: bool) -> Option<PolicyUpdate> {
        let catalog = self.shared.read();
        if !catalog.is_complete() {
            let held = catalog.entries().map(|entry| Arc::clone(&entry.authorization));
            let updated = held.chain(update.updated.iter().map(Arc::clone)).collect();
            return complete.then(|| PolicyUpdate { updated, removed: update.removed.clone() });
        }
        let known = |new: &Authorization| {
            catalog.get(&new.name).is_some_and(|known| match new.understood() {
                Some(_) => known.authorization.content == new.content,
                None => *known.authorization == *new,
            })
        };
        let new: BTreeSet<&str> =
            update.updated.iter().filter(|one| !known(one)).map(|one| &*one.name).collect();
        // All of a name that comes twice, since the last one counts.
        let updated: Vec<_> =
            update.updated.iter().filter(|one| new.contains(&*one.name)).map(Arc::clone).collect();
        let nothing = updated.is_empty() && !update.removed.iter().any(|name| catalog.get(name).is_some());
        (!nothing).then(|| PolicyUpdate { updated, removed: update.removed.clone() })
    }

    /// Takes in what was saved. The workloads of the snapshot are told of afterwards, as any others.
    pub fn restore(&mut self, saved: Vec<Arc<Authorization>>, snapshot: &Snapshot) -> PolicyPlan {
        self.apply(PolicyUpdate { updated: saved, removed: Vec::new() }, true, snapshot)
    }

    /// Takes in a change of policies. `complete`: all that there are have been named.
    pub fn apply(&mut self, update: PolicyUpdate, complete: bool, snapshot: &Snapshot) -> PolicyPlan {
        let touched = self.take(update, complete);
        let mut plan = PolicyPlan::default();
        if !touched.is_empty() {
            let mut unused = Unused::new();
            self.resolve(&touched, snapshot, &mut plan, &mut unused);
            self.finish(unused, &mut plan);
            self.shared.tell();
        }
        plan
    }

    /// Takes in workloads that came, changed or went; the snapshot has taken them in.
    pub fn workloads(&mut self, changed: &Changed, snapshot: &Snapshot) -> PolicyPlan {
        let (mut plan, mut unused) = (PolicyPlan::default(), Unused::new());
        let mut touched = Touched::default();
        for workload in &changed.workloads {
            if snapshot.holds(workload) {
                let namespace = &workload.account().namespace;
                if !self.classes.has_namespace(namespace) && self.shared.write().namespace(namespace, true) {
                    touched.everybody();
                }
                let numbers = (&mut self.sets, &mut self.numbers);
                let set = self.classes.enter(workload, &self.shared.read(), numbers, &mut unused);
                plan.sets.push((Arc::clone(workload), set));
            } else {
                self.classes.leave(workload, &mut self.sets, &mut unused);
            }
            let uid = workload.uid();
            self.source(identity_of(&uid).0, snapshot.workload(&uid), &mut plan);
            self.departed = true;
        }
        if !touched.is_empty() {
            plan.sets.clear();
            self.resolve(&touched, snapshot, &mut plan, &mut unused);
            let told = changed.workloads.iter().filter(|workload| snapshot.holds(workload));
            plan.sets = told
                .map(|workload| (Arc::clone(workload), self.classes.set_of(workload)))
                .chain(std::mem::take(&mut plan.sets))
                .collect();
            self.shared.tell();
        }
        self.finish(unused, &mut plan);
        plan
    }

    /// Does again what failed, and drops what has no use any more.
    pub fn tick(&mut self, snapshot: &Snapshot, now: Instant) -> PolicyPlan {
        let mut plan = PolicyPlan::default();
        let due = self.swept.is_none_or(|swept| now.saturating_duration_since(swept) >= SWEEP);
        let sweep = due && std::mem::take(&mut self.departed);
        if !sweep && !self.retry {
            return plan;
        }
        let mut unused = Unused::new();
        if sweep {
            self.swept = Some(now);
            let numbers = (&mut self.sets, &mut self.numbers);
            let catalog = self.shared.read();
            let empty = self.classes.retain(snapshot.workloads(), &catalog, numbers, &mut unused);
            drop(catalog);
            let mut others = false;
            for namespace in &empty {
                others |= self.shared.write().namespace(namespace, false);
            }
            if others {
                let mut touched = Touched::default();
                touched.everybody();
                self.resolve(&touched, snapshot, &mut plan, &mut unused);
                self.shared.tell();
            }
        }
        self.finish(unused, &mut plan);
        plan
    }

    /// Writes the first part of a plan. Peers come next, and then [`Policies::clean`].
    pub fn write(&mut self, plan: &PolicyPlan, maps: &mut impl VerdictMaps) {
        let failed = plan.write(maps);
        failed.verdicts.iter().for_each(|key| self.ledger.failed(key, &self.sets));
        failed.plain.iter().for_each(|number| self.ledger.failed_plain(*number));
        self.retry |= !(failed.verdicts.is_empty() && failed.plain.is_empty());
        self.complain(failed.reason.map_or(Ok(()), Err));
    }

    /// The last part of a plan, when all peers are written.
    pub fn clean(&mut self, plan: &PolicyPlan, maps: &mut impl VerdictMaps) {
        let outcome = plan.clean(maps);
        self.complain(outcome);
    }

    /// The number of the workload's set of policies, as [`mesh_common::abi::Peer`] wants it.
    pub fn set_of(&self, workload: &Workload) -> u32 {
        self.classes.set_of(workload)
    }

    /// Why the policy of that name refuses, if it does.
    pub fn cause(&self, name: &str) -> Cause {
        match self.shared.read().get(name) {
            _ if name == NOT_ARRIVED => Cause::NotArrived,
            None => Cause::Awaited,
            Some(entry) if entry.policy().is_none() => Cause::NotUnderstood,
            Some(_) => Cause::Rule,
        }
    }

    /// What the policies that apply to the workload ask for, beside verdicts.
    pub fn bearing(&self, workload: &Workload) -> Bearing {
        self.classes.bearing(workload)
    }

    /// The policy of that number, which a verdict may bear: its name, or [`super::NOT_ARRIVED`].
    pub fn name(&self, number: u32) -> Option<Arc<str>> {
        self.numbers.name(number).cloned()
    }

    /// Whether policies apply to some workload of this node.
    pub fn guard_here(&self) -> bool {
        self.sources.values().any(|source| self.classes.set_of(&source.workload) != 0)
    }

    /// The ALLOW policies of a set, of which none matches where a verdict bears no policy.
    pub fn asking(&self, set: u32) -> Option<Arc<str>> {
        self.sets.get(set)?.asking()
    }

    /// Name and version of each policy that is held.
    pub fn versions(&self) -> HashMap<String, String> {
        let catalog = self.shared.read();
        let version =
            |entry: &Arc<Entry>| (entry.name().to_string(), entry.authorization.version().to_owned());
        catalog.entries().map(version).collect()
    }

    /// All policies, for the copy on disk; `None` while not all are known.
    pub fn held(&self) -> Option<Vec<Arc<Authorization>>> {
        let catalog = self.shared.read();
        let held = || catalog.entries().map(|entry| Arc::clone(&entry.authorization)).collect();
        catalog.is_complete().then(held)
    }

    /// Whether [`Policies::held`] has changed since this was last asked.
    pub fn take_unsaved(&mut self) -> bool {
        std::mem::take(&mut self.unsaved)
    }

    /// Names of the policies that workloads name and that have not come.
    pub fn awaited(&self) -> Vec<Arc<str>> {
        self.classes.awaited().cloned().collect()
    }

    /// Whether all policies have been named once, by the control plane or on disk.
    pub fn are_complete(&self) -> bool {
        self.shared.read().is_complete()
    }

    /// Figures.
    pub fn counts(&self) -> Counts {
        let catalog = self.shared.read();
        let (verdicts, plain_verdicts) = self.ledger.used();
        let (left_out, plain_left_out) = self.ledger.left_out();
        let sets = self.sources.values().map(|source| self.classes.set_of(&source.workload));
        let (not_arrived, others): (Vec<u32>, Vec<u32>) = sets.partition(|set| *set == Sets::NOT_ARRIVED);
        Counts {
            complete: catalog.is_complete(),
            policies: catalog.entries().count(),
            not_understood: catalog.entries().filter(|entry| entry.policy().is_none()).count(),
            awaited: self.classes.counts().1,
            refusing_not_arrived: not_arrived.len(),
            refusing: others.into_iter().filter(|set| self.sets.refuses(*set)).count(),
            sets: self.sets.len(),
            verdicts,
            plain_verdicts,
            left_out,
            plain_left_out,
            write_failures: self.write_failures,
        }
    }

    /// Puts the change in the catalog; whom it concerns.
    fn take(&mut self, update: PolicyUpdate, complete: bool) -> Touched {
        let mut touched = Touched::default();
        let mut catalog = self.shared.write();
        for authorization in update.updated {
            let known = catalog.get(&authorization.name);
            self.unsaved |= known.is_none_or(|known| known.authorization != authorization);
            // Some control planes send everything at each change.
            if known.is_some_and(|known| known.authorization.content == authorization.content) {
                let number = known.map_or(0, |known| known.number);
                catalog.put(Arc::new(Entry { number, authorization }), &mut Touched::default());
                continue;
            }
            let number = self.numbers.give(&authorization.name);
            if let Some(old) = catalog.put(Arc::new(Entry { number, authorization }), &mut touched) {
                self.numbers.retire(old.number);
            }
        }
        for name in update.removed {
            if let Some(old) = catalog.take(&name, &mut touched) {
                self.unsaved = true;
                self.numbers.retire(old.number);
            }
        }
        if complete && !catalog.is_complete() {
            catalog.set_complete();
            self.unsaved = true;
            touched.everybody();
        }
        touched
    }

    fn resolve(
        &mut self,
        touched: &Touched,
        snapshot: &Snapshot,
        plan: &mut PolicyPlan,
        unused: &mut Unused,
    ) {
        let concerned = |namespace: &str, named: &[Arc<str>]| touched.concerns(namespace, named);
        let numbers = (&mut self.sets, &mut self.numbers);
        if self.classes.resolve(concerned, &self.shared.read(), numbers, unused) {
            for workload in snapshot.workloads() {
                if let Some(set) = self.classes.reenter(workload, &mut self.sets, unused) {
                    plan.sets.push((Arc::clone(workload), set));
                }
            }
            self.classes.told(&mut self.sets, unused);
        }
    }

    /// A workload may be a source as well, if it is of this node.
    fn source(&mut self, identity: u64, workload: Option<&Arc<Workload>>, plan: &mut PolicyPlan) {
        let Some(workload) = workload.filter(|workload| *workload.node == *self.node) else {
            if self.sources.remove(&identity).is_some() {
                self.ledger.forget(identity, &self.sets, plan);
            }
            return;
        };
        let source = Source { workload: Arc::clone(workload), identity: spiffe_of(workload).ok() };
        let before = self.sources.insert(identity, source.clone());
        // A connection that is open may now be judged otherwise.
        let judged = |workload: &Workload| (workload.policies().to_vec(), workload.addresses.to_vec());
        if before.as_ref().is_some_and(|before| judged(&before.workload) != judged(workload)) {
            self.shared.tell();
        }
        let same = |before: &Source| {
            let (a, b) = (&before.workload, &source.workload);
            before.identity == source.identity
                && *a.addresses == *b.addresses
                && a.host_network == b.host_network
        };
        if before.is_some_and(|before| !same(&before)) {
            self.ledger.renew(identity, &source, &self.sets, plan);
        }
    }

    fn finish(&mut self, unused: Unused, plan: &mut PolicyPlan) {
        for (number, set) in &unused {
            self.ledger.retire(*number, set, plan);
        }
        let local: BTreeSet<u32> =
            self.sources.values().map(|source| self.classes.set_of(&source.workload)).collect();
        self.ledger.fill(&self.sets, &local, &self.sources, plan);
        let freed = !(plan.gone.is_empty() && plan.gone_plain.is_empty());
        self.retry = freed && self.ledger.left_out() != (0, 0);
        self.ledger.settle(plan);
    }

    fn complain(&mut self, outcome: Result<(), String>) {
        if let Err(reason) = outcome {
            self.write_failures += 1;
            warn!(reason, "verdicts could not be written; what lacks one is refused until it can");
        }
    }
}

#[cfg(test)]
mod tests;
