//! Policies on the wire: what is sent, and in which order beside the workloads.

use mesh_common::api::{
    ADDRESS_TYPE, AUTHORIZATION_TYPE, COMPLETE, MORE, envoy::service::discovery::v3::DeltaDiscoveryRequest,
    istio::security::Scope,
};

use crate::{
    manifests::*,
    subscriber::{Subscriber, Told},
    world::World,
};

const STRICT: &str = "mesh-system/istio_converted_static_strict";
const WEB_SELECTOR: &str = "selector: {matchLabels: {app: web}}";

/// A subscriber to both types that has received all there is.
async fn both(world: &World) -> Subscriber {
    let mut subscriber = world.subscriber().await;
    subscriber.subscribe_policies().await;
    subscriber.next().await;
    subscriber.nothing().await;
    subscriber.log.clear();
    subscriber
}

/// What comes until this many resources were put or removed.
async fn log(subscriber: &mut Subscriber, length: usize) -> Vec<String> {
    while subscriber.log.len() < length {
        subscriber.next().await;
    }
    subscriber.nothing().await;
    std::mem::take(&mut subscriber.log)
}

#[tokio::test]
async fn the_first_request_is_answered_even_when_there_is_nothing() {
    let world = World::start(&[]).await;
    let first = DeltaDiscoveryRequest { type_url: AUTHORIZATION_TYPE.into(), ..Default::default() };
    let mut subscriber = Subscriber::open(&world, first).await;
    let response = subscriber.receive().await.unwrap();
    assert_eq!((response.type_url.as_str(), response.resources.len()), (AUTHORIZATION_TYPE, 0));
    assert!(response.system_version_info.ends_with(COMPLETE), "{}", response.system_version_info);
    subscriber.acknowledge().await;
    subscriber.nothing().await;
}

#[tokio::test]
async fn a_policy_comes_before_the_workloads_that_name_it_and_goes_after() {
    let world = World::start(&[("a.yaml", &pod("a", "10.0.0.1"))]).await;
    let mut subscriber = both(&world).await;
    let web = pod_uid("a");
    world.write("p.yaml", &policy("p", WEB_SELECTOR));
    assert_eq!(log(&mut subscriber, 2).await, ["+policy shop/p", &format!("+{web}")]);
    assert_eq!(subscriber.policies["shop/p"].scope(), Scope::WorkloadSelector);
    assert_eq!(subscriber.workload(&web).0.authorization_policies, ["shop/p"]);
    world.remove("p.yaml");
    assert_eq!(log(&mut subscriber, 2).await, [&format!("+{web}"), "-policy shop/p"]);

    // The same for what is made of PeerAuthentication.
    world.write("q.yaml", &peers("q", "mtls: {mode: STRICT}"));
    assert_eq!(log(&mut subscriber, 2).await, [format!("+policy {STRICT}"), format!("+{web}")]);
    assert_eq!(subscriber.workload(&web).0.authorization_policies, [STRICT]);
    let ports = "selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {9000: {mode: PERMISSIVE}}";
    world.write("q.yaml", &peers("q", ports));
    let own = "shop/converted_peer_authentication_q";
    assert_eq!(log(&mut subscriber, 2).await, [format!("+policy {own}"), format!("+{web}")]);
    world.remove("q.yaml");
    let mut told = log(&mut subscriber, 3).await;
    assert_eq!(told.remove(0), format!("+{web}"));
    told.sort();
    assert_eq!(told, [format!("-policy {STRICT}"), format!("-policy {own}")]);
}

#[tokio::test]
async fn a_policy_for_fewer_workloads_comes_after_these_name_it() {
    let world = World::start(&[("a.yaml", &pod("a", "10.0.0.1")), ("p.yaml", &policy("p", ""))]).await;
    let mut subscriber = both(&world).await;
    let web = format!("+{}", pod_uid("a"));
    assert_eq!(subscriber.policies["shop/p"].scope(), Scope::Namespace);
    // If it came first, it would hold for nobody for a moment.
    world.write("p.yaml", &policy("p", WEB_SELECTOR));
    assert_eq!(log(&mut subscriber, 2).await, [&web, "+policy shop/p"]);
    world.write("p.yaml", &policy("p", ""));
    assert_eq!(log(&mut subscriber, 2).await, ["+policy shop/p", &web]);
}

