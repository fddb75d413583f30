use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::*;
use crate::proxy::stream::Message;
use crate::proxy::tls::Tls;
use crate::proxy::tls::fixtures::{Pair, sockets};
use crate::proxy::tunnel;

const LONG: Duration = Duration::from_secs(20);

/// The tunnel comes back only after a clean end; after any other both connections are dropped.
type Relayed = JoinHandle<(Result<(), Cut>, Moved, Option<Tls>)>;

fn start(application: TcpStream, mut tls: Tls, budget: &Arc<Budget>) -> Relayed {
    let budget = Arc::clone(budget);
    tokio::spawn(async move {
        let (outcome, moved) = relay(&application, &mut tls, &budget, false).await;
        let clean = outcome.is_ok();
        (outcome, moved, clean.then_some(tls))
    })
}

/// Two applications and the two proxies between them.
struct Path {
    client: TcpStream,
    server: TcpStream,
    near: Relayed,
    far: Relayed,
    budget: Arc<Budget>,
}

async fn over(tunnel: (Tls, Tls), budget: Arc<Budget>) -> Path {
    let ((client, near), (server, far)) = (sockets().await, sockets().await);
    let (near, far) = (start(near, tunnel.0, &budget), start(far, tunnel.1, &budget));
    Path { client, server, near, far, budget }
}

async fn path() -> Path {
    over(Pair::new().tunnel().await, Budget::new(64 << 20)).await
}

