//! Keys and endpoints in the form that people read.

use mesh_common::abi::{Endpoint, Protocol, ServiceKey};

/// `ADDRESS:PORT/PROTOCOL`.
pub fn show(key: &ServiceKey) -> String {
    let protocol = match key.protocol() {
        Some(Protocol::Tcp) => "TCP",
        Some(Protocol::Udp) => "UDP",
        None => "?",
    };
    format!("{}/{protocol}", show_endpoint(&key.endpoint()))
}

/// `ADDRESS:PORT`.
pub fn show_endpoint(endpoint: &Endpoint) -> String {
    std::net::SocketAddr::new(unmap(endpoint), endpoint.port()).to_string()
}

/// As the standard library has it.
pub fn unmap(endpoint: &Endpoint) -> std::net::IpAddr {
    match endpoint.address().to_v4() {
        Some(octets) => octets.into(),
        None => endpoint.address().bytes().into(),
    }
}
