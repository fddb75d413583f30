//! Tunnels that speak HTTP/2, and their streams.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::debug;

use super::{Inbound, answer, canonical, finish, revoked};
use crate::identity::SpiffeId;
use crate::proxy::drain::{Drain, Phase};
use crate::proxy::hbone::{self, Incoming};
use crate::proxy::host::{Outcome, Wanted};
use crate::proxy::limits::count;
use crate::proxy::relay::Moved;
use crate::proxy::stream::Reason;
use crate::proxy::tls::{Standing, Tls};

/// So long may applications take for what came before the end of a tunnel.
const LAST_WORDS: Duration = Duration::from_secs(60);
/// Most that a tunnel is given up before its certificate's end.
const EARLY: Duration = Duration::from_secs(5);

/// Streams of HTTP/2, many at a time.
pub(super) async fn streams(inbound: &Arc<Inbound>, tls: Tls, mut drain: Drain) {
    // One that cannot tell has gone.
    let Ok(peer) = tls.tcp.peer_addr() else { return };
    let (source, local, until) = (tls.peer.clone(), tls.tcp.local_addr().ok(), tls.until);
    let standing = tls.standing.clone();
    let limits = inbound.allowance.limits;
    let mut server = match timeout(
        limits.handshake_timeout,
        hbone::Server::new(tls, limits.streams, &inbound.allowance.unread),
    )
    .await
    {
        Ok(Ok(server)) => server,
        Ok(Err(error)) => return broken(inbound, peer, &error),
        Err(_elapsed) => return count(&inbound.allowance.counts.slow_handshakes),
    };
    let mut streams = JoinSet::new();
    let mut draining = false;
    // A little longer than the client keeps it, so that the client is the one to close.
    let patience = limits.idle_timeout + limits.idle_timeout / 4;
    let mut deserted = Instant::now() + patience;
    let ends = ends(until, &standing);
    let mut changed = inbound.host.changed();
    loop {
        let incoming = tokio::select! {
            () = drain.reached(Phase::Draining), if !draining => {
                server.drain();
                draining = true;
                continue;
            }
            // Before a stream is refused for it: not every peer asks again on another tunnel.
            () = sleep_until(ends), if !draining => {
                server.drain();
                draining = true;
                continue;
            }
            Ok(()) = changed.changed() => {
                if standing.is_revoked() {
                    debug!(own = %inbound.own, %peer, "a tunnel has ended: its certificate was revoked");
                    break;
                }
                if !draining && !standing.is_current() {
                    server.drain();
                    draining = true;
                }
                continue;
            }
            Some(_ended) = streams.join_next() => {
                deserted = Instant::now() + patience;
                continue;
            }
            () = sleep_until(deserted), if streams.is_empty() => {
                // It has been told already, and nothing has come of it.
                if draining {
                    return;
                }
                server.drain();
                (draining, deserted) = (true, Instant::now() + limits.handshake_timeout);
                continue;
            }
            next = server.next() => match next {
                Some(Ok(incoming)) => incoming,
                Some(Err(error)) => {
                    broken(inbound, peer, &error);
                    break;
                }
                None => break,
            },
        };
        let may_begin = SystemTime::now() < until && standing.is_current();
        if !may_begin && !draining {
            server.drain();
            draining = true;
        }
        let (inbound, source, standing) = (Arc::clone(inbound), source.clone(), standing.clone());
        streams.spawn(async move {
            stream(&inbound, incoming, (source, standing, may_begin), (peer, local)).await;
        });
    }
    drop(server);
    // What came before the end is for the applications all the same; then each stream finds that its tunnel has gone.
    let last = async { while streams.join_next().await.is_some() {} };
    if timeout(LAST_WORDS, last).await.is_err() {
        inbound.allowance.counts.stopped.fetch_add(streams.len() as u64, Relaxed);
    }
}

fn broken(inbound: &Inbound, peer: SocketAddr, error: &h2::Error) {
    // By our own verdict: not the peer's, and not the network's.
    if !error.is_io() && !error.is_remote() {
        count(&inbound.allowance.counts.malformed);
    }
    debug!(own = %inbound.own, %peer, %error, "a tunnel has ended");
}

/// When peers are told that nothing more may begin, a little before it may not: by the end of the certificate, and of what its issuers' lists
/// say.
fn ends(until: SystemTime, standing: &Standing) -> Instant {
    let until = standing.until().map_or(until, |lists| lists.min(until));
    let left = until.duration_since(SystemTime::now()).unwrap_or_default();
    Instant::now() + left.saturating_sub(EARLY.min(left / 10))
}

async fn stream(
    inbound: &Inbound,
    incoming: Incoming,
    (source, standing, may_begin): (SpiffeId, Standing, bool),
    (peer, local): (SocketAddr, Option<SocketAddr>),
) {
    // Refusals that cannot be sent: the peer has gone.
    let Ok(asked) = &incoming.asked else {
        count(&inbound.allowance.counts.malformed);
        return drop(incoming.refuse(Reason::BadRequest));
    };
    let Some(_room) = inbound.allowance.connection() else { return drop(incoming.refuse(Reason::Limit)) };
    let destination = canonical(asked.destination);
    debug!(own = %inbound.own, %peer, %destination, traceparent = asked.traceparent, "asked for a stream");
    let wanted = Wanted { source: Some(source), peer, client: asked.client, destination };
    if !may_begin {
        // The client makes a new tunnel, with a new certificate.
        inbound.host.finished(&wanted, &Outcome::Refused(Reason::Draining));
        return incoming.put_off();
    }
    let mut changed = inbound.host.changed();
    let local = local.ok_or_else(|| std::io::ErrorKind::NotConnected.into());
    let mut application = match Box::pin(answer(inbound, &wanted, local)).await {
        Ok(application) => application,
        Err(reason) => {
            inbound.host.finished(&wanted, &Outcome::Refused(reason));
            return drop(incoming.refuse(reason));
        }
    };
    let (send, receive) = match incoming.accept(inbound.baggage.as_ref()) {
        Ok(stream) => stream,
        Err(error) => {
            return inbound.host.finished(&wanted, &Outcome::Cut(Moved::default(), error.to_string()));
        }
    };
    let relayed = tokio::select! {
        relayed = hbone::relay(&mut application.tcp, send, receive, Bytes::new(), &inbound.allowance.unread) => Some(relayed),
        () = revoked(inbound, &wanted, &standing, &mut changed) => None,
    };
    finish(inbound, &wanted, &application.tcp, relayed);
}
