use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::proxy::hbone::Unread;
use crate::proxy::tls::Event;
use crate::proxy::tls::fixtures::{Authority, Pair, Wanted, server};

const IDLE: Duration = Duration::from_secs(90);

fn endpoint(number: u8) -> Endpoint {
    let at = SocketAddr::from(([10, 0, 0, number], 15008));
    Endpoint { identity: server(), tunnel: at, target: at }
}

/// Tunnels of which the other ends are kept open.
struct Tunnels {
    pair: Pair,
    far: Vec<Tls>,
}

impl Tunnels {
    fn new() -> Self {
        Self { pair: Pair::new(), far: Vec::new() }
    }

    async fn one(&mut self) -> Box<Tls> {
        let (mut near, mut far) = self.pair.tunnel().await;
        // With the first data comes the ticket, which would look as if the peer had something to say.
        let record = far.writer.data(b"x").unwrap();
        far.tcp.write_all(&record).await.unwrap();
        loop {
            match near.reader.open(&mut near.received).unwrap() {
                Some((total, event)) => {
                    near.received.drain(..total);
                    if matches!(event, Event::Data(_)) {
                        break;
                    }
                }
                None => drop(near.tcp.read_buf(&mut near.received).await.unwrap()),
            }
        }
        self.far.push(far);
        Box::new(near)
    }
}

/// So many streams at once, which have all ended.
fn used_at_once(pool: &Pool, endpoint: &Endpoint, streams: usize) {
    let using: Vec<_> = (0..streams).map(|_| pool.using(endpoint)).collect();
    drop(using);
}

#[tokio::test]
async fn one_makes_a_tunnel_that_others_may_share_and_nobody_waits_for_one_that_they_may_not() {
    let pool = Pool::new(1, Duration::from_secs(1));
    let endpoint = endpoint(1);
    for succeeds in [true, false] {
        let Turn::Own(Some(making)) = pool.turn(&endpoint) else { panic!("nobody makes one") };
        let Turn::After(mut waiting) = pool.turn(&endpoint) else { panic!("two make one") };
        if succeeds {
            making.done();
        } else {
            drop(making);
        }
        assert_eq!(waiting.wait_for(|made| *made).await.is_ok(), succeeds);
    }
    pool.speaks(&endpoint, Protocol::Stream);
    for _ in 0..2 {
        assert!(matches!(pool.turn(&endpoint), Turn::Own(None)));
    }
}

#[tokio::test]
async fn as_many_are_kept_as_were_in_use_at_once_and_one_at_least() {
    let (pool, mut tunnels, now) = (Pool::new(100, IDLE), Tunnels::new(), Instant::now());
    let (busy, quiet) = (endpoint(1), endpoint(2));
    used_at_once(&pool, &busy, 3);
    for kept in [1, 2, 3, 3, 3] {
        assert!(
            pool.put(&busy, tunnels.one().await, now),
            "what nobody needs is not counted as over the limit"
        );
        assert_eq!(pool.idle(), kept);
    }
    for _ in 0..2 {
        assert!(pool.put(&quiet, tunnels.one().await, now));
        assert_eq!(pool.idle(), 4);
    }
}

#[tokio::test]
async fn the_limit_is_for_all_peers_and_what_it_costs_is_told() {
    let (pool, mut tunnels, now) = (Pool::new(2, IDLE), Tunnels::new(), Instant::now());
    used_at_once(&pool, &endpoint(1), 2);
    assert!(pool.put(&endpoint(1), tunnels.one().await, now));
    assert!(pool.put(&endpoint(2), tunnels.one().await, now));
    for number in [1, 3] {
        assert!(!pool.put(&endpoint(number), tunnels.one().await, now), "wanted, but for the limit");
    }
    assert!(pool.put(&endpoint(2), tunnels.one().await, now), "not wanted anyway");
    assert_eq!(pool.idle(), 2);
    assert!(pool.take(&endpoint(1)).is_some());
    assert!(pool.put(&endpoint(3), tunnels.one().await, now), "there is room again");
    let none = Pool::new(0, IDLE);
    assert!(!none.put(&endpoint(1), tunnels.one().await, now));
}

