//! What an agent leaves that dies, and maps that are not as they should be.

use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, ensure};
use mesh_agent::config::MapSizes;
use mesh_agent::datapath::desired::Frontend;
use mesh_common::abi::{Algorithm, Reason, map};

use super::Test;
use super::foreign::{self, Layout};
use super::scene::{SIZES, Scene, frontend, put, reason};
use crate::traffic::{HOST4, Listeners, VIP4, refused};

/// The tests.
pub(super) const TESTS: &[Test] = &[
    Test { name: "damage::a_map_that_was_never_renamed_is_thrown_away", run: leftover },
    Test { name: "damage::a_pointer_to_another_services_page_is_refused_and_repaired", run: pointer },
    Test { name: "damage::a_tree_that_leads_nowhere_is_refused_and_repaired", run: tree },
    Test { name: "damage::a_service_is_repaired_in_a_full_map", run: full },
];

fn leftover(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 1)?;
    let vip: SocketAddr = (VIP4, 80).into();
    let shop = frontend(vip, Algorithm::RoundRobin, &listeners.addresses()?);
    drop(scene.start(SIZES, &[("shop", shop)])?);
    let next = scene.map_pin("SERVICES_next");
    for sizes in [MapSizes { services: 32, ..SIZES }, MapSizes { services: 32, ..SIZES }] {
        foreign::pin(&next, &Layout { kind: 1, key: 20, value: 8, entries: 5 })?;
        let agent = scene.restart(sizes)?;
        ensure!(agent.ledger().ports().len() == 1, "adopted {:?}", agent.ledger().ports().keys());
        ensure!(listeners.spread(vip, 2)? == [2], "not balanced");
        ensure!(
            !next.exists(),
            "{} is still there after a start with {} services",
            next.display(),
            sizes.services
        );
    }
    Ok(())
}

fn pointer(scene: &mut Scene) -> Result<()> {
    damaged(scene, SIZES, Reason::StaleTwice, |scene, shop, cart| {
        let mut services = scene.services()?;
        let pointer = services.get(&cart.key, 0)?;
        Ok(services.insert(shop.key, pointer, 0)?)
    })
}

fn tree(scene: &mut Scene) -> Result<()> {
    damaged(scene, SIZES, Reason::BrokenTree, |scene, shop, _| {
        let (mut pages, pointer) = (scene.pages()?, scene.services()?.get(&shop.key, 0)?);
        let mut page = pages.get(&pointer.page(), 0)?;
        page.header.depth = 2;
        page.entries[0].child = u32::MAX;
        Ok(pages.set(pointer.page(), page, 0)?)
    })
}

fn full(scene: &mut Scene) -> Result<()> {
    let sizes = MapSizes { services: 2, ..SIZES };
    damaged(scene, sizes, Reason::StaleTwice, |scene, shop, cart| {
        let mut services = scene.services()?;
        let pointer = services.get(&cart.key, 0)?;
        Ok(services.insert(shop.key, pointer, 0)?)
    })
}

fn damaged(
    scene: &mut Scene,
    sizes: MapSizes,
    counted: Reason,
    damage: fn(&Scene, &Frontend, &Frontend) -> Result<()>,
) -> Result<()> {
    let listeners = Listeners::at(HOST4, 1)?;
    let (vip, other): (SocketAddr, SocketAddr) = ((VIP4, 80).into(), (VIP4, 81).into());
    let shop = frontend(vip, Algorithm::RoundRobin, &listeners.addresses()?);
    let cart = frontend(other, Algorithm::RoundRobin, &listeners.addresses()?);
    let services = [("shop", shop.clone()), ("cart", cart.clone())];
    drop(scene.start(sizes, &services)?);
    damage(scene, &shop, &cart)?;
    refused(TcpStream::connect(vip)).context("with the damage")?;
    ensure!(listeners.spread(other, 1)? == [1], "the other service is damaged, too");
    let mut agent = scene.prepare(sizes)?;
    let times = reason(&agent, counted)?;
    ensure!(times == 1, "{} counted {times} times", counted.name());
    ensure!(agent.ledger().unowned().contains(&shop.key), "{} is not found to be broken", map::SERVICES);
    ensure!(agent.ledger().ports().len() == 1, "adopted {:?}", agent.ledger().ports().keys());
    put(&mut agent, &services)?;
    ensure!(agent.ledger().entries() == 2, "{} entries are known", agent.ledger().entries());
    ensure!(listeners.spread(vip, 2)? == [2], "not repaired");
    agent.attach()?;
    ensure!(listeners.spread(vip, 2)? == [2] && listeners.spread(other, 2)? == [2], "not balanced");
    Ok(())
}
