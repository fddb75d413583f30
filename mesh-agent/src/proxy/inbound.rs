//! Connections to a workload of this node: from other nodes, and those that the kernel has led here.
#![expect(clippy::manual_async_fn, reason = "an async fn keeps its arguments twice")]

mod http2;
mod plain;

use std::net::SocketAddr;
use std::sync::Arc;

use http::HeaderValue;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::debug;

use super::accept::{self, Room};
use super::drain::{Drain, Phase};
use super::host::{Application, Inward, Outcome, Wanted};
use super::limits::{Allowance, count};
use super::relay::{self, Cut, Moved, end_on_drop, reset_on_drop};
use super::stream::{Message, Order, Reason, Request};
use super::threads::{Accepted, Threads};
use super::tls::{self, Configs, Protocol, Standing, Tls};
use super::tunnel::{self, TunnelError};
use crate::identity::SpiffeId;
pub use plain::serve_plain;

/// The proxy's own ports in each pod: nobody may be led back into it.
pub const RESERVED: [u16; 3] = [15001, 15006, 15008];

/// What an application is told early is all of it for now if it is less than this.
const SHORT: usize = 1 << 10;

/// The inbound side of a pod.
pub struct Inbound {
    /// Whose it is.
    pub own: SpiffeId,
    /// TLS.
    pub configs: Arc<Configs>,
    /// What the proxy is told.
    pub host: Arc<dyn Inward>,
    /// What it may use.
    pub allowance: Arc<Allowance>,
    /// Who carries its connections.
    pub threads: Threads,
    /// What peers that speak HTTP/2 are told about the workload, for their telemetry.
    pub baggage: Option<HeaderValue>,
}

/// Takes tunnels from `listener` (the pod's address, port 15008) until the drain is over.
pub async fn serve(inbound: Arc<Inbound>, listener: TcpListener, drain: Drain) {
    let (each, drained) = (Arc::clone(&inbound), drain.clone());
    accept::serve(listener, &inbound.allowance, &inbound.threads, drain, move |tcp, peer, room| {
        tunnel(Arc::clone(&each), tcp, peer, drained.clone(), room)
    })
    .await;
}

fn tunnel(
    inbound: Arc<Inbound>,
    tcp: Accepted,
    peer: SocketAddr,
    mut drain: Drain,
    room: Room,
) -> impl Future<Output = ()> + Send {
    // In a box: what is needed to begin need not be kept for as long as the tunnel is open.
    let tls = Box::pin(handshake(Arc::clone(&inbound), tcp, peer));
    async move {
        let Some(mut tls) = tls.await else { return };
        match tls.protocol {
            Protocol::Stream => {
                streams(&inbound, &mut tls, &mut drain).await;
                drop(tls);
            }
            Protocol::H2 => Box::pin(http2::streams(&inbound, *tls, drain)).await,
        }
        // Last: what has room is there until then.
        drop(room);
    }
}

async fn handshake(inbound: Arc<Inbound>, tcp: Accepted, peer: SocketAddr) -> Option<Box<Tls>> {
    let tcp = match tcp.here() {
        Ok(tcp) => tcp,
        Err(error) => {
            accept::stranded(&inbound.allowance, &error);
            return None;
        }
    };
    let Some(_room) = inbound.allowance.handshake_with(peer.ip()).await else {
        count(&inbound.allowance.counts.refused_handshakes);
        reset_on_drop(&tcp);
        return None;
    };
    let counts = &inbound.allowance.counts;
    let limit = inbound.allowance.limits.handshake_timeout;
    match timeout(limit, tls::accept(&inbound.configs, &inbound.own, tcp)).await {
        Ok(Ok(tls)) => {
            count(&counts.handshakes);
            Some(Box::new(tls))
        }
        Ok(Err(error)) => {
            count(&counts.failed_handshakes);
            debug!(own = %inbound.own, %error, "no tunnel");
            None
        }
        Err(_elapsed) => {
            count(&counts.slow_handshakes);
            None
        }
    }
}

/// Streams of our own protocol, one after the other.
fn streams<'a>(
    inbound: &'a Inbound,
    tls: &'a mut Tls,
    drain: &'a mut Drain,
) -> impl Future<Output = ()> + Send {
    async move {
        loop {
            let Some(mut begun) = Box::pin(begun(inbound, tls, drain)).await else { return };
            if !stream(inbound, tls, &mut begun).await {
                return;
            }
        }
    }
}

/// The next stream; none: the tunnel has ended.
async fn begun(inbound: &Inbound, tls: &mut Tls, drain: &mut Drain) -> Option<Begun> {
    match next(inbound, tls, drain).await {
        Ok(request) => {
            // Asked for each stream, so that no idle one keeps it. A tunnel that cannot tell has gone.
            let peer = tls.tcp.peer_addr().ok()?;
            begin(inbound, tls, peer, request?).await
        }
        Err(error) => {
            malformed(inbound, tls, error).await;
            None
        }
    }
}

/// The next request; none: the tunnel has ended.
async fn next(
    inbound: &Inbound,
    tls: &mut Tls,
    drain: &mut Drain,
) -> Result<Option<Box<Request>>, TunnelError> {
    let idle = inbound.allowance.limits.idle_timeout;
    let received = tokio::select! {
        biased;
        () = drain.reached(Phase::Draining) => {
            part(tls).await;
            return Ok(None);
        }
        // A little longer than the client keeps it, so that the client is the one to close.
        received = timeout(idle + idle / 4, tunnel::receive(tls)) => received,
    };
    match received {
        Ok(Ok(Some(bytes))) => request(&bytes).map(Some),
        Ok(Ok(None)) => Ok(None),
        Ok(Err(error)) => Err(error),
        Err(_idle) => {
            part(tls).await;
            Ok(None)
        }
    }
}

