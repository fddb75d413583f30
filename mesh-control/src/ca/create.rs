//! Makes roots and issuing certificates. Pure but for the random numbers.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};

use super::{CERT, CHAIN, KEY, ROOT_KEY, ROOTS, authority};

/// Certificates of authorities are backdated by this much.
pub(super) const DAY: Duration = Duration::from_secs(86_400);
/// A root lives ten years.
const ROOT_LIFETIME: Duration = Duration::from_secs(3_650 * 86_400);
/// An issuing certificate lives a year, and is renewed at half of it.
const ISSUER_LIFETIME: Duration = Duration::from_secs(365 * 86_400);

/// A certificate and its key, PEM.
pub(super) struct Pair {
    pub(super) cert: String,
    pub(super) key: String,
}

/// Files by name.
pub(super) type NamedFiles = Vec<(&'static str, Option<String>)>;

/// Everything that an authority starts with.
pub(crate) fn first(now: SystemTime) -> Result<Vec<(&'static str, Option<String>)>, rcgen::Error> {
    let root = root(now)?;
    let issuer = issuer(&root, now)?;
    Ok(vec![
        (ROOT_KEY, Some(root.key)),
        (ROOTS, Some(root.cert)),
        (KEY, Some(issuer.key)),
        (CHAIN, Some(issuer.cert.clone())),
        (CERT, Some(issuer.cert)),
    ])
}

/// A new self-signed root.
pub(super) fn root(now: SystemTime) -> Result<Pair, rcgen::Error> {
    let key = KeyPair::generate()?;
    let serial = authority::serial()?;
    // Two roots in one bundle must differ by name, or chains could be built to the wrong one first.
    let name = format!("mesh root {}", serial.to_string().replace(':', "").get(..8).unwrap_or_default());
    let mut params = authority_params(&name, BasicConstraints::Unconstrained, now, now + ROOT_LIFETIME);
    params.serial_number = Some(serial);
    let cert = params.self_signed(&key)?;
    Ok(Pair { cert: cert.pem(), key: key.serialize_pem() })
}

/// A new issuing certificate under `root`, which it does not outlive.
pub(super) fn issuer(root: &Pair, now: SystemTime) -> Result<Pair, rcgen::Error> {
    let key = KeyPair::generate()?;
    let root_key = KeyPair::from_pem(&root.key)?;
    let der = CertificateDer::from_pem_slice(root.cert.as_bytes())
        .map_err(|error| rcgen::Error::PemError(error.to_string()))?;
    let end = authority::not_after(&der).ok_or(rcgen::Error::CouldNotParseCertificate)?;
    let serial = authority::serial()?;
    let name = format!("mesh issuing {}", serial.to_string().replace(':', "").get(..8).unwrap_or_default());
    let leaves_only = BasicConstraints::Constrained(0);
    let mut params = authority_params(&name, leaves_only, now, end.min(now + ISSUER_LIFETIME));
    params.serial_number = Some(serial);
    params.use_authority_key_identifier_extension = true;
    let cert = params.signed_by(&key, &Issuer::from_ca_cert_der(&der, root_key)?)?;
    Ok(Pair { cert: cert.pem(), key: key.serialize_pem() })
}

fn authority_params(
    name: &str,
    constraints: BasicConstraints,
    now: SystemTime,
    end: SystemTime,
) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "mesh.dev");
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    // Clocks of agents may be behind.
    params.not_before = (now - DAY).into();
    params.not_after = end.into();
    params
}
