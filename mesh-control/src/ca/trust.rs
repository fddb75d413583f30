//! Whom the control plane believes: roots, and what was revoked. A revocation list that cannot be used refuses everybody
//! who comes with a certificate.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime, pem::PemObject as _},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _,
    revocation_list::CertificateRevocationList,
};

use super::Authority;
use crate::identity::Identity;

/// Verifies certificates of callers.
#[derive(Clone, Debug)]
pub(crate) struct Trust {
    inner: Arc<dyn ClientCertVerifier>,
    /// Why nobody is believed.
    broken: Option<String>,
    /// Until when the list of an issuer, by its name, says something; none: it does not say.
    ends: Arc<Ends>,
}

type Ends = HashMap<Vec<u8>, Option<SystemTime>>;

/// Content of the file of revocation lists; an error when it cannot be read.
pub(crate) type Revocations = Option<Result<Vec<u8>, String>>;

/// Who came with a certificate.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Verified {
    pub(crate) identity: Identity,
    pub(crate) not_after: SystemTime,
    /// Until when revocation lists say something of it, if that has an end.
    pub(crate) listed_until: Option<SystemTime>,
}

/// Why a certificate is not believed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotTrusted {
    /// The list that would say whether it is revoked has passed its `nextUpdate`.
    Lapsed,
    Other(String),
}

impl Trust {
    /// Trusts the authority's roots, without what was revoked.
    pub(crate) fn new(authority: &Authority, revocations: &Revocations) -> anyhow::Result<Self> {
        let roots = Arc::new(authority.root_store()?);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let build = |lists: Vec<CertificateRevocationListDer<'static>>| {
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .with_crls(lists)
                // An issuer without a list has revoked nothing; a list that is too old says nothing.
                .allow_unknown_revocation_status()
                .enforce_revocation_expiration()
                .allow_unauthenticated()
                .build()
        };
        let lists = match revocations {
            None => Ok(Vec::new()),
            Some(Ok(bytes)) => lists(bytes),
            Some(Err(reason)) => Err(reason.clone()),
        };
        let built = lists.and_then(|lists| {
            let ends = ends(&lists)?;
            Ok((build(lists).map_err(|error| error.to_string())?, ends))
        });
        match built {
            Ok((inner, ends)) => Ok(Self { inner, broken: None, ends: Arc::new(ends) }),
            Err(reason) => Ok(Self { inner: build(Vec::new())?, broken: Some(reason), ends: Arc::default() }),
        }
    }

    /// Why every certificate is refused, if it is.
    pub(crate) fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Verifies a chain as it is now: it may be long since its connection was opened.
    pub(crate) fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<Verified, NotTrusted> {
        let other = NotTrusted::Other;
        let (leaf, intermediates) = chain.split_first().ok_or_else(|| other("no certificate".to_owned()))?;
        let since = now.duration_since(UNIX_EPOCH).map_err(|error| other(error.to_string()))?;
        let verified = self.verify_client_cert(leaf, intermediates, UnixTime::since_unix_epoch(since));
        verified.map_err(|error| {
            let lapsed = matches!(
                error,
                Error::InvalidCertificate(
                    CertificateError::ExpiredRevocationList
                        | CertificateError::ExpiredRevocationListContext { .. }
                )
            );
            if lapsed { NotTrusted::Lapsed } else { other(error.to_string()) }
        })?;
        let identity = identity(leaf).map_err(other)?;
        let not_after = super::authority::not_after(leaf).ok_or_else(|| other("it has no end".to_owned()))?;
        // webpki counts whole seconds and the last one in; streams end at the beginning of it.
        if now >= not_after {
            return Err(other("it has expired".to_owned()));
        }
        let listed_until = self.listed_until(chain).map_err(other)?;
        if listed_until.is_some_and(|until| now >= until) {
            return Err(NotTrusted::Lapsed);
        }
        Ok(Verified { identity, not_after, listed_until })
    }

    /// When the first of the lists that say something of these certificates lapses.
    fn listed_until(&self, chain: &[CertificateDer<'_>]) -> Result<Option<SystemTime>, String> {
        let mut first = None::<SystemTime>;
        for certificate in chain.iter().filter(|_| !self.ends.is_empty()) {
            let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
            let end = self.ends.get(parsed.issuer().as_raw()).copied().flatten();
            first = first.into_iter().chain(end).min();
        }
        Ok(first)
    }
}

/// The single name that a certificate is for.
fn identity(leaf: &CertificateDer<'_>) -> Result<Identity, String> {
    let (_, cert) = X509Certificate::from_der(leaf).map_err(|error| error.to_string())?;
    let names = cert.subject_alternative_name().map_err(|error| error.to_string())?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let [GeneralName::URI(uri)] = names else {
        return Err("its names are not a single identity".to_owned());
    };
    uri.parse().map_err(|error| format!("{uri} {error}"))
}

/// When the lists lapse, by their issuers.
fn ends(lists: &[CertificateRevocationListDer<'_>]) -> Result<Ends, String> {
    let mut ends = Ends::new();
    for list in lists {
        let (_, parsed) = CertificateRevocationList::from_der(list.as_ref())
            .map_err(|error| format!("a revocation list cannot be read: {error}"))?;
        let end = parsed.next_update().map(|end| u64::try_from(end.timestamp()).unwrap_or(0));
        let end = end.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds));
        // Of several lists of an issuer the first counts, as when a certificate is verified.
        ends.entry(parsed.issuer().as_raw().to_vec()).or_insert(end);
    }
    Ok(ends)
}

/// Lists in PEM, several in one file if need be, or one in DER.
fn lists(bytes: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    if !bytes.windows(11).any(|window| window == b"-----BEGIN ") {
        return Ok(vec![CertificateRevocationListDer::from(bytes.to_vec())]);
    }
    let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(bytes).collect();
    let found = found.map_err(|error| error.to_string())?;
    if found.is_empty() { Err("holds no revocation list".to_owned()) } else { Ok(found) }
}

impl ClientCertVerifier for Trust {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match &self.broken {
            None => self.inner.verify_client_cert(end_entity, intermediates, now),
            Some(_) => Err(Error::InvalidCertificate(CertificateError::UnknownRevocationStatus)),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
