//! What connections do when all is well, or an end goes away.

use super::*;
use crate::proxy::stream::Message;
use crate::proxy::{tls, tunnel};

#[tokio::test]
async fn a_tunnel_is_reused_after_a_clean_end() {
    let mesh = Mesh::new().await;
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    for round in 0..10 {
        assert_eq!(converse(mesh.connect(target).await, b"hello").await.unwrap(), b"hello");
        until("the tunnel rests", || mesh.outbound.pool.idle() == 1).await;
        assert_eq!(mesh.count(|counts| &counts.reused).0, round);
    }
    assert_eq!(mesh.count(|counts| &counts.handshakes), (1, 1));
    let (wanted, outcome) = mesh.policy.finished.lock().unwrap()[0].clone();
    assert_eq!(wanted.source, Some(client()));
    assert_eq!(outcome, Outcome::Ended(relay::Moved { sent: 5, received: 5 }));
}

/// A server that does with what it hears as it is told, with the tunnels that come to it.
async fn answering(
    mesh: &Mesh,
    answers: impl Fn(usize) -> Option<Message<'static>> + Send + 'static,
) -> (SocketAddr, tokio::sync::mpsc::UnboundedReceiver<Vec<u8>>) {
    let (listener, address) = listener().await;
    let (heard, told) = tokio::sync::mpsc::unbounded_channel();
    let configs = Arc::clone(&mesh.pair.server);
    tokio::spawn(async move {
        for number in 0.. {
            let (tcp, _peer) = listener.accept().await.unwrap();
            let mut tls = tls::accept(&configs, &server(), tcp).await.unwrap();
            let request = tunnel::receive(&mut tls).await.unwrap().unwrap();
            assert!(matches!(Message::decode(&request), Ok(Message::Request(_))));
            // It may come with the request, or after.
            let early = tunnel::receive(&mut tls).await.unwrap().unwrap();
            heard.send(early).unwrap();
            if let Some(answer) = answers(number) {
                tunnel::send(&mut tls, &answer).await.unwrap();
            }
        }
    });
    (address, told)
}

#[tokio::test]
async fn what_is_said_early_goes_along_and_is_said_again_only_if_nobody_has_heard_it() {
    let mesh = Mesh::new().await;
    let target = echo().await;
    // Refused, or told that it takes nothing more: no application has heard it.
    for refusal in [Message::Refused(Reason::Upstream, ""), Message::Drain] {
        let text = refusal.encode();
        let (refusing, mut told) =
            answering(&mesh, move |_| Some(Message::decode(Box::leak(text.clone().into())).unwrap())).await;
        mesh.route(
            target,
            vec![Endpoint { tunnel: refusing, ..mesh.endpoint(target) }, mesh.endpoint(target)],
        );
        assert_eq!(converse(mesh.connect(target).await, b"hello").await.unwrap(), b"hello");
        assert_eq!(told.recv().await.unwrap(), Message::Data(b"hello").encode());
    }
    let moved = relay::Moved { sent: 5, received: 5 };
    until("both ends count it", || {
        let table = mesh.table.finished.lock().unwrap();
        table.len() == 2 && table.iter().all(|(_, outcome)| *outcome == Outcome::Ended(moved))
    })
    .await;
    // It goes without a word: it may have handed it over.
    let (silent, mut told) = answering(&mesh, |_| None).await;
    mesh.route(target, vec![Endpoint { tunnel: silent, ..mesh.endpoint(target) }, mesh.endpoint(target)]);
    assert!(converse(mesh.connect(target).await, b"hello").await.is_err());
    assert_eq!(told.recv().await.unwrap(), Message::Data(b"hello").encode());
    assert_eq!(mesh.outcomes().len(), 2, "another application has heard it");
}

