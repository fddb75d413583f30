//! Copies between an application's socket and a stream of HTTP/2.

use std::collections::VecDeque;
use std::future::{pending, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::WriteHalf;

use super::unread::{Share, Unread};
use crate::proxy::busy_poll;
use crate::proxy::relay::{self, Cut, Moved, failed, readable, reset_on_drop};

/// Read at a time, at first and when there is much.
const SMALL: usize = 4 << 10;
const LARGE: usize = 64 << 10;

/// Moves a stream that has been accepted, the `first` bytes of the application before all others, until both directions have ended. After any other end the application's connection is to
/// be dropped, and is reset by that.
pub async fn relay(
    application: &mut TcpStream,
    send: SendStream<Bytes>,
    receive: RecvStream,
    first: Bytes,
    unread: &Arc<Unread>,
) -> (Result<(), Cut>, Moved) {
    let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut send = ResetOnDrop(Some(send));
    let receive = Receive { stream: receive, share: Share::new(unread), waiting: None };
    let outcome = both(application, &mut send, receive, first, (&sent, &received)).await;
    match outcome {
        Ok(()) => send.0 = None,
        Err(_) => reset_on_drop(application),
    }
    (outcome, Moved { sent: sent.into_inner(), received: received.into_inner() })
}

/// A stream that has not ended in order, also when its relay is dropped in the middle. Left to itself, h2 would reset it in the
/// way that peers take for an end.
struct ResetOnDrop(Option<SendStream<Bytes>>);

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        if let Some(send) = &mut self.0 {
            // RFC 9113, section 8.5: what a reset of the TCP connection is for the peer.
            send.send_reset(Reason::CONNECT_ERROR);
        }
    }
}

/// What comes for the application.
struct Receive {
    stream: RecvStream,
    share: Share,
    /// What has come while the application did not read. In a box: mostly there is nothing.
    waiting: Option<Box<Waiting>>,
}

type Came = Option<Result<Bytes, h2::Error>>;

#[derive(Default)]
struct Waiting {
    bytes: VecDeque<Bytes>,
    /// Small pieces, after all others: each for itself would take more memory than it holds.
    small: BytesMut,
    /// What has come after them, if that was the last.
    end: Option<Came>,
}

impl Waiting {
    fn push(&mut self, bytes: Bytes) {
        if bytes.len() < SMALL {
            self.small.extend_from_slice(&bytes);
        }
        if !self.small.is_empty() && (bytes.len() >= SMALL || self.small.len() >= LARGE) {
            self.bytes.push_back(self.small.split().freeze());
        }
        if bytes.len() >= SMALL {
            self.bytes.push_back(bytes);
        }
    }

    fn pop(&mut self) -> Option<Bytes> {
        self.bytes.pop_front().or_else(|| (!self.small.is_empty()).then(|| self.small.split().freeze()))
    }
}

impl Receive {
    async fn next(&mut self) -> Came {
        let Some(waiting) = &mut self.waiting else { return self.stream.data().await };
        if let Some(bytes) = waiting.pop() {
            return Some(Ok(bytes));
        }
        match self.waiting.take().and_then(|waiting| waiting.end) {
            Some(end) => end,
            None => self.stream.data().await,
        }
    }

    /// Tells how much of it lies here.
    fn tell(&mut self) {
        self.share.set(self.stream.flow_control().used_capacity());
    }

    /// The application did not take all at once: until it has, what comes is counted.
    async fn deliver(&mut self, application: &WriteHalf<'_>, mut bytes: &[u8]) -> io::Result<()> {
        self.tell();
        while !bytes.is_empty() {
            let waiting = self.waiting.get_or_insert_default();
            tokio::select! {
                biased;
                ready = application.writable() => match ready.and_then(|()| application.try_write(bytes)) {
                    Ok(written) => bytes = &bytes[written..],
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                },
                came = self.stream.data(), if waiting.end.is_none() => {
                    match came {
                        Some(Ok(bytes)) => waiting.push(bytes),
                        end => waiting.end = Some(end),
                    }
                    self.tell();
                }
            }
        }
        Ok(())
    }

    /// The application has taken so much: only now may the peer send as much again.
    fn taken(&mut self, length: usize) -> Result<(), Cut> {
        self.stream.flow_control().release_capacity(length).map_err(tunnel)?;
        if self.share.is_some() {
            self.tell();
        }
        Ok(())
    }
}

