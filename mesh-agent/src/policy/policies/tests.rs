mod capacity;
mod tables;

use std::time::Duration;

use mesh_common::api::istio::security::{Action, Match, Scope};

use super::super::testing::*;
use super::*;
use crate::policy::NOT_ARRIVED;
use crate::snapshot::fixtures::of_policy;

const HOUR: Duration = Duration::from_secs(3600);

fn deny_port(name: &str, scope: Scope, port: u32) -> mesh_common::api::istio::security::Authorization {
    policy(name, scope, Action::Deny, vec![ports(&[port])])
}

/// `shop/web` and `bank/till` here, `shop/db` elsewhere.
fn world() -> World {
    let mut world = World::new(10_000);
    world.pods(&[
        pod("shop/web", "10.0.0.1", HERE, &[]),
        pod("bank/till", "10.0.0.2", HERE, &[]),
        pod("shop/db", "10.0.1.1", "node-b", &["shop/db-only"]),
    ]);
    world
}

fn complete(policies: &[mesh_common::api::istio::security::Authorization]) -> World {
    let mut world = world();
    world.apply(updated(policies), true);
    world
}

impl World {
    fn allows(&self, from: &str, to: &str, port: u16) -> bool {
        self.kernel.by_identity(from, to, port, 4).unwrap().allows()
    }

    /// The name of the policy that decides.
    fn decider(&self, from: &str, to: &str, port: u16) -> String {
        let verdict = self.kernel.by_identity(from, to, port, 4).unwrap();
        assert!(!verdict.allows());
        self.policies.name(verdict.policy).unwrap().to_string()
    }

    fn awaited(&self) -> Vec<String> {
        self.policies.awaited().iter().map(|name| name.to_string()).collect()
    }
}

#[test]
fn before_policies_have_come_everything_is_refused() {
    let mut world = world();
    assert_eq!(world.decider("shop/web", "bank/till", 80), NOT_ARRIVED);
    assert_eq!(world.policies.cause(NOT_ARRIVED), Cause::NotArrived);
    assert!(!world.kernel.by_address([9, 9, 9, 9].into(), "bank/till", 80).unwrap().allows());
    // A part of the answer is not the answer.
    world.apply(updated(&[policy("bank/all", Scope::Namespace, Action::Allow, vec![])]), false);
    assert_eq!(world.decider("shop/web", "bank/till", 80), NOT_ARRIVED);
    let counts = world.policies.counts();
    assert_eq!((counts.complete, counts.refusing_not_arrived, counts.refusing), (false, 2, 0));
    assert_eq!(world.policies.held(), None, "what is saved would pass for everything");
    world.apply(PolicyUpdate::default(), true);
    assert_eq!(world.kernel.set("shop/web"), 0);
    assert!(world.allows("shop/web", "bank/till", 80), "by the rule of nothing in it");
    assert_eq!(world.policies.counts().refusing_not_arrived, 0);
}

#[test]
fn a_workload_without_policies_has_no_set_and_no_verdicts() {
    let mut world = complete(&[]);
    let web = world.pod("shop/web");
    assert_eq!((world.policies.set_of(&web), world.kernel.set("shop/web")), (0, 0));
    // Only the set that is always there, and the one of the policy that db waits for.
    let sets: std::collections::BTreeSet<u32> =
        world.kernel.verdicts.keys().map(|key| key.policies).collect();
    assert_eq!(sets, [Sets::NOT_ARRIVED, world.kernel.set("shop/db")].into());
    world.pods_gone(&["shop/web"]);
    assert!(world.kernel.verdicts.keys().all(|key| key.source == identity_of("c//Pod/bank/till").0));
}

#[test]
fn each_scope_reaches_whom_it_is_for() {
    let world = complete(&[
        deny_port("mesh/all", Scope::Global, 1),
        deny_port("shop/ns", Scope::Namespace, 2),
        deny_port("shop/db-only", Scope::WorkloadSelector, 3),
        deny_port("shop/nobody", Scope::WorkloadSelector, 4),
    ]);
    let denied = |to: &str| (1..=5).filter(|port| !world.allows("shop/web", to, *port)).collect::<Vec<_>>();
    assert_eq!(denied("bank/till"), [1]);
    assert_eq!(denied("shop/web"), [1, 2]);
    assert_eq!(denied("shop/db"), [1, 2, 3]);
    assert_eq!(world.decider("shop/web", "shop/db", 3), "shop/db-only");
}

