//! A secured connection as a stream of bytes, for HTTP/2.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::connection::Tls;
use super::record::{HEADER, MAX_PLAINTEXT, OVERHEAD};
use super::session::{Event, TlsError};
use crate::proxy::busy_poll;

/// Records taken in one read, and sealed for one write.
const RECORDS: usize = 4;
const BUFFER: usize = RECORDS * (MAX_PLAINTEXT + OVERHEAD);

/// A secured connection that is read and written.
pub struct TlsIo {
    tls: Tls,
    /// Opened bytes in `tls.received` that nobody has read yet.
    plain: std::ops::Range<usize>,
    /// Where in `tls.received` the next record begins.
    next: usize,
    /// Sealed; sent up to `sent`.
    sealed: Vec<u8>,
    sent: usize,
    closed: Closed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Closed {
    read: bool,
    written: bool,
}

impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

impl TlsIo {
    /// Reads and writes `tls`.
    pub fn new(tls: Tls) -> Self {
        Self { tls, plain: 0..0, next: 0, sealed: Vec::new(), sent: 0, closed: Closed::default() }
    }

    /// The connection.
    pub fn tls(&self) -> &Tls {
        &self.tls
    }

    /// The connection, when nothing is on its way in either direction.
    #[cfg(test)]
    pub(super) fn into_tls(self) -> Tls {
        assert!(self.plain.is_empty() && self.sealed.is_empty());
        self.tls
    }

    fn poll_flush_sealed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.sealed.len() {
            let tcp = Pin::new(&mut self.tls.tcp);
            match ready!(tcp.poll_write(cx, &self.sealed[self.sent..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.sent += written,
            }
        }
        // Idle connections hold no buffer.
        self.sealed = Vec::new();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }

    /// Opens records until one has data. True: there is some; false: the peer sends no more.
    fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        loop {
            if self.closed.read {
                return Poll::Ready(Ok(false));
            }
            if let Some((total, event)) = self.tls.reader.open(&mut self.tls.received[self.next..])? {
                let at = self.next;
                self.next += total;
                match event {
                    Event::Data(range) => {
                        self.plain = at + range.start..at + range.end;
                        return Poll::Ready(Ok(true));
                    }
                    Event::Nothing => {}
                    Event::Closed => self.closed.read = true,
                }
                continue;
            }
            self.tls.received.drain(..self.next);
            self.next = 0;
            ready!(self.poll_receive(cx))?;
        }
    }

    /// Adds to `tls.received`.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Tls { tcp, received, .. } = &mut self.tls;
        loop {
            ready!(tcp.poll_read_ready(cx))?;
            received.reserve(BUFFER.saturating_sub(received.len()).max(MAX_PLAINTEXT));
            match tcp.try_read_buf(received) {
                // Without an alert before: somebody may have cut it.
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => {
                    busy_poll::came(tcp, read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // Idle connections hold no buffer.
                    received.shrink_to_fit();
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncRead for TlsIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.plain.is_empty() && !ready!(this.poll_open(cx))? {
            return Poll::Ready(Ok(()));
        }
        let take = this.plain.len().min(into.remaining());
        into.put_slice(&this.tls.received[this.plain.start..this.plain.start + take]);
        this.plain.start += take;
        if this.plain.is_empty() && this.next == this.tls.received.len() {
            this.tls.received.clear();
            (this.next, this.plain) = (0, 0..0);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TlsIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(from)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_flush_sealed(cx))?;
        if let Some(record) = this.tls.writer.due()? {
            this.sealed.extend_from_slice(&record);
        }
        let mut taken = 0;
        let mut slices = from.iter().map(|slice| &slice[..]).filter(|slice| !slice.is_empty());
        let mut slice = slices.next();
        for _record in 0..RECORDS {
            let start = this.sealed.len();
            this.sealed.extend_from_slice(&[0; HEADER]);
            let mut room = MAX_PLAINTEXT;
            while let Some(bytes) = slice.filter(|_| room > 0) {
                let (now, later) = bytes.split_at(bytes.len().min(room));
                this.sealed.extend_from_slice(now);
                room -= now.len();
                slice = if later.is_empty() { slices.next() } else { Some(later) };
            }
            let length = MAX_PLAINTEXT - room;
            if length == 0 {
                this.sealed.truncate(start);
                break;
            }
            this.sealed.resize(start + length + OVERHEAD, 0);
            this.tls.writer.seal(&mut this.sealed[start..], length)?;
            taken += length;
        }
        // What is sealed counts as written; what the socket does not take now goes before the next.
        match this.poll_flush_sealed(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(taken)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_flush_sealed(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_flush_sealed(cx))?;
        if !this.closed.written {
            this.closed.written = true;
            this.sealed = this.tls.writer.close()?;
            ready!(this.poll_flush_sealed(cx))?;
        }
        Pin::new(&mut this.tls.tcp).poll_shutdown(cx)
    }
}
