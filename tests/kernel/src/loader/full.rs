//! Full maps: what is in force stays, and what is not says why.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use mesh_agent::config::MapSizes;
use mesh_agent::workloads::Change;
use mesh_common::abi::{Algorithm, Reason, identity_of, map};

use super::Test;
use super::scene::{SIZES, Scene, counted, frontend, open, passes_unchanged, reason};
use crate::runner::until;
use crate::traffic::{HOST4, Listeners, VIP4, connect};

/// The tests.
pub(super) const TESTS: &[Test] = &[
    Test { name: "full::a_workload_too_many_is_refused_and_the_first_stays", run: workloads },
    Test { name: "full::a_backend_too_many_is_refused_and_the_others_stay", run: backends },
    Test { name: "full::connections_go_on_uncounted_when_counters_are_full", run: counters },
];

fn workloads(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 1)?;
    let vip: SocketAddr = (VIP4, 80).into();
    let shop = frontend(vip, Algorithm::RoundRobin, &listeners.addresses()?);
    let mut agent = scene.start(MapSizes { workloads: 1, ..SIZES }, &[("shop", shop)])?;
    agent.enroll(&scene.enrolment("first")?).map_err(anyhow::Error::msg)?;
    let second = Change::Add { cgroup: 1, uid: Arc::from("second") };
    let reason = agent.enroll(&second).err().context("a second workload was taken")?;
    ensure!(agent.failures().0 == 1, "the failure is not counted; it says {reason}");
    ensure!(scene.contents()?[map::WORKLOADS].len() == 1, "enrolled {:?}", scene.contents()?[map::WORKLOADS]);
    listeners.spread(vip, 1)?;
    let sources: Vec<u64> = agent.counters()?.iter().map(|(key, _)| key.source).collect();
    ensure!(sources == [identity_of("first").0], "counted for {sources:?}");
    // There is room when the first has gone.
    let Change::Add { cgroup, .. } = scene.enrolment("first")? else { unreachable!("an enrolment") };
    agent.enroll(&Change::Remove { cgroup }).map_err(anyhow::Error::msg)?;
    agent.enroll(&second).map_err(|reason| anyhow!("still refused: {reason}"))
}

fn backends(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 2)?;
    let addresses = listeners.addresses()?;
    let (vip, other): (SocketAddr, SocketAddr) = ((VIP4, 80).into(), (VIP4, 81).into());
    let shop = frontend(vip, Algorithm::RoundRobin, &addresses);
    let cart = frontend(other, Algorithm::RoundRobin, &addresses[..1]);
    let mut agent = scene.start(MapSizes { backends: 2, ..SIZES }, &[("shop", shop)])?;
    let now = Instant::now();
    let name: Arc<str> = Arc::from("cart");
    let refusal =
        agent.put(&name, std::slice::from_ref(&cart), now).err().context("a third backend was taken")?;
    ensure!(refusal.contains("BACKENDS") && refusal.contains("--max-backends"), "refused with: {refusal}");
    ensure!(agent.refused().get("cart") == Some(&refusal), "refused are {:?}", agent.refused());
    ensure!(listeners.spread(vip, 4)? == [2, 2], "the service that was there is not as it was");
    passes_unchanged(other)?;
    ensure!(agent.tick(now) == [Arc::clone(&name)], "it is not tried again");
    let less = frontend(vip, Algorithm::RoundRobin, &addresses[1..]);
    agent.put(&Arc::from("shop"), &[less], now).map_err(anyhow::Error::msg)?;
    let rested = now + Duration::from_secs(2);
    agent.tick(rested);
    agent.put(&name, &[cart], rested).map_err(|reason| anyhow!("still refused: {reason}"))?;
    ensure!(agent.refused().is_empty(), "refused are {:?}", agent.refused());
    ensure!(listeners.spread(vip, 2)? == [0, 2] && listeners.spread(other, 2)? == [2, 0], "not balanced");
    Ok(())
}

fn counters(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 3)?;
    let vip: SocketAddr = (VIP4, 80).into();
    let shop = frontend(vip, Algorithm::RoundRobin, &listeners.addresses()?);
    let agent = scene.start(MapSizes { counters: 1, ..SIZES }, &[("shop", shop.clone())])?;
    ensure!(listeners.spread(vip, 9)? == [3, 3, 3], "not balanced");
    let held = (connect(vip)?, listeners.accept()?);
    ensure!(
        open(&agent, &shop)?.iter().sum::<u64>() == 1,
        "loads are not counted: {:?}",
        open(&agent, &shop)?
    );
    ensure!(agent.counters()?.len() == 1, "{} counters", agent.counters()?.len());
    let attempts = counted(&agent, 1)?.attempts;
    ensure!((3..=4).contains(&attempts), "the one backend with a counter was reached {attempts} times");
    // Established and closed.
    until("the others", || Ok(reason(&agent, Reason::CountersFull)? >= 12))?;
    drop(held);
    Ok(())
}
