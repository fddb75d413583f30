//! Records of a peer that has finished its handshake, sealed with its keys and not.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::proxy::tls::fuzzing::Ends;

thread_local! {
    static ENDS: Ends = Ends::default();
}

fuzz_target!(|bytes: &[u8]| {
    ENDS.with(|ends| ends.listen(bytes));
});
