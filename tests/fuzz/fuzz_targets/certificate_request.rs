//! Certificate requests, which any agent may send.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_control::fuzzing;

fuzz_target!(|bytes: &[u8]| {
    fuzzing::certificate_request(bytes);
});
