//! What the kernel would find is what evaluation says.

use std::net::IpAddr;

use mesh_common::api::istio::security as wire;

use super::*;

fn all(scope: Scope, action: Action, one: Match) -> wire::Authorization {
    policy("bank/one", scope, action, vec![one])
}

#[test]
fn a_source_is_known_by_its_identity_and_plaintext_is_not() {
    let world = complete(&[all(Scope::Namespace, Action::Allow, from_namespace("shop"))]);
    assert!(world.allows("shop/web", "bank/till", 80));
    assert!(!world.allows("bank/till", "bank/till", 80));
    assert!(!world.kernel.by_address([10, 0, 0, 1].into(), "bank/till", 80).unwrap().allows());
    // STRICT refuses exactly the plaintext.
    let world = complete(&[all(Scope::Namespace, Action::Deny, no_identity())]);
    assert!(world.allows("shop/web", "bank/till", 80));
    assert!(!world.kernel.by_address([10, 0, 0, 1].into(), "bank/till", 80).unwrap().allows());
}

#[test]
fn addresses_go_by_the_narrowest_block() {
    let mentioned = Match {
        source_ips: vec![block("10.0.0.0/8"), block("2001:db8::/32")],
        not_source_ips: vec![block("10.1.0.0/16"), block("::/96")],
        ..Match::default()
    };
    let world = complete(&[all(Scope::Namespace, Action::Allow, mentioned)]);
    for (source, allowed) in [
        ("10.2.0.1", true),
        ("10.1.0.1", false),
        ("11.0.0.1", false),
        ("2001:db8::1", true),
        ("2001:db9::1", false),
        ("::1", false),
    ] {
        let source: IpAddr = source.parse().unwrap();
        assert_eq!(world.kernel.by_address(source, "bank/till", 80).unwrap().allows(), allowed, "{source}");
    }
    // Only for workloads of this node.
    assert!(world.kernel.plain.keys().all(|(_, key)| key.policies != world.kernel.set("shop/db")));
}

#[test]
fn a_workload_of_this_node_has_its_own_address_as_a_source() {
    let one = Match { source_ips: vec![block("10.0.0.1/32")], ..Match::default() };
    let mut world = complete(&[all(Scope::Namespace, Action::Deny, one)]);
    assert!(!world.allows("shop/web", "bank/till", 80));
    assert!(world.allows("bank/till", "bank/till", 80));
    // It moves: its verdicts are written anew.
    world.pods(&[pod("shop/web", "10.0.0.77", HERE, &[])]);
    assert!(world.allows("shop/web", "bank/till", 80));
    // A second address that is refused, and nobody can tell which it will use.
    let mut both = pod("shop/web", "10.0.0.77", HERE, &[]);
    both.addresses.push(vec![10, 0, 0, 1]);
    world.pods(&[both]);
    assert!(!world.allows("shop/web", "bank/till", 80));
    // In its node's network it may use any of the node's, of which one is refused.
    let mut host = pod("shop/web", "10.0.0.77", HERE, &[]);
    host.network_mode = 1;
    world.pods(&[host]);
    assert_eq!(world.decider("shop/web", "bank/till", 80), "bank/one");
    assert_eq!(world.kernel.verdicts.len(), world.policies.counts().verdicts);
}

#[test]
fn who_may_use_any_address_of_its_node_comes_in_if_none_of_them_is_refused() {
    let known = from_namespace("shop");
    let near = Match { source_ips: vec![block("10.0.0.0/24")], ..Match::default() };
    let mut host = pod("shop/web", "10.0.0.77", HERE, &[]);
    host.network_mode = 1;
    for (rules, allowed) in [(vec![near.clone()], false), (vec![near.clone(), known.clone()], true)] {
        let mut world = complete(&[policy("bank/all", Scope::Namespace, Action::Allow, rules)]);
        assert!(world.allows("shop/web", "bank/till", 80), "a pod, by its address");
        world.pods(&[host.clone()]);
        assert_eq!(world.allows("shop/web", "bank/till", 80), allowed);
        let v6 = world.kernel.by_identity("shop/web", "bank/till", 80, 6).unwrap();
        assert_eq!(v6.allows(), allowed);
    }
}

