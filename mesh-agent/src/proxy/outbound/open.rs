//! How a connection gets a stream: on a tunnel that is there or on a new one, of the first endpoint that gives one.

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Duration, Instant, timeout, timeout_at};
use tracing::debug;

use super::Outbound;
use crate::proxy::accept;
use crate::proxy::early::Early;
use crate::proxy::hbone::{Connection, OpenError, Slot};
use crate::proxy::host::{Endpoint, Original};
use crate::proxy::limits::count;
use crate::proxy::pool::{Making, Turn};
use crate::proxy::relay::EarlyRoom;
use crate::proxy::stream::{Reason, Request};
use crate::proxy::tls::{self, Protocol, Standing, Tls};
use crate::proxy::tunnel::{self, TunnelError};

/// A connection waits so long for a tunnel that another one makes, before it makes its own.
const PATIENCE: Duration = Duration::from_secs(1);
/// New tunnels that one connection tries to the same endpoint, if the first takes no stream.
const TUNNELS: usize = 2;

/// A stream that a peer has accepted.
pub(super) enum Stream {
    /// With how many bytes of the application it has got already.
    Own(Box<Tls>, usize),
    Http2(Box<Http2>),
}

/// One of the streams of a tunnel.
pub(super) struct Http2 {
    pub(super) send: SendStream<Bytes>,
    pub(super) receive: RecvStream,
    /// Bytes of the application that it has still to get.
    pub(super) early: Bytes,
    pub(super) standing: Standing,
    pub(super) _slot: Slot,
    pub(super) _room: Option<EarlyRoom>,
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
}

/// Why an endpoint gives no stream.
enum Failure {
    /// The endpoint, or its node: another may do better.
    Endpoint(Reason, String),
    /// The request itself.
    Final(Reason, String),
}

/// A stream of the first endpoint that gives one, or why the last did not.
pub(super) async fn find(
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
        let failure = match obtain(outbound, endpoint, &request, early).await {
            Ok(stream) => {
                let mut endpoint = endpoint.clone();
                if let Stream::Own(tls, _early) = &stream {
                    // The same name, which need not be kept twice.
                    endpoint.identity = tls.peer.clone();
                }
                return Ok((endpoint, stream));
            }
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

/// A stream of one endpoint.
async fn obtain(
    outbound: &Outbound,
    endpoint: &Endpoint,
    request: &Request,
    early: &mut Early<'_>,
) -> Result<Stream, Failure> {
    let patience = Instant::now() + PATIENCE;
    let mut alone = false;
    loop {
        if let Some(stream) = in_time(outbound, reuse(outbound, endpoint, request, early)).await? {
            return Ok(stream);
        }
        let turn = if alone { Turn::Own(None) } else { outbound.pool.turn(endpoint) };
        let making = match turn {
            Turn::Own(making) => making,
            // A tunnel may have room for both. If that takes long, or fails, there may still be another by now.
            Turn::After(mut others) => {
                let made = timeout_at(patience, others.wait_for(|made| *made)).await;
                alone = !matches!(made, Ok(Ok(_)));
                continue;
            }
        };
        return make(outbound, endpoint, request, early, making).await;
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
    request: &Request,
    early: &mut Early<'_>,
    mut making: Option<Making>,
) -> Result<Stream, Failure> {
    for _ in 0..TUNNELS {
        // Before the clock of the endpoint, which has no part in how many others wait, and before it is dialled: it would wait as well.
        let Some(room) = outbound.allowance.handshake().await else {
            return Err(Failure::Endpoint(Reason::Limit, "too many handshakes".to_owned()));
        };
        let opened = in_time(outbound, open(outbound, endpoint, request, early, room, &mut making)).await?;
        if let Some(stream) = opened {
            return Ok(stream);
        }
    }
    Err(Failure::Endpoint(Reason::Upstream, "new tunnels take no stream".to_owned()))
}

/// None: the peer has done nothing for the stream, and may do it on another tunnel.
async fn open(
    outbound: &Outbound,
    endpoint: &Endpoint,
    request: &Request,
    early: &mut Early<'_>,
    room: OwnedSemaphorePermit,
    making: &mut Option<Making>,
) -> Result<Option<Stream>, Failure> {
    let mut tls = Box::pin(fresh(outbound, endpoint, room)).await?;
    outbound.pool.speaks(endpoint, tls.protocol);
    match tls.protocol {
        Protocol::Stream => {
            // For this stream alone: whoever waits makes its own.
            drop(making.take());
            match tunnel::open(&mut tls, request.clone(), early).await {
                Ok(()) => Ok(Some(Stream::own(tls, early))),
                Err(TunnelError::Application(error)) => Err(gone(&error)),
                Err(TunnelError::Refused { reason, text }) => Err(refused(reason, &text)),
                Err(error) => Err(Failure::Endpoint(Reason::Upstream, error.to_string())),
            }
        }
        Protocol::H2 => {
            let failed = |error: OpenError| Failure::Endpoint(Reason::Upstream, error.to_string());
            let streams = outbound.allowance.limits.streams;
            let connection =
                Connection::new(*tls, streams, &outbound.allowance.unread).await.map_err(failed)?;
            let slot = connection
                .reserve()
                .ok_or_else(|| Failure::Endpoint(Reason::Upstream, "closed".to_owned()))?;
            outbound.pool.offer(endpoint, connection.clone());
            let opened = connection.open(request, outbound.baggage.as_ref()).await;
            if matches!(opened, Ok(_) | Err(OpenError::Refused(_))) {
                // With the first answer it is known how many streams the peer takes.
                making.take().into_iter().for_each(Making::done);
            }
            match opened {
                Ok(stream) => Ok(Some(Stream::http2(stream, &connection, slot, early))),
                Err(OpenError::Refused(reason)) => Err(refused(reason, "")),
                Err(OpenError::H2(error)) if is_untouched(&error) => {
                    connection.close();
                    Ok(None)
                }
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
    let tcp = match timeout(limits.connect_timeout, outbound.host.dial_tunnel(endpoint.tunnel)).await {
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
