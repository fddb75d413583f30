use mesh_common::api::mesh::v1::WorkloadExtension;

use super::*;
use crate::snapshot::fixtures::{extend_workload, parsed_workload, workload};

const POD: &str = "0f3f5a5c-9c1e-4d7a-8f2e-1b2c3d4e5f60";
const SLICE: &str = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0f3f5a5c_9c1e_4d7a_8f2e_1b2c3d4e5f60.slice";
const UID: &str = "c//Pod/shop/one";

fn announced(uid: &str, node: &str, pod_uid: &str, cgroup: &str) -> Arc<Workload> {
    let extension =
        WorkloadExtension { pod_uid: pod_uid.into(), cgroup: cgroup.into(), ..WorkloadExtension::default() };
    parsed_workload(extend_workload(workload(uid, "10.0.0.1", node, &[]), &extension))
}

fn appeared(id: u64, path: &str) -> CgroupEvent {
    CgroupEvent::Appeared { id, path: path.into() }
}

fn gone(path: &str) -> CgroupEvent {
    CgroupEvent::Gone { path: path.into() }
}

fn add(cgroup: u64, uid: &str) -> Change {
    Change::Add { cgroup, uid: uid.into() }
}

fn desired(enrollment: &Enrollment) -> Vec<(u64, String)> {
    enrollment.desired().map(|(id, uid)| (id, uid.to_string())).collect()
}

#[test]
fn a_pod_is_enrolled_whichever_comes_first() {
    let pod = announced(UID, "node-a", POD, "");
    let mut first = Enrollment::new("node-a");
    assert_eq!(first.workload(UID, Some(&pod)), []);
    assert_eq!(first.cgroup(appeared(7, SLICE)), [add(7, UID)]);
    let mut second = Enrollment::new("node-a");
    assert_eq!(second.cgroup(appeared(7, SLICE)), []);
    assert_eq!(second.workload(UID, Some(&pod)), [add(7, UID)]);
    assert_eq!(desired(&first), desired(&second));
    assert_eq!(first.list(), second.list());
}

#[test]
fn containers_need_no_entry() {
    let mut enrollment = Enrollment::new("node-a");
    enrollment.workload(UID, Some(&announced(UID, "node-a", POD, "")));
    enrollment.cgroup(appeared(7, SLICE));
    assert_eq!(enrollment.cgroup(appeared(8, &format!("{SLICE}/cri-containerd-abc.scope"))), []);
    assert_eq!(desired(&enrollment), [(7, UID.to_owned())]);
}

#[test]
fn what_goes_is_removed_once() {
    let pod = announced(UID, "node-a", POD, "");
    let mut enrollment = Enrollment::new("node-a");
    enrollment.workload(UID, Some(&pod));
    enrollment.cgroup(appeared(7, SLICE));
    assert_eq!(enrollment.cgroup(gone(SLICE)), [Change::Remove { cgroup: 7 }]);
    assert_eq!(enrollment.cgroup(gone(SLICE)), []);
    assert_eq!(enrollment.cgroup(appeared(9, SLICE)), [add(9, UID)]);
    assert_eq!(enrollment.workload(UID, None), [Change::Remove { cgroup: 9 }]);
    assert_eq!(enrollment.workload(UID, None), []);
    assert_eq!(enrollment.list(), []);
}

#[test]
fn a_cgroup_made_anew_between_two_looks_is_exchanged() {
    let mut enrollment = Enrollment::new("node-a");
    enrollment.workload(UID, Some(&announced(UID, "node-a", POD, "")));
    enrollment.cgroup(appeared(7, SLICE));
    assert_eq!(enrollment.cgroup(appeared(7, SLICE)), []);
    assert_eq!(enrollment.cgroup(appeared(9, SLICE)), [Change::Remove { cgroup: 7 }, add(9, UID)]);
    assert_eq!(desired(&enrollment), [(9, UID.to_owned())]);
}

