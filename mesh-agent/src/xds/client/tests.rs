//! Against a real server, in process, over TLS.

mod credentials;
mod istiod;
mod unreachable;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};

use mesh_common::api::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use mesh_common::api::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::ServerTlsConfig;
use tonic::{Response, Status};

use super::*;
use crate::identity::Store;
use crate::identity::access::{CONNECT_TIMEOUT, PING_INTERVAL, PING_TIMEOUT};
use crate::identity::testing::{Authority, Files, node};
use crate::snapshot::Snapshot;
use crate::snapshot::fixtures::{of_service, of_workload, service, workload};
use crate::xds::Versions;

const WEB: &str = "shop/web.shop.svc.cluster.local";
const SOON: Duration = Duration::from_secs(20);

type Sent = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

/// One stream, seen from the control plane.
struct Talk {
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: Sent,
    /// Header `authorization`.
    token: Option<String>,
    by_certificate: bool,
}

impl Talk {
    async fn request(&mut self) -> DeltaDiscoveryRequest {
        let received = tokio::time::timeout(SOON, self.requests.message()).await.expect("no request");
        received.unwrap().expect("the agent ended the stream")
    }

    async fn send(&self, response: DeltaDiscoveryResponse) {
        self.responses.send(Ok(response)).await.unwrap();
    }
}

#[derive(Clone)]
struct Plane {
    talks: mpsc::Sender<Talk>,
    refuse: Arc<Mutex<Option<Status>>>,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Plane {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        if let Some(status) = self.refuse.lock().unwrap().clone() {
            return Err(status);
        }
        let header =
            |name: &str| request.metadata().get(name).map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(
            ["clusterid", "mesh-node"].map(header),
            ["Kubernetes", "node-a"].map(|v| Some(v.to_owned()))
        );
        let (token, by_certificate) = (header("authorization"), request.peer_certs().is_some());
        let (responses, receiver) = mpsc::channel(16);
        self.talks
            .send(Talk { requests: request.into_inner(), responses, token, by_certificate })
            .await
            .unwrap();
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// A control plane, and an agent's client with an owner that the test plays.
struct World {
    talks: mpsc::Receiver<Talk>,
    refuse: Arc<Mutex<Option<Status>>>,
    events: mpsc::Receiver<XdsEvent>,
    address: SocketAddr,
    server: JoinHandle<()>,
    client: JoinHandle<()>,
    snapshot: Snapshot,
    /// What is told to be held of policies.
    policies: HashMap<String, String>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.server.abort();
        self.client.abort();
    }
}

impl World {
    async fn new() -> Self {
        let (authority, files) = known();
        Self::with(authority, authority, files, &Arc::default()).await
    }

    /// A control plane of `authority` that takes certificates of `clients`, and an agent with those files and certificates.
    async fn with(authority: &Authority, clients: &Authority, files: &Files, store: &Arc<Store>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (talks, received) = mpsc::channel(4);
        let refuse = Arc::new(Mutex::new(None));
        let plane = Plane { talks, refuse: Arc::clone(&refuse) };
        let server = serve_with(listener, plane, authority.server_tls(&[clients]));
        let (client, events) = agent_with(files.access(address, store));
        Self {
            talks: received,
            refuse,
            events,
            address,
            server,
            client,
            snapshot: Snapshot::new(),
            policies: HashMap::new(),
        }
    }

    async fn event(&mut self) -> XdsEvent {
        loop {
            let event = tokio::time::timeout(SOON, self.events.recv()).await.expect("no event");
            let event = event.expect("the client ended");
            let XdsEvent::Versions { reply } = event else { return event };
            let versions = Versions { addresses: self.snapshot.versions(), policies: self.policies.clone() };
            reply.send(versions).unwrap();
        }
    }

    /// The stream that the agent opens next, with its first request for addresses; the one for policies comes before it.
    async fn stream(&mut self) -> (Talk, DeltaDiscoveryRequest) {
        let connected = async {
            loop {
                let event = self.event().await;
                if matches!(event, XdsEvent::Connected) {
                    break;
                }
                assert!(matches!(event, XdsEvent::Disconnected { .. }), "{event:?}");
            }
        };
        tokio::time::timeout(SOON, connected).await.expect("no stream");
        self.begun().await
    }

    /// The stream that was just opened.
    async fn begun(&mut self) -> (Talk, DeltaDiscoveryRequest) {
        let mut talk = self.talks.recv().await.unwrap();
        let policies = talk.request().await;
        assert_eq!(policies.type_url, AUTHORIZATION_TYPE);
        assert_eq!(policies.initial_resource_versions, self.policies);
        let first = talk.request().await;
        assert_eq!(first.type_url, ADDRESS_TYPE);
        (talk, first)
    }

    /// Takes the next change in, and refuses those.
    async fn apply(&mut self, refused: &[&str]) -> (Vec<Rejected>, bool) {
        let event = self.event().await;
        let XdsEvent::Delta { delta, rejected, synced, applied } = event else { panic!("{event:?}") };
        self.snapshot.apply(delta);
        let refusal = |name: &&str| Rejected { name: (*name).to_owned(), reason: "no room".to_owned() };
        applied.send(Applied { refused: refused.iter().map(refusal).collect(), saved: None }).unwrap();
        (rejected, synced)
    }

