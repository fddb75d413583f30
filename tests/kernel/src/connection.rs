//! `connection`: connections are followed from their start to their end.

use std::net::{SocketAddr, TcpListener};

use anyhow::{Result, ensure};
use mesh_common::abi::{Algorithm, CounterKey, Counters, Outcome, Protocol, Reason};
use socket2::{Domain, Socket, Type};

use crate::runner::{Test, until};
use crate::sandbox::{Sandbox, backend_number, key};
use crate::traffic::{HOST4, HOST6, Listeners, VIP4, VIP6, connect, exchange, refused};

/// The tests of this hook.
pub const TESTS: &[Test] = &[
    Test { name: "connection::open_connections_are_counted_until_they_close", run: open },
    Test { name: "connection::bytes_are_exact_when_the_client_closes_first", run: client_first },
    Test { name: "connection::bytes_are_exact_when_the_server_closes_first", run: server_first },
    Test { name: "connection::bytes_are_exact_over_ipv6", run: ipv6 },
    Test { name: "connection::a_connection_that_fails_is_counted_as_failed", run: failed },
    Test { name: "connection::the_close_after_a_slot_was_freed_is_still_counted", run: freed },
    Test { name: "connection::the_load_of_a_reused_slot_is_left_alone", run: reused },
    Test { name: "connection::connections_to_no_service_are_left_alone", run: direct },
    Test { name: "connection::a_socket_connected_again_elsewhere_is_followed_anew", run: again },
];

fn open(sandbox: &mut Sandbox) -> Result<()> {
    let listeners = service(sandbox)?;
    let mut held = Vec::new();
    for expected in 1..=5 {
        held.push((connect((VIP4, 80).into())?, listeners.accept()?));
        ensure!(sandbox.open(1, 0)? == expected, "{} open instead of {expected}", sandbox.open(1, 0)?);
    }
    let counters = sandbox.counters(&connected(0)?)?;
    ensure!(counters.attempts == 5 && counters.closed == 0, "counted {counters:?}");
    ensure!(counters.connect_nanoseconds > 0, "the time to connect is not counted");
    drop(held);
    until("all closed", || Ok(sandbox.open(1, 0)? == 0 && sandbox.counters(&connected(0)?)?.closed == 5))
}

fn client_first(sandbox: &mut Sandbox) -> Result<()> {
    let listeners = service(sandbox)?;
    let mut client = connect((VIP4, 80).into())?;
    let (_, mut server) = listeners.accept()?;
    exchange(&mut client, &mut server, 70_000, 30_000)?;
    drop(client);
    drop(server);
    expect_bytes(sandbox, 70_000, 30_000)
}

fn server_first(sandbox: &mut Sandbox) -> Result<()> {
    let listeners = service(sandbox)?;
    let mut client = connect((VIP4, 80).into())?;
    let (_, mut server) = listeners.accept()?;
    exchange(&mut client, &mut server, 1, 70_000)?;
    drop(server);
    // The end of the stream has arrived before the client closes.
    let mut rest = [0; 1];
    ensure!(std::io::Read::read(&mut client, &mut rest)? == 0, "more came than was sent");
    drop(client);
    expect_bytes(sandbox, 1, 70_000)
}

fn ipv6(sandbox: &mut Sandbox) -> Result<()> {
    sandbox.become_workload(4)?;
    let listeners = Listeners::at(HOST6, 1)?;
    let vip = (VIP6, 80).into();
    sandbox.service(1, key(vip, Protocol::Tcp), Algorithm::WeightedRandom, &listeners.addresses()?)?;
    let mut client = connect(vip)?;
    let (_, mut server) = listeners.accept()?;
    exchange(&mut client, &mut server, 12_345, 54_321)?;
    drop(client);
    drop(server);
    expect_bytes(sandbox, 12_345, 54_321)
}

fn expect_bytes(sandbox: &Sandbox, sent: u64, received: u64) -> Result<()> {
    let key = connected(0)?;
    until("closed", || Ok(sandbox.counters(&key)?.closed == 1))?;
    let Counters { bytes_sent, bytes_received, .. } = sandbox.counters(&key)?;
    ensure!(
        (bytes_sent, bytes_received) == (sent, received),
        "sent {sent} and received {received}, counted {bytes_sent} and {bytes_received}"
    );
    Ok(())
}

