//! `connect4` and `connect6`: a connection to a service goes to one of its backends, or is refused at once.

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_common::abi::{Algorithm, CounterKey, Outcome, Protocol, Reason};

use crate::runner::Test;
use crate::sandbox::{Sandbox, endpoint, key};
use crate::traffic::{
    HOST4, HOST6, Listeners, Responders, VIP4, VIP6, connect, exchange, refused, through_ipv6, udp,
};

/// The tests of this hook.
pub const TESTS: &[Test] = &[
    Test { name: "connect::ipv4_reaches_a_backend_on_another_port", run: ipv4 },
    Test { name: "connect::ipv6_reaches_a_backend_on_another_port", run: ipv6 },
    Test { name: "connect::ipv4_through_ipv6_reaches_a_backend", run: mapped },
    Test { name: "connect::udp_sockets_that_connect_reach_a_backend", run: datagram },
    Test { name: "connect::address_port_and_protocol_make_a_service", run: whole_key },
    Test { name: "connect::unknown_destinations_pass", run: passes },
    Test { name: "connect::a_service_without_backends_refuses_at_once", run: no_backends },
    Test { name: "connect::round_robin_takes_turns", run: round_robin },
    Test { name: "connect::weights_are_kept_at_random", run: weighted },
    Test { name: "connect::least_connections_prefers_the_idle", run: least_connections },
    Test { name: "connect::maglev_sends_a_client_to_the_same_backend", run: maglev },
    Test { name: "connect::affinity_keeps_a_client_until_its_backend_goes", run: affinity },
    Test { name: "connect::a_hundred_backends_on_two_levels_are_all_reached", run: two_levels },
    Test { name: "connect::a_new_generation_replaces_the_old_whole", run: generations },
    Test { name: "connect::a_page_of_another_generation_is_never_used", run: stale },
    Test { name: "connect::a_freed_backend_is_never_used", run: freed },
    Test { name: "connect::a_tree_that_leads_nowhere_refuses", run: broken },
];

fn ipv4(sandbox: &mut Sandbox) -> Result<()> {
    reaches(sandbox, HOST4, (VIP4, 80).into(), |address| address)
}

fn ipv6(sandbox: &mut Sandbox) -> Result<()> {
    reaches(sandbox, HOST6, (VIP6, 80).into(), |address| address)
}

fn mapped(sandbox: &mut Sandbox) -> Result<()> {
    reaches(sandbox, HOST4, (VIP4, 80).into(), through_ipv6)
}

fn reaches(
    sandbox: &mut Sandbox,
    host: IpAddr,
    vip: SocketAddr,
    written: fn(SocketAddr) -> SocketAddr,
) -> Result<()> {
    sandbox.become_workload(5)?;
    let listeners = Listeners::at(host, 1)?;
    let backends = listeners.addresses()?;
    sandbox.service(1, key(vip, Protocol::Tcp), Algorithm::WeightedRandom, &backends)?;
    let mut client = connect(written(vip))?;
    let (_, mut accepted) = listeners.accept()?;
    exchange(&mut client, &mut accepted, 100_000, 100_000)?;
    let record = sandbox.record(&client)?.context("the socket has no record")?;
    ensure!(record.workload == 5 && record.service == 1, "the record is {record:?}");
    ensure!(
        record.dialled == endpoint(vip) && record.chosen == endpoint(backends[0]),
        "the record is {record:?}"
    );
    ensure!(sandbox.reason(Reason::Balanced)? == 1, "balanced {} times", sandbox.reason(Reason::Balanced)?);
    Ok(())
}

fn datagram(sandbox: &mut Sandbox) -> Result<()> {
    for (host, vip) in [(HOST4, VIP4), (HOST6, VIP6)] {
        let responders = Responders::at(host, 1)?;
        let vip = (vip, 53).into();
        sandbox.service(1, key(vip, Protocol::Udp), Algorithm::WeightedRandom, &responders.addresses()?)?;
        let client: UdpSocket = udp(host)?;
        client.connect(vip)?;
        client.send(b"question")?;
        responders.answer()?;
        let mut answer = [0; 16];
        let size = client.recv(&mut answer).context("no answer")?;
        ensure!(&answer[..size] == b"question", "the answer was changed on the way");
    }
    Ok(())
}

