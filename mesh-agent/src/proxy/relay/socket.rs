//! What a relay does with sockets, beside what tokio offers.

use std::future::poll_fn;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::pin::Pin;
use std::task::{Context, Waker};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::proxy::busy_poll;

/// Waits until there may be something to read. For one who waits at a time: unlike tokio's own future this one is as small as a reference,
/// and there are two of them in every idle connection.
pub(crate) fn readable(tcp: &TcpStream) -> impl Future<Output = io::Result<()>> {
    poll_fn(|cx| tcp.poll_read_ready(cx))
}

/// Lets go of the task that waited last to read: as long as nothing comes, its memory would be kept for being woken.
pub(super) fn wake_nobody(tcp: &TcpStream) {
    // Whether there is something is for the next one to see.
    let _readiness = tcp.poll_read_ready(&mut Context::from_waker(Waker::noop()));
}

/// Reads what is there; none when nothing is.
pub(super) fn read(tcp: &TcpStream, into: &mut [IoSliceMut<'_>]) -> io::Result<Option<usize>> {
    let room: usize = into.iter().map(|slice| slice.len()).sum();
    let mut short = None;
    let read = tcp.try_io(Interest::READABLE, || {
        let read = (&*SockRef::from(tcp)).read_vectored(into)?;
        if read > 0 && read < room {
            // The socket is empty: said so, tokio waits for more without another system call that finds nothing.
            short = Some(read);
            return Err(ErrorKind::WouldBlock.into());
        }
        Ok(read)
    });
    match (read, short) {
        (_, Some(read)) | (Ok(read), None) => {
            busy_poll::came(tcp, read);
            Ok(Some(read))
        }
        (Err(error), None) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        (Err(error), None) if error.kind() == ErrorKind::Interrupted => Ok(None),
        (Err(error), None) => Err(error),
    }
}

/// Reads what is there, whether the event loop has seen it yet or not.
pub(crate) fn read_now(tcp: &TcpStream, into: &mut [IoSliceMut<'_>]) -> io::Result<Option<usize>> {
    match (&*SockRef::from(tcp)).read_vectored(into) {
        Ok(read) => Ok(Some(read)),
        // Where it thought there was something: it waits for more.
        Err(error) if error.kind() == ErrorKind::WouldBlock => read(tcp, into),
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes what fits; none when nothing does.
pub(super) fn write(tcp: &TcpStream, from: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
    match tcp.try_io(Interest::WRITABLE, || (&*SockRef::from(tcp)).write_vectored(from)) {
        Ok(0) => Err(ErrorKind::WriteZero.into()),
        Ok(written) => Ok(Some(written)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Ends what is sent.
pub(super) fn end(tcp: &TcpStream) -> io::Result<()> {
    SockRef::from(tcp).shutdown(Shutdown::Write)
}

/// How waiting for room has ended.
pub(super) enum Room {
    /// There is some, or the socket has failed, which the next write says.
    Some,
    /// The other end of the copy has failed.
    Failed(io::Error),
}

/// Waits until `to` takes more, or `from`, whose bytes are stuck, has failed. In a box of its own: who copies is blocked rarely,
/// but waits for bytes all the time, and that should not take the room of both.
pub(super) fn room<'a>(
    to: &'a TcpStream,
    from: &'a TcpStream,
) -> Pin<Box<dyn Future<Output = Room> + Send + 'a>> {
    Box::pin(async move {
        tokio::select! {
            _ready = to.writable() => Room::Some,
            error = failed(from) => Room::Failed(error),
        }
    })
}

/// Waits until the connection has failed.
pub(crate) async fn failed(tcp: &TcpStream) -> io::Error {
    if let Err(error) = tcp.ready(Interest::ERROR).await {
        return error;
    }
    match tcp.take_error() {
        Ok(Some(error)) | Err(error) => error,
        Ok(None) => ErrorKind::ConnectionReset.into(),
    }
}

/// A connection that has ended in order: what is still to be sent is sent.
pub fn end_on_drop(tcp: &TcpStream) {
    // It fails only for a socket that has no connection.
    drop(SockRef::from(tcp).set_linger(None));
}

/// Lets the peer see a reset, whatever is still to be sent, as soon as the socket is dropped.
pub fn reset_on_drop(tcp: &TcpStream) {
    // It fails only for a socket that has no connection to reset.
    drop(SockRef::from(tcp).set_linger(Some(Duration::ZERO)));
}
