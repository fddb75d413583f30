//! When the kernel has not room for all.

use super::*;

/// One set for a workload of this node and one for another's; two sources, one port each: two verdicts a set.
fn two_sets(capacity: usize) -> World {
    let mut world = World::new(capacity);
    world.apply(
        updated(&[deny_port("near/ns", Scope::Namespace, 1), deny_port("far/ns", Scope::Namespace, 1)]),
        true,
    );
    world.pods(&[
        pod("far/db", "10.0.1.1", "node-b", &[]),
        pod("near/web", "10.0.0.1", HERE, &[]),
        pod("free/one", "10.0.0.2", HERE, &[]),
    ]);
    world
}

#[test]
fn what_does_not_fit_is_left_out_and_counted_and_workloads_of_this_node_come_first() {
    // The set that is always there: one port, two sources; then two ports, two sources each.
    let world = two_sets(10);
    assert_eq!((world.policies.counts().verdicts, world.policies.counts().left_out), (10, 0));
    let world = two_sets(6);
    assert!(world.kernel.by_identity("free/one", "near/web", 80, 4).is_some());
    assert!(world.kernel.by_identity("near/web", "near/web", 80, 4).is_some());
    let counts = world.policies.counts();
    assert_eq!(world.kernel.verdicts.len(), counts.verdicts);
    assert!(counts.left_out > 0 && counts.verdicts <= 6, "{counts:?}");
    assert_eq!(world.kernel.by_identity("free/one", "far/db", 80, 4), None);
}

#[test]
fn a_set_that_comes_near_takes_the_room_of_one_that_is_far() {
    let mut world = World::new(5);
    let policies = [deny_port("near/ns", Scope::Namespace, 1), deny_port("far/ns", Scope::Namespace, 1)];
    world.apply(updated(&policies), true);
    world.pods(&[pod("far/db", "10.0.1.1", "node-b", &[]), pod("free/one", "10.0.0.2", HERE, &[])]);
    assert!(world.kernel.by_identity("free/one", "far/db", 80, 4).is_some());
    let plan = world.pods(&[pod("near/web", "10.0.0.1", HERE, &[])]);
    for source in ["free/one", "near/web"] {
        assert!(world.kernel.by_identity(source, "near/web", 80, 4).is_some(), "{source}");
    }
    assert_eq!(world.kernel.by_identity("free/one", "far/db", 80, 4), None);
    assert!(!plan.evicted.is_empty() && world.kernel.verdicts.len() <= 5);
    assert_eq!(world.kernel.verdicts.len(), world.policies.counts().verdicts);
    // It has gone: the far one comes back.
    world.pods_gone(&["near/web"]);
    let plan = world.policies.tick(&world.snapshot, Instant::now() + HOUR);
    world.enforce(&plan);
    let plan = world.policies.tick(&world.snapshot, Instant::now() + HOUR);
    world.enforce(&plan);
    assert!(world.kernel.by_identity("free/one", "far/db", 80, 4).is_some());
}

#[test]
fn a_set_has_all_verdicts_of_a_source_or_none() {
    for capacity in 0..40 {
        let mut world = World::new(capacity);
        let named = vec![ports(&[1, 2, 3])];
        world.apply(updated(&[policy("near/ns", Scope::Namespace, Action::Deny, named)]), true);
        let pods: Vec<_> =
            (0..4).map(|i| pod(&format!("near/{i}"), &format!("10.0.0.{i}"), HERE, &[])).collect();
        world.pods(&pods);
        assert!(world.kernel.verdicts.len() <= capacity && world.kernel.plain.len() <= capacity);
        for i in 0..4 {
            let source = format!("near/{i}");
            let found =
                [1, 2, 3, 80].map(|port| world.kernel.by_identity(&source, "near/0", port, 4).is_some());
            assert!(found == [true; 4] || found == [false; 4], "{capacity}: {found:?}");
        }
        let found =
            [1, 2, 3, 80].map(|port| world.kernel.by_address([9, 9, 9, 9].into(), "near/0", port).is_some());
        assert!(found == [true; 4] || found == [false; 4], "{capacity}: {found:?}");
    }
}

#[test]
fn a_kernel_that_takes_no_more_never_holds_half_a_set_and_is_asked_again() {
    for full_at in 0..12 {
        let mut world = World::new(1_000);
        world.kernel.full_at = Some(full_at);
        world.apply(updated(&[deny_port("near/ns", Scope::Namespace, 1)]), true);
        world.pods(&[pod("near/web", "10.0.0.1", HERE, &[]), pod("near/api", "10.0.0.2", HERE, &[])]);
        for source in ["near/web", "near/api"] {
            let denied = world.kernel.by_identity(source, "near/web", 1, 4);
            assert!(!denied.is_some_and(|verdict| verdict.allows()), "{full_at}: port 1 goes by the others");
        }
        assert!(!world.kernel.by_address([9, 9, 9, 9].into(), "near/web", 1).is_some_and(|v| v.allows()));
        world.kernel.full_at = None;
        let plan = world.policies.tick(&world.snapshot, Instant::now());
        world.enforce(&plan);
        assert!(world.allows("near/api", "near/web", 80) && !world.allows("near/api", "near/web", 1));
        assert!(world.kernel.by_address([9, 9, 9, 9].into(), "near/web", 80).unwrap().allows());
    }
}

#[test]
fn after_one_write_that_fails_no_port_goes_by_the_verdict_of_the_others() {
    for writes in 0..24 {
        let mut world = World::new(1_000);
        world.apply(updated(&[deny_port("near/ns", Scope::Namespace, 1)]), true);
        world.kernel.stumbles_after = Some(writes);
        world.pods(&[pod("near/web", "10.0.0.1", HERE, &[]), pod("near/api", "10.0.0.2", HERE, &[])]);
        for source in ["near/web", "near/api"] {
            let denied = world.kernel.by_identity(source, "near/web", 1, 4);
            assert!(!denied.is_some_and(|verdict| verdict.allows()), "{writes}");
        }
        let stranger = [9, 9, 9, 9].into();
        assert!(!world.kernel.by_address(stranger, "near/web", 1).is_some_and(|v| v.allows()), "{writes}");
        let failed = world.kernel.stumbles_after.is_none();
        assert_eq!(world.policies.counts().write_failures, u64::from(failed));
        let plan = world.policies.tick(&world.snapshot, Instant::now());
        world.enforce(&plan);
        assert!(world.allows("near/api", "near/web", 80) && !world.allows("near/web", "near/web", 1));
        assert!(world.kernel.by_address(stranger, "near/web", 80).unwrap().allows());
    }
}