fn whole_key(sandbox: &mut Sandbox) -> Result<()> {
    let listeners = Listeners::at(HOST4, 2)?;
    let backends = listeners.addresses()?;
    let (one, other): (SocketAddr, SocketAddr) = ((VIP4, 80).into(), (VIP4, 81).into());
    sandbox.service(1, key(one, Protocol::Tcp), Algorithm::WeightedRandom, &backends[..1])?;
    sandbox.service(2, key(other, Protocol::Tcp), Algorithm::WeightedRandom, &backends[1..])?;
    ensure!(
        listeners.spread(one, 5)? == [5, 0] && listeners.spread(other, 5)? == [0, 5],
        "ports are mixed up"
    );
    let before = sandbox.reason(Reason::NotService)?;
    // There is no route to the address, so what passes fails, but not as a refusal.
    for unknown in [(VIP4, 82).into(), SocketAddr::from(([10, 96, 0, 2], 80))] {
        let error = TcpStream::connect(unknown).err().context("reached an address that does not exist")?;
        ensure!(error.raw_os_error() == Some(libc::ENETUNREACH), "{unknown} answers with {error}");
    }
    let error = udp(HOST4)?.connect(one).err().context("UDP reached a TCP service")?;
    ensure!(error.kind() != std::io::ErrorKind::ConnectionRefused, "UDP to a TCP service gives {error}");
    ensure!(sandbox.reason(Reason::NotService)? == before + 3, "misses are not counted");
    Ok(())
}

fn passes(sandbox: &mut Sandbox) -> Result<()> {
    sandbox.become_workload(5)?;
    let listeners = Listeners::at(HOST4, 1)?;
    ensure!(listeners.spread(listeners.addresses()?[0], 3)? == [3], "not reached");
    ensure!(sandbox.reason(Reason::NotService)? == 3, "counted {}", sandbox.reason(Reason::NotService)?);
    Ok(())
}

fn no_backends(sandbox: &mut Sandbox) -> Result<()> {
    sandbox.become_workload(5)?;
    for (number, vip) in [(1, VIP4), (2, VIP6)] {
        let vip: SocketAddr = (vip, 80).into();
        sandbox.service(number, key(vip, Protocol::Tcp), Algorithm::WeightedRandom, &[])?;
        let start = Instant::now();
        refused(TcpStream::connect(vip))?;
        // A second is when TCP would try again.
        ensure!(start.elapsed() < Duration::from_secs(1), "took {:?}", start.elapsed());
        let key = CounterKey {
            source: 5,
            service: number,
            outcome: Outcome::Refused as u32,
            ..CounterKey::default()
        };
        ensure!(sandbox.counters(&key)?.attempts == 1, "the refusal is not counted");
    }
    ensure!(sandbox.reason(Reason::NoBackends)? == 2, "the reason is not counted");
    Ok(())
}

fn round_robin(sandbox: &mut Sandbox) -> Result<()> {
    let (listeners, vip) = three(sandbox, Algorithm::RoundRobin)?;
    let reached = listeners.spread(vip, 12)?;
    ensure!(reached == [4, 4, 4], "spread {reached:?}");
    Ok(())
}

fn weighted(sandbox: &mut Sandbox) -> Result<()> {
    let listeners = Listeners::at(HOST4, 2)?;
    let addresses = listeners.addresses()?;
    let vip = (VIP4, 80).into();
    let weights = [(addresses[0], 1), (addresses[1], 3)];
    sandbox.weighted_service(1, key(vip, Protocol::Tcp), Algorithm::WeightedRandom, &weights)?;
    let reached = listeners.spread(vip, 400)?;
    // 100 expected with a standard deviation of 8.7: six of them would come once in 500 million runs.
    ensure!((48..=152).contains(&reached[0]), "spread {reached:?}");
    Ok(())
}

fn least_connections(sandbox: &mut Sandbox) -> Result<()> {
    let listeners = Listeners::at(HOST4, 2)?;
    let vip = (VIP4, 80).into();
    sandbox.service(1, key(vip, Protocol::Tcp), Algorithm::LeastConnections, &listeners.addresses()?)?;
    let mut held = Vec::new();
    let mut open = [0i32; 2];
    for _ in 0..60 {
        let client = connect(vip)?;
        let (index, accepted) = listeners.accept()?;
        open[index] += 1;
        held.push((client, accepted));
    }
    // Two random choices: both fall on the busier backend one time in four, so the difference stays small.
    ensure!((open[0] - open[1]).abs() <= 10, "open connections {open:?}");
    let counted = [sandbox.open(1, 0)?, sandbox.open(1, 1)?];
    ensure!(counted.iter().sum::<u64>() == 60, "the kernel counts {counted:?}");
    Ok(())
}

fn maglev(sandbox: &mut Sandbox) -> Result<()> {
    let (listeners, vip) = three(sandbox, Algorithm::Maglev)?;
    let mut chosen = [0; 3];
    for workload in 1..=30 {
        sandbox.become_workload(workload)?;
        let reached = listeners.spread(vip, 3)?;
        let index = reached.iter().position(|count| *count == 3);
        chosen[index.with_context(|| format!("workload {workload} was sent to {reached:?}"))?] += 1;
    }
    ensure!(chosen.iter().all(|count| *count > 0), "30 clients chose {chosen:?}");
    Ok(())
}

