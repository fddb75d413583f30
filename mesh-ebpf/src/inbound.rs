//! `sk_lookup` in the network namespace of a pod: who may connect to it.
//!
//! Runs for what belongs to no established connection, so packets of established ones pay nothing. Without TLS; what comes through
//! a tunnel is judged by the node proxy, which hands it over from the pod's own address. Where policies need more than is seen here, who is
//! let in is led to the proxy, too, whose listener takes it at the address and port that were dialled.

use aya_ebpf::{
    bindings::{BPF_ANY, bpf_sk_lookup, sk_action::SK_DROP, sk_action::SK_PASS},
    macros::sk_lookup,
    programs::SkLookupContext,
};
use mesh_common::abi::{
    Caller, CallerKey, Denial, Endpoint, ListenerKey, Node, Peer, Protocol, Proxy, Reason,
};

use crate::{
    address::{pick, words},
    balance, count,
    maps::{CALLERS, LISTENERS, STEERED},
    policy,
};

/// The loopback device has this number in every namespace.
const LOOPBACK: u32 = 1;
const AF_INET: u32 = 2;

/// Entry point.
#[sk_lookup]
pub fn inbound(ctx: SkLookupContext) -> u32 {
    verdict(judge(&ctx))
}

/// What becomes of the packet.
enum Action {
    /// As without the mesh.
    Passed,
    /// Let in by policy.
    Admitted,
    /// Led to the node proxy.
    Steered,
    /// Refused: the client gets a reset.
    Refused(Reason),
}

#[inline(always)]
fn judge(ctx: &SkLookupContext) -> Action {
    let lookup = ctx.lookup;
    // SAFETY: readable fields of a valid context, here and below.
    let (protocol, device, port) = unsafe {
        (
            (&raw const (*lookup).protocol).read_volatile(),
            (&raw const (*lookup).ingress_ifindex).read_volatile(),
            (&raw const (*lookup).local_port).read_volatile() as u16,
        )
    };
    if protocol != Protocol::Tcp as u32 || device == LOOPBACK || port == Proxy::TUNNEL {
        return Action::Passed;
    }
    let (source, destination) = ends(lookup, port);
    // From the pod to itself: the kernel tells the device of the address, not the one of loopback. Nobody else can complete a handshake
    // under the pod's own address, and packets from outside that bear it are dropped as martians.
    if source.address().same(destination.address()) {
        return Action::Passed;
    }
    if port == Proxy::OUTBOUND || port == Proxy::PLAIN {
        return Action::Refused(Reason::InboundReserved);
    }
    let Some(peer) = policy::peer(&destination.address()) else {
        let guarded = policy::node().is_some_and(|node| node.flags & Node::GUARDED != 0);
        return if guarded { Action::Refused(Reason::InboundReserved) } else { Action::Passed };
    };
    if peer.policies == 0 && !peer.is_rehearsed() && !peer.is_steered() {
        return Action::Passed;
    }
    // SAFETY: eight aligned bytes that are read at once.
    let ends = CallerKey { source, destination };
    let caller = unsafe { CALLERS.get(&ends) };
    let (workload, verdict) = match caller.filter(|caller| caller.is_fresh(balance::now())) {
        // The node itself: a kubelet's probe.
        Some(caller) if caller.workload == 0 => return admitted(peer),
        Some(caller) if caller.workload != Caller::STRANGER => {
            (caller.workload, policy::of_workload(caller.workload, peer, &destination))
        }
        Some(_) | None => (0, policy::of_address(source.address(), peer, port)),
    };
    let refused = peer.policies != 0 && !verdict.allows();
    let told = Denial {
        source_workload: workload,
        destination_workload: peer.workload,
        source,
        destination,
        policies: peer.policies,
        verdict,
        side: if refused { Denial::SERVER } else { Denial::ADMITTED },
    };
    if refused {
        policy::tell(&told);
        return Action::Refused(if verdict.is_missing() {
            Reason::InboundNoVerdict
        } else {
            Reason::InboundDenied
        });
    }
    if peer.is_steered() {
        // The proxy asks again, policies in dry run as well.
        return steer(ctx, &ends, workload, peer);
    }
    if peer.is_rehearsed() {
        policy::rehearse(&told);
    }
    admitted(peer)
}

/// To the workload's proxy, which is told who calls: what is known here may have gone when it asks. It takes nothing away from who is refused
/// already, and without it nobody could say what the policies mean: then nobody comes in.
#[inline(always)]
fn steer(ctx: &SkLookupContext, ends: &CallerKey, caller: u64, peer: &Peer) -> Action {
    let alive = policy::node().is_some_and(|node| node.alive_until_nanoseconds > balance::now());
    if !alive {
        return Action::Refused(Reason::InboundNoProxy);
    }
    if STEERED.insert(ends, &caller, u64::from(BPF_ANY)).is_err() {
        return Action::Refused(Reason::OriginalLost);
    }
    let listener = ListenerKey { workload: peer.workload, address: ends.destination.address() };
    match LISTENERS.redirect_sk_lookup(ctx, &listener, 0) {
        Ok(()) => Action::Steered,
        Err(_) => {
            let _gone = STEERED.remove(ends);
            Action::Refused(Reason::InboundNoProxy)
        }
    }
}

/// Let in, whether policy has a say in it or not.
#[inline(always)]
fn admitted(peer: &Peer) -> Action {
    if peer.policies == 0 { Action::Passed } else { Action::Admitted }
}

/// The client's end and the server's.
#[inline(always)]
fn ends(lookup: *mut bpf_sk_lookup, port: u16) -> (Endpoint, Endpoint) {
    // SAFETY: readable fields of a valid context. Those of the other family read as zero.
    unsafe {
        let remote_port = (&raw const (*lookup).remote_port).read_volatile();
        let v4 = (&raw const (*lookup).family).read_volatile() == AF_INET;
        let source = pick(
            v4,
            (&raw const (*lookup).remote_ip4).read_volatile(),
            words((&raw const (*lookup).remote_ip6).cast()),
        );
        let destination = pick(
            v4,
            (&raw const (*lookup).local_ip4).read_volatile(),
            words((&raw const (*lookup).local_ip6).cast()),
        );
        (Endpoint::from_wire(source, remote_port), Endpoint::new(destination, port))
    }
}

#[inline(always)]
fn verdict(action: Action) -> u32 {
    match action {
        Action::Passed => SK_PASS,
        Action::Admitted => {
            count::reason(Reason::InboundAdmitted);
            SK_PASS
        }
        Action::Steered => {
            count::reason(Reason::InboundSteered);
            SK_PASS
        }
        Action::Refused(reason) => {
            count::reason(reason);
            SK_DROP
        }
    }
}
