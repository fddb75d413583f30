//! Label selectors in both directions, without trying every selector on every workload.
//!
//! A selector is filed under one of its pairs, a workload under each of its labels; what shares a pair is then compared
//! in full.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{Origin, Owner};

type Labels = BTreeMap<String, String>;
/// Namespace, label, value.
type Pair = (Arc<str>, String, String);

#[derive(Debug, Default)]
pub(super) struct Selection {
    selectors: HashMap<Pair, BTreeMap<Owner, Labels>>,
    workloads: HashMap<Pair, BTreeSet<Origin>>,
    labels: HashMap<Origin, (Arc<str>, Labels)>,
    filed: HashMap<Owner, Pair>,
}

impl Selection {
    /// Files the selector of `owner` in place of its former one; an empty selector selects nothing.
    pub(super) fn set_selector(&mut self, owner: &Owner, namespace: &Arc<str>, selector: &Labels) {
        if let Some(pair) = self.filed.remove(owner)
            && let Some(bucket) = self.selectors.get_mut(&pair)
        {
            bucket.remove(owner);
            if bucket.is_empty() {
                self.selectors.remove(&pair);
            }
        }
        // The pair that the fewest share keeps the comparisons few.
        let pairs = selector.iter().map(|(key, value)| (Arc::clone(namespace), key.clone(), value.clone()));
        let Some(pair) = pairs.min_by_key(|pair| self.selectors.get(pair).map_or(0, BTreeMap::len)) else {
            return;
        };
        self.selectors.entry(pair.clone()).or_default().insert(owner.clone(), selector.clone());
        self.filed.insert(owner.clone(), pair);
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
    pub(super) fn owners(&self, origin: &Origin) -> Vec<Owner> {
        let Some((namespace, labels)) = self.labels.get(origin) else { return Vec::new() };
        let pairs = labels.iter().map(|(key, value)| (Arc::clone(namespace), key.clone(), value.clone()));
        let owners = pairs.filter_map(|pair| self.selectors.get(&pair)).flatten();
        let owners = owners.filter(|(_, selector)| selects(selector, labels));
        owners.map(|(owner, _)| owner.clone()).collect()
    }

    /// Which workloads the selector of `owner` chooses.
    pub(super) fn chosen(&self, owner: &Owner) -> Vec<Origin> {
        let Some(pair) = self.filed.get(owner) else { return Vec::new() };
        let Some(selector) = self.selectors.get(pair).and_then(|bucket| bucket.get(owner)) else {
            return Vec::new();
        };
        let pairs = selector.iter().map(|(key, value)| (Arc::clone(&pair.0), key.clone(), value.clone()));
        let rarest =
            pairs.map(|pair| self.workloads.get(&pair)).min_by_key(|found| found.map_or(0, BTreeSet::len));
        let candidates = rarest.flatten().into_iter().flatten();
        let matches =
            |origin: &&Origin| self.labels.get(*origin).is_some_and(|(_, labels)| selects(selector, labels));
        candidates.filter(matches).cloned().collect()
    }
}

/// True when `labels` holds every pair of `selector`.
fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::NsName;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn both_directions_agree() {
        let mut selection = Selection::default();
        let (ns, other): (Arc<str>, Arc<str>) = ("shop".into(), "other".into());
        let web = Owner::Service(NsName::new("shop", "web"));
        let pod = |name| Origin::Pod(NsName::new("shop", name));
        selection.set_selector(&web, &ns, &labels(&[("app", "web"), ("env", "prod")]));
        selection.set_labels(&pod("a"), &ns, Some(labels(&[("app", "web"), ("env", "prod"), ("x", "y")])));
        selection.set_labels(&pod("b"), &ns, Some(labels(&[("app", "web")])));
        selection.set_labels(&pod("c"), &other, Some(labels(&[("app", "web"), ("env", "prod")])));
        assert_eq!(selection.chosen(&web), [pod("a")]);
        assert_eq!(selection.owners(&pod("a")), std::slice::from_ref(&web));
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
