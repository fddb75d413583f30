//! Connections as agents make them: TLS, the mesh's root, and a join token or the certificate of a node.

use std::{collections::BTreeMap, fs};

use mesh_common::api::istio::v1::auth::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};
use prost_types::{Struct, Value, value::Kind};
use rcgen::{CertificateParams, KeyPair};
use tonic::{
    Request, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use crate::world::World;

/// The token of the world's join-token file that is good for any node.
pub(crate) const TOKEN: &str = "token-for-any-node";
/// The one that is good for `node-b` alone.
pub(crate) const TOKEN_B: &str = "token-for-node-b-only";

/// What a client shows.
#[derive(Clone, Default)]
pub(crate) struct Shows {
    pub(crate) token: Option<String>,
    pub(crate) node: Option<String>,
    pub(crate) identity: Option<(String, String)>,
}

/// A certificate as it was issued.
pub(crate) struct Issued {
    pub(crate) chain: Vec<String>,
    pub(crate) key: KeyPair,
}

impl Issued {
    /// To be shown by a client.
    pub(crate) fn shown(&self) -> Shows {
        let sent = self.chain[..self.chain.len() - 1].concat();
        Shows { identity: Some((sent, self.key.serialize_pem())), ..Shows::default() }
    }
}

impl Shows {
    /// The token for any node, standing for `node-a`.
    pub(crate) fn token() -> Self {
        Self { token: Some(TOKEN.into()), node: Some("node-a".into()), identity: None }
    }

    pub(crate) fn token_of(token: &str) -> Self {
        Self { token: Some(token.into()), ..Self::default() }
    }

    /// A request with the headers.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            // White space around it, as a token file with a trailing newline gives.
            request.metadata_mut().insert("authorization", format!("Bearer  {token} ").parse().unwrap());
        }
        if let Some(node) = &self.node {
            request.metadata_mut().insert("mesh-node", node.parse().unwrap());
        }
        request
    }

    /// A new connection.
    pub(crate) async fn connect(&self, world: &World) -> Result<Channel, tonic::transport::Error> {
        self.connect_by(world, &world.roots()).await
    }

    pub(crate) async fn connect_by(
        &self,
        world: &World,
        roots: &str,
    ) -> Result<Channel, tonic::transport::Error> {
        self.connect_to(world.control.xds_address(), roots).await
    }

    pub(crate) async fn connect_to(
        &self,
        address: std::net::SocketAddr,
        roots: &str,
    ) -> Result<Channel, tonic::transport::Error> {
        let mut tls =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots)).domain_name("mesh-control");
        if let Some((chain, key)) = &self.identity {
            tls = tls.identity(Identity::from_pem(chain, key));
        }
        let url = format!("https://{address}");
        Endpoint::from_shared(url).unwrap().tls_config(tls).unwrap().connect().await
    }

    /// Asks for a certificate over a new connection.
    pub(crate) async fn ask(&self, world: &World, wanted: &Wanted) -> Result<Issued, Status> {
        let channel = self.connect(world).await.map_err(|error| Status::from_error(Box::new(error)))?;
        self.ask_on(channel, wanted).await
    }

    pub(crate) async fn ask_on(&self, channel: Channel, wanted: &Wanted) -> Result<Issued, Status> {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = wanted.names.iter().map(|name| (*name).to_owned()).collect();
        let csr = CertificateParams::new(names).unwrap().serialize_request(&key).unwrap().pem().unwrap();
        let text = |text: &str| Value { kind: Some(Kind::StringValue(text.to_owned())) };
        let metadata = wanted.identity.map(|identity| Struct {
            fields: BTreeMap::from([("ImpersonatedIdentity".to_owned(), text(identity))]),
        });
        let message = IstioCertificateRequest { csr, validity_duration: wanted.seconds, metadata };
        let answer =
            IstioCertificateServiceClient::new(channel).create_certificate(self.request(message)).await?;
        Ok(Issued { chain: answer.into_inner().cert_chain, key })
    }
}

/// What is asked for.
#[derive(Default)]
pub(crate) struct Wanted {
    pub(crate) identity: Option<&'static str>,
    pub(crate) seconds: i64,
    /// In the request, where they mean nothing.
    pub(crate) names: &'static [&'static str],
}

impl Wanted {
    pub(crate) fn own() -> Self {
        Self::default()
    }

    pub(crate) fn of(identity: &'static str) -> Self {
        Self { identity: Some(identity), ..Self::default() }
    }
}

impl World {
    /// The roots that agents are given.
    pub(crate) fn roots(&self) -> String {
        fs::read_to_string(self.config.root_certificates()).unwrap()
    }
}
