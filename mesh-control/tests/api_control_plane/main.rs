//! The control plane in process: manifests are written into a directory, and what a delta ADS subscriber receives over
//! real gRPC is asserted.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod balancing;
mod certificates;
mod changes;
mod client;
mod connections;
mod files;
mod joining;
mod management;
mod manifests;
mod policies;
mod refusals;
mod rotation;
mod streams;
mod subscriber;
mod sync;
mod world;
