//! What is said before a handshake is done, by strangers and by those on the way.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::proxy::tls::fuzzing::Ends;

thread_local! {
    static ENDS: Ends = Ends::default();
}

fuzz_target!(|bytes: &[u8]| {
    ENDS.with(|ends| ends.shake(bytes));
});
