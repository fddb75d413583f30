//! What the proxy must be told by those who know the kernel, the mesh and its policy.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;

use tokio::net::TcpStream;
use tokio::sync::watch;

use super::relay::{Cut, Moved};
use super::stream::Reason;
use crate::identity::SpiffeId;

/// A future behind a trait.
pub type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A workload that can be reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// Who it must prove to be.
    pub identity: SpiffeId,
    /// Where its node takes tunnels for it: the workload's address, port 15008.
    pub tunnel: SocketAddr,
    /// What is asked for there: the workload's address and port.
    pub target: SocketAddr,
}

/// What an application of this node wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Original {
    /// What it dialled.
    pub dialled: SocketAddr,
    /// The backend that was picked for it, or what it dialled; none: the backend has just gone.
    pub chosen: Option<SocketAddr>,
    /// Whether it dialled a service, so that another backend would do as well.
    pub is_service: bool,
}

impl Original {
    /// A destination that is no service.
    pub fn to(destination: SocketAddr) -> Self {
        Self { dialled: destination, chosen: Some(destination), is_service: false }
    }
}

/// How a connection of a workload of this node goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// To one of these, in this order; then to [`Outward::others`].
    Tunnel {
        /// Candidates.
        endpoints: Vec<Endpoint>,
        /// Name of the service that was dialled, if it was one.
        host: Option<Box<str>>,
    },
    /// As it is, without a tunnel: the destination is not meshed, and policy lets it be.
    Direct(SocketAddr),
    /// Not at all.
    Refuse(Reason),
}

/// A connection of a workload of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dialled {
    /// The application's end.
    pub application: SocketAddr,
    /// Where it meant to connect.
    pub destination: SocketAddr,
    /// Whom it got; none: without a tunnel, or not yet.
    pub endpoint: Option<Endpoint>,
    /// Where it goes without a tunnel.
    pub direct: Option<SocketAddr>,
}

/// What the outbound side of a pod asks.
pub trait Outward: Send + Sync + 'static {
    /// Where the application meant to connect, by the two ends of its connection to the proxy.
    fn original(&self, application: SocketAddr, listener: SocketAddr) -> Option<Original>;
    /// Where the connection of `application` goes.
    fn route(&self, application: SocketAddr, original: &Original) -> Route;
    /// Who else may be asked, when those of the route have failed.
    fn others(&self, application: SocketAddr, original: &Original, failed: &[Endpoint]) -> Vec<Endpoint> {
        let _none = (application, original, failed);
        Vec::new()
    }
    /// Whether a connection may still be: its endpoint has not gone, policy permits it. Asked when [`Outward::changed`] says so.
    fn still(&self, dialled: &Dialled) -> bool;
    /// A number that changes with each change of endpoints and of policy.
    fn changed(&self) -> watch::Receiver<u64>;
    /// Told once for each connection that ends or is refused.
    fn finished(&self, dialled: &Dialled, outcome: &Outcome);
    /// A connection from within the pod's network namespace, for what goes on without a tunnel.
    fn dial(&self, to: SocketAddr) -> Later<'_, io::Result<TcpStream>>;
    /// One for a tunnel.
    fn dial_tunnel(&self, to: SocketAddr) -> Later<'_, io::Result<TcpStream>>;
}

/// A connection that somebody wants to a workload of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Who, by the certificate, or by the cgroup of a process of this node; none: nobody knows.
    pub source: Option<SpiffeId>,
    /// Address of the other end of the connection that came: a proxy's, or a client's without TLS.
    pub peer: SocketAddr,
    /// The client's address as its proxy tells it. Told, not proven: for the application to see.
    pub client: Option<SocketAddr>,
    /// The workload's address and port.
    pub destination: SocketAddr,
}

/// Who made a connection that came without TLS.
pub struct Caller {
    /// By the cgroup of the process; none: nobody knows.
    pub source: Option<SpiffeId>,
    /// What is known of it elsewhere, to be dropped at its end.
    pub guard: Box<dyn Guard>,
}

/// Policy refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("policy {policy} refuses it")]
pub struct Denied {
    /// Namespace and name of the policy that decides.
    pub policy: String,
}

/// A connection to an application.
pub struct Application {
    /// What is known of it elsewhere. Dropped before the connection: after, its port may be another's.
    pub guard: Option<Box<dyn Guard>>,
    /// The connection.
    pub tcp: TcpStream,
}

/// Something to be undone at the end of a connection.
pub trait Guard: Send + Sync {}

impl From<TcpStream> for Application {
    fn from(tcp: TcpStream) -> Self {
        Self { guard: None, tcp }
    }
}

/// What the inbound side of a pod asks.
pub trait Inward: Send + Sync + 'static {
    /// Who made the connection from `peer` to `destination`, which came without TLS; none: nobody has led it here. Asked once for each.
    fn caller(&self, peer: SocketAddr, destination: SocketAddr) -> Option<Caller>;
    /// Whether policy lets it be. Asked once, when a connection comes.
    fn permits(&self, wanted: &Wanted) -> Result<(), Denied>;
    /// Whether policy still lets it be. Asked when [`Inward::changed`] says so.
    fn still(&self, wanted: &Wanted) -> bool;
    /// A connection to the application, from within the pod's network namespace.
    fn dial<'a>(&'a self, wanted: &'a Wanted) -> Later<'a, io::Result<Application>>;
    /// A number that changes with whatever [`Inward::permits`] decides by, and when certificates are revoked or roots change.
    fn changed(&self) -> watch::Receiver<u64>;
    /// Told once for each connection that ends or is refused.
    fn finished(&self, wanted: &Wanted, outcome: &Outcome);
}

/// How a connection has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It was refused.
    Refused(Reason),
    /// Both directions have ended.
    Ended(Moved),
    /// It was torn down, with why.
    Cut(Moved, String),
    /// It was ended, since it may no longer be: by policy, by a certificate that was revoked or whose root was dropped, or since its
    /// endpoint has gone.
    Revoked,
}

impl Outcome {
    pub(super) fn of(outcome: Result<(), Cut>, moved: Moved) -> Self {
        match outcome {
            Ok(()) => Self::Ended(moved),
            Err(cut) => Self::Cut(moved, cut.to_string()),
        }
    }
}
