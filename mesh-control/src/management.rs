//! What `meshctl` asks.

use std::{
    sync::{Arc, PoisonError},
    time::Instant,
};

use mesh_common::api::{
    istio::workload::Address,
    mesh::v1::{
        ForgetNodeRequest, ForgetNodeResponse, ListRequest, StatusRequest, StatusResponse,
        list_request::Kind, management_server::Management as Service,
    },
};
use prost::Message as _;
use tokio::sync::oneshot;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use crate::{
    catalog::{Catalog, Served},
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
        let decode = |served: Arc<Served>| {
            Address::decode(served.resource.bytes.clone())
                .map_err(|error| Status::internal(error.to_string()))
        };
        Ok(Response::new(Box::pin(tokio_stream::iter(found.into_iter().map(decode)))))
    }

    async fn status(&self, _request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
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
}
