//! Answers of a certificate authority, and names of identities.
#![no_main]

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use libfuzzer_sys::fuzz_target;
use mesh_agent::identity::request::Request;
use mesh_agent::identity::{SpiffeId, answer};

fuzz_target!(|bytes: &[u8]| {
    static REQUEST: OnceLock<Option<Request>> = OnceLock::new();
    let request = REQUEST.get_or_init(|| Request::new("spiffe://td/ns/a/sa/b").ok());
    let (Some(request), Ok(text)) = (request, std::str::from_utf8(bytes)) else { return };
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(SpiffeId::new(id.trust_domain(), id.namespace(), id.service_account()), Ok(id));
    }
    // The elements of the chain are separated by a NUL. None can be for a key that was made a moment ago.
    let chain: Vec<String> = text.split('\0').map(str::to_owned).collect();
    let checked = answer::check(&chain, Arc::clone(&request.key), None, SystemTime::now());
    assert!(checked.is_err());
});
