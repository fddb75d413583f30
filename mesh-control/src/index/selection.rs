//! Label selectors in both directions, without trying every selector on every workload.
//!
//! A selector is filed under one of its pairs, a workload under each of its labels; what shares a pair is then compared
//! in full.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{Origin, Owner};
use crate::manifest::{Labels, NsName};

/// In the place of a namespace: the selector chooses in all of them.
pub(super) const EVERYWHERE: &str = "";

/// Namespace, label, value.
type Pair = (Arc<str>, String, String);

/// The object that a selector belongs to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Chooser {
    Owner(Owner),
    Authorization(NsName),
    Peers(NsName),
}

#[derive(Debug, Default)]
pub(super) struct Selection {
    selectors: HashMap<Pair, BTreeMap<Chooser, Labels>>,
    workloads: HashMap<Pair, BTreeSet<Origin>>,
    labels: HashMap<Origin, (Arc<str>, Labels)>,
    filed: HashMap<Chooser, Pair>,
}

impl Selection {
    /// Files the selector of `chooser` in place of its former one; an empty selector selects nothing.
    pub(super) fn set_selector(&mut self, chooser: &Chooser, namespace: &Arc<str>, selector: &Labels) {
        if let Some(pair) = self.filed.remove(chooser)
            && let Some(bucket) = self.selectors.get_mut(&pair)
        {
            bucket.remove(chooser);
            if bucket.is_empty() {
                self.selectors.remove(&pair);
            }
        }
        // The pair that the fewest share keeps the comparisons few.
        let pairs = selector.iter().map(|(key, value)| (Arc::clone(namespace), key.clone(), value.clone()));
        let Some(pair) = pairs.min_by_key(|pair| self.selectors.get(pair).map_or(0, BTreeMap::len)) else {
            return;
        };
        self.selectors.entry(pair.clone()).or_default().insert(chooser.clone(), selector.clone());
        self.filed.insert(chooser.clone(), pair);
    }

    /// Files the labels of a workload in place of its former ones.
    pub(super) fn set_labels(&mut self, origin: &Origin, namespace: &Arc<str>, labels: Option<Labels>) {
        if let Some((namespace, labels)) = self.labels.remove(origin) {
            for (key, value) in labels {
                let pair = (Arc::clone(&namespace), key, value);
                if let Some(bucket) = self.workloads.get_mut(&pair) {
                    bucket.remove(origin);
                    if bucket.is_empty() {
                        self.workloads.remove(&pair);
                    }
                }
            }
        }
        let Some(labels) = labels else { return };
        for (key, value) in &labels {
            let pair = (Arc::clone(namespace), key.clone(), value.clone());
            self.workloads.entry(pair).or_default().insert(origin.clone());
        }
        self.labels.insert(origin.clone(), (Arc::clone(namespace), labels));
    }

    /// Whose selectors choose this workload.
    pub(super) fn choosers(&self, origin: &Origin) -> Vec<&Chooser> {
        let Some((namespace, labels)) = self.labels.get(origin) else { return Vec::new() };
        let everywhere: Arc<str> = EVERYWHERE.into();
        let pairs = [namespace, &everywhere].into_iter().flat_map(|namespace| {
            labels.iter().map(|(key, value)| (Arc::clone(namespace), key.clone(), value.clone()))
        });
        let choosers = pairs.filter_map(|pair| self.selectors.get(&pair)).flatten();
        let choosers = choosers.filter(|(_, selector)| selects(selector, labels));
        choosers.map(|(chooser, _)| chooser).collect()
    }

    /// The owners of services among them.
    pub(super) fn owners(&self, origin: &Origin) -> Vec<Owner> {
        let owner = |chooser: &Chooser| match chooser {
            Chooser::Owner(owner) => Some(owner.clone()),
            Chooser::Authorization(_) | Chooser::Peers(_) => None,
        };
        self.choosers(origin).into_iter().filter_map(owner).collect()
    }

