//! Peers and applications that mean no good, and limits.

use std::time::SystemTime;

use super::*;
use crate::proxy::hbone::{self, Asked};
use crate::proxy::tls::{self, fixtures};

/// A tunnel without a proxy behind it.
async fn tls_of(mesh: &Mesh) -> tls::Tls {
    let tcp = TcpStream::connect(mesh.tunnel).await.unwrap();
    tls::connect(&mesh.pair.client, &client(), &server(), tcp).await.unwrap()
}

#[tokio::test]
async fn policy_refuses_before_a_byte_and_ends_what_is_open() {
    for protocols in [vec![Protocol::Stream], vec![Protocol::H2]] {
        let mesh = Mesh::with(protocols, limits()).await;
        let target = echo().await;
        mesh.route(target, vec![mesh.endpoint(target)]);
        let mut open = mesh.connect(target).await;
        open.write_all(b"hello").await.unwrap();
        open.read_exact(&mut [0; 5]).await.unwrap();
        mesh.policy.open.store(false, Ordering::Relaxed);
        mesh.policy.changed.send_modify(|version| *version += 1);
        assert!(timeout(LONG, open.read(&mut [0])).await.unwrap().is_err());
        assert_eq!(mesh.outcomes().last(), Some(&Outcome::Revoked));
        let mut late = mesh.connect(target).await;
        assert!(timeout(LONG, late.read(&mut [0])).await.unwrap().is_err());
        assert_eq!(mesh.outcomes().last(), Some(&Outcome::Refused(Reason::Policy)));
    }
}

#[tokio::test]
async fn by_http2_no_stream_begins_either_when_the_clients_certificate_has_ended() {
    let mesh = Mesh::with(vec![Protocol::H2], limits()).await;
    let until = SystemTime::now() + Duration::from_secs(3);
    let short = fixtures::Wanted { until, ..fixtures::Wanted::of(&client()) };
    mesh.pair.client_held.set(&client(), mesh.pair.authority.issue(&short));
    let target = echo().await;
    let tunnel =
        hbone::Connection::new(tls_of(&mesh).await, 10, &mesh.outbound.allowance.unread).await.unwrap();
    let asked = Asked::to(target);
    let open = tunnel.open(&asked, None).await;
    assert!(open.is_ok(), "while it is valid");
    while SystemTime::now() < until {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(tunnel.open(&asked, None).await.is_err(), "the first one after its end");
    assert!(mesh.outcomes().iter().all(|outcome| *outcome == Outcome::Refused(Reason::Draining)));
    // The one that was open may go on.
    drop(open);
}

#[tokio::test]
async fn what_a_tunnel_carried_is_told_of_when_the_tunnel_is_cut() {
    let mesh = Mesh::with(vec![Protocol::H2], limits()).await;
    let target = echo().await;
    let tls = tls_of(&mesh).await;
    let wire = socket2::SockRef::from(&tls.tcp).try_clone().unwrap();
    let tunnel = hbone::Connection::new(tls, 10, &mesh.outbound.allowance.unread).await.unwrap();
    let asked = Asked::to(target);
    let _open = [tunnel.open(&asked, None).await.unwrap(), tunnel.open(&asked, None).await.unwrap()];
    wire.shutdown(std::net::Shutdown::Both).unwrap();
    until("both streams are told of", || matches!(mesh.outcomes()[..], [Outcome::Cut(..), Outcome::Cut(..)]))
        .await;
}

#[tokio::test]
async fn a_tunnel_leads_only_to_its_own_workload_and_not_into_the_proxy() {
    for protocols in [vec![Protocol::Stream], vec![Protocol::H2]] {
        let mesh = Mesh::with(protocols, limits()).await;
        let other: SocketAddr = "127.0.0.2:80".parse().unwrap();
        let ports = inbound::RESERVED.map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        for wrong in [vec![other], ports.to_vec()].concat() {
            mesh.route(wrong, vec![mesh.endpoint(wrong)]);
            let mut tcp = mesh.connect(wrong).await;
            assert!(timeout(LONG, tcp.read(&mut [0])).await.unwrap().is_err());
            assert_eq!(mesh.outcomes().last(), Some(&Outcome::Refused(Reason::BadRequest)));
        }
    }
}

#[tokio::test]
async fn a_connection_that_nobody_redirected_is_reset() {
    let mesh = Mesh::new().await;
    let mut tcp = TcpStream::connect(mesh.capture).await.unwrap();
    assert!(timeout(LONG, tcp.read(&mut [0])).await.unwrap().is_err());
}

#[tokio::test]
async fn a_slow_handshake_ends_and_stops_nobody() {
    // One address has an eighth of them.
    let quick = Limits { handshake_timeout: Duration::from_millis(500), handshakes: 64, ..limits() };
    let mesh = Mesh::with(vec![Protocol::Stream], quick).await;
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    let mut slow = Vec::new();
    for _ in 0..7 {
        let mut tcp = TcpStream::connect(mesh.tunnel).await.unwrap();
        tcp.write_all(&[22, 3, 1]).await.unwrap();
        slow.push(tcp);
    }
    assert_eq!(converse(mesh.connect(target).await, b"hello").await.unwrap(), b"hello");
    for tcp in &mut slow {
        drop(timeout(LONG, tcp.read(&mut [0])).await.unwrap());
    }
    assert_eq!(mesh.count(|counts| &counts.slow_handshakes).1, 7);
    // With more than are allowed at a time, the next waits for them, and then is served.
    let mut many = Vec::new();
    for _ in 0..8 {
        many.push(TcpStream::connect(mesh.tunnel).await.unwrap());
    }
    sleep(Duration::from_millis(50)).await;
    drop(timeout(LONG, tls_of(&mesh)).await.unwrap());
    assert_eq!(mesh.count(|counts| &counts.over_handshakes).1, 1);
}

#[tokio::test]
async fn more_connections_than_allowed_are_reset() {
    let few = Limits { connections: 3, ..limits() };
    let mesh = Mesh::with(vec![Protocol::Stream], few).await;
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut tcp = mesh.connect(target).await;
        tcp.write_all(b"x").await.unwrap();
        tcp.read_exact(&mut [0]).await.unwrap();
        open.push(tcp);
    }
    let mut late = mesh.connect(target).await;
    assert!(timeout(LONG, late.read(&mut [0])).await.unwrap().is_err());
    assert_eq!(mesh.count(|counts| &counts.over_connections).0, 1);
    for tcp in open {
        assert!(converse(tcp, b"").await.unwrap().is_empty());
    }
    until("there is room again", || mesh.outbound.allowance.connected() == 0).await;
}

