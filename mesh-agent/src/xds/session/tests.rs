use std::collections::HashMap;

use mesh_common::api::istio::security;

use super::*;
use crate::snapshot::fixtures::{of_policy, of_service, of_workload, policy, service, workload};

const WEB: &str = "shop/web.shop.svc.cluster.local";

fn node() -> NodeConfig {
    NodeConfig { zone: Some("z1".to_owned()), ..crate::identity::testing::node() }
}

fn session() -> Session {
    Session::new(&node(), Interner::new("node-a"))
}

fn response(nonce: &str) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: ADDRESS_TYPE.to_owned(),
        nonce: nonce.to_owned(),
        resources: vec![of_service(service(WEB, &["10.96.0.1"], &[(80, 80)]), "1")],
        ..DeltaDiscoveryResponse::default()
    }
}

fn change(step: Step) -> Change {
    match step {
        Step::Apply(change) => change,
        Step::Refuse { reason, .. } | Step::Leave { reason } => panic!("{reason}"),
    }
}

/// What it says to hold of services and workloads.
fn begin(session: &Session, addresses: HashMap<String, String>) -> HashMap<String, String> {
    let [_, request] = session.begin(Versions { addresses, ..Versions::default() });
    request.initial_resource_versions
}

fn refusal(name: &str) -> Rejected {
    Rejected { name: name.to_owned(), reason: "no room".to_owned() }
}

