//! The loop that takes connections from a listener.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpListener;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;
use tracing::warn;

use super::busy_poll;
use super::drain::{Drain, Phase};
use super::limits::{Allowance, count};
use super::relay::reset_on_drop;
use super::threads::{Accepted, Place, Threads};

/// A peer that vanished is noticed after three minutes of silence and nine probes.
const KEEPALIVE: Duration = Duration::from_secs(180);

/// What a connection has until it is dropped: room among those of its pod, and a place on a thread.
pub(super) type Room = (OwnedSemaphorePermit, Place);

/// Serves `listener` until the drain is over; what is open then is dropped.
pub(super) async fn serve<F>(
    listener: TcpListener,
    allowance: &Allowance,
    threads: &Threads,
    mut drain: Drain,
    each: impl Fn(Accepted, SocketAddr, Room) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    // What is accepted inherits it, which saves five system calls for each connection.
    prepare(&listener);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = drain.reached(Phase::Draining) => break,
            Some(_ended) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((tcp, peer)) => {
                busy_poll::came(&listener, 0);
                let Some(permit) = allowance.connection() else {
                    reset_on_drop(&tcp);
                    continue;
                };
                let place = threads.place();
                // The room goes in, since a future around another would be twice as large.
                match place.elsewhere().cloned() {
                    None => connections.spawn(each(Accepted::Here(tcp), peer, (permit, place))),
                    Some(other) => match Accepted::moving(tcp) {
                        Ok(tcp) => connections.spawn_on(each(tcp, peer, (permit, place)), &other),
                        Err(error) => {
                            stranded(allowance, &error);
                            continue;
                        }
                    },
                };
            }
            Err(error) => {
                // Mostly "too many open files": trying again at once would only burn a processor.
                count(&allowance.counts.unaccepted);
                warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    tokio::select! {
        () = async { while connections.join_next().await.is_some() {} } => {}
        () = drain.reached(Phase::Over) => {}
    }
    allowance.counts.stopped.fetch_add(connections.len() as u64, Relaxed);
    // Whoever waits for this may count on their sockets being closed.
    connections.shutdown().await;
}

/// A connection could not be handed to the thread that was to carry it, and is reset.
pub(super) fn stranded(allowance: &Allowance, error: &io::Error) {
    count(&allowance.counts.stranded);
    warn!(%error, "a connection could not be handed to another thread");
}

/// What every socket of the proxy is that leads out of the pod: small writes go at once, dead peers are noticed.
pub(super) fn prepare(socket: &impl AsFd) {
    let socket = SockRef::from(socket);
    let probes = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE).with_retries(9);
    // They fail only for a connection that has failed itself, which the next read says.
    drop(socket.set_tcp_nodelay(true).and_then(|()| socket.set_tcp_keepalive(&probes)));
}
