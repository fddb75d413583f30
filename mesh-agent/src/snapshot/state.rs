//! Everything known, and who belongs to whom.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::authorization::Authorization;
use super::model::{Delta, Membership, Resource, Service, Version, Versioned, Workload};
use super::records::{Entry, Services, Workloads};

/// Services and workloads by name, and the members of each service.
#[derive(Debug, Default)]
pub struct Snapshot {
    services: Services,
    workloads: Workloads,
    /// Sorted by uid; a service may have members before (or without) a record of its own.
    members: HashMap<Arc<str>, Vec<Arc<Workload>>>,
}

/// What an update changed, by content: a resource sent again as it was is not in here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changed {
    /// Services whose own record, or any of whose members, changed or went.
    pub services: BTreeSet<Arc<str>>,
    /// Workloads that came or changed, as they are now, and that went, as they were.
    pub workloads: Vec<Arc<Workload>>,
}

impl Changed {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && self.workloads.is_empty()
    }
}

/// The resources of a snapshot at one moment, and policies, for saving them elsewhere while the snapshot moves on.
#[derive(Debug, Clone, Default)]
pub struct Held {
    pub(super) resources: Vec<(Resource, Version)>,
    pub(super) policies: Option<Vec<Arc<Authorization>>>,
    /// The last change that is in it, by its number in the journal.
    pub(super) sequence: u64,
}

impl Held {
    /// With the policies, which lie elsewhere. `None`: they are not known.
    pub fn with_policies(self, policies: Option<Vec<Arc<Authorization>>>) -> Self {
        Self { policies, ..self }
    }

    /// With the number of the last change that is in it.
    pub fn with_sequence(self, sequence: u64) -> Self {
        Self { sequence, ..self }
    }

    /// The number of the last change that is in it.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Takes the policies out; `None`: they were not known.
    pub fn take_policies(&mut self) -> Option<Vec<Arc<Authorization>>> {
        self.policies.take()
    }
}

impl Snapshot {
    /// One that knows nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a change in. Removing a name wins over updating it in the same delta.
    pub fn apply(&mut self, delta: Delta) -> Changed {
        let mut changed = Changed::default();
        for Versioned { name: _, version, resource } in delta.updated {
            self.put(resource, version, &mut changed);
        }
        for name in delta.removed {
            self.remove(&name, &mut changed);
        }
        self.fit_members(&changed);
        changed
    }

    /// What a change would change by content; `None`: nothing.
    pub fn news(&self, delta: &Delta) -> Option<Delta> {
        let known = |resource: &Resource| match resource {
            Resource::Service(service) => self.service(&service.key) == Some(service),
            Resource::Workload(workload) => self.holds(workload),
        };
        let held = |name: &String| self.service(name).is_some() || self.workload(name).is_some();
        let new: HashSet<&str> =
            delta.updated.iter().filter(|one| !known(&one.resource)).map(|one| &*one.name).collect();
        // All of a name that comes twice, since the last one counts.
        let updated: Vec<_> =
            delta.updated.iter().filter(|update| new.contains(&*update.name)).cloned().collect();
        let nothing = updated.is_empty() && !delta.removed.iter().any(held);
        // What is updated and removed at once is removed, so all these count.
        (!nothing).then(|| Delta { updated, removed: delta.removed.clone() })
    }

    /// Takes in what was held before.
    pub fn restore(&mut self, held: Held) -> Changed {
        let mut changed = Changed::default();
        for (resource, version) in held.resources {
            self.put(resource, version, &mut changed);
        }
        self.fit_members(&changed);
        changed
    }

    /// The service of that key.
    pub fn service(&self, key: &str) -> Option<&Arc<Service>> {
        self.services.get(key).map(|entry| &entry.record)
    }

