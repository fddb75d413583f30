//! What `meshctl` asks.

use std::{
    sync::{Arc, PoisonError},
    time::Instant,
};

use mesh_common::api::{
    WORKLOAD_EXTENSION,
    istio::{
        security::Authorization,
        workload::{Address, address::Type},
    },
    mesh::v1::{
        ExplainRequest, ExplainResponse, ForgetNodeRequest, ForgetNodeResponse, ListRequest, StatusRequest,
        StatusResponse, WorkloadExtension, list_request::Kind, management_server::Management as Service,
    },
};
use prost::Message as _;
use tokio::sync::oneshot;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use crate::{
    catalog::{Catalog, Served},
    connections::Peer,
    explain::{self, Question, Unanswered, explain},
    index::Body,
    pipeline::{Joining, Order, Report},
    xds::Agents,
};

/// The management service.
pub(crate) struct Management {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) agents: Arc<Agents>,
    pub(crate) report: Arc<Report>,
    pub(crate) started: Instant,
    pub(crate) joining: Joining,
}

#[tonic::async_trait]
impl Service for Management {
    type ListStream = std::pin::Pin<Box<dyn Stream<Item = Result<Address, Status>> + Send>>;

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<Self::ListStream>, Status> {
        let serving = Peer::serve(&request);
        let ListRequest { kind, namespace } = request.into_inner();
        let body = match Kind::try_from(kind) {
            Ok(Kind::Services) => Body::Service,
            Ok(Kind::Workloads) => Body::Workload,
            Err(unknown) => return Err(Status::invalid_argument(format!("kind: {unknown}"))),
        };
        let wanted = |served: &&Arc<Served>| {
            served.resource.body == body && (namespace.is_empty() || *served.resource.namespace == *namespace)
        };
        let mut found: Vec<_> = self.catalog.read().live().filter(wanted).cloned().collect();
        found.sort_by(|a, b| a.resource.name.cmp(&b.resource.name));
        // Decoded one by one, as the client reads.
        let decode = move |served: Arc<Served>| {
            let _until_all_is_read = &serving;
            Address::decode(served.resource.bytes.clone())
                .map_err(|error| Status::internal(error.to_string()))
        };
        Ok(Response::new(Box::pin(tokio_stream::iter(found.into_iter().map(decode)))))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let _serving = Peer::serve(&request);
        let contents = self.catalog.read();
        let (services, workloads) = contents.counts();
        let file_errors = Arc::clone(&self.report.read().unwrap_or_else(PoisonError::into_inner));
        Ok(Response::new(StatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: contents.revision(),
            services,
            workloads,
            file_errors: file_errors.to_vec(),
            agents: self.agents.status(&contents, Instant::now()),
            uptime_seconds: self.started.elapsed().as_secs(),
        }))
    }

    async fn forget_node(
        &self,
        request: Request<ForgetNodeRequest>,
    ) -> Result<Response<ForgetNodeResponse>, Status> {
        let _serving = Peer::serve(&request);
        let node = request.into_inner().node;
        if self.agents.is_connected(&node) {
            return Err(Status::failed_precondition(format!(
                "the agent of {node} is connected: stop it first"
            )));
        }
        let (done, answer) = oneshot::channel();
        let order = Order::Forget { node: node.as_str().into(), done };
        let gone = |_| Status::unavailable("the control plane stops");
        self.joining.orders.send(order).await.map_err(gone)?;
        match answer.await {
            Ok(true) => Ok(Response::new(ForgetNodeResponse {})),
            Ok(false) => Err(Status::not_found(format!("no agent of {node:?} has joined"))),
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }

    async fn explain(&self, request: Request<ExplainRequest>) -> Result<Response<ExplainResponse>, Status> {
        let _serving = Peer::serve(&request);
        let ExplainRequest { from, to } = request.into_inner();
        let question = Question::parse(&from, &to)?;
        let served = self.served().map_err(|error| Status::internal(error.to_string()))?;
        let joined = Arc::clone(&self.joining.joined.borrow());
        Ok(Response::new(explain(&question, &served, &joined)?))
    }
}

impl Management {
    /// Everything that is served, as of one push.
    fn served(&self) -> Result<explain::Served, prost::DecodeError> {
        let (addresses, policies): (Vec<_>, Vec<_>) = {
            let (addresses, policies) = (self.catalog.read(), self.catalog.policies());
            (addresses.live().cloned().collect(), policies.live().cloned().collect())
        };
        let mut served = explain::Served::default();
        for resource in addresses.iter().map(|served: &Arc<Served>| &served.resource) {
            match Address::decode(resource.bytes.clone())?.r#type {
                Some(Type::Service(service)) => served.services.push(service),
                Some(Type::Workload(workload)) => {
                    let own =
                        workload.extensions.iter().find(|extension| extension.name == WORKLOAD_EXTENSION);
                    let own = own.and_then(|extension| extension.config.as_ref());
                    let own =
                        own.map(|config| WorkloadExtension::decode(config.value.as_slice())).transpose()?;
                    served.workloads.push((workload, own.unwrap_or_default()));
                }
                None => {}
            }
        }
        for resource in policies.iter().map(|served: &Arc<Served>| &served.resource) {
            let policy = Authorization::decode(resource.bytes.clone())?;
            served.policies.insert(resource.name.to_string(), policy);
        }
        Ok(served)
    }
}

impl From<Unanswered> for Status {
    fn from(unanswered: Unanswered) -> Self {
        let text = unanswered.to_string();
        match unanswered {
            Unanswered::From(_) | Unanswered::To(_) => Self::invalid_argument(text),
            Unanswered::NoWorkload { .. } | Unanswered::NoService { .. } | Unanswered::NoPort { .. } => {
                Self::not_found(text)
            }
        }
    }
}
