//! `sendmsg4,6` and `recvmsg4,6`: UDP sockets that are not connected.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use mesh_common::abi::{Algorithm, CounterKey, Outcome, Protocol, Reason};

use crate::runner::Test;
use crate::sandbox::{Sandbox, backend_number, key};
use crate::traffic::{HOST4, HOST6, Responders, VIP4, VIP6, refused, through_ipv6, udp};

const ANY4: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
const ANY6: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// The tests of this hook.
pub const TESTS: &[Test] = &[
    Test { name: "datagram::ipv4_answers_come_from_the_service", run: ipv4 },
    Test { name: "datagram::ipv6_answers_come_from_the_service", run: ipv6 },
    Test { name: "datagram::ipv4_through_ipv6_answers_come_from_the_service", run: mapped },
    Test { name: "datagram::a_flow_keeps_its_backend", run: keeps },
    Test { name: "datagram::a_flow_moves_when_its_backend_goes", run: moves },
    Test { name: "datagram::one_socket_talks_to_many_services", run: many },
    Test { name: "datagram::a_late_answer_of_the_old_backend_comes_from_the_service", run: late },
    Test { name: "datagram::a_service_without_backends_refuses_at_once", run: no_backends },
    Test { name: "datagram::unknown_destinations_pass", run: passes },
    Test { name: "datagram::flows_are_counted", run: counted },
];

fn ipv4(sandbox: &mut Sandbox) -> Result<()> {
    answers(sandbox, HOST4, ANY4, (VIP4, 53).into(), |address| address)
}

fn ipv6(sandbox: &mut Sandbox) -> Result<()> {
    answers(sandbox, HOST6, ANY6, (VIP6, 53).into(), |address| address)
}

fn mapped(sandbox: &mut Sandbox) -> Result<()> {
    answers(sandbox, HOST4, ANY6, (VIP4, 53).into(), through_ipv6)
}

fn answers(
    sandbox: &mut Sandbox,
    server: IpAddr,
    client: IpAddr,
    vip: SocketAddr,
    written: fn(SocketAddr) -> SocketAddr,
) -> Result<()> {
    sandbox.become_workload(3)?;
    let responders = Responders::at(server, 1)?;
    sandbox.service(1, key(vip, Protocol::Udp), Algorithm::WeightedRandom, &responders.addresses()?)?;
    let client = udp(client)?;
    for _ in 0..3 {
        let (_, from) = responders.ask(&client, written(vip))?;
        ensure!(from == written(vip), "the answer came from {from}");
    }
    Ok(())
}

fn keeps(sandbox: &mut Sandbox) -> Result<()> {
    let (responders, vip) = four(sandbox, 1)?;
    let mut first = [0; 4];
    for _ in 0..8 {
        let client = udp(ANY4)?;
        let (chosen, _) = responders.ask(&client, vip)?;
        first[chosen] += 1;
        for _ in 0..5 {
            let (index, from) = responders.ask(&client, vip)?;
            ensure!(index == chosen, "backend {chosen} was left for {index}");
            ensure!(from == vip, "the answer came from {from}");
        }
    }
    ensure!(first == [2; 4], "flows were spread {first:?}");
    Ok(())
}

fn moves(sandbox: &mut Sandbox) -> Result<()> {
    let (responders, vip) = four(sandbox, 1)?;
    let client = udp(ANY4)?;
    let (gone, _) = responders.ask(&client, vip)?;
    without(sandbox, &responders, vip, gone)?;
    let (chosen, from) = responders.ask(&client, vip)?;
    ensure!(chosen != gone && from == vip, "went to {chosen} of {gone}, answered from {from}");
    ensure!(sandbox.reason(Reason::FlowMoved)? == 1, "the reason is not counted");
    let (again, _) = responders.ask(&client, vip)?;
    ensure!(again == chosen, "moved twice");
    Ok(())
}