fn affinity(sandbox: &mut Sandbox) -> Result<()> {
    let (listeners, vip) = three(sandbox, Algorithm::WeightedRandom)?;
    sandbox.change(1, |page| page.header.affinity_seconds = 3600)?;
    let reached = listeners.spread(vip, 20)?;
    let kept = reached.iter().position(|count| *count == 20);
    let kept = kept.with_context(|| format!("one client was sent to {reached:?}"))?;
    ensure!(sandbox.reason(Reason::AffinityHit)? == 19, "hits are not counted");
    // The backend leaves: the client moves once, and stays.
    let mut rest = listeners.addresses()?;
    rest.remove(kept);
    sandbox.free_backend(1, 2)?;
    sandbox.free_backend(1, kept)?;
    let placed: Vec<(SocketAddr, u32)> = rest.into_iter().map(|address| (address, 1)).collect();
    sandbox.weighted_service(2, key(vip, Protocol::Tcp), Algorithm::WeightedRandom, &placed)?;
    sandbox.change(2, |page| page.header.affinity_seconds = 3600)?;
    let reached = listeners.spread(vip, 20)?;
    ensure!(reached[kept] == 0 && reached.contains(&20), "then to {reached:?}");
    Ok(())
}

fn two_levels(sandbox: &mut Sandbox) -> Result<()> {
    let listeners = Listeners::at(HOST4, 100)?;
    let vip = (VIP4, 80).into();
    sandbox.deep_service(1, key(vip, Protocol::Tcp), &listeners.addresses()?)?;
    let reached = listeners.spread(vip, 200)?;
    ensure!(reached.iter().all(|count| *count == 2), "spread {reached:?}");
    Ok(())
}

fn generations(sandbox: &mut Sandbox) -> Result<()> {
    let listeners = Listeners::at(HOST4, 2)?;
    let addresses = listeners.addresses()?;
    let vip = (VIP4, 80).into();
    for (list, expected) in [(&addresses[..1], [5, 0]), (&addresses[1..], [0, 5]), (&addresses[..1], [5, 0])]
    {
        sandbox.service(1, key(vip, Protocol::Tcp), Algorithm::RoundRobin, list)?;
        let reached = listeners.spread(vip, 5)?;
        ensure!(reached == expected, "spread {reached:?} instead of {expected:?}");
    }
    sandbox.service(1, key(vip, Protocol::Tcp), Algorithm::RoundRobin, &[])?;
    refused(TcpStream::connect(vip))
}

fn stale(sandbox: &mut Sandbox) -> Result<()> {
    let (_listeners, vip) = three(sandbox, Algorithm::RoundRobin)?;
    sandbox.overwrite(1, |page| page.header.generation += 1)?;
    refused(TcpStream::connect(vip))?;
    ensure!(sandbox.reason(Reason::Stale)? == 2 && sandbox.reason(Reason::StaleTwice)? == 1, "reasons");
    sandbox.overwrite(1, |page| {
        page.header.generation -= 1;
        page.header.key = key((VIP4, 443).into(), Protocol::Tcp);
    })?;
    refused(TcpStream::connect(vip))
}

fn freed(sandbox: &mut Sandbox) -> Result<()> {
    let (_listeners, vip) = three(sandbox, Algorithm::RoundRobin)?;
    (0..3).try_for_each(|index| sandbox.free_backend(1, index))?;
    refused(TcpStream::connect(vip))?;
    ensure!(sandbox.reason(Reason::StaleTwice)? == 1, "the reason is not counted");
    Ok(())
}

fn broken(sandbox: &mut Sandbox) -> Result<()> {
    let (_listeners, vip) = three(sandbox, Algorithm::RoundRobin)?;
    // A page that is its own child, and one that is not there.
    for child in [8, 9, u32::MAX] {
        sandbox.change(1, |page| {
            page.header.depth = 2;
            page.entries[0].child = child;
            page.entries[1].child = child;
            page.entries[2].child = child;
        })?;
        refused(TcpStream::connect(vip)).with_context(|| format!("child {child}"))?;
    }
    Ok(())
}

/// Three backends with the same weight.
fn three(sandbox: &mut Sandbox, algorithm: Algorithm) -> Result<(Listeners, SocketAddr)> {
    let listeners = Listeners::at(HOST4, 3)?;
    let vip = (VIP4, 80).into();
    sandbox.service(1, key(vip, Protocol::Tcp), algorithm, &listeners.addresses()?)?;
    Ok((listeners, vip))
}
