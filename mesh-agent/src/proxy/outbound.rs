//! Connections of a workload of this node to others.

use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::HeaderValue;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{interval, timeout};
use tracing::debug;

use super::accept::{self, Room};
use super::drain::Drain;
use super::early::Early;
use super::hbone::{self, Connection, OpenError, Slot};
use super::host::{Dialled, Endpoint, Original, Outcome, Outward, Route};
use super::inbound::canonical;
use super::limits::{Allowance, count};
use super::pool::{Pool, SWEEP};
use super::relay::{self, EarlyRoom, Moved, end_on_drop, reset_on_drop};
use super::stream::{Reason, Request};
use super::threads::{Accepted, Threads};
use super::tls::{self, Configs, Protocol, Standing, Tls};
use super::tunnel::{self, TunnelError};
use crate::identity::SpiffeId;

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

async fn connection(outbound: Arc<Outbound>, application: Accepted, peer: SocketAddr, _room: Room) {
    let mut application = match application.here() {
        Ok(application) => application,
        Err(error) => return accept::stranded(&outbound.allowance, &error),
    };
    // Unless it ends in order, whichever way it ends.
    reset_on_drop(&application);
    // In a box: what is needed to find the way need not be kept for as long as the connection is open.
    let Some(found) = Box::pin(find_way(&outbound, &application, peer)).await else { return };
    let Found { dialled, changed, way } = found;
    let outcome = match way {
        Err(reason) => Outcome::Refused(reason),
        Ok(Way::Direct(to)) => {
            // Few go this way, and the others should not be as large.
            let mut relayed = Box::pin(direct(&outbound, &application, to));
            unless_revoked(&outbound, &dialled, None, changed, relayed.as_mut()).await
        }
        Ok(Way::Tunnel(stream)) => {
            let standing = stream.standing();
            let relayed = pin!(tunnelled(&outbound, &mut application, dialled.endpoint.as_ref(), stream));
            unless_revoked(&outbound, &dialled, Some(standing), changed, relayed).await
        }
    };
    if matches!(outcome, Outcome::Ended(_)) {
        end_on_drop(&application);
    }
    outbound.host.finished(&dialled, &outcome);
}

/// Where a connection goes.
struct Found {
    dialled: Box<Dialled>,
    /// From before the way was found, so that no change is missed.
    changed: watch::Receiver<u64>,
    way: Result<Way, Reason>,
}

enum Way {
    Direct(SocketAddr),
    Tunnel(Stream),
}

async fn find_way(outbound: &Outbound, application: &TcpStream, peer: SocketAddr) -> Option<Found> {
    let local = application.local_addr().ok()?;
    let peer = canonical(peer);
    // Without one it was made to the proxy itself.
    let original = outbound.host.original(peer, canonical(local))?;
    let destination = original.dialled;
    let mut dialled = Box::new(Dialled { application: peer, destination, endpoint: None, direct: None });
    let changed = outbound.host.changed();
    let way = match outbound.host.route(peer, &original) {
        Route::Refuse(reason) => Err(reason),
        Route::Direct(to) => {
            dialled.direct = Some(to);
            Ok(Way::Direct(to))
        }
        Route::Tunnel { endpoints, host } => {
            let request = Request { client: Some(peer), host, ..Request::to(destination) };
            let mut early = Early::of(application, &outbound.allowance.budget);
            find(outbound, endpoints, &original, request, &mut early).await.map(|(endpoint, stream)| {
                dialled.endpoint = Some(endpoint);
                Way::Tunnel(stream)
            })
        }
    };
    Some(Found { dialled, changed, way })
}

/// A stream, unless it may no longer be.
async fn unless_revoked(
    outbound: &Outbound,
    dialled: &Dialled,
    standing: Option<Standing>,
    mut changed: watch::Receiver<u64>,
    relayed: Pin<&mut impl Future<Output = Outcome>>,
) -> Outcome {
    let revoked = async {
        while changed.changed().await.is_ok() {
            let distrusted = standing.as_ref().is_some_and(Standing::is_revoked);
            if distrusted || !outbound.host.still(dialled) {
                return;
            }
        }
        std::future::pending().await
    };
    tokio::select! {
        outcome = relayed => outcome,
        () = revoked => {
            count(&outbound.allowance.counts.revoked);
            Outcome::Cut(Moved::default(), "its endpoint has gone, its certificate was revoked, or policy no longer permits it".to_owned())
        }
    }
}

async fn tunnelled(
    outbound: &Outbound,
    application: &mut TcpStream,
    endpoint: Option<&Endpoint>,
    stream: Stream,
) -> Outcome {
    let using = endpoint.map(|endpoint| outbound.pool.using(endpoint));
    let (outcome, moved) = match stream {
        Stream::Own(mut tls, early) => {
            let mut relayed = relay::relay(application, &mut tls, &outbound.allowance.budget).await;
            relayed.1.sent += early as u64;
            drop(using);
            if let (Ok(()), Some(endpoint)) = (&relayed.0, endpoint)
                && !outbound.pool.put(endpoint, tls, Instant::now())
            {
                count(&outbound.allowance.counts.over_idle);
            }
            relayed
        }
        Stream::Http2(stream) => {
            let Http2 { send, receive, early, standing: _, _slot, _room } = *stream;
            Box::pin(hbone::relay(application, send, receive, early)).await
        }
    };
    Outcome::of(outcome, moved)
}

