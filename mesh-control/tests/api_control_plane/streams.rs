//! The protocol: refusals, reconnects, names, slow clients.

use std::time::Instant;

use mesh_common::api::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use tokio::time::{Duration, sleep};

use crate::{
    manifests::*,
    subscriber::{Subscriber, Told},
    world::World,
};

fn at(ip: &str) -> String {
    web().replace("10.96.0.1", ip)
}

#[tokio::test]
async fn what_was_refused_is_sent_again_only_when_it_changes() {
    let world = World::start(&[("web.yaml", &web()), ("a.yaml", &pod("a", "10.0.0.1"))]).await;
    let mut subscriber = world.subscriber().await;
    world.status_when(|status| status.agents.first().is_some_and(|agent| agent.synced)).await;
    world.write("web.yaml", &at("10.96.0.2"));
    subscriber.receive().await.unwrap();
    subscriber.refuse("shop/web: no such address").await;
    let status = world.status_when(|status| status.agents[0].rejected == 1).await;
    assert_eq!(status.agents[0].last_rejection, "shop/web: no such address");
    assert!(!status.agents[0].synced);
    subscriber.nothing().await;
    // Something else is sent and accepted, and the refusal stands.
    world.write("a.yaml", &pod("a", "10.0.0.9"));
    assert_eq!(subscriber.next().await.put, [pod_uid("a")]);
    let status = world.status_when(|status| status.agents[0].lag == 0).await;
    assert!(!status.agents[0].synced);
    world.write("web.yaml", &at("10.96.0.3"));
    assert_eq!(subscriber.next().await.put, [WEB]);
    world.status_when(|status| status.agents[0].synced).await;
}

#[tokio::test]
async fn who_returns_is_sent_only_what_differs() {
    let world = World::start(&[
        ("web.yaml", &web()),
        ("a.yaml", &pod("a", "10.0.0.1")),
        ("b.yaml", &pod("b", "10.0.0.2")),
    ])
    .await;
    let before = world.subscriber().await;
    let first =
        DeltaDiscoveryRequest { initial_resource_versions: before.versions.clone(), ..Default::default() };
    let mut again = Subscriber::open(&world, first).await;
    // All is equal, and the answer comes nevertheless.
    assert_eq!(again.next().await, Told::default());

    world.write("web.yaml", &at("10.96.0.2"));
    world.remove("b.yaml");
    world.status_when(|status| status.workloads == 1).await;
    let mut versions = before.versions.clone();
    versions.insert("Kubernetes//Pod/shop/never-known".into(), "1".into());
    versions.remove(&pod_uid("a"));
    let first = DeltaDiscoveryRequest { initial_resource_versions: versions, ..Default::default() };
    let mut again = Subscriber::open(&world, first).await;
    let told = again.next().await;
    assert_eq!(told.put, [pod_uid("a"), WEB.to_owned()]);
    assert_eq!(told.removed, [pod_uid("b"), "Kubernetes//Pod/shop/never-known".to_owned()]);
    again.nothing().await;
}

#[tokio::test]
async fn versions_held_since_before_a_restart_are_still_good() {
    let text = file(&[web(), pod("a", "10.0.0.1")]);
    let versions = World::start(&[("all.yaml", &text)]).await.subscriber().await.versions;
    let world = World::start(&[("all.yaml", &text)]).await;
    let first = DeltaDiscoveryRequest { initial_resource_versions: versions, ..Default::default() };
    let mut again = Subscriber::open(&world, first).await;
    assert_eq!(again.next().await, Told::default());
    world.remove("all.yaml");
    assert_eq!(again.next().await.removed, [pod_uid("a"), WEB.to_owned()]);
}

#[tokio::test]
async fn names_are_answered_each() {
    let world = World::start(&[("all.yaml", &file(&[web(), pod("a", "10.0.0.1")]))]).await;
    let first = DeltaDiscoveryRequest {
        resource_names_subscribe: vec![WEB.into(), pod_uid("later")],
        ..Default::default()
    };
    let mut subscriber = Subscriber::open(&world, first).await;
    assert_eq!(subscriber.next().await, Told { put: vec![WEB.into()], removed: vec![pod_uid("later")] });
    world.write("later.yaml", &pod("later", "10.0.0.3"));
    assert_eq!(subscriber.next().await.put, [pod_uid("later")]);
    world.write("other.yaml", &pod("other", "10.0.0.4"));
    subscriber.nothing().await;
    subscriber
        .send(DeltaDiscoveryRequest { resource_names_subscribe: vec![pod_uid("a")], ..Default::default() })
        .await;
    assert_eq!(subscriber.next().await.put, [pod_uid("a")]);
    subscriber
        .send(DeltaDiscoveryRequest { resource_names_unsubscribe: vec![WEB.into()], ..Default::default() })
        .await;
    subscriber.nothing().await;
    world.write("all.yaml", &file(&[at("10.96.0.5"), pod("a", "10.0.0.1")]));
    subscriber.nothing().await;
    world.remove("later.yaml");
    assert_eq!(subscriber.next().await.removed, [pod_uid("later")]);
}

