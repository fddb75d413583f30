//! Configurations of rustls, kept per identity: building one costs more than the connection that uses it.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{ServerSessionMemoryCache, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, ServerConfig, version};

use super::peer::{PeerVerifier, Wanted};
use super::revocation::{Lists, Revocations};
use super::secret::Listener;
use super::standing::Chains;
use crate::identity::{Certificates, SpiffeId, WorkloadCertificate};

/// Peers of one identity that a configuration is kept for; the next one empties the table, which costs handshakes, not
/// connections.
const PEERS: usize = 1024;
/// Sessions that a server remembers per identity, and a client per peer.
const SERVER_SESSIONS: usize = 256;
const CLIENT_SESSIONS: usize = 8;

/// What is spoken inside TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Ours: `docs/stream-protocol.md`.
    Stream,
    /// HBONE: HTTP/2 CONNECT.
    H2,
}

impl Protocol {
    /// Its name in ALPN.
    pub const fn name(self) -> &'static [u8] {
        match self {
            Self::Stream => b"mesh-stream/1",
            Self::H2 => b"h2",
        }
    }

    /// What a finished handshake agreed on.
    pub(super) fn agreed(name: Option<&[u8]>) -> Option<Self> {
        [Self::Stream, Self::H2].into_iter().find(|protocol| Some(protocol.name()) == name)
    }
}

impl FromStr for Protocol {
    type Err = String;

    /// As `--tunnel-protocols` names them.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "stream" => Ok(Self::Stream),
            "hbone" => Ok(Self::H2),
            other => Err(format!("{other:?} is neither stream nor hbone")),
        }
    }
}

/// There is no valid certificate for a workload of this node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no valid certificate for {0}")]
pub struct NoCertificate(pub SpiffeId);

/// Configuration and verifier of one role.
pub(super) struct Role<C> {
    pub(super) config: Arc<C>,
    pub(super) verifier: Arc<PeerVerifier>,
}

impl<C> Clone for Role<C> {
    fn clone(&self) -> Self {
        Self { config: Arc::clone(&self.config), verifier: Arc::clone(&self.verifier) }
    }
}

/// The configurations made from one certificate.
struct Made {
    serial: u64,
    lists: Arc<Lists>,
    server: Role<ServerConfig>,
    clients: HashMap<SpiffeId, Role<ClientConfig>>,
}

/// Configurations of this node's workloads.
pub struct Configs {
    certificates: Arc<dyn Certificates>,
    provider: Arc<CryptoProvider>,
    /// What a client offers, and a server takes, the best first.
    protocols: Vec<Protocol>,
    revocations: Arc<Revocations>,
    /// Those that peers have shown.
    chains: Arc<Chains>,
    made: Mutex<HashMap<SpiffeId, Made>>,
}

impl Configs {
    /// Configurations from these certificates, our own protocol first.
    pub fn new(certificates: Arc<dyn Certificates>) -> Self {
        Self::offering(certificates, vec![Protocol::Stream, Protocol::H2])
    }

    /// As [`Configs::new`], with only these protocols.
    pub fn offering(certificates: Arc<dyn Certificates>, protocols: Vec<Protocol>) -> Self {
        let provider = CryptoProvider {
            cipher_suites: vec![
                aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
                aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            ],
            ..aws_lc_rs::default_provider()
        };
        Self {
            certificates,
            provider: Arc::new(provider),
            protocols,
            revocations: Revocations::none(),
            chains: Arc::default(),
            made: Mutex::default(),
        }
    }

    /// Honouring these revocation lists, as they are whenever a handshake is made.
    pub fn honouring(self, revocations: Arc<Revocations>) -> Self {
        Self { revocations, ..self }
    }

    /// For connections of `own` to `peer`.
    pub(super) fn client(&self, own: &SpiffeId, peer: &SpiffeId) -> Result<Role<ClientConfig>, ConfigError> {
        self.with(own, |made, certificate| {
            if let Some(role) = made.clients.get(peer) {
                return Ok(role.clone());
            }
            // One for each peer, so that a session can be resumed only with whom it was begun.
            let role = self.make_client(certificate, peer, &made.lists)?;
            if made.clients.len() >= PEERS {
                made.clients.clear();
            }
            made.clients.insert(peer.clone(), role.clone());
            Ok(role)
        })
    }

