//! Requests and answers of our own protocol on a connection: what comes before and after a stream.

use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::busy_poll;
use super::early::Early;
use super::stream::{Malformed, Message, Order, OutOfOrder, Reason, Request};
use super::tls::{Event, Tls, TlsError};

/// Read at a time; requests are short.
const CHUNK: usize = 2048;

/// A tunnel cannot be used, or not for this.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// Its connection.
    #[error("the tunnel: {0}")]
    Io(#[from] io::Error),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// What the peer said.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// When it said so.
    #[error(transparent)]
    OutOfOrder(#[from] OutOfOrder),
    /// The application that wanted the stream has gone.
    #[error("the application: {0}")]
    Application(io::Error),
    /// The peer has closed it.
    #[error("the peer has closed the tunnel")]
    Closed,
    /// The peer refuses the request.
    #[error("refused ({}): {text}", .reason.name())]
    Refused {
        /// Why.
        reason: Reason,
        /// In words, the peer's.
        text: String,
    },
}

/// The next message's bytes; none when the peer sends no more. May be dropped and called again.
pub(super) async fn receive(tls: &mut Tls) -> Result<Option<Vec<u8>>, TunnelError> {
    loop {
        if let Some((total, event)) = tls.reader.open(&mut tls.received)? {
            let message = match event {
                Event::Data(range) => Some(tls.received[range].to_vec()),
                Event::Nothing => None,
                Event::Closed => return Ok(None),
            };
            tls.received.drain(..total);
            if tls.received.is_empty() {
                tls.received = Vec::new();
            }
            if message.is_some() {
                return Ok(message);
            }
            continue;
        }
        tls.tcp.readable().await?;
        tls.received.reserve(CHUNK);
        match tls.tcp.try_read_buf(&mut tls.received) {
            Ok(0) if tls.received.is_empty() => return Ok(None),
            Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
            Ok(read) => busy_poll::came(&tls.tcp, read),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                // Idle connections hold no buffer.
                tls.received.shrink_to_fit();
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends a message.
pub(super) async fn send(tls: &mut Tls, message: &Message<'_>) -> Result<(), TunnelError> {
    if let Some(record) = tls.writer.due()? {
        tls.tcp.write_all(&record).await?;
    }
    let record = tls.writer.data(&message.encode())?;
    tls.tcp.write_all(&record).await?;
    Ok(())
}

/// Asks for a stream, with what the application has said already; after `Ok` it may be relayed.
pub(crate) async fn open(tls: &mut Tls, request: Request, early: &mut Early<'_>) -> Result<(), TunnelError> {
    early.look().map_err(TunnelError::Application)?;
    let mut records = tls.writer.due()?.unwrap_or_default();
    records.extend(tls.writer.data(&Message::Request(Box::new(request)).encode())?);
    if !early.said().is_empty() {
        records.extend(tls.writer.data(&Message::Data(early.said()).encode())?);
    }
    // Its last record is what was said: as long as not all of it is written, nobody can open that.
    tls.tcp.write_all(&records).await?;
    early.is_sent();
    drop(records);
    let mut sent = early.said().len();
    let mut failed = None;
    let mut order = Order::Asked;
    loop {
        let bytes = tokio::select! {
            biased;
            received = receive(tls) => received?.ok_or(TunnelError::Closed)?,
            more = early.more() => {
                more.map_err(TunnelError::Application)?;
                let Err(error) = send(tls, &Message::Data(&early.said()[sent..])).await else {
                    sent = early.said().len();
                    early.is_sent();
                    continue;
                };
                // It has gone; what it said before that may be that it has not taken the request.
                let Ok(Some(last)) = receive(tls).await else { return Err(error) };
                failed = Some(error);
                last
            }
        };
        let message = Message::decode(&bytes)?;
        order = order.client_received(&message)?;
        match (message, order) {
            (Message::Refused(reason, text), _) => {
                early.is_unheard();
                return Err(TunnelError::Refused { reason, text: text.to_owned() });
            }
            (Message::Drain, _) => {
                early.is_unheard();
                return Err(TunnelError::Closed);
            }
            // A stream of which a part could not be said is none.
            (Message::Accepted, _) => return failed.map_or(Ok(()), Err),
            (_, Order::Over) => return Err(TunnelError::Closed),
            _ => {}
        }
    }
}

/// Waits until the peer has read what was said last, and closed: closing before, with something of its unread, would take that away from
/// it again.
pub(super) async fn linger(tls: &mut Tls) {
    const LONGEST: Duration = Duration::from_secs(1);
    const MOST: usize = 64 << 10;
    let read = async {
        let mut left = MOST;
        let mut bytes = vec![0; CHUNK];
        while let Ok(read @ 1..) = tls.tcp.read(&mut bytes).await {
            left = left.saturating_sub(read);
            if left == 0 {
                break;
            }
        }
    };
    // It has had its time.
    drop(timeout(LONGEST, read).await);
}

/// Whether a tunnel that has lain idle still takes a request, as far as can be known without asking: nothing has been said without being
/// asked (DRAIN), and it has not ended. The socket itself is asked, since the event loop may not have seen it yet.
pub(super) fn is_fresh(tls: &Tls) -> bool {
    let mut byte = [MaybeUninit::uninit()];
    let peeked = SockRef::from(&tls.tcp).peek(&mut byte);
    tls.received.is_empty() && peeked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}
