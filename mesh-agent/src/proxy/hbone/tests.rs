use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;
use crate::proxy::relay::{Cut, reset_on_drop};
use crate::proxy::stream::Reason;
use crate::proxy::tls::Protocol;
use crate::proxy::tls::fixtures::{Pair, sockets};

const LONG: Duration = Duration::from_secs(20);

fn asked() -> Asked {
    Asked {
        client: Some("[fd00::7]:40000".parse().unwrap()),
        host: Some("cart.shop.svc.cluster.local".into()),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
        ..Asked::to("10.1.2.3:8080".parse().unwrap())
    }
}

/// Serves a tunnel: the answer to each stream, or the application's end of it.
async fn tunnel(
    answer: Result<(), Reason>,
) -> (Connection, tokio::sync::mpsc::Receiver<(Asked, Option<TcpStream>)>) {
    tunnel_of(answer, 10).await
}

/// One whose server takes so many streams.
async fn tunnel_of(
    answer: Result<(), Reason>,
    most: u32,
) -> (Connection, tokio::sync::mpsc::Receiver<(Asked, Option<TcpStream>)>) {
    tunnel_within(answer, most, &plenty()).await
}

/// Memory that is never short.
fn plenty() -> Arc<Unread> {
    Unread::new(usize::MAX, Arc::default())
}

/// One whose server's applications may leave so much unread.
async fn tunnel_within(
    answer: Result<(), Reason>,
    most: u32,
    unread: &Arc<Unread>,
) -> (Connection, tokio::sync::mpsc::Receiver<(Asked, Option<TcpStream>)>) {
    let unread = Arc::clone(unread);
    let (near, far) = Pair::speaking(vec![Protocol::H2]).tunnel().await;
    let (streams, incoming) = tokio::sync::mpsc::channel(100);
    tokio::spawn(async move {
        let mut server = Server::new(far, most, &unread).await.unwrap();
        while let Some(Ok(next)) = server.next().await {
            let asked = next.asked.clone().unwrap();
            let Ok(()) = answer else {
                next.refuse(answer.unwrap_err()).unwrap();
                continue;
            };
            let (send, receive) = next.accept(None).unwrap();
            let (application, mut socket) = sockets().await;
            let unread = Arc::clone(&unread);
            tokio::spawn(async move { relay(&mut socket, send, receive, Bytes::new(), &unread).await });
            streams.send((asked, Some(application))).await.unwrap();
        }
    });
    (Connection::new(near, 10, &plenty()).await.unwrap(), incoming)
}

async fn stream(connection: &Connection) -> (TcpStream, JoinHandle<Result<(), Cut>>) {
    let (send, receive) = connection.open(&asked(), None).await.unwrap();
    let (application, mut socket) = sockets().await;
    let relayed = async move { relay(&mut socket, send, receive, Bytes::new(), &plenty()).await.0 };
    (application, tokio::spawn(relayed))
}