#[test]
fn a_policy_that_is_named_and_has_not_come_refuses_by_its_name() {
    let mut world = complete(&[]);
    assert_eq!(world.decider("shop/web", "shop/db", 80), "shop/db-only");
    assert_eq!(world.awaited(), ["shop/db-only"]);
    assert_eq!(world.policies.cause("shop/db-only"), Cause::Awaited);
    assert_eq!(world.policies.counts().refusing, 0, "it is not of this node");
    world.pods(&[pod("bank/vault", "10.0.0.9", HERE, &["bank/none", "shop/db-only"])]);
    assert_eq!((world.policies.counts().awaited, world.policies.counts().refusing), (2, 1));
    world.apply(updated(&[deny_port("shop/db-only", Scope::WorkloadSelector, 3)]), false);
    assert!(world.allows("shop/web", "shop/db", 80) && !world.allows("shop/web", "shop/db", 3));
    assert_eq!(world.decider("shop/web", "bank/vault", 80), "bank/none");
    // Gone again: it refuses again.
    world.apply(removed(&["shop/db-only"]), false);
    assert_eq!(world.decider("shop/web", "shop/db", 80), "shop/db-only");
    assert_eq!(world.policies.counts().awaited, 2);
}

#[test]
fn a_policy_that_is_not_understood_refuses_whom_it_is_for() {
    let odd = |name: &str, scope: Scope| mesh_common::api::istio::security::Authorization {
        action: 9,
        ..deny_port(name, scope, 1)
    };
    let refused = |world: &World| {
        let to = ["shop/web", "bank/till", "shop/db"];
        to.map(|to| !world.kernel.by_identity("shop/web", to, 80, 4).is_none_or(|v| v.allows()))
    };
    let named = deny_port("shop/db-only", Scope::WorkloadSelector, 3);
    for (policy, wanted) in [
        (odd("mesh/odd", Scope::Global), [true, true, true]),
        (odd("shop/odd", Scope::Namespace), [true, false, true]),
        (odd("shop/odd", Scope::WorkloadSelector), [false, false, false]),
        (odd("shop/db-only", Scope::WorkloadSelector), [false, false, true]),
    ] {
        let world = complete(&[named.clone(), policy.clone()]);
        assert_eq!(
            world.policies.cause(&format!("{}/{}", policy.namespace, policy.name)),
            Cause::NotUnderstood
        );
        assert_eq!(refused(&world), wanted, "{policy:?}");
        assert_eq!(world.policies.counts().not_understood, 1);
    }
    // Its scope cannot be read: everybody of its namespace; everybody, where nobody is of it.
    for (name, wanted) in
        [("shop/blind", [true, false, true]), ("odd/blind", [true; 3]), ("blind", [true; 3])]
    {
        let mut world = complete(std::slice::from_ref(&named));
        let mut resource = of_policy(deny_port("a/b", Scope::Global, 1), "");
        resource.name = name.to_owned();
        let blind = Arc::new(Authorization::read(resource));
        world.apply(PolicyUpdate { updated: vec![blind], removed: Vec::new() }, false);
        assert_eq!(refused(&world), wanted, "{name}");
        assert_eq!(world.decider("shop/web", "shop/db", 80), name);
        world.apply(removed(&[name]), false);
        assert_eq!(refused(&world), [false; 3], "{name} has gone");
    }
}

#[test]
fn a_namespace_that_gets_its_first_workload_takes_its_blind_policy_from_the_others() {
    let mut world = complete(&[deny_port("shop/db-only", Scope::WorkloadSelector, 3)]);
    let mut resource = of_policy(deny_port("a/b", Scope::Global, 1), "");
    resource.name = "new/blind".to_owned();
    let blind = Arc::new(Authorization::read(resource));
    world.apply(PolicyUpdate { updated: vec![blind], removed: Vec::new() }, false);
    assert_eq!(world.decider("shop/web", "bank/till", 80), "new/blind");
    world.pods(&[pod("new/one", "10.0.0.5", HERE, &[])]);
    assert_eq!(world.decider("shop/web", "new/one", 80), "new/blind");
    assert_eq!(world.kernel.set("bank/till"), 0);
    world.pods_gone(&["new/one"]);
    let plan = world.policies.tick(&world.snapshot, Instant::now() + HOUR);
    world.enforce(&plan);
    assert_eq!(world.decider("shop/web", "bank/till", 80), "new/blind");
}

#[test]
fn what_is_sent_again_changes_nothing() {
    let policies =
        [deny_port("shop/ns", Scope::Namespace, 2), deny_port("shop/db-only", Scope::Namespace, 3)];
    let mut world = complete(&policies);
    let mut changed = world.policies.shared().changed();
    changed.mark_unchanged();
    assert!(world.policies.take_unsaved());
    assert!(world.apply(updated(&policies), true).is_empty());
    assert!(!world.policies.take_unsaved());
    assert!(!changed.has_changed().unwrap());
    let other = [deny_port("shop/ns", Scope::Namespace, 22)];
    assert!(!world.apply(updated(&other), true).is_empty());
    assert!(changed.has_changed().unwrap() && world.policies.take_unsaved());
}

