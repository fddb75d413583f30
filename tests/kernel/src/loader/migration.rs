//! An agent with other sizes, or of another version: what the maps hold goes with it.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use aya::maps::{PerCpuHashMap, PerCpuValues};
use mesh_agent::config::MapSizes;
use mesh_agent::datapath::desired::Frontend;
use mesh_common::abi::{Algorithm, CounterKey, Counters, map};

use super::Test;
use super::foreign::{self, Layout};
use super::scene::{SIZES, Scene, counted, frontend, open, put, under_load};
use crate::runner::until;
use crate::traffic::{HOST4, Listeners, VIP4, connect};

/// The tests.
pub(super) const TESTS: &[Test] = &[
    Test { name: "migration::larger_maps_hold_what_the_smaller_held", run: larger },
    Test { name: "migration::no_connection_fails_while_maps_change_size", run: no_gap },
    Test { name: "migration::loads_stay_right_when_connections_open_before_the_programs_change", run: opened },
    Test { name: "migration::loads_stay_right_when_connections_close_before_the_programs_change", run: closed },
    Test { name: "migration::sizes_too_small_are_refused_and_change_nothing", run: too_small },
    Test { name: "migration::a_longer_value_begins_with_the_shorter_on_every_cpu", run: longer },
    Test { name: "migration::services_of_another_layout_are_rebuilt_without_a_gap", run: other_key },
    Test { name: "migration::backends_of_another_layout_are_rebuilt_without_a_gap", run: other_type },
];

const LARGER: MapSizes = MapSizes {
    services: 32,
    backends: 128,
    pages: 128,
    workloads: 16,
    affinity: 2048,
    udp_flows: 2048,
    counters: 512,
};

/// Of what `SIZES` has, the least that holds two services, two workloads and their counters.
const SMALLER: MapSizes =
    MapSizes { services: 2, backends: 6, pages: 4, workloads: 2, affinity: 512, udp_flows: 512, counters: 16 };

/// Two services at ports 80 and 81: one that takes turns, one that keeps its clients.
fn services(listeners: &Listeners) -> Result<[(&'static str, Frontend); 2]> {
    let backends = listeners.addresses()?;
    let shop = frontend((VIP4, 80).into(), Algorithm::RoundRobin, &backends);
    let mut cart = frontend((VIP4, 81).into(), Algorithm::WeightedRandom, &backends);
    cart.affinity_seconds = 3600;
    Ok([("shop", shop), ("cart", cart)])
}

fn larger(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 3)?;
    let services = services(&listeners)?;
    let mut agent = scene.start(SIZES, &services)?;
    agent.enroll(&scene.enrolment("pod")?).map_err(anyhow::Error::msg)?;
    let vip: SocketAddr = (VIP4, 80).into();
    let held = (connect(vip)?, listeners.accept()?);
    listeners.spread(vip, 4)?;
    let kept = listeners.spread((VIP4, 81).into(), 4)?;
    drop(agent);
    for sizes in [LARGER, SMALLER] {
        let (before, ids) = (scene.contents()?, scene.map_ids()?);
        let mut agent = scene.prepare(sizes)?;
        let after = scene.contents()?;
        for (name, contents) in &before {
            ensure!(*contents == after[name], "{name} held {contents:?}, holds {:?}", after[name]);
        }
        ensure!(!before[map::AFFINITY].is_empty() && !before[map::LOADS].is_empty(), "held {before:?}");
        let now = scene.map_ids()?;
        ensure!(now.keys().eq(ids.keys()), "pinned are {:?}", now.keys());
        for (name, id) in &ids {
            // These have no size to change.
            let same = [map::SOCKETS, map::REASONS].contains(&name.as_str());
            ensure!((now[name] == *id) == same, "{name} had id {id}, has {}", now[name]);
        }
        agent.attach()?;
        ensure!(agent.programs().iter().all(|program| program.replaced), "attached {:?}", agent.programs());
        ensure!(held.0.peer_addr()? == vip, "the peer now shows as {}", held.0.peer_addr()?);
        ensure!(open(&agent, &services[0].1)?.iter().sum::<u64>() == 1, "open connections are forgotten");
        let reached = listeners.spread((VIP4, 81).into(), 4)?;
        ensure!(reached == kept, "a client that was kept at {kept:?} goes to {reached:?}");
        let counted_before = counted(&agent, 1)?.attempts;
        ensure!(listeners.spread(vip, 3)? == [1, 1, 1], "no longer in turn");
        ensure!(counted(&agent, 1)?.attempts == counted_before + 3, "no longer counted");
    }
    Ok(())
}