fn noise(length: usize) -> Vec<u8> {
    (0..length).map(|i| ((i as u32).wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

async fn read_all(mut from: TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    timeout(LONG, from.read_to_end(&mut all)).await.unwrap().unwrap();
    all
}

/// Reads all that comes, as fast as it can, on a thread of its own; how much that was.
fn drain(tcp: TcpStream) -> std::thread::JoinHandle<usize> {
    let mut tcp = tcp.into_std().unwrap();
    tcp.set_nonblocking(false).unwrap();
    std::thread::spawn(move || {
        let (mut all, mut bytes) = (0, vec![0; 1 << 20]);
        while let Ok(read @ 1..) = std::io::Read::read(&mut tcp, &mut bytes) {
            all += read;
        }
        all
    })
}

/// So much is sent first, that the kernel lets the connection have much on its way.
const WARM: usize = 32 << 20;

async fn warm(tcp: &TcpStream) {
    let mut left = WARM;
    while left > 0 {
        tcp.writable().await.unwrap();
        left -= tcp.try_write(&vec![0; left.min(1 << 20)]).unwrap_or(0);
    }
    tcp.writable().await.unwrap();
}

/// Polls it once, and drops it.
async fn one_turn(relay: impl Future) {
    let mut relay = std::pin::pin!(relay);
    let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(relay.as_mut().poll(cx).is_pending()));
    assert!(polled.await);
}

#[tokio::test]
async fn who_always_has_something_to_move_lets_others_have_their_turn() {
    // Small buffers only: a turn of both directions is half a megabyte at most.
    let most = 2 * (TURN as usize) * (17 << 10);
    let budget = Budget::new(0);
    for secured in [true, false] {
        let ((client, near), (server, far)) = (sockets().await, sockets().await);
        let (_, ()) = tokio::join!(warm(&client), async {
            let (mut left, mut bytes) = (WARM, vec![0; 1 << 20]);
            while left > 0 {
                near.readable().await.unwrap();
                left -= near.try_read(&mut bytes).unwrap_or(0);
            }
        });
        let said = fill(&client).await;
        assert!(said > 2 * most, "only {said} bytes fit in a socket");
        near.readable().await.unwrap();
        let passed = if secured {
            let (mut tls, peer) = Pair::new().tunnel().await;
            let drained = drain(peer.tcp);
            warm(&tls.tcp).await;
            one_turn(relay(&near, &mut tls, &budget, false)).await;
            drop(tls);
            drained.join().unwrap() - WARM
        } else {
            let drained = drain(server);
            warm(&far).await;
            one_turn(plain(&near, &far, &budget)).await;
            drop(far);
            drained.join().unwrap() - WARM
        };
        assert!(passed > 0 && passed <= most, "{passed} of {said} bytes in one turn");
    }
}

#[tokio::test]
async fn the_answer_goes_along_with_what_is_said_soon_and_does_not_wait_for_more() {
    for says in [&b"hello"[..], b""] {
        let ((mut server, far), (near, mut peer)) = (sockets().await, Pair::new().tunnel().await);
        let (mut tls, budget) = (near, Budget::new(0));
        server.write_all(says).await.unwrap();
        let relayed = async { relay(&far, &mut tls, &budget, true).await };
        let told = async {
            assert_eq!(tunnel::receive(&mut peer).await.unwrap().unwrap(), Message::Accepted.encode());
            let along = peer.received.len();
            assert_eq!(along > 0, !says.is_empty(), "{along} bytes came along");
            server.shutdown().await.unwrap();
            let mut messages = Vec::new();
            while messages.last() != Some(&Message::End.encode()) {
                messages.push(tunnel::receive(&mut peer).await.unwrap().unwrap());
            }
            messages
        };
        let messages = tokio::select! {
            messages = timeout(LONG, told) => messages.unwrap(),
            (outcome, _) = relayed => panic!("{outcome:?}"),
        };
        let said: Vec<Vec<u8>> = match says {
            [] => vec![],
            says => vec![Message::Data(says).encode()],
        };
        assert_eq!(messages, [said, vec![Message::End.encode()]].concat());
    }
    // The application has gone before it was told: the client hears that, whatever it waits for.
    let ((server, far), (near, mut peer)) = (sockets().await, Pair::new().tunnel().await);
    let (mut tls, budget) = (near, Budget::new(0));
    reset_on_drop(&server);
    drop(server);
    let (outcome, _moved) = relay(&far, &mut tls, &budget, true).await;
    assert!(matches!(outcome, Err(Cut::Application(_))), "{outcome:?}");
    assert_eq!(tunnel::receive(&mut peer).await.unwrap().unwrap(), Message::Reset.encode());
}

#[tokio::test]
async fn bytes_and_half_closes_pass_both_ways() {
    let Path { mut client, mut server, near, far, budget } = path().await;
    let sent = noise(5_000_000);
    let expected = sent.clone();
    let writer = tokio::spawn(async move {
        client.write_all(&sent).await.unwrap();
        client.shutdown().await.unwrap();
        read_all(client).await
    });
    let mut heard = Vec::new();
    server.read_to_end(&mut heard).await.unwrap();
    assert!(heard == expected);
    // The client has ended its direction; the server has not.
    server.write_all(&heard).await.unwrap();
    server.shutdown().await.unwrap();
    assert!(writer.await.unwrap() == expected);
    for relayed in [near, far] {
        let (outcome, moved, ..) = relayed.await.unwrap();
        outcome.unwrap();
        assert_eq!(moved, Moved { sent: 5_000_000, received: 5_000_000 });
    }
    assert_eq!(budget.held(), 0);
}

#[tokio::test]
async fn small_messages_pass_one_by_one_and_the_server_may_begin() {
    let Path { mut client, mut server, .. } = path().await;
    for round in 0..500_u32 {
        let mut heard = [0; 4];
        server.write_all(&round.to_be_bytes()).await.unwrap();
        client.read_exact(&mut heard).await.unwrap();
        assert_eq!(u32::from_be_bytes(heard), round);
        client.write_all(&heard).await.unwrap();
        server.read_exact(&mut heard).await.unwrap();
        assert_eq!(u32::from_be_bytes(heard), round);
    }
}

#[tokio::test]
async fn a_tunnel_carries_one_stream_after_another() {
    let mut tunnel = Pair::new().tunnel().await;
    for round in 0..20_usize {
        let Path { mut client, mut server, near, far, .. } = over(tunnel, Budget::new(1 << 20)).await;
        let said = noise(round * 10_000 + 1);
        client.write_all(&said).await.unwrap();
        // Either may be the first to end.
        if round % 2 == 0 {
            client.shutdown().await.unwrap();
        }
        let mut heard = vec![0; said.len()];
        server.read_exact(&mut heard).await.unwrap();
        assert!(heard == said);
        drop(server);
        assert!(read_all(client).await.is_empty());
        let (near, far) = (near.await.unwrap(), far.await.unwrap());
        near.0.unwrap();
        far.0.unwrap();
        tunnel = (near.2.unwrap(), far.2.unwrap());
    }
}

#[tokio::test]
async fn a_reset_of_either_application_is_a_reset_of_the_other() {
    for client_resets in [true, false] {
        for ended_before in [true, false] {
            let Path { mut client, mut server, near, far, .. } = path().await;
            client.write_all(b"hello").await.unwrap();
            server.read_exact(&mut [0; 5]).await.unwrap();
            let (mut resets, mut feels) = if client_resets { (client, server) } else { (server, client) };
            if ended_before {
                resets.shutdown().await.unwrap();
                assert_eq!(timeout(LONG, feels.read(&mut [0])).await.unwrap().unwrap(), 0);
            }
            reset_on_drop(&resets);
            drop(resets);
            let error = if ended_before {
                // It may still write; the reset shows there or as an error.
                timeout(LONG, socket::failed(&feels)).await.unwrap()
            } else {
                timeout(LONG, feels.read(&mut [0])).await.unwrap().unwrap_err()
            };
            assert!(
                matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe),
                "{error}"
            );
            let (near, far) = (near.await.unwrap().0, far.await.unwrap().0);
            assert!(near.is_err() && far.is_err(), "{near:?} {far:?}");
        }
    }
}

/// Sends until nothing more is taken, and returns how much was.
async fn fill(client: &TcpStream) -> usize {
    let mut sent = 0;
    let chunk = noise(1 << 16);
    while timeout(Duration::from_millis(500), client.writable()).await.is_ok() {
        while let Ok(written) = client.try_write(&chunk) {
            sent += written;
            assert!(sent < 256 << 20, "nothing holds the sender back");
        }
    }
    sent
}

#[tokio::test]
async fn a_slow_reader_holds_its_sender_back() {
    let Path { client, mut server, budget, .. } = path().await;
    let sent = fill(&client).await;
    // One buffer in each proxy, whatever has been sent.
    assert!(budget.held() <= 2 * 17 * 16_406, "{}", budget.held());
    drop(client);
    let mut heard = Vec::new();
    timeout(LONG, server.read_to_end(&mut heard)).await.unwrap().unwrap();
    assert_eq!(heard.len(), sent);
}

#[tokio::test]
async fn a_reset_passes_a_full_pipe() {
    let Path { client, server, near, far, .. } = path().await;
    fill(&client).await;
    reset_on_drop(&client);
    drop(client);
    assert!(timeout(LONG, near).await.unwrap().unwrap().0.is_err());
    drop(timeout(LONG, socket::failed(&server)).await.unwrap());
    assert!(timeout(LONG, far).await.unwrap().unwrap().0.is_err());
}

#[tokio::test]
async fn without_budget_connections_still_move() {
    let path = over(Pair::new().tunnel().await, Budget::new(0)).await;
    let Path { mut client, server, near, budget, .. } = path;
    let sent = noise(1_000_000);
    let reader = tokio::spawn(read_all(server));
    client.write_all(&sent).await.unwrap();
    client.shutdown().await.unwrap();
    assert!(reader.await.unwrap() == sent);
    assert_eq!(near.await.unwrap().1.sent, 1_000_000);
    assert!(budget.refused() > 0);
}

#[tokio::test]
async fn an_idle_connection_holds_no_buffer() {
    let Path { mut client, mut server, budget, .. } = path().await;
    let sent = noise(2_000_000);
    let writer = tokio::spawn(async move {
        client.write_all(&sent).await.unwrap();
        client
    });
    server.read_exact(&mut vec![0; 2_000_000]).await.unwrap();
    let _client = writer.await.unwrap();
    sleep(Duration::from_millis(50)).await;
    assert_eq!(budget.held(), 0);
}

/// What follows in a record, when `with` comes instead of a message of the protocol.
async fn hears(with: &[u8]) -> Cut {
    let (mut peer, tls) = Pair::new().tunnel().await;
    let (mut application, near) = sockets().await;
    let relayed = start(near, tls, &Budget::new(1 << 20));
    let record = peer.writer.data(with).unwrap();
    peer.tcp.write_all(&record).await.unwrap();
    let cut = timeout(LONG, relayed).await.unwrap().unwrap().0.unwrap_err();
    assert!(timeout(LONG, application.read(&mut [0])).await.unwrap().is_err());
    cut
}

#[tokio::test]
async fn what_is_no_message_ends_the_connection() {
    assert!(matches!(hears(&[9]).await, Cut::Malformed(Malformed::Type(9))));
    assert!(matches!(hears(&[0]).await, Cut::Malformed(Malformed::Length)));
    assert!(matches!(hears(&[4, 0]).await, Cut::Malformed(Malformed::Length)));
    assert!(matches!(hears(&[2]).await, Cut::OutOfOrder(_)));
    assert!(matches!(hears(&[5]).await, Cut::Reset));
}

#[tokio::test]
async fn a_tunnel_that_ends_is_a_reset_not_an_end() {
    let (peer, tls) = Pair::new().tunnel().await;
    let (mut application, near) = sockets().await;
    let relayed = start(near, tls, &Budget::new(1 << 20));
    drop(peer);
    assert!(matches!(relayed.await.unwrap().0, Err(Cut::Tunnel(_))));
    assert!(timeout(LONG, application.read(&mut [0])).await.unwrap().is_err());
}

#[tokio::test]
async fn a_failure_wakes_who_waits_for_it() {
    for (half_closed, waits_before) in [(false, false), (false, true), (true, false), (true, true)] {
        let (mut one, mut other) = sockets().await;
        if half_closed {
            one.shutdown().await.unwrap();
            assert_eq!(other.read(&mut [0]).await.unwrap(), 0);
        }
        let wait = tokio::spawn(async move { drop(socket::failed(&other).await) });
        if waits_before {
            sleep(Duration::from_millis(50)).await;
        }
        reset_on_drop(&one);
        drop(one);
        assert!(timeout(Duration::from_secs(2), wait).await.is_ok(), "{half_closed} {waits_before}");
    }
}
