//! Certificates for agents: their own, and those of workloads that the control plane has placed on their node.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_common::api::istio::v1::auth::{
    IstioCertificateRequest, IstioCertificateResponse,
    istio_certificate_service_server::IstioCertificateService,
};
use prost_types::value::Kind;
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use crate::{
    auth::{Caller, Credentials, Refusal},
    ca::{BadRequest, SignError, public_key},
    catalog::Catalog,
    connections::Peer,
    identity::Identity,
    index::Placement,
    keeper::InForce,
    metrics::Metrics,
};

const IMPERSONATED: &str = "ImpersonatedIdentity";

/// The certificate service.
pub(crate) struct Certificates {
    pub(crate) in_force: watch::Receiver<Arc<InForce>>,
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) trust_domain: String,
    /// What is given when nothing is asked, and at most.
    pub(crate) lifetime: Duration,
}

/// Why no certificate is given.
#[derive(Debug, thiserror::Error)]
enum Denied {
    #[error(transparent)]
    Caller(#[from] Refusal),
    #[error("the token names no node, and the header mesh-node is missing")]
    NoNode,
    #[error("{IMPERSONATED} {0}")]
    Identity(String),
    #[error("{wanted} has no workload on node {node}")]
    NotPlaced { wanted: Identity, node: String },
    #[error("validity_duration is negative")]
    Lifetime,
    #[error(transparent)]
    Request(#[from] BadRequest),
    #[error(transparent)]
    Sign(#[from] SignError),
}

impl Denied {
    fn reason(&self) -> &'static str {
        match self {
            Self::Caller(refusal) => refusal.reason(),
            Self::NoNode => "no_node",
            Self::Identity(_) => "identity",
            Self::NotPlaced { .. } => "not_placed",
            Self::Lifetime => "lifetime",
            Self::Request(_) => "request",
            Self::Sign(_) => "signing",
        }
    }

    fn status(self) -> Status {
        let text = self.to_string();
        match self {
            Self::Caller(_) | Self::NoNode => Status::unauthenticated(text),
            Self::NotPlaced { .. } => Status::permission_denied(text),
            Self::Identity(_) | Self::Lifetime | Self::Request(_) => Status::invalid_argument(text),
            Self::Sign(_) => Status::unavailable(text),
        }
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Certificates {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer = Peer::address_of(&request);
        match self.create(&request, SystemTime::now()) {
            Ok((identity, cert_chain)) => {
                info!(%peer, %identity, "certificate issued");
                self.metrics.issued.inc();
                Ok(Response::new(IstioCertificateResponse { cert_chain }))
            }
            Err(denied) => {
                let reason = denied.reason();
                warn!(%peer, reason, %denied, "certificate refused");
                self.metrics.refused_certificates.with_label_values(&[reason]).inc();
                Err(denied.status())
            }
        }
    }
}

impl Certificates {
    fn create(
        &self,
        request: &Request<IstioCertificateRequest>,
        now: SystemTime,
    ) -> Result<(Identity, Vec<String>), Denied> {
        let in_force = Arc::clone(&self.in_force.borrow());
        let caller = Credentials::of(request).judge(&in_force.rules(), now)?;
        let _serving = Peer::serve(request);
        let asked = request.get_ref();
        let identity = self.identity(asked, caller)?;
        let lifetime = match u64::try_from(asked.validity_duration) {
            Ok(0) => self.lifetime,
            Ok(seconds) => Duration::from_secs(seconds).min(self.lifetime),
            Err(_negative) => return Err(Denied::Lifetime),
        };
        let key = public_key(&asked.csr)?;
        let chain = in_force.authority.sign(&identity.to_string(), &key, lifetime, now)?;
        Ok((identity, chain))
    }

    /// What the caller may have of what it asks.
    fn identity(&self, asked: &IstioCertificateRequest, caller: Caller) -> Result<Identity, Denied> {
        let node = caller.node.ok_or(Denied::NoNode)?;
        let wanted = asked.metadata.as_ref().and_then(|metadata| metadata.fields.get(IMPERSONATED));
        let wanted = match wanted.map(|value| &value.kind) {
            None => return Ok(Identity::Node { trust_domain: self.trust_domain.clone(), name: node }),
            Some(Some(Kind::StringValue(text))) => text,
            Some(_) => return Err(Denied::Identity("is no text".to_owned())),
        };
        let shown: String = wanted.chars().take(512).collect();
        let wanted: Identity =
            wanted.parse().map_err(|error| Denied::Identity(format!("{shown:?} {error}")))?;
        let Identity::Workload { trust_domain, namespace, service_account } = &wanted else {
            return Err(Denied::Identity(format!("{shown:?} is no workload")));
        };
        let placed = Placement {
            node: node.as_str().into(),
            namespace: namespace.as_str().into(),
            service_account: service_account.as_str().into(),
        };
        if *trust_domain == self.trust_domain && self.catalog.read().is_placed(&placed) {
            Ok(wanted)
        } else {
            Err(Denied::NotPlaced { wanted, node })
        }
    }
}
