//! A server that speaks Istio's certificate API as istiod does, and does to its clients what tests tell it to.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use mesh_common::api::istio::v1::auth::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use mesh_common::api::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::identity::testing::{Authority, leaf};

/// What it was asked, and by whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Asked {
    /// `ImpersonatedIdentity`, if any.
    pub(super) identity: Option<String>,
    /// Header `authorization`.
    pub(super) token: Option<String>,
    /// It came with a certificate.
    pub(super) by_certificate: bool,
}

/// Makes something else of an answer.
pub(super) type Spoil = fn(Vec<String>) -> Vec<String>;

/// How it behaves.
pub(super) struct Rules {
    pub(super) authority: Arc<Authority>,
    /// Roots that it gives, PEM; its own when `None`.
    pub(super) bundle: Option<String>,
    pub(super) lifetime: Duration,
    /// Lifetimes that differ from it.
    pub(super) lifetimes: HashMap<String, Duration>,
    /// What it says to whoever asks for this identity; the empty one is the node's own.
    pub(super) refuse: HashMap<String, Status>,
    /// Refuses callers that come with a certificate.
    pub(super) refuse_certificates: bool,
    pub(super) token: String,
    /// Who the caller is.
    pub(super) caller: String,
    pub(super) delay: Duration,
    /// What becomes of an answer.
    pub(super) spoil: Option<Spoil>,
    pub(super) asked: Vec<Asked>,
    pub(super) at_once: usize,
    pub(super) most_at_once: usize,
}

#[derive(Clone)]
pub(super) struct Server {
    rules: Arc<Mutex<Rules>>,
}

impl Server {
    pub(super) fn new(authority: Authority) -> Self {
        let rules = Rules {
            authority: Arc::new(authority),
            bundle: None,
            lifetime: Duration::from_secs(3600),
            lifetimes: HashMap::new(),
            refuse: HashMap::new(),
            refuse_certificates: false,
            token: "join".to_owned(),
            caller: "spiffe://cluster.local/ns/istio-system/sa/ztunnel".to_owned(),
            delay: Duration::ZERO,
            spoil: None,
            asked: Vec::new(),
            at_once: 0,
            most_at_once: 0,
        };
        Self { rules: Arc::new(Mutex::new(rules)) }
    }

    pub(super) fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap()
    }

    /// Listens, with a certificate of the authority of this moment.
    pub(super) async fn listen(&self, address: SocketAddr) -> (SocketAddr, JoinHandle<()>) {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let authority = Arc::clone(&self.rules().authority);
        let tls = authority.server_tls(&[&authority]);
        let router = tonic::transport::Server::builder()
            .tls_config(tls)
            .unwrap()
            .add_service(IstioCertificateServiceServer::new(self.clone()));
        let serving = async move {
            router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        };
        (address, tokio::spawn(serving))
    }

    /// Says yes or no, as istiod does: every refusal is the same.
    fn judge(&self, request: &Request<IstioCertificateRequest>) -> Result<String, Status> {
        let mut rules = self.rules();
        let header =
            |name: &str| request.metadata().get(name).map(|value| value.to_str().unwrap().to_owned());
        let fields = request.get_ref().metadata.as_ref().map(|metadata| &metadata.fields);
        let identity = fields.map(|fields| match &fields["ImpersonatedIdentity"].kind {
            Some(prost_types::value::Kind::StringValue(text)) => text.clone(),
            other => panic!("{other:?}"),
        });
        let asked = Asked {
            identity: identity.clone(),
            token: header("authorization"),
            by_certificate: request.peer_certs().is_some(),
        };
        rules.asked.push(asked.clone());
        assert_eq!(header("clusterid").as_deref(), Some("Kubernetes"));
        assert_eq!(header("mesh-node").as_deref(), Some("node-a"));
        assert_eq!(request.get_ref().validity_duration, 0);
        if let Some(status) = rules.refuse.get(identity.as_deref().unwrap_or_default()) {
            return Err(status.clone());
        }
        let by_token = asked.token == Some(format!("Bearer {}", rules.token));
        let by_certificate = asked.by_certificate && !rules.refuse_certificates;
        if !by_token && !by_certificate {
            return Err(Status::unauthenticated("request authenticate failure"));
        }
        Ok(identity.unwrap_or_else(|| rules.caller.clone()))
    }

    fn answer(&self, csr: &str, identity: &str) -> Vec<String> {
        let rules = self.rules();
        let lifetime = rules.lifetimes.get(identity).copied().unwrap_or(rules.lifetime);
        let certificate = rules.authority.sign(csr, leaf(&[identity], lifetime));
        let roots = rules.bundle.clone().unwrap_or_else(|| rules.authority.pem());
        let chain = vec![certificate, roots];
        rules.spoil.map_or(chain.clone(), |spoil| spoil(chain))
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Server {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let delay = {
            let mut rules = self.rules();
            rules.at_once += 1;
            rules.most_at_once = rules.most_at_once.max(rules.at_once);
            rules.delay
        };
        tokio::time::sleep(delay).await;
        let judged = self.judge(&request);
        self.rules().at_once -= 1;
        let cert_chain = self.answer(&request.get_ref().csr, &judged?);
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}
