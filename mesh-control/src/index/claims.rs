//! Who holds what only one can have: a resource name, or an address with port and protocol.

use std::{collections::HashMap, hash::Hash};

/// Claimants in the order of their claims; the first holds.
#[derive(Debug)]
pub(super) struct Claims<K, C>(HashMap<K, Vec<C>>);

impl<K, C> Default for Claims<K, C> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Eq + Hash, C: Clone + PartialEq> Claims<K, C> {
    pub(super) fn holder(&self, key: &K) -> Option<&C> {
        self.0.get(key)?.first()
    }

    /// Claims again change nothing.
    pub(super) fn claim(&mut self, key: K, by: &C) {
        let claims = self.0.entry(key).or_default();
        if !claims.contains(by) {
            claims.push(by.clone());
        }
    }

    /// Gives a claim up; returns who holds the key now if that changed.
    pub(super) fn release(&mut self, key: &K, by: &C) -> Option<C> {
        let claims = self.0.get_mut(key)?;
        let held = claims.first() == Some(by);
        claims.retain(|claimant| claimant != by);
        if claims.is_empty() {
            self.0.remove(key);
            return None;
        }
        if held { claims.first().cloned() } else { None }
    }
}
