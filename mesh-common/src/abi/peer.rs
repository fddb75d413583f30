//! The workloads of the mesh by their addresses, and what this node has for its own.

use super::{Address, Endpoint};

/// Whose an address is. Workloads that share their node's address have no entry.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Peer {
    /// Identity of the workload; never 0.
    pub workload: u64,
    /// [`Peer::LOCAL`] and others.
    pub flags: u32,
    /// Number of the set of policies that apply to it; 0: none does, and whoever reaches it is let in.
    pub policies: u32,
}
const _: () = assert!(size_of::<Peer>() == 16);

impl Peer {
    /// It runs on this node.
    pub const LOCAL: u32 = 1;
    /// Its node takes mutual TLS for it.
    pub const MESHED: u32 = 2;
    /// It runs on this node, and policies in dry run apply to it: the agent is told of whoever is let in, and judges what those would say.
    pub const REHEARSED: u32 = 4;
    /// It runs on this node, and its policies ask for what only HTTP can tell: what comes to it without TLS goes through the node proxy.
    pub const STEERED: u32 = 8;

    /// Whether it runs on this node.
    #[inline(always)]
    pub const fn is_local(&self) -> bool {
        self.flags & Self::LOCAL != 0
    }

    /// Whether its node takes mutual TLS for it.
    #[inline(always)]
    pub const fn is_meshed(&self) -> bool {
        self.flags & Self::MESHED != 0
    }

    /// Whether policies in dry run apply to it.
    #[inline(always)]
    pub const fn is_rehearsed(&self) -> bool {
        self.flags & Self::REHEARSED != 0
    }

    /// Whether what comes to it without TLS goes through the node proxy.
    #[inline(always)]
    pub const fn is_steered(&self) -> bool {
        self.flags & Self::STEERED != 0
    }
}

/// What a workload of this node has of the node proxy. No entry: nothing.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Proxy {
    /// Cookie of the workload's network namespace.
    pub netns: u64,
    /// [`Proxy::READY`] or [`Proxy::DIRECT`].
    pub flags: u32,
    /// Zero.
    pub zero: u32,
    /// Where the proxy takes the workload's IPv4 connections: its own address, so that the connection keeps it as its source.
    /// All zero: it has none.
    pub v4: Address,
    /// The same for IPv6.
    pub v6: Address,
}
const _: () = assert!(size_of::<Proxy>() == 48);

impl Proxy {
    /// The proxy listens in the workload's network namespace and has a certificate for it.
    pub const READY: u32 = 1;
    /// The workload is not meshed, since it shares its node's network or has been taken out of the mesh: its connections go as they are,
    /// for policy to judge.
    pub const DIRECT: u32 = 2;
    /// Where the proxy takes a workload's outbound connections.
    pub const OUTBOUND: u16 = 15001;
    /// Where the workload's connections to `destination` are taken; no address: nowhere.
    #[inline(always)]
    pub const fn listener(&self, destination: Address) -> Endpoint {
        Endpoint::new(if destination.is_v4() { self.v4 } else { self.v6 }, Self::OUTBOUND)
    }

    /// Where connections are taken that come without TLS to a workload whose policies need more than the kernel sees.
    pub const PLAIN: u16 = 15006;
    /// Where the proxy takes tunnels for a workload.
    pub const TUNNEL: u16 = 15008;
    /// Congestion control of connections between an application and the proxy, at both ends: every kernel has it, and it paces nothing.
    pub const CONGESTION: &str = "reno";
}

/// The node itself: one entry, number 0.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Node {
    /// Heartbeat: until when the proxy counts as alive, in nanoseconds of the monotonic clock. The agent moves it on several
    /// times a second, by less than a second.
    pub alive_until_nanoseconds: u64,
    /// Cookie of the node's own network namespace; 0: not known.
    pub netns: u64,
    /// [`Node::GUARDED`].
    pub flags: u32,
    /// Zero.
    pub zero: u32,
}
const _: () = assert!(size_of::<Node>() == 24);

impl Node {
    /// Policies apply to some workload of this node: then an address of a pod that is no workload's is not open to everybody.
    pub const GUARDED: u32 = 1;
}