#[tokio::test]
async fn bytes_half_closes_and_headers_pass() {
    let (connection, mut incoming) = tunnel(Ok(())).await;
    let (mut client, relayed) = stream(&connection).await;
    let (heard, server) = incoming.recv().await.unwrap();
    assert_eq!(heard, asked());
    let mut server = server.unwrap();
    server.write_all(b"220 ready").await.unwrap();
    client.read_exact(&mut [0; 9]).await.unwrap();
    let sent: Vec<u8> = (0..5_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let expected = sent.clone();
    let writer = tokio::spawn(async move {
        client.write_all(&sent).await.unwrap();
        client.shutdown().await.unwrap();
        let mut back = Vec::new();
        client.read_to_end(&mut back).await.unwrap();
        back
    });
    let mut heard = Vec::new();
    timeout(LONG, server.read_to_end(&mut heard)).await.unwrap().unwrap();
    assert!(heard == expected);
    server.write_all(&heard).await.unwrap();
    server.shutdown().await.unwrap();
    assert!(timeout(LONG, writer).await.unwrap().unwrap() == expected);
    relayed.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_stream_without_a_trace_begins_its_own() {
    let (connection, mut incoming) = tunnel(Ok(())).await;
    let mut traces = Vec::new();
    for _ in 0..2 {
        let _stream = connection.open(&Asked { traceparent: None, ..asked() }, None).await.unwrap();
        traces.push(incoming.recv().await.unwrap().0.traceparent.unwrap());
    }
    assert!(traces[0] != traces[1] && traces.iter().all(|trace| trace.len() == 55), "{traces:?}");
    let bytes = std::array::from_fn(|at| at as u8);
    assert_eq!(&*headers::traceparent(bytes), "00-000102030405060708090a0b0c0d0e0f-1011121314151617-00");
}

#[tokio::test]
async fn refusals_have_their_reason() {
    for reason in [Reason::Policy, Reason::BadRequest, Reason::Upstream, Reason::Timeout] {
        let (connection, _incoming) = tunnel(Err(reason)).await;
        let refused = connection.open(&asked(), None).await.err().unwrap();
        assert!(matches!(refused, OpenError::Refused(found) if found == reason), "{refused}");
    }
}

#[tokio::test]
async fn a_reset_passes_both_ways() {
    for client_resets in [true, false] {
        let (connection, mut incoming) = tunnel(Ok(())).await;
        let (client, _relayed) = stream(&connection).await;
        let server = incoming.recv().await.unwrap().1.unwrap();
        let (resets, mut feels) = if client_resets { (client, server) } else { (server, client) };
        reset_on_drop(&resets);
        drop(resets);
        assert!(timeout(LONG, feels.read(&mut [0])).await.unwrap().is_err());
    }
}

#[tokio::test]
async fn a_slow_reader_holds_only_its_own_stream() {
    let (connection, mut incoming) = tunnel(Ok(())).await;
    let (slow, _relayed) = stream(&connection).await;
    let _stuck = incoming.recv().await.unwrap();
    fill(&slow).await;
    let (mut quick, _relayed) = stream(&connection).await;
    let mut server = incoming.recv().await.unwrap().1.unwrap();
    quick.write_all(b"hello").await.unwrap();
    timeout(LONG, server.read_exact(&mut [0; 5])).await.unwrap().unwrap();
}

/// Writes until nothing more is taken for a while: how much was.
async fn fill(application: &TcpStream) -> usize {
    let mut sent = 0;
    while timeout(Duration::from_millis(500), application.writable()).await.is_ok() {
        while let Ok(written) = application.try_write(&[7; 1 << 16]) {
            sent += written;
            assert!(sent < 128 << 20, "nothing holds the sender back");
        }
    }
    sent
}

#[tokio::test]
async fn when_memory_is_short_each_stream_may_fill_less_of_it_and_all_of_it_arrives() {
    let unread = Unread::new(600 << 10, Arc::default());
    let (connection, mut incoming) = tunnel_within(Ok(()), 10, &unread).await;
    let (first, _relayed) = stream(&connection).await;
    let mut slow = incoming.recv().await.unwrap().1.unwrap();
    let sent = fill(&first).await;
    let window = unread::WINDOW as usize;
    assert!((window / 2..=window).contains(&unread.held()), "{}", unread.held());
    let (second, _relayed) = stream(&connection).await;
    let _also_slow = incoming.recv().await.unwrap();
    fill(&second).await;
    let (held, small) = (unread.held(), unread::SMALL_WINDOW as usize);
    assert!(held <= window + small, "{held} bytes lie here");
    // It still goes on, and when there is room again as before.
    let mut heard = vec![0; sent];
    timeout(LONG, slow.read_exact(&mut heard)).await.unwrap().unwrap();
    assert!(heard.iter().all(|byte| *byte == 7));
    let again = fill(&first).await;
    assert!(again > window / 2, "{again} of {sent}");
}

/// How many the server takes is known with its first answer.
#[tokio::test]
async fn a_tunnel_has_room_for_what_its_server_takes() {
    let (connection, _incoming) = tunnel_of(Ok(()), 3).await;
    let first = connection.reserve().unwrap();
    assert!(connection.reserve().is_none());
    let _open = stream(&connection).await;
    let held: Vec<_> = std::iter::from_fn(|| connection.reserve()).collect();
    assert_eq!(held.len(), 2);
    drop(first);
    assert!(connection.reserve().is_some());
}

#[tokio::test]
async fn a_full_tunnel_takes_no_more() {
    let (connection, _incoming) = tunnel(Ok(())).await;
    let _open = stream(&connection).await;
    let held: Vec<_> = (0..10).map(|_| connection.reserve().unwrap()).collect();
    assert!(connection.reserve().is_none());
    drop(held);
    assert!(connection.reserve().is_some() && connection.streams() == 0);
}

#[test]
fn only_a_connect_to_an_address_is_understood() {
    let request =
        |method: &str, uri: &str| http::Request::builder().method(method).uri(uri).body(()).unwrap();
    assert_eq!(headers::asked(&request("GET", "http://10.1.2.3:80/")), Err(BadRequest::Method));
    assert_eq!(headers::asked(&request("CONNECT", "cart.shop:80")), Err(BadRequest::Authority));
    assert_eq!(headers::asked(&request("CONNECT", "10.1.2.3")), Err(BadRequest::Authority));
    let asked = headers::asked(&request("CONNECT", "[fd00::1]:80")).unwrap();
    assert_eq!(asked.destination, "[fd00::1]:80".parse().unwrap());
}

/// What a client tells about itself is at most ignored.
#[test]
fn odd_forwarded_headers_are_harmless() {
    for value in
        ["", ";;;", "for", "for=", "for=unknown;host=", "for=\"[::1\";host=x", "host=a,for=1.2.3.4:5"]
    {
        let request = http::Request::builder()
            .method("CONNECT")
            .uri("10.1.2.3:80")
            .header("forwarded", value)
            .body(())
            .unwrap();
        assert_eq!(headers::asked(&request).unwrap().client, None, "{value}");
    }
}
