//! One conversation with a server of Istio's certificate API.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_common::api::istio::v1::auth::IstioCertificateRequest;
use mesh_common::api::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use tokio::sync::OnceCell;
use tonic::Code;

use super::access::{Access, AccessError, Link, describe};
use super::answer::{self, Answer, BadAnswer};
use super::request::{Request, RequestError};
use super::schedule::Subject;
use super::store::OwnCertificate;

/// An authority that takes longer is away.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The chain and all roots.
const ANSWER_LIMIT: usize = 4 << 20;

/// Why a fetch failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    /// There is no connection. The error is shared by all that waited for it.
    #[error("{0}")]
    Access(Arc<AccessError>),
    /// The authority said no.
    #[error("{}", describe(.0))]
    Refused(Box<tonic::Status>),
    /// The connection broke.
    #[error("{}", describe(.0))]
    Broken(Box<tonic::Status>),
    /// The authority took too long.
    #[error("no answer within {ANSWER_TIMEOUT:?}")]
    Silent,
    /// The answer cannot be used.
    #[error("refused the answer: {0}")]
    Answer(#[from] BadAnswer),
    /// There was nothing to ask with.
    #[error(transparent)]
    Request(#[from] RequestError),
}

impl FetchError {
    /// For the metric.
    pub(super) fn outcome(&self) -> &'static str {
        match self {
            Self::Access(error) => match **error {
                AccessError::File { .. } => "misconfigured",
                AccessError::Unreachable(_) | AccessError::Tls(_) | AccessError::Http(_) => "unreachable",
            },
            Self::Broken(_) | Self::Silent => "unreachable",
            Self::Refused(status) if status.code() == Code::Unauthenticated => "unauthenticated",
            Self::Refused(_) => "refused",
            Self::Answer(_) => "invalid",
            Self::Request(_) => "misconfigured",
        }
    }

    /// Whether the authority heard of it.
    pub(super) fn was_asked(&self) -> bool {
        !matches!(self, Self::Access(_))
    }

    /// Whether another credential might help.
    pub(super) fn blames_credential(&self) -> bool {
        match self {
            Self::Access(error) => !matches!(**error, AccessError::Unreachable(_) | AccessError::File { .. }),
            Self::Broken(_) => true,
            Self::Refused(status) => status.code() == Code::Unauthenticated,
            Self::Silent | Self::Answer(_) | Self::Request(_) => false,
        }
    }

    /// Whether the connection is of no more use.
    pub(super) fn ends_connection(&self) -> bool {
        matches!(self, Self::Access(_) | Self::Silent) || self.blames_credential()
    }
}

/// A connection that is made by the first fetch that needs it and shared by those that come while one is under way.
#[derive(Debug)]
pub(super) struct Burst {
    access: Arc<Access>,
    own: Option<OwnCertificate>,
    link: OnceCell<Result<Link, Arc<AccessError>>>,
}

impl Burst {
    /// One that will use that certificate, or a token.
    pub(super) fn new(access: &Arc<Access>, own: Option<OwnCertificate>) -> Self {
        Self { access: Arc::clone(access), own, link: OnceCell::new() }
    }

    /// Serial of the certificate that it uses.
    pub(super) fn used(&self) -> Option<u64> {
        self.own.as_ref().map(|own| own.serial)
    }

    /// Asks for a certificate, and checks what comes.
    pub(super) async fn fetch(&self, subject: &Subject, node: &str) -> Result<Answer, FetchError> {
        let connect = async || self.access.connect(self.own.as_ref()).await.map_err(Arc::new);
        let link = self.link.get_or_init(connect).await.clone().map_err(FetchError::Access)?;
        let (wanted, asked) = match subject {
            // Whoever answers decides who this node is.
            Subject::Node => (None, format!("spiffe://cluster.local/mesh.dev/node/{node}")),
            Subject::Workload(id) => (Some(id.as_str()), id.to_string()),
        };
        let request = Request::new(&asked)?;
        let message = IstioCertificateRequest {
            csr: request.csr,
            // Its default.
            validity_duration: 0,
            metadata: wanted.map(impersonate),
        };
        let message = link.request(message).await.map_err(|error| FetchError::Access(Arc::new(error)))?;
        let mut client =
            IstioCertificateServiceClient::new(link.channel).max_decoding_message_size(ANSWER_LIMIT);
        let answered = tokio::time::timeout(ANSWER_TIMEOUT, client.create_certificate(message)).await;
        let answered = answered.map_err(|_elapsed| FetchError::Silent)?;
        let answer = answered.map_err(|status| {
            // Only what did not come from the server has a cause.
            match std::error::Error::source(&status) {
                Some(_) => FetchError::Broken(Box::new(status)),
                None => FetchError::Refused(Box::new(status)),
            }
        })?;
        Ok(answer::check(&answer.into_inner().cert_chain, request.key, wanted, SystemTime::now())?)
    }
}

fn impersonate(identity: &str) -> prost_types::Struct {
    let kind = prost_types::value::Kind::StringValue(identity.to_owned());
    let value = prost_types::Value { kind: Some(kind) };
    prost_types::Struct { fields: BTreeMap::from([("ImpersonatedIdentity".to_owned(), value)]) }
}

#[cfg(test)]
mod tests;
