//! The TLS port: handshakes beside each other, each with an end, and none in the way of others.

use std::{collections::VecDeque, io, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::AbortHandle,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tracing::debug;

use crate::{keeper::InForce, metrics::Metrics};

/// A handshake takes a few round trips.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at a time. One more, and the oldest is given up: it is the least likely to be an honest one.
const MAX_HANDSHAKES: usize = 512;
const H2: &[u8] = b"h2";

/// Connections whose handshake is done.
pub(crate) type Incoming = ReceiverStream<io::Result<TlsStream<TcpStream>>>;

/// Accepts connections until the returned stream is dropped; to be run as a task.
pub(crate) fn accept(
    listener: TcpListener,
    in_force: watch::Receiver<Arc<InForce>>,
    metrics: Arc<Metrics>,
) -> (Incoming, impl Future<Output = ()>) {
    let (done, incoming) = mpsc::channel(1);
    let accepting = async move {
        let mut running: VecDeque<AbortHandle> = VecDeque::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = done.closed() => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, say: trying again at once would only burn time.
                    debug!(%error, "accepting an agent");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            running.retain(|handshake| !handshake.is_finished());
            if running.len() >= MAX_HANDSHAKES
                && let Some(oldest) = running.pop_front()
            {
                oldest.abort();
                metrics.failed_handshakes.with_label_values(&["crowded"]).inc();
            }
            let acceptor = TlsAcceptor::from(Arc::clone(&in_force.borrow().tls));
            let (done, metrics) = (done.clone(), Arc::clone(&metrics));
            let handshake = async move {
                match shake(acceptor, stream).await {
                    // Nobody takes connections any more when the control plane stops.
                    Ok(stream) => done.send(Ok(stream)).await.unwrap_or_default(),
                    Err(reason) => metrics.failed_handshakes.with_label_values(&[reason]).inc(),
                }
            };
            running.push_back(tokio::spawn(handshake).abort_handle());
        }
        running.iter().for_each(AbortHandle::abort);
    };
    (ReceiverStream::new(incoming), accepting)
}

async fn shake(acceptor: TlsAcceptor, stream: TcpStream) -> Result<TlsStream<TcpStream>, &'static str> {
    let peer = stream.peer_addr().map_err(|_gone| "gone")?;
    stream.set_nodelay(true).map_err(|_gone| "gone")?;
    match timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) if stream.get_ref().1.alpn_protocol() == Some(H2) => Ok(stream),
        Ok(Ok(_)) => Err("no_h2"),
        Ok(Err(error)) => {
            let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
            debug!(%peer, %error, "handshake");
            Err(match tls {
                Some(rustls::Error::InvalidCertificate(_)) => "certificate",
                Some(_) => "protocol",
                None => "gone",
            })
        }
        Err(_elapsed) => Err("timeout"),
    }
}
