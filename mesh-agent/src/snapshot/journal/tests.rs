use mesh_common::api::istio::security::Scope;

use super::super::disk;
use super::super::fixtures::{
    of_policy, of_service, of_workload, policy, removal, service, update, workload,
};
use super::*;
use crate::fixtures::Directory;
use crate::snapshot::Snapshot;

const WEB: &str = "shop/web.shop.svc.cluster.local";
const ONE: &str = "c//Pod/shop/one";
const TWO: &str = "c//Pod/shop/two";

fn pod(uid: &str, address: &str, version: &str) -> Delta {
    update(&[of_workload(workload(uid, address, "node-a", &[WEB]), version)])
}

fn policies(names: &[&str], removed: &[&str]) -> PolicyUpdate {
    let read = |name: &&str| Arc::new(Authorization::read(of_policy(policy(name, Scope::Namespace), "1")));
    PolicyUpdate {
        updated: names.iter().map(read).collect(),
        removed: removed.iter().map(|name| (*name).to_owned()).collect(),
    }
}

/// A snapshot at change 3, saved, with a service, a pod and a policy.
fn saved() -> Directory {
    let directory = Directory::new();
    let mut snapshot = Snapshot::new();
    snapshot.apply(update(&[of_service(service(WEB, &["10.96.0.1"], &[(80, 80)]), "1")]));
    snapshot.apply(pod(ONE, "10.0.0.1", "1"));
    save(&directory, &snapshot, Some(policies(&["shop/p"], &[]).updated), 3);
    directory
}

fn save(directory: &Directory, snapshot: &Snapshot, known: Option<Vec<Arc<Authorization>>>, sequence: u64) {
    let held = snapshot.held().with_policies(known).with_sequence(sequence);
    disk::save(directory.path(), "node-a", &held).unwrap();
}

fn load(directory: &Directory) -> (Found, Snapshot, Option<Vec<String>>) {
    let mut interner = Interner::new("node-a");
    let mut held = disk::load(directory.path(), &mut interner).unwrap().unwrap();
    let found = Journal::resume(directory.path(), &mut held, &mut interner).unwrap();
    let names = held.take_policies().map(|all| all.iter().map(|one| one.name.to_string()).collect());
    let mut snapshot = Snapshot::new();
    snapshot.restore(held);
    (found, snapshot, names)
}

fn addresses(snapshot: &Snapshot, uid: &str) -> String {
    snapshot.workload(uid).map(|workload| format!("{:?}", workload.addresses)).unwrap_or_default()
}

fn bytes(directory: &Directory) -> Vec<u8> {
    fs::read(path(directory.path())).unwrap()
}

#[test]
fn what_has_changed_since_comes_back() {
    let directory = saved();
    let (Found { mut journal, changes, lost }, ..) = load(&directory);
    assert_eq!((changes, lost, journal.sequence()), (0, 0, 3));
    for (number, change) in [
        of_policies(&policies(&["shop/deny"], &[]), false),
        of_addresses(&pod(ONE, "10.0.0.9", "2")),
        of_addresses(&pod(TWO, "10.0.0.2", "1")),
        of_addresses(&removal(&[TWO, WEB])),
        of_policies(&policies(&[], &["shop/p"]), false),
    ]
    .into_iter()
    .enumerate()
    {
        journal.append(4 + number as u64, &change).unwrap();
    }
    let (found, snapshot, names) = load(&directory);
    assert_eq!((found.changes, found.lost, found.journal.sequence()), (5, 0, 8));
    assert_eq!(names.unwrap(), ["shop/deny"]);
    assert_eq!(addresses(&snapshot, ONE), "[10.0.0.9]");
    assert_eq!((snapshot.workload_count(), snapshot.service_count()), (1, 0));
    assert_eq!(snapshot.versions()[ONE], "2");
}

#[test]
fn policies_are_known_when_all_have_been_named() {
    let directory = Directory::new();
    save(&directory, &Snapshot::new(), None, 0);
    let mut journal = load(&directory).0.journal;
    journal.append(1, &of_addresses(&pod(ONE, "10.0.0.1", "1"))).unwrap();
    assert_eq!(load(&directory).2, None);
    journal.append(2, &of_policies(&policies(&["shop/a", "shop/b"], &["shop/b"]), true)).unwrap();
    assert_eq!(load(&directory).2.unwrap(), ["shop/a"]);
}

#[test]
fn what_a_snapshot_has_goes_and_the_rest_stays() {
    let directory = saved();
    let mut journal = load(&directory).0.journal;
    journal.append(4, &of_addresses(&pod(ONE, "10.0.0.4", "4"))).unwrap();
    let mut snapshot = load(&directory).1;
    save(&directory, &snapshot, Some(Vec::new()), 4);
    // Two more came while it was saved. Until the journal is cut, what the snapshot has is skipped.
    journal.append(5, &of_addresses(&pod(ONE, "10.0.0.5", "5"))).unwrap();
    journal.append(6, &of_addresses(&pod(TWO, "10.0.0.6", "6"))).unwrap();
    for cut in [false, true] {
        if cut {
            let before = bytes(&directory).len();
            journal.covered(4).unwrap();
            assert!(bytes(&directory).len() < before);
        }
        let (found, read, _) = load(&directory);
        assert_eq!((found.changes, found.lost), (2, 0), "{cut}");
        assert_eq!([ONE, TWO].map(|uid| addresses(&read, uid)), ["[10.0.0.5]", "[10.0.0.6]"]);
        snapshot = read;
    }
    // It goes on in the new file.
    journal.append(7, &of_addresses(&pod(ONE, "10.0.0.7", "7"))).unwrap();
    assert_eq!(load(&directory).0.changes, 3);
    save(&directory, &snapshot, None, 7);
    journal.covered(7).unwrap();
    assert_eq!(bytes(&directory).len() as u64, HEADER);
    journal.append(8, &of_addresses(&pod(ONE, "10.0.0.8", "8"))).unwrap();
    assert_eq!(load(&directory).0.changes, 1);
}

