//! A delta ADS client that keeps what it was sent, as an agent would.

use std::collections::{BTreeMap, HashMap};

use mesh_common::api::{
    ADDRESS_TYPE, AUTHORIZATION_TYPE, SERVICE_EXTENSION, WORKLOAD_EXTENSION,
    envoy::{
        config::core::v3::Node,
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse,
            aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        },
    },
    google::rpc,
    istio::{
        security::Authorization,
        workload::{Address, Extension, Service, Workload, address::Type},
    },
    mesh::v1::{ServiceExtension, WorkloadExtension},
};
use prost::Message;
use tokio::{
    sync::mpsc,
    time::{Duration, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::{
    client::Shows,
    world::{PATIENCE, World},
};

/// What one response said.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Told {
    pub(crate) put: Vec<String>,
    pub(crate) removed: Vec<String>,
}

pub(crate) struct Subscriber {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    pub(crate) held: BTreeMap<String, Address>,
    pub(crate) versions: HashMap<String, String>,
    pub(crate) policies: BTreeMap<String, Authorization>,
    /// Every resource put and removed, in the order in which they came; policies with `policy ` before the name.
    pub(crate) log: Vec<String>,
    /// Type and nonce of the last response.
    kind: String,
    pub(crate) nonce: String,
}

impl Subscriber {
    /// Subscribes to everything, holding nothing.
    pub(crate) async fn connect(world: &World) -> Self {
        Self::open(world, DeltaDiscoveryRequest::default()).await
    }

    /// Opens a stream with `first`, to which node and type are added.
    pub(crate) async fn open(world: &World, first: DeltaDiscoveryRequest) -> Self {
        Self::try_open(world, &Shows::token(), first).await.unwrap()
    }

    /// The same, as somebody who may be refused.
    pub(crate) async fn try_open(
        world: &World,
        shows: &Shows,
        first: DeltaDiscoveryRequest,
    ) -> Result<Self, Status> {
        let name = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue("node-a".into())) };
        let metadata = prost_types::Struct { fields: [("NODE_NAME".to_owned(), name)].into() };
        Self::open_as(world, shows, first, Some(metadata)).await
    }

    /// Subscribes to everything, named only by its credentials.
    pub(crate) async fn nameless(world: &World, shows: &Shows) -> Self {
        Self::open_as(world, shows, DeltaDiscoveryRequest::default(), None).await.unwrap()
    }

    async fn open_as(
        world: &World,
        shows: &Shows,
        first: DeltaDiscoveryRequest,
        metadata: Option<prost_types::Struct>,
    ) -> Result<Self, Status> {
        let channel = shows.connect(world).await.unwrap();
        Self::open_on(channel, shows, first, metadata).await
    }

    /// Over a connection that is there.
    pub(crate) async fn open_on(
        channel: tonic::transport::Channel,
        shows: &Shows,
        first: DeltaDiscoveryRequest,
        metadata: Option<prost_types::Struct>,
    ) -> Result<Self, Status> {
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let (requests, outgoing) = mpsc::channel(64);
        let node = Node {
            id: "ztunnel~127.0.0.1~agent.mesh-system~mesh-system.svc.cluster.local".into(),
            user_agent_version: "1.2.3".into(),
            metadata,
            ..Node::default()
        };
        let type_url =
            if first.type_url.is_empty() { ADDRESS_TYPE.to_owned() } else { first.type_url.clone() };
        requests.send(DeltaDiscoveryRequest { node: Some(node), type_url, ..first }).await.unwrap();
        let responses = client
            .delta_aggregated_resources(shows.request(ReceiverStream::new(outgoing)))
            .await?
            .into_inner();
        Ok(Self {
            requests,
            responses,
            held: BTreeMap::new(),
            versions: HashMap::new(),
            policies: BTreeMap::new(),
            log: Vec::new(),
            kind: String::new(),
            nonce: String::new(),
        })
    }

    pub(crate) async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(DeltaDiscoveryRequest { type_url: ADDRESS_TYPE.into(), ..request }).await.unwrap();
    }

    /// Subscribes to all policies, too.
    pub(crate) async fn subscribe_policies(&self) {
        self.subscribe_policies_holding(HashMap::new()).await;
    }

    pub(crate) async fn subscribe_policies_holding(
        &self,
        initial_resource_versions: HashMap<String, String>,
    ) {
        let type_url = AUTHORIZATION_TYPE.into();
        let request = DeltaDiscoveryRequest { type_url, initial_resource_versions, ..Default::default() };
        self.requests.send(request).await.unwrap();
    }

    /// The next response, unanswered.
    pub(crate) async fn receive(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let response = timeout(PATIENCE, self.responses.message()).await.expect("a response in time")?;
        let response = response.expect("the stream stays open");
        self.nonce.clone_from(&response.nonce);
        self.kind.clone_from(&response.type_url);
        let policies = response.type_url == AUTHORIZATION_TYPE;
        let prefix = if policies { "policy " } else { "" };
        for resource in &response.resources {
            let body = resource.resource.as_ref().unwrap();
            assert_eq!(body.type_url, response.type_url);
            let name = resource.name.clone();
            self.log.push(format!("+{prefix}{name}"));
            self.versions.insert(name.clone(), resource.version.clone());
            if policies {
                self.policies.insert(name, Authorization::decode(body.value.as_slice()).unwrap());
            } else {
                self.held.insert(name, Address::decode(body.value.as_slice()).unwrap());
            }
        }
        for name in &response.removed_resources {
            self.log.push(format!("-{prefix}{name}"));
            let gone = if policies {
                self.policies.remove(name).is_some()
            } else {
                self.held.remove(name).is_some()
            };
            if gone {
                self.versions.remove(name);
            }
        }
        Ok(response)
    }

    pub(crate) async fn acknowledge(&self) {
        let (type_url, response_nonce) = (self.kind.clone(), self.nonce.clone());
        let request = DeltaDiscoveryRequest { type_url, response_nonce, ..Default::default() };
        self.requests.send(request).await.unwrap();
    }

    pub(crate) async fn refuse(&self, reason: &str) {
        let error = rpc::Status { code: 3, message: reason.into(), details: Vec::new() };
        let nonce = self.nonce.clone();
        self.send(DeltaDiscoveryRequest {
            response_nonce: nonce,
            error_detail: Some(error),
            ..Default::default()
        })
        .await;
    }

    /// The next response, acknowledged.
    pub(crate) async fn next(&mut self) -> Told {
        let response = self.receive().await.unwrap();
        self.acknowledge().await;
        let mut put: Vec<_> = response.resources.into_iter().map(|resource| resource.name).collect();
        put.sort();
        let mut removed = response.removed_resources;
        removed.sort();
        Told { put, removed }
    }

    /// Receives the first answer, which is one response where resources are few.
    pub(crate) async fn sync(&mut self) {
        self.next().await;
        self.nothing().await;
    }

    /// Asserts that nothing comes.
    pub(crate) async fn nothing(&mut self) {
        if let Ok(more) = timeout(Duration::from_millis(150), self.responses.message()).await {
            panic!("nothing was due, but there came {more:?}");
        }
    }

    pub(crate) fn service(&self, name: &str) -> (Service, ServiceExtension) {
        match self.held.get(name).and_then(|address| address.r#type.clone()) {
            Some(Type::Service(service)) => {
                let extension = extension(&service.extensions, SERVICE_EXTENSION);
                (service, extension)
            }
            other => panic!("{name}: {other:?} of {:?}", self.held.keys()),
        }
    }

    pub(crate) fn workload(&self, name: &str) -> (Workload, WorkloadExtension) {
        match self.held.get(name).and_then(|address| address.r#type.clone()) {
            Some(Type::Workload(workload)) => {
                let extension = extension(&workload.extensions, WORKLOAD_EXTENSION);
                (workload, extension)
            }
            other => panic!("{name}: {other:?} of {:?}", self.held.keys()),
        }
    }

    /// Pairs of service port and target port by which a workload serves a service over TCP.
    pub(crate) fn ports(&self, workload: &str, service: &str) -> Vec<(u32, u32)> {
        let (workload, _) = self.workload(workload);
        let list =
            workload.services.get(service).unwrap_or_else(|| panic!("{service} in {:?}", workload.services));
        list.ports.iter().map(|port| (port.service_port, port.target_port)).collect()
    }
}

fn extension<T: Message + Default>(extensions: &[Extension], name: &str) -> T {
    let found = extensions.iter().find(|extension| extension.name == name);
    found.map(|found| T::decode(found.config.as_ref().unwrap().value.as_slice()).unwrap()).unwrap_or_default()
}
