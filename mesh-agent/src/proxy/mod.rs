//! The node proxy: carries the connections of this node's workloads to other nodes under mutual TLS.

pub mod relay;
pub mod stream;
pub mod tls;
