//! What is served, in the order in which it changed.
//!
//! Each resource stands in the log once, at the revision of its last change. A subscriber is a position in that log: what
//! it has yet to be told is what stands behind its position, however often it changed meanwhile. So a slow subscriber
//! costs no memory, and its changes coalesce.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    ops::Bound,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
    time::Instant,
};

use tokio::sync::watch;

use crate::index::{Body, Delta, Name, Placement, Resource, Update};

/// Counts changes of resources.
pub(crate) type Revision = u64;

/// Removals that are remembered for subscribers that lag.
const MAX_TOMBSTONES: usize = 65_536;
/// Times of publication that are remembered, for the age of what a subscriber has not acknowledged.
const MAX_TIMES: usize = 4_096;

/// A place in the log.
#[derive(Clone, Debug)]
pub(crate) enum Logged {
    Live(Arc<Served>),
    Gone { name: Name, born: Revision, previous: Revision, narrowed: Revision },
}

/// A resource in force.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) resource: Resource,
    /// Its first revision: who stands before it was never told of the name.
    born: Revision,
    /// Where it stood before; 0 when new.
    pub(crate) previous: Revision,
    /// When a policy of this name last ceased to hold for those who do not name it; 0: it never did.
    narrowed: Revision,
}

impl Served {
    /// The version on the wire.
    pub(crate) fn version(&self) -> String {
        format!("{:016x}", self.resource.version)
    }

    /// A client that stands at `from`, or that `had` something under this name when it came, may hold a policy that holds for
    /// more workloads than this one.
    pub(crate) fn has_narrowed_since(&self, from: Revision, had: bool) -> bool {
        (had || self.born <= from) && self.narrowed > from
    }
}

/// The log, and its places by name.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    log: BTreeMap<Revision, Logged>,
    places: HashMap<Name, Revision>,
    tombstones: BTreeSet<Revision>,
    revision: Revision,
    /// Removals up to here are forgotten: who stands before it cannot be brought up to date step by step.
    forgotten: Revision,
    times: VecDeque<(Revision, Instant)>,
    services: u64,
    workloads: u64,
    policies: u64,
    /// Numbers of workloads.
    placements: HashMap<Placement, usize>,
}

impl Contents {
    /// Puts a delta at the end of the log.
    pub(crate) fn apply(&mut self, delta: Delta, now: Instant) {
        for (name, resource) in delta {
            let previous = self.places.get(&name).copied();
            let former = previous.and_then(|at| self.log.remove(&at));
            if let Some(previous) = previous {
                self.tombstones.remove(&previous);
            }
            if let Some(Logged::Live(served)) = &former {
                *self.count(served.resource.body) -= 1;
                self.leave(served.resource.placement.as_deref());
            }
            self.revision += 1;
            let born = match &former {
                Some(Logged::Live(served)) => served.born,
                Some(Logged::Gone { born, .. }) => *born,
                None => self.revision,
            };
            let previous = previous.unwrap_or(0);
            let narrowed = match &former {
                Some(Logged::Live(served)) if served.resource.wide => match &resource {
                    Some(resource) if resource.wide => served.narrowed,
                    Some(_) | None => self.revision,
                },
                Some(Logged::Live(served)) => served.narrowed,
                Some(Logged::Gone { narrowed, .. }) => *narrowed,
                None => 0,
            };
            let logged = match resource {
                Some(resource) => {
                    *self.count(resource.body) += 1;
                    if let Some(placement) = resource.placement.as_deref() {
                        *self.placements.entry(placement.clone()).or_default() += 1;
                    }
                    Logged::Live(Arc::new(Served { resource, born, previous, narrowed }))
                }
                None => {
                    self.tombstones.insert(self.revision);
                    Logged::Gone { name: Arc::clone(&name), born, previous, narrowed }
                }
            };
            self.log.insert(self.revision, logged);
            self.places.insert(name, self.revision);
        }
        self.forget();
        self.times.push_back((self.revision, now));
        if self.times.len() > MAX_TIMES {
            self.times.pop_front();
        }
    }

    fn forget(&mut self) {
        while self.tombstones.len() > MAX_TOMBSTONES {
            let Some(oldest) = self.tombstones.pop_first() else { return };
            if let Some(Logged::Gone { name, .. }) = self.log.remove(&oldest) {
                self.places.remove(&name);
            }
            self.forgotten = oldest;
        }
    }

