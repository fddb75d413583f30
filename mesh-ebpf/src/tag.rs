//! `cgroup/sock_create`: notes in a new socket whose it is, so that every later hook needs one lookup.

use aya_ebpf::{EbpfContext as _, macros::cgroup_sock, programs::SockContext};
use mesh_common::abi::Reason;

use crate::{count, socket};

/// Entry point.
#[cgroup_sock(sock_create)]
pub fn tag(ctx: SockContext) -> i32 {
    verdict(try_tag(&ctx))
}

fn try_tag(ctx: &SockContext) -> Result<(), Reason> {
    let workload = socket::current_workload().ok_or(Reason::NotWorkload)?;
    socket::create(ctx.as_ptr(), workload)
}

/// A socket is never refused: `connect` asks again where the tag is missing.
#[inline(always)]
fn verdict(outcome: Result<(), Reason>) -> i32 {
    match outcome {
        Ok(()) => 1,
        Err(reason) => {
            count::reason(reason);
            1
        }
    }
}
