//! The authority in force: checked when it is loaded, and signing leaves. Pure: time is an argument.

use std::{
    net::IpAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::{
    RootCertStore,
    client::verify_server_cert_signed_by_trust_anchor,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime, pem::PemObject as _},
    server::ParsedCertificate,
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

use super::{CERT, CHAIN, Files, KEY, ROOTS, Unusable};

/// Clocks of agents may be behind by this much.
pub(crate) const BACKDATE: Duration = Duration::from_secs(120);

/// What signs certificates.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// The issuing certificate and what is between it and a root; empty where a root signs itself.
    intermediates: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    not_before: SystemTime,
    not_after: SystemTime,
}

/// A certificate and key of the control plane itself.
pub(crate) struct ServerIdentity {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) not_after: SystemTime,
}

/// A certificate was not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SignError {
    #[error("the issuing certificate has expired")]
    Expired,
    #[error("signing: {0}")]
    Failed(#[from] rcgen::Error),
}

impl Authority {
    /// Takes files in, after they were checked to the end: what they sign is what agents will accept.
    pub(crate) fn load(files: &Files, now: SystemTime) -> Result<Self, Unusable> {
        let mut own = certificates(CERT, &files.cert)?;
        let roots = certificates(ROOTS, &files.roots)?;
        let mut others = files.chain.as_deref().map_or(Ok(Vec::new()), |text| certificates(CHAIN, text))?;
        others.splice(0..0, own.split_off(1));
        let own = own.remove(0);
        let cert = parse(CERT, &own)?;
        let (not_before, mut not_after) = validity(&cert);
        check_authority(CERT, &cert, now)?;
        let key = KeyPair::try_from(
            &PrivateKeyDer::from_pem_slice(files.key.as_bytes())
                .map_err(|error| Unusable::new(KEY, error))?,
        )
        .map_err(|error| Unusable::new(KEY, error))?;
        if key.subject_public_key_info() != cert.public_key().raw {
            return Err(Unusable::new(KEY, format!("is not the key of the certificate in {CERT}")));
        }
        let mut kept: Vec<CertificateDer<'static>> = Vec::new();
        for root in roots {
            let parsed = parse(ROOTS, &root)?;
            // An old root that stayed in the bundle does no harm, and no good.
            if validity(&parsed).1 < now && !kept.is_empty() {
                continue;
            }
            check_authority(ROOTS, &parsed, now)?;
            if !kept.contains(&root) {
                kept.push(root);
            }
        }
        let roots = kept;
        let mut intermediates: Vec<CertificateDer<'static>> = Vec::new();
        for cert in std::iter::once(own.clone()).chain(others) {
            if roots.contains(&cert) || intermediates.contains(&cert) {
                continue;
            }
            let parsed = parse(CHAIN, &cert)?;
            check_authority(CHAIN, &parsed, now)?;
            not_after = not_after.min(validity(&parsed).1);
            intermediates.push(cert);
        }
        let issuer = Issuer::from_ca_cert_der(&own, key).map_err(|error| Unusable::new(CERT, error))?;
        let authority = Self { issuer, intermediates, roots, not_before, not_after };
        authority.prove(now)?;
        Ok(authority)
    }

    /// Signs a leaf and verifies it as an agent would.
    fn prove(&self, now: SystemTime) -> Result<(), Unusable> {
        let failed =
            |error: &dyn std::fmt::Display| Unusable::new(CERT, format!("a trial certificate: {error}"));
        let identity =
            self.server(&["localhost".to_owned()], Duration::from_secs(600), now).map_err(|e| failed(&e))?;
        let leaf = ParsedCertificate::try_from(&identity.chain[0]).map_err(|e| failed(&e))?;
        let since = now.duration_since(UNIX_EPOCH).map_err(|e| failed(&e))?;
        let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
        verify_server_cert_signed_by_trust_anchor(
            &leaf,
            &self.root_store()?,
            &self.intermediates,
            UnixTime::since_unix_epoch(since),
            algorithms.all,
        )
        .map_err(|error| {
            Unusable::new(CERT, format!("does not verify to a root of {ROOTS} by {CHAIN}: {error}"))
        })
    }

    /// The trusted roots.
    pub(crate) fn root_store(&self) -> Result<RootCertStore, Unusable> {
        let mut store = RootCertStore::empty();
        for root in &self.roots {
            store.add(root.clone()).map_err(|error| Unusable::new(ROOTS, error))?;
        }
        Ok(store)
    }

