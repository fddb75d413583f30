//! The shell around the sessions: a gRPC stream for each client.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Instant, SystemTime},
};

use mesh_common::api::{
    ADDRESS_TYPE, AUTHORIZATION_TYPE, COMPLETE, MORE,
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
    sync::{mpsc, oneshot, watch},
    time::sleep,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::{
    agents::{Agents, Entry, bounded},
    session::{self, Answer, Gate, Next, Session},
};
use crate::{
    auth::{Caller, Credentials, Expiry, Refusal},
    catalog::{Catalog, Contents, Revision, Revisions, Served},
    connections::{Peer, Serving},
    identity::is_name,
    keeper::InForce,
    metrics::Metrics,
    pipeline::{Joining, Order},
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
    pub(crate) joining: Joining,
}

/// The discovery service.
pub(crate) struct Discovery {
    shared: Shared,
    /// Stands for every type that is not served: a client that waits for a first answer gets an empty one.
    nothing: Arc<Contents>,
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
        let address = Peer::address_of(&request);
        let credentials = Credentials::of(&request);
        let in_force = Arc::clone(&self.shared.in_force.borrow());
        let caller = credentials.judge(&in_force.rules(), SystemTime::now()).map_err(|refusal| {
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
            _serving: Peer::serve(&request),
            credentials,
            caller,
            node: String::new(),
            named: None,
            joining: None,
            sessions: Vec::new(),
        };
        tokio::spawn(client.run(request.into_inner(), send));
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

/// One stream.
struct Client {
    shared: Shared,
    nothing: Arc<Contents>,
    entry: Entry,
    /// Its connection is not idle.
    _serving: Option<Serving>,
    credentials: Credentials,
    caller: Caller,
    node: String,
    /// What it calls its node in the metadata, if that may be.
    named: Option<String>,
    /// Completes when everybody may be told that the node has joined.
    joining: Option<oneshot::Receiver<()>>,
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
        let expired = expired(self.caller.until.clone());
        tokio::pin!(expired);
        loop {
            let now = *revisions.borrow_and_update();
            let mut joining = self.joining.take();
            // The first answer is to hold what follows from the client's own coming.
            let due = if joining.is_some() { None } else { self.due(now) };
            let mut joined = false;
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return Err(Status::unavailable("the control plane stops")),
                () = send.closed() => return Ok(()),
                refusal = &mut expired => return Err(self.end(refusal)),
                Ok(()) = in_force.changed() => {
                    let now = Arc::clone(&in_force.borrow_and_update());
                    // A newer revocation list lapses later.
                    expired.set(self::expired(self.judge_again(&now)?.until));
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
                () = wait(&mut joining), if joining.is_some() => joined = true,
                changed = revisions.changed(), if due.is_none() => {
                    changed.map_err(|gone| Status::unavailable(gone.to_string()))?;
                }
            }
            if !joined && self.joining.is_none() {
                self.joining = joining;
            }
            self.report();
        }
    }

    /// What is in force changed: certificates were revoked, say, or tokens withdrawn.
    fn judge_again(&self, in_force: &InForce) -> Result<Caller, Status> {
        let judged = self.credentials.judge(&in_force.rules(), SystemTime::now());
        judged.map_err(|refusal| self.end(refusal))
    }

    /// What opened the stream is no longer good.
    fn end(&self, refusal: Refusal) -> Status {
        warn!(node = %self.node, reason = refusal.reason(), %refusal, "stream ended");
        self.shared.metrics.ended_streams.with_label_values(&[refusal.reason()]).inc();
        Status::from(refusal)
    }

    /// The session that has something to say. Policies come before the workloads that may name them.
    fn due(&self, now: Revisions) -> Option<usize> {
        let policies = self.session(AUTHORIZATION_TYPE);
        let waits = policies.is_some_and(|(_, session)| session.is_behind(now.policies));
        let is_due = |(kind, session): &(String, Session)| match kind.as_str() {
            ADDRESS_TYPE => !waits && session.is_due(now.addresses, Gate::Open),
            AUTHORIZATION_TYPE => session.is_due(now.policies, self.gate(now.addresses)),
            _ => session.is_due(0, Gate::Open),
        };
        let first = policies.filter(|(at, _)| is_due(&self.sessions[*at])).map(|(at, _)| at);
        first.or_else(|| self.sessions.iter().position(is_due))
    }

    fn session(&self, kind: &str) -> Option<(usize, &Session)> {
        let at = self.sessions.iter().position(|(other, _)| other == kind)?;
        Some((at, &self.sessions[at].1))
    }

    /// What holds back that a policy has gone, when the addresses end at `end`.
    fn gate(&self, end: Revision) -> Gate {
        match self.session(ADDRESS_TYPE) {
            Some((_, session)) => Gate::Behind { end, at: session.position() },
            None => Gate::Open,
        }
    }

    fn take(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if let Some(node) = &request.node {
            self.introduce(node)?;
        }
        if self.sessions.is_empty() {
            self.join()?;
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
                self.named = Some(bounded(name));
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

    /// Has the node's workloads announced as meshed. A token that is good for any node is good for the one that the metadata
    /// names, as Istio's clients do.
    fn join(&mut self) -> Result<(), Status> {
        let name = self.caller.node.as_deref().or(self.named.as_deref()).filter(|name| is_name(name));
        let Some(name) = name else { return Ok(()) };
        if self.shared.joining.joined.borrow().contains_key(name) {
            return Ok(());
        }
        let (done, joining) = oneshot::channel();
        let order = Order::Join { node: name.into(), done };
        self.shared.joining.orders.try_send(order).map_err(|error| {
            warn!(node = %name, %error, "cannot join now");
            Status::unavailable("too many nodes join at once")
        })?;
        self.joining = Some(joining);
        Ok(())
    }

    /// Makes the response that is due, if any is.
    fn respond(&mut self, at: usize) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        let catalog = Arc::clone(&self.shared.catalog);
        // Both as they were published together.
        let (addresses, policies) = (catalog.read(), catalog.policies());
        let gate = self.gate(addresses.revision());
        let waits = self.session(AUTHORIZATION_TYPE).is_some_and(|(_, p)| p.is_behind(policies.revision()));
        let (kind, session) = &mut self.sessions[at];
        let next = match kind.as_str() {
            // A policy came since it was decided whose turn it is.
            ADDRESS_TYPE if waits => Next::Again,
            ADDRESS_TYPE => session.next(&addresses, Gate::Open),
            AUTHORIZATION_TYPE => session.next(&policies, gate),
            _ => session.next(&self.nothing, Gate::Open),
        };
        drop((addresses, policies));
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
                    resources: response.resources.iter().map(|served| on_wire(kind, served)).collect(),
                    type_url: kind.clone(),
                    nonce: response.nonce,
                    removed_resources: response.removed.iter().map(|name| name.to_string()).collect(),
                }))
            }
        }
    }

    /// Tells the status how far the agent has come.
    fn report(&self) {
        let Some((_, session)) = self.session(ADDRESS_TYPE) else { return };
        let settled = self.session(AUTHORIZATION_TYPE).is_none_or(|(_, policies)| policies.is_settled());
        self.entry.update(|agent| {
            agent.acknowledged = session.acknowledged();
            agent.settled = session.is_settled() && settled;
        });
    }
}

/// Waits until what opened a stream is no longer good.
async fn expired(until: Option<Expiry>) -> Refusal {
    let Some(Expiry { at, refusal }) = until else { return std::future::pending().await };
    sleep(at.duration_since(SystemTime::now()).unwrap_or_default()).await;
    refusal
}

/// Waits for the end of what was begun, however it ended.
async fn wait(joining: &mut Option<oneshot::Receiver<()>>) {
    if let Some(joining) = joining {
        joining.await.ok();
    }
}

fn on_wire(kind: &str, served: &Served) -> Resource {
    let resource = &served.resource;
    Resource {
        version: served.version(),
        resource: Some(prost_types::Any { type_url: kind.to_owned(), value: resource.bytes.to_vec() }),
        name: resource.name.to_string(),
        aliases: Vec::new(),
    }
}