    fn leave(&mut self, placement: Option<&Placement>) {
        let Some(placement) = placement else { return };
        if let Some(number) = self.placements.get_mut(placement) {
            *number -= 1;
            if *number == 0 {
                self.placements.remove(placement);
            }
        }
    }

    /// Whether a workload of that service account is on that node.
    pub(crate) fn is_placed(&self, placement: &Placement) -> bool {
        self.placements.contains_key(placement)
    }

    fn count(&mut self, body: Body) -> &mut u64 {
        match body {
            Body::Service => &mut self.services,
            Body::Workload => &mut self.workloads,
            Body::Policy => &mut self.policies,
        }
    }

    pub(crate) fn revision(&self) -> Revision {
        self.revision
    }

    /// Numbers of services and of workloads.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.services, self.workloads)
    }

    /// Number of policies.
    pub(crate) fn policies(&self) -> u64 {
        self.policies
    }

    /// The resource in force under a name.
    pub(crate) fn get(&self, name: &str) -> Option<&Arc<Served>> {
        match self.log.get(self.places.get(name)?)? {
            Logged::Live(served) => Some(served),
            Logged::Gone { .. } => None,
        }
    }

    /// Where a name stands, in force or gone.
    pub(crate) fn place(&self, name: &str) -> Option<Revision> {
        self.places.get(name).copied()
    }

    /// Where a name that is gone stood before.
    pub(crate) fn place_before(&self, name: &str) -> Option<Revision> {
        match self.log.get(self.places.get(name)?)? {
            Logged::Live(_) => None,
            Logged::Gone { previous, .. } => Some(*previous),
        }
    }

    /// Everything that changed after `revision`, in order; `None` when not all removals since are known any more.
    pub(crate) fn after(&self, revision: Revision) -> Option<impl Iterator<Item = (Revision, &Logged)>> {
        // At 0 a subscriber was told of nothing, so no removal can be missed.
        let known = revision == 0 || revision >= self.forgotten;
        let range = (Bound::Excluded(revision), Bound::Unbounded);
        known.then(|| self.log.range(range).map(|(revision, logged)| (*revision, logged)))
    }

    /// When the first change after `revision` was published.
    pub(crate) fn published_after(&self, revision: Revision) -> Option<Instant> {
        let first = self.times.partition_point(|(published, _)| *published <= revision);
        self.times.get(first).map(|(_, at)| *at)
    }

    /// Everything in force.
    pub(crate) fn live(&self) -> impl Iterator<Item = &Arc<Served>> {
        self.log.values().filter_map(|logged| match logged {
            Logged::Live(served) => Some(served),
            Logged::Gone { .. } => None,
        })
    }
}

/// The contents, with one writer and many readers who are told of each new revision: services and workloads, and apart from
/// them policies, whose names may be the same.
#[derive(Debug, Default)]
pub(crate) struct Catalog {
    addresses: RwLock<Contents>,
    policies: RwLock<Contents>,
    revisions: watch::Sender<Revisions>,
}

/// How far both are.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Revisions {
    pub(crate) addresses: Revision,
    pub(crate) policies: Revision,
}

impl Catalog {
    /// Publishes an update as a whole; an empty one is nothing.
    pub(crate) fn publish(&self, update: Update, now: Instant) {
        let mut addresses = self.addresses.write().unwrap_or_else(PoisonError::into_inner);
        let mut policies = self.policies.write().unwrap_or_else(PoisonError::into_inner);
        for (contents, delta) in [(&mut addresses, update.addresses), (&mut policies, update.policies)] {
            if !delta.is_empty() {
                contents.apply(delta, now);
            }
        }
        let revisions = Revisions { addresses: addresses.revision, policies: policies.revision };
        drop((addresses, policies));
        self.revisions.send_if_modified(|known| {
            let more = known.addresses != revisions.addresses || known.policies != revisions.policies;
            *known = revisions;
            more
        });
    }