    async fn disconnected(&mut self) -> String {
        let event = self.event().await;
        let XdsEvent::Disconnected { reason } = event else { panic!("{event:?}") };
        reason
    }
}

/// One authority for all servers of these tests, and the files of an agent that trusts it.
fn known() -> &'static (Authority, Files) {
    static KNOWN: OnceLock<(Authority, Files)> = OnceLock::new();
    KNOWN.get_or_init(|| {
        let authority = Authority::new("root");
        let files = Files::new(&authority.pem(), "join\n");
        (authority, files)
    })
}

fn serve(listener: TcpListener, plane: Plane) -> JoinHandle<()> {
    let authority = &known().0;
    serve_with(listener, plane, authority.server_tls(&[authority]))
}

fn serve_with(listener: TcpListener, plane: Plane, tls: ServerTlsConfig) -> JoinHandle<()> {
    let server = AggregatedDiscoveryServiceServer::new(plane);
    let builder = tonic::transport::Server::builder().tls_config(tls).unwrap();
    tokio::spawn(async move {
        let incoming = TcpListenerStream::new(listener);
        { builder }.add_service(server).serve_with_incoming(incoming).await.unwrap();
    })
}

fn agent(address: SocketAddr) -> (JoinHandle<()>, mpsc::Receiver<XdsEvent>) {
    agent_with(known().1.access(address, &Arc::default()))
}

fn agent_with(access: Arc<Access>) -> (JoinHandle<()>, mpsc::Receiver<XdsEvent>) {
    let (sender, events) = mpsc::channel(4);
    (tokio::spawn(run(access, node(), Interner::new("node-a"), sender)), events)
}

fn response(
    nonce: &str,
    resources: Vec<mesh_common::api::envoy::service::discovery::v3::Resource>,
) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: ADDRESS_TYPE.to_owned(),
        nonce: nonce.to_owned(),
        resources,
        ..DeltaDiscoveryResponse::default()
    }
}

fn web(version: &str) -> mesh_common::api::envoy::service::discovery::v3::Resource {
    of_service(service(WEB, &["10.96.0.1"], &[(80, 80)]), version)
}

#[tokio::test]
async fn a_change_is_acknowledged_when_it_is_in_force() {
    let mut world = World::new().await;
    let (mut talk, first) = world.stream().await;
    assert_eq!(first.initial_resource_versions.len(), 0);
    talk.send(response("n1", vec![web("1")])).await;
    let XdsEvent::Delta { delta, applied, synced, .. } = world.event().await else { panic!("no delta") };
    assert!(!synced, "more might follow");
    let early = tokio::time::timeout(Duration::from_millis(100), talk.requests.message()).await;
    assert!(early.is_err(), "acknowledged before it was applied");
    world.snapshot.apply(delta);
    applied.send(Applied::default()).unwrap();
    let ack = talk.request().await;
    assert_eq!((&*ack.response_nonce, ack.error_detail), ("n1", None));
}

#[tokio::test]
async fn an_acknowledgement_waits_for_the_disk_and_nothing_else_does() {
    let mut world = World::new().await;
    let (mut talk, _) = world.stream().await;
    let mut on_disk = Vec::new();
    for nonce in ["n1", "n2", "n3"] {
        talk.send(response(nonce, vec![web(nonce)])).await;
        // Put in force, although what came before is not acknowledged yet.
        let XdsEvent::Delta { applied, .. } = world.event().await else { panic!("no delta") };
        let (safe, saved) = oneshot::channel();
        on_disk.push(safe);
        applied.send(Applied { refused: Vec::new(), saved: Some(saved) }).unwrap();
    }
    let last = on_disk.pop().unwrap();
    last.send(()).unwrap();
    let early = tokio::time::timeout(Duration::from_millis(100), talk.requests.message()).await;
    assert!(early.is_err(), "acknowledged before it was saved, or out of order");
    for (safe, nonce) in on_disk.into_iter().zip(["n1", "n2"]) {
        safe.send(()).unwrap();
        assert_eq!(talk.request().await.response_nonce, nonce);
    }
    assert_eq!(talk.request().await.response_nonce, "n3");
}

#[tokio::test]
async fn a_change_that_is_not_in_force_is_not_acknowledged_with_one_that_is_saved() {
    let mut world = World::new().await;
    let (mut talk, _) = world.stream().await;
    let (safe, saved) = oneshot::channel();
    talk.send(response("n1", vec![web("1")])).await;
    let XdsEvent::Delta { applied, .. } = world.event().await else { panic!("no delta") };
    applied.send(Applied { refused: Vec::new(), saved: Some(saved) }).unwrap();
    talk.send(response("n2", vec![web("2")])).await;
    let XdsEvent::Delta { applied, .. } = world.event().await else { panic!("no delta") };
    safe.send(()).unwrap();
    assert_eq!(talk.request().await.response_nonce, "n1");
    let early = tokio::time::timeout(Duration::from_millis(100), talk.requests.message()).await;
    assert!(early.is_err(), "acknowledged before it was applied");
    applied.send(Applied::default()).unwrap();
    assert_eq!(talk.request().await.response_nonce, "n2");
}

