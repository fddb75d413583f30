use std::collections::HashSet;

use super::super::fixtures::{of_service, of_workload, removal, service, update, workload};
use super::super::model::Kin;
use super::*;

const WEB: &str = "shop/web.shop.svc.cluster.local";
const API: &str = "shop/api.shop.svc.cluster.local";
const ONE: &str = "c//Pod/shop/one";
const TWO: &str = "c//Pod/shop/two";

fn names(set: &BTreeSet<Arc<str>>) -> Vec<&str> {
    set.iter().map(|name| &**name).collect()
}

fn uids(list: &[Arc<Workload>]) -> Vec<String> {
    list.iter().map(|workload| workload.uid()).collect()
}

/// Two services, of which `one` is in both and `two` in the first.
fn shop() -> Snapshot {
    let mut snapshot = Snapshot::new();
    snapshot.apply(update(&[
        of_service(service(WEB, &["10.96.0.1"], &[(80, 80)]), "1"),
        of_service(service(API, &["10.96.0.2"], &[(80, 80)]), "1"),
        of_workload(workload(TWO, "10.0.0.2", "n", &[WEB]), "1"),
        of_workload(workload(ONE, "10.0.0.1", "n", &[WEB, API]), "1"),
    ]));
    snapshot
}

fn members(snapshot: &Snapshot, service: &str) -> Vec<String> {
    snapshot.members(service).map(|(w, m)| format!("{} {}", w.uid(), m.service)).collect()
}

#[test]
fn members_are_found_in_order() {
    let snapshot = shop();
    assert_eq!(members(&snapshot, WEB), [format!("{ONE} {WEB}"), format!("{TWO} {WEB}")]);
    assert_eq!(members(&snapshot, API), [format!("{ONE} {API}")]);
    assert!(members(&snapshot, "shop/none").is_empty());
    assert_eq!((snapshot.service_count(), snapshot.workload_count()), (2, 2));
}

#[test]
fn what_is_sent_again_is_no_change() {
    let mut snapshot = shop();
    let changed = snapshot.apply(update(&[
        of_service(service(WEB, &["10.96.0.1"], &[(80, 80)]), "2"),
        of_workload(workload(ONE, "10.0.0.1", "n", &[WEB, API]), "2"),
    ]));
    assert!(changed.is_empty(), "{changed:?}");
    // But the new version is the one to tell.
    assert_eq!(snapshot.versions()[ONE], "2");
    let (held, _) = snapshot.members(WEB).next().unwrap();
    assert!(Arc::ptr_eq(held, snapshot.workload(ONE).unwrap()));
}

#[test]
fn a_new_address_changes_every_service_of_the_workload() {
    let mut snapshot = shop();
    let changed = snapshot.apply(update(&[of_workload(workload(ONE, "10.0.0.9", "n", &[WEB, API]), "2")]));
    assert_eq!(names(&changed.services), [API, WEB]);
    assert_eq!(uids(&changed.workloads), [ONE]);
    let (member, _) = snapshot.members(API).next().unwrap();
    assert_eq!(member.addresses[0].to_string(), "10.0.0.9");
}

#[test]
fn a_changed_membership_changes_that_service_alone() {
    let mut snapshot = shop();
    let changed = snapshot.apply(update(&[of_workload(workload(ONE, "10.0.0.1", "n", &[WEB]), "2")]));
    assert_eq!(names(&changed.services), [API]);
    assert_eq!(uids(&changed.workloads), [ONE]);
    assert_eq!(members(&snapshot, API).len(), 0);
    // The index of the service that did not change has the new record all the same.
    let (member, _) = snapshot.members(WEB).next().unwrap();
    assert!(Arc::ptr_eq(member, snapshot.workload(ONE).unwrap()));
    let changed = snapshot.apply(update(&[of_workload(workload(TWO, "10.0.0.2", "n", &[WEB, API]), "2")]));
    assert_eq!(names(&changed.services), [API]);
}

#[test]
fn removals_take_the_members_along() {
    let mut snapshot = shop();
    let changed = snapshot.apply(removal(&[ONE, WEB, "stranger"]));
    assert_eq!(names(&changed.services), [API, WEB]);
    assert_eq!(uids(&changed.workloads), [ONE]);
    assert!(snapshot.service(WEB).is_none() && snapshot.workload(ONE).is_none());
    // A service may come back to the members that it had.
    assert_eq!(members(&snapshot, WEB), [format!("{TWO} {WEB}")]);
    assert!(snapshot.apply(removal(&[ONE])).is_empty());
    snapshot.apply(removal(&[TWO]));
    assert!(snapshot.members.is_empty());
}

