//! Connections that pass between the kernel and the node proxy, or between two workloads of a node.

use super::{Address, Endpoint};

/// An application's connection to the node proxy, as the proxy sees it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct OriginalKey {
    /// Cookie of the network namespace.
    pub netns: u64,
    /// The application's end.
    pub source: Endpoint,
    /// Zero.
    pub zero: u32,
}
const _: () = assert!(size_of::<OriginalKey>() == 32);

/// Where an application meant to connect.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Original {
    /// Identity of the workload.
    pub workload: u64,
    /// What the application dialled.
    pub dialled: Endpoint,
    /// The backend that was picked for it, or what was dialled where that is no service. Unset: the backend has just gone.
    pub chosen: Endpoint,
    /// Service number; 0: what was dialled is no service.
    pub service: u32,
    /// Zero.
    pub zero: u32,
}
const _: () = assert!(size_of::<Original>() == 56);

/// A connection between two workloads of this node, or from the node to one of them.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct CallerKey {
    /// The client's end.
    pub source: Endpoint,
    /// The server's end.
    pub destination: Endpoint,
}
const _: () = assert!(size_of::<CallerKey>() == 40);

/// Who made it, by the cgroup of the process.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Caller {
    /// Identity of the workload; 0: a process of the node itself, a kubelet's probe for example; [`Caller::STRANGER`].
    pub workload: u64,
    /// When it was made, in nanoseconds of the monotonic clock.
    pub at_nanoseconds: u64,
}
const _: () = assert!(size_of::<Caller>() == 16);

impl Caller {
    /// So long a connection may be on its way, its first segment sent again and again. What is older is believed of no new one: it may be another's,
    /// which came from outside, where nobody notes it.
    pub const FRESH_NANOSECONDS: u64 = 10_000_000_000;

    /// Whether it may be believed of a connection that comes now.
    #[inline(always)]
    pub const fn is_fresh(&self, now_nanoseconds: u64) -> bool {
        now_nanoseconds.wrapping_sub(self.at_nanoseconds) < Self::FRESH_NANOSECONDS
    }

    /// A process of a pod that is no workload. It is noted, so that nobody is taken for whoever had its address and port before.
    pub const STRANGER: u64 = u64::MAX;
}

/// A listener of the node proxy for what comes without TLS.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ListenerKey {
    /// Identity of the workload: another may claim the same address.
    pub workload: u64,
    /// One of its addresses.
    pub address: Address,
}
const _: () = assert!(size_of::<ListenerKey>() == 24);

/// A connection of the node proxy to an application, as the application sees it. Its value is the real client's [`Endpoint`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ClientKey {
    /// Cookie of the network namespace.
    pub netns: u64,
    /// The proxy's end.
    pub source: Endpoint,
    /// Zero.
    pub zero: u32,
}
const _: () = assert!(size_of::<ClientKey>() == 32);
