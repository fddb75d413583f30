//! The kinds that are known here, and one object of any of them.

use std::{fmt, sync::Arc};

use serde::de::DeserializeOwned;
use serde_norway::Value;

use super::{
    AuthorizationPolicy, EndpointSlice, Invalid, Meta, Node, NsName, PeerAuthentication, Pod, Service,
    ServiceEntry, TrafficPolicy, WorkloadEntry, check::Checks,
};

/// The kinds that are known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    AuthorizationPolicy,
    EndpointSlice,
    Namespace,
    Node,
    PeerAuthentication,
    Pod,
    Service,
    ServiceAccount,
    ServiceEntry,
    TrafficPolicy,
    WorkloadEntry,
}

/// Why `apiVersion` and `kind` name nothing that is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnknownKind {
    /// Not ours: skip it.
    Foreign,
    /// The kind is known, the version is not.
    Version(&'static str),
    /// Our own group has no such kind: a typo.
    Ours,
}

impl Kind {
    pub(crate) fn of(api_version: &str, kind: &str) -> Result<Self, UnknownKind> {
        const ISTIO: [&str; 3] =
            ["networking.istio.io/v1", "networking.istio.io/v1beta1", "networking.istio.io/v1alpha3"];
        const SECURITY: [&str; 2] = ["security.istio.io/v1", "security.istio.io/v1beta1"];
        let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
        let (found, versions): (Self, &'static [&'static str]) = match (group, kind) {
            ("", "Namespace") => (Self::Namespace, &["v1"]),
            ("", "Node") => (Self::Node, &["v1"]),
            ("", "Pod") => (Self::Pod, &["v1"]),
            ("", "Service") => (Self::Service, &["v1"]),
            ("", "ServiceAccount") => (Self::ServiceAccount, &["v1"]),
            ("discovery.k8s.io", "EndpointSlice") => (Self::EndpointSlice, &["discovery.k8s.io/v1"]),
            ("networking.istio.io", "ServiceEntry") => (Self::ServiceEntry, &ISTIO),
            ("networking.istio.io", "WorkloadEntry") => (Self::WorkloadEntry, &ISTIO),
            ("security.istio.io", "AuthorizationPolicy") => (Self::AuthorizationPolicy, &SECURITY),
            ("security.istio.io", "PeerAuthentication") => (Self::PeerAuthentication, &SECURITY),
            ("mesh.dev", "TrafficPolicy") => (Self::TrafficPolicy, &["mesh.dev/v1alpha1"]),
            ("mesh.dev", _) => return Err(UnknownKind::Ours),
            (_, _) => return Err(UnknownKind::Foreign),
        };
        if versions.contains(&api_version) { Ok(found) } else { Err(UnknownKind::Version(versions[0])) }
    }

    fn is_namespaced(self) -> bool {
        match self {
            Self::Namespace | Self::Node => false,
            Self::AuthorizationPolicy
            | Self::EndpointSlice
            | Self::PeerAuthentication
            | Self::Pod
            | Self::Service
            | Self::ServiceAccount
            | Self::ServiceEntry
            | Self::TrafficPolicy
            | Self::WorkloadEntry => true,
        }
    }
}

/// What names an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) kind: Kind,
    pub(crate) name: NsName,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.kind, self.name)
    }
}

/// A valid object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Object {
    AuthorizationPolicy(Arc<AuthorizationPolicy>),
    EndpointSlice(Arc<EndpointSlice>),
    Node(Arc<Node>),
    PeerAuthentication(Arc<PeerAuthentication>),
    Pod(Arc<Pod>),
    Service(Arc<Service>),
    ServiceEntry(Arc<ServiceEntry>),
    TrafficPolicy(Arc<TrafficPolicy>),
    WorkloadEntry(Arc<WorkloadEntry>),
    /// Namespace and ServiceAccount: nothing but their metadata is used.
    Name(Kind, Arc<Meta>),
}

impl Object {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::Node(_) => Kind::Node,
            Self::PeerAuthentication(_) => Kind::PeerAuthentication,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::ServiceEntry(_) => Kind::ServiceEntry,
            Self::TrafficPolicy(_) => Kind::TrafficPolicy,
            Self::WorkloadEntry(_) => Kind::WorkloadEntry,
            Self::Name(kind, _) => *kind,
        }
    }

    pub(crate) fn meta(&self) -> &Meta {
        match self {
            Self::AuthorizationPolicy(o) => &o.metadata,
            Self::EndpointSlice(o) => &o.metadata,
            Self::Node(o) => &o.metadata,
            Self::PeerAuthentication(o) => &o.metadata,
            Self::Pod(o) => &o.metadata,
            Self::Service(o) => &o.metadata,
            Self::ServiceEntry(o) => &o.metadata,
            Self::TrafficPolicy(o) => &o.metadata,
            Self::WorkloadEntry(o) => &o.metadata,
            Self::Name(_, meta) => meta,
        }
    }

    pub(crate) fn key(&self) -> Key {
        Key { kind: self.kind(), name: self.meta().ns_name() }
    }

    /// Reads and checks an object of `kind`; `prefix` is its place in a list.
    pub(super) fn read(
        kind: Kind,
        value: Value,
        document: u32,
        prefix: String,
    ) -> Result<Read, Vec<Invalid>> {
        let mut checks = Checks::new(document, prefix);
        let object = Self::typed(kind, value, &mut checks);
        let notes = checks.finish()?;
        // `typed` gives nothing only when it refused something, which `finish` reported.
        Ok(Read { object, notes })
    }

    fn typed(kind: Kind, value: Value, checks: &mut Checks) -> Option<Self> {
        macro_rules! checked {
            ($variant:ident) => {{
                let mut object = shape(value, checks)?;
                let typed: &mut super::$variant = &mut object;
                typed.check(checks);
                Self::$variant(Arc::new(object))
            }};
        }
        Some(match kind {
            Kind::AuthorizationPolicy => checked!(AuthorizationPolicy),
            Kind::EndpointSlice => checked!(EndpointSlice),
            Kind::PeerAuthentication => checked!(PeerAuthentication),
            Kind::Pod => checked!(Pod),
            Kind::Service => checked!(Service),
            Kind::ServiceEntry => checked!(ServiceEntry),
            Kind::TrafficPolicy => checked!(TrafficPolicy),
            Kind::WorkloadEntry => checked!(WorkloadEntry),
            Kind::Node => {
                let mut node: Node = shape(value, checks)?;
                node.metadata.check(kind.is_namespaced(), checks);
                Self::Node(Arc::new(node))
            }
            Kind::Namespace | Kind::ServiceAccount => {
                let mut node: Node = shape(value, checks)?;
                node.metadata.check(kind.is_namespaced(), checks);
                Self::Name(kind, Arc::new(node.metadata))
            }
        })
    }
}

/// An object, and what is to be said about it.
pub(super) struct Read {
    pub(super) object: Option<Object>,
    pub(super) notes: Vec<Invalid>,
}

/// Gives a document the shape of its kind, or says which field does not fit.
fn shape<T: DeserializeOwned>(value: Value, checks: &mut Checks) -> Option<T> {
    match serde_path_to_error::deserialize(value) {
        Ok(object) => Some(object),
        Err(error) => {
            let path = error.path().to_string();
            let field = if path == "." { "" } else { &path };
            checks.refuse(field, error.inner().to_string());
            None
        }
    }
}