#[tokio::test]
async fn what_was_used_is_forgotten_by_half_and_the_longest_idle_go_first() {
    let (pool, mut tunnels, begun) = (Pool::new(100, IDLE), Tunnels::new(), Instant::now());
    let peer = endpoint(1);
    used_at_once(&pool, &peer, 9);
    let mut ports = Vec::new();
    for second in 0..9 {
        let tls = tunnels.one().await;
        ports.push(tls.tcp.local_addr().unwrap().port());
        assert!(pool.put(&peer, tls, begun + Duration::from_secs(second)));
    }
    let now = begun + Duration::from_secs(9);
    for left in [4, 2, 1, 1, 1] {
        pool.sweep(now);
        let held = pool.with(&peer, |peer| {
            peer.idle.iter().map(|idle| idle.tls.tcp.local_addr().unwrap().port()).collect::<Vec<_>>()
        });
        assert_eq!(held, ports[9 - left..]);
    }
    // What is in use now counts in full, for as long as it is.
    let using: Vec<_> = (0..3).map(|_| pool.using(&peer)).collect();
    for _ in 0..5 {
        pool.sweep(now);
        assert_eq!(pool.with(&peer, |peer| (peer.used, peer.peak)), (3, 3));
    }
    drop(using);
    pool.sweep(now);
    assert_eq!(pool.with(&peer, |peer| (peer.used, peer.peak)), (0, 1));
}

#[tokio::test]
async fn what_has_been_idle_for_long_goes_and_a_peer_without_anything_is_forgotten() {
    let (pool, mut tunnels, begun) = (Pool::new(100, IDLE), Tunnels::new(), Instant::now());
    used_at_once(&pool, &endpoint(1), 8);
    for after in [0, 30] {
        assert!(pool.put(&endpoint(1), tunnels.one().await, begun + Duration::from_secs(after)));
    }
    let using = endpoint(2);
    let using = pool.using(&using);
    let known = || pool.peers.lock().unwrap().len();
    for (after, left) in [(0, 2), (89, 2), (90, 1), (119, 1), (120, 0)] {
        pool.sweep(begun + Duration::from_secs(after));
        assert_eq!(pool.idle(), left, "after {after} s");
    }
    assert_eq!(known(), 1, "one is in use");
    drop(using);
    pool.sweep(begun);
    assert_eq!(known(), 0);
    // A clock that seems to go back is no reason to close anything.
    assert!(pool.put(&endpoint(1), tunnels.one().await, begun + IDLE));
    pool.sweep(begun);
    assert_eq!(pool.idle(), 1);
}

#[tokio::test]
async fn the_last_used_is_taken_first_and_none_twice() {
    let (pool, mut tunnels, now) = (Pool::new(100, IDLE), Tunnels::new(), Instant::now());
    let peer = endpoint(1);
    used_at_once(&pool, &peer, 4);
    let mut ports = Vec::new();
    for _ in 0..4 {
        let tls = tunnels.one().await;
        ports.push(tls.tcp.local_addr().unwrap().port());
        pool.put(&peer, tls, now);
    }
    // Those of the calling thread are taken before those of others, which are moved.
    let owners = [threads::own(), threads::own(), 7, 7];
    pool.with(&peer, |peer| owners.iter().zip(&mut peer.idle).for_each(|(of, idle)| idle.thread = *of));
    assert!(pool.take(&endpoint(2)).is_none());
    for wanted in [1, 0, 3, 2] {
        assert_eq!(pool.take(&peer).unwrap().tcp.local_addr().unwrap().port(), ports[wanted]);
    }
    assert!(pool.take(&peer).is_none());
}

