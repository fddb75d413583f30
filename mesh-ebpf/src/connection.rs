//! `sockops`: follows the TCP connections that workloads open: established, failed, closed.
//!
//! Asks for state changes when the connection starts, and hears nothing of the segments in between. Before the first of them leaves, it
//! notes for whoever accepts the connection, the node proxy or a workload of this node, what only its maker knows.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_ANY, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
    },
    helpers::{bpf_get_netns_cookie, bpf_setsockopt},
    macros::sock_ops,
    programs::SockOpsContext,
};
use mesh_common::abi::{
    Caller, CallerKey, ClientKey, Counters, Endpoint, Original, OriginalKey, Outcome, Proxy, Reason, Socket,
};

use crate::{
    address::{pick, words},
    atomic, balance, count,
    maps::{CALLERS, CLIENTS, LOADS, ORIGINALS},
    socket,
};

const AF_INET6: u32 = 10;

const TCP_FIN_WAIT2: u32 = 5;
const TCP_CLOSE: u32 = 7;
const TCP_CLOSE_WAIT: u32 = 8;
const TCP_LAST_ACK: u32 = 9;
const TCP_CLOSING: u32 = 11;

/// Entry point. (A function may not have the name of its section.)
#[sock_ops]
pub fn connection(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => watch(&ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => established(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(&ctx),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == TCP_CLOSE => closed(&ctx),
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == TCP_FIN_WAIT2 => fin_acknowledged(&ctx),
        _ => {}
    }
    // Nothing that sockops returns refuses a connection.
    0
}

/// The record of a socket that `connect` led to a backend.
#[inline(always)]
fn record(ctx: &SockOpsContext) -> Option<&'static mut Socket> {
    noted(ctx).filter(|socket| socket.started_nanoseconds != 0)
}

/// The record of a socket.
#[inline(always)]
fn noted(ctx: &SockOpsContext) -> Option<&'static mut Socket> {
    // SAFETY: a readable field of a valid context.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return None;
    }
    socket::get(sk.cast())
}

#[inline(always)]
fn watch(ctx: &SockOpsContext) {
    let Some(socket) = noted(ctx) else { return };
    if (socket.started_nanoseconds != 0 || socket.flags & Socket::CALLER != 0)
        && ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32).is_err()
    {
        count::reason(Reason::NoSocketStorage);
    }
    if socket.flags & Socket::PROXIED != 0 {
        tell_proxy(ctx, socket);
        unpace(ctx);
    } else if socket.flags & Socket::CALLER != 0 {
        let key = caller(ctx);
        let stranger = socket.flags & Socket::STRANGER != 0;
        let workload = if stranger { Caller::STRANGER } else { socket.workload };
        let caller = Caller { workload, at_nanoseconds: balance::now() };
        if CALLERS.insert(&key, &caller, u64::from(BPF_ANY)).is_err() {
            count::reason(Reason::CallersLost);
        }
    }
}

/// A connection that an application will accept: it may be the node proxy's, who calls from the pod's own address.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let source = remote(ctx);
    if !source.address().same(local(ctx).address()) {
        return;
    }
    // SAFETY: takes a valid context, gives a number.
    let key = ClientKey { netns: unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }, source, zero: 0 };
    // SAFETY: only whether it is there is asked.
    if unsafe { CLIENTS.get(&key) }.is_some() {
        unpace(ctx);
    }
}

/// Between an application and the node proxy there is no network that could be congested: what BBR spends there on timers is lost. Must
/// come before the connection is established, since a socket that has been paced once always is.
#[inline(always)]
fn unpace(ctx: &SockOpsContext) {
    const SOL_TCP: i32 = 6;
    const TCP_CONGESTION: i32 = 13;
    const NAME: Option<&[u8; Proxy::CONGESTION.len()]> = Proxy::CONGESTION.as_bytes().first_chunk();
    const { assert!(NAME.is_some()) };
    let Some(mut name) = NAME.copied() else { return };
    let (place, length) = (name.as_mut_ptr().cast(), name.len() as i32);
    // SAFETY: takes a valid context, and reads the name from the stack.
    let set = unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_TCP, TCP_CONGESTION, place, length) };
    if set != 0 {
        count::reason(Reason::Paced);
    }
}

#[inline(always)]
fn caller(ctx: &SockOpsContext) -> CallerKey {
    CallerKey { source: local(ctx), destination: remote(ctx) }
}

/// Where the application meant to connect.
#[inline(always)]
fn tell_proxy(ctx: &SockOpsContext, socket: &Socket) {
    let chosen = if socket.service == 0 {
        socket.dialled
    } else {
        // A slot rests before it is given to another: only a connection of more than a second ago finds nothing here.
        balance::still(socket.service, socket.backend, socket.incarnation).unwrap_or_default()
    };
    // SAFETY: takes a valid context, gives a number.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let key = OriginalKey { netns, source: local(ctx), zero: 0 };
    let value = Original {
        workload: socket.workload,
        dialled: socket.dialled,
        chosen,
        service: socket.service,
        zero: 0,
    };
    if ORIGINALS.insert(&key, &value, u64::from(BPF_ANY)).is_err() {
        count::reason(Reason::OriginalLost);
    }
}

