//! Heads of CONNECT requests, as other implementations' proxies, or pods that pretend to be one, write them.
#![no_main]

use http::{Method, Request, Version};
use libfuzzer_sys::fuzz_target;
use mesh_agent::proxy::hbone::asked;

fuzz_target!(|input: (bool, &[u8], Vec<(u8, &[u8])>)| {
    let (connect, authority, headers) = input;
    let mut request = Request::builder()
        .method(if connect { Method::CONNECT } else { Method::GET })
        .version(Version::HTTP_2)
        .uri(authority);
    for (name, value) in headers {
        let name = ["forwarded", "baggage", "traceparent", "x-forwarded-for"][usize::from(name % 4)];
        request = request.header(name, value);
    }
    // HTTP/2 itself refuses the others.
    let Ok(request) = request.body(()) else { return };
    let Ok(asked) = asked(&request) else { return };
    assert!(connect, "only CONNECT makes a stream");
    assert!(asked.host.is_none_or(|host| (1..=253).contains(&host.len())));
    assert!(asked.traceparent.is_none_or(|trace| trace.len() == 55));
});
