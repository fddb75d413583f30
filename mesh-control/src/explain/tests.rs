use mesh_common::api::istio::{
    security::{Action, Match, Rule, StringMatch, string_match::MatchType},
    workload::{Port, PortList},
};

use super::*;

/// A workload of the namespace `shop` that serves `web` on 8080.
pub(super) fn workload(name: &str, node: &str, last: u8, meshed: bool) -> (Workload, WorkloadExtension) {
    let ports = PortList { ports: vec![Port { service_port: 80, target_port: 8080, app_protocol: 0 }] };
    let tunnel = if meshed { TunnelProtocol::Hbone } else { TunnelProtocol::None };
    let workload = Workload {
        uid: format!("C//Pod/shop/{name}"),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![vec![10, 0, 0, last]],
        node: node.to_owned(),
        service_account: name.to_owned(),
        tunnel_protocol: tunnel.into(),
        services: [("shop/web.shop.d".to_owned(), ports)].into(),
        ..Workload::default()
    };
    (workload, WorkloadExtension::default())
}

pub(super) fn client(name: &str, node: &str, meshed: bool) -> (Workload, WorkloadExtension) {
    let (workload, extension) = workload(name, node, 9, meshed);
    (Workload { services: [].into(), ..workload }, extension)
}

pub(super) fn served(workloads: Vec<(Workload, WorkloadExtension)>, policies: Vec<Authorization>) -> Served {
    let service = Service {
        name: "web".to_owned(),
        namespace: "shop".to_owned(),
        hostname: "web.shop.d".to_owned(),
        ports: vec![Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
        ..Service::default()
    };
    let policies = policies.into_iter().map(|p| (format!("{}/{}", p.namespace, p.name), p)).collect();
    Served { services: vec![service], workloads, policies }
}

/// Lets `client` in, or keeps it out.
fn policy(action: Action, dry_run: bool) -> Authorization {
    let account = StringMatch { match_type: Some(MatchType::Suffix("/sa/client".to_owned())) };
    let only = Match { principals: vec![account], ..Match::default() };
    let clause = mesh_common::api::istio::security::Clause { matches: vec![only] };
    Authorization {
        name: "p".to_owned(),
        namespace: "shop".to_owned(),
        scope: mesh_common::api::istio::security::Scope::Namespace.into(),
        action: action.into(),
        rules: vec![Rule { clauses: vec![clause] }],
        dry_run,
        http: false,
    }
}

pub(super) fn nodes() -> Joined {
    Joined::from([("n1".into(), true), ("n2".into(), true)])
}

/// Path, whether it is allowed, the deciding policy, of each backend.
fn outcome(from: &str, served: &Served) -> Vec<(Path, bool, String)> {
    let question = Question::parse(from, "shop/web:80").unwrap();
    let answer = explain(&question, served, &nodes()).unwrap();
    answer.backends.into_iter().map(|b| (b.path(), b.allowed, b.policy)).collect()
}

#[test]
fn the_way_depends_on_both_ends() {
    let host = |(workload, extension): (Workload, WorkloadExtension)| {
        (Workload { network_mode: NetworkMode::HostNetwork.into(), ..workload }, extension)
    };
    // By PeerAuthentication DISABLE.
    let sends = |(workload, extension): (Workload, WorkloadExtension)| {
        (workload, WorkloadExtension { outbound_meshed: true, ..extension })
    };
    for (to, from, path) in [
        (workload("a", "n1", 1, true), client("client", "n1", true), Path::Kernel),
        (workload("a", "n1", 1, false), client("client", "n1", false), Path::Kernel),
        (workload("a", "n2", 1, true), client("client", "n1", true), Path::Mtls),
        (workload("a", "n2", 1, false), client("client", "n1", true), Path::Plaintext),
        (workload("a", "n2", 1, true), client("client", "n1", false), Path::Plaintext),
        (workload("a", "n2", 1, true), sends(client("client", "n1", false)), Path::Mtls),
        (workload("a", "n2", 1, false), sends(client("client", "n1", false)), Path::Plaintext),
        (workload("a", "n3", 1, false), client("client", "n1", true), Path::Plaintext),
        (workload("a", "n1", 1, true), client("client", "n3", false), Path::Plaintext),
        (host(workload("a", "n1", 1, false)), client("client", "n1", true), Path::Plaintext),
    ] {
        let served = served(vec![to, from], Vec::new());
        assert_eq!(outcome("shop/client", &served), [(path, true, String::new())], "{:?}", served.workloads);
        assert_eq!(outcome("none", &served)[0].0, Path::Plaintext);
    }
}

#[test]
fn ports_of_node_proxies_are_not_for_others() {
    for (port, node, path) in [
        (15_001, "n1", Path::Refused),
        (15_006, "n2", Path::Refused),
        (15_008, "n1", Path::Plaintext),
        (15_008, "n2", Path::Plaintext),
    ] {
        let (mut to, extension) = workload("a", node, 1, true);
        for list in to.services.values_mut() {
            list.ports[0].target_port = port;
        }
        let served = served(vec![(to, extension), client("client", "n1", true)], Vec::new());
        let found = outcome("shop/client", &served).remove(0);
        assert_eq!((found.0, found.1), (path, path != Path::Refused), "{port} {node}");
    }
}

#[test]
fn it_is_said_where_a_proxy_is_on_the_way_for_policies_that_ask_for_http() {
    let asking = |http, dry_run| Authorization { http, ..policy(Action::Allow, dry_run) };
    let at = |port, (mut to, extension): (Workload, WorkloadExtension)| {
        for list in to.services.values_mut() {
            list.ports[0].target_port = port;
        }
        (to, extension)
    };
    let a = |node| workload("a", node, 1, true);
    let open = Authorization { rules: vec![Rule::default()], ..asking(true, false) };
    for (from, to, policy, steered) in [
        ("shop/client", a("n1"), asking(true, false), true),
        ("shop/client", a("n1"), asking(true, true), false),
        ("shop/client", a("n1"), asking(false, false), false),
        // Nobody who is refused goes any way.
        ("none", a("n1"), asking(true, false), false),
        ("none", a("n1"), open.clone(), true),
        ("none", at(15_008, a("n1")), open.clone(), false),
        // Two proxies are on the way already; no agent is there.
        ("shop/client", a("n2"), asking(true, false), false),
        ("none", workload("a", "n3", 1, false), open, false),
        ("shop/a", a("n1"), asking(true, false), false),
    ] {
        let served = served(vec![to, client("client", "n1", true)], vec![policy]);
        let question = Question::parse(from, "shop/web:80").unwrap();
        let told = explain(&question, &served, &nodes()).unwrap().backends.remove(0);
        assert_eq!(told.why.contains("HTTP"), steered, "{from}: {told:?}");
    }
}

#[test]
fn an_unknown_address_is_said_to_matter_where_it_does() {
    let served = served(vec![workload("a", "n1", 1, true)], vec![by_block(Action::Allow)]);
    let ask = |from: &str| {
        let question = Question::parse(from, "shop/web:80").unwrap();
        explain(&question, &served, &nodes()).unwrap().backends.remove(0)
    };
    assert!(!ask("none").allowed && ask("none").verdict.contains("--from ADDRESS"));
    assert!(ask("192.0.2.7").allowed && !ask("192.0.2.7").verdict.contains("--from"));
}

#[test]
fn policies_judge_by_the_identity_that_can_be_known() {
    let name = || "shop/p".to_owned();
    // (client's node, meshed, from) with an ALLOW for it, with a DENY for it
    for (node, meshed, from, allow, deny) in [
        ("n1", true, "shop/client", (true, name()), (false, name())),
        ("n2", true, "shop/client", (true, name()), (false, name())),
        // In plaintext nobody knows who it is.
        ("n2", false, "shop/client", (false, name()), (true, String::new())),
        ("n1", true, "none", (false, name()), (true, String::new())),
        ("n1", true, "192.0.2.1", (false, name()), (true, String::new())),
    ] {
        for (action, wanted) in [(Action::Allow, allow), (Action::Deny, deny)] {
            let workloads = vec![workload("a", "n1", 1, true), client("client", node, meshed)];
            let found = outcome(from, &served(workloads, vec![policy(action, false)])).remove(0);
            assert_eq!((found.1, found.2), wanted, "{node} {meshed} {from} {action:?}");
        }
    }
}

/// A policy that lets `192.0.2.0/24` in, or keeps it out.
fn by_block(action: Action) -> Authorization {
    let block = mesh_common::api::istio::security::Address { address: vec![192, 0, 2, 0], length: 24 };
    let mut policy = policy(action, false);
    policy.rules[0].clauses[0].matches[0] = Match { source_ips: vec![block], ..Match::default() };
    policy
}

#[test]
fn who_shares_its_nodes_addresses_is_judged_on_its_node_as_if_from_any() {
    let host = |at: [u8; 4], node| {
        let (workload, extension) = client("client", node, false);
        let network_mode = NetworkMode::HostNetwork.into();
        (Workload { network_mode, addresses: vec![at.to_vec()], ..workload }, extension)
    };
    let (inside, outside) = ([192, 0, 2, 7], [10, 0, 0, 9]);
    for (action, at, node, allowed) in [
        // Whichever it announces: not all are let in, and not all are spared.
        (Action::Allow, inside, "n1", false),
        (Action::Deny, outside, "n1", false),
        // To another node it goes by the address with which it arrives.
        (Action::Allow, inside, "n2", true),
        (Action::Allow, outside, "n2", false),
        (Action::Deny, outside, "n2", true),
    ] {
        let served = served(vec![workload("a", "n1", 1, true), host(at, node)], vec![by_block(action)]);
        let question = Question::parse("shop/client", "shop/web:80").unwrap();
        let backend = explain(&question, &served, &nodes()).unwrap().backends.remove(0);
        assert_eq!(backend.allowed, allowed, "{action:?} {at:?} {node}: {backend:?}");
        assert!(backend.verdict.contains("shares its node's addresses"), "{backend:?}");
    }
    // By identity it is judged as anybody else, and nothing is said of addresses.
    let workloads = vec![workload("a", "n1", 1, true), host(outside, "n1")];
    let known = served(workloads, vec![policy(Action::Allow, false)]);
    assert_eq!(outcome("shop/client", &known), [(Path::Kernel, true, "shop/p".to_owned())]);
}

#[test]
fn a_dry_run_by_address_is_rehearsed_as_if_from_any() {
    let (workload_of_host, extension) = client("client", "n1", false);
    let host = Workload { network_mode: NetworkMode::HostNetwork.into(), ..workload_of_host };
    let deny = Authorization { dry_run: true, ..by_block(Action::Deny) };
    let served = served(vec![workload("a", "n1", 1, true), (host, extension)], vec![deny]);
    let question = Question::parse("shop/client", "shop/web:80").unwrap();
    let backend = explain(&question, &served, &nodes()).unwrap().backends.remove(0);
    assert!(backend.allowed && backend.verdict.contains("dry runs in force: denied by"), "{backend:?}");
}

#[test]
fn a_dry_run_is_told_and_decides_nothing() {
    let workloads = vec![workload("a", "n1", 1, true), client("client", "n1", true)];
    let served = served(workloads, vec![policy(Action::Deny, true)]);
    let question = Question::parse("shop/client", "shop/web:80").unwrap();
    let answer = explain(&question, &served, &nodes()).unwrap();
    let backend = &answer.backends[0];
    assert!(
        backend.allowed && backend.verdict.contains("dry runs in force: denied by shop/p"),
        "{backend:?}"
    );
    assert_eq!(answer.source, "spiffe://cluster.local/ns/shop/sa/client");
}

#[test]
fn what_is_not_enforced_is_said_and_what_is_missing_denies() {
    let deny_all = Authorization { rules: vec![Rule::default()], ..policy(Action::Deny, false) };
    let nobody = vec![workload("a", "n3", 1, false), client("client", "n1", true)];
    assert_eq!(
        outcome("shop/client", &served(nobody, vec![deny_all.clone()])),
        [(Path::Plaintext, true, String::new())]
    );
    let (mut named, extension) = workload("a", "n1", 1, true);
    named.authorization_policies = vec!["shop/other".to_owned()];
    let found = outcome("none", &served(vec![(named, extension)], Vec::new()));
    assert_eq!(found, [(Path::Plaintext, false, "shop/other".to_owned())]);
    // A policy of another namespace, and one that another workload names.
    let elsewhere = Authorization { namespace: "other".to_owned(), ..deny_all.clone() };
    let selected = Authorization { scope: 2, ..deny_all };
    let both = served(vec![workload("a", "n1", 1, true)], vec![elsewhere, selected]);
    assert_eq!(outcome("none", &both), [(Path::Plaintext, true, String::new())]);
}

#[test]
fn what_cannot_be_answered_says_why() {
    let served = served(vec![workload("a", "n1", 1, true)], Vec::new());
    for (from, to, reason) in [
        ("client", "shop/web:80", "--from \"client\""),
        ("/x", "shop/web:80", "--from"),
        ("none", "web:80", "--to \"web:80\""),
        ("none", "shop/web", "--to"),
        ("none", "shop/web:0", "--to"),
        ("none", "shop/web:70000", "--to"),
        ("shop/nobody", "shop/web:80", "no workload nobody in namespace shop"),
        ("none", "shop/none:80", "no service none in namespace shop"),
        ("none", "shop/web:81", "has no TCP port 81; it has 80"),
    ] {
        let answer = Question::parse(from, to).and_then(|question| explain(&question, &served, &nodes()));
        let text = answer.unwrap_err().to_string();
        assert!(text.contains(reason), "{from} {to}: {text}");
    }
    assert!(Question::parse("none", "shop/web.shop.d:80").is_ok());
}
