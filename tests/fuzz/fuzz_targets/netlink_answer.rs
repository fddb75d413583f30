//! Lists of sockets: the kernel's answers are read in every pod, so a reader that trusts lengths would be everywhere.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::sockets::message::read;

/// A header and a socket.
const SMALLEST: usize = 16 + 72;

fuzz_target!(|bytes: &[u8]| {
    let mut sockets = Vec::new();
    // The first request has number 1.
    drop(read(bytes, 1, &mut sockets).map_err(|error| error.to_string()));
    assert!(sockets.len() <= bytes.len() / SMALLEST);
});
