//! Connections of a workload of this node to others.
#![expect(clippy::manual_async_fn, reason = "an async fn keeps its arguments twice")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use http::HeaderValue;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{interval, timeout};

use super::accept::{self, Room};
use super::drain::Drain;
use super::early::Early;
use super::hbone;
use super::host::{Dialled, Outcome, Outward, Route};
use super::inbound::canonical;
use super::limits::{Allowance, count};
use super::pool::{Pool, SWEEP};
use super::relay::{self, end_on_drop, reset_on_drop};
use super::stream::{Reason, Request};
use super::threads::{Accepted, Threads};
use super::tls::{Configs, Standing, Tls};
use crate::identity::SpiffeId;
use open::{Http2, Stream, find};

mod open;

/// The outbound side of a pod.
pub struct Outbound {
    /// Whose it is.
    pub own: SpiffeId,
    /// TLS.
    pub configs: Arc<Configs>,
    /// What the proxy is told.
    pub host: Arc<dyn Outward>,
    /// What it may use.
    pub allowance: Arc<Allowance>,
    /// Who carries its connections.
    pub threads: Threads,
    /// Its tunnels.
    pub pool: Pool,
    /// What peers that speak HTTP/2 are told about the workload, for their telemetry.
    pub baggage: Option<HeaderValue>,
}

/// Takes applications' connections from `listener` (port 15001) until the drain is over.
pub async fn serve(outbound: Arc<Outbound>, listener: TcpListener, drain: Drain) {
    let each = Arc::clone(&outbound);
    accept::serve(listener, &outbound.allowance, &outbound.threads, drain, move |tcp, peer, room| {
        connection(Arc::clone(&each), tcp, peer, room)
    })
    .await;
}

/// Closes tunnels that are not needed any more, without end; to be run once beside the listeners.
pub async fn sweep(outbound: Arc<Outbound>) {
    let mut due = interval(SWEEP);
    loop {
        due.tick().await;
        outbound.pool.sweep(Instant::now());
    }
}

fn connection(
    outbound: Arc<Outbound>,
    application: Accepted,
    peer: SocketAddr,
    room: Room,
) -> impl Future<Output = ()> + Send {
    // In a box: what is needed to find the way need not be kept for as long as the connection is open.
    let found = Box::pin(find_way(Arc::clone(&outbound), application, peer));
    async move {
        let Some((mut found, way)) = found.await else { return };
        let outcome = carry(&outbound, &mut found, way).await;
        if matches!(outcome, Outcome::Ended(_)) {
            end_on_drop(&found.application);
        }
        outbound.host.finished(&found.dialled, &outcome);
        drop((found, room));
    }
}

/// A connection of which it is known where it was to go.
struct Found {
    application: TcpStream,
    dialled: Box<Dialled>,
    /// From before the way was found, so that no change is missed.
    changed: watch::Receiver<u64>,
}

/// Where it goes.
enum Way {
    Refused(Reason),
    /// Without a tunnel, to where [`Dialled::direct`] says.
    Direct,
    Tunnel(Stream),
}

/// None: it cannot be known where it was to go.
async fn find_way(outbound: Arc<Outbound>, application: Accepted, peer: SocketAddr) -> Option<(Found, Way)> {
    let application = match application.here() {
        Ok(application) => application,
        Err(error) => {
            accept::stranded(&outbound.allowance, &error);
            return None;
        }
    };
    // Unless it ends in order, whichever way it ends.
    reset_on_drop(&application);
    let local = application.local_addr().ok()?;
    let peer = canonical(peer);
    // Without one it was made to the proxy itself.
    let original = outbound.host.original(peer, canonical(local))?;
    let destination = original.dialled;
    let mut dialled = Box::new(Dialled { application: peer, destination, endpoint: None, direct: None });
    let changed = outbound.host.changed();
    let way = match outbound.host.route(peer, &original) {
        Route::Refuse(reason) => Way::Refused(reason),
        Route::Direct(to) => {
            dialled.direct = Some(to);
            Way::Direct
        }
        Route::Tunnel { endpoints, host } => {
            let request = Request { client: Some(peer), host, ..Request::to(destination) };
            let mut early = Early::of(&application, &outbound.allowance.budget);
            match find(&outbound, endpoints, &original, request, &mut early).await {
                Ok((endpoint, stream)) => {
                    dialled.endpoint = Some(endpoint);
                    Way::Tunnel(stream)
                }
                Err(reason) => Way::Refused(reason),
            }
        }
    };
    Some((Found { application, dialled, changed }, way))
}

