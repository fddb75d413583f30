//! HBONE: TCP streams as HTTP/2 CONNECT on mutual TLS, as Istio's ztunnel and waypoints speak it.

mod client;
mod headers;
mod relay;
mod server;
mod unread;

pub use client::{Connection, OpenError, Slot};
pub use headers::{Asked, BadRequest, asked};
pub use relay::relay;
pub use server::{Incoming, Server};
pub use unread::Unread;

#[cfg(test)]
mod tests;
