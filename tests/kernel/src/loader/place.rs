//! One agent for one pin path, and its programs on one cgroup.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_agent::datapath::Datapath;
use mesh_common::abi::{Algorithm, Reason};

use super::scene::{PinPath, SIZES, Scene, frontend, reason};
use super::{Beside, Test};
use crate::cgroup;
use crate::traffic::{HOST4, Listeners, VIP4};

/// The tests.
pub(super) const TESTS: &[Test] = &[
    Test { name: "place::links_of_another_cgroup_are_attached_anew", run: another_cgroup },
    Test { name: "place::links_of_a_removed_cgroup_are_attached_anew", run: removed_cgroup },
    Test { name: "place::an_agent_waits_for_the_one_before_it", run: handover },
];

/// Runs beside the others, since it waits.
pub const WAITING: Beside = Beside { name: "place::a_second_agent_gives_up_with_the_reason", run: gives_up };

fn another_cgroup(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 1)?;
    let vip: SocketAddr = (VIP4, 80).into();
    let shop = frontend(vip, Algorithm::RoundRobin, &listeners.addresses()?);
    let nested = scene.cgroup.enter_nested()?;
    let config = mesh_agent::config::DatapathConfig { cgroup_root: nested, ..scene.config(SIZES) };
    let mut first = Datapath::prepare(&config)?;
    super::scene::put(&mut first, &[("shop", shop)])?;
    first.attach()?;
    ensure!(listeners.spread(vip, 1)? == [1], "not balanced");
    drop(first);
    let agent = scene.restart(SIZES)?;
    ensure!(agent.programs().iter().all(|program| !program.replaced), "attached {:?}", agent.programs());
    let before = (reason(&agent, Reason::Balanced)?, reason(&agent, Reason::NotService)?);
    ensure!(listeners.spread(vip, 3)? == [3], "not balanced");
    let after = (reason(&agent, Reason::Balanced)?, reason(&agent, Reason::NotService)?);
    // Programs that were still in the inner cgroup would come first, and those of the outer one meet a backend's address.
    ensure!(
        after == (before.0 + 3, before.1),
        "counts went from {before:?} to {after:?}: two programs are in force"
    );
    Ok(())
}

fn removed_cgroup(scene: &mut Scene) -> Result<()> {
    let listeners = Listeners::at(HOST4, 1)?;
    let vip: SocketAddr = (VIP4, 80).into();
    let shop = frontend(vip, Algorithm::RoundRobin, &listeners.addresses()?);
    let gone = scene.cgroup.path().join("gone");
    std::fs::create_dir(&gone).with_context(|| format!("cannot make {}", gone.display()))?;
    let config = mesh_agent::config::DatapathConfig { cgroup_root: gone.clone(), ..scene.config(SIZES) };
    let mut first = Datapath::prepare(&config)?;
    super::scene::put(&mut first, &[("shop", shop)])?;
    first.attach()?;
    drop(first);
    std::fs::remove_dir(&gone).with_context(|| format!("cannot remove {}", gone.display()))?;
    let agent = scene.restart(SIZES)?;
    ensure!(agent.programs().iter().all(|program| !program.replaced), "attached {:?}", agent.programs());
    ensure!(listeners.spread(vip, 3)? == [3], "not balanced");
    Ok(())
}

fn handover(scene: &mut Scene) -> Result<()> {
    let first = scene.start(SIZES, &[])?;
    let scene = &*scene;
    std::thread::scope(|scope| {
        let second = scope.spawn(|| -> Result<Instant> {
            scene.restart(SIZES)?;
            Ok(Instant::now())
        });
        std::thread::sleep(Duration::from_millis(500));
        ensure!(!second.is_finished(), "two agents run on one pin path");
        let dropped = Instant::now();
        drop(first);
        let started = second.join().map_err(|_panic| anyhow::anyhow!("the second agent panicked"))??;
        ensure!(started > dropped, "the second agent did not wait");
        Ok(())
    })
}

fn gives_up() -> Result<()> {
    let pins = PinPath::new("gives-up");
    // Nothing is attached there: neither agent gets that far.
    let config = pins.config(&cgroup::root()?, SIZES);
    let _first = Datapath::prepare(&config)?;
    let start = Instant::now();
    let error = Datapath::prepare(&config).err().context("two agents run on one pin path")?;
    let text = format!("{error:#}");
    let path = config.pin_path.display().to_string();
    ensure!(
        text.contains("--pin-path: another agent is running") && text.contains(&path),
        "refused with: {text}"
    );
    ensure!((5..60).contains(&start.elapsed().as_secs()), "waited {:?}", start.elapsed());
    Ok(())
}
