//! `cgroup/getpeername4` and `getpeername6`: an application sees the address that it dialled, or the client whose connection the node
//! proxy handed it: in `accept()` too.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use mesh_common::abi::ClientKey;

use crate::{address::Family, balance, maps::CLIENTS, socket};

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

/// Shows what was dialled, if the peer is where that led, or who really calls. The call itself always succeeds.
#[inline(always)]
fn show(ctx: &SockAddrContext, family: Family) -> i32 {
    let peer = family.read(ctx);
    match socket::of(ctx) {
        Some(socket) if socket.dialled.is_some() => {
            if socket.chosen.same(&peer) {
                family.write(ctx, &socket.dialled);
            }
        }
        Some(_) | None => {
            let key = ClientKey { netns: balance::client(ctx), source: peer, zero: 0 };
            // SAFETY: written once, before the connection is made, and removed after its end.
            if let Some(client) = unsafe { CLIENTS.get(&key) } {
                family.write(ctx, client);
            }
        }
    }
    1
}
