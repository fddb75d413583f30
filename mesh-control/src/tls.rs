//! The TLS port: handshakes beside each other, each with an end, and none in the way of others.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::AbortHandle,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tracing::debug;

use crate::{
    connections::{Carried, Connections, Full, Peer, Place},
    keeper::InForce,
};

const H2: &[u8] = b"h2";

/// Connections whose handshake is done.
pub(crate) type Incoming<S> = ReceiverStream<io::Result<Carried<S>>>;

/// Accepts connections until the returned stream is dropped; to be run as a task.
pub(crate) fn accept(
    listener: TcpListener,
    in_force: watch::Receiver<Arc<InForce>>,
    connections: Arc<Connections>,
) -> (Incoming<TlsStream<TcpStream>>, impl Future<Output = ()>) {
    let (done, incoming) = mpsc::channel(1);
    let accepting = async move {
        let mut running: Vec<AbortHandle> = Vec::new();
        while let Some((stream, from, place)) = next(&listener, &connections, done.closed()).await {
            running.retain(|handshake| !handshake.is_finished());
            let acceptor = TlsAcceptor::from(Arc::clone(&in_force.borrow().tls));
            let (done, connections) = (done.clone(), Arc::clone(&connections));
            let handshake = async move {
                let failed =
                    |reason| connections.metrics.failed_handshakes.with_label_values(&[reason]).inc();
                let shaken = tokio::select! {
                    shaken = shake(acceptor, stream, from, connections.bounds.strange) => shaken,
                    () = place.crowded() => Err("crowded"),
                };
                match shaken {
                    Ok(stream) => {
                        let certificates = stream.get_ref().1.peer_certificates();
                        // One that is shown and not good has ended the handshake.
                        place.greet(Instant::now(), certificates.is_some_and(|shown| !shown.is_empty()));
                        let certificates = certificates.map(|shown| {
                            Arc::new(shown.iter().map(|one| one.clone().into_owned()).collect::<Vec<_>>())
                        });
                        let peer = Peer { address: from, certificates, place };
                        // Nobody takes connections any more when the control plane stops.
                        done.send(Ok(Carried::new(stream, peer))).await.unwrap_or_default();
                    }
                    Err(reason) => failed(reason),
                }
            };
            running.push(tokio::spawn(handshake).abort_handle());
        }
        running.iter().for_each(AbortHandle::abort);
    };
    (ReceiverStream::new(incoming), accepting)
}

/// As [`accept`], without TLS and for callers who need not authenticate.
pub(crate) fn accept_plain(
    listener: TcpListener,
    connections: Arc<Connections>,
) -> (Incoming<TcpStream>, impl Future<Output = ()>) {
    let (done, incoming) = mpsc::channel(1);
    let accepting = async move {
        while let Some((stream, address, place)) = next(&listener, &connections, done.closed()).await {
            if stream.set_nodelay(true).is_ok() {
                let carried = Carried::new(stream, Peer { address, certificates: None, place });
                done.send(Ok(carried)).await.unwrap_or_default();
            }
        }
    };
    (ReceiverStream::new(incoming), accepting)
}

/// The next connection for which there is a place; none when nobody takes connections any more.
async fn next(
    listener: &TcpListener,
    connections: &Arc<Connections>,
    closed: impl Future<Output = ()>,
) -> Option<(TcpStream, SocketAddr, Arc<Place>)> {
    tokio::pin!(closed);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut closed => return None,
        };
        match accepted {
            Ok((stream, from)) => match connections.enter(from, Instant::now()) {
                Ok(place) => return Some((stream, from, place)),
                Err(Full) => {
                    debug!(%from, "no place for a connection");
                    connections.metrics.refused_connections.with_label_values(&[connections.port]).inc();
                }
            },
            Err(error) => {
                // Out of descriptors, say: trying again at once would only burn time.
                let crowded = is_out_of_room(&error) && connections.make_room();
                debug!(%error, crowded, "accepting a connection");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Whether there would be a place if others went.
fn is_out_of_room(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

async fn shake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    from: SocketAddr,
    time: Duration,
) -> Result<TlsStream<TcpStream>, &'static str> {
    stream.set_nodelay(true).map_err(|_gone| "gone")?;
    match timeout(time, acceptor.accept(stream)).await {
        Ok(Ok(stream)) if stream.get_ref().1.alpn_protocol() == Some(H2) => Ok(stream),
        Ok(Ok(_)) => Err("no_h2"),
        Ok(Err(error)) => {
            let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
            debug!(peer = %from, %error, "handshake");
            Err(match tls {
                Some(rustls::Error::InvalidCertificate(_)) => "certificate",
                Some(_) => "protocol",
                None => "gone",
            })
        }
        Err(_elapsed) => Err("timeout"),
    }
}
