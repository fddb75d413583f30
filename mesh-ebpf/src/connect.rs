//! `cgroup/connect4` and `connect6`: a connection to a service goes to one of its backends.
//!
//! TCP, and UDP sockets that connect. IPv4 through an AF_INET6 socket comes by `connect6` with a mapped address, which is
//! how keys are written anyway.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use mesh_common::abi::{Outcome, Protocol, Reason, ServiceKey, Socket};

use crate::{
    address::Family,
    balance::{self, Miss},
    count, refuse, socket,
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
    /// To a backend.
    Rewritten,
    /// As it came.
    Passed(Reason),
    /// Refused.
    Refused(Reason),
}

#[inline(always)]
fn connect(ctx: &SockAddrContext, family: Family) -> Action {
    let Some(protocol) = protocol(ctx) else {
        return Action::Passed(Reason::OtherProtocol);
    };
    let dialled = family.read(ctx);
    let key = ServiceKey::of(&dialled, protocol as u16);
    match balance::choose(ctx, &key) {
        Ok(choice) => {
            family.write(ctx, &choice.endpoint);
            if let Some(socket) = socket::of_or_new(ctx) {
                socket.started_nanoseconds = balance::now();
                socket.service = choice.service;
                socket.backend = choice.backend;
                socket.incarnation = choice.incarnation;
                socket.dialled = dialled;
                socket.chosen = choice.endpoint;
                if is_udp(ctx) {
                    count::outcome(socket, Outcome::Connected, &count::ATTEMPT);
                }
            }
            Action::Rewritten
        }
        Err(miss @ Miss::NotService) => {
            // A socket may be connected again, elsewhere.
            if let Some(socket) = socket::of(ctx) {
                forget(socket);
            }
            Action::Passed(miss.reason())
        }
        Err(miss @ (Miss::NoBackends(_) | Miss::Stale | Miss::Broken(_))) => {
            Action::Refused(refuse::counted(ctx, miss))
        }
    }
}

/// The record of a socket that connects to no service.
#[inline(always)]
fn forget(socket: &mut Socket) {
    socket.started_nanoseconds = 0;
    socket.service = 0;
    socket.backend = 0;
    socket.incarnation = 0;
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
        Action::Rewritten => {
            count::reason(Reason::Balanced);
            1
        }
        Action::Passed(reason) => {
            count::reason(reason);
            1
        }
        Action::Refused(reason) => refuse::verdict(ctx, reason),
    }
}
