//! Our own protocol between two node proxies: one stream at a time on a TLS connection. `docs/stream-protocol.md` has it byte
//! by byte; here are its messages and its order. Pure.

mod message;
mod order;
mod request;

pub use message::{DATA, MAX_DATA, Malformed, Message, Reason};
pub use order::{Direction, Order, OutOfOrder};
pub use request::Request;

#[cfg(test)]
mod tests;
