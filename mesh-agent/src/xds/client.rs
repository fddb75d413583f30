//! Owns the connection to the control plane.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use mesh_common::api::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_common::api::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Streaming};
use tracing::{debug, info, warn};

use super::backoff;
use super::session::{Change, Kind, Session, Step, Update};
use super::{Applied, XdsEvent};
use crate::config::NodeConfig;
use crate::identity::access::{Access, AccessError, Choice, Link, chain, describe};
use crate::snapshot::{Interner, Rejected};

/// A mesh of some 500,000 workloads in one message, as istiod sends it.
const DECODE_LIMIT: usize = 200 << 20;

/// Keeps a stream to the control plane, and tells `events` what it says. Ends when nobody listens to the events.
pub async fn run(access: Arc<Access>, node: NodeConfig, interner: Interner, events: mpsc::Sender<XdsEvent>) {
    let mut session = Session::new(&node, interner);
    let mut choice = Choice::default();
    let mut failures = 0_u32;
    loop {
        let started = Instant::now();
        let reason = match stream(&access, &mut choice, &mut session, &events).await {
            Ok(End::Lost(reason)) => reason,
            Ok(End::Outdated) => {
                info!("opening the stream again, by this node's newer certificate");
                failures = backoff::counted(failures, started.elapsed());
                continue;
            }
            Err(OwnerGone) => return,
        };
        warn!(control_plane = %access.address(), %reason, "no stream from the control plane");
        if events.send(XdsEvent::Disconnected { reason }).await.is_err() {
            return;
        }
        let counted = backoff::counted(failures, started.elapsed());
        let wait = backoff::delay(counted, random());
        failures = counted.saturating_add(1);
        debug!(?wait, "waiting before the next attempt");
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = events.closed() => return,
        }
    }
}

/// Nobody listens to the events any more.
struct OwnerGone;

/// Why a stream ended, or did not come to be.
enum End {
    Lost(String),
    /// The node has a newer certificate. What opened the stream would end it: a certificate when it expires, a token when it is
    /// withdrawn.
    Outdated,
}

impl End {
    fn lost(reason: &str) -> Self {
        Self::Lost(reason.to_owned())
    }
}

/// One stream from beginning to end.
async fn stream(
    access: &Arc<Access>,
    choice: &mut Choice,
    session: &mut Session,
    events: &mpsc::Sender<XdsEvent>,
) -> Result<End, OwnerGone> {
    let own = access.credential(choice);
    let used = own.as_ref().map(|own| own.serial);
    let link = tokio::select! {
        connected = access.connect(own.as_ref()) => match connected {
            Ok(link) => link,
            Err(error) => {
                match error {
                    AccessError::Tls(_) | AccessError::Http(_) => choice.failed(used),
                    AccessError::File { .. } | AccessError::Unreachable(_) => {}
                }
                return Ok(End::Lost(chain(&error)));
            }
        },
        () = events.closed() => return Err(OwnerGone),
    };
    let (reply, versions) = oneshot::channel();
    events.send(XdsEvent::Versions { reply }).await.map_err(|_closed| OwnerGone)?;
    let versions = versions.await.map_err(|_dropped| OwnerGone)?;
    let (requests, outgoing) = mpsc::channel(4);
    for first in session.begin(versions) {
        if requests.send(first).await.is_err() {
            return Ok(End::lost("the request could not be sent"));
        }
    }
    let request = match link.request(ReceiverStream::new(outgoing)).await {
        Ok(request) => request,
        Err(error) => return Ok(End::Lost(chain(&error))),
    };
    let opened = tokio::select! {
        opened = open(link, request) => opened,
        () = events.closed() => return Err(OwnerGone),
    };
    let responses = match opened {
        Ok(responses) => responses,
        Err(status) => {
            let unauthenticated = status.code() == Code::Unauthenticated;
            if unauthenticated {
                access.count_refusal();
            }
            // What has a cause did not come from the server: the connection broke, as it does when a certificate is refused.
            if unauthenticated || std::error::Error::source(&status).is_some() {
                choice.failed(used);
            }
            return Ok(End::Lost(format!("subscribe: {}", describe(&status))));
        }
    };
    if choice.succeeded(used) {
        warn!("the control plane does not take this node's certificate; the token serves until the next");
    }
    info!(control_plane = %access.address(), by_certificate = used.is_some(), "connected to the control plane");
    events.send(XdsEvent::Connected).await.map_err(|_closed| OwnerGone)?;
    let outdated = outdated(access, choice, used);
    converse(session, responses, requests, events, outdated).await
}

