//! The side that is asked.

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderValue, Response, StatusCode};

use super::headers::{self, Asked, BadRequest};
use super::unread::{Unread, WINDOW, Windows};
use crate::proxy::stream::Reason;
use crate::proxy::tls::{Tls, TlsIo};

/// As much for every stream as it may have, so that slow ones never hold up the others.
pub(super) const CONNECTION_WINDOW: u32 = 100 * WINDOW;
pub(super) const FRAME: u32 = 64 << 10;
pub(super) const HEADERS: u32 = 16 << 10;
/// Resets that a peer may cause without our taking the streams (CVE-2023-44487).
const RESETS: usize = 64;

/// A tunnel that a peer has opened.
pub struct Server {
    connection: h2::server::Connection<TlsIo, Bytes>,
    windows: Windows,
}

/// A stream that is asked for.
pub struct Incoming {
    /// What is asked for.
    pub asked: Result<Asked, BadRequest>,
    receive: RecvStream,
    respond: SendResponse<Bytes>,
}

impl Server {
    /// A tunnel on `tls` with at most `streams` at a time.
    pub async fn new(tls: Tls, streams: u32, unread: &Unread) -> Result<Self, h2::Error> {
        let connection = h2::server::Builder::new()
            .initial_window_size(WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME)
            .max_header_list_size(HEADERS)
            .max_concurrent_streams(streams)
            .max_pending_accept_reset_streams(RESETS)
            .handshake(TlsIo::new(tls))
            .await?;
        Ok(Self { connection, windows: unread.windows() })
    }

    /// The next stream; none when the peer opens no more. It also moves the frames of all streams, so it is to be called until
    /// then.
    pub async fn next(&mut self) -> Option<Result<Incoming, h2::Error>> {
        let accepted = loop {
            tokio::select! {
                accepted = self.connection.accept() => break accepted?,
                window = self.windows.changed() => match self.connection.set_initial_window_size(window) {
                    Ok(()) => self.windows.given(window),
                    Err(_earlier) => self.windows.put_off(),
                },
            }
        };
        Some(accepted.map(|(request, respond)| Incoming {
            asked: headers::asked(&request),
            receive: request.into_body(),
            respond,
        }))
    }

    /// Says GOAWAY: streams that are open go on.
    pub fn drain(&mut self) {
        self.connection.graceful_shutdown();
    }
}

impl Incoming {
    /// Gives the stream. The baggage describes the workload to the peer's telemetry.
    pub fn accept(
        mut self,
        baggage: Option<&HeaderValue>,
    ) -> Result<(SendStream<Bytes>, RecvStream), h2::Error> {
        let mut response = Response::new(());
        if let Some(baggage) = baggage {
            response.headers_mut().insert("baggage", baggage.clone());
        }
        let send = self.respond.send_response(response, false)?;
        Ok((send, self.receive))
    }

    /// Does not, and tells the peer that nothing was done: it may ask again on another tunnel (RFC 9113, section 8.7).
    pub fn put_off(mut self) {
        self.respond.send_reset(h2::Reason::REFUSED_STREAM);
    }

    /// Does not.
    pub fn refuse(mut self, reason: Reason) -> Result<(), h2::Error> {
        let mut response = Response::new(());
        *response.status_mut() = headers::status(reason);
        debug_assert_ne!(response.status(), StatusCode::OK);
        self.respond.send_response(response, true).map(drop)
    }
}
