//! Requests and answers of our own protocol on a connection: what comes before and after a stream.

use std::io::{self, ErrorKind};

use tokio::io::AsyncWriteExt;

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
            Ok(_) => {}
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

/// Asks for a stream; after `Ok` it may be relayed.
pub(crate) async fn open(tls: &mut Tls, request: Request) -> Result<(), TunnelError> {
    send(tls, &Message::Request(Box::new(request))).await?;
    let mut order = Order::Asked;
    loop {
        let bytes = receive(tls).await?.ok_or(TunnelError::Closed)?;
        let message = Message::decode(&bytes)?;
        order = order.client_received(&message)?;
        match (message, order) {
            (Message::Refused(reason, text), _) => {
                return Err(TunnelError::Refused { reason, text: text.to_owned() });
            }
            (Message::Accepted, _) => return Ok(()),
            (_, Order::Over) => return Err(TunnelError::Closed),
            _ => {}
        }
    }
}

/// Whether a tunnel that has lain idle still takes a request, as far as can be known without asking.
pub(super) async fn is_fresh(tls: &mut Tls) -> bool {
    tokio::select! {
        biased;
        // Anything that is said without being asked (DRAIN), or an end.
        _said = receive(tls) => false,
        () = std::future::ready(()) => true,
    }
}
