//! Both ends of a tunnel, made by the test instead of a node's proxy: with any certificate, and taking any.
//! Byte by byte: `docs/stream-protocol.md`.

use std::io::{self, BufRead, ErrorKind, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_harness::{Pod, until};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::SingleCertAndKey;
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, Connection, DigitallySignedStruct, ServerConfig,
    ServerConnection, SignatureScheme, version,
};

use crate::authority::Credential;

/// Where the proxy of a pod takes tunnels.
pub const PORT: u16 = 15008;
const PROTOCOL: &[u8] = b"mesh-stream/1";
/// How long any step may take.
const PATIENCE: Duration = Duration::from_secs(5);

const DATA: u8 = 0;
const REQUEST: u8 = 1;
const ACCEPTED: u8 = 2;
const END: u8 = 4;
const DRAIN: u8 = 6;

/// One end of a tunnel.
#[derive(Debug)]
pub struct Tunnel {
    tls: Connection,
    tcp: TcpStream,
}

/// What a client makes tunnels with; it remembers sessions, as a proxy does.
pub fn client(credential: &Credential) -> anyhow::Result<Arc<ClientConfig>> {
    let resolver = Arc::new(SingleCertAndKey::from(Arc::clone(&credential.certified)));
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        .with_client_cert_resolver(resolver);
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    config.enable_sni = false;
    Ok(Arc::new(config))
}

impl Tunnel {
    /// Makes one from `pod`'s network. In TLS 1.3 a client is done before the server has judged it.
    pub fn dial(pod: &Pod, to: SocketAddr, config: &Arc<ClientConfig>) -> anyhow::Result<Self> {
        let tcp = pod.netns().run(|| Ok(TcpStream::connect_timeout(&to, PATIENCE)?))?;
        let connection = ClientConnection::new(Arc::clone(config), ServerName::from(to.ip()))?;
        let mut tunnel = Self::over(tcp, connection.into())?;
        tunnel.shake()?;
        Ok(tunnel)
    }

    fn over(tcp: TcpStream, tls: Connection) -> io::Result<Self> {
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        tcp.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { tls, tcp })
    }

    fn shake(&mut self) -> io::Result<()> {
        while self.tls.is_handshaking() {
            self.tls.complete_io(&mut self.tcp)?;
        }
        Ok(())
    }

    /// Whether the session was one from before.
    pub fn is_resumed(&self) -> bool {
        self.tls.handshake_kind() == Some(rustls::HandshakeKind::Resumed)
    }

    /// Asks for a stream to `to` and says `data` on it, without waiting for an answer.
    pub fn request(&mut self, to: SocketAddr, data: &[u8]) -> io::Result<()> {
        let mut request = vec![REQUEST];
        match to.ip() {
            IpAddr::V4(v4) => request.extend([&[4][..], &v4.octets()].concat()),
            IpAddr::V6(v6) => request.extend([&[6][..], &v6.octets()].concat()),
        }
        request.extend(to.port().to_be_bytes());
        // Who the client is, is not told.
        request.push(0);
        self.say(&request)?;
        self.say_on(data)
    }

    /// The whole: a stream with `data`, and the first bytes that are answered.
    pub fn converse(&mut self, to: SocketAddr, data: &[u8]) -> io::Result<Vec<u8>> {
        // Whoever refuses us may have gone; what it said before it went is to be heard.
        let said = self.request(to, data);
        match self.hear()?.as_deref() {
            Some([ACCEPTED]) => said?,
            other => return Err(io::Error::other(format!("not accepted: {other:?}"))),
        }
        self.hear_data()
    }

    /// Says more on the stream.
    pub fn say_on(&mut self, data: &[u8]) -> io::Result<()> {
        self.say(&[&[DATA], data].concat())
    }

    /// The next bytes of the stream.
    pub fn hear_data(&mut self) -> io::Result<Vec<u8>> {
        match self.hear()?.as_deref() {
            Some([DATA, data @ ..]) => Ok(data.to_vec()),
            other => Err(io::Error::other(format!("no data: {other:?}"))),
        }
    }

    /// One message: one record.
    fn say(&mut self, message: &[u8]) -> io::Result<()> {
        self.tls.writer().write_all(message)?;
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.tcp)?;
        }
        Ok(())
    }

    /// One message: one record; none: the end.
    fn hear(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            match self.tls.reader().fill_buf() {
                Ok([]) => return Ok(None),
                Ok(record) => {
                    let message = record.to_vec();
                    self.tls.reader().consume(message.len());
                    return Ok(Some(message));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            self.tls.read_tls(&mut self.tcp)?;
            let processed = self.tls.process_new_packets();
            // What is wrong with the records says more than that nobody takes an answer any more.
            let flushed = self.flush();
            processed.map_err(io::Error::other)?;
            flushed?;
        }
    }

    /// Ends it in order.
    pub fn close(mut self) -> io::Result<()> {
        self.tls.send_close_notify();
        self.flush()
    }
}

