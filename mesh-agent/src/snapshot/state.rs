//! Everything known, and who belongs to whom.

use std::borrow::Borrow;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::model::{Delta, Membership, Resource, Service, Version, Versioned, Workload};

/// Services and workloads by name, and the members of each service.
#[derive(Debug, Default)]
pub struct Snapshot {
    services: HashSet<Entry<Service>>,
    workloads: HashSet<Entry<Workload>>,
    /// Sorted by uid; a service may have members before (or without) a record of its own.
    members: HashMap<Arc<str>, Vec<Arc<Workload>>>,
}

/// What an update changed, by content: a resource sent again as it was is not in here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changed {
    /// Services whose own record, or any of whose members, changed or went.
    pub services: BTreeSet<Arc<str>>,
    /// Workloads that came, changed or went.
    pub workloads: BTreeSet<Arc<str>>,
}

impl Changed {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && self.workloads.is_empty()
    }
}

/// The resources of a snapshot at one moment, for saving them elsewhere while the snapshot moves on.
#[derive(Debug, Clone, Default)]
pub struct Held(pub(super) Vec<(Resource, Version)>);

impl Snapshot {
    /// One that knows nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a change in. Removing a name wins over updating it in the same delta.
    pub fn apply(&mut self, delta: Delta) -> Changed {
        let mut changed = Changed::default();
        for Versioned { name: _, version, resource } in delta.updated {
            match resource {
                Resource::Service(service) => self.put_service(service, version, &mut changed),
                Resource::Workload(workload) => self.put_workload(workload, version, &mut changed),
            }
        }
        for name in delta.removed {
            self.remove(&name, &mut changed);
        }
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
        let workloads = self.workloads.iter().map(|e| (e.record.uid.to_string(), e.version.to_string()));
        services.chain(workloads).collect()
    }

    /// All resources as they are now. Cheap: it clones references (16 bytes a resource and a version), so the slow part,
    /// [`super::disk::save`], can be done by another thread.
    pub fn held(&self) -> Held {
        let services =
            self.services.iter().map(|e| (Resource::Service(Arc::clone(&e.record)), e.version.clone()));
        let workloads =
            self.workloads.iter().map(|e| (Resource::Workload(Arc::clone(&e.record)), e.version.clone()));
        Held(services.chain(workloads).collect())
    }

    fn put_service(&mut self, service: Arc<Service>, version: Version, changed: &mut Changed) {
        let old = self.services.replace(Entry { version, record: Arc::clone(&service) });
        if old.is_none_or(|old| old.record != service) {
            changed.services.insert(Arc::clone(&service.key));
        }
    }

    fn put_workload(&mut self, workload: Arc<Workload>, version: Version, changed: &mut Changed) {
        let old = self.workloads.replace(Entry { version, record: Arc::clone(&workload) }).map(|e| e.record);
        if old.as_ref() == Some(&workload) {
            // The index holds the old record, which is equal: keep one of the two, not both.
            if let (Some(old), Some(entry)) = (old, self.workloads.take(&*workload.uid)) {
                self.workloads.insert(Entry { record: old, ..entry });
            }
            return;
        }
        let before: &[Membership] = old.as_ref().map_or(&[], |old| &old.memberships);
        let itself = old.as_ref().is_none_or(|old| !same_backend(old, &workload));
        for membership in before {
            let now = workload.membership(&membership.service);
            if now.is_none() {
                self.leave(&membership.service, &workload.uid);
            }
            if itself || now != Some(membership) {
                changed.services.insert(Arc::clone(&membership.service));
            }
        }
        for membership in workload.memberships.iter() {
            if !before.iter().any(|m| m.service == membership.service) {
                changed.services.insert(Arc::clone(&membership.service));
            }
            self.join(&membership.service, &workload);
        }
        changed.workloads.insert(Arc::clone(&workload.uid));
    }

    fn remove(&mut self, name: &str, changed: &mut Changed) {
        if let Some(old) = self.services.take(name) {
            changed.services.insert(Arc::clone(&old.record.key));
        }
        if let Some(old) = self.workloads.take(name) {
            for membership in old.record.memberships.iter() {
                self.leave(&membership.service, name);
                changed.services.insert(Arc::clone(&membership.service));
            }
            changed.workloads.insert(Arc::clone(&old.record.uid));
        }
    }

    fn join(&mut self, service: &Arc<str>, workload: &Arc<Workload>) {
        let list = self.members.entry(Arc::clone(service)).or_default();
        match list.binary_search_by(|w| w.uid.cmp(&workload.uid)) {
            Ok(at) => list[at] = Arc::clone(workload),
            Err(at) => list.insert(at, Arc::clone(workload)),
        }
    }

    fn leave(&mut self, service: &str, uid: &str) {
        let Some(list) = self.members.get_mut(service) else { return };
        if let Ok(at) = list.binary_search_by(|w| (*w.uid).cmp(uid)) {
            list.remove(at);
        }
        if list.is_empty() {
            self.members.remove(service);
        }
    }
}

/// Whether two records of a workload are the same but for the services that it belongs to.
fn same_backend(a: &Workload, b: &Workload) -> bool {
    a.place == b.place && a.addresses == b.addresses && a.account == b.account
}

/// A record in a set, found by its name.
#[derive(Debug)]
struct Entry<T> {
    version: Version,
    record: Arc<T>,
}

trait Named {
    fn name(&self) -> &str;
}

impl Named for Service {
    fn name(&self) -> &str {
        &self.key
    }
}

impl Named for Workload {
    fn name(&self) -> &str {
        &self.uid
    }
}

impl<T: Named> Borrow<str> for Entry<T> {
    fn borrow(&self) -> &str {
        self.record.name()
    }
}

impl<T: Named> Hash for Entry<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.record.name().hash(state);
    }
}

impl<T: Named> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        self.record.name() == other.record.name()
    }
}

impl<T: Named> Eq for Entry<T> {}

#[cfg(test)]
mod tests;