#[test]
fn news_is_what_differs_and_all_of_it_when_all_have_been_named() {
    let [one, two] = [2, 3].map(|port| deny_port("shop/ns", Scope::Namespace, port));
    let other = deny_port("shop/db-only", Scope::Namespace, 3);
    let first = updated(std::slice::from_ref(&one));
    let last = updated(std::slice::from_ref(&other));
    let names = |news: Option<PolicyUpdate>| -> Vec<String> {
        let news = news.unwrap();
        let updated = news.updated.iter().map(|one| one.name.to_string());
        updated.chain(news.removed.iter().map(|name| format!("-{name}"))).collect()
    };
    let mut world = world();
    assert_eq!(world.policies.news(&first, false), None, "refused until all have come");
    world.apply(first, false);
    assert_eq!(names(world.policies.news(&last, true)), ["shop/ns", "shop/db-only"]);
    world.apply(last, true);
    assert_eq!(world.policies.news(&updated(&[one.clone(), other.clone()]), true), None);
    assert_eq!(world.policies.news(&removed(&["shop/none"]), true), None);
    assert_eq!(names(world.policies.news(&updated(&[two.clone(), other]), true)), ["shop/ns"]);
    assert_eq!(names(world.policies.news(&updated(&[two, one]), true)), ["shop/ns", "shop/ns"]);
    assert_eq!(names(world.policies.news(&removed(&["shop/ns"]), true)), ["-shop/ns"]);
}

#[test]
fn a_change_concerns_only_whom_it_is_for() {
    let mut world = complete(&[deny_port("shop/db-only", Scope::WorkloadSelector, 3)]);
    let till = world.kernel.set("bank/till");
    let plan = world.apply(updated(&[deny_port("shop/ns", Scope::Namespace, 2)]), false);
    let told: Vec<String> = plan.sets.iter().map(|(workload, _)| workload.uid()).collect();
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told.iter().all(|uid| uid.starts_with("c//Pod/shop/")), "{told:?}");
    assert_eq!(world.kernel.set("bank/till"), till);
}

#[test]
fn workloads_alike_share_a_set_and_a_change_gives_it_another_number() {
    let mut world = World::new(10_000);
    let pods: Vec<_> =
        (0..50).map(|i| pod(&format!("shop/{i}"), &format!("10.0.0.{i}"), HERE, &[])).collect();
    world.pods(&pods);
    world.apply(updated(&[deny_port("shop/ns", Scope::Namespace, 2)]), true);
    let first = world.kernel.set("shop/0");
    assert!((0..50).all(|i| world.kernel.set(&format!("shop/{i}")) == first) && first > 1);
    world.apply(updated(&[deny_port("shop/ns", Scope::Namespace, 3)]), false);
    let second = world.kernel.set("shop/0");
    assert_ne!(first, second);
    assert!(world.kernel.verdicts.keys().all(|key| key.policies != first), "the old one stays behind");
    assert!(world.kernel.plain.keys().all(|(_, key)| key.policies != first));
    // And back: not the old number.
    world.apply(updated(&[deny_port("shop/ns", Scope::Namespace, 2)]), false);
    assert_ne!(world.kernel.set("shop/0"), first);
}

#[test]
fn at_no_step_of_a_change_is_anything_allowed_that_neither_old_nor_new_policies_allow() {
    // From "all but 443" to "nothing but 80", and back.
    let (old, new) = (
        deny_port("shop/ns", Scope::Namespace, 443),
        policy("shop/ns", Scope::Namespace, Action::Allow, vec![ports(&[80])]),
    );
    for (before, after) in [(&old, &new), (&new, &old)] {
        let mut world = complete(std::slice::from_ref(before));
        let at = |world: &World, port| {
            let identity =
                world.kernel.by_identity("bank/till", "shop/web", port, 4).is_some_and(|v| v.allows());
            let plain =
                world.kernel.by_address([9, 9, 9, 9].into(), "shop/web", port).is_some_and(|v| v.allows());
            (identity, plain)
        };
        let allowed = |world: &World| [80, 443, 7].map(|port| at(world, port));
        let first = allowed(&world);
        let plan = world.policies.apply(updated(std::slice::from_ref(after)), false, &world.snapshot);
        let mut seen = Vec::new();
        for (key, verdict) in &plan.verdicts {
            world.kernel.put(key, verdict).unwrap();
            seen.push(allowed(&world));
        }
        for (prefix, key, verdict) in &plan.plain {
            world.kernel.put_plain(*prefix, key, verdict).unwrap();
            seen.push(allowed(&world));
        }
        assert!(seen.iter().all(|now| *now == first), "before the peers lead to the new set");
        for (workload, set) in &plan.sets {
            world.kernel.peers.insert(workload.uid(), *set);
        }
        let last = allowed(&world);
        world.policies.clean(&plan, &mut world.kernel);
        assert_eq!(allowed(&world), last);
        assert_ne!(first, last);
    }
}

