//! Records with their versions, by name.

use std::borrow::Borrow;
use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::model::{Service, Version, Workload, split_uid};

/// A record in a set, found by the name that it bears.
#[derive(Debug)]
pub(super) struct Entry<T> {
    pub(super) version: Version,
    pub(super) record: Arc<T>,
}

/// Services by key.
#[derive(Debug, Default)]
pub(super) struct Services(HashSet<Entry<Service>>);

impl Services {
    pub(super) fn get(&self, key: &str) -> Option<&Entry<Service>> {
        self.0.get(key)
    }

    /// Puts a record in the place of the one with its key, which is returned.
    pub(super) fn put(&mut self, entry: Entry<Service>) -> Option<Entry<Service>> {
        self.0.replace(entry)
    }

    pub(super) fn take(&mut self, key: &str) -> Option<Entry<Service>> {
        self.0.take(key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry<Service>> {
        self.0.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Workloads by the two parts of their uids.
#[derive(Debug, Default)]
pub(super) struct Workloads(HashMap<Arc<str>, HashSet<Entry<Workload>>>);

impl Workloads {
    pub(super) fn get(&self, uid: &str) -> Option<&Entry<Workload>> {
        let (prefix, name) = split_uid(uid);
        self.0.get(prefix)?.get(name)
    }

    /// What is held under the uid of `workload`.
    pub(super) fn same(&self, workload: &Workload) -> Option<&Entry<Workload>> {
        self.0.get(&workload.account().prefix)?.get(&*workload.name)
    }

    /// Puts a record in the place of the one with its uid, which is returned.
    pub(super) fn put(&mut self, entry: Entry<Workload>) -> Option<Entry<Workload>> {
        self.0.entry(Arc::clone(&entry.record.account().prefix)).or_default().replace(entry)
    }

    pub(super) fn take(&mut self, uid: &str) -> Option<Entry<Workload>> {
        let (prefix, name) = split_uid(uid);
        let like = self.0.get_mut(prefix)?;
        let taken = like.take(name);
        if like.is_empty() {
            self.0.remove(prefix);
        }
        taken
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry<Workload>> {
        self.0.values().flatten()
    }

    pub(super) fn len(&self) -> usize {
        self.0.values().map(HashSet::len).sum()
    }

    /// How many the tables have room for.
    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.0.values().map(HashSet::capacity).sum()
    }
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
        &self.name
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
