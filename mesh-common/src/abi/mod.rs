//! Keys and values of the kernel maps, byte for byte as kernel and agent share them.
//!
//! Every type here is plain integers and byte arrays without hidden padding; an assertion guards each size. Values may grow
//! only into their reserved bytes, so that a newer agent can adopt what an older one left pinned.

mod address;
mod backend;
mod counters;
mod page;
mod passage;
mod path;
mod peer;
mod pick;
mod reason;
mod socket;
#[cfg(feature = "user")]
mod user;
mod verdict;
mod workload;

pub use address::{Address, Endpoint, Protocol, ServiceKey};
pub use backend::{Backend, Load};
pub use counters::{CounterKey, Counters, Outcome};
pub use page::{Algorithm, ENTRIES, Entry, Header, MAX_DEPTH, Page, Pointer};
pub use passage::{Caller, CallerKey, ClientKey, ListenerKey, Original, OriginalKey};
pub use path::{Path, Source, path};
pub use peer::{Node, Peer, Proxy};
pub use pick::{Affinity, AffinityKey, descend, maglev_position, random_position, round_robin_position};
pub use reason::Reason;
pub use socket::{FlowKey, FlowValue, Socket, SourceKey};
pub use verdict::{Denial, PlainKey, Verdict, VerdictKey};
pub use workload::WorkloadIdentity;
#[cfg(feature = "user")]
pub use workload::identity_of;

/// Names of the maps, as they are in the object and under the pin path. A map whose key or meaning changes gets another name;
/// a value may grow at its end under the old one.
pub mod map {
    /// [`super::ServiceKey`] → [`super::Pointer`] (hash). Writer: agent.
    pub const SERVICES: &str = "SERVICES";
    /// page number → [`super::Page`] (array). Writer: agent.
    pub const PAGES: &str = "PAGES";
    /// backend number → [`super::Backend`] (array). Writer: agent.
    pub const BACKENDS: &str = "BACKENDS";
    /// backend number → [`super::Load`] (array). Writer: `connection`; the agent zeroes a slot before its first use.
    pub const LOADS: &str = "LOADS";
    /// service number → position of round robin (array of `u64`). Writer: kernel.
    pub const ROTATION: &str = "ROTATION";
    /// [`super::AffinityKey`] → [`super::Affinity`] (LRU hash). Writer: kernel.
    pub const AFFINITY: &str = "AFFINITY";
    /// cgroup id → [`super::WorkloadIdentity`] (hash). Writer: agent.
    pub const WORKLOADS: &str = "WORKLOADS";
    /// socket → [`super::Socket`] (socket storage). Writer: kernel.
    pub const SOCKETS: &str = "SOCKETS";
    /// [`super::FlowKey`] → [`super::FlowValue`] (LRU hash): UDP. Writer: `datagram`.
    pub const UDP_FLOWS: &str = "UDP_FLOWS";
    /// [`super::SourceKey`] → [`super::Endpoint`] (LRU hash): UDP. Writer: `datagram`.
    pub const UDP_SOURCES: &str = "UDP_SOURCES";
    /// [`super::CounterKey`] → [`super::Counters`] (per-CPU hash). Writer: kernel; the agent removes what has gone.
    pub const COUNTERS: &str = "COUNTERS";
    /// [`super::Reason`] → `u64` (per-CPU array). Writer: kernel.
    pub const REASONS: &str = "REASONS";

    /// [`super::Address`] → [`super::Peer`] (hash). Writer: agent.
    pub const PEERS: &str = "PEERS";
    /// Identity of a workload of this node → [`super::Proxy`] (hash). Writer: agent.
    pub const PROXIES: &str = "PROXIES";
    /// 0 → [`super::Node`] (array). Writer: agent.
    pub const NODE: &str = "NODE";
    /// [`super::OriginalKey`] → [`super::Original`] (LRU hash). Writer: `connection`; the agent removes what it has read.
    pub const ORIGINALS: &str = "ORIGINALS";
    /// [`super::CallerKey`] → [`super::Caller`] (LRU hash). Writer: `connection`.
    pub const CALLERS: &str = "CALLERS";
    /// [`super::ClientKey`] → [`super::Endpoint`] (hash). Writer: agent.
    pub const CLIENTS: &str = "CLIENTS";
    /// [`super::VerdictKey`] → [`super::Verdict`] (hash). Writer: agent.
    pub const VERDICTS: &str = "VERDICTS";
    /// [`super::PlainKey`] behind its prefix length → [`super::Verdict`] (trie). Writer: agent.
    pub const PLAIN_VERDICTS: &str = "PLAIN_VERDICTS";
    /// [`super::Denial`]s (ring buffer). Writer: `connect` and `inbound`.
    pub const DENIALS: &str = "DENIALS";
    /// [`super::ListenerKey`] → the listener of a workload's proxy for what comes without TLS (hash of sockets). Writer: agent; the kernel
    /// removes what is closed.
    pub const LISTENERS: &str = "LISTENERS";
    /// [`super::CallerKey`] of a connection that is led to such a listener → identity of who calls, as it was judged; 0: none (LRU hash). Writer:
    /// `inbound`; the agent removes what it has read.
    pub const STEERED: &str = "STEERED";

    /// All of them.
    pub const ALL: [&str; 23] = [
        SERVICES,
        PAGES,
        BACKENDS,
        LOADS,
        ROTATION,
        AFFINITY,
        WORKLOADS,
        SOCKETS,
        UDP_FLOWS,
        UDP_SOURCES,
        COUNTERS,
        REASONS,
        PEERS,
        PROXIES,
        NODE,
        ORIGINALS,
        CALLERS,
        CLIENTS,
        VERDICTS,
        PLAIN_VERDICTS,
        DENIALS,
        LISTENERS,
        STEERED,
    ];
}
