//! What a certificate authority answers. Pure: it is taken whole or refused with what is wrong, and time is an argument.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{PemObject, SectionKind};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::WebPkiClientVerifier;
use rustls::sign::{CertifiedKey, SigningKey};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// More certificates than any chain or bundle needs; more text than they take.
const CERTIFICATES: usize = 256;
const BYTES: usize = 1 << 20;
/// A certificate with less time left could not be renewed before it expires.
const SHORTEST: Duration = Duration::from_secs(1);

/// An answer that was found good.
#[derive(Debug)]
pub struct Answer {
    /// Leaf, intermediates and our key.
    pub certified: Arc<CertifiedKey>,
    /// The identity in it.
    pub uri: String,
    /// The trust bundle that came with it.
    pub roots: Bundle,
    /// Its X.509 serial number, hexadecimal.
    pub number: String,
    /// When it begins to be valid.
    pub not_before: SystemTime,
    /// When it expires.
    pub not_after: SystemTime,
}

/// Trusted roots, comparable.
#[derive(Clone)]
pub struct Bundle {
    /// Sorted, each once.
    certificates: Vec<CertificateDer<'static>>,
    /// The same, ready for use.
    pub store: Arc<RootCertStore>,
}

impl PartialEq for Bundle {
    fn eq(&self, other: &Self) -> bool {
        self.certificates == other.certificates
    }
}

impl fmt::Debug for Bundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} roots", self.certificates.len())
    }
}

/// Why an answer cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadAnswer {
    /// Too few elements.
    #[error("cert_chain has {0} elements; it wants the certificate, and last the roots")]
    TooShort(usize),
    /// An element is too large, or there are too many certificates.
    #[error("cert_chain[{0}]: more than {BYTES} bytes, or more than {CERTIFICATES} certificates")]
    TooLarge(usize),
    /// An element is not PEM, or holds something other than certificates.
    #[error("cert_chain[{0}]: {1}")]
    Pem(usize, String),
    /// A root cannot be used.
    #[error("cert_chain (roots): {0}")]
    Root(String),
    /// The first certificate cannot be read.
    #[error("leaf: {0}")]
    Leaf(String),
    /// It is for another key.
    #[error("leaf: its public key is not the one that was sent")]
    OtherKey,
    /// It has not one URI as its name.
    #[error("leaf: {0} URIs as alternative names, wanted one")]
    Names(usize),
    /// It names somebody else.
    #[error("leaf: it is for {found:?}, wanted {wanted}")]
    OtherIdentity {
        /// What it says.
        found: String,
        /// What was asked for.
        wanted: String,
    },
    /// By this node's clock it does not begin yet.
    #[error("leaf: not valid for another {0:?} by this node's clock")]
    NotYetValid(Duration),
    /// By this node's clock it is over, or almost.
    #[error("leaf: expired, or within a second of it, by this node's clock")]
    Expired,
    /// It does not lead to a root.
    #[error("chain does not lead to the roots that came with it: {0}")]
    Chain(String),
}

/// Reads and checks an answer to a request with `key`; `wanted` is the only identity that will do, if one was asked for.
pub fn check(
    cert_chain: &[String],
    key: Arc<dyn SigningKey>,
    wanted: Option<&str>,
    now: SystemTime,
) -> Result<Answer, BadAnswer> {
    let [chain @ .., roots] = cert_chain else { return Err(BadAnswer::TooShort(0)) };
    if chain.is_empty() {
        return Err(BadAnswer::TooShort(1));
    }
    if chain.len() > CERTIFICATES {
        return Err(BadAnswer::TooLarge(CERTIFICATES));
    }
    let mut certificates = Vec::new();
    for (at, element) in chain.iter().enumerate() {
        certificates.extend(read(at, element)?);
        if certificates.len() > CERTIFICATES {
            return Err(BadAnswer::TooLarge(at));
        }
    }
    let roots = Bundle::new(read(chain.len(), roots)?)?;
    let leaf = certificates.first().ok_or(BadAnswer::TooShort(cert_chain.len()))?;
    let facts = Facts::of(leaf)?;
    if let Some(wanted) = wanted.filter(|wanted| *wanted != facts.uri) {
        let found = facts.uri.chars().take(200).collect();
        return Err(BadAnswer::OtherIdentity { found, wanted: wanted.to_owned() });
    }
    if let Ok(early) = facts.not_before.duration_since(now)
        && !early.is_zero()
    {
        return Err(BadAnswer::NotYetValid(early));
    }
    if facts.not_after.duration_since(now).is_ok_and(|left| left >= SHORTEST) {
        let Facts { uri, number, not_before, not_after } = facts;
        let certified = CertifiedKey::new(certificates, key);
        certified.keys_match().map_err(|_mismatch| BadAnswer::OtherKey)?;
        verify(&certified.cert, &roots, now)?;
        return Ok(Answer { certified: Arc::new(certified), uri, roots, number, not_before, not_after });
    }
    Err(BadAnswer::Expired)
}

