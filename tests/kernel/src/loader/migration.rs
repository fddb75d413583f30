//! An agent with other sizes: what the maps hold goes with it.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use mesh_agent::config::MapSizes;
use mesh_agent::datapath::desired::Frontend;
use mesh_common::abi::{Algorithm, map};

use super::Test;
use super::scene::{SIZES, Scene, counted, frontend, open, put, under_load};
use crate::traffic::{HOST4, Listeners, VIP4, connect};

/// The tests.
pub(super) const TESTS: &[Test] = &[
    Test { name: "migration::larger_maps_hold_what_the_smaller_held", run: larger },
    Test { name: "migration::no_connection_fails_while_maps_change_size", run: no_gap },
    Test { name: "migration::a_service_added_before_the_programs_change_is_not_refused", run: added },
    Test {
        name: "migration::loads_stay_right_when_connections_open_before_the_programs_change",
        run: opened,
    },
    Test {
        name: "migration::loads_stay_right_when_connections_close_before_the_programs_change",
        run: closed,
    },
    Test { name: "migration::sizes_too_small_are_refused_and_change_nothing", run: too_small },
    Test {
        name: "migration::an_agent_that_dies_before_its_programs_are_in_force_leaves_the_old_ones",
        run: died,
    },
];

const LARGER: MapSizes = MapSizes {
    services: 32,
    backends: 128,
    pages: 128,
    workloads: 16,
    affinity: 2048,
    udp_flows: 2048,
    counters: 512,
    peers: 128,
    passages: 512,
    verdicts: 512,
};

/// Of what `SIZES` has, the least that holds two services, two workloads and their counters.
const SMALLER: MapSizes = MapSizes {
    services: 2,
    backends: 6,
    pages: 4,
    workloads: 2,
    affinity: 512,
    udp_flows: 512,
    counters: 16,
    peers: 16,
    passages: 64,
    verdicts: 16,
};

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
            let same = [map::SOCKETS, map::REASONS, map::NODE, map::DENIALS].contains(&name.as_str());
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
        let balanced = agent.ledger().ports().get(&services[0].1.key).map(|port| port.backends.len());
        ensure!(balanced == Some(3), "adopted {balanced:?} backends");
    }
    Ok(())
}

fn added(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 3)?;
    let services = services(&listeners)?;
    drop(scene.start(SIZES, &services)?);
    let mut wrong = Vec::new();
    for (port, flag, sizes) in [
        (90, "--max-pages", MapSizes { pages: 128, ..SIZES }),
        (91, "--max-backends", MapSizes { pages: 128, backends: 128, ..SIZES }),
        (92, "--max-services", MapSizes { pages: 128, backends: 128, services: 32, ..SIZES }),
    ] {
        let vip: SocketAddr = (VIP4, port).into();
        let mut agent = scene.prepare(sizes)?;
        put(&mut agent, &[("new", frontend(vip, Algorithm::RoundRobin, &listeners.addresses()?))])?;
        // It may pass unchanged, as before the agent came, or be balanced already.
        if let Err(error) = std::net::TcpStream::connect(vip)
            && error.kind() == std::io::ErrorKind::ConnectionRefused
        {
            wrong.push(format!(
                "with another {flag}, a new service is refused until the programs are replaced"
            ));
        }
        ensure!(listeners.spread((VIP4, 80).into(), 3)? == [1, 1, 1], "another service is not as it was");
        agent.attach()?;
        connect(vip)?;
        listeners.accept()?;
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
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
    ensure!(
        during == [1] && after == [0],
        "open connections {during:?}, and {after:?} after the only one closed"
    );
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
            let changed: Vec<&String> =
                now.iter().filter(|(n, id)| ids.get(*n) != Some(*id)).map(|(n, _)| n).collect();
            wrong.push(format!("after {flag} was too small, pins have changed: {changed:?}"));
        }
        let reached = listeners.spread(vip, 3)?;
        ensure!(reached == [1, 1, 1], "after {flag} was too small, spread {reached:?}");
    }
    ensure!(scene.contents()?[map::SERVICES] == contents[map::SERVICES], "services have changed");
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

fn died(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 3)?;
    let vip = (VIP4, 80).into();
    drop(scene.start(SIZES, &services(&listeners)?)?);
    drop(scene.prepare(LARGER)?);
    ensure!(listeners.spread(vip, 3)? == [1, 1, 1], "not balanced by the programs that are in force");
    let agent = scene.restart(LARGER)?;
    ensure!(agent.programs().iter().all(|program| program.replaced), "attached {:?}", agent.programs());
    ensure!(agent.ledger().ports().len() == 2, "adopted {:?}", agent.ledger().ports().keys());
    ensure!(listeners.spread(vip, 3)? == [1, 1, 1], "not balanced by the new programs");
    Ok(())
}
