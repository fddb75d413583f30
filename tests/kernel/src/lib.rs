//! Each hook's kernel test: real sockets, real traffic, on whichever kernel this runs on.
//!
//! A test has a network namespace with nothing but a loopback interface (`link` joins it with another one), and a cgroup with the
//! mesh's programs attached to it. It needs no other program, so that it can be the only process of a virtual machine. One file per hook;
//! `loader` tests how the agent puts programs and maps in place, with maps that the agent itself fills.

pub mod cgroup;
pub mod connect;
pub mod connection;
pub mod datagram;
pub mod inbound;
pub mod link;
pub mod loader;
pub mod namespace;
pub mod peername;
pub mod programs;
pub mod proxied;
pub mod runner;
pub mod sandbox;
pub mod tag;
pub mod traffic;

use runner::Test;

/// Every test, in the order in which a connection meets the hooks.
pub fn all() -> Vec<Test> {
    [
        tag::TESTS,
        connect::TESTS,
        proxied::TESTS,
        datagram::TESTS,
        peername::TESTS,
        connection::TESTS,
        inbound::TESTS,
    ]
    .concat()
}
