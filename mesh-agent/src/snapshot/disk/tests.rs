use super::super::Snapshot;
use mesh_common::api::istio::security::Scope;
use mesh_common::api::mesh::v1::WorkloadExtension;

use super::super::fixtures::{
    extend_workload, of_policy, of_service, of_workload, policy, service, update, workload,
};
use super::*;
use crate::fixtures::Directory;

fn shop() -> Snapshot {
    let mut snapshot = Snapshot::new();
    let key = "shop/web.shop.svc.cluster.local";
    let mut resources = vec![of_service(service(key, &["10.96.0.1"], &[(80, 8080)]), "v1")];
    for i in 0..3 {
        let (uid, address) = (format!("c//Pod/shop/{i}"), format!("10.0.0.{i}"));
        let mut pod = workload(&uid, &address, "node-a", &[key]);
        // Of every kind: a deployment, a cron job, a pod.
        (pod.workload_name, pod.workload_type) = (format!("web-{i}"), i);
        (pod.canonical_name, pod.canonical_revision) = ("web".to_owned(), format!("v{i}"));
        let extension = WorkloadExtension { pod_uid: format!("u{i}"), ..WorkloadExtension::default() };
        resources.push(of_workload(extend_workload(pod, &extension), &format!("{i:04x}")));
    }
    snapshot.apply(update(&resources));
    snapshot
}

/// One that is understood, and two that are not.
fn policies() -> Vec<Arc<Authorization>> {
    let good = of_policy(policy("shop/one", Scope::Namespace), "3");
    let mut odd = of_policy(policy("shop/two", Scope::Global), "4");
    let nothing = xds::Resource { name: "shop/three".to_owned(), ..xds::Resource::default() };
    odd.resource.as_mut().unwrap().value.push(0xff);
    [good, odd, nothing].map(|resource| Arc::new(Authorization::read(resource))).into()
}

fn saved() -> Directory {
    let directory = Directory::new();
    let held = shop().held().with_policies(Some(policies()));
    save(directory.path(), "node-a", &held).unwrap();
    directory
}

fn reload(directory: &Directory) -> Result<Option<Held>, LoadError> {
    load(directory.path(), &mut Interner::new("node-a"))
}

#[test]
fn what_was_saved_comes_back() {
    let directory = saved();
    let mut held = reload(&directory).unwrap().unwrap();
    assert_eq!(held.take_policies(), Some(policies()));
    let mut back = Snapshot::new();
    back.restore(held);
    let snapshot = shop();
    assert_eq!(back.versions(), snapshot.versions());
    for workload in snapshot.workloads() {
        assert!(workload.app.is_some());
        assert_eq!(back.workload(&workload.uid()), Some(workload));
    }
    for service in snapshot.services() {
        assert_eq!(back.service(&service.key), Some(service));
    }
}

#[test]
fn policies_that_were_not_known_are_not_taken_for_none() {
    let directory = Directory::new();
    for policies in [None, Some(Vec::new())] {
        save(directory.path(), "node-a", &shop().held().with_policies(policies.clone())).unwrap();
        assert_eq!(reload(&directory).unwrap().unwrap().take_policies(), policies);
    }
}

#[test]
fn a_file_from_before_policies_or_from_before_what_workloads_are_instances_of_is_not_used() {
    for format in [1, 2] {
        let directory = saved();
        let mut old = fs::read(path(directory.path())).unwrap();
        old[8] = format;
        fs::write(path(directory.path()), old).unwrap();
        let error = reload(&directory).unwrap_err();
        assert!(matches!(error, LoadError::Format { found, .. } if found == u32::from(format)), "{error}");
    }
}

#[test]
fn nothing_saved_is_no_error() {
    assert!(reload(&Directory::new()).unwrap().is_none());
}

#[test]
fn saving_replaces_the_last_one_and_leaves_nothing_else() {
    let directory = saved();
    save(directory.path(), "node-a", &Snapshot::new().held()).unwrap();
    assert_eq!(reload(&directory).unwrap().unwrap().resources, []);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn a_directory_is_made_if_need_be() {
    let directory = Directory::new();
    let below = directory.path().join("a/b");
    let written = save(&below, "node-a", &shop().held()).unwrap();
    assert_eq!(fs::metadata(path(&below)).unwrap().len(), written);
}

#[test]
fn every_damaged_byte_is_noticed() {
    let directory = saved();
    let good = fs::read(path(directory.path())).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x41;
        fs::write(path(directory.path()), &bad).unwrap();
        assert!(reload(&directory).is_err(), "byte {at}");
    }
}

#[test]
fn every_shortened_file_is_noticed() {
    let directory = saved();
    let good = fs::read(path(directory.path())).unwrap();
    for length in 0..good.len() {
        fs::write(path(directory.path()), &good[..length]).unwrap();
        let error = reload(&directory).unwrap_err();
        assert!(matches!(error, LoadError::Damaged { .. }), "{length}: {error}");
    }
    let longer = [&good[..], b"x"].concat();
    fs::write(path(directory.path()), longer).unwrap();
    assert!(reload(&directory).is_err());
}

#[test]
fn a_file_of_another_node_or_format_is_not_used() {
    let directory = saved();
    let error = load(directory.path(), &mut Interner::new("node-b")).unwrap_err();
    assert!(matches!(error, LoadError::OtherNode { .. }), "{error}");
    let mut other = fs::read(path(directory.path())).unwrap();
    other[8] = 99;
    fs::write(path(directory.path()), other).unwrap();
    let error = reload(&directory).unwrap_err();
    assert!(matches!(error, LoadError::Format { found: 99, .. }), "{error}");
}

#[test]
fn removing_says_whether_there_was_one() {
    let directory = saved();
    assert!(remove(directory.path()).unwrap());
    assert!(!remove(directory.path()).unwrap());
}