#[tokio::test]
async fn types_that_are_not_served_are_answered_with_nothing() {
    let world = World::start(&[("web.yaml", &web())]).await;
    let authorization = "type.googleapis.com/istio.security.Authorization";
    let first = DeltaDiscoveryRequest {
        type_url: authorization.into(),
        initial_resource_versions: [("ns/gone".to_owned(), String::new())].into(),
        ..Default::default()
    };
    let mut subscriber = Subscriber::open(&world, first).await;
    let response = subscriber.receive().await.unwrap();
    assert_eq!((response.type_url.as_str(), response.resources.len()), (authorization, 0));
    assert_eq!(response.removed_resources, ["ns/gone"]);
    subscriber.nothing().await;
}

#[tokio::test]
async fn a_slow_subscriber_gets_the_last_of_many_changes() {
    let payload = "x".repeat(2_000);
    // Large enough to fill all buffers between the two ends.
    let documents = |round: u32| -> String {
        let pods = (0..2_000).map(|i| {
            let meta = format!(", annotations: {{a: b}}, ownerReferences: [{{kind: Job, name: {payload}-{round}, controller: true}}]");
            pod_with(&format!("p{i}"), "10.0.0.1", &meta, "", "True")
        });
        // On a node that does not join, which would change them once more.
        file(&pods.collect::<Vec<_>>()).replace("node-a", "node-z")
    };
    let world = World::start(&[("all.yaml", &documents(0)), ("web.yaml", &web())]).await;
    let mut subscriber = Subscriber::connect(&world).await;
    for round in 1..=4u32 {
        world.write("all.yaml", &documents(round));
        world.status_when(|status| status.revision >= u64::from(2_000 * (round + 1))).await;
    }
    let status = world.status().await;
    assert!(!status.agents[0].synced && status.agents[0].lag > 0, "{:?}", status.agents);
    let mut received = 0;
    let ending = format!("-{}", 4);
    let is_last = |subscriber: &Subscriber, i: u32| {
        subscriber.held.contains_key(&pod_uid(&format!("p{i}")))
            && subscriber.workload(&pod_uid(&format!("p{i}"))).0.workload_name.ends_with(&ending)
    };
    while subscriber.held.len() < 2_001 || !(0..2_000).all(|i| is_last(&subscriber, i)) {
        received += subscriber.next().await.put.len();
    }
    // What changed five times was not sent five times.
    assert!(received < 2 * 2_001 + 1_000, "{received}");
    world.status_when(|status| status.agents[0].synced).await;
}

#[tokio::test]
async fn a_stream_whose_client_does_not_read_ends_too() {
    let payload = "x".repeat(2_000);
    let documents = |round: u32| -> String {
        let meta = format!(
            ", annotations: {{a: b}}, ownerReferences: [{{kind: Job, name: {payload}-{round}, controller: true}}]"
        );
        let pods = (0..2_000).map(|i| pod_with(&format!("p{i}"), "10.0.0.1", &meta, "", "True"));
        file(&pods.collect::<Vec<_>>()).replace("node-a", "node-z")
    };
    let world = World::start(&[("all.yaml", &documents(0))]).await;
    let _silent = Subscriber::connect(&world).await;
    // More than all buffers between the two ends hold.
    for round in 1..=4 {
        world.write("all.yaml", &documents(round));
        world.status_when(|status| status.revision >= u64::from(2_000 * (round + 1))).await;
    }
    assert!(world.status().await.agents[0].lag > 0);
    let start = Instant::now();
    std::fs::write(world.state.path().join("join-tokens"), "# none\n").unwrap();
    world.status_when(|status| status.agents.is_empty()).await;
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_name_that_is_too_long_ends_the_stream() {
    let world = World::start(&[("web.yaml", &web())]).await;
    let subscribe = vec!["n".repeat(1_025)];
    let first = DeltaDiscoveryRequest { resource_names_subscribe: subscribe, ..Default::default() };
    let end = Subscriber::open(&world, first).await.receive().await.unwrap_err();
    assert_eq!(end.code(), tonic::Code::InvalidArgument);
    assert!(end.message().contains("1025 bytes") && end.message().contains("1024"), "{end}");
}

#[tokio::test]
async fn a_change_is_there_in_an_instant() {
    let documents: Vec<_> = (0..500).map(|i| pod(&format!("p{i}"), "10.0.0.1")).collect();
    let world = World::start(&[("all.yaml", &file(&documents)), ("web.yaml", &web())]).await;
    let mut subscriber = world.subscriber().await;
    let mut times: Vec<Duration> = Vec::new();
    for i in 2..22 {
        let start = Instant::now();
        world.write("web.yaml", &at(&format!("10.96.0.{i}")));
        subscriber.next().await;
        times.push(start.elapsed());
        sleep(Duration::from_millis(5)).await;
    }
    times.sort();
    // 10 ms of it is the wait for more files. The bound leaves room for a loaded machine.
    assert!(times[10] < Duration::from_millis(150), "{times:?}");
}

#[tokio::test]
async fn streams_end_when_the_control_plane_stops() {
    let world = World::start(&[("web.yaml", &web())]).await;
    let mut subscriber = world.subscriber().await;
    let stopped = tokio::spawn(world.control.stop());
    let status = subscriber.receive().await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    drop(subscriber);
    stopped.await.unwrap().unwrap();
}
