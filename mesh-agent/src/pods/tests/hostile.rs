//! Pods and peers that mean no good.

use mesh_common::abi::identity_of;

use super::*;
use crate::proxy::early::Early;
use crate::proxy::stream::Request;
use crate::proxy::tls::{self, Configs};
use crate::proxy::tunnel;

#[tokio::test]
async fn a_forged_client_address_is_not_shown_to_the_application() {
    let Some(world) = World::new().await else { return };
    let address = world.server_pod.at(false, 8080);
    let listener = world.server_pod.inside.listen(address).await.unwrap();
    let configs = Configs::new(Arc::clone(&world.client.certificates) as Arc<dyn Certificates>);
    for (told, believed) in [("10.0.0.1:1", false), ("127.0.0.1:1", false), ("10.99.0.1:1", true)] {
        let tcp = world.client_pod.inside.connect(world.server_pod.at(false, 15008)).await.unwrap();
        let own = tcp.local_addr().unwrap();
        let mut tls = tls::connect(&configs, &client(), &server(), tcp).await.unwrap();
        let request = Request { client: Some(told.parse().unwrap()), ..Request::to(address) };
        let opened = tokio::spawn(async move {
            tunnel::open(&mut tls, request, &mut Early::none()).await.unwrap();
            tls
        });
        let (far, _peer) = timeout(LONG, listener.accept()).await.unwrap().unwrap();
        assert_eq!(world.seen(&far), if believed { told.parse().unwrap() } else { own });
        opened.await.unwrap();
    }
}

#[tokio::test]
async fn a_pod_that_calls_its_own_proxy_gets_nowhere() {
    let Some(world) = World::new().await else { return };
    is_reset_at_once(world.client_pod.inside.connect(world.client_pod.at(false, 15001)).await).await;
    let mut tcp = world.client_pod.inside.connect(world.client_pod.at(false, 15008)).await.unwrap();
    tcp.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut heard = Vec::new();
    drop(timeout(LONG, tcp.read_to_end(&mut heard)).await.unwrap());
    let figures = world.client.pods.figures();
    let failed = || figures.inbound.counts.failed_handshakes.load(Ordering::Relaxed);
    until("it is counted", || failed() == 1).await;
    let no_original = figures.no_routes().find(|(why, _)| *why == figures::NoRoute::NoOriginal);
    assert_eq!(no_original.unwrap().1, 1);
    // Led there by nobody.
    let plain = world.client_pod.at(false, 15006);
    is_reset_at_once(world.client_pod.inside.connect(plain).await).await;
    let malformed = || figures.inbound.counts.malformed.load(Ordering::Relaxed);
    until("it is counted", || malformed() == 1).await;
    let known = (identity_of(CLIENT).0, plain.ip());
    assert!(world.client.kernel.steered.lock().unwrap().contains(&known), "the kernel knows no listener");
    // Led to its own outbound side by a tunnel.
    for port in [15001, 15006, 15008] {
        let mut near = world.connect(Original::to(world.server_pod.at(false, port))).await.unwrap();
        is_reset(&mut near).await;
    }
}

#[tokio::test]
async fn an_application_at_a_port_of_the_proxys_keeps_its_pod_unready_until_it_leaves() {
    let Some(mut world) = World::unready(Limits::default()) else { return };
    world.certify();
    let application = world.server_pod.inside.listen("0.0.0.0:15008".parse().unwrap()).await.unwrap();
    world.server.processes(&[world.server_pod.process.id()]);
    world.server.enroll(SERVER);
    let figures = world.server.pods.figures();
    until("it is told", || {
        let told = |state| matches!(state, figures::State::Failed(why) if why.contains(":15008 is in use"));
        figures.pods().into_iter().any(|pod| told(pod.state))
    })
    .await;
    assert!(figures.listen_failures.load(Ordering::Relaxed) > 0);
    while let Ok(event) = world.server.events.try_recv() {
        assert!(matches!(event, Event::Proxy { proxy, .. } if proxy.flags == 0));
    }
    drop(application);
    world.server.ready().await;
}

#[tokio::test]
async fn a_pod_with_too_many_connections_harms_only_itself() {
    let limits = Limits { connections: 3, ..Limits::default() };
    let Some(mut world) = World::unready(limits) else { return };
    world.certify();
    world.begin().await;
    let mut open = Vec::new();
    for port in 8080..8083 {
        open.push(world.joined(false, port).await);
    }
    is_reset_at_once(world.connect(Original::to(world.server_pod.at(false, 8080))).await).await;
    let figures = world.client.pods.figures();
    assert_eq!(figures.outbound.counts.over_connections.load(Ordering::Relaxed), 1);
    for (near, far) in &mut open {
        passes(near, far, b"hello").await;
    }
}