async fn direct(outbound: &Outbound, application: &TcpStream, to: SocketAddr) -> Outcome {
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

/// A stream that a peer has accepted.
enum Stream {
    /// With how many bytes of the application it has got already.
    Own(Box<Tls>, usize),
    Http2(Box<Http2>),
}

/// One of the streams of a tunnel.
struct Http2 {
    send: SendStream<Bytes>,
    receive: RecvStream,
    /// Bytes of the application that it has still to get.
    early: Bytes,
    standing: Standing,
    _slot: Slot,
    _room: Option<EarlyRoom>,
}

impl Stream {
    fn own(tls: Box<Tls>, early: &Early<'_>) -> Self {
        Self::Own(tls, early.said().len())
    }

    fn http2(
        (send, receive): (SendStream<Bytes>, RecvStream),
        connection: &Connection,
        slot: Slot,
        early: &mut Early<'_>,
    ) -> Self {
        let (early, room) = early.take();
        let standing = connection.standing().clone();
        Self::Http2(Box::new(Http2 { send, receive, early, standing, _slot: slot, _room: room }))
    }

    /// Of the peer's certificate.
    fn standing(&self) -> Standing {
        match self {
            Self::Own(tls, _) => tls.standing.clone(),
            Self::Http2(stream) => stream.standing.clone(),
        }
    }
}

/// Why an endpoint gives no stream.
enum Failure {
    /// The endpoint, or its node: another may do better.
    Endpoint(Reason, String),
    /// The request itself.
    Final(Reason, String),
}

/// A stream of the first endpoint that gives one, or why the last did not.
async fn find(
    outbound: &Outbound,
    mut endpoints: Vec<Endpoint>,
    original: &Original,
    request: Request,
    early: &mut Early<'_>,
) -> Result<(Endpoint, Stream), Reason> {
    let mut last = Reason::Upstream;
    let mut attempt = 0;
    let mut asked = false;
    loop {
        if attempt == endpoints.len() && !std::mem::replace(&mut asked, true) {
            let application = request.client.unwrap_or(original.dialled);
            endpoints.extend(outbound.host.others(application, original, &endpoints));
        }
        let Some(endpoint) = endpoints.get(attempt) else { return Err(last) };
        if attempt > 0 {
            count(&outbound.allowance.counts.retried);
        }
        attempt += 1;
        let request = Request { destination: endpoint.target, ..request.clone() };
        let opened = match in_time(outbound, reuse(outbound, endpoint, &request, early)).await {
            Ok(None) => make(outbound, endpoint, request, early).await,
            Ok(Some(stream)) => Ok(stream),
            Err(failure) => Err(failure),
        };
        let failure = match opened {
            Ok(stream) => return Ok((endpoint.clone(), stream)),
            Err(failure) => failure,
        };
        match failure {
            Failure::Final(reason, why) => {
                debug!(own = %outbound.own, to = %endpoint.identity, %why, "refused");
                return Err(reason);
            }
            Failure::Endpoint(reason, why) => {
                debug!(own = %outbound.own, to = %endpoint.identity, %why, "no stream");
                last = reason;
                if early.may_be_heard() {
                    // What cannot be said twice is not: the application sees a reset, as of any server that fails.
                    return Err(last);
                }
            }
        }
    }
}

/// A part of the way to a stream.
async fn in_time<T>(
    outbound: &Outbound,
    part: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    // Connect and answer of the application have each their time at the other end, so twice it in all.
    let limit = outbound.allowance.limits.connect_timeout * 2;
    let late = |_elapsed| Err(Failure::Endpoint(Reason::Timeout, "no stream in time".to_owned()));
    timeout(limit, part).await.unwrap_or_else(late)
}

/// A stream on a tunnel that is there.
async fn reuse(
    outbound: &Outbound,
    endpoint: &Endpoint,
    request: &Request,
    early: &mut Early<'_>,
) -> Result<Option<Stream>, Failure> {
    while let Some(mut tls) = outbound.pool.take(endpoint) {
        match tunnel::open(&mut tls, request.clone(), early).await {
            Ok(()) => {
                count(&outbound.allowance.counts.reused);
                return Ok(Some(Stream::own(tls, early)));
            }
            Err(TunnelError::Application(error)) => return Err(gone(&error)),
            // The tunnel takes no more: the own certificate that it was made with has expired, of which the server sees only the end.
            Err(TunnelError::Refused { reason: Reason::Draining, .. }) => {}
            Err(TunnelError::Refused { reason, text }) => return Err(refused(reason, &text)),
            Err(ended) if early.may_be_heard() => {
                return Err(Failure::Endpoint(Reason::Upstream, ended.to_string()));
            }
            // It ended between two streams: no byte of the application has been heard.
            Err(_ended) => {}
        }
    }
    while let Some((connection, slot)) = outbound.pool.share(endpoint) {
        match connection.open(request, outbound.baggage.as_ref()).await {
            Ok(stream) => {
                count(&outbound.allowance.counts.reused);
                return Ok(Some(Stream::http2(stream, &connection, slot, early)));
            }
            Err(OpenError::Refused(reason)) => return Err(refused(reason, "")),
            Err(OpenError::Http(error)) => return Err(Failure::Final(Reason::BadRequest, error.to_string())),
            Err(OpenError::H2(error)) if error.is_remote() && error.is_reset() && !is_untouched(&error) => {
                return Err(Failure::Endpoint(Reason::Upstream, error.to_string()));
            }
            // GOAWAY, or the connection has gone, or takes no more: it is not to be found again.
            Err(OpenError::H2(_)) => connection.close(),
        }
    }
    Ok(None)
}

/// Whether the peer says that it has done nothing for a stream (RFC 9113, section 8.7).
fn is_untouched(reset: &h2::Error) -> bool {
    reset.reason() == Some(h2::Reason::REFUSED_STREAM)
}

/// A stream on a new tunnel.
async fn make(
    outbound: &Outbound,
    endpoint: &Endpoint,
    request: Request,
    early: &mut Early<'_>,
) -> Result<Stream, Failure> {
    // Before the clock of the endpoint, which has no part in how many others wait, and before it is dialled: it would wait as well.
    let Some(room) = outbound.allowance.handshake().await else {
        return Err(Failure::Endpoint(Reason::Limit, "too many handshakes".to_owned()));
    };
    in_time(outbound, open(outbound, endpoint, request, early, room)).await
}

async fn open(
    outbound: &Outbound,
    endpoint: &Endpoint,
    request: Request,
    early: &mut Early<'_>,
    room: OwnedSemaphorePermit,
) -> Result<Stream, Failure> {
    let mut tls = Box::pin(fresh(outbound, endpoint, room)).await?;
    match tls.protocol {
        Protocol::Stream => match tunnel::open(&mut tls, request, early).await {
            Ok(()) => Ok(Stream::own(tls, early)),
            Err(TunnelError::Application(error)) => Err(gone(&error)),
            Err(TunnelError::Refused { reason, text }) => Err(refused(reason, &text)),
            Err(error) => Err(Failure::Endpoint(Reason::Upstream, error.to_string())),
        },
        Protocol::H2 => {
            let failed = |error: OpenError| Failure::Endpoint(Reason::Upstream, error.to_string());
            let streams = outbound.allowance.limits.streams;
            let connection = Connection::new(*tls, streams).await.map_err(failed)?;
            let slot = connection
                .reserve()
                .ok_or_else(|| Failure::Endpoint(Reason::Upstream, "closed".to_owned()))?;
            outbound.pool.offer(endpoint, connection.clone());
            match connection.open(&request, outbound.baggage.as_ref()).await {
                Ok(stream) => Ok(Stream::http2(stream, &connection, slot, early)),
                Err(OpenError::Refused(reason)) => Err(refused(reason, "")),
                Err(error @ (OpenError::Http(_) | OpenError::H2(_))) => Err(failed(error)),
            }
        }
    }
}

fn gone(error: &std::io::Error) -> Failure {
    Failure::Final(Reason::Upstream, format!("the application has gone: {error}"))
}

fn refused(reason: Reason, text: &str) -> Failure {
    let told = format!("refused ({}) {text}", reason.name());
    if reason.is_about_the_endpoint() {
        Failure::Endpoint(reason, told)
    } else {
        Failure::Final(reason, told)
    }
}

/// A new tunnel.
async fn fresh(
    outbound: &Outbound,
    endpoint: &Endpoint,
    _room: OwnedSemaphorePermit,
) -> Result<Box<Tls>, Failure> {
    let limits = outbound.allowance.limits;
    let counts = &outbound.allowance.counts;
    let tcp = match timeout(limits.connect_timeout, outbound.host.dial(endpoint.tunnel)).await {
        Ok(Ok(tcp)) => tcp,
        Ok(Err(error)) => return Err(Failure::Endpoint(Reason::Upstream, error.to_string())),
        Err(_elapsed) => return Err(Failure::Endpoint(Reason::Timeout, "connect timed out".to_owned())),
    };
    accept::prepare(&tcp);
    let shaken = tls::connect(&outbound.configs, &outbound.own, &endpoint.identity, tcp);
    match timeout(limits.handshake_timeout, shaken).await {
        Ok(Ok(tls)) => {
            count(&counts.handshakes);
            Ok(Box::new(tls))
        }
        Ok(Err(error)) => {
            count(&counts.failed_handshakes);
            Err(Failure::Endpoint(Reason::Upstream, error.to_string()))
        }
        Err(_elapsed) => {
            count(&counts.slow_handshakes);
            Err(Failure::Endpoint(Reason::Timeout, "handshake timed out".to_owned()))
        }
    }
}
