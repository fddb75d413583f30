//! Connections to the control plane: TLS 1.3 and HTTP/2 only, authenticated by this node's certificate or by a token.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::sign::SingleCertAndKey;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::Request;
use tonic::codegen::Service;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};

use super::answer::{self, Bundle};
use super::store::{OwnCertificate, Store};
use crate::config::{NodeConfig, ServerConfig};

/// For name lookup, TCP and TLS together.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer that vanished is noticed after interval and timeout.
pub(crate) const PING_INTERVAL: Duration = Duration::from_secs(30);
pub(crate) const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// No token and no bundle is as large.
const FILE_LIMIT: u64 = 1 << 20;
const H2: &[u8] = b"h2";

/// How to reach one server of the control plane, and as whom.
#[derive(Debug)]
pub struct Access {
    server: ServerConfig,
    node: MetadataValue<Ascii>,
    cluster: MetadataValue<Ascii>,
    own: Arc<Store>,
    refusals: AtomicU64,
}

/// Why there is no connection. Everything but `Unreachable` may be due to the credential.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// A file that a flag names cannot be used.
    #[error("{flag}: {path}: {reason}")]
    File {
        /// The flag.
        flag: &'static str,
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Nobody there.
    #[error("connect: {0}")]
    Unreachable(io::Error),
    /// Somebody there, but not whom the roots vouch for, or not for long.
    #[error("TLS: {0}")]
    Tls(io::Error),
    /// TLS works, HTTP/2 does not.
    #[error("HTTP/2: {0}")]
    Http(String),
}

impl Access {
    /// To `server`, for `node`, with the node's certificate once there is one in `own`.
    pub fn new(server: ServerConfig, node: &NodeConfig, own: Arc<Store>) -> Self {
        // Names that are no header values are refused with the flags already.
        let value = |text: &str| text.parse().unwrap_or_else(|_odd| MetadataValue::from_static("unknown"));
        let (node, cluster) = (value(&node.name), value(&node.cluster_id));
        Self { server, node, cluster, own, refusals: AtomicU64::new(0) }
    }

    /// The URL.
    pub fn address(&self) -> &Uri {
        &self.server.address
    }

    /// Times that the server did not take the credential.
    pub fn refusals(&self) -> u64 {
        self.refusals.load(Ordering::Relaxed)
    }

    /// Counts such a time.
    pub(crate) fn count_refusal(&self) {
        self.refusals.fetch_add(1, Ordering::Relaxed);
    }

    /// The node's certificate, if there is one and `choice` is for it.
    pub fn credential(&self, choice: &Choice) -> Option<OwnCertificate> {
        self.own.node(SystemTime::now()).filter(|own| choice.trusts(own.serial))
    }

    /// Wakes whoever waits when [`Access::credential`] may have another one to give.
    pub fn renewed(&self) -> watch::Receiver<()> {
        self.own.renewed()
    }

    /// Connects, with that certificate or none.
    pub async fn connect(self: &Arc<Self>, own: Option<&OwnCertificate>) -> Result<Link, AccessError> {
        let stream = self.secured(own).await?;
        let once = Once(Arc::new(Mutex::new(Some(TokioIo::new(stream)))));
        let channel = self.endpoint()?.connect_with_connector(once).await;
        let channel = channel.map_err(|error| AccessError::Http(chain(&error)))?;
        Ok(Link { access: Arc::clone(self), channel, used: own.map(|own| own.serial) })
    }