#[test]
fn pods_of_other_nodes_are_not_ours() {
    let mut enrollment = Enrollment::new("node-a");
    enrollment.cgroup(appeared(7, SLICE));
    // The node is decided here too, not only by what the decoder keeps.
    assert_eq!(enrollment.workload(UID, Some(&announced(UID, "", POD, ""))), []);
    let mut other = Enrollment::new("node-b");
    other.cgroup(appeared(7, SLICE));
    assert_eq!(other.workload(UID, Some(&announced(UID, "node-a", POD, "web"))), []);
    assert_eq!(other.list(), []);
}

#[test]
fn a_path_is_matched_exactly() {
    for (node, path) in [("node-a", "system.slice/web.service"), ("", "/system.slice/web.service/")] {
        let mut enrollment = Enrollment::new("node-a");
        enrollment.workload(UID, Some(&announced(UID, node, "", path)));
        assert_eq!(enrollment.cgroup(appeared(1, "system.slice")), []);
        assert_eq!(enrollment.cgroup(appeared(2, "system.slice/web.service")), [add(2, UID)]);
        assert_eq!(enrollment.cgroup(appeared(3, "system.slice/web.service/sub")), []);
        assert_eq!(enrollment.cgroup(appeared(4, "other/system.slice/web.service")), []);
    }
}

#[test]
fn paths_that_climb_or_mean_the_root_claim_nothing() {
    for path in ["/", "", ".", "..", "a/../b", "../a"] {
        let mut enrollment = Enrollment::new("node-a");
        enrollment.workload(UID, Some(&announced(UID, "node-a", "", path)));
        for (id, there) in ["", "a", "b", "a/b"].iter().enumerate() {
            assert_eq!(enrollment.cgroup(appeared(id as u64, there)), [], "{path:?}");
        }
    }
}

#[test]
fn a_workload_may_change_what_it_claims() {
    let mut enrollment = Enrollment::new("node-a");
    enrollment.cgroup(appeared(1, "a"));
    enrollment.cgroup(appeared(2, "b"));
    assert_eq!(enrollment.workload(UID, Some(&announced(UID, "node-a", "", "a"))), [add(1, UID)]);
    assert_eq!(enrollment.workload(UID, Some(&announced(UID, "node-a", "", "a"))), []);
    let changes = enrollment.workload(UID, Some(&announced(UID, "node-a", "", "b")));
    assert_eq!(changes, [Change::Remove { cgroup: 1 }, add(2, UID)]);
}

#[test]
fn two_claims_on_one_cgroup_have_one_winner_in_any_order() {
    let (one, two) = (announced("c//Pod/a/1", "node-a", "", "x"), announced("c//Pod/a/2", "node-a", "", "x"));
    for order in [[&one, &two], [&two, &one]] {
        let mut enrollment = Enrollment::new("node-a");
        enrollment.cgroup(appeared(1, "x"));
        for workload in order {
            enrollment.workload(&workload.uid(), Some(workload));
        }
        assert_eq!(desired(&enrollment), [(1, one.uid())]);
        assert_eq!(enrollment.workload(&one.uid(), None), [add(1, &two.uid())]);
    }
}

#[test]
fn a_pod_cannot_be_impersonated_from_a_deeper_cgroup() {
    let fake = format!("system.slice/evil.service/kubepods/pod{POD}");
    for order in [[SLICE, &fake], [&fake, SLICE]] {
        let mut enrollment = Enrollment::new("node-a");
        enrollment.workload(UID, Some(&announced(UID, "node-a", POD, "")));
        for path in order {
            enrollment.cgroup(appeared(if path == SLICE { 1 } else { 2 }, path));
        }
        assert_eq!(desired(&enrollment), [(1, UID.to_owned())]);
    }
}

#[test]
fn the_list_shows_the_announced_and_the_enrolled() {
    let mut enrollment = Enrollment::new("node-a");
    enrollment.workload("c//Pod/a/waiting", Some(&announced("c//Pod/a/waiting", "node-a", "", "later")));
    enrollment.workload(UID, Some(&announced(UID, "node-a", POD, "")));
    enrollment.cgroup(appeared(7, SLICE));
    let list = enrollment.list();
    assert_eq!(&*list[0].uid, "c//Pod/a/waiting");
    assert_eq!(list[0].cgroups, []);
    assert_eq!(list[1].cgroups, [(7, PathBuf::from(SLICE))]);
    assert_eq!(enrollment.cgroup_count(), 1);
}
