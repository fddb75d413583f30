//! Owns the connection to the control plane.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use mesh_common::api::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_common::api::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Streaming};
use tracing::{debug, info, warn};

use super::XdsEvent;
use super::backoff;
use super::session::{Change, Session, Step};
use crate::config::XdsConfig;
use crate::snapshot::{Delta, Interner, Rejected};

/// A mesh of some 500,000 workloads in one message, as istiod sends it.
const DECODE_LIMIT: usize = 200 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer that vanished is noticed after interval and timeout.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Keeps a stream to the control plane, and tells `events` what it says. Ends when nobody listens to the events.
pub async fn run(config: XdsConfig, interner: Interner, events: mpsc::Sender<XdsEvent>) {
    let mut session = Session::new(&config.node, interner);
    let mut failures = 0_u32;
    loop {
        let started = Instant::now();
        let reason = match stream(&config, &mut session, &events).await {
            Ok(reason) => reason,
            Err(OwnerGone) => return,
        };
        warn!(control_plane = %config.address, %reason, "no stream from the control plane");
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

/// One stream from beginning to end; returns why it ended.
async fn stream(
    config: &XdsConfig,
    session: &mut Session,
    events: &mpsc::Sender<XdsEvent>,
) -> Result<String, OwnerGone> {
    let channel = tokio::select! {
        connected = connect(config) => match connected {
            Ok(channel) => channel,
            Err(error) => return Ok(format!("connect: {}", chain(&error))),
        },
        () = events.closed() => return Err(OwnerGone),
    };
    let (reply, versions) = oneshot::channel();
    events.send(XdsEvent::Versions { reply }).await.map_err(|_closed| OwnerGone)?;
    let versions = versions.await.map_err(|_dropped| OwnerGone)?;
    let (requests, outgoing) = mpsc::channel(4);
    let first = session.begin(versions);
    if requests.send(first).await.is_err() {
        return Ok("the request could not be sent".to_owned());
    }
    let opened = tokio::select! {
        opened = open(channel, config, outgoing) => opened,
        () = events.closed() => return Err(OwnerGone),
    };
    let responses = match opened {
        Ok(responses) => responses,
        Err(status) => return Ok(format!("subscribe: {}", describe(&status))),
    };
    info!(control_plane = %config.address, "connected to the control plane");
    events.send(XdsEvent::Connected).await.map_err(|_closed| OwnerGone)?;
    converse(session, responses, requests, events).await
}

async fn connect(config: &XdsConfig) -> Result<Channel, tonic::transport::Error> {
    Endpoint::from(config.address.clone())
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect()
        .await
}

async fn open(
    channel: Channel,
    config: &XdsConfig,
    outgoing: mpsc::Receiver<DeltaDiscoveryRequest>,
) -> Result<Streaming<DeltaDiscoveryResponse>, tonic::Status> {
    let mut request = Request::new(ReceiverStream::new(outgoing));
    if let Ok(cluster) = config.node.cluster_id.parse() {
        request.metadata_mut().insert("clusterid", cluster);
    }
    let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(DECODE_LIMIT);
    client.delta_aggregated_resources(request).await.map(tonic::Response::into_inner)
}

/// A change on its way to being in force.
struct Pending {
    applied: oneshot::Receiver<Vec<Rejected>>,
    /// What it updates and removes.
    names: Vec<String>,
    rejected: Vec<Rejected>,
    patience: Duration,
    nonce: String,
}

/// What happens next on a stream.
enum Next {
    Received(Result<Option<DeltaDiscoveryResponse>, tonic::Status>),
    Applied(Vec<Rejected>),
    Silence,
}

async fn converse(
    session: &mut Session,
    mut responses: Streaming<DeltaDiscoveryResponse>,
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    events: &mpsc::Sender<XdsEvent>,
) -> Result<String, OwnerGone> {
    let mut synced = false;
    let mut quiet: Option<Instant> = None;
    let mut pending: Option<Pending> = None;
    loop {
        let silence = async {
            match quiet {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        let applied = async {
            match &mut pending {
                Some(pending) => (&mut pending.applied).await,
                None => std::future::pending().await,
            }
        };
        let next = tokio::select! {
            received = responses.message() => Next::Received(received),
            applied = applied => Next::Applied(applied.map_err(|_dropped| OwnerGone)?),
            () = silence => Next::Silence,
            () = events.closed() => return Err(OwnerGone),
        };
        // A response is read while the one before it is put in force, and answered after it.
        let (step, refused) = match next {
            Next::Received(received) => {
                let step = match received {
                    Ok(Some(response)) => session.response(response),
                    Ok(None) => Step::Leave { reason: "the control plane ended the stream".to_owned() },
                    Err(status) => Step::Leave { reason: describe(&status) },
                };
                let refused = match &mut pending {
                    Some(pending) => (&mut pending.applied).await.map_err(|_dropped| OwnerGone)?,
                    None => Vec::new(),
                };
                (Some(step), refused)
            }
            Next::Applied(refused) => (None, refused),
            Next::Silence => {
                (quiet, synced) = (None, true);
                let applied = apply(events, Delta::default(), Vec::new(), true).await?;
                applied.await.map_err(|_dropped| OwnerGone)?;
                continue;
            }
        };
        if let Some(pending) = pending.take() {
            // From when the change is in force: the time that it took is not the control plane's silence.
            quiet = if synced { None } else { Instant::now().checked_add(pending.patience) };
            let answer = settle(session, pending, refused);
            if requests.send(answer).await.is_err() {
                return Ok("the control plane stopped reading".to_owned());
            }
        }
        match step {
            None => {}
            Some(Step::Leave { reason }) => return Ok(reason),
            Some(Step::Refuse { request, reason }) => {
                warn!(%reason, "refused a response");
                if requests.send(*request).await.is_err() {
                    return Ok("the control plane stopped reading".to_owned());
                }
            }
            Some(Step::Apply(Change { delta, rejected, patience, nonce })) => {
                (quiet, synced) = (None, synced || patience.is_zero());
                let updated = delta.updated.iter().map(|update| &update.name);
                let names = updated.chain(&delta.removed).cloned().collect();
                let applied = apply(events, delta, rejected.clone(), synced).await?;
                pending = Some(Pending { applied, names, rejected, patience, nonce });
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
    session.answer(pending.nonce, &rejected)
}

/// Hands a change to the owner, who says when it is in force and what was refused.
async fn apply(
    events: &mpsc::Sender<XdsEvent>,
    delta: Delta,
    rejected: Vec<Rejected>,
    synced: bool,
) -> Result<oneshot::Receiver<Vec<Rejected>>, OwnerGone> {
    let (applied, done) = oneshot::channel();
    let event = XdsEvent::Delta { delta, rejected, synced, applied };
    events.send(event).await.map_err(|_closed| OwnerGone)?;
    Ok(done)
}

/// 64 bits that differ from run to run and from agent to agent.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

fn describe(status: &tonic::Status) -> String {
    let source = std::error::Error::source(status).map(|source| format!(" ({})", chain(source)));
    format!("{}: {}{}", status.code(), status.message(), source.unwrap_or_default())
}

/// An error and its causes: the outermost of a failed connection only says "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