    /// Services and workloads. To read policies with them, lock these first.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Contents> {
        self.addresses.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn policies(&self) -> RwLockReadGuard<'_, Contents> {
        self.policies.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Revisions> {
        self.revisions.subscribe()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn resource(name: &str, version: u64) -> Resource {
        Resource {
            name: name.into(),
            body: Body::Workload,
            namespace: "ns".into(),
            version,
            bytes: bytes::Bytes::from_static(b"x"),
            placement: None,
            wide: false,
        }
    }

    /// `put(name, version)`, or a removal at version 0.
    pub(crate) fn delta(entries: &[(&str, u64)]) -> Delta {
        let entry = |(name, version): &(&str, u64)| {
            (Name::from(*name), (*version > 0).then(|| resource(name, *version)))
        };
        entries.iter().map(entry).collect()
    }

    fn names(contents: &Contents, after: Revision) -> Vec<(Revision, String)> {
        let name = |logged: &Logged| match logged {
            Logged::Live(served) => served.resource.name.to_string(),
            Logged::Gone { name, .. } => format!("-{name}"),
        };
        contents.after(after).unwrap().map(|(revision, logged)| (revision, name(logged))).collect()
    }

    #[test]
    fn each_name_stands_at_its_last_change() {
        let mut contents = Contents::default();
        contents.apply(delta(&[("a", 1), ("b", 1), ("c", 1)]), Instant::now());
        contents.apply(delta(&[("a", 2)]), Instant::now());
        contents.apply(delta(&[("a", 3), ("b", 0)]), Instant::now());
        assert_eq!(names(&contents, 0), [(3, "c".into()), (5, "a".into()), (6, "-b".into())]);
        assert_eq!(names(&contents, 5), [(6, "-b".into())]);
        assert_eq!(contents.counts(), (0, 2));
        assert!(contents.get("b").is_none() && contents.get("a").is_some());
    }

    #[test]
    fn a_name_that_returns_is_as_old_as_its_first_life() {
        let mut contents = Contents::default();
        for version in [1, 0, 2, 0] {
            contents.apply(delta(&[("a", version)]), Instant::now());
        }
        let (revision, logged) = contents.after(0).unwrap().next().unwrap();
        assert!(matches!(logged, Logged::Gone { born: 1, previous: 3, .. }), "{logged:?}");
        assert_eq!(revision, 4);
        assert_eq!(contents.tombstones.len(), 1);
    }

    #[test]
    fn a_service_account_is_on_a_node_as_long_as_one_of_its_workloads() {
        let on = |node: &str| Placement {
            node: node.into(),
            namespace: "ns".into(),
            service_account: "sa".into(),
        };
        let put = |name: &str, node: &str| {
            let resource = Resource { placement: Some(Box::new(on(node))), ..resource(name, 1) };
            Delta::from([(Name::from(name), Some(resource))])
        };
        let mut contents = Contents::default();
        let now = Instant::now();
        contents.apply(put("a", "n1"), now);
        contents.apply(put("b", "n1"), now);
        contents.apply(put("a", "n2"), now);
        assert!(contents.is_placed(&on("n1")) && contents.is_placed(&on("n2")));
        contents.apply(delta(&[("b", 0)]), now);
        assert!(!contents.is_placed(&on("n1")) && contents.is_placed(&on("n2")));
        contents.apply(delta(&[("a", 0)]), now);
        assert!(contents.placements.is_empty());
    }

    #[test]
    fn removals_are_forgotten_in_time_and_who_missed_them_is_told() {
        let mut contents = Contents::default();
        let all: Vec<String> = (0..=MAX_TOMBSTONES).map(|i| format!("n{i:06}")).collect();
        let of = |version| all.iter().map(|name| (name.as_str(), version)).collect::<Vec<_>>();
        contents.apply(delta(&of(1)), Instant::now());
        let before = contents.revision();
        contents.apply(delta(&of(0)), Instant::now());
        assert_eq!(contents.places.len(), MAX_TOMBSTONES);
        assert!(contents.after(before).is_none());
        assert!(contents.after(before + 1).is_some());
        assert!(contents.after(0).is_some());
    }

    #[test]
    fn the_age_of_a_change_is_that_of_its_publication() {
        let mut contents = Contents::default();
        let start = Instant::now();
        let later = start + std::time::Duration::from_secs(5);
        contents.apply(delta(&[("a", 1), ("b", 1)]), start);
        contents.apply(delta(&[("a", 2)]), later);
        assert_eq!(contents.published_after(0), Some(start));
        assert_eq!(contents.published_after(1), Some(start));
        assert_eq!(contents.published_after(2), Some(later));
        assert_eq!(contents.published_after(3), None);
    }
}
