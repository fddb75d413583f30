//! A certificate authority for tests, and what is on disk for an agent that trusts it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

use super::access::Access;
use super::answer::{Answer, check, provider};
use super::request::Request;
use super::store::Store;
use crate::config::{NodeConfig, ServerConfig};
use crate::fixtures::Directory;

/// Signs what it is told to.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        Self(CertifiedIssuer::self_signed(ca(name), KeyPair::generate().unwrap()).unwrap())
    }

    /// One below it.
    pub(crate) fn intermediate(&self, name: &str) -> Self {
        Self(CertifiedIssuer::signed_by(ca(name), KeyPair::generate().unwrap(), &self.0).unwrap())
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// For the key of a request.
    pub(crate) fn sign(&self, csr: &str, leaf: CertificateParams) -> String {
        let request = CertificateSigningRequestParams::from_pem(csr).unwrap();
        self.sign_key(&request.public_key, leaf)
    }

    pub(crate) fn sign_key(&self, key: &impl PublicKeyData, leaf: CertificateParams) -> String {
        leaf.signed_by(key, &self.0).unwrap().pem()
    }

    fn server_certificate(&self) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["mesh-control".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        (params.signed_by(&key, &self.0).unwrap(), key)
    }

    /// TLS of that version and with these protocols by ALPN.
    pub(crate) fn server_config(
        &self,
        version: &'static rustls::SupportedProtocolVersion,
        protocols: &[&[u8]],
    ) -> Arc<rustls::ServerConfig> {
        let (certificate, key) = self.server_certificate();
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der());
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[version])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key.into())
            .unwrap();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Arc::new(config)
    }

    /// TLS of a server that this authority vouches for, and that asks for certificates of these authorities.
    pub(crate) fn server_tls(&self, clients: &[&Self]) -> ServerTlsConfig {
        let (certificate, key) = self.server_certificate();
        let roots: String = clients.iter().map(|authority| authority.pem()).collect();
        ServerTlsConfig::new()
            .identity(Identity::from_pem(certificate.pem(), key.serialize_pem()))
            .client_ca_root(Certificate::from_pem(roots))
            .client_auth_optional(true)
    }
}

/// A store with nothing but the certificate of [`node`], of that authority.
pub(crate) fn own_certificate(authority: &Authority) -> Arc<Store> {
    let uri = "spiffe://cluster.local/mesh.dev/node/node-a";
    let store = Arc::new(Store::default());
    store.put_node(Some(&answer(authority, uri, Duration::from_secs(3600))));
    store
}

/// What an agent makes of a good answer.
pub(crate) fn answer(authority: &Authority, uri: &str, lifetime: Duration) -> Answer {
    let request = Request::new(uri).unwrap();
    let chain = [authority.sign(&request.csr, leaf(&[uri], lifetime)), authority.pem()];
    check(&chain, request.key, Some(uri), SystemTime::now()).unwrap()
}

fn ca(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// A leaf as istiod makes it: no subject, these URIs, both usages, from two minutes ago.
pub(crate) fn leaf(uris: &[&str], lifetime: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = uris.iter().map(|&uri| SanType::URI(uri.try_into().unwrap())).collect();
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let now = SystemTime::now();
    params.not_before = (now - Duration::from_secs(120)).into();
    params.not_after = (now + lifetime).into();
    params
}

/// The files that an agent is given.
pub(crate) struct Files(Directory);

impl Files {
    pub(crate) fn new(root: &str, token: &str) -> Self {
        let files = Self(Directory::new());
        files.write_root(root);
        files.write_token(token);
        files
    }

    pub(crate) fn write_root(&self, pem: &str) {
        std::fs::write(self.0.path().join("root.pem"), pem).unwrap();
    }

    pub(crate) fn write_token(&self, token: &str) {
        std::fs::write(self.0.path().join("token"), token).unwrap();
    }

    pub(crate) fn remove_token(&self) {
        std::fs::remove_file(self.0.path().join("token")).unwrap();
    }

    /// To a server at that address.
    pub(crate) fn server(&self, address: std::net::SocketAddr) -> ServerConfig {
        ServerConfig {
            address: format!("https://{address}").parse().unwrap(),
            name: "mesh-control".try_into().unwrap(),
            root: self.0.path().join("root.pem"),
            token: Some(self.0.path().join("token")),
        }
    }

    /// For [`node`].
    pub(crate) fn access(&self, address: std::net::SocketAddr, own: &Arc<Store>) -> Arc<Access> {
        Arc::new(Access::new(self.server(address), &node(), Arc::clone(own)))
    }
}

pub(crate) fn node() -> NodeConfig {
    NodeConfig {
        name: "node-a".to_owned(),
        ip: "127.0.0.1".parse().unwrap(),
        namespace: "mesh-system".to_owned(),
        id: "ztunnel~127.0.0.1~node-a.mesh-system~mesh-system.svc.cluster.local".to_owned(),
        cluster_id: "Kubernetes".to_owned(),
        region: None,
        zone: None,
    }
}