    /// Which workloads the selector of `chooser` chooses.
    pub(super) fn chosen(&self, chooser: &Chooser) -> Vec<Origin> {
        let Some(pair) = self.filed.get(chooser) else { return Vec::new() };
        let Some(selector) = self.selectors.get(pair).and_then(|bucket| bucket.get(chooser)) else {
            return Vec::new();
        };
        if *pair.0 == *EVERYWHERE {
            let all = self.labels.iter().filter(|(_, (_, labels))| selects(selector, labels));
            return all.map(|(origin, _)| origin.clone()).collect();
        }
        let pairs = selector.iter().map(|(key, value)| (Arc::clone(&pair.0), key.clone(), value.clone()));
        let rarest =
            pairs.map(|pair| self.workloads.get(&pair)).min_by_key(|found| found.map_or(0, BTreeSet::len));
        let candidates = rarest.flatten().into_iter().flatten();
        let matches =
            |origin: &&Origin| self.labels.get(*origin).is_some_and(|(_, labels)| selects(selector, labels));
        candidates.filter(matches).cloned().collect()
    }

    /// The workloads with labels of their own in a namespace, or in all.
    pub(super) fn inside(&self, namespace: Option<&str>) -> Vec<Origin> {
        let wanted = |own: &str| namespace.is_none_or(|namespace| namespace == own);
        self.labels.iter().filter(|(_, (own, _))| wanted(own)).map(|(origin, _)| origin.clone()).collect()
    }
}

/// True when `labels` holds every pair of `selector`.
fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_selector_may_choose_in_all_namespaces() {
        let mut selection = Selection::default();
        let policy = Chooser::Authorization(NsName::new("root", "p"));
        selection.set_selector(&policy, &EVERYWHERE.into(), &labels(&[("app", "web")]));
        let pod = |namespace| Origin::Pod(NsName::new(namespace, "a"));
        for (namespace, app) in [("one", "web"), ("two", "web"), ("three", "api")] {
            selection.set_labels(&pod(namespace), &namespace.into(), Some(labels(&[("app", app)])));
        }
        let mut chosen = selection.chosen(&policy);
        chosen.sort();
        assert_eq!(chosen, [pod("one"), pod("two")]);
        assert_eq!(selection.choosers(&pod("two")), [&policy]);
        assert!(selection.choosers(&pod("three")).is_empty());
        assert_eq!((selection.inside(Some("two")).len(), selection.inside(None).len()), (1, 3));
    }

    #[test]
    fn both_directions_agree() {
        let mut selection = Selection::default();
        let (ns, other): (Arc<str>, Arc<str>) = ("shop".into(), "other".into());
        let owner = Owner::Service(NsName::new("shop", "web"));
        let web = Chooser::Owner(owner.clone());
        let pod = |name| Origin::Pod(NsName::new("shop", name));
        selection.set_selector(&web, &ns, &labels(&[("app", "web"), ("env", "prod")]));
        selection.set_labels(&pod("a"), &ns, Some(labels(&[("app", "web"), ("env", "prod"), ("x", "y")])));
        selection.set_labels(&pod("b"), &ns, Some(labels(&[("app", "web")])));
        selection.set_labels(&pod("c"), &other, Some(labels(&[("app", "web"), ("env", "prod")])));
        assert_eq!(selection.chosen(&web), [pod("a")]);
        assert_eq!(selection.owners(&pod("a")), std::slice::from_ref(&owner));
        assert_eq!(selection.owners(&pod("b")), []);
        assert_eq!(selection.owners(&pod("c")), []);

        selection.set_selector(&web, &ns, &labels(&[("app", "web")]));
        assert_eq!(selection.chosen(&web), [pod("a"), pod("b")]);
        selection.set_labels(&pod("a"), &ns, None);
        assert_eq!(selection.chosen(&web), [pod("b")]);
        selection.set_selector(&web, &ns, &Labels::new());
        assert_eq!(selection.owners(&pod("b")), []);
        selection.set_labels(&pod("b"), &ns, None);
        selection.set_labels(&pod("c"), &ns, None);
        assert!(
            selection.workloads.is_empty() && selection.selectors.is_empty() && selection.labels.is_empty()
        );
    }
}