#[tokio::test]
async fn what_has_ended_or_said_something_meanwhile_is_not_taken() {
    let (pool, mut tunnels, now) = (Pool::new(100, IDLE), Tunnels::new(), Instant::now());
    let peer = endpoint(1);
    used_at_once(&pool, &peer, 3);
    for _ in 0..3 {
        pool.put(&peer, tunnels.one().await, now);
    }
    let good = pool.with(&peer, |peer| peer.idle[0].tls.tcp.local_addr().unwrap());
    drop(tunnels.far.remove(1));
    tunnels.far[1].tcp.write_all(b"a word").await.unwrap();
    // Until both have come.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(pool.take(&peer).unwrap().tcp.local_addr().unwrap(), good);
    assert!(pool.take(&peer).is_none());
    assert_eq!(pool.idle(), 0);
}

#[tokio::test]
async fn whom_nobody_trusts_any_more_is_neither_kept_nor_taken() {
    let (pool, mut tunnels, now) = (Pool::new(100, IDLE), Tunnels::new(), Instant::now());
    let peer = endpoint(1);
    used_at_once(&pool, &peer, 8);
    for _ in 0..2 {
        assert!(pool.put(&peer, tunnels.one().await, now));
    }
    let late = tunnels.one().await;
    tunnels.pair.client_held.trust_in(&[&Authority::new()]);
    assert!(pool.put(&peer, late, now), "that is not for the limit");
    assert_eq!(pool.idle(), 2);
    pool.sweep(now);
    assert_eq!(pool.idle(), 0);
    // The same without a sweep in between.
    tunnels.pair.client_held.trust_in(&[&tunnels.pair.authority]);
    assert!(pool.put(&peer, tunnels.one().await, now));
    tunnels.pair.client_held.trust_in(&[&Authority::new()]);
    assert!(pool.take(&peer).is_none());
    // And when the certificate ends.
    tunnels.pair.client_held.trust_in(&[&tunnels.pair.authority]);
    let until = std::time::SystemTime::now() + Duration::from_secs(2);
    let brief = tunnels.pair.authority.issue(&Wanted { until, ..Wanted::of(&server()) });
    tunnels.pair.server_held.set(&server(), brief);
    for _ in 0..2 {
        assert!(pool.put(&peer, tunnels.one().await, now));
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(pool.take(&peer).is_none());
}

#[tokio::test]
async fn one_that_is_shared_stays_while_it_has_streams_and_a_sweep_longer_than_it_is_used() {
    let (pool, now, peer) = (Pool::new(0, IDLE), Instant::now(), endpoint(1));
    let pair = Pair::speaking(vec![Protocol::H2]);
    let (near, _far) = pair.tunnel().await;
    let unread = Unread::new(usize::MAX, Arc::default());
    pool.offer(&peer, Connection::new(near, 2, &unread).await.unwrap());
    let (using, shared) = (pool.using(&peer), pool.share(&peer));
    assert!(shared.is_some() && pool.share(&endpoint(2)).is_none());
    for _ in 0..3 {
        pool.sweep(now);
    }
    drop(using);
    for _ in 0..3 {
        pool.sweep(now);
        assert_eq!(pool.with(&peer, |peer| peer.http2.len()), 1, "it has a stream");
    }
    drop(shared);
    // The use of before is forgotten; of now, by half.
    used_at_once(&pool, &peer, 2);
    pool.sweep(now);
    assert!(pool.share(&peer).is_some());
    pool.sweep(now);
    assert_eq!(pool.peers.lock().unwrap().len(), 0);
}

#[tokio::test]
async fn of_those_that_are_shared_only_so_many_stay_as_were_needed() {
    let (pool, now, peer) = (Pool::new(0, IDLE), Instant::now(), endpoint(1));
    let pair = Pair::speaking(vec![Protocol::H2]);
    let unread = Unread::new(usize::MAX, Arc::default());
    let mut far = Vec::new();
    for _ in 0..3 {
        let (near, other) = pair.tunnel().await;
        far.push(other);
        // Each takes one stream.
        pool.offer(&peer, Connection::new(near, 1, &unread).await.unwrap());
    }
    assert_eq!(pool.idle(), 3);
    used_at_once(&pool, &peer, 4);
    let shared = pool.share(&peer);
    assert_eq!(pool.idle(), 2);
    drop(shared);
    // What was used counts half as much after each sweep.
    for left in [2, 1, 0] {
        pool.sweep(now);
        assert_eq!(pool.idle(), left);
    }
}
