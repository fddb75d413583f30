use std::collections::BTreeMap;

use super::*;
use crate::snapshot::{
    Account, Delta, Kin, Mode, Place, PortMapping, Resource, Scope, Snapshot, Version, Versioned,
};

fn service() -> Service {
    Service {
        key: "shop/cart.shop.svc.cluster.local".into(),
        addresses: vec!["10.96.0.1".parse().unwrap()].into(),
        ports: Box::new([ServicePort { port: 80, protocol: Protocol::Tcp, target: Some(8080) }]),
        algorithm: Algorithm::WeightedRandom,
        affinity_seconds: 0,
        preference: Box::new([]),
        mode: Mode::Any,
        allow_unready: false,
    }
}

/// A workload in zone `zone` of node `node`, and its membership of [`service`].
fn workload(address: &str, node: &str, zone: &str) -> Workload {
    Workload {
        name: address.into(),
        addresses: vec![address.parse().unwrap()].into(),
        kin: Arc::new(Kin {
            account: Arc::new(Account {
                prefix: "c//Pod/shop/".into(),
                namespace: "shop".into(),
                service_account: "default".into(),
                trust_domain: "".into(),
            }),
            memberships: Box::new([member()]),
            policies: Box::new([]),
        }),
        place: Arc::new(Place {
            node: node.into(),
            locality: Arc::new(Locality { region: "r".into(), zone: zone.into(), subzone: "".into() }),
            network: "".into(),
            cluster: "c".into(),
            meshed: false,
            outbound_meshed: false,
            outdone: false,
            host_network: false,
            healthy: true,
            weight: 1,
            pod_uid: None,
            cgroup: None,
            app: None,
        }),
    }
}

fn member() -> Membership {
    Membership { service: service().key, ports: Box::new([]), unready: false, terminating: false }
}

fn placed(mut workload: Workload, change: impl Fn(&mut Place)) -> Workload {
    change(Arc::make_mut(&mut workload.place));
    workload
}

fn membered(mut workload: Workload, change: impl Fn(&mut Membership)) -> Workload {
    let mut membership = member();
    change(&mut membership);
    Arc::make_mut(&mut workload.kin).memberships = Box::new([membership]);
    workload
}

/// Backends, as `ADDRESS:PORT` and weight, of the service's frontends.
fn check(service: &Service, workloads: Vec<Workload>) -> Vec<BTreeMap<String, u32>> {
    let mut snapshot = Snapshot::new();
    let updated = workloads
        .into_iter()
        .map(|workload| Versioned {
            name: workload.uid(),
            version: Version::from("1"),
            resource: Resource::Workload(Arc::new(workload)),
        })
        .collect();
    snapshot.apply(Delta { updated, removed: Vec::new() });
    let vantage = Vantage {
        node: "n1".into(),
        locality: Locality { region: "r".into(), zone: "z1".into(), subzone: "".into() },
        cluster: "c".into(),
        network: "".into(),
    };
    let show = |backend: &Candidate| (super::super::show::show_endpoint(&backend.endpoint), backend.weight);
    let frontends = frontends(service, snapshot.members(&service.key), &vantage);
    frontends.iter().map(|frontend| frontend.backends.iter().map(show).collect()).collect()
}

fn addresses(service: &Service, workloads: Vec<Workload>) -> Vec<String> {
    check(service, workloads).remove(0).into_keys().collect()
}

#[test]
fn target_ports_come_from_the_workload_then_from_the_service() {
    let own = PortMapping { port: 80, protocol: Protocol::Tcp, target: 9090 };
    let udp = PortMapping { port: 80, protocol: Protocol::Udp, target: 1 };
    let named = Service {
        ports: Box::new([ServicePort { port: 80, protocol: Protocol::Tcp, target: None }]),
        ..service()
    };
    let with = membered(workload("10.1.0.1", "n1", "z1"), |m| m.ports = Box::new([udp, own]));
    let without = workload("10.1.0.2", "n1", "z1");
    assert_eq!(
        addresses(&service(), vec![with.clone(), without.clone()]),
        ["10.1.0.1:9090", "10.1.0.2:8080"]
    );
    assert_eq!(
        addresses(&named, vec![with, without]),
        ["10.1.0.1:9090"],
        "a named port that a workload lacks"
    );
}

