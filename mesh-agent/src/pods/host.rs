//! What the proxies of pods are told by kernel and policy, and what they tell.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use mesh_common::abi;
use tokio::sync::watch;

pub use crate::proxy::host::Original;

use crate::identity::SpiffeId;
use crate::policy::Cause;
use crate::snapshot::Workload;

/// The kernel programs.
pub trait Kernel: Send + Sync {
    /// Where an application meant to connect, by its end of the connection to the proxy; asked once for each.
    fn take_original(&self, netns: u64, source: SocketAddr) -> Option<Original>;
    /// Lets the application see `client` at the other end of the connection that the proxy is about to make from `proxy_end`.
    fn show_client(&self, netns: u64, proxy_end: SocketAddr, client: SocketAddr) -> io::Result<()>;
    /// That connection is over.
    fn forget_client(&self, netns: u64, proxy_end: SocketAddr);
    /// Which workload of this node made the connection from `source` to `destination`, by its identity; 0: the node itself; none: not
    /// known.
    fn caller(&self, source: SocketAddr, destination: SocketAddr) -> Option<u64>;
    /// Who makes a connection that was led to the proxy, by its ends: the identity of a workload of this node, or 0 where none is known; asked
    /// once for each. None: it was not led there.
    fn take_steered(&self, source: SocketAddr, destination: SocketAddr) -> Option<u64>;
    /// What comes without TLS to that address of a workload, and needs the proxy, is led to this listener from now on, until it is closed.
    fn steer(&self, workload: u64, address: IpAddr, listener: BorrowedFd<'_>) -> io::Result<()>;
    /// Guards what comes into a namespace, before anything listens there for the proxy. Asked again for the same one, it
    /// changes nothing.
    fn guard(&self, netns: &File, cookie: u64) -> anyhow::Result<()>;
    /// No process of the workload is in that namespace any more.
    fn unguard(&self, cookie: u64);
}

/// What policy says of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Judged {
    /// Whether it may be.
    pub allowed: bool,
    /// Namespace and name of the policy that decides, if one does.
    pub policy: Option<Arc<str>>,
    /// Its rule, counted from 0.
    pub rule: Option<usize>,
    /// Why, where that is known.
    pub cause: Option<Cause>,
    /// It may be, but policies in dry run would have refused it: which, and by which rule.
    pub would_deny: Option<(Arc<str>, Option<usize>)>,
}

/// Policy.
pub trait Judge: Send + Sync {
    /// Whether `source` may connect to `destination`, at that address and port.
    fn judge(
        &self,
        destination: &Workload,
        source: Option<&SpiffeId>,
        source_ip: IpAddr,
        destination_ip: IpAddr,
        port: u16,
    ) -> Judged;
    /// A number that changes whenever an answer may have.
    fn changed(&self) -> watch::Receiver<u64>;
}

/// At whose node a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The client's.
    Outbound,
    /// The server's.
    Inbound,
}

impl Side {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Outbound, Self::Inbound];

    /// For metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// A connection that policy did not let be, or no longer; or that it let be, where policies in dry run would not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// Where that was found.
    pub side: Side,
    /// Who wanted it; none: without TLS.
    pub source: Option<SpiffeId>,
    /// From where.
    pub source_ip: IpAddr,
    /// To whom.
    pub destination: Arc<Workload>,
    /// And where.
    pub address: SocketAddr,
    /// Why.
    pub judged: Judged,
}

/// Told of each denial.
pub type Denied = Arc<dyn Fn(Denial) + Send + Sync>;

/// A workload of this node that is to have a proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolled {
    /// Its uid.
    pub uid: Arc<str>,
    /// All else.
    pub workload: Arc<Workload>,
    /// Its cgroups, relative to the root of the tree.
    pub cgroups: Vec<PathBuf>,
}

/// What has become of a workload's proxy: what the kernel programs are to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It is so.
    Proxy {
        /// The workload.
        uid: Arc<str>,
        /// With [`abi::Proxy::READY`] when the proxy listens and has a certificate, without it when it does not, or no longer.
        proxy: abi::Proxy,
    },
    /// There is none: no process, or none in a network namespace of its own.
    Gone {
        /// The workload.
        uid: Arc<str>,
    },
}