/// Ends a tunnel between two streams. That may cross a request: the client then knows that it was not taken.
async fn part(tls: &mut Tls) {
    // It has gone already.
    drop(tunnel::send(tls, &Message::Drain).await);
}

async fn malformed(inbound: &Inbound, tls: &mut Tls, error: TunnelError) {
    debug!(own = %inbound.own, peer = %tls.peer, %error, "a tunnel has ended");
    if matches!(error, TunnelError::Malformed(_)) {
        count(&inbound.allowance.counts.malformed);
        drop(tunnel::send(tls, &Message::Refused(Reason::BadRequest, "")).await);
    }
}

fn request(bytes: &[u8]) -> Result<Box<Request>, TunnelError> {
    let message = Message::decode(bytes)?;
    Order::Idle.server_received(&message)?;
    // The order lets nothing else through.
    let Message::Request(request) = message else { return Err(super::stream::OutOfOrder.into()) };
    Ok(request)
}

/// Whether the tunnel may carry another.
fn stream<'a>(
    inbound: &'a Inbound,
    tls: &'a mut Tls,
    Begun { wanted, changed, application, owed }: &'a mut Begun,
) -> impl Future<Output = bool> + Send {
    async move {
        let standing = tls.standing.clone();
        let relayed = tokio::select! {
            relayed = relay::relay(&application.tcp, tls, &inbound.allowance.budget, *owed) => Some(relayed),
            () = revoked(inbound, wanted, &standing, changed) => None,
        };
        finish(inbound, wanted, &application.tcp, relayed)
    }
}

/// A stream that was accepted.
struct Begun {
    wanted: Box<Wanted>,
    /// From before the verdict that let it in.
    changed: watch::Receiver<u64>,
    application: Application,
    /// ACCEPTED has still to be sent.
    owed: bool,
}

async fn begin(inbound: &Inbound, tls: &mut Tls, peer: SocketAddr, request: Box<Request>) -> Option<Begun> {
    let wanted = Box::new(Wanted {
        source: Some(tls.peer.clone()),
        peer,
        client: request.client,
        destination: canonical(request.destination),
    });
    let changed = inbound.host.changed();
    let answer = if tls.may_begin() {
        answer(inbound, &wanted, tls.tcp.local_addr()).await
    } else {
        // The client makes a new tunnel, with a new certificate.
        Err(Reason::Draining)
    };
    let application = match answer {
        Ok(application) => application,
        Err(reason) => {
            inbound.host.finished(&wanted, &Outcome::Refused(reason));
            if tunnel::send(tls, &Message::Refused(reason, "")).await.is_ok() {
                tunnel::linger(tls).await;
            }
            return None;
        }
    };
    // An application that has been told something may soon have something to say, with which it can go along. If there is much, more may
    // follow, which the client says only when it knows.
    let owed = (1..SHORT).contains(&tls.received.len());
    if !owed && let Err(error) = tunnel::send(tls, &Message::Accepted).await {
        inbound.host.finished(&wanted, &Outcome::Cut(Moved::default(), error.to_string()));
        return None;
    }
    Some(Begun { wanted, changed, application, owed })
}

/// The connection to the application, if it may be and can be.
async fn answer(
    inbound: &Inbound,
    wanted: &Wanted,
    local: std::io::Result<SocketAddr>,
) -> Result<Application, Reason> {
    // The connection came to one workload: whoever asks for another there is wrong, or wants round a policy.
    let local = local.map_err(|_gone| Reason::BadRequest)?;
    if canonical(local).ip() != wanted.destination.ip() || RESERVED.contains(&wanted.destination.port()) {
        return Err(Reason::BadRequest);
    }
    inbound.host.permits(wanted).map_err(|_denied| Reason::Policy)?;
    match timeout(inbound.allowance.limits.connect_timeout, inbound.host.dial(wanted)).await {
        Ok(Ok(application)) => {
            // It does not leave the pod, so nobody at its other end can vanish unseen. An error is the next read's.
            drop(application.tcp.set_nodelay(true));
            // Unless it ends in order, whichever way it ends.
            reset_on_drop(&application.tcp);
            Ok(application)
        }
        Ok(Err(_)) => Err(Reason::Upstream),
        Err(_elapsed) => Err(Reason::Timeout),
    }
}

/// Waits until policy no longer lets a connection be, or the client's certificate is revoked. `changed` is from before the verdict that let
/// it in.
fn revoked<'a>(
    inbound: &'a Inbound,
    wanted: &'a Wanted,
    standing: &'a Standing,
    changed: &'a mut watch::Receiver<u64>,
) -> impl Future<Output = ()> + Send {
    async move {
        while changed.changed().await.is_ok() {
            if standing.is_revoked() || !inbound.host.still(wanted) {
                return;
            }
        }
        // Policy has nobody left to change it.
        std::future::pending().await
    }
}

/// Tells how a connection has ended. True: in order.
fn finish(
    inbound: &Inbound,
    wanted: &Wanted,
    application: &TcpStream,
    relayed: Option<(Result<(), Cut>, Moved)>,
) -> bool {
    let (outcome, clean) = match relayed {
        Some((outcome, moved)) => {
            let clean = outcome.is_ok();
            if clean {
                end_on_drop(application);
            }
            (Outcome::of(outcome, moved), clean)
        }
        None => (Outcome::Revoked, false),
    };
    inbound.host.finished(wanted, &outcome);
    clean
}

/// An IPv4 address mapped into IPv6, as a listener of both families reports it, is that IPv4 address.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
