//! The agent's own loader: how programs and maps come into force, are replaced and go, under real traffic.
//!
//! Here the agent's [`mesh_agent::datapath::Datapath`] fills the maps. Each test has its own network namespace, cgroup and
//! pin path.

mod damage;
mod foreign;
mod full;
mod layout;
mod log;
mod migration;
mod place;
mod restart;
mod reuse;
mod scene;

use anyhow::Result;

pub use place::WAITING;
pub use scene::Scene;

/// A test of the loader and its name.
#[derive(Clone, Copy)]
pub struct Test {
    /// The name.
    pub name: &'static str,
    /// The test.
    pub run: fn(&mut Scene) -> Result<()>,
}

/// A test that needs neither a network namespace nor a cgroup, and runs beside the others.
#[derive(Clone, Copy)]
pub struct Beside {
    /// The name.
    pub name: &'static str,
    /// The test.
    pub run: fn() -> Result<()>,
}

/// Every test of the loader.
pub fn tests() -> Vec<Test> {
    [
        restart::TESTS,
        migration::TESTS,
        layout::TESTS,
        damage::TESTS,
        place::TESTS,
        full::TESTS,
        reuse::TESTS,
        log::TESTS,
    ]
    .concat()
}
