//! The shell around the sessions: a gRPC stream for each client.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Instant, SystemTime},
};

use mesh_common::api::{
    ADDRESS_TYPE, COMPLETE, MORE,
    envoy::{
        config::core::v3::Node,
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource,
            aggregated_discovery_service_server::AggregatedDiscoveryService,
        },
    },
};
use prost_types::value::Kind;
use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::{
    agents::{Agents, Entry, bounded},
    session::{self, Answer, Next, Session},
};
use crate::{
    auth::{Caller, Credentials},
    catalog::{Catalog, Served},
    keeper::InForce,
    metrics::Metrics,
};

/// Types that one stream may ask for.
const MAX_TYPES: usize = 16;

/// What all streams have in common.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) agents: Arc<Agents>,
    pub(crate) metrics: Arc<Metrics>,
    /// Becomes true when the streams are to end.
    pub(crate) stop: watch::Receiver<bool>,
    pub(crate) in_force: watch::Receiver<Arc<InForce>>,
}

/// The discovery service.
pub(crate) struct Discovery {
    shared: Shared,
    /// Stands for every type that is not served: a client that waits for a first answer gets an empty one.
    nothing: Arc<Catalog>,
}

impl Discovery {
    pub(crate) fn new(shared: Shared) -> Self {
        Self { shared, nothing: Arc::default() }
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let address = request.remote_addr().map(|address| address.to_string()).unwrap_or_default();
        let (credentials, opened) = (Credentials::of(&request), SystemTime::now());
        let in_force = Arc::clone(&self.shared.in_force.borrow());
        let caller = credentials.judge(&in_force.rules(), opened).map_err(|refusal| {
            warn!(%address, reason = refusal.reason(), %refusal, "stream refused");
            self.shared.metrics.refused_streams.with_label_values(&[refusal.reason()]).inc();
            Status::from(refusal)
        })?;
        let entry = self.shared.agents.enter(address.clone(), Instant::now());
        // One response waits for the network; the next is made when there is room for it.
        let (send, responses) = mpsc::channel(1);
        let client = Client {
            shared: self.shared.clone(),
            nothing: Arc::clone(&self.nothing),
            entry,
            credentials,
            caller,
            opened,
            node: String::new(),
            sessions: Vec::new(),
        };
        tokio::spawn(client.run(request.into_inner(), send));
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

/// One stream.
struct Client {
    shared: Shared,
    nothing: Arc<Catalog>,
    entry: Entry,
    credentials: Credentials,
    caller: Caller,
    opened: SystemTime,
    node: String,
    /// By type.
    sessions: Vec<(String, Session)>,
}

type Send = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

impl Client {
    async fn run(mut self, mut requests: Streaming<DeltaDiscoveryRequest>, send: Send) {
        let outcome = self.serve(&mut requests, &send).await;
        info!(node = %self.node, outcome = %outcome.as_ref().err().map_or("closed", Status::message), "agent left");
        if let Err(status) = outcome {
            // Nobody may be left to hear it.
            send.send(Err(status)).await.ok();
        }
    }

    async fn serve(
        &mut self,
        requests: &mut Streaming<DeltaDiscoveryRequest>,
        send: &Send,
    ) -> Result<(), Status> {
        let mut revisions = self.shared.catalog.subscribe();
        let mut stop = self.shared.stop.clone();
        let mut in_force = self.shared.in_force.clone();
        let life = self.caller.until.and_then(|until| until.duration_since(SystemTime::now()).ok());
        let expired = async {
            match life {
                Some(life) => sleep(life).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(expired);
        loop {
            let revision = *revisions.borrow_and_update();
            let due = self.due(revision);
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return Err(Status::unavailable("the control plane stops")),
                () = send.closed() => return Ok(()),
                () = &mut expired => return Err(Status::unauthenticated("the certificate has expired")),
                Ok(()) = in_force.changed() => {
                    let now = Arc::clone(&in_force.borrow_and_update());
                    self.judge_again(&now)?;
                }
                request = requests.message() => match request? {
                    Some(request) => self.take(request)?,
                    None => return Ok(()),
                },
                permit = send.reserve(), if due.is_some() => {
                    let (Ok(permit), Some(at)) = (permit, due) else { return Ok(()) };
                    if let Some(response) = self.respond(at)? {
                        permit.send(Ok(response));
                    }
                }
                changed = revisions.changed(), if due.is_none() => {
                    changed.map_err(|gone| Status::unavailable(gone.to_string()))?;
                }
            }
            self.report();
        }
    }

    /// What is in force changed: certificates were revoked, say, or tokens withdrawn.
    fn judge_again(&self, in_force: &InForce) -> Result<(), Status> {
        // A token that was good when the stream was opened need not be renewed; a certificate ends the stream itself.
        let at = if self.caller.until.is_some() { SystemTime::now() } else { self.opened };
        self.credentials.judge(&in_force.rules(), at).map(drop).map_err(|refusal| {
            warn!(node = %self.node, reason = refusal.reason(), %refusal, "stream ended");
            self.shared.metrics.refused_streams.with_label_values(&[refusal.reason()]).inc();
            Status::from(refusal)
        })
    }

    /// The session that has something to say.
    fn due(&self, revision: u64) -> Option<usize> {
        self.sessions
            .iter()
            .position(|(kind, session)| session.is_due(if kind == ADDRESS_TYPE { revision } else { 0 }))
    }

    fn take(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if let Some(node) = &request.node {
            self.introduce(node)?;
        }
        let at = self.sessions.iter().position(|(kind, _)| *kind == request.type_url);
        let at = match at {
            Some(at) => at,
            None if self.sessions.len() < MAX_TYPES => {
                self.sessions.push((request.type_url.clone(), Session::default()));
                self.sessions.len() - 1
            }
            None => {
                return Err(Status::resource_exhausted(format!("more than {MAX_TYPES} types on one stream")));
            }
        };
        let refusal = request.error_detail.map(|error| bounded(&error.message));
        let message = session::Request {
            subscribe: request.resource_names_subscribe,
            unsubscribe: request.resource_names_unsubscribe,
            initial: request.initial_resource_versions.into_iter().collect::<HashMap<_, _>>(),
            nonce: request.response_nonce,
            refusal: refusal.clone(),
        };
        let session = &mut self.sessions[at].1;
        let answer =
            session.request(message).map_err(|error| Status::resource_exhausted(error.to_string()))?;
        match answer {
            Answer::Refused => {
                let reason = refusal.unwrap_or_default();
                warn!(node = %self.node, kind = %request.type_url, %reason, "agent refused resources");
                self.shared.metrics.rejections.inc();
                self.entry.update(|agent| {
                    agent.rejected += 1;
                    agent.last_rejection = reason;
                });
            }
            Answer::Acknowledged => self.shared.metrics.acknowledgements.inc(),
            Answer::None => {}
        }
        Ok(())
    }

    fn introduce(&mut self, node: &Node) -> Result<(), Status> {
        // An agent that follows Istio's form of the id names its node in the metadata.
        let named = node.metadata.as_ref().and_then(|metadata| metadata.fields.get("NODE_NAME"));
        let named = match named.and_then(|value| value.kind.as_ref()) {
            Some(Kind::StringValue(name)) => {
                if let Some(bound) = self.caller.node.as_ref().filter(|bound| *bound != name) {
                    let name = bounded(name);
                    warn!(node = %bound, claimed = %name, "stream refused: NODE_NAME is of another node");
                    self.shared.metrics.refused_streams.with_label_values(&["other_node"]).inc();
                    let reason = format!("metadata NODE_NAME: {name} is not the authenticated node {bound}");
                    return Err(Status::permission_denied(reason));
                }
                name
            }
            Some(
                Kind::NullValue(_)
                | Kind::NumberValue(_)
                | Kind::BoolValue(_)
                | Kind::StructValue(_)
                | Kind::ListValue(_),
            )
            | None => self.caller.node.as_ref().unwrap_or(&node.id),
        };
        let (name, version) = (bounded(named), bounded(&node.user_agent_version));
        if self.node != name {
            info!(node = %name, %version, "agent connected");
        }
        self.node.clone_from(&name);
        self.entry.update(|agent| (agent.node, agent.version) = (name, version));
        Ok(())
    }

    /// Makes the response that is due, if any is.
    fn respond(&mut self, at: usize) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        let (kind, session) = &mut self.sessions[at];
        let catalog = if kind == ADDRESS_TYPE { &self.shared.catalog } else { &self.nothing };
        let next = session.next(&catalog.read());
        match next {
            Next::Idle | Next::Again => Ok(None),
            Next::TooFarBehind => {
                Err(Status::unavailable("too far behind: reconnect with initial_resource_versions"))
            }
            Next::Send(response) => {
                let metrics = &self.shared.metrics;
                metrics.responses.inc();
                metrics.resources_sent.inc_by(response.resources.len() as u64);
                metrics.removals_sent.inc_by(response.removed.len() as u64);
                let mark = if response.complete { COMPLETE } else { MORE };
                Ok(Some(DeltaDiscoveryResponse {
                    system_version_info: format!("{}{mark}", response.revision),
                    resources: response.resources.iter().map(|served| on_wire(served)).collect(),
                    type_url: kind.clone(),
                    nonce: response.nonce,
                    removed_resources: response.removed.iter().map(|name| name.to_string()).collect(),
                }))
            }
        }
    }

    /// Tells the status how far the agent has come.
    fn report(&self) {
        let Some((_, session)) = self.sessions.iter().find(|(kind, _)| kind == ADDRESS_TYPE) else { return };
        self.entry.update(|agent| {
            agent.acknowledged = session.acknowledged();
            agent.settled = session.is_settled();
        });
    }
}

fn on_wire(served: &Served) -> Resource {
    let resource = &served.resource;
    Resource {
        version: served.version(),
        resource: Some(prost_types::Any {
            type_url: ADDRESS_TYPE.to_owned(),
            value: resource.bytes.to_vec(),
        }),
        name: resource.name.to_string(),
        aliases: Vec::new(),
    }
}
