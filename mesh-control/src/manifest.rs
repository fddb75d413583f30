//! Manifests: text in, valid objects or named faults out. Pure: no IO, no clock.
//!
//! A file is the unit. One refused document refuses the file, so that a half-edited file never takes half its services
//! away. A kind that is not known here (a Deployment, say) is skipped with a note, since manifests are commonly kept
//! together with such.

mod authorization;
mod check;
mod document;
mod endpoint_slice;
mod entry;
mod invalid;
mod meta;
mod object;
mod peer_authentication;
mod pod;
mod policy;
mod selector;
mod service;
mod value;

pub(crate) use authorization::{
    Account, Action, AuthorizationPolicy, Block, Operation, Pattern, Port, Rule, Source, Test,
};
pub(crate) use check::is_label;
pub(crate) use document::{Cache, parse_with};
pub(crate) use endpoint_slice::{Endpoint, EndpointSlice};
pub(crate) use entry::{Resolution, ServiceEntry, WorkloadEntry, WorkloadSpec, locality};
pub use invalid::Invalid;
pub(crate) use meta::{Meta, NsName};
pub(crate) use object::{Key, Kind, Object, UnknownKind};
pub(crate) use peer_authentication::{PeerAuthentication, PeerMode};
pub(crate) use pod::{Node, Pod};
pub(crate) use policy::{Balancer, TrafficPolicy};
pub(crate) use service::{IpFamily, Service, ServicePort, TrafficDistribution};
pub(crate) use value::{Labels, Protocol, TargetPort};

/// What a file of manifests holds.
#[derive(Debug, Default)]
pub struct Parsed {
    /// Valid objects, in the order of the file.
    pub(crate) objects: Vec<Located>,
    /// What was skipped and why; the rest of the file is good.
    pub(crate) notes: Vec<Invalid>,
}

/// An object and the place that it came from.
#[derive(Clone, Debug)]
pub(crate) struct Located {
    /// Document in its file, from 1.
    pub(crate) document: u32,
    pub(crate) object: Object,
}

impl Parsed {
    /// Number of objects.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// True when no object was found.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }
}

/// Parses a file of manifests: YAML or JSON, any number of documents, `kind: List` included.
///
/// # Errors
/// Every fault found, each with document, field and reason; then nothing of the file may be used.
pub fn parse(text: &str) -> Result<Parsed, Vec<Invalid>> {
    parse_with(text, &mut Cache::default())
}

#[cfg(test)]
mod tests;