#[tokio::test]
async fn a_slow_subscriber_meets_the_same_order() {
    // So many that they come in several responses.
    let pods: Vec<_> =
        (0..2_500u32).map(|i| pod(&format!("p{i}"), &format!("10.1.{}.{}", i / 250, i % 250 + 1))).collect();
    let world =
        World::start(&[("pods.yaml", &file(&pods)), ("old.yaml", &policy("old", WEB_SELECTOR))]).await;
    let mut subscriber = Subscriber::connect(&world).await;
    subscriber.subscribe_policies().await;
    while subscriber.held.len() < 2_500 || subscriber.policies.is_empty() {
        subscriber.next().await;
    }
    subscriber.nothing().await;
    subscriber.log.clear();
    world.write("new.yaml", &policy("new", WEB_SELECTOR));
    subscriber.receive().await.unwrap();
    world.remove("old.yaml");
    world.write("new.yaml", &policy("new", &format!("{WEB_SELECTOR}, action: DENY, rules: [{{}}]")));
    while subscriber.policies.contains_key("shop/old") {
        subscriber.next().await;
    }
    subscriber.nothing().await;
    assert_eq!(subscriber.policies["shop/new"].rules.len(), 1);
    let at = |entry: &str| subscriber.log.iter().position(|found| found == entry).unwrap();
    assert_eq!((at("+policy shop/new"), at("-policy shop/old")), (0, subscriber.log.len() - 1));
    for i in 0..2_500 {
        assert_eq!(subscriber.workload(&pod_uid(&format!("p{i}"))).0.authorization_policies, ["shop/new"]);
    }
}

#[tokio::test]
async fn who_returns_is_sent_what_differs_and_told_last_what_is_gone() {
    let files = [
        ("a.yaml", pod("a", "10.0.0.1")),
        ("kept.yaml", policy("kept", "")),
        ("gone.yaml", policy("gone", "")),
    ];
    let world = World::start(&files.each_ref().map(|(name, text)| (*name, text.as_str()))).await;
    let before = both(&world).await;
    let versions = before.versions.clone();
    drop(before);
    world.remove("gone.yaml");
    world.write("new.yaml", &policy("new", ""));
    world.write("a.yaml", &pod("a", "10.0.0.2"));
    world.status_when(|status| status.revision >= 3).await;
    let first = DeltaDiscoveryRequest { initial_resource_versions: versions.clone(), ..Default::default() };
    let mut again =
        Subscriber::open(&world, DeltaDiscoveryRequest { type_url: AUTHORIZATION_TYPE.into(), ..first })
            .await;
    let mut all = again.next().await;
    // On a stream without workloads nothing is to be waited for.
    if all.put.is_empty() || all.removed.is_empty() {
        let more = again.next().await;
        all.put.extend(more.put);
        all.removed.extend(more.removed);
    }
    all.removed.retain(|name| !name.starts_with("Kubernetes"));
    assert_eq!(all, Told { put: vec!["shop/new".into()], removed: vec!["shop/gone".into()] });

    let first = DeltaDiscoveryRequest {
        initial_resource_versions: versions,
        type_url: ADDRESS_TYPE.into(),
        ..Default::default()
    };
    let mut again = Subscriber::open(&world, first.clone()).await;
    again.subscribe_policies_holding(first.initial_resource_versions).await;
    while again.log.iter().filter(|entry| entry.contains("shop/gone")).count() < 2 {
        again.next().await;
    }
    assert_eq!(again.log.last().unwrap(), "-policy shop/gone");
    again.nothing().await;
}

#[tokio::test]
async fn versions_of_policies_are_of_their_content() {
    let text = file(&[
        policy("a", ""),
        policy("b", "action: DENY, rules: [{}]"),
        peers("q", "mtls: {mode: STRICT}"),
    ]);
    let one = both(&World::start(&[("all.yaml", &text)]).await).await.versions;
    let two = both(&World::start(&[("all.yaml", &text)]).await).await.versions;
    assert_eq!((one.len(), &one), (3, &two));
    assert_ne!(one["shop/a"], one["shop/b"]);
}

#[tokio::test]
async fn many_policies_come_in_parts_and_the_last_is_marked() {
    let policies: Vec<_> = (0..1_200).map(|i| policy(&format!("p{i}"), "")).collect();
    let world = World::start(&[("all.yaml", &file(&policies))]).await;
    let first = DeltaDiscoveryRequest { type_url: AUTHORIZATION_TYPE.into(), ..Default::default() };
    let mut subscriber = Subscriber::open(&world, first).await;
    for (count, mark) in [(1_000, MORE), (200, COMPLETE)] {
        let response = subscriber.receive().await.unwrap();
        assert_eq!(response.resources.len(), count);
        assert!(response.system_version_info.ends_with(mark), "{}", response.system_version_info);
        subscriber.acknowledge().await;
    }
    subscriber.nothing().await;
}

#[tokio::test]
async fn a_refused_edit_leaves_the_policy_in_force() {
    let world = World::start(&[("p.yaml", &policy("p", "action: DENY, rules: [{}]"))]).await;
    let mut subscriber = both(&world).await;
    world.write("p.yaml", &policy("p", "action: DENY, rules: [{from: [{source: {ipBlocks: [x]}}]}]"));
    world.faults().await;
    subscriber.nothing().await;
    world.write("p.yaml", &policy("p", "action: DENY, rules: [{}, {}]"));
    assert_eq!(subscriber.next().await.put, ["shop/p"]);
}
