//! Nodes that join: from then on peers reach their workloads through the node proxies.

use mesh_common::api::{
    envoy::service::discovery::v3::DeltaDiscoveryRequest,
    istio::workload::TunnelProtocol,
    mesh::v1::{ForgetNodeRequest, management_client::ManagementClient},
};
use mesh_control::ControlPlane;
use tonic::Code;

use crate::{
    client::{Shows, TOKEN_B},
    manifests::*,
    subscriber::Subscriber,
    world::World,
};

fn meshed(subscriber: &Subscriber, name: &str) -> bool {
    subscriber.workload(&pod_uid(name)).0.tunnel_protocol() == TunnelProtocol::Hbone
}

/// Two pods: `a` on `node-a`, `b` on `node-b`.
fn pods() -> String {
    file(&[pod("a", "10.0.0.1"), pod("b", "10.0.0.2").replace("node-a", "node-b")])
}

/// A subscriber that shows the token of `node-b`, and names no node otherwise.
async fn node_b(world: &World) -> Subscriber {
    let mut subscriber = Subscriber::nameless(world, &Shows::token_of(TOKEN_B)).await;
    subscriber.sync().await;
    subscriber
}

async fn forget(world: &World, node: &str) -> Result<(), Code> {
    let url = format!("http://{}", world.control.management_address());
    let request = ForgetNodeRequest { node: node.to_owned() };
    let answer = ManagementClient::connect(url).await.unwrap().forget_node(request).await;
    answer.map(drop).map_err(|status| status.code())
}

impl World {
    /// The same state and manifests under a new control plane.
    async fn restarted(self) -> Self {
        let World { dir, control, config, state } = self;
        control.stop().await.unwrap();
        let control = ControlPlane::start(config.clone()).await.unwrap();
        World { dir, control, config, state }
    }
}

#[tokio::test]
async fn a_node_that_joins_is_announced_to_everyone() {
    let world = World::start(&[("pods.yaml", &pods())]).await;
    // The first answer holds what follows from the client's own coming.
    let mut a = world.subscriber().await;
    assert!(meshed(&a, "a") && !meshed(&a, "b"));
    let b = node_b(&world).await;
    assert!(meshed(&b, "a") && meshed(&b, "b"));
    assert_eq!(a.next().await.put, [pod_uid("b")]);
    assert!(meshed(&a, "b"));
    // Who comes again changes nothing.
    drop(b);
    node_b(&world).await;
    a.nothing().await;
}

#[tokio::test]
async fn who_is_refused_does_not_join() {
    let world = World::start(&[("pods.yaml", &pods())]).await;
    let first = DeltaDiscoveryRequest::default();
    let wrong = Shows { node: Some("node-b".into()), ..Shows::token_of("no such token") };
    assert_eq!(
        Subscriber::try_open(&world, &wrong, first.clone()).await.err().unwrap().code(),
        Code::Unauthenticated
    );
    // The token is of node-b, and the client calls itself node-a.
    if let Ok(mut subscriber) = Subscriber::try_open(&world, &Shows::token_of(TOKEN_B), first).await {
        assert_eq!(subscriber.receive().await.unwrap_err().code(), Code::PermissionDenied);
    }
    assert!(!meshed(&world.subscriber().await, "b"));
}

#[tokio::test]
async fn that_a_node_has_joined_outlives_its_stream_and_the_control_plane() {
    let world = World::start(&[("pods.yaml", &pods())]).await;
    drop(node_b(&world).await);
    world.status_when(|status| status.agents.is_empty()).await;
    assert!(meshed(&world.subscriber().await, "b"));
    let world = world.restarted().await;
    assert!(meshed(&world.subscriber().await, "b"));
    let kept = std::fs::read_to_string(world.state.path().join("joined-nodes")).unwrap();
    assert_eq!(kept, "node-a\nnode-b\n");
}

#[tokio::test]
async fn a_node_is_forgotten_when_its_resource_is_deleted() {
    let world = World::start(&[("pods.yaml", &pods()), ("b.yaml", &node("node-b", "z"))]).await;
    drop(node_b(&world).await);
    world.status_when(|status| status.agents.is_empty()).await;
    let mut a = world.subscriber().await;
    assert!(meshed(&a, "b"));
    world.remove("b.yaml");
    assert_eq!(a.next().await.put, [pod_uid("b")]);
    assert!(!meshed(&a, "b"));

    // And when it was deleted while the control plane was away.
    world.write("b.yaml", &node("node-b", "z"));
    assert_eq!(a.next().await.put, [pod_uid("b")]);
    drop(node_b(&world).await);
    assert_eq!(a.next().await.put, [pod_uid("b")]);
    assert!(meshed(&a, "b"));
    drop(a);
    let b = world.path("b.yaml");
    let World { dir, control, config, state } = world;
    control.stop().await.unwrap();
    std::fs::remove_file(b).unwrap();
    let control = ControlPlane::start(config.clone()).await.unwrap();
    let world = World { dir, control, config, state };
    assert!(!meshed(&world.subscriber().await, "b"));
}

#[tokio::test]
async fn a_node_resource_that_moves_does_not_cost_its_workloads_the_mesh() {
    let world = World::start(&[("pods.yaml", &pods()), ("b.yaml", &node("node-b", "z"))]).await;
    let mut b = node_b(&world).await;
    world.remove("b.yaml");
    assert_eq!(b.next().await.put, [pod_uid("b")]);
    assert!(!meshed(&b, "b"));
    // Its agent is still there.
    world.write("c.yaml", &node("node-b", "z"));
    while !meshed(&b, "b") {
        b.next().await;
    }
    b.nothing().await;
}

#[tokio::test]
async fn a_node_is_forgotten_by_command() {
    let world = World::start(&[("pods.yaml", &pods())]).await;
    let b = node_b(&world).await;
    assert_eq!(forget(&world, "node-b").await, Err(Code::FailedPrecondition));
    assert_eq!(forget(&world, "node-x").await, Err(Code::NotFound));
    drop(b);
    world.status_when(|status| status.agents.is_empty()).await;
    let mut a = world.subscriber().await;
    assert_eq!(forget(&world, "node-b").await, Ok(()));
    assert_eq!(a.next().await.put, [pod_uid("b")]);
    assert!(!meshed(&a, "b"));
}

#[tokio::test]
async fn a_damaged_list_of_nodes_stops_the_start() {
    let world = World::start(&[]).await;
    let World { dir, control, config, state } = world;
    control.stop().await.unwrap();
    std::fs::write(state.path().join("joined-nodes"), "not a node\n").unwrap();
    let error = ControlPlane::start(config).await.unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("--state-dir") && text.contains("joined-nodes"), "{text}");
    drop(dir);
}