fn no_gap(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 3)?;
    let services = services(&listeners)?;
    drop(scene.start(SIZES, &services)?);
    for sizes in [LARGER, SMALLER, SMALLER] {
        let (agent, count) = under_load(&listeners, (VIP4, 80).into(), || scene.restart(sizes))?;
        println!("{count} connections while the maps took {} pages, none failed", sizes.pages);
        ensure!(agent.ledger().ports().len() == 2, "adopted {:?}", agent.ledger().ports().keys());
        until("all closed", || Ok(open(&agent, &services[0].1)?.iter().sum::<u64>() == 0)).with_context(
            || format!("with {} pages, open connections are {:?}", sizes.pages, open(&agent, &services[0].1)),
        )?;
    }
    Ok(())
}

fn opened(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 1)?;
    let services = services(&listeners)?;
    drop(scene.start(SIZES, &services)?);
    let mut agent = scene.prepare(LARGER)?;
    let held = (connect((VIP4, 80).into())?, listeners.accept()?);
    agent.attach()?;
    let during = open(&agent, &services[0].1)?;
    drop(held);
    std::thread::sleep(std::time::Duration::from_millis(300));
    let after = open(&agent, &services[0].1)?;
    ensure!(during == [1] && after == [0], "open connections {during:?}, and {after:?} after the only one closed");
    ensure!(counted(&agent, 1)?.attempts == 1, "counted {:?}", counted(&agent, 1)?);
    Ok(())
}

fn closed(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 1)?;
    let services = services(&listeners)?;
    let agent = scene.start(SIZES, &services)?;
    let held = (connect((VIP4, 80).into())?, listeners.accept()?);
    drop(agent);
    let mut agent = scene.prepare(LARGER)?;
    drop(held);
    std::thread::sleep(std::time::Duration::from_millis(300));
    agent.attach()?;
    let after = open(&agent, &services[0].1)?;
    ensure!(after == [0], "open connections {after:?} after all have closed");
    ensure!(counted(&agent, 1)?.closed == 1, "counted {:?}", counted(&agent, 1)?);
    Ok(())
}

fn too_small(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 3)?;
    let services = services(&listeners)?;
    let mut agent = scene.start(SIZES, &services)?;
    agent.enroll(&scene.enrolment("pod")?).map_err(anyhow::Error::msg)?;
    agent
        .enroll(&mesh_agent::workloads::Change::Add { cgroup: 1, uid: "another".into() })
        .map_err(anyhow::Error::msg)?;
    let vip: SocketAddr = (VIP4, 80).into();
    listeners.spread(vip, 6)?;
    drop(agent);
    let (ids, contents) = (scene.map_ids()?, scene.contents()?);
    let mut wrong = Vec::new();
    for (flag, sizes) in [
        ("--max-services", MapSizes { services: 1, ..SIZES }),
        ("--max-backends", MapSizes { backends: 3, ..SIZES }),
        ("--max-pages", MapSizes { pages: 1, ..SIZES }),
        ("--max-workloads", MapSizes { workloads: 1, ..SIZES }),
        ("--max-counters", MapSizes { counters: 1, ..SIZES }),
        // What comes first in the list of maps would fit.
        ("--max-counters", MapSizes { counters: 1, ..LARGER }),
    ] {
        match scene.prepare(sizes) {
            Ok(_) => wrong.push(format!("{flag} is accepted")),
            Err(error) => {
                let text = format!("{error:#}");
                if !text.contains(flag) {
                    wrong.push(format!("{flag} is refused with: {text}"));
                }
            }
        }
        let now = scene.map_ids()?;
        if now != ids {
            let changed: Vec<&String> = now.iter().filter(|(n, id)| ids.get(*n) != Some(*id)).map(|(n, _)| n).collect();
            wrong.push(format!("after {flag} was too small, pins have changed: {changed:?}"));
        }
        let reached = listeners.spread(vip, 3)?;
        ensure!(reached == [1, 1, 1], "after {flag} was too small, spread {reached:?}");
    }
    ensure!(scene.contents()?[map::SERVICES] == contents[map::SERVICES], "services have changed");
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

