//! Certificate requests: only the public key counts, and that its holder signed for it. Pure.

use rcgen::SubjectPublicKeyInfo;
use rustls::pki_types::{CertificateSigningRequestDer, pem::PemObject as _};
use x509_parser::{
    certification_request::X509CertificationRequest, prelude::FromDer as _, public_key::PublicKey,
};

/// Longest request; one with an RSA key of 8192 bits takes 4 KiB.
const MAX_LENGTH: usize = 16 << 10;
const MIN_RSA_BITS: usize = 2_048;
const MAX_RSA_BITS: usize = 8_192;

/// Why a request is not signed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadRequest {
    #[error("csr: longer than {MAX_LENGTH} bytes")]
    TooLong,
    #[error("csr: is no PKCS#10 request in PEM: {0}")]
    Malformed(String),
    #[error("csr: its signature does not match its public key")]
    Signature,
    #[error("csr: key is {0}; P-256, P-384 and RSA of {MIN_RSA_BITS} to {MAX_RSA_BITS} bits are accepted")]
    Key(String),
}

/// The public key of a request.
pub(crate) fn public_key(pem: &str) -> Result<SubjectPublicKeyInfo, BadRequest> {
    if pem.len() > MAX_LENGTH {
        return Err(BadRequest::TooLong);
    }
    let malformed = |error: &dyn std::fmt::Display| BadRequest::Malformed(error.to_string());
    let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).map_err(|e| malformed(&e))?;
    key_of(&der)
}

/// The public key of a request without its armour.
pub(crate) fn key_of(der: &[u8]) -> Result<SubjectPublicKeyInfo, BadRequest> {
    let malformed = |error: &dyn std::fmt::Display| BadRequest::Malformed(error.to_string());
    let (rest, request) = X509CertificationRequest::from_der(der).map_err(|e| malformed(&e))?;
    if !rest.is_empty() {
        return Err(BadRequest::Malformed("something follows it".to_owned()));
    }
    let key = &request.certification_request_info.subject_pki;
    match key.parsed().map_err(|e| malformed(&e))? {
        // 256 and 384 bits are also the sizes of other curves: the signer below knows only these two.
        PublicKey::EC(point) if matches!(point.key_size(), 256 | 384) => {}
        PublicKey::EC(point) => {
            return Err(BadRequest::Key(format!("on a curve of {} bits", point.key_size())));
        }
        PublicKey::RSA(rsa) if (MIN_RSA_BITS..=MAX_RSA_BITS).contains(&rsa.key_size()) => {}
        PublicKey::RSA(rsa) => return Err(BadRequest::Key(format!("RSA of {} bits", rsa.key_size()))),
        PublicKey::DSA(_)
        | PublicKey::GostR3410(_)
        | PublicKey::GostR3410_2012(_)
        | PublicKey::Unknown(_) => {
            return Err(BadRequest::Key(format!("of type {}", key.algorithm.algorithm)));
        }
    }
    let key = SubjectPublicKeyInfo::from_der(key.raw).map_err(|e| BadRequest::Key(e.to_string()))?;
    request.verify_signature().map_err(|_invalid| BadRequest::Signature)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn csr(key: &KeyPair) -> String {
        CertificateParams::new(["evil.example.com".to_owned()])
            .unwrap()
            .serialize_request(key)
            .unwrap()
            .pem()
            .unwrap()
    }

    #[test]
    fn keys_that_are_accepted() {
        for algorithm in
            [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_RSA_SHA256]
        {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let found = public_key(&csr(&key)).unwrap();
            assert_eq!(rcgen::PublicKeyData::der_bytes(&found), key.public_key_raw());
        }
    }

    #[test]
    fn keys_that_are_refused() {
        for algorithm in [&rcgen::PKCS_ED25519, &rcgen::PKCS_ECDSA_P521_SHA512] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let error = public_key(&csr(&key)).unwrap_err();
            assert!(matches!(error, BadRequest::Key(_)), "{error}");
        }
    }

    #[test]
    fn who_does_not_hold_the_key_gets_nothing() {
        // The key of another in the place of one's own: the signature no longer fits.
        let (mine, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let request = CertificateParams::default().serialize_request(&mine).unwrap();
        let mut der = request.der().to_vec();
        let at = der.windows(65).position(|window| window == mine.public_key_raw()).unwrap();
        der[at..at + 65].copy_from_slice(other.public_key_raw());
        let pem = super::super::authority::pem(&der.into()).replace("CERTIFICATE", "CERTIFICATE REQUEST");
        assert_eq!(public_key(&pem).unwrap_err(), BadRequest::Signature);
    }

    #[test]
    fn what_is_no_request_is_told() {
        for text in
            ["", "x", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"]
        {
            assert!(matches!(public_key(text), Err(BadRequest::Malformed(_))), "{text}");
        }
        assert_eq!(public_key(&"x".repeat(MAX_LENGTH + 1)), Err(BadRequest::TooLong));
    }
}
