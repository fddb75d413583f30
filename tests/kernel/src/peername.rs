//! `peername`: an application sees the address that it dialled.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::{Result, ensure};
use mesh_common::abi::{Algorithm, Protocol};

use crate::runner::Test;
use crate::sandbox::{Sandbox, key};
use crate::traffic::{HOST4, HOST6, Listeners, Responders, VIP4, VIP6, connect, through_ipv6, udp};

/// The tests of this hook.
pub const TESTS: &[Test] = &[
    Test { name: "peername::ipv4_clients_see_the_service", run: ipv4 },
    Test { name: "peername::ipv6_clients_see_the_service", run: ipv6 },
    Test { name: "peername::ipv4_through_ipv6_clients_see_the_service", run: mapped },
    Test { name: "peername::connected_udp_clients_see_the_service", run: datagram },
    Test { name: "peername::servers_see_the_client", run: server },
    Test { name: "peername::other_connections_show_their_peer", run: other },
    Test { name: "peername::a_socket_connected_again_elsewhere_shows_its_new_peer", run: again },
];

fn ipv4(sandbox: &mut Sandbox) -> Result<()> {
    shows_the_service(sandbox, HOST4, (VIP4, 80).into(), |address| address)
}

fn ipv6(sandbox: &mut Sandbox) -> Result<()> {
    shows_the_service(sandbox, HOST6, (VIP6, 80).into(), |address| address)
}

fn mapped(sandbox: &mut Sandbox) -> Result<()> {
    shows_the_service(sandbox, HOST4, (VIP4, 80).into(), through_ipv6)
}

fn shows_the_service(
    sandbox: &mut Sandbox,
    host: IpAddr,
    vip: SocketAddr,
    written: fn(SocketAddr) -> SocketAddr,
) -> Result<()> {
    sandbox.become_workload(1)?;
    let listeners = Listeners::at(host, 1)?;
    sandbox.service(1, key(vip, Protocol::Tcp), Algorithm::WeightedRandom, &listeners.addresses()?)?;
    let peer = connect(written(vip))?.peer_addr()?;
    ensure!(peer == written(vip), "the peer shows as {peer}");
    Ok(())
}

fn datagram(sandbox: &mut Sandbox) -> Result<()> {
    let responders = Responders::at(HOST4, 1)?;
    let vip = (VIP4, 53).into();
    sandbox.service(1, key(vip, Protocol::Udp), Algorithm::WeightedRandom, &responders.addresses()?)?;
    let client = udp(HOST4)?;
    client.connect(vip)?;
    ensure!(client.peer_addr()? == vip, "the peer shows as {}", client.peer_addr()?);
    Ok(())
}

fn server(sandbox: &mut Sandbox) -> Result<()> {
    sandbox.become_workload(1)?;
    let listeners = Listeners::at(HOST4, 1)?;
    let vip = (VIP4, 80).into();
    sandbox.service(1, key(vip, Protocol::Tcp), Algorithm::WeightedRandom, &listeners.addresses()?)?;
    let client = connect(vip)?;
    let (_, accepted) = listeners.accept()?;
    ensure!(accepted.peer_addr()? == client.local_addr()?, "the client shows as {}", accepted.peer_addr()?);
    Ok(())
}

fn other(sandbox: &mut Sandbox) -> Result<()> {
    sandbox.become_workload(1)?;
    let listeners = Listeners::at(HOST4, 1)?;
    let address = listeners.addresses()?[0];
    let client = connect(address)?;
    ensure!(client.peer_addr()? == address, "the peer shows as {}", client.peer_addr()?);
    Ok(())
}

fn again(sandbox: &mut Sandbox) -> Result<()> {
    let responders = Responders::at(HOST4, 2)?;
    let backends = responders.addresses()?;
    let vip: SocketAddr = (VIP4, 53).into();
    sandbox.service(1, key(vip, Protocol::Udp), Algorithm::WeightedRandom, &backends[..1])?;
    let client: UdpSocket = udp(HOST4)?;
    client.connect(vip)?;
    client.connect(backends[1])?;
    ensure!(client.peer_addr()? == backends[1], "the peer shows as {}", client.peer_addr()?);
    Ok(())
}
