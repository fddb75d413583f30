//! A connection that ends by itself when it has done nothing for too long.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};
use tonic::{Request, transport::server::Connected};

use super::{Place, Serving};

/// The other end of a connection, for the requests on it.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    /// What it has shown in the handshake.
    pub(crate) certificates: Option<Arc<Vec<CertificateDer<'static>>>>,
    pub(crate) place: Arc<Place>,
}

impl Peer {
    /// Who has sent a request.
    pub(crate) fn of<T>(request: &Request<T>) -> Option<&Self> {
        request.extensions().get()
    }

    /// The address of who has sent a request.
    pub(crate) fn address_of<T>(request: &Request<T>) -> String {
        Self::of(request).map(|peer| peer.address.to_string()).unwrap_or_default()
    }

    /// Notes that a request is accepted; to be kept for as long as it is answered.
    pub(crate) fn serve<T>(request: &Request<T>) -> Option<Serving> {
        Self::of(request).map(|peer| peer.place.serve())
    }
}

/// A connection in its place.
pub(crate) struct Carried<S> {
    stream: S,
    peer: Peer,
    /// When it is to be asked whether it may go on.
    timer: Pin<Box<Sleep>>,
    /// Completes when it has to make room.
    crowded: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// Why it may not any more.
    over: Option<&'static str>,
}

impl<S> Carried<S> {
    pub(crate) fn new(stream: S, peer: Peer) -> Self {
        let place = Arc::clone(&peer.place);
        let crowded = Box::pin(async move { place.crowded().await });
        Self { stream, peer, timer: Box::pin(sleep(Duration::ZERO)), crowded, over: None }
    }

    fn end(&mut self, reason: &'static str) {
        let metrics = &self.peer.place.connections.metrics;
        metrics.ended_connections.with_label_values(&[reason]).inc();
        self.over = Some(reason);
    }

    /// Fails once it may not go on.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if self.over.is_none() && self.crowded.as_mut().poll(context).is_ready() {
            self.end("crowded");
        }
        while self.over.is_none() && self.timer.as_mut().poll(context).is_ready() {
            match self.peer.place.left(Instant::now()) {
                Ok(left) => self.timer.as_mut().reset(tokio::time::Instant::now() + left),
                Err(reason) => self.end(reason),
            }
        }
        self.over.map_or(Ok(()), |reason| Err(io::Error::new(io::ErrorKind::TimedOut, reason)))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Carried<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Carried<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        // Who does not read what it is sent is not read from either.
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

impl<S> Connected for Carried<S> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}