fn failed(sandbox: &mut Sandbox) -> Result<()> {
    let listeners = service(sandbox)?;
    drop(listeners);
    refused(std::net::TcpStream::connect((VIP4, 80)))?;
    let key = CounterKey { outcome: Outcome::Failed as u32, ..connected(0)? };
    until("counted", || Ok(sandbox.counters(&key)?.attempts == 1))?;
    ensure!(sandbox.counters(&connected(0)?)?.attempts == 0, "it is counted as established, too");
    ensure!(sandbox.open(1, 0)? == 0, "it is counted as open");
    Ok(())
}

fn freed(sandbox: &mut Sandbox) -> Result<()> {
    let listeners = service(sandbox)?;
    let held = (connect((VIP4, 80).into())?, listeners.accept()?);
    sandbox.free_backend(1, 0)?;
    sandbox.set_open(1, 0, 0)?;
    drop(held);
    until("closed", || Ok(sandbox.counters(&connected(0)?)?.closed == 1))?;
    ensure!(sandbox.open(1, 0)? == 0, "the free slot's load was changed to {}", sandbox.open(1, 0)?);
    Ok(())
}

fn reused(sandbox: &mut Sandbox) -> Result<()> {
    let listeners = service(sandbox)?;
    let held = (connect((VIP4, 80).into())?, listeners.accept()?);
    // As if the agent had given the slot to another endpoint, whose connections are counted from 0.
    sandbox.change_backend(1, 0, |slot| slot.incarnation += 1)?;
    sandbox.set_open(1, 0, 0)?;
    drop(held);
    let other = CounterKey { service: 0, backend: 0, ..connected(0)? };
    until("closed", || Ok(sandbox.counters(&other)?.closed == 1))?;
    ensure!(sandbox.counters(&connected(0)?)?.closed == 0, "it is counted to the slot's new backend");
    ensure!(sandbox.open(1, 0)? == 0, "the slot's new load was changed to {}", sandbox.open(1, 0)?);
    Ok(())
}

fn direct(sandbox: &mut Sandbox) -> Result<()> {
    sandbox.become_workload(4)?;
    let listeners = Listeners::at(HOST4, 1)?;
    let before = sandbox.reason(Reason::NotService)?;
    let mut client = connect(listeners.addresses()?[0])?;
    let (_, mut server) = listeners.accept()?;
    exchange(&mut client, &mut server, 10, 20)?;
    drop(client);
    drop(server);
    let key = CounterKey { source: 4, outcome: Outcome::Connected as u32, ..CounterKey::default() };
    ensure!(sandbox.counters(&key)? == Counters::default(), "counted {:?}", sandbox.counters(&key)?);
    ensure!(sandbox.reason(Reason::NotService)? == before + 1, "the reason was not counted");
    Ok(())
}

fn again(sandbox: &mut Sandbox) -> Result<()> {
    let listeners = service(sandbox)?;
    let backend = listeners.addresses()?[0];
    drop(listeners);
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    ensure!(
        socket.connect(&SocketAddr::from((VIP4, 80)).into()).is_err(),
        "nobody listens, yet it connected"
    );
    let listener = TcpListener::bind(backend)?;
    socket.connect(&backend.into())?;
    ensure!(socket.peer_addr()?.as_socket() == Some(backend), "the service that it had called is shown");
    drop(listener.accept()?);
    drop(socket);
    let counters = sandbox.counters(&connected(0)?)?;
    ensure!(counters == Counters::default(), "counted to the service: {counters:?}");
    Ok(())
}

/// A workload with a service of one backend.
fn service(sandbox: &mut Sandbox) -> Result<Listeners> {
    sandbox.become_workload(4)?;
    let listeners = Listeners::at(HOST4, 1)?;
    let key = key((VIP4, 80).into(), Protocol::Tcp);
    sandbox.service(1, key, Algorithm::WeightedRandom, &listeners.addresses()?)?;
    Ok(listeners)
}

fn connected(index: usize) -> Result<CounterKey> {
    let backend = backend_number(1, index)?;
    Ok(CounterKey { source: 4, service: 1, backend, outcome: Outcome::Connected as u32, zero: 0 })
}
