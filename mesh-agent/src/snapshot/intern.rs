//! Stores once what many resources have in common.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

use super::model::{Account, App, Kin, Locality, Place};

/// The strings and records in use, so that equal ones share their memory.
///
/// Whatever nobody else uses any more is dropped when the number of entries has doubled since the last look.
#[derive(Debug, Default)]
pub struct Interner {
    node: Box<str>,
    strings: Pool<str>,
    accounts: Pool<Account>,
    localities: Pool<Locality>,
    places: Pool<Place>,
    apps: Pool<App>,
    kin: Pool<Kin>,
}

impl Interner {
    /// For an agent on `node`.
    pub fn new(node: &str) -> Self {
        Self { node: node.into(), ..Self::default() }
    }

    /// The node whose workloads keep the names of their cgroups.
    pub fn node(&self) -> &str {
        &self.node
    }

    pub(super) fn string(&mut self, text: &str) -> Arc<str> {
        self.strings.get(text, |text| Arc::from(text))
    }

    pub(super) fn account(&mut self, account: Account) -> Arc<Account> {
        self.accounts.get_owned(account)
    }

    pub(super) fn locality(&mut self, locality: Locality) -> Arc<Locality> {
        self.localities.get_owned(locality)
    }

    pub(super) fn place(&mut self, place: Place) -> Arc<Place> {
        self.places.get_owned(place)
    }

    pub(super) fn app(&mut self, app: App) -> Arc<App> {
        self.apps.get_owned(app)
    }

    pub(super) fn kin(&mut self, kin: Kin) -> Arc<Kin> {
        self.kin.get_owned(kin)
    }
}

#[derive(Debug)]
struct Pool<T: ?Sized> {
    set: HashSet<Arc<T>>,
    swept: usize,
}

impl<T: ?Sized> Default for Pool<T> {
    fn default() -> Self {
        Self { set: HashSet::new(), swept: 0 }
    }
}

impl<T: ?Sized + Hash + Eq> Pool<T> {
    fn get(&mut self, value: &T, make: impl FnOnce(&T) -> Arc<T>) -> Arc<T> {
        match self.set.get(value) {
            Some(known) => Arc::clone(known),
            None => self.insert(make(value)),
        }
    }

    fn insert(&mut self, value: Arc<T>) -> Arc<T> {
        if self.set.len() >= 1024.max(self.swept * 2) {
            self.set.retain(|entry| Arc::strong_count(entry) > 1);
            self.swept = self.set.len();
        }
        self.set.insert(Arc::clone(&value));
        value
    }
}

impl<T: Hash + Eq> Pool<T> {
    fn get_owned(&mut self, value: T) -> Arc<T> {
        match self.set.get(&value) {
            Some(known) => Arc::clone(known),
            None => self.insert(Arc::new(value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_strings_share_memory() {
        let mut interner = Interner::new("n");
        let (a, b) = (interner.string("shop"), interner.string("shop"));
        assert!(Arc::ptr_eq(&a, &b));
    }

    #[test]
    fn what_nobody_uses_is_dropped() {
        let mut interner = Interner::new("n");
        let kept = interner.string("kept");
        for i in 0..100_000 {
            interner.string(&i.to_string());
        }
        assert!(interner.strings.set.len() <= 1025, "{}", interner.strings.set.len());
        assert!(Arc::ptr_eq(&kept, &interner.string("kept")));
    }
}
