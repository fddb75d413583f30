//! What is said on the streams. Pure: messages in, messages out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use mesh_common::api::envoy::config::core::v3::{Locality, Node};
use mesh_common::api::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_common::api::google::rpc::Status;
use mesh_common::api::{ADDRESS_TYPE, AUTHORIZATION_TYPE, COMPLETE, MORE};

use super::Versions;
use crate::config::NodeConfig;
use crate::snapshot::{Authorization, Delta, Interner, PolicyUpdate, Rejected, decode};

/// Our control plane cuts its answers at so many resources and removals, and at so many bytes: after one of this size, more
/// may follow.
const PAGE: usize = 1_000;
const PAGE_BYTES: usize = 2 << 20;
/// Delta xDS has no mark for "that was all". Our control plane adds one; of any other, silence is one. After a full page a busy control plane gets more time,
/// since what it has not sent in time would count as gone.
const SILENCE: Duration = Duration::from_millis(200);
const SILENCE_AFTER_PAGE: Duration = Duration::from_secs(2);
/// How many refused resources a NACK names; it is for people.
const NAMED: usize = 100;
const INVALID_ARGUMENT: i32 = 3;

/// The dialogue with the control plane, across its streams.
#[derive(Debug)]
pub struct Session {
    node: Node,
    interner: Interner,
    /// Held by the owner, but not in force: a new stream asks for them again.
    refused: BTreeSet<String>,
}

/// What a response asks for.
#[derive(Debug)]
pub enum Step {
    /// Hand it to the owner, then answer by [`Session::answer`].
    Apply(Change),
    /// Refuse it as a whole.
    Refuse {
        /// The NACK.
        request: Box<DeltaDiscoveryRequest>,
        /// Why.
        reason: String,
    },
    /// It cannot even be answered: leave the stream.
    Leave {
        /// Why.
        reason: String,
    },
}

/// A type that is subscribed to. Each has its own versions, answers and end of what there is to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Services and workloads.
    Addresses,
    /// Policies.
    Policies,
}

impl Kind {
    /// The type URL.
    pub fn url(self) -> &'static str {
        match self {
            Self::Addresses => ADDRESS_TYPE,
            Self::Policies => AUTHORIZATION_TYPE,
        }
    }

    fn of(url: &str) -> Option<Self> {
        [Self::Addresses, Self::Policies].into_iter().find(|kind| kind.url() == url)
    }
}

/// What a response changes.
#[derive(Debug)]
pub enum Update {
    /// Services and workloads, and those that could not be decoded.
    Addresses(Delta, Vec<Rejected>),
    /// Policies.
    Policies(PolicyUpdate),
}

impl Update {
    /// What is understood to be none.
    pub fn empty(kind: Kind) -> Self {
        match kind {
            Kind::Addresses => Self::Addresses(Delta::default(), Vec::new()),
            Kind::Policies => Self::Policies(PolicyUpdate::default()),
        }
    }

    /// Resources that could not be decoded.
    pub fn rejected(&self) -> Vec<Rejected> {
        match self {
            Self::Addresses(_, rejected) => rejected.clone(),
            Self::Policies(update) => update.rejected(),
        }
    }

    /// What the owner may still refuse: names that it is handed.
    pub fn names(&self) -> Vec<String> {
        match self {
            Self::Addresses(delta, _) => {
                delta.updated.iter().map(|update| &update.name).chain(&delta.removed).cloned().collect()
            }
            // The owner takes every policy, and tells of those that are not understood by a version that none has.
            Self::Policies(_) => Vec::new(),
        }
    }
}

/// A response, decoded.
#[derive(Debug)]
pub struct Change {
    /// Its type.
    pub kind: Kind,
    /// What changes.
    pub update: Update,
    /// When silence has lasted for so long after it, the control plane has said all that it knows; zero: it has now.
    pub patience: Duration,
    /// To answer with.
    pub nonce: String,
}

impl Session {
    /// A session of `node`.
    pub fn new(node: &NodeConfig, interner: Interner) -> Self {
        Self { node: identify(node), interner, refused: BTreeSet::new() }
    }

    /// The first requests of a stream, when these versions are held. Policies first: workloads that name one wait for it.
    pub fn begin(&self, mut versions: Versions) -> [DeltaDiscoveryRequest; 2] {
        for name in &self.refused {
            // Not left out: then the control plane would not tell that the resource is gone.
            if let Some(version) = versions.addresses.get_mut(name) {
                version.clear();
            }
        }
        let first = |kind: Kind, versions| DeltaDiscoveryRequest {
            node: Some(self.node.clone()),
            type_url: kind.url().to_owned(),
            initial_resource_versions: versions,
            ..DeltaDiscoveryRequest::default()
        };
        [first(Kind::Policies, versions.policies), first(Kind::Addresses, versions.addresses)]
    }