#[tokio::test]
async fn what_is_said_before_the_answer_goes_on_and_another_hears_all_of_it() {
    let mesh = Mesh::new().await;
    let target = echo().await;
    let (listener, refusing) = listener().await;
    let (heard, mut told) = tokio::sync::mpsc::unbounded_channel();
    let configs = Arc::clone(&mesh.pair.server);
    tokio::spawn(async move {
        let (tcp, _peer) = listener.accept().await.unwrap();
        let mut tls = tls::accept(&configs, &server(), tcp).await.unwrap();
        for _ in 0..3 {
            heard.send(tunnel::receive(&mut tls).await.unwrap().unwrap()).unwrap();
        }
        tunnel::send(&mut tls, &Message::Refused(Reason::Upstream, "")).await.unwrap();
    });
    mesh.route(target, vec![Endpoint { tunnel: refusing, ..mesh.endpoint(target) }, mesh.endpoint(target)]);
    let mut tcp = mesh.connect(target).await;
    told.recv().await.unwrap();
    for word in [&b"hello"[..], b"world"] {
        tcp.write_all(word).await.unwrap();
        assert_eq!(told.recv().await.unwrap(), Message::Data(word).encode());
    }
    assert_eq!(converse(tcp, b"!").await.unwrap(), b"helloworld!");
}

#[tokio::test]
async fn what_a_fresh_tunnel_refuses_is_asked_for_on_another_one() {
    let mesh = Mesh::with(vec![Protocol::H2], limits()).await;
    let (listener, address) = listener().await;
    let configs = Arc::clone(&mesh.pair.server);
    tokio::spawn(async move {
        for number in 0.. {
            let (tcp, _peer) = listener.accept().await.unwrap();
            let tls = tls::accept(&configs, &server(), tcp).await.unwrap();
            tokio::spawn(async move {
                let mut http2 = h2::server::handshake(tls::TlsIo::new(tls)).await.unwrap();
                let mut asked = Vec::new();
                while let Some(Ok((request, mut respond))) = http2.accept().await {
                    if number == 0 {
                        respond.send_reset(h2::Reason::REFUSED_STREAM);
                        continue;
                    }
                    let mut send = respond.send_response(http::Response::new(()), false).unwrap();
                    send.send_data(bytes::Bytes::from_static(b"second"), true).unwrap();
                    // Dropped, it would be a reset.
                    asked.push(request);
                }
            });
        }
    });
    let target = "10.1.2.3:80".parse().unwrap();
    mesh.route(target, vec![Endpoint { tunnel: address, ..mesh.endpoint(target) }]);
    assert_eq!(converse(mesh.connect(target).await, b"hello").await.unwrap(), b"second");
    assert_eq!(mesh.outbound.allowance.counts.handshakes.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn what_is_said_early_takes_no_more_memory_than_its_pod_has() {
    // Room for two of them.
    let mesh = Mesh::with(vec![Protocol::Stream], Limits { buffers: 2 * 8 * (8 << 10), ..limits() }).await;
    let target = echo().await;
    let (silent, mut told) = silent(&mesh).await;
    mesh.route(target, vec![Endpoint { tunnel: silent, ..mesh.endpoint(target) }]);
    let mut open = Vec::new();
    for _ in 0..5 {
        let mut tcp = mesh.connect(target).await;
        tcp.write_all(&[1; 100_000]).await.unwrap();
        open.push(tcp);
    }
    for _ in 0..5 {
        told.recv().await.unwrap();
    }
    assert!(mesh.outbound.allowance.budget.held() <= 2 * (8 << 10));
    until("others are counted", || mesh.outbound.allowance.budget.refused() >= 3).await;
    drop(open);
}

/// A server that takes requests and never answers; it tells of each.
async fn silent(mesh: &Mesh) -> (SocketAddr, tokio::sync::mpsc::UnboundedReceiver<()>) {
    let (listener, address) = listener().await;
    let (heard, told) = tokio::sync::mpsc::unbounded_channel();
    let configs = Arc::clone(&mesh.pair.server);
    tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            let (tcp, _peer) = listener.accept().await.unwrap();
            let mut tls = tls::accept(&configs, &server(), tcp).await.unwrap();
            tunnel::receive(&mut tls).await.unwrap().unwrap();
            heard.send(()).unwrap();
            held.push(tls);
        }
    });
    (address, told)
}