/// Whether a chain leads to the roots, as a peer will judge it when it dials and when it accepts.
pub fn verify(chain: &[CertificateDer<'static>], roots: &Bundle, now: SystemTime) -> Result<(), BadAnswer> {
    let refused = |error: &dyn fmt::Display| BadAnswer::Chain(error.to_string());
    let [leaf, intermediates @ ..] = chain else { return Err(BadAnswer::TooShort(0)) };
    let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).map_err(|e| refused(&e))?);
    let parsed = ParsedCertificate::try_from(leaf).map_err(|e| refused(&e))?;
    let provider = provider();
    let algorithms = provider.signature_verification_algorithms.all;
    verify_server_cert_signed_by_trust_anchor(&parsed, &roots.store, intermediates, now, algorithms)
        .map_err(|e| refused(&e))?;
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots.store), provider)
        .build()
        .map_err(|e| refused(&e))?;
    clients.verify_client_cert(leaf, intermediates, now).map(drop).map_err(|e| refused(&e))
}

/// The one implementation of cryptography in this process.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

impl Bundle {
    /// Of these certificates, which all have to be usable.
    pub fn new(mut certificates: Vec<CertificateDer<'static>>) -> Result<Self, BadAnswer> {
        certificates.sort_unstable_by(|a, b| a.as_ref().cmp(b.as_ref()));
        certificates.dedup();
        let mut store = RootCertStore::empty();
        for certificate in &certificates {
            store.add(certificate.clone()).map_err(|error| BadAnswer::Root(error.to_string()))?;
        }
        Ok(Self { certificates, store: Arc::new(store) })
    }
}

/// The certificates of one PEM text: at least one, and nothing else.
pub fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut found = Vec::new();
    for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(text) {
        match section.map_err(|error| format!("not PEM: {error}"))? {
            (SectionKind::Certificate, der) => found.push(CertificateDer::from(der)),
            (other, _) => return Err(format!("holds {other:?}, wanted certificates only")),
        }
        if found.len() > CERTIFICATES {
            return Err(format!("holds more than {CERTIFICATES} certificates"));
        }
    }
    if found.is_empty() { Err("holds no certificate in PEM".to_owned()) } else { Ok(found) }
}

fn read(at: usize, element: &str) -> Result<Vec<CertificateDer<'static>>, BadAnswer> {
    if element.len() > BYTES {
        return Err(BadAnswer::TooLarge(at));
    }
    certificates(element.as_bytes()).map_err(|reason| BadAnswer::Pem(at, reason))
}

/// What a leaf says of itself.
struct Facts {
    uri: String,
    number: String,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl Facts {
    fn of(leaf: &CertificateDer<'_>) -> Result<Self, BadAnswer> {
        let wrong = |error: &dyn fmt::Display| BadAnswer::Leaf(error.to_string());
        let (rest, parsed) = X509Certificate::from_der(leaf).map_err(|e| wrong(&e))?;
        if !rest.is_empty() {
            return Err(wrong(&"bytes follow the certificate"));
        }
        // An error when the extension is there twice, too.
        let names = parsed.subject_alternative_name().map_err(|e| wrong(&e))?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|extension| &extension.value.general_names)
            .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
            .collect();
        let [uri] = uris.as_slice() else { return Err(BadAnswer::Names(uris.len())) };
        let at = |time: &x509_parser::time::ASN1Time| {
            let seconds = u64::try_from(time.timestamp()).map_err(|e| wrong(&e))?;
            UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).ok_or_else(|| wrong(&"a time without end"))
        };
        Ok(Self {
            uri: (*uri).to_owned(),
            number: hexadecimal(parsed.raw_serial()),
            not_before: at(&parsed.validity().not_before)?,
            not_after: at(&parsed.validity().not_after)?,
        })
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    // RFC 5280 allows 20 bytes.
    bytes.iter().take(20).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