/// The alert that says why the other end has ended a tunnel.
pub fn alert(error: &io::Error) -> Option<AlertDescription> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    if let rustls::Error::AlertReceived(alert) = error { Some(*alert) } else { None }
}

/// A server in a pod that takes tunnels from anybody, with any certificate, and answers like `mesh-peer tcp-echo`.
#[derive(Debug)]
pub struct Impostor {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    config: Mutex<Arc<ServerConfig>>,
    heard: Mutex<Heard>,
    /// Connections that have not ended yet.
    open: AtomicUsize,
}

/// What an [`Impostor`] has heard.
#[derive(Debug, Clone, Default)]
pub struct Heard {
    /// Connections.
    pub connections: u64,
    /// Handshakes that the client has completed.
    pub handshakes: u64,
    /// Why the others were not completed.
    pub refusals: Vec<String>,
    /// Bytes inside TLS, whatever they are.
    pub bytes: u64,
    /// What the application has said.
    pub said: Vec<u8>,
}

impl Impostor {
    /// At the port of tunnels of both addresses of `pod`; it ends with the test.
    pub fn start(pod: &Pod, name: &str, credential: &Credential) -> anyhow::Result<Self> {
        let address = SocketAddr::new(IpAddr::from([0_u16; 8]), PORT);
        let listener = pod.netns().run(|| Ok(TcpListener::bind(address)?))?;
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            config: Mutex::new(server(credential)?),
            heard: Mutex::default(),
            open: AtomicUsize::new(0),
        });
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || serving.serve(&listener));
        Ok(Self { shared })
    }

    /// Presents another certificate from now on.
    pub fn present(&self, credential: &Credential) -> anyhow::Result<()> {
        *self.shared.config.lock().unwrap_or_else(PoisonError::into_inner) = server(credential)?;
        Ok(())
    }

    /// What it has heard since it was asked last, once all connections have ended.
    pub fn heard(&self) -> anyhow::Result<Heard> {
        until("the impostor's connections have ended", PATIENCE, || {
            let open = self.shared.open.load(Ordering::Acquire);
            anyhow::ensure!(open == 0, "{open} have not");
            Ok(())
        })?;
        Ok(std::mem::take(&mut *self.shared.heard()))
    }
}

impl Shared {
    fn serve(self: Arc<Self>, listener: &TcpListener) {
        while let Ok((tcp, _)) = listener.accept() {
            self.open.fetch_add(1, Ordering::Relaxed);
            self.heard().connections += 1;
            let here = Arc::clone(&self);
            std::thread::spawn(move || {
                // How it ends is the client's affair; what was heard is noted by then.
                drop(here.tunnel(tcp));
                here.open.fetch_sub(1, Ordering::Release);
            });
        }
    }

    fn heard(&self) -> std::sync::MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tunnel(&self, tcp: TcpStream) -> anyhow::Result<()> {
        let config = Arc::clone(&self.config.lock().unwrap_or_else(PoisonError::into_inner));
        let mut tunnel = Tunnel::over(tcp, ServerConnection::new(config)?.into())?;
        if let Err(error) = tunnel.shake() {
            let refusal = alert(&error).map_or_else(|| error.to_string(), |alert| format!("{alert:?}"));
            self.heard().refusals.push(refusal);
            return Err(error.into());
        }
        self.heard().handshakes += 1;
        let mut line = Vec::new();
        while let Some(message) = tunnel.hear()? {
            self.heard().bytes += message.len() as u64;
            match &message[..] {
                [REQUEST, ..] => tunnel.say(&[ACCEPTED])?,
                [DATA, said @ ..] => {
                    self.heard().said.extend(said);
                    line.extend(said);
                    if line.ends_with(b"\n") {
                        line.clear();
                        tunnel.say(&[&[DATA], format!("{} [::]:0\n", self.name).as_bytes()].concat())?;
                    }
                }
                // One stream, so that the next one meets the certificate of then; a request that crosses this knows that it was not taken.
                [END] => {
                    tunnel.say(&[END])?;
                    tunnel.say(&[DRAIN])?;
                    break;
                }
                other => anyhow::bail!("{other:?}"),
            }
        }
        Ok(tunnel.close()?)
    }
}

fn server(credential: &Credential) -> anyhow::Result<Arc<ServerConfig>> {
    let resolver = Arc::new(SingleCertAndKey::from(Arc::clone(&credential.certified)));
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    // A session that is resumed would show no certificate.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Believes anybody.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
