//! The node proxy: carries the connections of this node's workloads to other nodes under mutual TLS.
//!
//! An application's connection ([`outbound`]) is put on a tunnel to the workload's node ([`pool`], [`tunnel`], [`hbone`]), where it
//! becomes a connection to the application ([`inbound`]). What the kernel, the mesh and policy know comes through [`host`].

pub mod busy_poll;
pub mod congestion;
pub mod drain;
pub mod hbone;
pub mod host;
pub mod inbound;
pub mod limits;
pub mod netns;
pub mod outbound;
pub mod pool;
pub mod relay;
pub mod stream;
pub mod threads;
pub mod tls;
pub mod tunnel;

mod accept;
pub(crate) mod early;
mod sources;

#[cfg(test)]
mod tests;