    async fn secured(&self, own: Option<&OwnCertificate>) -> Result<TlsStream<TcpStream>, AccessError> {
        let config = self.tls(own).await?;
        let uri = &self.server.address;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(443)));
        let stream = in_time(deadline, stream).await.map_err(AccessError::Unreachable)?;
        stream.set_nodelay(true).map_err(AccessError::Unreachable)?;
        let name = self.server.name.clone();
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream);
        let stream = in_time(deadline, stream).await.map_err(AccessError::Tls)?;
        if stream.get_ref().1.alpn_protocol() != Some(H2) {
            return Err(AccessError::Http("the server does not speak it (no h2 by ALPN)".to_owned()));
        }
        Ok(stream)
    }

    /// The roots are read each time, so that a rotated file is in force with the next connection.
    async fn tls(&self, own: Option<&OwnCertificate>) -> Result<ClientConfig, AccessError> {
        const FLAG: &str = "--control-plane-root";
        let path = &self.server.root;
        let unusable = |reason: String| file_error(FLAG, path, reason);
        let text = read(FLAG, path).await?;
        let roots = answer::certificates(&text).map_err(unusable)?;
        let roots = Bundle::new(roots).map_err(|error| unusable(error.to_string()))?;
        let versions = ClientConfig::builder_with_provider(answer::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| AccessError::Tls(io::Error::other(error)))?;
        let builder = versions.with_root_certificates(roots.store);
        let mut config = match own {
            Some(own) => {
                let resolver = SingleCertAndKey::from(Arc::clone(&own.certified));
                builder.with_client_cert_resolver(Arc::new(resolver))
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![H2.to_vec()];
        // A session that is resumed would keep the credential of the one before.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }

    fn endpoint(&self) -> Result<Endpoint, AccessError> {
        let mut parts = self.server.address.clone().into_parts();
        // Requests say https; towards the library the connection is plain, since TLS is done here.
        parts.scheme = Some(hyper::http::uri::Scheme::HTTP);
        let plain = Uri::from_parts(parts).map_err(|error| AccessError::Http(error.to_string()))?;
        Ok(Endpoint::from(plain)
            .origin(self.server.address.clone())
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true))
    }

    async fn token(&self) -> Result<Option<MetadataValue<Ascii>>, AccessError> {
        const FLAG: &str = "--token-file";
        let Some(path) = &self.server.token else { return Ok(None) };
        let unusable = |reason: &str| file_error(FLAG, path, reason.to_owned());
        let text = read(FLAG, path).await?;
        let token = text.trim_ascii();
        if token.is_empty() {
            return Err(unusable("holds no token"));
        }
        let header = MetadataValue::try_from([b"Bearer ", token].concat());
        let mut header = header.map_err(|_invalid| unusable("holds what cannot be in a header"))?;
        header.set_sensitive(true);
        Ok(Some(header))
    }
}

/// A connection, and what has to be said on it.
#[derive(Debug, Clone)]
pub struct Link {
    access: Arc<Access>,
    /// The connection. It is not made anew when it has broken.
    pub channel: Channel,
    /// The serial of the node's certificate that it was made with.
    pub used: Option<u64>,
}

impl Link {
    /// A request with the headers that say who asks. The token is read anew, and is sent only where no certificate speaks.
    pub async fn request<T>(&self, message: T) -> Result<Request<T>, AccessError> {
        let mut request = Request::new(message);
        let headers = request.metadata_mut();
        if self.used.is_none()
            && let Some(token) = self.access.token().await?
        {
            headers.insert("authorization", token);
        }
        headers.insert("clusterid", self.access.cluster.clone());
        headers.insert("mesh-node", self.access.node.clone());
        Ok(request)
    }
}

/// Whether to go by certificate or by token. Pure.
///
/// By certificate, unless the last attempt with it failed: in TLS 1.3 a server refuses a client's certificate after the
/// handshake, by breaking the connection, which looks like any other failure. Then the token is tried; if that works, it stays
/// until there is another certificate, and if not, it was not the certificate's fault.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    suspect: Option<u64>,
    refused: Option<u64>,
}

impl Choice {
    /// Whether that certificate is to be used.
    pub fn trusts(&self, serial: u64) -> bool {
        self.suspect != Some(serial) && self.refused != Some(serial)
    }

    /// The server took the credential. Whether that shows that it refuses the certificate.
    pub fn succeeded(&mut self, used: Option<u64>) -> bool {
        match (used, self.suspect.take()) {
            (None, Some(suspect)) => {
                self.refused = Some(suspect);
                true
            }
            (None, None) | (Some(_), _) => false,
        }
    }

    /// An attempt failed, in a way that may be due to the credential.
    pub fn failed(&mut self, used: Option<u64>) {
        self.suspect = used;
        if used.is_none() {
            // The token is no better.
            self.refused = None;
        }
    }
}

/// Gives out one stream that is open already.
struct Once(Arc<Mutex<Option<TokioIo<TlsStream<TcpStream>>>>>);

impl Service<Uri> for Once {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let stream = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        std::future::ready(
            stream.ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the connection is gone")),
        )
    }
}

async fn in_time<T>(deadline: Instant, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late =
        |_elapsed| io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {CONNECT_TIMEOUT:?}"));
    tokio::time::timeout_at(deadline, work).await.map_err(late)?
}

async fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, AccessError> {
    use tokio::io::AsyncReadExt;
    let text = async {
        let mut text = Vec::new();
        tokio::fs::File::open(path).await?.take(FILE_LIMIT).read_to_end(&mut text).await?;
        Ok(text)
    };
    text.await.map_err(|error: io::Error| file_error(flag, path, error.to_string()))
}

fn file_error(flag: &'static str, path: &Path, reason: String) -> AccessError {
    AccessError::File { flag, path: path.display().to_string(), reason }
}

/// What a server said, or why it could not: for people.
pub(crate) fn describe(status: &tonic::Status) -> String {
    let source = std::error::Error::source(status).map(|source| format!(" ({})", chain(source)));
    format!("{}: {}{}", status.code(), status.message(), source.unwrap_or_default())
}

/// An error and its causes: the outermost of a failed connection only says "transport error".
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