    /// Signs a certificate for `uri`; the answer is `cert_chain` as the wire has it.
    pub(crate) fn sign(
        &self,
        uri: &str,
        key: &SubjectPublicKeyInfo,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Vec<String>, SignError> {
        let uri = SanType::URI(uri.try_into()?);
        let (params, _) = self.leaf(vec![uri], lifetime, now)?;
        let leaf = params.signed_by(key, &self.issuer)?;
        let mut chain = vec![leaf.pem()];
        chain.extend(self.intermediates.iter().map(|cert| pem(cert)));
        chain.push(self.roots.iter().map(|cert| pem(cert)).collect());
        Ok(chain)
    }

    /// A new certificate of the control plane, for host names and addresses.
    pub(crate) fn server(
        &self,
        names: &[String],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<ServerIdentity, SignError> {
        let name = |name: &String| match name.parse::<IpAddr>() {
            Ok(address) => Ok(SanType::IpAddress(address)),
            Err(_not_an_address) => name.as_str().try_into().map(SanType::DnsName),
        };
        let names = names.iter().map(name).collect::<Result<Vec<_>, _>>()?;
        let key = KeyPair::generate()?;
        let (params, not_after) = self.leaf(names, lifetime, now)?;
        let leaf = params.signed_by(&key, &self.issuer)?;
        let mut chain = vec![leaf.der().clone()];
        chain.extend(self.intermediates.iter().cloned());
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(ServerIdentity { chain, key, not_after })
    }

    fn leaf(
        &self,
        names: Vec<SanType>,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<(CertificateParams, SystemTime), SignError> {
        let not_after = self.not_after.min(now + lifetime);
        if not_after <= now {
            return Err(SignError::Expired);
        }
        let mut params = CertificateParams::default();
        // Without a subject the names are critical: nobody may pass over them.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial()?);
        params.not_before = (now - BACKDATE).max(self.not_before).into();
        params.not_after = not_after.into();
        Ok((params, not_after))
    }

    /// When the first certificate of the chain expires.
    pub(crate) fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// When half of the issuing certificate's life is over.
    pub(crate) fn half_life(&self) -> SystemTime {
        let life = self.not_after.duration_since(self.not_before).unwrap_or_default();
        self.not_before + life / 2
    }

    /// Number of roots that are trusted.
    pub(crate) fn roots(&self) -> usize {
        self.roots.len()
    }
}

/// A random serial number, positive and of full length.
pub(super) fn serial() -> Result<SerialNumber, rcgen::Error> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_unspecified| rcgen::Error::RingUnspecified)?;
    bytes[0] = (bytes[0] & 0x3f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

/// When a certificate expires.
pub(super) fn not_after(der: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    Some(validity(&cert).1)
}

/// From when on a certificate is valid.
pub(super) fn not_before(der: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    Some(validity(&cert).0)
}

pub(super) fn certificates(file: &'static str, text: &str) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let found = found.map_err(|error| Unusable::new(file, error))?;
    if found.is_empty() { Err(Unusable::new(file, "holds no certificate")) } else { Ok(found) }
}

fn parse<'a>(file: &'static str, der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, Unusable> {
    let (_, cert) = X509Certificate::from_der(der).map_err(|error| Unusable::new(file, error))?;
    Ok(cert)
}

fn validity(cert: &X509Certificate<'_>) -> (SystemTime, SystemTime) {
    let time = |seconds: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    let validity = cert.validity();
    (time(validity.not_before.timestamp()), time(validity.not_after.timestamp()))
}

fn check_authority(file: &'static str, cert: &X509Certificate<'_>, now: SystemTime) -> Result<(), Unusable> {
    let subject = cert.subject();
    let constraints = cert.basic_constraints().map_err(|error| Unusable::new(file, error))?;
    if !constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err(Unusable::new(file, format!("{subject} is no authority: its CA bit is not set")));
    }
    let usage = cert.key_usage().map_err(|error| Unusable::new(file, error))?;
    if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
        return Err(Unusable::new(
            file,
            format!("{subject} may not sign certificates: keyCertSign is not set"),
        ));
    }
    let (not_before, not_after) = validity(cert);
    if now > not_after {
        return Err(Unusable::new(file, format!("{subject} expired at {}", cert.validity().not_after)));
    }
    if now < not_before {
        return Err(Unusable::new(
            file,
            format!("{subject} is not valid before {}", cert.validity().not_before),
        ));
    }
    Ok(())
}

/// PEM of a certificate.
pub(super) fn pem(der: &CertificateDer<'_>) -> String {
    const LINE: usize = 64;
    let text = base64(der);
    let mut pem = String::with_capacity(text.len() + text.len() / LINE + 64);
    pem.push_str("-----BEGIN CERTIFICATE-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(rest.len().min(LINE));
        pem.push_str(line);
        pem.push('\n');
        rest = more;
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word =
            chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let symbol = ALPHABET[(word >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= chunk.len() { char::from(symbol) } else { '=' });
        }
    }
    text
}
