//! Asking the control plane.

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use mesh_common::api::{
    istio::workload::{Address, Service, Workload, address::Type},
    mesh::v1::{
        ExplainRequest, ExplainResponse, ForgetNodeRequest, ListRequest, StatusRequest, StatusResponse,
        list_request::Kind, management_client::ManagementClient,
    },
};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection to the control plane.
pub(crate) struct Control(ManagementClient<Channel>);

impl Control {
    pub(crate) async fn connect(url: &str) -> anyhow::Result<Self> {
        let endpoint =
            Endpoint::from_shared(url.to_owned()).with_context(|| format!("--control-plane {url}"))?;
        let channel = endpoint.connect_timeout(CONNECT_TIMEOUT).connect().await;
        let channel =
            channel.map_err(|error| anyhow!("no control plane answers at {url}: {}", innermost(&error)))?;
        Ok(Self(ManagementClient::new(channel)))
    }

    pub(crate) async fn services(&mut self, namespace: &str) -> anyhow::Result<Vec<Service>> {
        let found = self.list(Kind::Services, namespace).await?;
        let service = |address: Address| match address.r#type {
            Some(Type::Service(service)) => Some(service),
            Some(Type::Workload(_)) | None => None,
        };
        Ok(found.into_iter().filter_map(service).collect())
    }

    pub(crate) async fn workloads(&mut self, namespace: &str) -> anyhow::Result<Vec<Workload>> {
        let found = self.list(Kind::Workloads, namespace).await?;
        let workload = |address: Address| match address.r#type {
            Some(Type::Workload(workload)) => Some(workload),
            Some(Type::Service(_)) | None => None,
        };
        Ok(found.into_iter().filter_map(workload).collect())
    }

    pub(crate) async fn status(&mut self) -> anyhow::Result<StatusResponse> {
        Ok(self.0.status(StatusRequest {}).await.map_err(refused)?.into_inner())
    }

    pub(crate) async fn explain(&mut self, from: &str, to: &str) -> anyhow::Result<ExplainResponse> {
        let request = ExplainRequest { from: from.to_owned(), to: to.to_owned() };
        Ok(self.0.explain(request).await.map_err(refused)?.into_inner())
    }

    pub(crate) async fn forget_node(&mut self, node: &str) -> anyhow::Result<()> {
        let request = ForgetNodeRequest { node: node.to_owned() };
        self.0.forget_node(request).await.map(drop).map_err(refused)
    }

    async fn list(&mut self, kind: Kind, namespace: &str) -> anyhow::Result<Vec<Address>> {
        let request = ListRequest { kind: kind.into(), namespace: namespace.to_owned() };
        let mut stream = self.0.list(request).await.map_err(refused)?.into_inner();
        let mut found = Vec::new();
        while let Some(address) = stream.message().await.map_err(refused)? {
            found.push(address);
        }
        Ok(found)
    }
}

fn refused(status: Status) -> anyhow::Error {
    anyhow!("the control plane answers: {}", status.message())
}

/// The cause that says most: transport errors only say that they are ones.
fn innermost(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => innermost(source),
        None => error.to_string(),
    }
}
