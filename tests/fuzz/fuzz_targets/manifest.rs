//! Manifests, which people write.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match mesh_control::manifest::parse(text) {
        Ok(parsed) => assert_eq!(parsed.is_empty(), parsed.len() == 0),
        // What is refused says why.
        Err(faults) => assert!(faults.iter().all(|fault| !fault.reason.is_empty()) && !faults.is_empty()),
    }
});
