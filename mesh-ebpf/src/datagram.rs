//! `cgroup/sendmsg4,6` and `recvmsg4,6`: UDP sockets that are not connected.
//!
//! A flow is a socket and a service. Its backend is chosen by its first datagram and kept while it is one of the service's,
//! so that a client talks to one server; when it goes, the next datagram goes to another. The first flow of a socket is kept
//! in the socket's own record, which is all that a client of one service needs; further ones in an LRU map.
//! What comes back from a backend shows the service's address as its source.

use aya_ebpf::{
    EbpfContext as _, bindings::BPF_ANY, helpers::bpf_get_socket_cookie, macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use mesh_common::abi::{CounterKey, Endpoint, FlowKey, FlowValue, Protocol, Reason, ServiceKey, SourceKey};

use crate::{
    address::Family,
    balance::{self, Choice, Miss},
    count,
    maps::{UDP_FLOWS, UDP_SOURCES},
    refuse, socket,
};

/// Entry point for datagrams sent to IPv4.
#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    verdict(&ctx, send(&ctx, Family::V4))
}

/// Entry point for datagrams sent to IPv6.
#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    verdict(&ctx, send(&ctx, Family::V6))
}

/// Entry point for datagrams received by AF_INET sockets.
#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    receive(&ctx, Family::V4);
    1
}

/// Entry point for datagrams received by AF_INET6 sockets, mapped IPv4 included.
#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    receive(&ctx, Family::V6);
    1
}

/// What becomes of a datagram.
enum Action {
    /// To a backend that was chosen now.
    Chosen,
    /// To the backend of its flow.
    Kept,
    /// As it came.
    Passed(Reason),
    /// Refused.
    Refused(Reason),
}

#[inline(always)]
fn send(ctx: &SockAddrContext, family: Family) -> Action {
    // SAFETY: a readable field of a valid context.
    if unsafe { (&raw const (*ctx.sock_addr).protocol).read_volatile() } != Protocol::Udp as u32 {
        return Action::Passed(Reason::OtherProtocol);
    }
    let dialled = family.read(ctx);
    let key = ServiceKey::of(&dialled, Protocol::Udp as u16);
    let record = socket::of(ctx);
    let mut moved = false;
    if let Some(socket) = &record
        && socket.dialled.same(&dialled)
    {
        if let Some(endpoint) = balance::still(socket.service, socket.backend, socket.incarnation) {
            family.write(ctx, &endpoint);
            return Action::Kept;
        }
        moved = true;
    }
    let flow = FlowKey { cookie: cookie(ctx), service: key, zero: 0 };
    if !moved && let Some(kept) = UDP_FLOWS.get_ptr(&flow) {
        // SAFETY: a value of this map; a torn read is noticed, since a backend names its service and incarnation.
        let FlowValue { service, backend, incarnation, .. } = unsafe { *kept };
        if let Some(endpoint) = balance::still(service, backend, incarnation) {
            family.write(ctx, &endpoint);
            return Action::Kept;
        }
        moved = true;
    }
    if moved {
        count::reason(Reason::FlowMoved);
    }
    match balance::choose(ctx, &key) {
        Ok(choice) => {
            keep(ctx, &flow, &dialled, &choice);
            family.write(ctx, &choice.endpoint);
            Action::Chosen
        }
        Err(miss @ Miss::NotService) => Action::Passed(miss.reason()),
        Err(miss @ (Miss::NoBackends(_) | Miss::Stale | Miss::Broken(_))) => {
            Action::Refused(refuse::counted(ctx, miss.service(), miss.reason()))
        }
    }
}

/// Remembers a flow: in the socket's record if that is free or is this flow's, else in the maps.
#[inline(always)]
fn keep(ctx: &SockAddrContext, flow: &FlowKey, dialled: &Endpoint, choice: &Choice) {
    let Some(socket) = socket::of_or_new(ctx) else {
        return remember(flow, dialled, choice);
    };
    let connected = CounterKey {
        source: socket.workload,
        service: choice.service,
        backend: choice.backend,
        ..CounterKey::default()
    };
    count::key(&connected, &count::ATTEMPT);
    if socket.dialled.is_some() && !socket.dialled.same(dialled) {
        return remember(flow, dialled, choice);
    }
    if socket.dialled.is_some() {
        // The backend that is left may still have answers under way.
        source(flow.cookie, &socket.chosen, dialled);
    }
    socket.service = choice.service;
    socket.backend = choice.backend;
    socket.incarnation = choice.incarnation;
    socket.dialled = *dialled;
    socket.chosen = choice.endpoint;
}

#[inline(always)]
fn remember(flow: &FlowKey, dialled: &Endpoint, choice: &Choice) {
    let value = FlowValue {
        service: choice.service,
        backend: choice.backend,
        incarnation: choice.incarnation,
        zero: 0,
    };
    if UDP_FLOWS.insert(flow, &value, u64::from(BPF_ANY)).is_err() {
        count::reason(Reason::FlowsFull);
    }
    source(flow.cookie, &choice.endpoint, dialled);
}

#[inline(always)]
fn source(cookie: u64, backend: &Endpoint, dialled: &Endpoint) {
    let key = SourceKey { cookie, source: *backend, zero: 0 };
    if UDP_SOURCES.insert(&key, dialled, u64::from(BPF_ANY)).is_err() {
        count::reason(Reason::FlowsFull);
    }
}

/// Shows the address that was dialled as the source of what its backend sent.
#[inline(always)]
fn receive(ctx: &SockAddrContext, family: Family) {
    // Sockets without a record have sent to no service.
    let Some(socket) = socket::of(ctx) else { return };
    let from = family.read(ctx);
    if socket.dialled.is_some() && socket.chosen.same(&from) {
        family.write(ctx, &socket.dialled);
        return;
    }
    let key = SourceKey { cookie: cookie(ctx), source: from, zero: 0 };
    if let Some(dialled) = UDP_SOURCES.get_ptr(&key) {
        // SAFETY: a value of this map; only an eviction at this very moment could tear it.
        let dialled = unsafe { *dialled };
        family.write(ctx, &dialled);
    }
}

#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: a valid context.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

#[inline(always)]
fn verdict(ctx: &SockAddrContext, action: Action) -> i32 {
    match action {
        Action::Chosen => {
            count::reason(Reason::Balanced);
            1
        }
        Action::Kept => 1,
        Action::Passed(reason) => {
            count::reason(reason);
            1
        }
        Action::Refused(reason) => refuse::verdict(ctx, reason),
    }
}
