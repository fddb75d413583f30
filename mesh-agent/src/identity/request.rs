//! What is asked for: a key of its own for each certificate, which never leaves the process, and the request that it signs.

use std::sync::Arc;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::SigningKey;

/// A new P-256 key and a PKCS#10 request for it.
pub struct Request {
    /// The private key; it is in memory only.
    pub key: Arc<dyn SigningKey>,
    /// The request, PEM.
    pub csr: String,
}

/// Why there is no request.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The key could not be made, or could not sign.
    #[error("key or request: {0}")]
    Sign(#[from] rcgen::Error),
    /// The TLS library does not take the key.
    #[error("key: {0}")]
    Key(#[from] rustls::Error),
}

impl Request {
    /// For a certificate of that name. A server of Istio's API decides the name by who asks and whom for, and ignores this
    /// one; it is there for those that compare. The subject is empty, which makes the alternative name critical.
    pub fn new(uri: &str) -> Result<Self, RequestError> {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        let csr = params.serialize_request(&pair)?.pem()?;
        let der = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(pair.serialize_der()));
        Ok(Self { key: any_ecdsa_type(&der)?, csr })
    }
}

#[cfg(test)]
mod tests {
    use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509CertificationRequest};

    use super::*;

    #[test]
    fn a_request_names_one_identity_and_no_subject() {
        let uri = "spiffe://cluster.local/ns/shop/sa/web";
        let request = Request::new(uri).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(request.csr.as_bytes()).unwrap();
        assert_eq!(pem.label, "CERTIFICATE REQUEST");
        let (rest, csr) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        assert!(rest.is_empty());
        assert_eq!(csr.certification_request_info.subject.iter().count(), 0);
        let names: Vec<_> = csr
            .requested_extensions()
            .unwrap()
            .filter_map(|extension| {
                let ParsedExtension::SubjectAlternativeName(names) = extension else { return None };
                Some(names.general_names.clone())
            })
            .collect();
        assert_eq!(names, [vec![GeneralName::URI(uri)]]);
        // id-ce-subjectAltName, critical.
        let critical = [0x06, 0x03, 0x55, 0x1d, 0x11, 0x01, 0x01, 0xff];
        assert!(pem.contents.windows(critical.len()).any(|window| window == critical));
        let spki = csr.certification_request_info.subject_pki.raw;
        assert_eq!(request.key.public_key().unwrap().as_ref(), spki);
    }

    #[test]
    fn each_request_has_its_own_key() {
        let [a, b] = [(); 2].map(|()| Request::new("spiffe://td/ns/a/sa/b").unwrap());
        assert_ne!(a.key.public_key().unwrap().as_ref(), b.key.public_key().unwrap().as_ref());
    }
}