/// Waits until this node has another certificate than the one that was used, or its first, and it is to be used.
async fn outdated(access: &Access, choice: &Choice, used: Option<u64>) {
    // Before the first look, so that nothing comes between the two.
    let mut renewed = access.renewed();
    while access.credential(choice).is_none_or(|own| Some(own.serial) == used) {
        if renewed.changed().await.is_err() {
            // Nobody is left to renew it.
            return std::future::pending().await;
        }
    }
}

async fn open(
    link: Link,
    request: Request<ReceiverStream<DeltaDiscoveryRequest>>,
) -> Result<Streaming<DeltaDiscoveryResponse>, tonic::Status> {
    let mut client =
        AggregatedDiscoveryServiceClient::new(link.channel).max_decoding_message_size(DECODE_LIMIT);
    client.delta_aggregated_resources(request).await.map(tonic::Response::into_inner)
}

/// A change on its way to being in force.
struct Pending {
    kind: Kind,
    applied: oneshot::Receiver<Applied>,
    /// What it updates and removes.
    names: Vec<String>,
    rejected: Vec<Rejected>,
    patience: Duration,
    nonce: String,
}

/// An answer to a change that is in force, which waits for that to be saved.
struct Answer {
    request: DeltaDiscoveryRequest,
    saved: Option<oneshot::Receiver<()>>,
}

impl Answer {
    fn is_due(&mut self) -> bool {
        let waits = |saved: &mut oneshot::Receiver<()>| saved.try_recv() == Err(TryRecvError::Empty);
        !self.saved.as_mut().is_some_and(waits)
    }

    /// Until it is due.
    async fn due(&mut self) {
        if let Some(saved) = &mut self.saved {
            let _dropped = saved.await;
            self.saved = None;
        }
    }
}

/// What happens next on a stream.
enum Next {
    Received(Result<Option<DeltaDiscoveryResponse>, tonic::Status>),
    Applied(Applied),
    Saved,
    Silence(Kind),
}

/// How much of what the control plane knows has come.
#[derive(Default)]
struct Progress {
    synced: bool,
    /// When silence will have lasted long enough.
    quiet: Option<Instant>,
}

