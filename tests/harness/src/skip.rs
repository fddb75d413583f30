//! Tests that cannot run here say so; with `MESH_REQUIRE=1` (as `cargo xtask test` sets it for root) they fail.

use crate::{binaries, clock, hbone, say, sys};

/// What a test needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Root, for namespaces and cgroups.
    Root,
    /// Root and the built programs of the mesh.
    Mesh,
    /// The same, and what [`crate::hbone`] is made of.
    Hbone,
    /// Root, the built programs, and what [`crate::Clock`] is made of.
    Clock,
}

/// Why a test with this need cannot run here.
pub fn obstacle(need: Need) -> Option<String> {
    if !sys::is_root() {
        return Some("needs root".into());
    }
    let programs: &[&str] = match need {
        Need::Root => &["mesh-peer"],
        Need::Mesh | Need::Hbone | Need::Clock => &["mesh-peer", "mesh-agent", "mesh-control", "meshctl"],
    };
    let missing = programs.iter().find_map(|name| binaries::find(name).err());
    let missing = missing.or_else(|| match need {
        Need::Root | Need::Mesh => None,
        Need::Hbone => hbone::available().err(),
        Need::Clock => clock::library().err(),
    });
    missing.map(|error| format!("{error:#}"))
}

/// True when test `name` can run; else says that it is skipped, or panics if skipping is not allowed.
pub fn can_run(name: &str, need: Need) -> bool {
    let Some(obstacle) = obstacle(need) else { return true };
    assert!(std::env::var_os("MESH_REQUIRE").is_none(), "{name} cannot run: {obstacle}");
    say(&format!("skipped: {name}: {obstacle}"));
    false
}

/// Returns from the surrounding test, loudly, unless it can run here.
#[macro_export]
macro_rules! needs {
    ($need:ident) => {
        // The thread of a test carries its name.
        let thread = std::thread::current();
        let name = thread.name().unwrap_or(module_path!()).to_owned();
        if !$crate::skip::can_run(&name, $crate::skip::Need::$need) {
            return Ok(());
        }
    };
}