#[test]
fn each_family_gets_backends_of_its_own() {
    let mut both = workload("10.1.0.1", "n1", "z1");
    both.addresses = vec!["10.1.0.1".parse().unwrap(), "fd00::1".parse().unwrap()].into();
    let dual = Service {
        addresses: vec!["10.96.0.1".parse().unwrap(), "fd00:96::1".parse().unwrap()].into(),
        ..service()
    };
    let frontends = check(&dual, vec![both]);
    assert_eq!(frontends[0].keys().collect::<Vec<_>>(), ["10.1.0.1:8080"]);
    assert_eq!(frontends[1].keys().collect::<Vec<_>>(), ["[fd00::1]:8080"]);
}

#[test]
fn unready_endpoints_serve_only_where_the_service_says_so() {
    let unhealthy = placed(workload("10.1.0.1", "n1", "z1"), |place| place.healthy = false);
    let unready = membered(workload("10.1.0.2", "n1", "z1"), |m| m.unready = true);
    let ready = workload("10.1.0.3", "n1", "z1");
    let all = vec![unhealthy, unready, ready];
    assert_eq!(addresses(&service(), all.clone()), ["10.1.0.3:8080"]);
    let publish = Service { allow_unready: true, ..service() };
    assert_eq!(addresses(&publish, all).len(), 3);
}

#[test]
fn terminating_endpoints_serve_when_no_other_does() {
    let leaving = membered(workload("10.1.0.1", "n1", "z1"), |m| m.terminating = true);
    assert_eq!(
        addresses(&service(), vec![leaving.clone(), workload("10.1.0.2", "n1", "z1")]),
        ["10.1.0.2:8080"]
    );
    assert_eq!(addresses(&service(), vec![leaving]), ["10.1.0.1:8080"]);
}

#[test]
fn strict_locality_has_no_second_choice() {
    let local = Service { preference: Box::new([Scope::Node]), mode: Mode::Strict, ..service() };
    let (here, there) = (workload("10.1.0.1", "n1", "z1"), workload("10.1.0.2", "n2", "z1"));
    assert_eq!(addresses(&local, vec![here, there.clone()]), ["10.1.0.1:8080"]);
    assert!(addresses(&local, vec![there]).is_empty());
}

#[test]
fn failover_takes_the_nearest_that_is_ready() {
    let near = Service {
        preference: Box::new([Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node]),
        mode: Mode::Failover,
        ..service()
    };
    let node = workload("10.1.0.1", "n1", "z1");
    let zone = workload("10.1.0.2", "n2", "z1");
    let region = workload("10.1.0.3", "n3", "z2");
    assert_eq!(addresses(&near, vec![node.clone(), zone.clone(), region.clone()]), ["10.1.0.1:8080"]);
    let down = placed(node, |place| place.healthy = false);
    assert_eq!(addresses(&near, vec![down.clone(), zone.clone(), region.clone()]), ["10.1.0.2:8080"]);
    assert_eq!(addresses(&near, vec![down, region]), ["10.1.0.3:8080"]);
}

#[test]
fn a_weight_of_zero_receives_nothing_and_huge_ones_keep_their_ratio() {
    let weigh = |address, weight| placed(workload(address, "n1", "z1"), |place| place.weight = weight);
    let all = vec![weigh("10.1.0.1", 0), weigh("10.1.0.2", u32::MAX), weigh("10.1.0.3", u32::MAX / 2)];
    let backends = check(&service(), all).remove(0);
    assert_eq!(backends.len(), 2);
    let (two, three) = (backends["10.1.0.2:8080"], backends["10.1.0.3:8080"]);
    assert!(u64::from(two) + u64::from(three) < u64::from(u32::MAX));
    assert!((f64::from(two) / f64::from(three) - 2.0).abs() < 0.001);
}

#[test]
fn an_endpoint_that_two_workloads_claim_counts_once() {
    let mut twin = workload("10.1.0.1", "n2", "z1");
    twin.name = "twin".into();
    assert_eq!(addresses(&service(), vec![workload("10.1.0.1", "n1", "z1"), twin]).len(), 1);
}