#[test]
fn families_come_and_go_with_the_addresses() {
    let mut world = complete(&[all(Scope::Namespace, Action::Deny, ports(&[443]))]);
    assert_eq!(world.kernel.by_identity("shop/web", "bank/till", 80, 6), None);
    let mut dual = pod("shop/web", "10.0.0.1", HERE, &[]);
    dual.addresses.push("fd00::1".parse::<std::net::Ipv6Addr>().unwrap().octets().into());
    world.pods(&[dual]);
    assert!(!world.kernel.by_identity("shop/web", "bank/till", 443, 6).unwrap().allows());
    assert!(!world.allows("shop/web", "bank/till", 443));
    world.pods(&[pod("shop/web", "fd00::1", HERE, &[])]);
    assert_eq!(world.kernel.by_identity("shop/web", "bank/till", 443, 4), None);
    assert!(world.kernel.by_identity("shop/web", "bank/till", 80, 6).unwrap().allows());
    assert_eq!(world.kernel.verdicts.len(), world.policies.counts().verdicts);
}

#[test]
fn policies_that_ask_for_the_workloads_own_address_make_a_set_for_each() {
    let one = Match { destination_ips: vec![block("10.0.0.2/32")], ..Match::default() };
    let mut world = complete(&[all(Scope::Namespace, Action::Deny, one)]);
    world.pods(&[pod("bank/other", "10.0.0.3", HERE, &[])]);
    assert_ne!(world.kernel.set("bank/till"), world.kernel.set("bank/other"));
    assert!(!world.allows("shop/web", "bank/till", 80) && world.allows("shop/web", "bank/other", 80));
    // The address moves on to another pod.
    world.pods(&[pod("bank/till", "10.0.0.4", HERE, &[]), pod("bank/other", "10.0.0.2", HERE, &[])]);
    assert!(world.allows("shop/web", "bank/till", 80) && !world.allows("shop/web", "bank/other", 80));
    let (till, other) = (world.pod("bank/till"), world.pod("bank/other"));
    assert_ne!(world.policies.set_of(&till), world.policies.set_of(&other));
    world.pods_gone(&["bank/other"]);
    assert_eq!(world.policies.sets.len(), 3, "the one that is always there, till's, and db's");
    // The policy asks no more: one set for all again.
    world.apply(updated(&[all(Scope::Namespace, Action::Deny, ports(&[443]))]), false);
    world.pods(&[pod("bank/other", "10.0.0.2", HERE, &[])]);
    assert_eq!(world.kernel.set("bank/till"), world.kernel.set("bank/other"));
    assert_eq!(world.kernel.verdicts.len(), world.policies.counts().verdicts);
    assert_eq!(world.kernel.plain.len(), world.policies.counts().plain_verdicts);
}

#[test]
fn kernel_and_proxy_say_the_same() {
    let matches = [
        from_namespace("shop"),
        no_identity(),
        ports(&[80, 443]),
        Match { not_destination_ports: vec![80], ..from_namespace("bank") },
        Match { source_ips: vec![block("10.0.0.0/31")], ..ports(&[443]) },
        Match { not_source_ips: vec![block("10.0.0.2/32")], ..Match::default() },
        Match { destination_ips: vec![block("10.0.0.2/32")], ..Match::default() },
    ];
    let (mut allowed, mut denied) = (0, 0);
    for first in &matches {
        for second in &matches {
            for actions in
                [(Action::Allow, Action::Allow), (Action::Deny, Action::Allow), (Action::Deny, Action::Deny)]
            {
                let world = complete(&[
                    policy("mesh/one", Scope::Global, actions.0, vec![first.clone()]),
                    policy("bank/two", Scope::Namespace, actions.1, vec![second.clone()]),
                    deny_port("shop/db-only", Scope::WorkloadSelector, 443),
                ]);
                for (from, to) in
                    [("shop/web", "bank/till"), ("bank/till", "shop/web"), ("bank/till", "shop/db")]
                {
                    for port in [80, 443, 9000] {
                        let (source, destination) = (world.pod(from), world.pod(to));
                        let id = spiffe_of(&source).unwrap();
                        let (ip, to_ip) = (source.addresses[0], destination.addresses[0]);
                        let shared = world.policies.shared();
                        let judged = shared.judge(&destination, Some(&id), ip, to_ip, port).allowed;
                        assert_eq!(
                            world.allows(from, to, port),
                            judged,
                            "{from} {to} {port} {first:?} {second:?}"
                        );
                        *(if judged { &mut allowed } else { &mut denied }) += 1;
                        if *destination.node != *HERE {
                            continue;
                        }
                        let judged = shared.judge(&destination, None, ip, to_ip, port).allowed;
                        let plain = world.kernel.by_address(ip, to, port).unwrap().allows();
                        assert_eq!(plain, judged, "{ip} {to} {port} {first:?} {second:?}");
                    }
                }
            }
        }
    }
    assert!(allowed > 200 && denied > 200, "{allowed} {denied}");
}