async fn both(
    application: &mut TcpStream,
    send: &mut ResetOnDrop,
    receive: Receive,
    first: Bytes,
    (sent, received): (&AtomicU64, &AtomicU64),
) -> Result<(), Cut> {
    let Some(send) = &mut send.0 else { return Err(Cut::Reset) };
    if !first.is_empty() {
        sent.fetch_add(first.len() as u64, Relaxed);
        // Little enough to wait in HTTP/2 for its window.
        send.send_data(first, false).map_err(tunnel)?;
    }
    // tokio's halves borrow, so the errors of the socket are seen through the reading one.
    let (read, write) = application.split();
    let watched: &TcpStream = read.as_ref();
    let (up, down) = (pin!(up(watched, send, sent)), pin!(down(write, receive, received)));
    let reset = pin!(async { Cut::Application(failed(watched).await) });
    relay::both(up, down, reset, pin!(pending())).await
}

async fn up(application: &TcpStream, send: &mut SendStream<Bytes>, sent: &AtomicU64) -> Result<(), Cut> {
    let mut size = SMALL;
    loop {
        tokio::select! {
            ready = readable(application) => ready.map_err(Cut::Application)?,
            reset = poll_fn(|cx| send.poll_reset(cx)) => return stopped(reset),
        }
        send.reserve_capacity(size);
        while send.capacity() == 0 {
            tokio::select! {
                capacity = poll_fn(|cx| send.poll_capacity(cx)) => match capacity {
                    Some(Ok(_bytes)) => {}
                    Some(Err(error)) => return Err(tunnel(error)),
                    None => return Err(Cut::Reset),
                },
                error = failed(application) => return Err(Cut::Application(error)),
            }
        }
        let room = send.capacity().min(size);
        let mut buffer = BytesMut::with_capacity(room);
        let mut limited = bytes::BufMut::limit(&mut buffer, room);
        match application.try_read_buf(&mut limited) {
            Ok(0) => {
                send.reserve_capacity(0);
                return send.send_data(Bytes::new(), true).map_err(tunnel);
            }
            Ok(read) => {
                busy_poll::came(application, read);
                send.send_data(buffer.freeze(), false).map_err(tunnel)?;
                sent.fetch_add(read as u64, Relaxed);
                size = if read == room { LARGE } else { SMALL };
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Cut::Application(error)),
        }
    }
}

async fn down(mut application: WriteHalf<'_>, mut receive: Receive, received: &AtomicU64) -> Result<(), Cut> {
    loop {
        match receive.next().await {
            Some(Ok(bytes)) => {
                let written = match application.try_write(&bytes) {
                    Ok(written) => written,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                    Err(error) => return Err(Cut::Application(error)),
                };
                if written < bytes.len() {
                    // In a box: an idle stream has no use for it.
                    let rest = &bytes[written..];
                    Box::pin(receive.deliver(&application, rest)).await.map_err(Cut::Application)?;
                }
                received.fetch_add(bytes.len() as u64, Relaxed);
                receive.taken(bytes.len())?;
            }
            // ztunnel ends streams so when its application has gone in order.
            Some(Err(error)) if is_end(error.reason()) => break,
            Some(Err(error)) => return Err(tunnel(error)),
            None => break,
        }
    }
    application.shutdown().await.map_err(Cut::Application)
}

fn is_end(reason: Option<Reason>) -> bool {
    matches!(reason, Some(Reason::NO_ERROR | Reason::CANCEL))
}

/// The peer takes no more of what the application says.
fn stopped(reset: Result<Reason, h2::Error>) -> Result<(), Cut> {
    match reset {
        Ok(reason) if is_end(Some(reason)) => Ok(()),
        Ok(_reason) => Err(Cut::Reset),
        Err(error) => Err(tunnel(error)),
    }
}

fn tunnel(error: h2::Error) -> Cut {
    if error.is_reset() { Cut::Reset } else { Cut::Tunnel(io::Error::other(error)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pieces_lie_together_and_all_keep_their_order() {
        let mut waiting = Waiting::default();
        let (mut sent, mut pieces) = (Vec::new(), 0);
        for number in 0..200_000_usize {
            // Now and then a large one.
            let length = if number % 50_000 == 49_999 { LARGE } else { 1 };
            let piece = vec![number as u8; length];
            sent.extend_from_slice(&piece);
            waiting.push(Bytes::from(piece));
        }
        let mut heard = Vec::new();
        while let Some(bytes) = waiting.pop() {
            heard.extend_from_slice(&bytes);
            pieces += 1;
        }
        assert!(heard == sent && pieces < 20, "{pieces} pieces");
    }
}
