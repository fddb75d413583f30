use mesh_common::api::istio::security::{Action as WireAction, Authorization, Scope};

use super::super::testing::*;
use super::*;
use crate::identity::spiffe_of;

fn judge(world: &World, port: u16) -> Judgement {
    let (web, till) = (world.pod("shop/web"), world.pod("bank/till"));
    let id = spiffe_of(&web).unwrap();
    world.policies.shared().judge(&till, Some(&id), [10, 0, 0, 1].into(), [10, 0, 0, 2].into(), port)
}

fn world(policies: &[Authorization]) -> World {
    let mut world = World::new(1_000);
    world
        .pods(&[pod("shop/web", "10.0.0.1", HERE, &[]), pod("bank/till", "10.0.0.2", HERE, &["bank/named"])]);
    world.apply(updated(policies), true);
    world
}

fn named() -> Authorization {
    policy("bank/named", Scope::WorkloadSelector, WireAction::Deny, vec![ports(&[9])])
}

fn refused(cause: Cause, policy: &str, rule: Option<usize>) -> Judgement {
    Judgement { allowed: false, cause, policy: Some(policy.into()), rule, would_deny: None }
}

#[test]
fn a_judgement_says_why() {
    assert_eq!(
        judge(&world(&[named()]), 80),
        Judgement { allowed: true, cause: Cause::NoAllow, policy: None, rule: None, would_deny: None }
    );
    assert_eq!(judge(&world(&[named()]), 9), refused(Cause::Rule, "bank/named", Some(0)));
    let allow = policy("bank/allow", Scope::Namespace, WireAction::Allow, vec![ports(&[80])]);
    let world = world(&[named(), allow]);
    let judged = judge(&world, 80);
    assert!(judged.allowed && judged.policy.as_deref() == Some("bank/allow") && judged.rule == Some(0));
    assert_eq!(judge(&world, 81), refused(Cause::NoMatch, "bank/allow", None));
}

#[test]
fn whatever_is_missing_refuses_by_its_name() {
    let mut nothing = World::new(1_000);
    nothing.pods(&[pod("shop/web", "10.0.0.1", HERE, &[]), pod("bank/till", "10.0.0.2", HERE, &[])]);
    assert_eq!(judge(&nothing, 80), refused(Cause::NotArrived, NOT_ARRIVED, None));
    assert_eq!(judge(&world(&[]), 80), refused(Cause::Awaited, "bank/named", None));
    let odd = Authorization { action: 9, ..policy("mesh/odd", Scope::Global, WireAction::Allow, vec![]) };
    assert_eq!(judge(&world(&[named(), odd]), 80), refused(Cause::NotUnderstood, "mesh/odd", None));
    let odd = Authorization { action: 9, ..named() };
    assert_eq!(judge(&world(&[odd]), 80), refused(Cause::NotUnderstood, "bank/named", None));
}

#[test]
fn a_workload_that_the_owner_has_not_seen_yet_is_judged_all_the_same() {
    let world = world(&[policy("new/ns", Scope::Namespace, WireAction::Deny, vec![ports(&[80])])]);
    let stranger = pod("new/one", "10.0.0.9", HERE, &[]);
    let stranger = crate::snapshot::fixtures::parsed_workload(stranger);
    let judged = world.policies.shared().judge(&stranger, None, [1; 4].into(), [2; 4].into(), 80);
    assert_eq!(judged, refused(Cause::Rule, "new/ns", Some(0)));
    assert_eq!(world.policies.set_of(&stranger), 1, "but the kernel refuses until it is announced");
}

#[test]
fn a_dry_run_is_told_where_it_would_refuse() {
    let dry = |action, port| Authorization {
        dry_run: true,
        ..policy("bank/dry", Scope::Namespace, action, vec![ports(&[port])])
    };
    let would = |dry: Authorization, port| {
        let judged = judge(&world(&[named(), dry]), port);
        (judged.allowed, judged.would_deny)
    };
    let by = |rule| Some(("bank/dry".into(), rule));
    assert_eq!(would(dry(WireAction::Deny, 80), 80), (true, by(Some(0))));
    assert_eq!(would(dry(WireAction::Deny, 80), 81), (true, None));
    assert_eq!(would(dry(WireAction::Allow, 80), 80), (true, None));
    assert_eq!(would(dry(WireAction::Allow, 80), 81), (true, by(None)));
    assert_eq!(would(dry(WireAction::Allow, 80), 9), (false, None));
}

#[test]
fn readers_hear_of_a_change_that_concerns_an_open_connection() {
    let mut world = world(&[named()]);
    let mut changed = world.policies.shared().changed();
    changed.mark_unchanged();
    world.pods(&[pod("bank/new", "10.0.0.7", HERE, &[])]);
    assert!(!changed.has_changed().unwrap());
    // Another policy is attached to the workload.
    world.pods(&[pod("bank/till", "10.0.0.2", HERE, &["bank/named", "bank/second"])]);
    assert!(changed.has_changed().unwrap());
    changed.mark_unchanged();
    world.apply(
        updated(&[policy("bank/second", Scope::WorkloadSelector, WireAction::Deny, vec![ports(&[80])])]),
        false,
    );
    assert!(changed.has_changed().unwrap());
    assert_eq!(judge(&world, 80), refused(Cause::Rule, "bank/second", Some(0)));
}
