//! Maps of another version: what can be kept is, and the rest is rebuilt without a gap.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::maps::{PerCpuHashMap, PerCpuValues};
use mesh_agent::config::MapSizes;
use mesh_common::abi::{Algorithm, CounterKey, Counters, map};

use super::Test;
use super::foreign::{self, Layout};
use super::scene::{SIZES, Scene, frontend, put};
use crate::traffic::{HOST4, Listeners, VIP4};

/// The tests.
pub(super) const TESTS: &[Test] = &[
    Test { name: "layout::a_longer_value_begins_with_the_shorter_on_every_cpu", run: longer },
    Test { name: "layout::a_value_longer_than_this_agent_knows_is_refused_and_changes_nothing", run: newer },
    Test { name: "layout::services_of_another_layout_are_rebuilt_without_a_gap", run: other_key },
    Test { name: "layout::backends_of_another_layout_are_rebuilt_without_a_gap", run: other_type },
];

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

fn newer(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 3)?;
    let shop = frontend((VIP4, 80).into(), Algorithm::RoundRobin, &listeners.addresses()?);
    drop(scene.start(SIZES, &[("shop", shop)])?);
    foreign::pin(&scene.map_pin(map::COUNTERS), &Layout { kind: 5, key: 24, value: 56, entries: 256 })?;
    let before = scene.map_ids()?;
    let error = scene
        .prepare(MapSizes { services: 32, ..SIZES })
        .err()
        .context("an agent that would cut off values was started")?;
    let text = format!("{error:#}");
    ensure!(text.contains(map::COUNTERS) && text.contains("56"), "refused with: {text}");
    ensure!(scene.map_ids()? == before, "pins were {before:?}, are {:?}", scene.map_ids()?);
    ensure!(listeners.spread((VIP4, 80).into(), 3)? == [1, 1, 1], "no longer balanced");
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
    let mut wrong = Vec::new();
    let mut look = |when: &str| -> Result<()> {
        for (port, backend, another) in [(80, &one, &other), (81, &other, &one)] {
            match std::net::TcpStream::connect((VIP4, port)) {
                Err(error) => wrong.push(format!("{when}, port {port} answers with {error}")),
                Ok(client) => {
                    if backend.waiting(Duration::from_millis(100))?.is_none() {
                        another.accept()?;
                        wrong.push(format!("{when}, port {port} leads to another service's backend"));
                    }
                    drop(client);
                }
            }
        }
        Ok(())
    };
    look("before")?;
    let mut agent = scene.prepare(SIZES)?;
    look("with the maps prepared")?;
    put(&mut agent, &[("cart", cart)])?;
    look("with one service rebuilt")?;
    put(&mut agent, &[("shop", shop)])?;
    look("with both services rebuilt")?;
    agent.attach()?;
    look("with the new programs")?;
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}
