//! An authority whose keys the test holds: it issues what no good one would.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber,
};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

/// A root, and an issuing certificate below it.
pub struct Authority {
    root: String,
    issuing: rcgen::Certificate,
    issuing_key: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate with its key.
#[derive(Debug, Clone)]
pub struct Credential {
    /// Chain and private key, whether they belong together or not.
    pub certified: Arc<CertifiedKey>,
    serial: SerialNumber,
}

/// What a certificate is to say.
#[derive(Debug, Clone)]
pub struct Leaf {
    /// Its alternative names.
    pub names: Vec<SanType>,
    /// From when on it is valid.
    pub from: SystemTime,
    /// Until when.
    pub until: SystemTime,
    /// For which role.
    pub usages: Vec<ExtendedKeyUsagePurpose>,
}

impl Leaf {
    /// As a workload's is.
    pub fn of(identity: &str) -> anyhow::Result<Self> {
        Self::named(vec![uri(identity)?])
    }

    /// The same with other names.
    pub fn named(names: Vec<SanType>) -> anyhow::Result<Self> {
        let now = SystemTime::now();
        let usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok(Self { names, from: now - HOUR, until: now + HOUR, usages })
    }

    /// Valid in that time only.
    pub fn valid(self, from: SystemTime, until: SystemTime) -> Self {
        Self { from, until, ..self }
    }

    /// For that role only.
    pub fn only_for(self, usage: ExtendedKeyUsagePurpose) -> Self {
        Self { usages: vec![usage], ..self }
    }

    fn params(&self, serial: &SerialNumber) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names.clone_from(&self.names);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages.clone_from(&self.usages);
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial.clone());
        (params.not_before, params.not_after) = (self.from.into(), self.until.into());
        params
    }
}

/// A name that is a URI.
pub fn uri(text: &str) -> anyhow::Result<SanType> {
    Ok(SanType::URI(text.try_into()?))
}

/// A name that is a host's.
pub fn dns(text: &str) -> anyhow::Result<SanType> {
    Ok(SanType::DnsName(text.try_into()?))
}

impl Authority {
    /// A new one. All of them have the same name.
    pub fn new() -> anyhow::Result<Self> {
        let root_key = KeyPair::generate()?;
        let root_params = authority("root", BasicConstraints::Unconstrained);
        let root = root_params.self_signed(&root_key)?.pem();
        let root_issuer = Issuer::new(root_params, root_key);
        let key = KeyPair::generate()?;
        let mut params = authority("issuing", BasicConstraints::Constrained(0));
        params.use_authority_key_identifier_extension = true;
        let issuing = params.signed_by(&key, &root_issuer)?;
        let issuing_key = key.serialize_pem();
        Ok(Self { root, issuing, issuing_key, issuer: Issuer::new(params, key) })
    }

    /// Gives it to a control plane, in Istio's layout.
    pub fn install(&self, dir: &Path) -> anyhow::Result<()> {
        self.install_beside(&[], dir)
    }

    /// The same, while these are trusted as well.
    pub fn install_beside(&self, others: &[&Self], dir: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(dir)?;
        let issuing = self.issuing.pem();
        let roots = others.iter().fold(self.root.clone(), |all, other| all + &other.root);
        for (name, text) in [
            ("root-cert.pem", &roots),
            ("ca-cert.pem", &issuing),
            ("cert-chain.pem", &issuing),
            ("ca-key.pem", &self.issuing_key),
        ] {
            std::fs::write(dir.join(name), text)?;
        }
        Ok(())
    }

    /// A certificate that says this, and what leads to the root.
    pub fn issue(&self, leaf: &Leaf) -> anyhow::Result<Credential> {
        let (key, serial) = (KeyPair::generate()?, serial()?);
        let signed = leaf.params(&serial).signed_by(&key, &self.issuer)?;
        credential(vec![signed.der().clone(), self.issuing.der().clone()], &key, serial)
    }

    /// A list, in PEM, of these certificates.
    pub fn revoke(&self, certificates: &[&Credential]) -> anyhow::Result<String> {
        let now = SystemTime::now();
        let revoked = |one: &&Credential| RevokedCertParams {
            serial_number: one.serial.clone(),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: (now - HOUR).into(),
            next_update: (now + DAY).into(),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: certificates.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(params.signed_by(&self.issuer)?.pem()?)
    }
}

/// A certificate that says this, signed by itself.
pub fn self_signed(leaf: &Leaf) -> anyhow::Result<Credential> {
    let (key, serial) = (KeyPair::generate()?, serial()?);
    let signed = leaf.params(&serial).self_signed(&key)?;
    credential(vec![signed.der().clone()], &key, serial)
}

impl Credential {
    /// Without what leads to the root.
    pub fn alone(&self) -> Self {
        self.with(CertifiedKey::new(self.certified.cert[..1].to_vec(), Arc::clone(&self.certified.key)))
    }

    /// With the key of another: whoever has seen a certificate has not its key.
    pub fn with_the_key_of(&self, other: &Self) -> Self {
        self.with(CertifiedKey::new(self.certified.cert.clone(), Arc::clone(&other.certified.key)))
    }

    fn with(&self, certified: CertifiedKey) -> Self {
        Self { certified: Arc::new(certified), serial: self.serial.clone() }
    }
}

fn credential(
    chain: Vec<CertificateDer<'static>>,
    key: &KeyPair,
    serial: SerialNumber,
) -> anyhow::Result<Credential> {
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let certified = Arc::new(CertifiedKey::new(chain, any_supported_type(&key)?));
    Ok(Credential { certified, serial })
}

fn authority(name: &str, constraints: BasicConstraints) -> CertificateParams {
    let (mut params, now) = (CertificateParams::default(), SystemTime::now());
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = ((now - DAY).into(), (now + 365 * DAY).into());
    params
}

/// Another one each time.
fn serial() -> anyhow::Result<SerialNumber> {
    let mut bytes = [0; 16];
    let random = rustls::crypto::aws_lc_rs::default_provider().secure_random;
    random.fill(&mut bytes).map_err(|_failed| anyhow::anyhow!("no random numbers"))?;
    // Positive, and of full length.
    bytes[0] = (bytes[0] & 0x3f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}
