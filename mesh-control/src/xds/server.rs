//! The shell around the sessions: a gRPC stream for each client.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use mesh_common::api::envoy::{
    config::core::v3::Node,
    service::discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse,
        aggregated_discovery_service_server::AggregatedDiscoveryService,
    },
};
use prost_types::value::Kind;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::{
    agents::{Agents, Entry, bounded},
    session::{Answer, BadNames, Next},
    subscriptions::{Offered, Progress, Subscriptions, TooMuch},
};
use crate::{
    auth::{Caller, Credentials, Expiry, Refusal},
    catalog::{Catalog, Contents},
    connections::{Peer, Serving},
    identity::is_name,
    keeper::InForce,
    metrics::Metrics,
    pipeline::{Joining, Order},
};

/// How long a client that does not read may keep what its stream ended with waiting.
const PARTING: Duration = Duration::from_secs(5);

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
    /// What there is of types that are not served.
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
            subscriptions: Subscriptions::default(),
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
    subscriptions: Subscriptions,
}

type Send = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

impl Client {
    async fn run(mut self, mut requests: Streaming<DeltaDiscoveryRequest>, send: Send) {
        let outcome = self.serve(&mut requests, &send).await;
        info!(node = %self.node, outcome = %outcome.as_ref().err().map_or("closed", Status::message), "agent left");
        // The stream counts no longer, whether or not its client hears of the end.
        drop((self, requests));
        if let Err(status) = outcome {
            // Nobody may be left to hear it, or to read.
            timeout(PARTING, send.send(Err(status))).await.ok();
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
            let due = if joining.is_some() { None } else { self.subscriptions.due(now) };
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

    fn take(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if let Some(node) = &request.node {
            self.introduce(node)?;
        }
        if self.subscriptions.is_empty() {
            self.join()?;
        }
        let kind = request.type_url.clone();
        let answered = self.subscriptions.request(request);
        let (answer, refusal) = answered.map_err(|error| match error {
            TooMuch::Names(BadNames::TooLong(_)) => Status::invalid_argument(error.to_string()),
            TooMuch::Types | TooMuch::Names(BadNames::TooMany) => {
                Status::resource_exhausted(error.to_string())
            }
        })?;
        match answer {
            Answer::Refused => {
                let reason = refusal.unwrap_or_default();
                warn!(node = %self.node, %kind, %reason, "agent refused resources");
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
        let offered = Offered { addresses: &addresses, policies: &policies, nothing: &self.nothing };
        let next = self.subscriptions.next(at, &offered);
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
                Ok(Some(self.subscriptions.on_wire(at, response)))
            }
        }
    }

    /// Tells the status how far the agent has come.
    fn report(&self) {
        let Some(Progress { acknowledged, settled }) = self.subscriptions.progress() else { return };
        self.entry.update(|agent| (agent.acknowledged, agent.settled) = (acknowledged, settled));
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