#[test]
fn a_removal_wins_over_an_update_of_the_same_delta() {
    let mut snapshot = shop();
    let mut delta = update(&[of_service(service(WEB, &["10.96.0.7"], &[]), "2")]);
    delta.removed.push(WEB.into());
    assert_eq!(names(&snapshot.apply(delta).services), [WEB]);
    assert!(snapshot.service(WEB).is_none());
}

#[test]
fn members_may_come_before_their_service() {
    let mut snapshot = Snapshot::new();
    let changed = snapshot.apply(update(&[of_workload(workload(ONE, "10.0.0.1", "n", &[WEB]), "1")]));
    assert_eq!(names(&changed.services), [WEB]);
    assert_eq!(members(&snapshot, WEB).len(), 1);
    assert!(snapshot.service(WEB).is_none());
}

#[test]
fn versions_name_everything() {
    let versions = shop().versions();
    let mut names: Vec<_> = versions.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, [ONE, TWO, API, WEB]);
    assert!(versions.values().all(|version| version == "1"));
}

/// An agent may take 40 MB at this size; the snapshot is the largest part. Counted in blocks as the allocator gives them.
#[test]
fn a_hundred_thousand_workloads_are_small() {
    // A quarter of them fills the tables to the same degree.
    let workloads = 25_000_usize;
    let mut snapshot = Snapshot::new();
    let mut interner = super::super::Interner::new("node-a");
    for chunk in 0..workloads / 1_000 {
        let resources = (0..1_000).map(|i| {
            let n = chunk * 1_000 + i;
            let (service, node) = (n / 10, format!("node-{}", n % 100));
            let uid = format!("Kubernetes//Pod/bench/service-{service}-5d8f7c9b6d-{n:05x}");
            let address = format!("10.{}.{}.{}", n >> 16, (n >> 8) & 255, n & 255);
            let key = format!("bench/service-{service}.bench.svc.cluster.local");
            of_workload(workload(&uid, &address, &node, &[&key]), &format!("{:016x}", n * 7919))
        });
        let (updated, rejected) = super::super::decode(resources, &mut interner);
        assert_eq!(rejected, []);
        snapshot.apply(Delta { updated, removed: Vec::new() });
    }
    assert_eq!(snapshot.workload_count(), workloads);
    let heap = |bytes: usize| (bytes + 8).next_multiple_of(16).max(32);
    let counts = 2 * size_of::<usize>();
    let each: usize = snapshot
        .workloads()
        .map(|w| {
            heap(counts + size_of::<Workload>())
                + heap(w.name.len())
                + if w.addresses.len() == 1 { 0 } else { heap(size_of_val(&*w.addresses)) }
                + size_of::<Arc<Workload>>()
        })
        .sum();
    let table = snapshot.workloads.capacity() * 8 / 7 * (size_of::<Entry<Workload>>() + 1);
    let shared: HashSet<_> = snapshot.workloads().map(|w| Arc::as_ptr(&w.kin)).collect();
    assert_eq!(shared.len(), workloads / 10);
    let shared =
        shared.len() * (heap(counts + size_of::<Kin>()) + heap(size_of::<Membership>()) + heap(counts + 48));
    let total = each + table + shared;
    assert!(total * 4 < 19_000_000, "{total} bytes, {} each", total / workloads);
}

#[test]
fn news_is_what_differs() {
    let snapshot = shop();
    let same = of_workload(workload(ONE, "10.0.0.1", "n", &[WEB, API]), "2");
    let moved = of_workload(workload(ONE, "10.0.0.9", "n", &[WEB, API]), "3");
    let web = of_service(service(WEB, &["10.96.0.1"], &[(80, 80)]), "2");
    assert_eq!(snapshot.news(&update(&[web.clone(), same.clone()])), None, "another version alone is none");
    assert_eq!(snapshot.news(&removal(&["shop/none"])), None);
    assert_eq!(snapshot.news(&removal(&[TWO])), Some(removal(&[TWO])));
    let alone = update(std::slice::from_ref(&moved));
    assert_eq!(snapshot.news(&update(&[web, moved.clone()])), Some(alone));
    let twice = update(&[moved, same]);
    assert_eq!(snapshot.news(&twice), Some(twice), "the last of a name counts");
}
