//! The kernel programs of the mesh: one file per hook, read in the order in which a connection meets them.
//!
//! Each hook turns a `Result` into the kernel's verdict in one exhaustive match, so that a new outcome cannot compile
//! without an answer. Shared steps are in `address`, `atomic`, `balance`, `count`, `maps`, `policy`, `refuse` and `socket`; the decisions
//! among them that need no kernel are in `mesh_common::abi`, tested on the host.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "see `atomic`")]

mod address;
mod atomic;
mod balance;
mod count;
mod maps;
mod policy;
mod refuse;
mod socket;

mod tag;

mod connect;

mod datagram;

mod peername;

mod connection;

mod inbound;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // The verifier proves that no program comes here.
    loop {}
}

/// The kernel gives the helpers that these programs need to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
