use mesh_common::api::{
    istio::workload::{LoadBalancing, Locality, NetworkAddress, WorkloadStatus, load_balancing as wire},
    mesh::v1::WorkloadExtension,
};

use super::*;
use crate::explain::{
    Question, explain,
    tests::{client, nodes, served, workload},
};

type Stood = (Workload, WorkloadExtension);

/// In region `r`.
fn at(node: &str, zone: &str, last: u8) -> Stood {
    let (workload, extension) = workload(&format!("{node}-{last}"), node, last, true);
    let locality = Locality { region: "r".to_owned(), zone: zone.to_owned(), subzone: String::new() };
    (Workload { locality: Some(locality), ..workload }, extension)
}

fn asking(node: &str, zone: &str) -> Stood {
    let (asking, extension) = client("client", node, true);
    (Workload { locality: at(node, zone, 0).0.locality, ..asking }, extension)
}

fn unready((workload, extension): Stood) -> Stood {
    (Workload { status: WorkloadStatus::Unhealthy.into(), ..workload }, extension)
}

fn terminating((workload, extension): Stood) -> Stood {
    (workload, WorkloadExtension { terminating_in: vec!["shop/web.shop.d".to_owned()], ..extension })
}

fn weighing((workload, extension): Stood, weight: u32) -> Stood {
    (Workload { capacity: Some(weight), ..workload }, extension)
}

/// `SHARE CHOICE` of each backend, for `shop/client`, by address.
fn told(from: &str, balancing: LoadBalancing, workloads: Vec<Stood>) -> Vec<String> {
    let mut served = served(workloads, Vec::new());
    served.services[0].load_balancing = Some(balancing);
    let address = NetworkAddress { network: String::new(), address: vec![10, 96, 0, 1] };
    served.services[0].addresses = vec![address];
    told_of(from, &served)
}

fn told_of(from: &str, served: &Served) -> Vec<String> {
    let question = Question::parse(from, "shop/web:80").unwrap();
    let mut backends = explain(&question, served, &nodes()).unwrap().backends;
    backends.sort_by(|a, b| a.address.cmp(&b.address));
    let text = |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{share:.2}"));
    let line = |share, choice| format!("{} {choice}", text(share)).trim_end().to_owned();
    backends.iter().map(|one| line(one.share, one.choice.as_str())).collect()
}

fn local() -> LoadBalancing {
    let mode = wire::Mode::Strict.into();
    LoadBalancing { routing_preference: vec![wire::Scope::Node.into()], mode, ..LoadBalancing::default() }
}

fn same_zone() -> LoadBalancing {
    let scopes = [wire::Scope::Network, wire::Scope::Region, wire::Scope::Zone];
    LoadBalancing {
        routing_preference: scopes.map(Into::into).to_vec(),
        mode: wire::Mode::Failover.into(),
        ..LoadBalancing::default()
    }
}

#[test]
fn shares_go_by_weight_among_those_that_serve() {
    let any = LoadBalancing::default;
    let (a, b, c) = (at("n1", "z1", 1), at("n2", "z2", 2), at("n2", "z2", 3));
    let me = || asking("n1", "z1");
    assert_eq!(told("shop/client", any(), vec![me(), a.clone(), b.clone()]), ["0.50", "0.50"]);
    let weighed = vec![me(), weighing(a.clone(), 3), b.clone(), weighing(c.clone(), 0)];
    assert_eq!(told("shop/client", any(), weighed), ["0.75", "0.25", "- its weight is 0"]);
    let ill = vec![me(), unready(a.clone()), b.clone(), terminating(c.clone())];
    assert_eq!(
        told("shop/client", any(), ill),
        ["- it is not ready", "1.00", "- it terminates, and others serve"]
    );
    let last = vec![me(), unready(a.clone()), terminating(c)];
    assert_eq!(told("shop/client", any(), last), ["- it is not ready", "1.00 no other is left"]);
    let published = LoadBalancing { health_policy: HealthPolicy::AllowAll.into(), ..any() };
    assert_eq!(
        told("shop/client", published, vec![me(), unready(a), b]),
        ["0.50 unready endpoints of this service serve as well", "0.50"]
    );
}

#[test]
fn where_the_client_is_counts() {
    let all = || vec![at("n1", "z1", 1), at("n2", "z1", 2), at("n3", "z2", 3)];
    let from = |me: Stood| [vec![me], all()].concat();
    let elsewhere = "- only the client's own node serves";
    assert_eq!(told("shop/client", local(), from(asking("n1", "z1"))), ["1.00", elsewhere, elsewhere]);
    let zone = "- others serve that are in the client's zone";
    assert_eq!(told("shop/client", same_zone(), from(asking("n1", "z1"))), ["0.50", "0.50", zone]);
    assert_eq!(told("shop/client", same_zone(), from(asking("n2", "z1"))), ["0.50", "0.50", zone]);
    // Nobody is in its zone.
    let alone = vec![asking("n1", "z1"), at("n2", "z2", 2), at("n2", "z3", 3)];
    assert_eq!(told("shop/client", same_zone(), alone), ["0.50", "0.50"]);
    // The only one in its zone is not ready.
    let failed = vec![asking("n1", "z1"), unready(at("n1", "z1", 1)), at("n2", "z2", 2)];
    assert_eq!(told("shop/client", same_zone(), failed), ["- it is not ready", "1.00"]);
}

#[test]
fn a_client_stands_where_the_pods_of_its_node_stand() {
    let (entry, extension) = asking("n2", "far-away");
    let uid = "C/networking.istio.io/WorkloadEntry/shop/client".to_owned();
    let entry = (Workload { uid, ..entry }, extension);
    let zone = "- others serve that are in the client's zone";
    let all = vec![entry.clone(), at("n2", "z1", 1), at("n1", "z2", 2)];
    assert_eq!(told("shop/client", same_zone(), all), ["1.00", zone]);
    let none = vec![entry, at("n1", "z2", 2), at("n1", "far-away", 3)];
    assert_eq!(told("shop/client", same_zone(), none), [zone, "1.00"]);
}

#[test]
fn where_no_agent_leads_the_client_nobody_has_a_share() {
    let all = |node| vec![asking(node, "z1"), at("n1", "z1", 1)];
    let outside = ["- the client is on no node of the mesh"];
    assert_eq!(told("none", local(), all("n1")), outside);
    assert_eq!(told("192.0.2.1", local(), all("n1")), outside);
    let absent = told("shop/client", local(), all("n3"));
    assert_eq!(absent, ["- no agent has joined on the client's node, n3"]);
    // Headless, and what is to be left to the network.
    let headless = served(all("n1"), Vec::new());
    assert!(told_of("shop/client", &headless)[0].contains("no address of its own"));
    let through = LoadBalancing { mode: wire::Mode::Passthrough.into(), ..LoadBalancing::default() };
    assert!(told("shop/client", through, all("n1"))[0].contains("no address of its own"));
}

#[test]
fn an_endpoint_counts_once_and_only_in_a_family_that_is_dialled() {
    let (mut both, extension) = at("n1", "z1", 1);
    both.addresses.push([0xfd; 16].to_vec());
    let twin = at("n2", "z1", 1);
    let all = vec![asking("n1", "z1"), (both, extension), twin, at("n2", "z1", 2)];
    assert_eq!(
        told("shop/client", LoadBalancing::default(), all),
        [
            "0.50",
            "- another workload has the same address and port",
            "0.50",
            "- the service has no IPv6 address"
        ]
    );
}
