//! The handshake, made by rustls and fed record by record: no byte after it is taken from the record layer.

use std::io;
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::ServerName;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{CommonState, HandshakeKind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::configs::{ConfigError, Configs, Protocol};
use super::connection::Tls;
use super::peer::{NotTrusted, PeerVerifier};
use super::record::HEADER;
use super::secret::{Listener, Secret, Secrets};
use super::session::{Tickets, TlsError, Traffic, split};
use crate::identity::SpiffeId;

/// Most bytes after the header of a record, and those of a whole handshake. A peer that sends more is not one of ours.
const RECORD: usize = (1 << 14) + 256;
const HANDSHAKE: usize = 128 << 10;
const CHUNK: usize = 4096;

/// A connection could not be secured.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// No configuration for the own identity.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The connection.
    #[error("handshake: {0}")]
    Io(#[from] io::Error),
    /// The peer, or what it sent.
    #[error("handshake: {0}")]
    Tls(rustls::Error),
    /// The peer's certificate.
    #[error("handshake: {0}")]
    NotTrusted(#[from] NotTrusted),
    /// No protocol in common, or none named.
    #[error("handshake: the peer does not speak mesh-stream/1 or h2")]
    NoProtocol,
    /// What was sent is no record: waiting for the rest of it would be in vain.
    #[error("handshake: the peer does not speak TLS")]
    NotTls,
    /// Records or a handshake longer than any of ours.
    #[error("handshake: too long")]
    TooLong,
    /// rustls did not tell the secrets of the connection, or they are of another suite than those that are offered.
    #[error("handshake: no secrets")]
    NoSecrets,
    /// The record layer.
    #[error("handshake: {0}")]
    Records(#[from] TlsError),
}

impl From<rustls::Error> for HandshakeError {
    fn from(error: rustls::Error) -> Self {
        // rustls carries our verifier's reason in an error of its own.
        if let rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) = &error
            && let Some(reason) = other.0.downcast_ref::<NotTrusted>()
        {
            return Self::NotTrusted(reason.clone());
        }
        Self::Tls(error)
    }
}

/// Secures a connection of `own` to `peer`, which is to be at the other end of `tcp`.
pub async fn connect(
    configs: &Configs,
    own: &SpiffeId,
    peer: &SpiffeId,
    tcp: TcpStream,
) -> Result<Tls, HandshakeError> {
    let role = configs.client(own, peer)?;
    let address: IpAddr = tcp.peer_addr()?.ip().to_canonical();
    let connection = UnbufferedClientConnection::new(role.config, ServerName::from(address))?;
    Driver::new(tcp, connection).run(&role.verifier).await
}

/// Secures a connection to `own`.
pub async fn accept(configs: &Configs, own: &SpiffeId, tcp: TcpStream) -> Result<Tls, HandshakeError> {
    let role = configs.server(own)?;
    let connection = UnbufferedServerConnection::new(role.config)?;
    Driver::new(tcp, connection).run(&role.verifier).await
}

fn unix(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// The two ends of rustls have the same calls, but no trait.
trait End: Sized + std::ops::Deref<Target: std::ops::Deref<Target = CommonState>> {
    type Data;
    fn process<'c, 'i>(&'c mut self, bytes: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    /// The number of the next record in each direction, and what takes tickets.
    fn finish(self) -> Result<(rustls::ExtractedSecrets, Option<Tickets>), rustls::Error>;
    /// Of the secrets of client and server that of what is received, and of what is sent.
    fn directions(secrets: Secrets) -> (Option<Secret>, Option<Secret>);
}

impl End for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, bytes: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(bytes)
    }

    fn finish(self) -> Result<(rustls::ExtractedSecrets, Option<Tickets>), rustls::Error> {
        self.dangerous_into_kernel_connection().map(|(secrets, kernel)| (secrets, Some(Box::new(kernel))))
    }

    fn directions(secrets: Secrets) -> (Option<Secret>, Option<Secret>) {
        (secrets.server, secrets.client)
    }
}

impl End for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, bytes: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(bytes)
    }

    fn finish(self) -> Result<(rustls::ExtractedSecrets, Option<Tickets>), rustls::Error> {
        self.dangerous_into_kernel_connection().map(|(secrets, _kernel)| (secrets, None))
    }

    fn directions(secrets: Secrets) -> (Option<Secret>, Option<Secret>) {
        (secrets.client, secrets.server)
    }
}

/// What rustls wants next.
enum Step {
    /// It said something to send.
    Again,
    /// It needs another record.
    Read,
}

struct Driver<E> {
    tcp: TcpStream,
    end: E,
    /// Received; the first `given` bytes are before rustls.
    received: Vec<u8>,
    given: usize,
    /// All that was received so far.
    seen: usize,
    outgoing: Vec<u8>,
    secrets: Secrets,
}