#[test]
fn the_first_request_says_who_asks_and_what_is_held() {
    let addresses = HashMap::from([("a".to_owned(), "1".to_owned())]);
    let policies = HashMap::from([("shop/one".to_owned(), String::new())]);
    let [first, request] = session().begin(Versions { addresses, policies: policies.clone() });
    assert_eq!((&*first.type_url, first.initial_resource_versions), (AUTHORIZATION_TYPE, policies));
    assert!(first.node == request.node && first.resource_names_subscribe.is_empty());
    let node = request.node.unwrap();
    assert_eq!(node.id, "ztunnel~127.0.0.1~node-a.mesh-system~mesh-system.svc.cluster.local");
    assert_eq!(
        (&*node.user_agent_name, &*node.user_agent_version),
        ("mesh-agent", env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(node.locality.unwrap().zone, "z1");
    let fields = node.metadata.unwrap().fields;
    for (name, value) in [
        ("NODE_NAME", "node-a"),
        ("NAMESPACE", "mesh-system"),
        ("INSTANCE_IPS", "127.0.0.1"),
        ("CLUSTER_ID", "Kubernetes"),
    ] {
        assert_eq!(fields[name].kind, Some(prost_types::value::Kind::StringValue(value.to_owned())));
    }
    assert_eq!(request.type_url, ADDRESS_TYPE);
    assert_eq!(request.initial_resource_versions["a"], "1");
    // No names: everything.
    assert!(request.resource_names_subscribe.is_empty());
    assert_eq!(request.response_nonce, "");
}

#[test]
fn a_response_is_acknowledged_by_its_nonce() {
    let mut session = session();
    let mut message = response("n1");
    message.removed_resources.push("gone".to_owned());
    let change = change(session.response(message));
    let Update::Addresses(delta, rejected) = change.update else { panic!("policies") };
    assert_eq!((delta.updated.len(), &*delta.removed), (1, &["gone".to_owned()][..]));
    assert_eq!(rejected, []);
    let ack = session.answer(change.kind, change.nonce, &[]);
    assert_eq!((&*ack.response_nonce, &*ack.type_url), ("n1", ADDRESS_TYPE));
    assert_eq!((ack.error_detail, ack.node), (None, None));
}

#[test]
fn a_refused_resource_leaves_the_rest_in_force() {
    let mut session = session();
    let mut message = response("n1");
    message.resources.push(of_service(service("shop/bad", &[], &[(0, 1)]), "1"));
    let change = change(session.response(message));
    assert_eq!(change.update.names(), [WEB]);
    let nack = session.answer(change.kind, change.nonce, &change.update.rejected());
    let error = nack.error_detail.unwrap();
    assert_eq!((error.code, &*nack.response_nonce), (INVALID_ARGUMENT, "n1"));
    assert!(error.message.contains("shop/bad: service.ports[0].service_port"), "{}", error.message);
}

#[test]
fn many_refusals_are_told_in_bounded_words() {
    let many: Vec<_> = (0..1_000).map(|i| refusal(&i.to_string())).collect();
    let message = session().answer(Kind::Addresses, "n".to_owned(), &many).error_detail.unwrap().message;
    assert!(message.ends_with("and 900 more"), "{message}");
}

#[test]
fn what_the_owner_refused_is_asked_for_again() {
    let mut session = session();
    session.settle([WEB, "other"], &[refusal(WEB)]);
    let held = || HashMap::from([(WEB.to_owned(), "1".to_owned()), ("other".to_owned(), "2".to_owned())]);
    let versions = begin(&session, held());
    // Named, so that its removal is told; without its version, so that it is sent.
    assert_eq!((&*versions[WEB], &*versions["other"]), ("", "2"));
    session.settle([WEB], &[]);
    assert_eq!(begin(&session, held()), held());
}

#[test]
fn refused_names_that_are_not_held_are_not_claimed() {
    let mut session = session();
    session.settle([], &[refusal(WEB)]);
    assert_eq!(begin(&session, HashMap::new()), HashMap::new());
}

#[test]
fn policies_are_answered_as_policies_and_none_is_dropped() {
    let mut session = session();
    let good = policy("shop/good", security::Scope::Global);
    let odd = security::Authorization { action: 9, ..policy("shop/odd", security::Scope::Global) };
    let message = DeltaDiscoveryResponse {
        type_url: AUTHORIZATION_TYPE.to_owned(),
        resources: vec![of_policy(good, ""), of_policy(odd, "")],
        removed_resources: vec!["shop/gone".to_owned()],
        ..response("n1")
    };
    let change = change(session.response(message));
    let rejected = change.update.rejected();
    let nack = session.answer(change.kind, change.nonce, &rejected);
    assert_eq!((&*nack.type_url, &*nack.response_nonce), (AUTHORIZATION_TYPE, "n1"));
    assert_eq!(nack.error_detail.unwrap().message, "shop/odd: action: unknown value 9");
    let Update::Policies(update) = change.update else { panic!("addresses") };
    assert_eq!((update.updated.len(), &*update.removed), (2, &["shop/gone".to_owned()][..]));
}

#[test]
fn a_response_without_a_nonce_ends_the_stream() {
    assert!(matches!(session().response(response("")), Step::Leave { .. }));
}

#[test]
fn a_response_of_another_type_is_refused_whole() {
    let mut message = response("n1");
    message.type_url = "type.googleapis.com/envoy.config.cluster.v3.Cluster".to_owned();
    let Step::Refuse { request, .. } = session().response(message) else { panic!("taken") };
    assert_eq!(request.response_nonce, "n1");
    assert!(request.error_detail.unwrap().message.contains("Cluster"));
}

#[test]
fn the_larger_a_response_the_longer_the_silence_that_ends_the_answer() {
    let of = |count: usize, removed: usize, size: usize| {
        let uid = |i| format!("c//Pod/n/{i}{}", "x".repeat(size));
        let resource = |i| of_workload(workload(&uid(i), "10.0.0.1", "", &[]), "1");
        let message = DeltaDiscoveryResponse {
            resources: (0..count).map(resource).collect(),
            removed_resources: vec!["gone".to_owned(); removed],
            ..response("n")
        };
        change(session().response(message)).patience
    };
    assert_eq!(of(0, 0, 0), Duration::ZERO);
    let marked = DeltaDiscoveryResponse { system_version_info: format!("7{COMPLETE}"), ..response("n") };
    assert_eq!(change(session().response(marked)).patience, Duration::ZERO);
    for small in [of(1, 0, 0), of(0, 1, 0), of(998, 1, 0)] {
        assert_eq!(small, SILENCE);
    }
    for full in [of(1_000, 0, 0), of(999, 1, 0), of(5_000, 0, 0), of(900, 0, 2_500)] {
        assert_eq!(full, SILENCE_AFTER_PAGE);
    }
}