#[tokio::test]
async fn what_is_said_early_is_whole_however_long_it_is() {
    for protocols in [vec![Protocol::Stream], vec![Protocol::H2]] {
        let mesh = Mesh::with(protocols, limits()).await;
        let target = echo().await;
        let refusing = listener().await.1;
        mesh.route(
            target,
            vec![Endpoint { tunnel: refusing, ..mesh.endpoint(target) }, mesh.endpoint(target)],
        );
        for length in [1, 8191, 8192, 8193, 100_000] {
            let text: Vec<u8> = (0..length).map(|at: u32| at as u8).collect();
            assert!(converse(mesh.connect(target).await, &text).await.unwrap() == text);
        }
    }
}

#[tokio::test]
async fn a_tunnel_is_not_reused_after_a_reset() {
    let mesh = Mesh::new().await;
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    let mut tcp = mesh.connect(target).await;
    tcp.write_all(b"hello").await.unwrap();
    tcp.read_exact(&mut [0; 5]).await.unwrap();
    relay::reset_on_drop(&tcp);
    drop(tcp);
    until("the stream is cut", || matches!(mesh.outcomes()[..], [Outcome::Cut(..)])).await;
    assert_eq!(mesh.outbound.pool.idle(), 0);
    assert_eq!(converse(mesh.connect(target).await, b"again").await.unwrap(), b"again");
    assert_eq!(mesh.count(|counts| &counts.handshakes), (2, 2));
}

#[tokio::test]
async fn a_peer_that_speaks_only_http2_is_served() {
    let mesh = Mesh::with(vec![Protocol::H2], limits()).await;
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    for _round in 0..10 {
        assert_eq!(converse(mesh.connect(target).await, b"hello").await.unwrap(), b"hello");
    }
    assert_eq!(mesh.count(|counts| &counts.handshakes), (1, 1));
}

#[tokio::test]
async fn a_thousand_connections_at_once() {
    for protocols in [vec![Protocol::Stream], vec![Protocol::H2]] {
        let mesh = Arc::new(Mesh::with(protocols, limits()).await);
        let target = echo().await;
        mesh.route(target, vec![mesh.endpoint(target)]);
        // All of them are open at the same time: nobody ends before the last has begun.
        let mut open = Vec::new();
        for round in 0..1_000_u32 {
            let mut tcp = mesh.connect(target).await;
            tcp.write_all(&round.to_be_bytes()).await.unwrap();
            open.push(tcp);
        }
        for (round, mut tcp) in open.into_iter().enumerate() {
            let mut heard = [0; 4];
            timeout(LONG * 3, tcp.read_exact(&mut heard)).await.unwrap().unwrap();
            assert_eq!(u32::from_be_bytes(heard), round as u32);
            tcp.shutdown().await.unwrap();
            assert_eq!(timeout(LONG, tcp.read(&mut heard)).await.unwrap().unwrap(), 0);
        }
        until("all are told", || mesh.outcomes().len() == 1_000).await;
    }
}

#[tokio::test]
async fn another_endpoint_takes_what_the_first_refuses() {
    let mesh = Mesh::new().await;
    let target = echo().await;
    let (gone, closed) = listener().await;
    drop(gone);
    let nobody = Endpoint { tunnel: closed, ..mesh.endpoint(target) };
    // No node, no application, and then one.
    mesh.route(target, vec![nobody, mesh.endpoint(closed), mesh.endpoint(target)]);
    assert_eq!(converse(mesh.connect(target).await, b"hello").await.unwrap(), b"hello");
    assert_eq!(mesh.count(|counts| &counts.retried).0, 2);
    assert!(mesh.outcomes().contains(&Outcome::Refused(Reason::Upstream)));
}