#[test]
fn a_dry_run_makes_no_set() {
    let dry = mesh_common::api::istio::security::Authorization {
        dry_run: true,
        ..deny_port("bank/dry", Scope::Namespace, 80)
    };
    let world = complete(&[dry]);
    assert_eq!(world.kernel.set("bank/till"), 0);
}

#[test]
fn peers_are_written_anew_when_the_first_dry_run_comes_and_when_the_last_goes() {
    let dry = |name, dry_run| mesh_common::api::istio::security::Authorization {
        dry_run,
        ..deny_port(name, Scope::Namespace, 80)
    };
    let mut world = complete(&[deny_port("bank/real", Scope::Namespace, 81)]);
    let set = world.kernel.set("bank/till");
    let mut change = |update| {
        let plan = world.apply(update, false);
        let written: Vec<_> = plan.sets.iter().map(|(workload, _)| workload.uid()).collect();
        let sets = plan.sets.iter().map(|(_, set)| *set).collect::<Vec<_>>();
        assert!(plan.verdicts.is_empty() && plan.gone.is_empty(), "{plan:?}");
        assert!(sets.iter().all(|now| *now == set), "{plan:?}");
        (
            written,
            world.policies.bearing(&world.pod("bank/till")).rehearsed,
            world.policies.bearing(&world.pod("shop/web")).rehearsed,
        )
    };
    let till = || vec!["c//Pod/bank/till".to_owned()];
    assert_eq!(change(updated(&[dry("bank/dry", true)])), (till(), true, false));
    assert_eq!(change(updated(&[dry("bank/more", true)])), (vec![], true, false));
    assert_eq!(change(removed(&["bank/dry"])), (vec![], true, false));
    assert_eq!(change(removed(&["bank/more"])), (till(), false, false));
    // What is tried first and then put in force.
    change(updated(&[dry("bank/dry", true)]));
    let plan = world.apply(updated(&[dry("bank/dry", false)]), false);
    assert!(!plan.sets.is_empty() && !world.policies.bearing(&world.pod("bank/till")).rehearsed);
    assert!(!world.allows("shop/web", "bank/till", 80));
}

#[test]
fn who_is_under_a_policy_with_http_conditions_is_steered_unless_it_is_a_dry_run() {
    let http = |http, dry_run| mesh_common::api::istio::security::Authorization {
        http,
        dry_run,
        ..deny_port("bank/http", Scope::Namespace, 80)
    };
    let mut world = complete(&[http(false, false)]);
    let steered = |world: &World, uid| world.policies.bearing(&world.pod(uid)).steered;
    assert!(!steered(&world, "bank/till"));
    for (policy, wanted) in [((true, false), true), ((true, true), false), ((false, false), false)] {
        let plan = world.apply(updated(&[http(policy.0, policy.1)]), false);
        assert_eq!(steered(&world, "bank/till"), wanted, "{policy:?}");
        assert!(plan.sets.iter().any(|(workload, _)| workload.uid() == "c//Pod/bank/till"), "{policy:?}");
        assert!(!steered(&world, "shop/web"));
    }
}

#[test]
fn what_was_saved_is_enforced_before_the_control_plane_speaks() {
    let mut first = complete(&[deny_port("shop/db-only", Scope::WorkloadSelector, 3)]);
    first.apply(updated(&[deny_port("bank/ns", Scope::Namespace, 80)]), false);
    let saved = first.policies.held().unwrap();
    let mut world = world();
    let plan = world.policies.restore(saved, &world.snapshot);
    world.enforce(&plan);
    assert_eq!(world.decider("shop/web", "bank/till", 80), "bank/ns");
    assert!(world.allows("shop/web", "shop/db", 80));
    assert_eq!(world.policies.versions().len(), 2);
    // The control plane no longer knows one of them, and says so.
    world.apply(removed(&["bank/ns"]), true);
    assert_eq!(world.kernel.set("bank/till"), 0);
}