impl<E: End> Driver<E> {
    fn new(tcp: TcpStream, end: E) -> Self {
        Self {
            tcp,
            end,
            received: Vec::new(),
            given: 0,
            seen: 0,
            outgoing: Vec::new(),
            secrets: Secrets::default(),
        }
    }

    async fn run(mut self, verifier: &PeerVerifier) -> Result<Tls, HandshakeError> {
        loop {
            match self.step() {
                Ok(Step::Again) => {}
                Ok(Step::Read) => {
                    self.flush().await?;
                    if !self.end.is_handshaking() {
                        return self.finish(verifier);
                    }
                    self.read_record().await?;
                }
                Err(error) => {
                    // The alert that rustls has for the peer: the first that it says after an error. Asked further, it would look
                    // at the same bytes again. That the peer does not get it changes nothing.
                    drop(self.step());
                    drop(self.flush().await);
                    return Err(error);
                }
            }
        }
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "the enum may grow; what is not known is refused")]
    fn step(&mut self) -> Result<Step, HandshakeError> {
        let (end, given) = (&mut self.end, &mut self.received[..self.given]);
        let UnbufferedStatus { discard, state, .. } =
            Listener::during(&mut self.secrets, || end.process(given));
        let step = match state? {
            ConnectionState::EncodeTlsData(mut data) => {
                let from = self.outgoing.len();
                let needed = match data.encode(&mut []) {
                    Err(EncodeError::InsufficientSize(size)) => size.required_size,
                    Ok(_) | Err(EncodeError::AlreadyEncoded) => 0,
                };
                self.outgoing.resize(from + needed, 0);
                let written = data.encode(&mut self.outgoing[from..]).unwrap_or(0);
                self.outgoing.truncate(from + written);
                Step::Again
            }
            ConnectionState::TransmitTlsData(data) => {
                // Sent before anything is read, and before the handshake counts as finished.
                data.done();
                Step::Again
            }
            ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) => Step::Read,
            // Closed, or data within the handshake: no peer of ours does that.
            _ => return Err(TlsError::Unexpected.into()),
        };
        self.received.drain(..discard);
        self.given -= discard;
        Ok(step)
    }

    async fn flush(&mut self) -> io::Result<()> {
        if !self.outgoing.is_empty() {
            self.tcp.write_all(&self.outgoing).await?;
            self.outgoing.clear();
        }
        Ok(())
    }

    async fn read_record(&mut self) -> Result<(), HandshakeError> {
        let from = self.given;
        loop {
            if let Some(header) = self.received[from..].first_chunk::<HEADER>() {
                let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
                if !matches!(header, [20..=23, 3, ..]) {
                    return Err(HandshakeError::NotTls);
                }
                if length > RECORD {
                    return Err(HandshakeError::TooLong);
                }
                if self.received.len() - from >= HEADER + length {
                    self.given = from + HEADER + length;
                    return Ok(());
                }
            }
            self.received.reserve(CHUNK);
            let read = self.tcp.read_buf(&mut self.received).await?;
            self.seen += read;
            if read == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            if self.seen > HANDSHAKE {
                return Err(HandshakeError::TooLong);
            }
        }
    }

    fn finish(self, verifier: &PeerVerifier) -> Result<Tls, HandshakeError> {
        let protocol = Protocol::agreed(self.end.alpn_protocol()).ok_or(HandshakeError::NoProtocol)?;
        let chain = self.end.peer_certificates().unwrap_or_default();
        let (peer, until) = verifier.finished(chain, unix(SystemTime::now()))?;
        let until = UNIX_EPOCH + Duration::from_secs(until.unsigned_abs());
        let standing = verifier.standing(chain)?;
        if standing.has_lapsed() {
            return Err(NotTrusted::ListLapsed.into());
        }
        // The roots are those of when it began.
        if !standing.is_trusted() {
            return Err(NotTrusted::RootDropped.into());
        }
        let resumed = self.end.handshake_kind() == Some(HandshakeKind::Resumed);
        let (first, tickets) = self.end.finish()?;
        let (receive, send) = E::directions(self.secrets);
        let traffic = |secret: Option<Secret>, sequence| {
            let secret = secret.ok_or(HandshakeError::NoSecrets)?;
            Ok::<_, HandshakeError>(Traffic { secret, sequence })
        };
        let (reader, writer) = split(traffic(receive, first.rx.0)?, traffic(send, first.tx.0)?, tickets)?;
        let mut received = self.received;
        received.drain(..self.given);
        received.shrink_to_fit();
        Ok(Tls { tcp: self.tcp, reader, writer, received, peer, until, standing, protocol, resumed })
    }
}
