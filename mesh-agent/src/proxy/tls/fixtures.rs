//! Certificate authorities and workloads of tests.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use tokio::net::{TcpListener, TcpStream};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Configs, HandshakeError, Protocol, Tls, accept, connect};
use crate::identity::{Certificates, SpiffeId, Trust, WorkloadCertificate};

pub(crate) fn id(text: &str) -> SpiffeId {
    format!("spiffe://cluster.local/{text}").parse().unwrap()
}

pub(crate) fn client() -> SpiffeId {
    id("ns/shop/sa/client")
}

pub(crate) fn server() -> SpiffeId {
    id("ns/shop/sa/server")
}

static SERIAL: AtomicU64 = AtomicU64::new(1);

/// An authority of its own.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
}

/// What a certificate says.
pub(crate) struct Wanted {
    pub(crate) names: Vec<String>,
    pub(crate) from: SystemTime,
    pub(crate) until: SystemTime,
}

impl Wanted {
    pub(crate) fn of(id: &SpiffeId) -> Self {
        let now = SystemTime::now();
        Self {
            names: vec![id.to_string()],
            from: now - Duration::from_secs(120),
            until: now + Duration::from_secs(3600),
        }
    }
}

impl Authority {
    pub(crate) fn new() -> Self {
        let (key, params) = (KeyPair::generate().unwrap(), Self::params());
        let root = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: Issuer::new(params, key), root }
    }

    fn params() -> CertificateParams {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        params
    }

    /// Another authority's certificate for this one, for who knows only that other one.
    pub(crate) fn vouched_for_by(&self, other: &Self) -> CertificateDer<'static> {
        Self::params().signed_by(self.issuer.key(), &other.issuer).unwrap().der().clone()
    }

    /// A list, in PEM, of these certificates.
    pub(crate) fn revoke(&self, certificates: &[&WorkloadCertificate]) -> String {
        self.revoke_until(certificates, SystemTime::now() + Duration::from_secs(3600))
    }

    /// The same, for as long as that.
    pub(crate) fn revoke_until(&self, certificates: &[&WorkloadCertificate], until: SystemTime) -> String {
        let serial = |certificate: &&WorkloadCertificate| {
            let leaf = certificate.certified.cert[0].as_ref();
            let (_, parsed) = X509Certificate::from_der(leaf).unwrap();
            RevokedCertParams {
                serial_number: SerialNumber::from_slice(parsed.raw_serial()),
                revocation_time: (SystemTime::now() - Duration::from_secs(60)).into(),
                reason_code: None,
                invalidity_date: None,
            }
        };
        let params = CertificateRevocationListParams {
            this_update: (SystemTime::now() - Duration::from_secs(60)).into(),
            next_update: until.into(),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: certificates.iter().map(serial).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    pub(crate) fn issue(&self, wanted: &Wanted) -> WorkloadCertificate {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names =
            wanted.names.iter().map(|name| SanType::URI(name.as_str().try_into().unwrap())).collect();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = wanted.from.into();
        params.not_after = wanted.until.into();
        let leaf = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.root.clone()).unwrap();
        let private = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        WorkloadCertificate {
            certified: Arc::new(CertifiedKey::new(vec![leaf], any_supported_type(&private).unwrap())),
            roots: Arc::new(roots),
            not_after: wanted.until,
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
        }
    }
}

/// The certificates of a node, and whom it trusts: at first whom the first of them came with.
#[derive(Default)]
pub(crate) struct Held {
    certificates: Mutex<HashMap<SpiffeId, Arc<WorkloadCertificate>>>,
    trust: Arc<Trust>,
}

impl Held {
    pub(crate) fn set(&self, id: &SpiffeId, certificate: WorkloadCertificate) {
        if self.trust.generation() == 0 {
            self.trust.set(Arc::clone(&certificate.roots));
        }
        self.certificates.lock().unwrap().insert(id.clone(), Arc::new(certificate));
    }

    pub(crate) fn remove(&self, id: &SpiffeId) {
        self.certificates.lock().unwrap().remove(id);
    }

    /// Other roots, for every certificate.
    pub(crate) fn trust_in(&self, authorities: &[&Authority]) {
        let mut roots = rustls::RootCertStore::empty();
        authorities.iter().for_each(|authority| roots.add(authority.root.clone()).unwrap());
        let roots = Arc::new(roots);
        for certificate in self.certificates.lock().unwrap().values_mut() {
            *certificate = Arc::new(WorkloadCertificate {
                certified: Arc::clone(&certificate.certified),
                roots: Arc::clone(&roots),
                not_after: certificate.not_after,
                serial: SERIAL.fetch_add(1, Ordering::Relaxed),
            });
        }
        self.trust.set(roots);
    }
}

impl Certificates for Held {
    fn current(&self, id: &SpiffeId) -> Option<Arc<WorkloadCertificate>> {
        self.certificates.lock().unwrap().get(id).cloned()
    }

    fn trusted(&self) -> &Arc<Trust> {
        &self.trust
    }
}

/// Both ends' configurations, each with one workload.
pub(crate) struct Pair {
    pub(crate) authority: Authority,
    pub(crate) client_held: Arc<Held>,
    pub(crate) server_held: Arc<Held>,
    pub(crate) client: Arc<Configs>,
    pub(crate) server: Arc<Configs>,
}

impl Pair {
    pub(crate) fn new() -> Self {
        Self::speaking(vec![Protocol::Stream, Protocol::H2])
    }

    pub(crate) fn speaking(protocols: Vec<Protocol>) -> Self {
        let authority = Authority::new();
        let (client_held, server_held) = (Arc::new(Held::default()), Arc::new(Held::default()));
        client_held.set(&client(), authority.issue(&Wanted::of(&client())));
        server_held.set(&server(), authority.issue(&Wanted::of(&server())));
        let (c, s): (Arc<dyn Certificates>, Arc<dyn Certificates>) =
            (client_held.clone(), server_held.clone());
        Self {
            authority,
            client_held,
            server_held,
            client: Arc::new(Configs::offering(c, protocols)),
            server: Arc::new(Configs::new(s)),
        }
    }

    /// A handshake over loopback: what each end makes of it.
    pub(crate) async fn shake(&self) -> (Result<Tls, HandshakeError>, Result<Tls, HandshakeError>) {
        let (near, far) = sockets().await;
        let (own, peer) = (client(), server());
        tokio::join!(connect(&self.client, &own, &peer, near), accept(&self.server, &peer, far))
    }

    pub(crate) async fn tunnel(&self) -> (Tls, Tls) {
        let (near, far) = self.shake().await;
        (near.unwrap(), far.unwrap())
    }
}

/// Two ends of a connection over loopback.
pub(crate) async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (near, far) = (near.unwrap(), far.unwrap().0);
    near.set_nodelay(true).unwrap();
    far.set_nodelay(true).unwrap();
    (near, far)
}
