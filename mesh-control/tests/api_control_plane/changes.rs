//! Only changes travel.

use crate::{manifests::*, subscriber::Told, world::World};

fn put(name: &str) -> Told {
    Told { put: vec![name.to_owned()], removed: Vec::new() }
}

fn removed(name: &str) -> Told {
    Told { put: Vec::new(), removed: vec![name.to_owned()] }
}

#[tokio::test]
async fn an_endpoint_that_changes_costs_one_resource() {
    let endpoints = |ready: bool| {
        let mut endpoints: Vec<_> = (1..=100).map(|i| endpoint(&format!("10.0.0.{i}"))).collect();
        endpoints[41] = format!("{{addresses: ['10.0.0.42'], conditions: {{ready: {ready}}}}}");
        slice("web-1", "IPv4", &endpoints, "{name: http, port: 8080}")
    };
    let world = World::start(&[("all.yaml", &file(&[web(), endpoints(true)]))]).await;
    let mut subscriber = world.subscriber().await;
    assert_eq!(subscriber.held.len(), 101);
    world.write("all.yaml", &file(&[web(), endpoints(false)]));
    assert_eq!(subscriber.next().await, put(&slice_uid("web-1", "10.0.0.42")));
    subscriber.nothing().await;
}

#[tokio::test]
async fn endpoints_come_and_go_one_by_one() {
    let slice = |ips: &[&str]| {
        slice(
            "web-1",
            "IPv4",
            &ips.iter().map(|ip| endpoint(ip)).collect::<Vec<_>>(),
            "{name: http, port: 8080}",
        )
    };
    let world =
        World::start(&[("web.yaml", &web()), ("slice.yaml", &slice(&["10.0.0.1", "10.0.0.2"]))]).await;
    let mut subscriber = world.subscriber().await;
    world.write("slice.yaml", &slice(&["10.0.0.3", "10.0.0.2", "10.0.0.1"]));
    assert_eq!(subscriber.next().await, put(&slice_uid("web-1", "10.0.0.3")));
    world.write("slice.yaml", &slice(&["10.0.0.3", "10.0.0.1"]));
    assert_eq!(subscriber.next().await, removed(&slice_uid("web-1", "10.0.0.2")));
}

#[tokio::test]
async fn a_pod_and_a_service_that_go_are_removed() {
    let files = [("web.yaml", web()), ("a.yaml", pod("a", "10.0.0.1")), ("b.yaml", pod("b", "10.0.0.2"))];
    let world = World::start(&files.each_ref().map(|(name, text)| (*name, text.as_str()))).await;
    let mut subscriber = world.subscriber().await;
    world.remove("a.yaml");
    assert_eq!(subscriber.next().await, removed(&pod_uid("a")));
    world.remove("web.yaml");
    // The pod that served it no longer names it.
    assert_eq!(subscriber.next().await, Told { put: vec![pod_uid("b")], removed: vec![WEB.to_owned()] });
    assert!(subscriber.workload(&pod_uid("b")).0.services.is_empty());
    world.write("web.yaml", &web());
    assert_eq!(subscriber.next().await.put, [pod_uid("b"), WEB.to_owned()]);
    assert_eq!(subscriber.ports(&pod_uid("b"), WEB), [(80, 8080)]);
}

#[tokio::test]
async fn what_agents_are_not_told_changes_nothing() {
    let world = World::start(&[("web.yaml", &web()), ("a.yaml", &pod("a", "10.0.0.1"))]).await;
    let mut subscriber = world.subscriber().await;
    world.write(
        "web.yaml",
        &format!("# a comment\n{}", web().replace("namespace: shop", "namespace: shop, annotations: {x: y}")),
    );
    world.write("sa.yaml", "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: web, namespace: shop}\n");
    subscriber.nothing().await;
}

#[tokio::test]
async fn a_node_that_moves_takes_its_workloads_along() {
    let elsewhere = pod("b", "10.0.0.2").replace("node-a", "node-b");
    let files =
        [("n.yaml", node("node-a", "z1")), ("p.yaml", file(&[web(), pod("a", "10.0.0.1"), elsewhere]))];
    let world = World::start(&files.each_ref().map(|(name, text)| (*name, text.as_str()))).await;
    let mut subscriber = world.subscriber().await;
    world.write("n.yaml", &node("node-a", "z2"));
    assert_eq!(subscriber.next().await, put(&pod_uid("a")));
    assert_eq!(subscriber.workload(&pod_uid("a")).0.locality.unwrap().zone, "z2");
}

#[tokio::test]
async fn the_first_slice_takes_over_from_the_selector_and_the_last_gives_back() {
    let world = World::start(&[("all.yaml", &file(&[web(), pod("a", "10.0.0.1")]))]).await;
    let mut subscriber = world.subscriber().await;
    world.write("slice.yaml", &slice("web-1", "IPv4", &[], "{name: http, port: 8080}"));
    assert_eq!(subscriber.next().await, put(&pod_uid("a")));
    assert!(subscriber.workload(&pod_uid("a")).0.services.is_empty());
    world.remove("slice.yaml");
    assert_eq!(subscriber.next().await, put(&pod_uid("a")));
    assert_eq!(subscriber.ports(&pod_uid("a"), WEB), [(80, 8080)]);
}

#[tokio::test]
async fn versions_survive_a_restart() {
    let text = file(&[
        web(),
        pod("a", "10.0.0.1"),
        pod("b", "10.0.0.2"),
        service("other", "clusterIP: 10.96.0.9, selector: {app: web}, ports: [{port: 1}]"),
    ]);
    let one = World::start(&[("all.yaml", &text)]).await.subscriber().await.versions;
    let two = World::start(&[("all.yaml", &text)]).await.subscriber().await.versions;
    assert_eq!(one.len(), 4);
    assert_eq!(one, two);
}

#[tokio::test]
async fn many_resources_come_in_parts_of_a_thousand() {
    let documents: Vec<_> =
        (0..2_500u32).map(|i| pod(&format!("p{i}"), &format!("10.1.{}.{}", i / 250, i % 250 + 1))).collect();
    let world = World::start(&[("all.yaml", &file(&documents))]).await;
    let mut subscriber = crate::subscriber::Subscriber::connect(&world).await;
    let mut sizes = Vec::new();
    while subscriber.held.len() < 2_500 {
        sizes.push(subscriber.next().await.put.len());
    }
    assert_eq!(sizes, [1_000, 1_000, 500]);
    subscriber.nothing().await;
}
