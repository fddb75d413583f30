//! What agents subscribe to and answer, while what is served changes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_control::fuzzing;

fuzz_target!(|bytes: &[u8]| {
    fuzzing::agent_requests(bytes);
});
