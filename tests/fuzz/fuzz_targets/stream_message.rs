//! Messages between two node proxies, and the order in which they may come.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::proxy::stream::{Message, Order};

fuzz_target!(|input: (Vec<Vec<u8>>, bool)| {
    let (records, server) = input;
    let mut order = if server { Order::Idle } else { Order::Asked };
    for record in &records {
        let Ok(message) = Message::decode(record) else { return };
        // What is understood can be said again, and means the same.
        assert_eq!(Message::decode(&message.encode()).as_ref(), Ok(&message));
        let next = if server { order.server_received(&message) } else { order.client_received(&message) };
        let Ok(next) = next else { return };
        assert!(order != Order::Over, "{message:?} after the end");
        // The server accepts whatever it is asked.
        order = if server && next == Order::Asked { next.accepted() } else { next };
    }
});