#[tokio::test]
async fn a_stale_tunnel_is_replaced() {
    let mesh = Mesh::new().await;
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    converse(mesh.connect(target).await, b"hello").await.unwrap();
    until("the tunnel rests", || mesh.outbound.pool.idle() == 1).await;
    // The server's node is restarted, at the same address.
    mesh.phase.send(Phase::Over).unwrap();
    mesh.serving.await.unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(mesh.tunnel).unwrap();
    let (_phase, drain) = Drain::new();
    tokio::spawn(inbound::serve(Arc::clone(&mesh.inbound), socket.listen(128).unwrap(), drain));
    let outbound = &mesh.outbound;
    let mut tcp = {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        mesh.table.meant.lock().unwrap().insert(socket.local_addr().unwrap(), target);
        socket.connect(mesh.capture).await.unwrap()
    };
    tcp.write_all(b"again").await.unwrap();
    timeout(LONG, tcp.read_exact(&mut [0; 5])).await.unwrap().unwrap();
    assert_eq!(outbound.allowance.counts.handshakes.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_drain_lets_streams_end_and_then_resets() {
    for protocols in [vec![Protocol::Stream], vec![Protocol::H2]] {
        let mesh = Mesh::with(protocols, limits()).await;
        let target = echo().await;
        mesh.route(target, vec![mesh.endpoint(target)]);
        let mut open = Vec::new();
        for _ in 0..2 {
            let mut tcp = mesh.connect(target).await;
            tcp.write_all(b"hello").await.unwrap();
            tcp.read_exact(&mut [0; 5]).await.unwrap();
            open.push(tcp);
        }
        mesh.phase.send(Phase::Draining).unwrap();
        until("the listener is closed", || std::net::TcpStream::connect(mesh.tunnel).is_err()).await;
        let mut late = mesh.connect(target).await;
        assert!(timeout(LONG, late.read(&mut [0])).await.unwrap().is_err());
        // What is open goes on, in both directions, and may end in order.
        assert_eq!(converse(open.remove(0), b"still here").await.unwrap(), b"still here");
        assert!(!mesh.serving.is_finished());
        mesh.phase.send(Phase::Over).unwrap();
        timeout(LONG, mesh.serving).await.unwrap().unwrap();
        assert!(timeout(LONG, open[0].read(&mut [0])).await.unwrap().is_err());
    }
}

#[tokio::test]
async fn what_is_not_meshed_goes_on_as_it_is() {
    let mesh = Mesh::new().await;
    let target = echo().await;
    mesh.table.routes.lock().unwrap().insert(target, Route::Direct(target));
    assert_eq!(converse(mesh.connect(target).await, b"hello").await.unwrap(), b"hello");
    assert_eq!(mesh.count(|counts| &counts.handshakes), (0, 0));
}

#[tokio::test]
async fn a_removed_endpoint_ends_its_connections_and_no_others() {
    let mesh = Mesh::new().await;
    let (goes, stays) = (echo().await, echo().await);
    let mut open = Vec::new();
    for target in [goes, stays] {
        mesh.route(target, vec![mesh.endpoint(target)]);
        let mut tcp = mesh.connect(target).await;
        tcp.write_all(b"hello").await.unwrap();
        tcp.read_exact(&mut [0; 5]).await.unwrap();
        open.push(tcp);
    }
    mesh.route(goes, vec![]);
    mesh.table.changed.send_modify(|version| *version += 1);
    assert!(timeout(LONG, open[0].read(&mut [0])).await.unwrap().is_err());
    open[1].write_all(b"still").await.unwrap();
    timeout(LONG, open[1].read_exact(&mut [0; 5])).await.unwrap().unwrap();
    until("it is told", || mesh.table.finished.lock().unwrap().len() == 1).await;
    let (dialled, outcome) = mesh.table.finished.lock().unwrap()[0].clone();
    assert_eq!((dialled.destination, dialled.endpoint), (goes, Some(mesh.endpoint(goes))));
    assert_eq!(outcome, Outcome::Revoked);
}