fn carry<'a>(
    outbound: &'a Outbound,
    Found { application, dialled, changed }: &'a mut Found,
    way: Way,
) -> impl Future<Output = Outcome> + Send {
    async move {
        match way {
            Way::Tunnel(Stream::Own(tls, early)) => {
                let standing = tls.standing.clone();
                tokio::select! {
                    outcome = own(outbound, application, dialled, (tls, early)) => outcome,
                    () = revoked(outbound, dialled, Some(&standing), changed) => Outcome::Revoked,
                }
            }
            // Fewer go these ways, and the others should not be as large.
            Way::Tunnel(Stream::Http2(stream)) => {
                Box::pin(async move {
                    let standing = stream.standing.clone();
                    tokio::select! {
                        outcome = http2(outbound, application, dialled, stream) => outcome,
                        () = revoked(outbound, dialled, Some(&standing), changed) => Outcome::Revoked,
                    }
                })
                .await
            }
            Way::Direct => {
                Box::pin(async move {
                    tokio::select! {
                        outcome = direct(outbound, application, dialled) => outcome,
                        () = revoked(outbound, dialled, None, changed) => Outcome::Revoked,
                    }
                })
                .await
            }
            Way::Refused(reason) => Outcome::Refused(reason),
        }
    }
}

/// Waits until a connection may no longer be.
fn revoked<'a>(
    outbound: &'a Outbound,
    dialled: &'a Dialled,
    standing: Option<&'a Standing>,
    changed: &'a mut watch::Receiver<u64>,
) -> impl Future<Output = ()> + Send {
    async move {
        while changed.changed().await.is_ok() {
            if standing.is_some_and(Standing::is_revoked) || !outbound.host.still(dialled) {
                return;
            }
        }
        // Nobody is left to change it.
        std::future::pending().await
    }
}

/// By a stream of our own protocol, whose tunnel may carry another one afterwards.
fn own<'a>(
    outbound: &'a Outbound,
    application: &'a TcpStream,
    dialled: &'a Dialled,
    (mut tls, early): (Box<Tls>, usize),
) -> impl Future<Output = Outcome> + Send {
    let endpoint = dialled.endpoint.as_ref();
    let using = endpoint.map(|endpoint| outbound.pool.using(endpoint));
    async move {
        let (outcome, mut moved) =
            relay::relay(application, &mut tls, &outbound.allowance.budget, false).await;
        moved.sent += early as u64;
        drop(using);
        if let (Ok(()), Some(endpoint)) = (&outcome, endpoint)
            && !outbound.pool.put(endpoint, tls, Instant::now())
        {
            count(&outbound.allowance.counts.over_idle);
        }
        Outcome::of(outcome, moved)
    }
}

async fn http2(
    outbound: &Outbound,
    application: &mut TcpStream,
    dialled: &Dialled,
    stream: Box<Http2>,
) -> Outcome {
    let _using = dialled.endpoint.as_ref().map(|endpoint| outbound.pool.using(endpoint));
    let Http2 { send, receive, early, standing: _, _slot, _room } = *stream;
    let (outcome, moved) = hbone::relay(application, send, receive, early, &outbound.allowance.unread).await;
    Outcome::of(outcome, moved)
}

async fn direct(outbound: &Outbound, application: &TcpStream, dialled: &Dialled) -> Outcome {
    let Some(to) = dialled.direct else { return Outcome::Refused(Reason::BadRequest) };
    let limit = outbound.allowance.limits.connect_timeout;
    let other = match timeout(limit, outbound.host.dial(to)).await {
        Ok(Ok(other)) => other,
        Ok(Err(_)) => return Outcome::Refused(Reason::Upstream),
        Err(_elapsed) => return Outcome::Refused(Reason::Timeout),
    };
    accept::prepare(&other);
    reset_on_drop(&other);
    let (outcome, moved) = relay::plain(application, &other, &outbound.allowance.budget).await;
    if outcome.is_ok() {
        end_on_drop(&other);
    }
    Outcome::of(outcome, moved)
}
