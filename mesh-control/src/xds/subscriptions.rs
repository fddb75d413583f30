//! What one stream has subscribed to, by type, and whose turn it is. Pure.

use std::collections::HashMap;

use mesh_common::api::{
    ADDRESS_TYPE, AUTHORIZATION_TYPE, COMPLETE, MORE,
    envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource},
};

use super::{
    agents::bounded,
    session::{Answer, BadNames, Gate, Next, Request, Response, Session},
};
use crate::catalog::{Contents, Revision, Revisions, Served};

/// Types that one stream may ask for.
const MAX_TYPES: usize = 16;

/// The sessions of a stream.
#[derive(Debug, Default)]
pub(crate) struct Subscriptions(Vec<(String, Session)>);

/// A message that ends the stream.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TooMuch {
    #[error("more than {MAX_TYPES} types on one stream")]
    Types,
    #[error(transparent)]
    Names(#[from] BadNames),
}

/// What is served: both as they were published together.
pub(crate) struct Offered<'a> {
    pub(crate) addresses: &'a Contents,
    pub(crate) policies: &'a Contents,
    /// Stands for every type that is not served: a client that waits for a first answer gets an empty one.
    pub(crate) nothing: &'a Contents,
}

/// How far a client has come.
pub(crate) struct Progress {
    pub(crate) acknowledged: Revision,
    pub(crate) settled: bool,
}

impl Subscriptions {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes a message in; with why it refuses something, if it does.
    pub(crate) fn request(
        &mut self,
        request: DeltaDiscoveryRequest,
    ) -> Result<(Answer, Option<String>), TooMuch> {
        let at = self.0.iter().position(|(kind, _)| *kind == request.type_url);
        let at = match at {
            Some(at) => at,
            None if self.0.len() < MAX_TYPES => {
                self.0.push((request.type_url, Session::default()));
                self.0.len() - 1
            }
            None => return Err(TooMuch::Types),
        };
        let refusal = request.error_detail.map(|error| bounded(&error.message));
        let message = Request {
            subscribe: request.resource_names_subscribe,
            unsubscribe: request.resource_names_unsubscribe,
            initial: request.initial_resource_versions.into_iter().collect::<HashMap<_, _>>(),
            nonce: request.response_nonce,
            refusal: refusal.clone(),
        };
        Ok((self.0[at].1.request(message)?, refusal))
    }

    /// The session that has something to say. Policies come before the workloads that may name them.
    pub(crate) fn due(&self, now: Revisions) -> Option<usize> {
        let policies = self.session(AUTHORIZATION_TYPE);
        let waits = policies.is_some_and(|(_, session)| session.is_behind(now.policies));
        let is_due = |(kind, session): &(String, Session)| match kind.as_str() {
            ADDRESS_TYPE => !waits && session.is_due(now.addresses, Gate::Open),
            AUTHORIZATION_TYPE => session.is_due(now.policies, self.gate(now.addresses)),
            _ => session.is_due(0, Gate::Open),
        };
        let first = policies.filter(|(at, _)| is_due(&self.0[*at])).map(|(at, _)| at);
        first.or_else(|| self.0.iter().position(is_due))
    }

    /// Works out what the session at that place has to say, if it has something.
    pub(crate) fn next(&mut self, at: usize, offered: &Offered<'_>) -> Next {
        let Offered { addresses, policies, nothing } = offered;
        let gate = self.gate(addresses.revision());
        let waits = self.session(AUTHORIZATION_TYPE).is_some_and(|(_, p)| p.is_behind(policies.revision()));
        let (kind, session) = &mut self.0[at];
        match kind.as_str() {
            // A policy came since it was decided whose turn it is.
            ADDRESS_TYPE if waits => Next::Again,
            ADDRESS_TYPE => session.next(addresses, Gate::Open),
            AUTHORIZATION_TYPE => session.next(policies, gate),
            _ => session.next(nothing, Gate::Open),
        }
    }

    /// A response of the session at that place, as it is sent.
    pub(crate) fn on_wire(&self, at: usize, response: Response) -> DeltaDiscoveryResponse {
        let kind = &self.0[at].0;
        let mark = if response.complete { COMPLETE } else { MORE };
        DeltaDiscoveryResponse {
            system_version_info: format!("{}{mark}", response.revision),
            resources: response.resources.iter().map(|served| on_wire(kind, served)).collect(),
            type_url: kind.clone(),
            nonce: response.nonce,
            removed_resources: response.removed.iter().map(|name| name.to_string()).collect(),
        }
    }

    /// How far the client has come; none before it has asked for addresses.
    pub(crate) fn progress(&self) -> Option<Progress> {
        let (_, session) = self.session(ADDRESS_TYPE)?;
        let settled = self.session(AUTHORIZATION_TYPE).is_none_or(|(_, policies)| policies.is_settled());
        Some(Progress { acknowledged: session.acknowledged(), settled: session.is_settled() && settled })
    }

    /// What is kept of the client, in pieces.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn weight(&self) -> usize {
        self.0.iter().map(|(_, session)| 1 + session.weight()).sum()
    }

    fn session(&self, kind: &str) -> Option<(usize, &Session)> {
        let at = self.0.iter().position(|(other, _)| other == kind)?;
        Some((at, &self.0[at].1))
    }

    /// What holds back that a policy has gone, when the addresses end at `end`.
    fn gate(&self, end: Revision) -> Gate {
        match self.session(ADDRESS_TYPE) {
            Some((_, session)) => Gate::Behind { end, at: session.position() },
            None => Gate::Open,
        }
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