    /// The workload of that uid.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid).map(|entry| &entry.record)
    }

    /// Whether this is what is known of a workload.
    pub fn holds(&self, workload: &Workload) -> bool {
        self.workloads.same(workload).is_some_and(|entry| *entry.record == *workload)
    }

    /// All services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.iter().map(|entry| &entry.record)
    }

    /// All workloads, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.iter().map(|entry| &entry.record)
    }

    /// The workloads of a service in order of their uids, each with its membership.
    pub fn members<'a>(
        &'a self,
        service: &str,
    ) -> impl Iterator<Item = (&'a Arc<Workload>, &'a Membership)> + use<'a> {
        let entry = self.members.get_key_value(service);
        entry
            .into_iter()
            .flat_map(|(key, list)| list.iter().filter_map(move |w| w.membership(key).map(|of| (w, of))))
    }

    /// How many services are known.
    pub fn service_count(&self) -> usize {
        self.services.len()
    }

    /// How many workloads are known.
    pub fn workload_count(&self) -> usize {
        self.workloads.len()
    }

    /// Name and version of every resource, as a control plane wants to hear them when a stream begins.
    pub fn versions(&self) -> HashMap<String, String> {
        let services = self.services.iter().map(|e| (e.record.key.to_string(), e.version.to_string()));
        let workloads = self.workloads.iter().map(|e| (e.record.uid(), e.version.to_string()));
        services.chain(workloads).collect()
    }

    /// All resources as they are now. Cheap: it clones references (16 bytes a resource and a version), so the slow part,
    /// [`super::disk::save`], can be done by another thread.
    pub fn held(&self) -> Held {
        let services =
            self.services.iter().map(|e| (Resource::Service(Arc::clone(&e.record)), e.version.clone()));
        let workloads =
            self.workloads.iter().map(|e| (Resource::Workload(Arc::clone(&e.record)), e.version.clone()));
        Held { resources: services.chain(workloads).collect(), policies: None, sequence: 0 }
    }

    fn put(&mut self, resource: Resource, version: Version, changed: &mut Changed) {
        match resource {
            Resource::Service(service) => self.put_service(service, version, changed),
            Resource::Workload(workload) => self.put_workload(workload, version, changed),
        }
    }

    fn put_service(&mut self, service: Arc<Service>, version: Version, changed: &mut Changed) {
        let old = self.services.put(Entry { version, record: Arc::clone(&service) });
        if old.is_none_or(|old| old.record != service) {
            changed.services.insert(Arc::clone(&service.key));
        }
    }

    fn put_workload(&mut self, workload: Arc<Workload>, version: Version, changed: &mut Changed) {
        let entry = Entry { version: version.clone(), record: Arc::clone(&workload) };
        let old = self.workloads.put(entry).map(|entry| entry.record);
        if old.as_ref() == Some(&workload) {
            // The members hold the old record, which is equal: keep one of the two, not both.
            let again = old.map(|record| Entry { version, record });
            again.and_then(|entry| self.workloads.put(entry));
            return;
        }
        let before: &[Membership] = old.as_ref().map_or(&[], |old| old.memberships());
        let itself = old.as_ref().is_none_or(|old| !same_backend(old, &workload));
        for membership in before {
            let now = workload.membership(&membership.service);
            if now.is_none() {
                self.leave(&membership.service, &workload);
            }
            if itself || now != Some(membership) {
                changed.services.insert(Arc::clone(&membership.service));
            }
        }
        for membership in workload.memberships() {
            if !before.iter().any(|m| m.service == membership.service) {
                changed.services.insert(Arc::clone(&membership.service));
            }
            self.join(&membership.service, &workload);
        }
        changed.workloads.push(workload);
    }

    fn remove(&mut self, name: &str, changed: &mut Changed) {
        if let Some(old) = self.services.take(name) {
            changed.services.insert(Arc::clone(&old.record.key));
        }
        if let Some(old) = self.workloads.take(name) {
            for membership in old.record.memberships() {
                self.leave(&membership.service, &old.record);
                changed.services.insert(Arc::clone(&membership.service));
            }
            changed.workloads.push(old.record);
        }
    }

    fn join(&mut self, service: &Arc<str>, workload: &Arc<Workload>) {
        let list = self.members.entry(Arc::clone(service)).or_default();
        match list.binary_search_by(|member| parts(member).cmp(&parts(workload))) {
            Ok(at) => list[at] = Arc::clone(workload),
            Err(at) => list.insert(at, Arc::clone(workload)),
        }
    }

    fn leave(&mut self, service: &str, workload: &Workload) {
        let Some(list) = self.members.get_mut(service) else { return };
        if let Ok(at) = list.binary_search_by(|member| parts(member).cmp(&parts(workload))) {
            list.remove(at);
        }
        if list.is_empty() {
            self.members.remove(service);
        }
    }

    /// Gives back the room that lists of members grew into: they are many, and most are short.
    fn fit_members(&mut self, changed: &Changed) {
        for service in &changed.services {
            if let Some(list) = self.members.get_mut(service) {
                list.shrink_to_fit();
            }
        }
    }
}

/// The uid in its parts, by which members are ordered.
fn parts(workload: &Workload) -> (&str, &str) {
    (&workload.account().prefix, &workload.name)
}

/// Whether two records of a workload are the same but for the services that it belongs to.
fn same_backend(a: &Workload, b: &Workload) -> bool {
    a.place == b.place && a.addresses == b.addresses && a.account() == b.account()
}

#[cfg(test)]
mod tests;