async fn converse(
    session: &mut Session,
    mut responses: Streaming<DeltaDiscoveryResponse>,
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    events: &mpsc::Sender<XdsEvent>,
    outdated: impl Future<Output = ()>,
) -> Result<End, OwnerGone> {
    tokio::pin!(outdated);
    let mut progress: BTreeMap<Kind, Progress> = BTreeMap::new();
    let mut pending: Option<Pending> = None;
    // In order, as responses are to be answered. The next change is put in force meanwhile.
    let mut answers: VecDeque<Answer> = VecDeque::new();
    loop {
        let quiet = progress.iter().filter_map(|(kind, of)| of.quiet.map(|until| (until, *kind))).min();
        let silence = async {
            match quiet {
                Some((until, kind)) => {
                    tokio::time::sleep_until(until).await;
                    kind
                }
                None => std::future::pending().await,
            }
        };
        let settled = pending.is_none() && answers.is_empty();
        let applied = async {
            match &mut pending {
                Some(pending) => (&mut pending.applied).await,
                None => std::future::pending().await,
            }
        };
        let saved = async {
            match answers.front_mut() {
                Some(answer) => answer.due().await,
                None => std::future::pending().await,
            }
        };
        let next = tokio::select! {
            received = responses.message() => Next::Received(received),
            applied = applied => Next::Applied(applied.map_err(|_dropped| OwnerGone)?),
            () = saved => Next::Saved,
            kind = silence => Next::Silence(kind),
            // Not before what was refused is known, since the next stream may not claim it.
            () = &mut outdated, if settled => return Ok(End::Outdated),
            () = events.closed() => return Err(OwnerGone),
        };
        // A response is read while the one before it is put in force, and answered after it.
        let (step, done) = match next {
            Next::Received(received) => {
                let step = match received {
                    Ok(Some(response)) => session.response(response),
                    Ok(None) => Step::Leave { reason: "the control plane ended the stream".to_owned() },
                    Err(status) => Step::Leave { reason: describe(&status) },
                };
                let done = match &mut pending {
                    Some(pending) => Some((&mut pending.applied).await.map_err(|_dropped| OwnerGone)?),
                    None => None,
                };
                (Some(step), done)
            }
            Next::Applied(done) => (None, Some(done)),
            Next::Saved => (None, None),
            Next::Silence(kind) => {
                progress.insert(kind, Progress { synced: true, quiet: None });
                let applied = apply(events, Update::empty(kind), true).await?;
                applied.await.map_err(|_dropped| OwnerGone)?;
                continue;
            }
        };
        if let Some(Applied { refused, saved }) = done
            && let Some(pending) = pending.take()
        {
            // From when the change is in force: the time that it took is not the control plane's silence.
            let of = progress.entry(pending.kind).or_default();
            of.quiet = if of.synced { None } else { Instant::now().checked_add(pending.patience) };
            answers.push_back(Answer { request: settle(session, pending, refused), saved });
        }
        while let Some(answer) = answers.pop_front_if(Answer::is_due) {
            if requests.send(answer.request).await.is_err() {
                return Ok(End::lost("the control plane stopped reading"));
            }
        }
        match step {
            None => {}
            Some(Step::Leave { reason }) => return Ok(End::Lost(reason)),
            Some(Step::Refuse { request, reason }) => {
                warn!(%reason, "refused a response");
                if requests.send(*request).await.is_err() {
                    return Ok(End::lost("the control plane stopped reading"));
                }
            }
            Some(Step::Apply(Change { kind, update, patience, nonce })) => {
                let of = progress.entry(kind).or_default();
                *of = Progress { synced: of.synced || patience.is_zero(), quiet: None };
                let (names, rejected) = (update.names(), update.rejected());
                let applied = apply(events, update, of.synced).await?;
                pending = Some(Pending { kind, applied, names, rejected, patience, nonce });
            }
        }
    }
}

/// The answer to a change that is in force but for what was refused.
fn settle(session: &mut Session, pending: Pending, refused: Vec<Rejected>) -> DeltaDiscoveryRequest {
    session.settle(pending.names.iter().map(String::as_str), &refused);
    let mut rejected = pending.rejected;
    rejected.extend(refused);
    for Rejected { name, reason } in &rejected {
        warn!(%name, %reason, "refused a resource");
    }
    session.answer(pending.kind, pending.nonce, &rejected)
}

/// Hands a change to the owner, who says when it is in force, what was refused, and when it is saved.
async fn apply(
    events: &mpsc::Sender<XdsEvent>,
    update: Update,
    synced: bool,
) -> Result<oneshot::Receiver<Applied>, OwnerGone> {
    let (applied, done) = oneshot::channel();
    let event = match update {
        Update::Addresses(delta, rejected) => XdsEvent::Delta { delta, rejected, synced, applied },
        Update::Policies(update) => XdsEvent::Policies { update, synced, applied },
    };
    events.send(event).await.map_err(|_closed| OwnerGone)?;
    Ok(done)
}

/// 64 bits that differ from run to run and from agent to agent.
pub(crate) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests;
