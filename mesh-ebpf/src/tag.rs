//! `cgroup/sock_create`: notes in a new UDP socket whose it is, since `sendmsg` meets each of its datagrams.
//!
//! A TCP socket connects once, and `connect` notes it then. Records made here would be for listeners and for connections to
//! no service, too, and the kernel would copy a listener's to each connection that it accepts.

use aya_ebpf::{EbpfContext as _, macros::cgroup_sock, programs::SockContext};
use mesh_common::abi::{Protocol, Reason};

use crate::{count, socket};

/// Entry point.
#[cgroup_sock(sock_create)]
pub fn tag(ctx: SockContext) -> i32 {
    verdict(try_tag(&ctx))
}

/// What was done.
enum Action {
    /// The socket has a record.
    Noted,
    /// Not here.
    Later,
    /// It could not have one.
    Missed(Reason),
}

#[inline(always)]
fn try_tag(ctx: &SockContext) -> Action {
    // SAFETY: a readable field of a valid context.
    if unsafe { (&raw const (*ctx.sock).protocol).read_volatile() } != Protocol::Udp as u32 {
        return Action::Later;
    }
    match socket::current_workload() {
        None => Action::Missed(Reason::NotWorkload),
        Some(workload) if socket::create(ctx.as_ptr(), workload) => Action::Noted,
        Some(_) => Action::Missed(Reason::NoSocketStorage),
    }
}

/// A socket is never refused: `sendmsg` asks again where the record is missing.
#[inline(always)]
fn verdict(action: Action) -> i32 {
    match action {
        Action::Noted | Action::Later => 1,
        Action::Missed(reason) => {
            count::reason(reason);
            1
        }
    }
}
