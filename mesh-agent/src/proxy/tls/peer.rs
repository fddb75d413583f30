//! Who the peer is: chain to the roots, one SPIFFE identity, the identity or trust domain that is wanted.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible,
    SignatureScheme,
};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::revocation::{Lists, Revocations};
use super::standing::{Chains, Side, Standing};
use crate::identity::{SpiffeId, Trust};

/// Why a peer's certificate is refused, beside its chain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotTrusted {
    /// It cannot be read.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// There must be one URI, and no other name.
    #[error("the certificate does not name exactly one workload")]
    Names,
    /// A client wanted another workload.
    #[error("the server is {found}, not {wanted}")]
    OtherWorkload {
        /// Whom the client dialled.
        wanted: SpiffeId,
        /// Who answered.
        found: SpiffeId,
    },
    /// The client belongs to another mesh.
    #[error("the client is {found}, not of trust domain {wanted}")]
    OtherTrustDomain {
        /// The server's own.
        wanted: String,
        /// The client.
        found: SpiffeId,
    },
    /// A resumed session whose certificate has ended meanwhile.
    #[error("the certificate of the resumed session is not valid now")]
    Lapsed,
    /// A resumed session whose issuers' revocation list has ended meanwhile.
    #[error("the revocation list that the resumed session was judged by is not valid now")]
    ListLapsed,
    /// The bundle has changed while the handshake was under way, or since the session that it resumed.
    #[error("the certificate does not lead to a root that is trusted now")]
    RootDropped,
}

impl From<NotTrusted> for Error {
    fn from(reason: NotTrusted) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(reason))))
    }
}

/// The one SPIFFE identity that a certificate names.
pub fn identity_of(certificate: &CertificateDer<'_>) -> Result<SpiffeId, NotTrusted> {
    let parsed = parse(certificate)?;
    let names = parsed.subject_alternative_name().map_err(|_twice| NotTrusted::Names)?;
    match names.map(|extension| extension.value.general_names.as_slice()) {
        Some([GeneralName::URI(uri)]) => uri.parse().map_err(|_other| NotTrusted::Names),
        Some(_) | None => Err(NotTrusted::Names),
    }
}

pub(super) fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, NotTrusted> {
    match X509Certificate::from_der(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        Ok(_) | Err(_) => Err(NotTrusted::Unreadable),
    }
}

/// Whom to accept.
#[derive(Debug, Clone)]
pub(super) enum Wanted {
    /// A client dials one workload.
    Workload(SpiffeId),
    /// A server takes any workload of its trust domain; which of them may do what is policy.
    TrustDomain(String),
}

impl Wanted {
    /// At which end of the connection such a peer is.
    fn side(&self) -> Side {
        match self {
            Self::Workload(_) => Side::Server,
            Self::TrustDomain(_) => Side::Client,
        }
    }
}

/// Verifies peers for one configuration.
#[derive(Debug)]
pub(super) struct PeerVerifier {
    pub(super) provider: Arc<CryptoProvider>,
    pub(super) roots: Arc<rustls::RootCertStore>,
    /// Chains of clients; it knows what a client certificate needs.
    pub(super) clients: Arc<dyn ClientCertVerifier>,
    pub(super) wanted: Wanted,
    pub(super) revocations: Arc<Revocations>,
    /// What was revoked when this was made.
    pub(super) lists: Arc<Lists>,
    /// Whom to trust later.
    pub(super) trust: Arc<Trust>,
    pub(super) chains: Arc<Chains>,
}

impl PeerVerifier {
    /// The peer's certificate, for when it is revoked later, or its root is trusted no more.
    pub(super) fn standing(&self, chain: &[CertificateDer<'_>]) -> Result<Standing, NotTrusted> {
        let verified_by = (&*self.trust, &self.roots);
        let chain = self.chains.of(chain, self.wanted.side(), &self.provider, verified_by)?;
        Standing::new(&self.revocations, &self.lists, &self.trust, chain)
    }

    fn usable(&self) -> Result<(), Error> {
        match self.lists.broken {
            Some(_) => Err(Error::InvalidCertificate(CertificateError::UnknownRevocationStatus)),
            None => Ok(()),
        }
    }

    fn names(&self, leaf: &CertificateDer<'_>) -> Result<SpiffeId, NotTrusted> {
        let found = identity_of(leaf)?;
        match &self.wanted {
            Wanted::Workload(wanted) if *wanted != found => {
                Err(NotTrusted::OtherWorkload { wanted: wanted.clone(), found })
            }
            Wanted::TrustDomain(wanted) if wanted != found.trust_domain() => {
                Err(NotTrusted::OtherTrustDomain { wanted: wanted.clone(), found })
            }
            // The same name, which need not be kept twice.
            Wanted::Workload(wanted) => Ok(wanted.clone()),
            Wanted::TrustDomain(_) => Ok(found),
        }
    }

    /// The peer of a finished handshake. A resumed one has verified no certificate: the chain was verified when the session
    /// began, against the same roots (other roots make another configuration, which knows none of the sessions), but time
    /// has passed.
    /// Also returned: until when the whole chain is valid.
    pub(super) fn finished(
        &self,
        chain: &[CertificateDer<'_>],
        now: i64,
    ) -> Result<(SpiffeId, i64), NotTrusted> {
        let leaf = chain.first().ok_or(NotTrusted::Names)?;
        let mut until = i64::MAX;
        for certificate in chain {
            let validity = parse(certificate)?.validity().clone();
            if now < validity.not_before.timestamp() || now > validity.not_after.timestamp() {
                return Err(NotTrusted::Lapsed);
            }
            until = until.min(validity.not_after.timestamp());
        }
        Ok((self.names(leaf)?, until))
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _address: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        let parsed = ParsedCertificate::try_from(leaf)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        self.usable()?;
        if !self.lists.is_empty() {
            // A workload's certificate is for both roles, and this verifier knows the lists.
            self.clients.verify_client_cert(leaf, intermediates, now)?;
        }
        self.names(leaf)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A workload has one certificate; hints would only make the handshake longer.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.usable()?;
        let verified = self.clients.verify_client_cert(leaf, intermediates, now)?;
        self.names(leaf)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
