//! Numbers of backends and services that are given to others, while connections of their former owners are open.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use mesh_agent::config::MapSizes;
use mesh_agent::datapath::Datapath;
use mesh_agent::datapath::desired::Frontend;
use mesh_common::abi::Algorithm;

use super::Test;
use super::scene::{SIZES, Scene, counted, frontend, open};
use crate::traffic::{HOST4, Listeners, VIP4, connect, exchange};

/// The tests.
pub(super) const TESTS: &[Test] = &[
    Test { name: "reuse::a_connection_of_a_slots_former_backend_is_not_counted_to_the_next", run: backend },
    Test { name: "reuse::a_connection_of_a_numbers_former_service_is_not_counted_to_the_next", run: service },
    Test { name: "reuse::a_freed_slot_is_not_taken_for_its_former_backend_after_a_restart", run: restarted },
];

/// Puts `next` in force after what `before` had is free for others.
fn follow(agent: &mut Datapath, before: &str, next: (&str, &Frontend)) -> Result<()> {
    let now = Instant::now();
    agent.put(&Arc::from(before), &[], now).map_err(|reason| anyhow!("{reason}"))?;
    let rested = now + Duration::from_secs(2);
    agent.tick(rested);
    agent.put(&Arc::from(next.0), std::slice::from_ref(next.1), rested).map_err(|reason| anyhow!("{reason}"))
}

fn number(agent: &Datapath, frontend: &Frontend) -> Result<(u32, u32)> {
    let port = agent.ledger().ports().get(&frontend.key).context("the service is not known")?;
    Ok((port.number, port.backends[0].number))
}

fn backend(scene: &mut Scene) -> Result<()> {
    check(scene, MapSizes { backends: 1, ..SIZES }, |(_, former), (_, next)| former == next, false)
}

fn service(scene: &mut Scene) -> Result<()> {
    check(scene, MapSizes { services: 1, ..SIZES }, |(former, _), (next, _)| former == next, false)
}

fn restarted(scene: &mut Scene) -> Result<()> {
    check(scene, MapSizes { backends: 1, ..SIZES }, |(_, former), (_, next)| former == next, true)
}

fn check(
    scene: &mut Scene,
    sizes: MapSizes,
    reused: fn((u32, u32), (u32, u32)) -> bool,
    restart: bool,
) -> Result<()> {
    let listeners = Listeners::at(HOST4, 2)?;
    let addresses = listeners.addresses()?;
    let (vip, other): (SocketAddr, SocketAddr) = ((VIP4, 80).into(), (VIP4, 81).into());
    let shop = frontend(vip, Algorithm::RoundRobin, &addresses[..1]);
    let cart = frontend(other, Algorithm::RoundRobin, &addresses[1..]);
    let mut agent = scene.start(sizes, &[("shop", shop.clone())])?;
    let mut client = connect(vip)?;
    let (_, mut server) = listeners.accept()?;
    ensure!(open(&agent, &shop)? == [1] && counted(&agent, 1)?.attempts == 1, "not counted");
    let former = number(&agent, &shop)?;
    if restart {
        agent.put(&Arc::from("shop"), &[], Instant::now()).map_err(|reason| anyhow!("{reason}"))?;
        drop(agent);
        agent = scene.restart(sizes)?;
    }
    follow(&mut agent, "shop", ("cart", &cart))?;
    let next = number(&agent, &cart)?;
    ensure!(reused(former, next), "(service, backend) {former:?} and then {next:?}: nothing was used again");
    let left: Vec<_> =
        agent.counters()?.into_iter().filter(|(key, _)| reused((key.service, key.backend), next)).collect();
    ensure!(left.is_empty(), "counters of the former owner are left: {left:?}");
    let _held = (connect(other)?, listeners.accept()?);
    ensure!(open(&agent, &cart)? == [1], "open {:?}", open(&agent, &cart)?);
    exchange(&mut client, &mut server, 1000, 1000)?;
    drop((client, server));
    std::thread::sleep(Duration::from_millis(300));
    ensure!(
        open(&agent, &cart)? == [1],
        "the former backend's end changed the load to {:?}",
        open(&agent, &cart)?
    );
    let all = agent.counters()?;
    let wrong = all.iter().any(|(key, counters)| {
        reused((key.service, key.backend), next)
            && (counters.closed, counters.bytes_sent, counters.attempts) != (0, 0, 1)
    });
    ensure!(
        !wrong,
        "the end of the former owner's connection is counted to the next owner {next:?}: {all:?}"
    );
    Ok(())
}
