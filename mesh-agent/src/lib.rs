//! The per-node agent: loads the kernel programs and keeps their maps equal to the control plane's view.

pub mod admin;
pub mod app;
pub mod config;
pub mod datapath;
pub mod identity;
pub mod metrics;
pub mod pods;
pub mod policy;
pub mod preflight;
pub mod proxy;
pub mod snapshot;
pub mod sockets;
pub mod workloads;
pub mod xds;

#[cfg(test)]
mod fixtures;
