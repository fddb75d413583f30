//! The side that asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::HeaderValue;
use tokio::time::{interval_at, timeout};
use tracing::debug;

use super::headers::{self, Asked};
use super::server::{CONNECTION_WINDOW, FRAME, HEADERS};
use super::unread::{Unread, WINDOW, Windows};
use crate::proxy::stream::Reason;
use crate::proxy::tls::{Standing, Tls, TlsIo};

/// A peer that vanished is noticed after both.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// No stream.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The tunnel.
    #[error("HTTP/2: {0}")]
    H2(#[from] h2::Error),
    /// The head of the request.
    #[error("HTTP: {0}")]
    Http(#[from] http::Error),
    /// The peer refuses.
    #[error("refused ({})", .0.name())]
    Refused(Reason),
}

/// A tunnel to a peer; each clone can open streams.
#[derive(Clone)]
pub struct Connection {
    requests: SendRequest<Bytes>,
    streams: Arc<AtomicU32>,
    most: u32,
    alive: Arc<tokio::sync::Semaphore>,
    until: SystemTime,
    standing: Standing,
}

/// One of a tunnel's streams, counted.
pub struct Slot(Arc<AtomicU32>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connection {
    /// A tunnel on `tls`, for at most `most` streams at a time. Its frames are moved by a task of its own, which ends with the
    /// connection.
    pub async fn new(tls: Tls, most: u32, unread: &Unread) -> Result<Self, OpenError> {
        let (until, standing) = (tls.until, tls.standing.clone());
        let (requests, mut connection) = h2::client::Builder::new()
            .initial_window_size(WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME)
            .max_header_list_size(HEADERS)
            .enable_push(false)
            // Until the peer has said how many it takes.
            .initial_max_send_streams(1)
            .handshake(TlsIo::new(tls))
            .await?;
        let pings = connection.ping_pong();
        let alive = Arc::new(tokio::sync::Semaphore::new(0));
        let dead = Arc::clone(&alive);
        let windows = unread.windows();
        tokio::spawn(async move {
            tokio::select! {
                () = moved(connection, windows) => {}
                () = keep_alive(pings) => {}
            }
            dead.close();
        });
        Ok(Self { requests, streams: Arc::default(), most, alive, until, standing })
    }

    /// Room for one more stream, if the tunnel lives and has some.
    pub fn reserve(&self) -> Option<Slot> {
        if !self.is_alive() {
            return None;
        }
        let took = self.streams.fetch_add(1, Ordering::Relaxed);
        let slot = Slot(Arc::clone(&self.streams));
        ((took as usize) < self.most()).then_some(slot)
    }

    /// Streams that it has room for, in all: more than the peer's settings allow would wait until others have ended.
    pub fn most(&self) -> usize {
        self.requests.current_max_send_streams().min(self.most as usize)
    }

    /// Whether it may take streams, now or later.
    pub fn is_alive(&self) -> bool {
        !self.alive.is_closed() && SystemTime::now() < self.until && self.standing.is_current()
    }

    /// Of the server's certificate.
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Takes no more streams; those that are open go on.
    pub fn close(&self) {
        self.alive.close();
    }

    /// Streams on it now.
    pub fn streams(&self) -> u32 {
        self.streams.load(Ordering::Relaxed)
    }

    /// Asks for a stream. One that belongs to no trace begins its own, by which the peer's logs and ours can be brought together.
    pub async fn open(
        &self,
        asked: &Asked,
        baggage: Option<&HeaderValue>,
    ) -> Result<(SendStream<Bytes>, RecvStream), OpenError> {
        let traceparent = asked.traceparent.clone().or_else(new_trace);
        debug!(destination = %asked.destination, traceparent, "asks for a stream");
        let request = headers::request(&Asked { traceparent, ..asked.clone() }, baggage)?;
        let mut requests = self.requests.clone().ready().await?;
        let (response, send) = requests.send_request(request, false)?;
        let response = response.await?;
        if response.status() != http::StatusCode::OK {
            return Err(OpenError::Refused(headers::reason(response.status())));
        }
        Ok((send, response.into_body()))
    }
}

/// None without random numbers: a stream needs no trace.
fn new_trace() -> Option<Box<str>> {
    let mut random = [0; 24];
    aws_lc_rs::rand::fill(&mut random).is_ok().then(|| headers::traceparent(random))
}

/// Moves a tunnel's frames until it ends.
async fn moved(mut connection: h2::client::Connection<TlsIo, Bytes>, mut windows: Windows) {
    loop {
        tokio::select! {
            _ended = &mut connection => return,
            window = windows.changed() => match connection.set_initial_window_size(window) {
                Ok(()) => windows.given(window),
                Err(_earlier) => windows.put_off(),
            },
        }
    }
}

async fn keep_alive(pings: Option<h2::PingPong>) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    let mut due = interval_at(tokio::time::Instant::now() + PING_INTERVAL, PING_INTERVAL);
    loop {
        due.tick().await;
        match timeout(PING_TIMEOUT, pings.ping(h2::Ping::opaque())).await {
            Ok(Ok(_pong)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}
