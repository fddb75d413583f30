//! The address that a `sock_addr` hook shows, and how to change it.
//!
//! Fields of the context are read and written one word at a time and volatile: the verifier refuses a context pointer that
//! the compiler has moved or merged accesses to.

use aya_ebpf::programs::SockAddrContext;
use mesh_common::abi::{Address, Endpoint};

/// Which half of the context holds the address: that of the hook, not that of the socket (an AF_INET6 socket that sends to
/// a mapped IPv4 address comes by the hook for IPv4).
#[derive(Clone, Copy)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    /// The address and port in the context.
    #[inline(always)]
    pub(crate) fn read(self, ctx: &SockAddrContext) -> Endpoint {
        let sa = ctx.sock_addr;
        // SAFETY: the kernel gives a valid context, and these are its readable fields.
        unsafe {
            let port = (&raw const (*sa).user_port).read_volatile();
            let address = match self {
                Self::V4 => Address::from_v4_word((&raw const (*sa).user_ip4).read_volatile()),
                Self::V6 => Address::from_words([
                    (&raw const (*sa).user_ip6[0]).read_volatile(),
                    (&raw const (*sa).user_ip6[1]).read_volatile(),
                    (&raw const (*sa).user_ip6[2]).read_volatile(),
                    (&raw const (*sa).user_ip6[3]).read_volatile(),
                ]),
            };
            Endpoint::from_wire(address, port as u16)
        }
    }

    /// Changes the address and port in the context. For IPv4 the endpoint must be a mapped address.
    #[inline(always)]
    pub(crate) fn write(self, ctx: &SockAddrContext, to: &Endpoint) {
        let sa = ctx.sock_addr;
        let words = to.address().words();
        // SAFETY: the kernel gives a valid context, and these are its writable fields.
        unsafe {
            match self {
                Self::V4 => (&raw mut (*sa).user_ip4).write_volatile(words[3]),
                Self::V6 => {
                    (&raw mut (*sa).user_ip6[0]).write_volatile(words[0]);
                    (&raw mut (*sa).user_ip6[1]).write_volatile(words[1]);
                    (&raw mut (*sa).user_ip6[2]).write_volatile(words[2]);
                    (&raw mut (*sa).user_ip6[3]).write_volatile(words[3]);
                }
            }
            (&raw mut (*sa).user_port).write_volatile(u32::from(to.wire_port()));
        }
    }
}

/// The address of four words of a context.
///
/// # Safety
///
/// Four readable words of a valid context.
#[inline(always)]
pub(crate) unsafe fn words(at: *const u32) -> Address {
    // SAFETY: the caller's promise. One word at a time, as the verifier wants it.
    unsafe {
        Address::from_words([
            at.read_volatile(),
            at.add(1).read_volatile(),
            at.add(2).read_volatile(),
            at.add(3).read_volatile(),
        ])
    }
}

/// The address of either family. Both are read before: the compiler would merge reads that exclude each other into one of a context pointer
/// that it has moved.
#[inline(always)]
pub(crate) fn pick(v4: bool, four: u32, six: Address) -> Address {
    if v4 { Address::from_v4_word(four) } else { six }
}