#[test]
fn versions_are_told_but_of_what_is_not_understood() {
    let mut world = world();
    let good = of_policy(deny_port("a/good", Scope::Global, 1), "7");
    let odd =
        mesh_common::api::istio::security::Authorization { scope: 9, ..deny_port("a/odd", Scope::Global, 1) };
    let odd = of_policy(odd, "8");
    let updated = [good, odd].map(|resource| Arc::new(Authorization::read(resource))).into();
    world.apply(PolicyUpdate { updated, removed: Vec::new() }, true);
    let versions = world.policies.versions();
    assert_eq!((&*versions["a/good"], &*versions["a/odd"]), ("7", ""));
}

#[test]
fn sets_that_no_workload_has_any_more_go_in_time() {
    let mut world = complete(&[deny_port("shop/db-only", Scope::WorkloadSelector, 3)]);
    let set = world.kernel.set("shop/db");
    world.pods_gone(&["shop/db"]);
    let begun = Instant::now();
    let plan = world.policies.tick(&world.snapshot, begun);
    world.enforce(&plan);
    assert!(world.kernel.verdicts.keys().all(|key| key.policies != set));
    // A second look so soon would be wasted.
    world.pods(&[pod("shop/db", "10.0.1.1", "node-b", &["shop/db-only"])]);
    let set = world.kernel.set("shop/db");
    world.pods_gone(&["shop/db"]);
    assert!(world.policies.tick(&world.snapshot, begun + SWEEP / 2).is_empty());
    let plan = world.policies.tick(&world.snapshot, begun + SWEEP);
    assert!(plan.gone.iter().any(|key| key.policies == set));
}

#[test]
fn what_an_agent_before_left_stays_until_its_peers_are_written_and_its_numbers_are_not_used() {
    let old = complete(&[
        deny_port("shop/db-only", Scope::WorkloadSelector, 3),
        deny_port("bank/ns", Scope::Namespace, 80),
    ]);
    let mut world = World { kernel: old.kernel, ..World::new(10_000) };
    let (verdicts, plain) = (world.kernel.verdicts.clone(), world.kernel.plain.clone());
    world.policies.adopt(
        world.kernel.peers.values().copied().chain([900]),
        verdicts.iter().map(|(key, verdict)| (*key, *verdict)),
        plain.iter().map(|((prefix, key), verdict)| (*prefix, *key, *verdict)),
    );
    world.pods(&[pod("bank/till", "10.0.0.2", HERE, &[])]);
    world.apply(updated(&[deny_port("bank/ns", Scope::Namespace, 81)]), true);
    assert!(world.kernel.set("bank/till") > 900);
    assert!(world.kernel.verdicts.len() > verdicts.len(), "nothing of the old is gone");
    let plan = world.policies.drop_adopted();
    world.enforce(&plan);
    let counts = world.policies.counts();
    assert_eq!(world.kernel.verdicts.len(), counts.verdicts);
    assert_eq!(world.kernel.plain.len(), counts.plain_verdicts);
    assert!(!world.kernel.verdicts.keys().any(|key| key.policies > 1 && key.policies < 900));
}

#[test]
fn ten_thousand_workloads_take_no_memory_of_their_own() {
    let mut world = World::new(100_000);
    let pods: Vec<_> = (0..10_000)
        .map(|i| {
            let node = if i < 50 { HERE } else { "node-b" };
            pod(&format!("ns-{}/p-{i}", i % 20), &format!("10.{}.{}.1", i / 250, i % 250), node, &[])
        })
        .collect();
    world.pods(&pods);
    let policies: Vec<_> = (0..20).map(|n| deny_port(&format!("ns-{n}/one"), Scope::Namespace, 80)).collect();
    world.apply(updated(&policies), true);
    assert_eq!(world.policies.classes.counts().0, 20);
    assert_eq!(world.policies.sets.len(), 21);
    let plan = world.apply(updated(&[deny_port("ns-7/one", Scope::Namespace, 81)]), false);
    assert_eq!(plan.sets.len(), 500);
    assert_eq!(plan.verdicts.len(), 50 * 2, "one set, by source and port");
    assert_eq!(world.kernel.verdicts.len(), world.policies.counts().verdicts);
}

#[test]
fn an_empty_match_is_written_as_it_is_evaluated() {
    let world = complete(&[policy("bank/none", Scope::Namespace, Action::Allow, vec![Match::default()])]);
    assert!(!world.allows("shop/web", "bank/till", 80));
    let verdict = world.kernel.by_identity("shop/web", "bank/till", 80, 4).unwrap();
    assert_eq!(verdict, Verdict { policy: 0, rule: 0, action: Verdict::DENY });
}
