use std::time::Duration;

use super::*;
use crate::identity::testing::{self, Authority};

const HOUR: Duration = Duration::from_secs(3600);

fn id(account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", account).unwrap()
}

fn answer(authority: &Authority, account: &str) -> Answer {
    testing::answer(authority, id(account).as_str(), HOUR)
}

fn take(store: &Store, authority: &Authority, account: &str, ticket: u64) -> Vec<SpiffeId> {
    let answer = answer(authority, account);
    let strange = store.trust(&answer.roots, ticket, SystemTime::now());
    assert!(store.put(id(account), &answer, SystemTime::now()));
    strange
}

#[test]
fn a_certificate_is_given_out_in_its_time_only() {
    let (store, root) = (Store::default(), Authority::new("root"));
    take(&store, &root, "web", 1);
    let now = SystemTime::now();
    let at = |time| store.at(&id("web"), time).is_some();
    assert_eq!([at(now - HOUR), at(now), at(now + HOUR / 2), at(now + HOUR)], [false, true, true, false]);
    assert!(store.at(&id("db"), now).is_none());
    store.forget(&id("web"));
    assert!(!at(now));
}

#[test]
fn serial_numbers_change_with_certificates_and_with_roots() {
    let (store, root, next) = (Store::default(), Authority::new("root"), Authority::new("next"));
    let serial = |account| store.current(&id(account)).unwrap().serial;
    let changed = store.trusted().changed();
    assert!(take(&store, &root, "a", 1).is_empty());
    let first = serial("a");
    assert!(take(&store, &root, "b", 2).is_empty());
    assert_eq!(serial("a"), first, "the same roots");
    take(&store, &root, "a", 3);
    let second = serial("a");
    assert_ne!(second, first);
    assert_eq!(store.trusted().generation(), 1);
    // Another root altogether: what does not lead to it is told, and its readers learn of the roots.
    let mut strange = take(&store, &next, "c", 4);
    strange.sort();
    assert_eq!(strange, ["a", "b"].map(id));
    assert!(serial("a") > second);
    let roots = |account| store.current(&id(account)).unwrap().roots.clone();
    assert!(Arc::ptr_eq(&roots("a"), &roots("c")));
    assert_eq!(store.trusted().generation(), 2);
    assert!(changed.has_changed().unwrap() && Arc::ptr_eq(&changed.borrow().store, &roots("a")));
}

#[test]
fn an_answer_that_was_overtaken_does_not_bring_old_roots_back() {
    let (store, old, new) = (Store::default(), Authority::new("old"), Authority::new("new"));
    take(&store, &new, "a", 7);
    let serial = store.current(&id("a")).unwrap().serial;
    assert!(store.trust(&answer(&old, "b").roots, 6, SystemTime::now()).is_empty());
    assert_eq!(store.current(&id("a")).unwrap().serial, serial);
    // Its certificate is of no use with the roots of today, while another of the same root is.
    assert!(!store.put(id("b"), &answer(&old, "b"), SystemTime::now()));
    assert!(store.put(id("b"), &answer(&new, "b"), SystemTime::now()));
}

#[test]
fn readers_keep_what_they_were_given() {
    let (store, root) = (Store::default(), Authority::new("root"));
    take(&store, &root, "web", 1);
    let held = store.current(&id("web")).unwrap();
    take(&store, &root, "web", 2);
    store.forget(&id("web"));
    assert_eq!(held.certified.cert.len(), 1);
}
