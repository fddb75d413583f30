//! `cgroup/connect4` and `connect6`: a connection to a service goes to one of its backends; one to a workload of another node goes
//! there by way of the node proxy, if policy lets it.
//!
//! TCP, and UDP sockets that connect. IPv4 through an AF_INET6 socket comes by `connect6` with a mapped address, which is
//! how keys are written anyway.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use mesh_common::abi::{
    Address, Denial, Endpoint, Node, Outcome, Path, Peer, Protocol, Proxy, Reason, ServiceKey, Socket,
    Source, path,
};

use crate::{
    address::Family,
    balance::{self, Choice, Miss},
    count,
    maps::PROXIES,
    policy, refuse, socket,
};

const TCP: u32 = Protocol::Tcp as u32;
const UDP: u32 = Protocol::Udp as u32;
/// `IPPROTO_MPTCP`: multipath TCP, which to a service is TCP.
const MPTCP: u32 = 262;

/// Entry point for IPv4.
#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    verdict(&ctx, connect(&ctx, Family::V4))
}

/// Entry point for IPv6.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    verdict(&ctx, connect(&ctx, Family::V6))
}

/// What becomes of the call.
enum Action {
    /// It goes on, as it came or elsewhere.
    Passed(Reason),
    /// Refused.
    Refused(Reason),
}

/// Where the connection is led. No `Result` and no payloads of enums: what they leave undefined the compiler may copy, which the verifier
/// refuses.
#[derive(Clone, Copy)]
struct Way {
    to: Endpoint,
    /// Of [`Socket`].
    flags: u32,
    reason: Reason,
    refused: bool,
}

#[inline(always)]
fn connect(ctx: &SockAddrContext, family: Family) -> Action {
    let Some(protocol) = protocol(ctx) else {
        return Action::Passed(Reason::OtherProtocol);
    };
    let dialled = family.read(ctx);
    let key = ServiceKey::of(&dialled, protocol as u16);
    let choice = match balance::choose(ctx, &key) {
        Ok(choice) => choice,
        Err(Miss::NotService) => Choice { service: 0, backend: 0, incarnation: 0, endpoint: dialled },
        Err(miss @ (Miss::NoBackends(_) | Miss::Stale | Miss::Broken(_))) => {
            return Action::Refused(refuse::counted(ctx, miss.service(), miss.reason()));
        }
    };
    // Mutual TLS and policy are for TCP.
    let peer = if is_udp(ctx) { None } else { policy::peer(&choice.endpoint.address()) };
    if choice.service == 0 && peer.is_none() {
        // A socket may be connected again, elsewhere.
        if let Some(socket) = socket::of(ctx) {
            forget(socket);
        }
        return Action::Passed(Reason::NotService);
    }
    let reason = if choice.service == 0 { Reason::NotService } else { Reason::Balanced };
    let mut way = Way { to: choice.endpoint, flags: 0, reason, refused: false };
    let socket = socket::of_or_new(ctx);
    if let Some(peer) = peer {
        meshed(ctx, socket.as_deref(), &choice, peer, &mut way);
    }
    if way.refused {
        return Action::Refused(refuse::counted(ctx, choice.service, way.reason));
    }
    if let Some(socket) = socket {
        note(socket, &dialled, &choice, &way);
        if choice.service != 0 && is_udp(ctx) {
            count::outcome(socket, Outcome::Connected, &count::ATTEMPT);
        }
    }
    family.write(ctx, &way.to);
    Action::Passed(way.reason)
}

