//! Files of revocation lists, in PEM and in DER.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::proxy::tls::fuzzing::revocations;

fuzz_target!(|bytes: &[u8]| revocations(bytes));