/// Our end of the connection.
#[inline(always)]
fn local(ctx: &SockOpsContext) -> Endpoint {
    let ops = ctx.ops;
    // SAFETY: readable fields of a valid context, here and below. This port is in host order.
    unsafe {
        let port = (&raw const (*ops).local_port).read_volatile() as u16;
        let six = words((&raw const (*ops).local_ip6).cast());
        let four = (&raw const (*ops).local_ip4).read_volatile();
        let address = pick(ctx.family() != AF_INET6, four, six);
        Endpoint::new(address, port)
    }
}

/// The other end.
#[inline(always)]
fn remote(ctx: &SockOpsContext) -> Endpoint {
    let ops = ctx.ops;
    // SAFETY: as above. This port is the upper half of the word, in network order.
    unsafe {
        let port = (&raw const (*ops).remote_port).read_volatile();
        let six = words((&raw const (*ops).remote_ip6).cast());
        let four = (&raw const (*ops).remote_ip4).read_volatile();
        let address = pick(ctx.family() != AF_INET6, four, six);
        Endpoint::from_wire(address, (port >> 16) as u16)
    }
}

#[inline(always)]
fn established(ctx: &SockOpsContext) {
    let Some(socket) = record(ctx) else { return };
    let took = balance::now().saturating_sub(socket.started_nanoseconds);
    socket.flags |= Socket::OPEN;
    count::outcome(socket, Outcome::Connected, &Counters { connect_nanoseconds: took, ..count::ATTEMPT });
    change_load(socket, 1);
}

#[inline(always)]
fn fin_acknowledged(ctx: &SockOpsContext) {
    if let Some(socket) = record(ctx) {
        // SAFETY: a readable field of a valid context.
        socket.received_at_fin = unsafe { (&raw const (*ctx.ops).bytes_received).read_volatile() };
    }
}

#[inline(always)]
fn closed(ctx: &SockOpsContext) {
    let Some(socket) = noted(ctx) else { return };
    if socket.flags & Socket::CALLER != 0 {
        socket.flags &= !Socket::CALLER;
        // Gone already: others were used more recently.
        let _gone = CALLERS.remove(&caller(ctx));
    }
    if socket.started_nanoseconds == 0 {
        return;
    }
    socket.started_nanoseconds = 0;
    if balance::reused(socket.backend, socket.incarnation) {
        // Its number is another's now, and so are the counters under it.
        socket.service = 0;
        socket.backend = 0;
    }
    if socket.flags & Socket::OPEN == 0 {
        count::outcome(socket, Outcome::Failed, &count::ATTEMPT);
        return;
    }
    socket.flags &= !Socket::OPEN;
    // SAFETY: readable fields of a valid context.
    let (sent, received, retransmits) = unsafe {
        let ops = ctx.ops;
        (
            (&raw const (*ops).bytes_acked).read_volatile(),
            (&raw const (*ops).bytes_received).read_volatile(),
            (&raw const (*ops).total_retrans).read_volatile(),
        )
    };
    let (fin_sent, fin_received) = fins(ctx.arg(0), received > socket.received_at_fin);
    let counted = Counters {
        attempts: 0,
        closed: 1,
        // The kernel counts SYN and FIN as a byte each.
        bytes_sent: sent.saturating_sub(1 + fin_sent),
        bytes_received: received.saturating_sub(fin_received),
        retransmits: u64::from(retransmits),
        connect_nanoseconds: 0,
    };
    count::outcome(socket, Outcome::Connected, &counted);
    change_load(socket, u64::MAX);
}

/// Whether our FIN was acknowledged and the peer's received, by the state before the end. From FIN_WAIT2 a connection ends
/// with the peer's FIN, or at once when nobody holds its socket any more.
#[inline(always)]
fn fins(before: u32, more_since_fin: bool) -> (u64, u64) {
    match before {
        TCP_FIN_WAIT2 => (1, u64::from(more_since_fin)),
        TCP_LAST_ACK | TCP_CLOSING => (1, 1),
        TCP_CLOSE_WAIT => (0, 1),
        _ => (0, 0),
    }
}

/// Adds to the load of the socket's backend, unless the slot has been given to another since.
#[inline(always)]
fn change_load(socket: &Socket, amount: u64) {
    if socket.service == 0 || balance::still(socket.service, socket.backend, socket.incarnation).is_none() {
        return;
    }
    if let Some(load) = LOADS.get_ptr_mut(socket.backend) {
        // SAFETY: an aligned map value. What it was does not matter.
        unsafe { atomic::add(&raw mut (*load).open, amount) };
    }
}