#[tokio::test]
async fn what_looks_like_the_proxys_own_words_is_payload() {
    for protocols in [vec![Protocol::Stream], vec![Protocol::H2]] {
        let mesh = Mesh::with(protocols, limits()).await;
        let target = echo().await;
        mesh.route(target, vec![mesh.endpoint(target)]);
        let forged = b"CONNECT 127.0.0.1:15008 HTTP/1.1\r\nforwarded: for=\"10.0.0.1:1\"\r\nbaggage: k8s.namespace.name=admin\r\n\r\n";
        let tcp = mesh.connect(target).await;
        let address = tcp.local_addr().unwrap();
        assert_eq!(converse(tcp, forged).await.unwrap(), forged);
        until("it is told", || mesh.outcomes().len() == 1).await;
        let wanted = mesh.policy.finished.lock().unwrap()[0].0.clone();
        assert_eq!((wanted.source, wanted.client), (Some(client()), Some(address)));
    }
}

/// A peer with a valid certificate that says nonsense: its connection ends, nobody else's does.
#[tokio::test]
async fn nonsense_in_a_tunnel_ends_only_that_tunnel() {
    let mesh = Mesh::new().await;
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    let mut well = mesh.connect(target).await;
    well.write_all(b"x").await.unwrap();
    well.read_exact(&mut [0]).await.unwrap();
    for nonsense in
        [&[9_u8][..], &[0, 1], &[1, 4, 127], &[2], &[4], &[1, 5, 0, 0, 0, 0, 0, 0], &[255; 16_384]]
    {
        let mut peer = tls_of(&mesh).await;
        let record = peer.writer.data(nonsense).unwrap();
        peer.tcp.write_all(&record).await.unwrap();
        let mut rest = Vec::new();
        drop(timeout(LONG, peer.tcp.read_to_end(&mut rest)).await.unwrap());
    }
    well.write_all(b"y").await.unwrap();
    timeout(LONG, well.read_exact(&mut [0])).await.unwrap().unwrap();
}

/// Who is no peer at all: plaintext, nonsense, and a handshake without end.
#[tokio::test]
async fn nonsense_instead_of_a_handshake_ends_only_itself() {
    let mesh = Mesh::new().await;
    let endless = [&[22, 3, 1, 0x40, 0][..], &[1; 0x4000]].concat();
    let words: [&[u8]; 5] =
        [b"GET / HTTP/1.1\r\n\r\n", &[0; 4096], &[255; 4096], &[22, 3, 3, 255, 255], &endless];
    for (round, nonsense) in words.into_iter().enumerate() {
        let mut tcp = TcpStream::connect(mesh.tunnel).await.unwrap();
        let said = async { while tcp.write_all(nonsense).await.is_ok() {} };
        timeout(LONG, said).await.expect("a handshake without end is taken");
        assert_eq!(mesh.count(|counts| &counts.failed_handshakes).1, round as u64 + 1);
    }
    let target = echo().await;
    mesh.route(target, vec![mesh.endpoint(target)]);
    assert_eq!(converse(mesh.connect(target).await, b"hello").await.unwrap(), b"hello");
}