#[test]
fn wherever_it_was_cut_short_whole_changes_count_and_it_goes_on() {
    let directory = saved();
    let mut journal = load(&directory).0.journal;
    let mut ends = vec![HEADER as usize];
    for number in 4..7_u64 {
        journal.append(number, &of_addresses(&pod(ONE, &format!("10.0.0.{number}"), "2"))).unwrap();
        ends.push(bytes(&directory).len());
    }
    let all = bytes(&directory);
    for length in 0..all.len() {
        fs::write(path(directory.path()), &all[..length]).unwrap();
        let (found, snapshot, _) = load(&directory);
        let whole = ends.iter().filter(|end| **end <= length).count().saturating_sub(1);
        assert_eq!(found.changes, whole as u64, "{length}");
        let last = if whole == 0 { "[10.0.0.1]".to_owned() } else { format!("[10.0.0.{}]", 3 + whole) };
        assert_eq!(addresses(&snapshot, ONE), last, "{length}");
        let mut journal = found.journal;
        journal.append(4 + whole as u64, &of_addresses(&pod(TWO, "10.0.0.99", "1"))).unwrap();
        let (found, snapshot, _) = load(&directory);
        assert_eq!((found.changes, found.lost), (whole as u64 + 1, 0), "{length}");
        assert_eq!(addresses(&snapshot, TWO), "[10.0.0.99]", "{length}");
    }
}

#[test]
fn no_damaged_byte_is_taken_for_a_change() {
    let directory = saved();
    let mut journal = load(&directory).0.journal;
    for number in 4..6_u64 {
        journal.append(number, &of_addresses(&pod(ONE, &format!("10.0.0.{number}"), "2"))).unwrap();
    }
    let good = bytes(&directory);
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x41;
        fs::write(path(directory.path()), &bad).unwrap();
        let (found, ..) = load(&directory);
        assert!(found.changes < 2 && found.lost > 0, "byte {at}: {found:?}");
    }
}

#[test]
fn what_follows_a_gap_is_not_written_and_does_not_count() {
    let directory = saved();
    let mut journal = load(&directory).0.journal;
    let change = of_addresses(&pod(ONE, "10.0.0.5", "5"));
    // Change 4 could not be written.
    assert!(journal.append(5, &change).is_err());
    journal.covered(5).unwrap();
    journal.append(6, &change).unwrap();
    // The file is of after a snapshot that is not there.
    let (found, snapshot, _) = load(&directory);
    assert_eq!((found.changes, addresses(&snapshot, ONE)), (0, "[10.0.0.1]".to_owned()));
    assert!(found.lost > 0);
}

#[test]
fn after_a_failure_to_sync_nothing_follows_until_a_snapshot_has_what_was_written() {
    let directory = saved();
    let mut journal = load(&directory).0.journal;
    journal.append(4, &of_policies(&policies(&["shop/q"], &[]), false)).unwrap();
    journal.distrust();
    let next = of_policies(&policies(&["shop/r"], &[]), false);
    journal.append(5, &next).unwrap_err();
    journal.covered(3).unwrap();
    journal.append(5, &next).unwrap_err();
    journal.covered(4).unwrap();
    journal.append(5, &next).unwrap();
}

#[test]
fn it_does_not_grow_for_ever() {
    let directory = saved();
    let mut journal = load(&directory).0.journal;
    let change = of_addresses(&removal(&[ONE]));
    journal.append(4, &change).unwrap();
    journal.length = LIMIT;
    assert!(journal.append(5, &change).is_err());
    journal.covered(5).unwrap();
    journal.append(6, &change).unwrap();
}

#[test]
fn nothing_older_follows_a_snapshot_that_began_anew() {
    let directory = saved();
    let mut journal = load(&directory).0.journal;
    journal.append(4, &of_addresses(&pod(ONE, "10.0.0.4", "4"))).unwrap();
    let mut journal = Journal::begin(directory.path(), SystemTime::now());
    let first = journal.sequence();
    save(&directory, &Snapshot::new(), None, first);
    assert_eq!(load(&directory).0.changes, 0);
    journal.append(first + 1, &of_addresses(&pod(TWO, "10.0.0.2", "1"))).unwrap();
    let (found, snapshot, _) = load(&directory);
    assert_eq!((found.changes, found.lost, snapshot.workload_count()), (1, 0, 1));
}

#[test]
fn it_goes_with_the_snapshot() {
    let directory = saved();
    load(&directory).0.journal.append(4, &of_addresses(&removal(&[ONE]))).unwrap();
    assert!(disk::remove(directory.path()).unwrap());
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}
