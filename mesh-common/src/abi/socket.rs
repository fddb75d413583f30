//! What the kernel remembers of a socket, and of the flows of an unconnected UDP socket.

use super::{Endpoint, ServiceKey};

/// Socket storage: whose it is, and where it was led. UDP sockets have it from their creation, TCP sockets from their first
/// call of a service.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Socket {
    /// Identity of the workload that created it (UDP) or connected it (TCP); 0: none.
    pub workload: u64,
    /// When it was told to connect to a service, in nanoseconds of the monotonic clock; 0: it was not.
    pub started_nanoseconds: u64,
    /// Service number; 0: the destination is no service.
    pub service: u32,
    /// Backend number; 0: none.
    pub backend: u32,
    /// Incarnation of the backend.
    pub incarnation: u32,
    /// [`Socket::OPEN`] and others.
    pub flags: u32,
    /// What the application dialled, where that is a service.
    pub dialled: Endpoint,
    /// Where it was led instead.
    pub chosen: Endpoint,
    /// Bytes received when the peer had acknowledged our FIN: if there are more at the end, the last is the peer's FIN.
    pub received_at_fin: u64,
    /// For later use; zero. A socket outlives an upgrade of the agent, so this type may never change its size.
    pub reserved: [u8; 16],
}
const _: () = assert!(size_of::<Socket>() == 96);

impl Socket {
    /// Counted in [`super::Load`] and in [`super::Counters`] as established.
    pub const OPEN: u32 = 1;
    /// Led to the node proxy, which will ask where it was meant to go.
    pub const PROXIED: u32 = 2;
    /// Goes to a workload of this node, whose hook will ask who made it.
    pub const CALLER: u32 = 4;
    /// With [`Socket::CALLER`]: made by a process of a pod that is no workload.
    pub const STRANGER: u32 = 8;
}

/// UDP: a socket and a service that it sends to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FlowKey {
    /// Socket cookie.
    pub cookie: u64,
    /// The service.
    pub service: ServiceKey,
    /// Zero.
    pub zero: u32,
}
const _: () = assert!(size_of::<FlowKey>() == 32);

/// UDP: the backend of a flow.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FlowValue {
    /// Service number.
    pub service: u32,
    /// Backend number.
    pub backend: u32,
    /// Its incarnation.
    pub incarnation: u32,
    /// Zero.
    pub zero: u32,
}
const _: () = assert!(size_of::<FlowValue>() == 16);

/// UDP: a socket and a backend that may answer it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SourceKey {
    /// Socket cookie.
    pub cookie: u64,
    /// The backend's address.
    pub source: Endpoint,
    /// Zero.
    pub zero: u32,
}
const _: () = assert!(size_of::<SourceKey>() == 32);