fn many(sandbox: &mut Sandbox) -> Result<()> {
    // The first flow is kept in the socket's record, others in a map: each must keep its backend and its source.
    let services: Vec<(Responders, SocketAddr)> =
        (1..=4).map(|number| four(sandbox, number)).collect::<Result<_>>()?;
    let client = udp(ANY4)?;
    let mut chosen = Vec::new();
    for (responders, vip) in &services {
        chosen.push(responders.ask(&client, *vip)?.0);
    }
    for _ in 0..3 {
        for ((responders, vip), chosen) in services.iter().zip(&chosen) {
            let (index, from) = responders.ask(&client, *vip)?;
            ensure!(index == *chosen, "{vip}: backend {chosen} was left for {index}");
            ensure!(from == *vip, "{vip}: the answer came from {from}");
        }
    }
    Ok(())
}

fn late(sandbox: &mut Sandbox) -> Result<()> {
    let (responders, vip) = four(sandbox, 1)?;
    let client = udp(ANY4)?;
    let (gone, _) = responders.ask(&client, vip)?;
    client.send_to(b"first", vip)?;
    without(sandbox, &responders, vip, gone)?;
    client.send_to(b"second", vip)?;
    for _ in 0..2 {
        responders.answer()?;
        let mut bytes = [0; 16];
        let (_, from) = client.recv_from(&mut bytes)?;
        ensure!(from == vip, "an answer came from {from}");
    }
    Ok(())
}

fn no_backends(sandbox: &mut Sandbox) -> Result<()> {
    for (host, vip) in [(ANY4, VIP4), (ANY6, VIP6)] {
        let vip: SocketAddr = (vip, 53).into();
        sandbox.service(1, key(vip, Protocol::Udp), Algorithm::WeightedRandom, &[])?;
        refused(udp(host)?.send_to(b"question", vip))?;
    }
    ensure!(sandbox.reason(Reason::NoBackends)? == 2, "the reason is not counted");
    Ok(())
}

fn passes(sandbox: &mut Sandbox) -> Result<()> {
    sandbox.become_workload(3)?;
    for (host, any) in [(HOST4, ANY4), (HOST6, ANY6)] {
        let responders = Responders::at(host, 1)?;
        let address = responders.addresses()?[0];
        let (_, from) = responders.ask(&udp(any)?, address)?;
        ensure!(from == address, "the answer came from {from}");
    }
    // The answers go to an address that is no service, either.
    ensure!(sandbox.reason(Reason::NotService)? == 4, "counted {}", sandbox.reason(Reason::NotService)?);
    Ok(())
}

fn counted(sandbox: &mut Sandbox) -> Result<()> {
    sandbox.become_workload(3)?;
    let (responders, vip) = four(sandbox, 1)?;
    let client = udp(ANY4)?;
    let (index, _) = responders.ask(&client, vip)?;
    responders.ask(&client, vip)?;
    let backend = backend_number(1, index)?;
    let key = CounterKey { source: 3, service: 1, backend, outcome: Outcome::Connected as u32, zero: 0 };
    let counters = sandbox.counters(&key)?;
    ensure!(counters.attempts == 1, "two datagrams of one flow are counted as {}", counters.attempts);
    Ok(())
}

/// Four backends behind a service of its own port, taken in turn.
fn four(sandbox: &mut Sandbox, number: u32) -> Result<(Responders, SocketAddr)> {
    let responders = Responders::at(HOST4, 4)?;
    let vip = (VIP4, 1000 + u16::try_from(number)?).into();
    sandbox.service(number, key(vip, Protocol::Udp), Algorithm::RoundRobin, &responders.addresses()?)?;
    Ok((responders, vip))
}

/// The service again, without one of its backends.
fn without(sandbox: &mut Sandbox, responders: &Responders, vip: SocketAddr, gone: usize) -> Result<()> {
    let mut rest = responders.addresses()?;
    rest.remove(gone);
    (0..4).try_for_each(|index| sandbox.free_backend(1, index))?;
    sandbox.service(2, key(vip, Protocol::Udp), Algorithm::RoundRobin, &rest)
}