fn longer(scene: &mut Scene) -> Result<()> {
    drop(scene.start(SIZES, &[])?);
    let path = scene.map_pin(map::COUNTERS);
    foreign::pin(&path, &Layout { kind: 5, key: 24, value: 40, entries: SIZES.counters })?;
    let key = CounterKey { source: 7, service: 1, backend: 2, ..CounterKey::default() };
    let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
    let values: Vec<[u64; 5]> = (1..=cpus as u64).map(|cpu| [cpu, 2, 3, 4, 5]).collect();
    let mut short: PerCpuHashMap<_, CounterKey, [u64; 5]> = scene.open(map::COUNTERS)?.try_into()?;
    short.insert(key, PerCpuValues::try_from(values)?, 0)?;
    let _agent = scene.restart(SIZES)?;
    let long: PerCpuHashMap<_, CounterKey, Counters> = scene.open(map::COUNTERS)?.try_into()?;
    let values = long.get(&key, 0).context("the entry is lost")?;
    ensure!(values.len() == cpus, "{} values for {cpus} processors", values.len());
    for (cpu, value) in (1..).zip(values.iter()) {
        let expected = Counters {
            attempts: cpu,
            closed: 2,
            bytes_sent: 3,
            bytes_received: 4,
            retransmits: 5,
            connect_nanoseconds: 0,
        };
        ensure!(*value == expected, "{value:?} instead of {expected:?}");
    }
    Ok(())
}

fn other_key(scene: &mut Scene) -> Result<()> {
    rebuilt(scene, map::SERVICES, &Layout { kind: 1, key: 24, value: 8, entries: SIZES.services })
}

fn other_type(scene: &mut Scene) -> Result<()> {
    rebuilt(scene, map::BACKENDS, &Layout { kind: 1, key: 4, value: 32, entries: SIZES.backends + 1 })
}

/// The services come again in another order, so that numbers change.
fn rebuilt(scene: &mut Scene, name: &str, layout: &Layout) -> Result<()> {
    let (one, other) = (Listeners::at(HOST4, 1)?, Listeners::at(HOST4, 1)?);
    let shop = frontend((VIP4, 80).into(), Algorithm::RoundRobin, &one.addresses()?);
    let cart = frontend((VIP4, 81).into(), Algorithm::RoundRobin, &other.addresses()?);
    drop(scene.start(SIZES, &[("shop", shop.clone()), ("cart", cart.clone())])?);
    foreign::pin(&scene.map_pin(name), layout)?;
    let works = |when: &str| {
        for (port, backend) in [(80, &one), (81, &other)] {
            let _client = connect((VIP4, port).into()).with_context(|| format!("port {port} {when}"))?;
            backend.accept().with_context(|| format!("port {port} {when} led to another service's backend"))?;
        }
        anyhow::Ok(())
    };
    works("before")?;
    let mut agent = scene.prepare(SIZES)?;
    works("when the maps were prepared")?;
    put(&mut agent, &[("cart", cart)])?;
    works("when one service was rebuilt")?;
    put(&mut agent, &[("shop", shop)])?;
    works("when both services were rebuilt")?;
    agent.attach()?;
    works("with the new programs")
}
