//! An agent that stops and one that follows: what is in force stays in force.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use mesh_agent::datapath::object::PROGRAMS;
use mesh_agent::datapath::pins;
use mesh_common::abi::{Algorithm, map};

use super::Test;
use super::scene::{SIZES, Scene, counted, frontend, open, passes_unchanged};
use crate::runner::until;
use crate::traffic::{HOST4, Listeners, VIP4, connect, exchange};

/// The tests.
pub(super) const TESTS: &[Test] = &[
    Test { name: "loader::an_agent_goes_on_where_the_one_before_it_stopped", run: goes_on },
    Test { name: "loader::links_without_maps_are_balanced_through_the_restart", run: maps_missing },
    Test { name: "loader::uninstall_leaves_connections_as_they_were_without_the_mesh", run: uninstall },
];

fn goes_on(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 2)?;
    let vip: SocketAddr = (VIP4, 80).into();
    let shop = frontend(vip, Algorithm::RoundRobin, &listeners.addresses()?);
    let mut first = scene.start(SIZES, &[("shop", shop.clone())])?;
    first.enroll(&scene.enrolment("pod")?).map_err(anyhow::Error::msg)?;
    ensure!(first.programs().len() == PROGRAMS.len(), "attached {:?}", first.programs());
    ensure!(first.programs().iter().all(|program| !program.replaced), "attached {:?}", first.programs());
    let held = (connect(vip)?, listeners.accept()?);
    listeners.spread(vip, 3)?;
    ensure!(counted(&first, 1)?.attempts == 4, "counted {:?}", counted(&first, 1)?);
    drop(first);

    let reached = listeners.spread(vip, 4)?;
    ensure!(reached == [2, 2], "while no agent runs, spread {reached:?}");
    let contents = scene.contents()?;
    let mut second = scene.prepare(SIZES)?;
    ensure!(second.ledger().ports().len() == 1, "adopted {:?}", second.ledger().ports().keys());
    second.attach()?;
    ensure!(second.programs().len() == PROGRAMS.len(), "attached {:?}", second.programs());
    ensure!(second.programs().iter().all(|program| program.replaced), "attached {:?}", second.programs());
    let after = scene.contents()?;
    for name in [map::SERVICES, map::PAGES, map::BACKENDS, map::LOADS, map::COUNTERS, map::WORKLOADS] {
        ensure!(contents[name] == after[name], "{name} was {:?}, is {:?}", contents[name], after[name]);
    }
    ensure!(held.0.peer_addr()? == vip, "the peer now shows as {}", held.0.peer_addr()?);
    ensure!(open(&second, &shop)?.iter().sum::<u64>() == 1, "open {:?}", open(&second, &shop)?);
    second
        .put(&Arc::from("shop"), std::slice::from_ref(&shop), Instant::now())
        .map_err(anyhow::Error::msg)?;
    ensure!(
        scene.contents()?[map::SERVICES] == contents[map::SERVICES],
        "the same service was written again"
    );
    let reached = listeners.spread(vip, 2)?;
    ensure!(reached == [1, 1], "then spread {reached:?}");
    let attempts = counted(&second, 1)?.attempts;
    ensure!(attempts == 10, "counted {attempts} instead of 10");
    drop(held);
    until("all closed", || {
        Ok(counted(&second, 1)?.closed == attempts && open(&second, &shop)?.iter().sum::<u64>() == 0)
    })
}

fn maps_missing(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 2)?;
    let vip: SocketAddr = (VIP4, 80).into();
    let shop = frontend(vip, Algorithm::RoundRobin, &listeners.addresses()?);
    drop(scene.start(SIZES, &[("shop", shop.clone())])?);
    for name in map::ALL {
        std::fs::remove_file(scene.map_pin(name))?;
    }
    let mut agent = scene.prepare(SIZES)?;
    ensure!(agent.ledger().ports().is_empty(), "adopted {:?}", agent.ledger().ports().keys());
    ensure!(listeners.spread(vip, 2)? == [1, 1], "not balanced by the old programs");
    super::scene::put(&mut agent, &[("shop", shop)])?;
    ensure!(
        listeners.spread(vip, 2)? == [1, 1],
        "not balanced by the old programs after the new maps were filled"
    );
    agent.attach()?;
    ensure!(agent.programs().iter().all(|program| program.replaced), "attached {:?}", agent.programs());
    ensure!(listeners.spread(vip, 2)? == [1, 1], "not balanced by the new programs");
    Ok(())
}

fn uninstall(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 1)?;
    let vip: SocketAddr = (VIP4, 80).into();
    let shop = frontend(vip, Algorithm::RoundRobin, &listeners.addresses()?);
    let agent = scene.start(SIZES, &[("shop", shop)])?;
    let mut client = connect(vip)?;
    let (_, mut server) = listeners.accept()?;
    drop(agent);
    let removed = pins::remove(scene.pin_path())?;
    // And three folders.
    ensure!(removed.len() == map::ALL.len() + PROGRAMS.len() + 4, "removed {removed:?}");
    ensure!(!scene.pin_path().exists(), "{} is still there", scene.pin_path().display());
    passes_unchanged(vip)?;
    ensure!(listeners.spread(listeners.addresses()?[0], 2)? == [2], "the backend is not reached");
    exchange(&mut client, &mut server, 1000, 1000)?;
    ensure!(pins::remove(scene.pin_path())?.is_empty(), "removed something twice");
    Ok(())
}