    /// Reads a response.
    pub fn response(&mut self, response: DeltaDiscoveryResponse) -> Step {
        if response.nonce.is_empty() {
            return Step::Leave { reason: "a response came without a nonce".to_owned() };
        }
        let Some(kind) = Kind::of(&response.type_url) else {
            let url: String = response.type_url.chars().take(200).collect();
            let reason = format!("a response came of type {url:?}, which was not asked for");
            let request = DeltaDiscoveryRequest {
                type_url: response.type_url,
                response_nonce: response.nonce,
                error_detail: Some(status(reason.clone())),
                ..DeltaDiscoveryRequest::default()
            };
            return Step::Refuse { request: Box::new(request), reason };
        };
        let patience = patience(&response);
        let removed = response.removed_resources;
        let update = match kind {
            Kind::Addresses => {
                let (updated, rejected) = decode(response.resources, &mut self.interner);
                Update::Addresses(Delta { updated, removed }, rejected)
            }
            Kind::Policies => {
                let read = |resource| Arc::new(Authorization::read(resource));
                let updated = response.resources.into_iter().map(read).collect();
                Update::Policies(PolicyUpdate { updated, removed })
            }
        };
        Step::Apply(Change { kind, update, patience, nonce: response.nonce })
    }

    /// Notes what the owner made of a change: `names` were handed over, `refused` could not be taken.
    pub fn settle<'a>(&mut self, names: impl IntoIterator<Item = &'a str>, refused: &[Rejected]) {
        for name in names {
            self.refused.remove(name);
        }
        self.refused.extend(refused.iter().map(|rejected| rejected.name.clone()));
    }

    /// The ACK of a response, or the NACK if anything in it was refused.
    pub fn answer(&self, kind: Kind, nonce: String, rejected: &[Rejected]) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            type_url: kind.url().to_owned(),
            response_nonce: nonce,
            error_detail: (!rejected.is_empty()).then(|| status(reasons(rejected))),
            ..DeltaDiscoveryRequest::default()
        }
    }
}

fn patience(response: &DeltaDiscoveryResponse) -> Duration {
    if response.system_version_info.ends_with(COMPLETE) {
        return Duration::ZERO;
    }
    if response.system_version_info.ends_with(MORE) {
        // However long the next takes: this one says that it comes.
        return Duration::MAX;
    }
    let items = response.resources.len() + response.removed_resources.len();
    let bytes =
        || response.resources.iter().flat_map(|r| &r.resource).map(|any| any.value.len()).sum::<usize>();
    match items {
        // Nothing new: what a control plane says that finds us up to date.
        0 => Duration::ZERO,
        PAGE.. => SILENCE_AFTER_PAGE,
        _ if bytes() >= PAGE_BYTES => SILENCE_AFTER_PAGE,
        _ => SILENCE,
    }
}

fn identify(node: &NodeConfig) -> Node {
    let text = |text: &str| prost_types::Value {
        kind: Some(prost_types::value::Kind::StringValue(text.to_owned())),
    };
    let fields = BTreeMap::from([
        ("NODE_NAME".to_owned(), text(&node.name)),
        ("CLUSTER_ID".to_owned(), text(&node.cluster_id)),
        ("NAMESPACE".to_owned(), text(&node.namespace)),
        ("INSTANCE_IPS".to_owned(), text(&node.ip.to_string())),
    ]);
    let locality = (node.region.is_some() || node.zone.is_some()).then(|| Locality {
        region: node.region.clone().unwrap_or_default(),
        zone: node.zone.clone().unwrap_or_default(),
        sub_zone: String::new(),
    });
    Node {
        id: node.id.clone(),
        metadata: Some(prost_types::Struct { fields }),
        locality,
        user_agent_name: "mesh-agent".to_owned(),
        user_agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        ..Node::default()
    }
}

fn reasons(rejected: &[Rejected]) -> String {
    let mut text: Vec<String> =
        rejected.iter().take(NAMED).map(|r| format!("{}: {}", r.name, r.reason)).collect();
    if rejected.len() > NAMED {
        text.push(format!("and {} more", rejected.len() - NAMED));
    }
    text.join("; ")
}

fn status(message: String) -> Status {
    Status { code: INVALID_ARGUMENT, message, details: Vec::new() }
}

#[cfg(test)]
mod tests;
