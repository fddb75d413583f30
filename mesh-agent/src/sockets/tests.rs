use std::net::{IpAddr, SocketAddr};

use super::*;

mod kernel;
mod mutation;
mod rules;

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
