//! `cgroup/getpeername4` and `getpeername6`: an application sees the address that it dialled.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{address::Family, socket};

/// Entry point for AF_INET sockets.
#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    show(&ctx, Family::V4)
}

/// Entry point for AF_INET6 sockets.
#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    show(&ctx, Family::V6)
}

/// Shows what was dialled, if the peer is where that led. The call itself always succeeds.
#[inline(always)]
fn show(ctx: &SockAddrContext, family: Family) -> i32 {
    if let Some(socket) = socket::of(ctx)
        && socket.dialled.is_some()
        && socket.chosen.same(&family.read(ctx))
    {
        family.write(ctx, &socket.dialled);
    }
    1
}