    /// For connections to `own`.
    pub(super) fn server(&self, own: &SpiffeId) -> Result<Role<ServerConfig>, ConfigError> {
        self.with(own, |made, _certificate| Ok(made.server.clone()))
    }

    /// Forgets workloads that `keep` does not know.
    pub fn retain(&self, keep: impl Fn(&SpiffeId) -> bool) {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).retain(|id, _made| keep(id));
    }

    fn with<T>(
        &self,
        own: &SpiffeId,
        role: impl FnOnce(&mut Made, &WorkloadCertificate) -> Result<T, ConfigError>,
    ) -> Result<T, ConfigError> {
        let certificate = self.certificates.current(own).ok_or_else(|| NoCertificate(own.clone()))?;
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh =
            |made: &Made| made.serial == certificate.serial && self.revocations.are_current(&made.lists);
        if !made.get(own).is_some_and(fresh) {
            let lists = self.revocations.now();
            let server = self.make_server(own, &certificate, &lists)?;
            let serial = certificate.serial;
            made.insert(own.clone(), Made { serial, lists, server, clients: HashMap::new() });
        }
        let made = made.get_mut(own).ok_or_else(|| NoCertificate(own.clone()))?;
        role(made, &certificate)
    }

    fn verifier(
        &self,
        certificate: &WorkloadCertificate,
        wanted: Wanted,
        lists: &Arc<Lists>,
    ) -> Result<Arc<PeerVerifier>, ConfigError> {
        let roots = Arc::clone(&certificate.roots);
        let clients = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&self.provider))
            .with_crls(lists.lists.iter().cloned())
            // An issuer without a list has revoked nothing; a list that is too old says nothing.
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration()
            .build()
            .map_err(|error| ConfigError::Roots(error.to_string()))?;
        Ok(Arc::new(PeerVerifier {
            provider: Arc::clone(&self.provider),
            roots: Arc::clone(&certificate.roots),
            clients,
            wanted,
            revocations: Arc::clone(&self.revocations),
            lists: Arc::clone(lists),
            trust: Arc::clone(self.certificates.trusted()),
            chains: Arc::clone(&self.chains),
        }))
    }

    fn make_client(
        &self,
        certificate: &WorkloadCertificate,
        peer: &SpiffeId,
        lists: &Arc<Lists>,
    ) -> Result<Role<ClientConfig>, ConfigError> {
        let verifier = self.verifier(certificate, Wanted::Workload(peer.clone()), lists)?;
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::<PeerVerifier>::clone(&verifier))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&certificate.certified))));
        config.alpn_protocols = self.names();
        config.enable_sni = false;
        config.enable_secret_extraction = true;
        config.key_log = Arc::new(Listener);
        config.resumption = Resumption::in_memory_sessions(CLIENT_SESSIONS);
        Ok(Role { config: Arc::new(config), verifier })
    }

    fn make_server(
        &self,
        own: &SpiffeId,
        certificate: &WorkloadCertificate,
        lists: &Arc<Lists>,
    ) -> Result<Role<ServerConfig>, ConfigError> {
        let verifier =
            self.verifier(certificate, Wanted::TrustDomain(own.trust_domain().to_owned()), lists)?;
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&version::TLS13])?
            .with_client_cert_verifier(Arc::<PeerVerifier>::clone(&verifier))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&certificate.certified))));
        config.alpn_protocols = self.names();
        config.enable_secret_extraction = true;
        config.key_log = Arc::new(Listener);
        // Stateful: a ticket is then one use of one entry here, and ends with this configuration.
        config.session_storage = ServerSessionMemoryCache::new(SERVER_SESSIONS);
        // Connections are reused, so a client rarely makes more than one at a time.
        config.send_tls13_tickets = 1;
        Ok(Role { config: Arc::new(config), verifier })
    }

    fn names(&self) -> Vec<Vec<u8>> {
        self.protocols.iter().map(|protocol| protocol.name().to_vec()).collect()
    }
}

/// A configuration cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not there yet, or expired.
    #[error(transparent)]
    NoCertificate(#[from] NoCertificate),
    /// The roots are of no use.
    #[error("trust roots: {0}")]
    Roots(String),
    /// rustls refuses it.
    #[error("TLS configuration: {0}")]
    Tls(#[from] rustls::Error),
}
