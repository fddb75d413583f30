//! HBONE: TCP streams as HTTP/2 CONNECT on mutual TLS, as Istio's ztunnel and waypoints speak it.

mod client;
mod headers;
mod relay;
mod server;

pub use client::{Connection, OpenError, Slot};
pub use headers::{Asked, BadRequest, asked};
pub use relay::relay;
pub use server::{Incoming, Server};

#[cfg(test)]
mod tests;