#[tokio::test]
async fn a_broken_stream_is_resumed_with_what_is_held() {
    let mut world = World::new().await;
    let (mut talk, _) = world.stream().await;
    let bad = of_service(service("shop/bad", &[], &[(0, 1)]), "1");
    let full = of_service(service("shop/full", &["10.96.0.3"], &[(80, 80)]), "1");
    talk.send(response("n1", vec![web("v1"), bad, full])).await;
    let (rejected, _) = world.apply(&["shop/full"]).await;
    assert_eq!(rejected[0].name, "shop/bad");
    let nack = talk.request().await.error_detail.unwrap().message;
    assert!(nack.contains("shop/bad: ") && nack.contains("shop/full: no room"), "{nack}");
    assert!(world.apply(&[]).await.1, "silence is the end");
    talk.responses.send(Err(Status::unavailable("going away"))).await.unwrap();
    assert!(world.disconnected().await.contains("going away"));
    let (_talk, first) = world.stream().await;
    let wanted = [(WEB.to_owned(), "v1".to_owned()), ("shop/full".to_owned(), String::new())].into();
    assert_eq!(first.initial_resource_versions, wanted);
    assert!(first.node.is_some());
}

#[tokio::test]
async fn silence_after_the_last_page_is_the_end() {
    let mut world = World::new().await;
    let (mut talk, _) = world.stream().await;
    let pod = |i| of_workload(workload(&format!("c//Pod/n/{i}"), "10.0.0.1", "", &[]), "1");
    talk.send(response("n1", (0..1_000).map(pod).collect())).await;
    assert!(!world.apply(&[]).await.1);
    talk.request().await;
    // A busy control plane: longer than the silence after a small response.
    tokio::time::sleep(Duration::from_millis(600)).await;
    talk.send(response("n2", vec![web("1")])).await;
    assert!(!world.apply(&[]).await.1);
    talk.request().await;
    assert!(world.apply(&[]).await.1);
    assert_eq!((world.snapshot.workload_count(), world.snapshot.service_count()), (1_000, 1));
    // Once said, it stays said, also when a later change fills a page.
    talk.send(response("n3", (0..1_000).map(pod).collect())).await;
    assert!(world.apply(&[]).await.1);
}

#[tokio::test]
async fn an_empty_answer_is_the_end_at_once() {
    let mut world = World::new().await;
    let (mut talk, _) = world.stream().await;
    talk.send(response("n1", Vec::new())).await;
    assert!(world.apply(&[]).await.1);
    assert_eq!(talk.request().await.response_nonce, "n1");
}

#[tokio::test]
async fn nonsense_is_survived() {
    let mut world = World::new().await;
    let (mut talk, _) = world.stream().await;
    talk.send(response("n1", vec![web("1")])).await;
    world.apply(&[]).await;
    talk.request().await;
    assert!(world.apply(&[]).await.1, "silence is the end");
    // Another type: refused, and the stream goes on.
    let other = DeltaDiscoveryResponse { type_url: "x/y".to_owned(), ..response("n2", vec![web("2")]) };
    talk.send(other).await;
    let nack = talk.request().await;
    assert_eq!((&*nack.response_nonce, nack.error_detail.is_some()), ("n2", true));
    // Resources that are none.
    let mut broken = web("2");
    broken.resource.as_mut().unwrap().value = vec![0xff; 1_000];
    talk.send(response("n3", vec![broken])).await;
    assert_eq!(world.apply(&[]).await.0.len(), 1);
    assert!(talk.request().await.error_detail.is_some());
    // No nonce: nothing could be answered.
    talk.send(response("", vec![web("2")])).await;
    assert!(world.disconnected().await.contains("nonce"));
    let (_talk, first) = world.stream().await;
    assert_eq!(first.initial_resource_versions, [(WEB.to_owned(), "1".to_owned())].into());
}

#[tokio::test]
async fn a_plane_that_refuses_is_asked_again() {
    let mut world = World::new().await;
    let (talk, _) = world.stream().await;
    *world.refuse.lock().unwrap() = Some(Status::resource_exhausted("too many streams"));
    drop(talk);
    world.disconnected().await;
    assert!(world.disconnected().await.contains("too many streams"));
    assert!(world.disconnected().await.contains("too many streams"));
    *world.refuse.lock().unwrap() = None;
    world.stream().await;
}

#[tokio::test]
async fn the_client_ends_with_its_owner() {
    let mut world = World::new().await;
    let (talk, _) = world.stream().await;
    let (_, replacement) = mpsc::channel(1);
    drop(std::mem::replace(&mut world.events, replacement));
    let ended = async {
        while !world.client.is_finished() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, ended).await.expect("the client goes on without an owner");
    drop(talk);
    assert_ne!(world.address.port(), 0);
}