/// The way to a workload of the mesh, from that to the chosen backend.
#[inline(always)]
fn meshed(ctx: &SockAddrContext, socket: Option<&Socket>, choice: &Choice, peer: &Peer, way: &mut Way) {
    // Until the agent has said anything, its proxy is not alive.
    const UNKNOWN: Node = Node { alive_until_nanoseconds: 0, netns: 0, flags: 0, zero: 0 };
    let node = policy::node().unwrap_or(&UNKNOWN);
    let workload = match socket {
        Some(socket) => socket.workload,
        None => socket::current_workload().map_or(0, |workload| workload.0),
    };
    let source = Source { workload, netns: balance::client(ctx) };
    let proxy = proxy_of(if peer.is_local() { peer.workload } else { workload });
    let path = path(source, &choice.endpoint, peer, proxy, node, balance::now());
    match path {
        Path::Direct => return,
        Path::Refused(reason) => {
            way.reason = reason;
            way.refused = true;
            return;
        }
        Path::Local if workload != 0 || source.netns == node.netns => way.flags = Socket::CALLER,
        Path::Local => way.flags = Socket::CALLER | Socket::STRANGER,
        Path::Fallback(reason) => way.reason = reason,
        Path::Proxied => {
            way.flags = Socket::PROXIED;
            way.reason = Reason::Proxied;
            if let Some(ours) = proxy {
                way.to = ours.listener(choice.endpoint.address());
            }
            if socket.is_none() {
                // The proxy could not learn where it was meant to go.
                way.reason = Reason::OriginalLost;
                way.refused = true;
            }
        }
    }
    if peer.policies != 0 && workload != 0 {
        judge(workload, choice, peer, way);
    }
}

/// Refuses it if policy does. Where the proxy will judge, a verdict that is not there is the proxy's to give.
#[inline(always)]
fn judge(workload: u64, choice: &Choice, peer: &Peer, way: &mut Way) {
    let verdict = policy::of_workload(workload, peer, &choice.endpoint);
    if verdict.allows() || (verdict.is_missing() && !peer.is_local()) {
        return;
    }
    way.reason = if verdict.is_missing() { Reason::NoVerdict } else { Reason::Denied };
    way.refused = true;
    policy::tell(&Denial {
        source_workload: workload,
        destination_workload: peer.workload,
        source: Endpoint::from_wire(Address::from_words([0; 4]), 0),
        destination: choice.endpoint,
        policies: peer.policies,
        verdict,
        side: Denial::CLIENT,
    });
}

#[inline(always)]
fn proxy_of(workload: u64) -> Option<&'static Proxy> {
    // SAFETY: what a reader meets while the agent replaces it is the old value or the new one.
    unsafe { PROXIES.get(&workload) }
}

/// Remembers where a socket was led.
#[inline(always)]
fn note(socket: &mut Socket, dialled: &Endpoint, choice: &Choice, way: &Way) {
    // What calls no service is not followed.
    socket.started_nanoseconds = if choice.service == 0 { 0 } else { balance::now() };
    socket.service = choice.service;
    socket.backend = choice.backend;
    socket.incarnation = choice.incarnation;
    socket.flags = way.flags;
    socket.dialled = *dialled;
    socket.chosen = way.to;
}

/// The record of a socket that connects to no service.
#[inline(always)]
fn forget(socket: &mut Socket) {
    socket.started_nanoseconds = 0;
    socket.service = 0;
    socket.backend = 0;
    socket.incarnation = 0;
    socket.flags = 0;
    socket.dialled.clear();
    socket.chosen.clear();
}

#[inline(always)]
fn protocol(ctx: &SockAddrContext) -> Option<Protocol> {
    match number(ctx) {
        TCP | MPTCP => Some(Protocol::Tcp),
        UDP => Some(Protocol::Udp),
        _ => None,
    }
}

#[inline(always)]
fn is_udp(ctx: &SockAddrContext) -> bool {
    number(ctx) == UDP
}

#[inline(always)]
fn number(ctx: &SockAddrContext) -> u32 {
    // SAFETY: a readable field of a valid context.
    unsafe { (&raw const (*ctx.sock_addr).protocol).read_volatile() }
}

#[inline(always)]
fn verdict(ctx: &SockAddrContext, action: Action) -> i32 {
    match action {
        Action::Passed(reason) => {
            count::reason(reason);
            1
        }
        Action::Refused(reason) => refuse::verdict(ctx, reason),
    }
}
